"""Write dispatch, two products with an activation between them, and combine as one `expert_mlp`.

Before:
    x_RD, offsets, order = moe_ep.dispatch(x, ids, E)
    gate, up = aten.chunk(moe_ep.grouped_gemm(x_RD, [w13], offsets), 2, -1)
    y_RD     = moe_ep.grouped_gemm(aten.silu(gate) * up, [w2], offsets)
    out      = moe_ep.combine(y_RD, weights, order, offsets, K)

After:
    out = moe_ep.expert_mlp(x, ids, weights, [], [w13], [w2], E, "silu", True)[0]

Stage      canonicalise; after fold_routing_weights, whose weighted combine it takes.
Numerics   the same sums; the gradient of the routing weights is a dot product in F instead of one in D.  In bf16 the
           numbers between two products are rounded once instead of after each op.
Why        a dozen nodes fewer a layer for the compiler to work on, in the forward and in the backward; no gathered row
           and no activation is kept for the backward.
Refuses    dtypes and devices without such a kernel: on a CPU see `has_kernel`, on CUDA the kernels' own `why_not`.  Any
           other body keeps the general ops.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moe_compile import cuda
from moe_compile.expert_mlp import has_kernel
from moe_compile.rewrite import RewritePass, emit, value
from moe_compile.series import series_of

aten, moe_ep = torch.ops.aten, torch.ops.moe_ep
RESHAPES = (
    aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints,
)  # fmt: skip


Weights = tuple[Node, ...] | Node  # stacked in one node, one node an expert, or a series (series.py)


@dataclass(frozen=True)
class Mlp:
    """The experts that end in `combine`."""

    combine: Node
    dispatch: Node
    gate: Weights  # as `expert_mlp` takes them
    up: Weights
    down: Weights
    activation: str
    gated: bool
    inside: frozenset[Node]  # what the op replaces


class FuseExperts(RewritePass[Mlp]):
    def find(self, graph: Graph) -> Iterator[tuple[Node, Mlp]]:
        for combine in graph.find_nodes(op="call_function", target=moe_ep.combine.default):
            if (found := _Matcher(combine).match()) is not None:
                yield combine, found

    def refuse(self, found: Mlp) -> str | None:
        x: Any = found.dispatch.args[0]
        weights: Any = found.combine.args[1]
        of_weights = None if weights is None else value(weights).dtype
        parts = [value(x), *_fakes(found.gate), *_fakes(found.up), *_fakes(found.down)]
        kinds = {(t.device.type, t.dtype) for t in parts}
        named = " and ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
        if len(kinds) == 1 and value(x).device.type == "cuda":
            reason = _why_not_cuda(found)
            return reason and f"no fused kernel for {named}: {reason}"
        if len(kinds) > 1 or value(x).device.type != "cpu" or not has_kernel(value(x).dtype, of_weights):
            return f"no fused kernel for {named}, routing weights {of_weights}"
        return None

    def rewrite(self, graph: Graph, found: Mlp) -> None:
        combine = found.combine
        x, ids, num_experts = found.dispatch.args
        weights = combine.args[1]
        if isinstance(weights, Node):
            weights = _before_reshapes(weights)
        lists = [w if isinstance(w, Node) else list(w) for w in (found.gate, found.up, found.down)]
        rest = (num_experts, found.activation, found.gated)
        target: Any = moe_ep.expert_mlp.default
        routed = [value(n) if isinstance(n, Node) else None for n in (x, ids, weights)]
        val = target(*routed, *map(_fakes, (found.gate, found.up, found.down)), *rest)
        with graph.inserting_before(combine):
            new = emit(graph, target, x, ids, weights, *lists, *rest, like=combine, val=val)
            out = emit(graph, operator.getitem, new, 0, like=combine)
        combine.replace_all_uses_with(out)


def _why_not_cuda(found: Mlp) -> str | None:
    x, ids, num_experts = found.dispatch.args
    weights: Any = found.combine.args[1]
    gate, up, down = (
        _fakes(w) if (series := series_of(w)) is None else [series.example] * len(series)
        for w in (found.gate, found.up, found.down)
    )
    top_k: Any = found.combine.args[4]
    return cuda.why_not_mlp(
        value(x), None if weights is None else value(weights), gate, up, down, num_experts, top_k,  # type: ignore[arg-type]
        found.activation, found.gated,
    ) or cuda.why_not_routing(value(ids), num_experts)  # type: ignore[arg-type]  # fmt: skip


# -- matching, backwards from combine --------------------------------------------------------


class _Matcher:
    def __init__(self, combine: Node) -> None:
        self.combine, self.inside = combine, {combine}

    def match(self) -> Mlp | None:
        """The whole, if the nodes between dispatch and combine are just these and nobody else uses them."""
        arguments: Any = self.combine.args
        rows, _, order, offsets, top_k = arguments
        last = self.gemm(rows, offsets)
        if last is None or (between := self.activated(last[0], offsets)) is None:
            return None
        activation, gated, rows, gate, up = between
        routing = [n.args[0] if _is(n, operator.getitem) else None for n in (rows, offsets, order)]
        dispatch: Any = routing[0]
        if not _is(dispatch, moe_ep.dispatch.default) or any(n is not dispatch for n in routing):
            return None
        if [n.args[1] for n in (rows, offsets, order)] != [0, 1, 2] or value(dispatch.args[1]).shape[1] != top_k:
            return None
        parts = self.inside | {dispatch, rows, offsets, order}
        if any(user not in parts for n in parts - {self.combine} for user in n.users):
            return None
        return Mlp(self.combine, dispatch, gate, up, last[1], activation, gated, frozenset(parts))

    def see(self, node: Any) -> Any:
        """The node, seen through casts to the dtype that it has."""
        while _is(node, aten.to.dtype) and value(node).dtype == value(node.args[0]).dtype:
            self.inside.add(node)
            node = node.args[0]
        return node

    def gemm(self, node: Any, offsets: Any) -> tuple[Node, Weights] | None:
        """(rows, weights) of a grouped GEMM."""
        node = self.see(node)
        if not _is(node, moe_ep.grouped_gemm.default) or node.args[2] is not offsets:
            return None
        self.inside.add(node)
        weights = node.args[1]
        return self.see(node.args[0]), weights if isinstance(weights, Node) else tuple(weights)

    def activated(self, node: Any, offsets: Any) -> tuple[str, bool, Node, Weights, Weights] | None:
        """(activation, gated, rows of tokens, gate weights, up weights) of what the last product takes."""
        node = self.see(node)
        known = set(self.inside)
        if (plain := self.activation(node)) is not None and (first := self.gemm(plain[1], offsets)) is not None:
            return plain[0], False, first[0], (), first[1]
        self.inside = known
        if not _is(node, aten.mul.Tensor):
            return None
        self.inside.add(node)
        for a, u in (node.args, node.args[::-1]):
            known, before = set(self.inside), self.activation(self.see(a))
            if before is not None:
                name, g = before
                source, low = self.half(g)
                other, high = self.half(self.see(u))
                if source is other and (low, high) == (0, 1) and (first := self.gemm(source, offsets)) is not None:
                    return name, True, first[0], (), first[1]
                gate, up = self.gemm(g, offsets), self.gemm(u, offsets)
                if gate is not None and up is not None and gate[0] is up[0] and _width(gate[1]) == _width(up[1]):
                    return name, True, gate[0], gate[1], up[1]
            self.inside = known
        return None

    def activation(self, node: Any) -> tuple[str, Any] | None:
        """(name, operand) of an activation that `expert_mlp` knows."""
        found = _activation(node)
        if found is not None:
            self.inside |= set(found[2])
            return found[0], self.see(found[1])
        return None

    def half(self, node: Any) -> tuple[Node | None, int]:
        """(source, 0 or 1) of one half of the last dimension; (None, -1) of anything else."""
        parts: Any
        if _is(node, aten.slice.Tensor) and len(node.args) == 4:
            (source, dim, start, stop), parts = node.args, node
            width = value(source).shape[1]
            place = {(0, width // 2): 0, (width // 2, width): 1}.get((start, min(stop, width)), -1)
            whole = place < 0
        else:
            parts = node.args[0] if _is(node, operator.getitem) else None
            if not _is(parts, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default):
                return None, -1
            source, sizes, dim = [*parts.args, 0][:3]
            place, width = node.args[1], value(source).shape[-1]
            wanted = {aten.chunk.default: 2, aten.split.Tensor: width // 2}.get(parts.target, [width // 2] * 2)
            whole = (list(sizes) if isinstance(sizes, (list, tuple)) else sizes) != wanted
        if whole or dim not in (1, -1) or width % 2 or value(source).dim() != 2:
            return None, -1
        self.inside |= {node, parts}
        return source, place


def _fakes(weights: Weights) -> list[Tensor]:
    """The fake of each tensor; of a series one, as all are like it, and no result depends on their number."""
    series = series_of(weights)
    return [series.example] if series is not None else [value(w) for w in weights]  # type: ignore[union-attr]


def _width(weights: Weights) -> int:
    """How many numbers a product with these weights gives; a product of one would be spread over all of the other."""
    return int(_fakes(weights)[0].shape[-2])


def _activation(node: Any) -> tuple[str, Any, tuple[Node, ...]] | None:
    """(name, operand, nodes) of an activation."""
    if _is(node, aten.silu.default, aten.relu.default):
        return str(node.target).split(".")[1], node.args[0], (node,)
    if _is(node, aten.gelu.default):
        how = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}[how], node.args[0], (node,)
    squared = _is(node, aten.square.default) or (_is(node, aten.pow.Tensor_Scalar) and node.args[1] == 2)
    if squared and _is(node.args[0], aten.relu.default):
        return "relu_squared", node.args[0].args[0], (node, node.args[0])
    if _is(node, aten.mul.Tensor):
        for g, s in (node.args, node.args[::-1]):
            if _is(s, aten.sigmoid.default) and s.args[0] is g:
                return "silu", g, (node, s)
    return None


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.target in targets


def _before_reshapes(node: Node) -> Node:
    """The first of a chain of reshapes that has the shape of the last: the same numbers in the same order."""
    first: Any = node
    source: Any = node
    while source.op == "call_function" and source.target in RESHAPES:
        source = source.args[0]
        here, last = value(source).shape, value(node).shape
        if len(here) == len(last) and all(statically_known_true(a == b) for a, b in zip(here, last, strict=True)):
            first = source
    return first
