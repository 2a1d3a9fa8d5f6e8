"""Let `combine` apply the routing weights, instead of a pass over all rows before it.

Before:
    w_R1  = aten.index(aten.reshape(weights_TK1, [-1, 1]), [order_R])
    y_RD  = aten.mul(z_RD, w_R1)                                   # perhaps aten.to.dtype after it
    out   = moe_ep.combine(y_RD, None, order_R, offsets_E, K)

After:
    out   = moe_ep.combine(z_RD, aten.reshape(weights_TK1, [-1, K]), order_R, offsets_E, K)

Stage      canonicalise; needs what dispatch_experts makes.
Numerics   products and their sum run in f32 or wider and are rounded once: the same or fewer roundings.
Why        one read and one write of all rows fewer; the gradient of the weights comes from the same pass.
Refuses    a product that is used elsewhere too, or that broadcasts in another way.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from moe_compile.rewrite import RewritePass, emit, value

aten, moe_ep = torch.ops.aten, torch.ops.moe_ep


@dataclass(frozen=True)
class Weighted:
    """A combine whose rows were multiplied by one weight each."""

    combine: Node
    product: Node
    rows: Node
    weights: Node  # [T*K, 1] before the gather


class FoldRoutingWeights(RewritePass[Weighted]):
    def find(self, graph: Graph) -> Iterator[tuple[Node, Weighted]]:
        for combine in graph.find_nodes(op="call_function", target=moe_ep.combine.default):
            y, weights, order, *_ = combine.args
            product = y.args[0] if _is(y, aten.to.dtype) else y
            if weights is not None or not _is(product, aten.mul.Tensor):
                continue
            for rows, gathered in (product.args, product.args[::-1]):
                flat = _gathered_by(gathered, order)
                if flat is not None and isinstance(rows, Node):
                    yield combine, Weighted(combine, product, rows, flat)
                    break

    def refuse(self, found: Weighted) -> str | None:
        rows, weights = value(found.rows), value(found.weights)
        if rows.dim() != 2 or weights.shape[1:].numel() != 1:
            return f"rows are {tuple(rows.shape)}, weights {tuple(weights.shape)}"
        first, last = found.product, found.combine.args[0]
        if len(first.users) > 1 or (isinstance(last, Node) and len(last.users) > 1):
            return "the weighted rows are used elsewhere too"
        return None

    def rewrite(self, graph: Graph, found: Weighted) -> None:
        combine = found.combine
        _, _, order, offsets, top_k = combine.args
        with graph.inserting_before(combine):
            weights = emit(graph, aten.reshape.default, found.weights, [-1, top_k], like=combine)
            new = emit(graph, moe_ep.combine.default, found.rows, weights, order, offsets, top_k, like=combine)
            if value(new).dtype != value(combine).dtype:
                new = emit(graph, aten.to.dtype, new, value(combine).dtype, like=combine)
        combine.replace_all_uses_with(new)


def _is(node: object, target: object) -> bool:
    return isinstance(node, Node) and node.target is target


def _gathered_by(node: object, order: object) -> Node | None:
    """The flat weights of `index(weights, [order])`, seen through unsqueeze(-1)."""
    if isinstance(node, Node) and node.target is aten.unsqueeze.default and node.args[1] in (1, -1):
        node = node.args[0]
    if not (isinstance(node, Node) and node.target is aten.index.Tensor):
        return None
    source, indices = node.args
    return source if isinstance(source, Node) and list(indices) == [order] else None  # type: ignore[arg-type]
