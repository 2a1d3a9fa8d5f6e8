"""Choose an implementation for every `moe_ep` node; none is left undecided.

Before:
    y = moe_ep.grouped_gemm(x, [w], offsets)
    o = moe_ep.combine(y, weights, order, offsets, K)

After:
    y = moe_ep_triton.grouped_gemm(x, w, offsets)      # on CUDA; or aten._grouped_mm, where the cost table says so
    o = moe_ep_triton.combine(y, weights, order, offsets, K)
    # on a CPU the nodes stay: each op has its CPU form (moe_compile/ops.py, moe_compile/cpu.py)

Stage      lower; runs on Inductor's forward and backward graphs, after autograd and the partitioner.
Numerics   each implementation means what the op means; products and sums may be tiled differently.
Why        one graph for all devices until here; the choice needs shapes, dtypes and strides that are final.
Refuses    nothing: an op that no kernel takes keeps its own form, and the report says what each kernel lacked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from moe_compile.cost import grouped_gemm_us
from moe_compile.rewrite import RewritePass, emit, value

aten, moe_ep = torch.ops.aten, torch.ops.moe_ep

OPS = ("dispatch", "grouped_gemm", "grouped_gemm_dw", "combine", "combine_backward")
FUSED = ("expert_mlp", "expert_mlp_backward")  # on a CPU only: fuse_experts makes no others


@dataclass(frozen=True)
class Site:
    """A node to decide, and the name of its op."""

    node: Node
    op: str


class ChooseKernels(RewritePass[Site]):
    def __init__(self) -> None:
        self.chosen: list[tuple[str, str, str]] = []  # (node, implementation, why not the others)

    def find(self, graph: Graph) -> Iterator[tuple[Node, Site]]:
        for op in (*OPS, *FUSED):
            for node in graph.find_nodes(op="call_function", target=getattr(moe_ep, op).default):
                yield node, Site(node, op)

    def rewrite(self, graph: Graph, site: Site) -> None:
        node = site.node
        device = next(value(n).device.type for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor))
        if device == "cuda" and site.op in OPS:
            self._on_cuda(graph, site)
        else:
            self.chosen.append((node.name, "moe_ep", ""))

    # -- CUDA -------------------------------------------------------------------------------

    def _on_cuda(self, graph: Graph, site: Site) -> None:
        node, op = site.node, site.op
        args = list(node.args)
        with graph.inserting_before(node):
            if op == "grouped_gemm":
                weights: Any = args[1]
                stack = weights[0] if len(weights) == 1 else emit(graph, aten.stack.default, list(weights), like=node)
                args[1] = stack
            reason = _why_not_triton(op, map_arg(tuple(args), lambda n: n.meta["val"]))
            lacking = f"triton: {reason}" if reason else ""
            if op == "grouped_gemm" and (cost := _prefer_grouped_mm(*args)) is not None:
                new, name, lacking = _grouped_mm(graph, node, *args), "aten._grouped_mm", cost
            elif reason is None:
                target = getattr(torch.ops.moe_ep_triton, op).default
                new, name = emit(graph, target, *args, like=node, val=node.meta["val"]), "triton"
            else:
                new, name = node, "moe_ep"
        if new is not node:
            node.replace_all_uses_with(new)
        self.chosen.append((node.name, name, lacking))


def _why_not_triton(op: str, vals: tuple[Any, ...]) -> str | None:
    try:
        from moe_compile.kernels import combine, combine_backward, dispatch, grouped_gemm, grouped_gemm_dw
    except ImportError:
        return "triton is not installed"
    modules = (dispatch, grouped_gemm, grouped_gemm_dw, combine, combine_backward)
    return dict(zip(OPS, modules, strict=True))[op].why_not(*vals)


def _prefer_grouped_mm(x: Any, w: Any, offsets: Any) -> str | None:
    """Why torch's own grouped product is the better choice, or None."""
    x_RD, w_EFD = value(x), value(w)
    aligned = all(isinstance(s, int) and s * x_RD.element_size() % 16 == 0 for s in (*w_EFD.shape[1:], x_RD.shape[1]))
    packed = w_EFD.stride(-1) == 1 or w_EFD.stride(-2) == 1
    if x_RD.dtype != torch.bfloat16 or w_EFD.dtype != x_RD.dtype or not aligned or not packed:
        return None
    ours, theirs = (grouped_gemm_us(name, x_RD, w_EFD) for name in ("triton", "grouped_mm"))
    return f"triton: {ours:.0f} us estimated, {theirs:.0f} us with aten._grouped_mm" if theirs < ours else None


def _grouped_mm(graph: Graph, node: Node, x: Any, w: Any, offsets: Any) -> Node:
    """aten._grouped_mm, with the rows behind the last offset, which it leaves unset, as zeros."""
    transposed = emit(graph, aten.permute.default, w, [0, 2, 1], like=node)
    product = emit(graph, aten._grouped_mm.default, x, transposed, offsets, like=node, val=value(node))
    rows = emit(graph, aten.arange.default, value(node).shape[0], like=node, val=_rows(node))
    rows.kwargs = {"dtype": torch.int32, "device": value(node).device}
    stop = emit(graph, aten.select.int, offsets, 0, -1, like=node)
    kept = emit(graph, aten.unsqueeze.default, emit(graph, aten.lt.Tensor, rows, stop, like=node), 1, like=node)
    zero = emit(graph, aten.full.default, [], 0.0, like=node, val=value(node).new_empty(()))
    zero.kwargs = {"dtype": value(node).dtype, "device": value(node).device}
    return emit(graph, aten.where.self, kept, product, zero, like=node)


def _rows(node: Node) -> Tensor:
    return value(node).new_empty(value(node).shape[0], dtype=torch.int32)
