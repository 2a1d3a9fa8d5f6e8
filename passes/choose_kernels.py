"""Choose an implementation for every `moe_ep` node; none is left undecided.

Before:
    y = moe_ep.grouped_gemm(x, [w], offsets)
    o = moe_ep.combine(y, weights, order, offsets, K)

After:
    y = moe_ep_triton.grouped_gemm(x, w, offsets)      # on CUDA; or aten._grouped_mm, where the cost table says so;
                                                       # or, under max_autotune, moe_ep_timed's: Inductor times both
    o = moe_ep_triton.combine(y, weights, order, offsets, K)
    # on CUDA, `expert_mlp` whose products before the activation nobody keeps is written as its kernels;
    # otherwise it stays one call of the op, which runs them (moe_compile/cuda.py); so does any product with separate
    # weights, [w0, w1, ...], which it reads where they are: `moe_ep_triton.expert_mlp_result` if nobody keeps them
    # `check_ids` becomes ATen's comparisons and an assertion, for Inductor to write as one kernel
    # on a CPU the nodes stay: each op has its CPU form (moe_compile/ops.py, moe_compile/cpu.py)

Stage      lower; runs on Inductor's forward and backward graphs, after autograd and the partitioner.
Numerics   each implementation means what the op means; products and sums may be tiled differently.
Why        one graph for all devices until here; the choice needs shapes, dtypes and strides that are final.
Refuses    nothing: an op that no kernel takes keeps its own form, and the report says what each kernel lacked.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from moe_compile import autotune, cuda
from moe_compile.cost import grouped_gemm_us
from moe_compile.rewrite import RewritePass, emit, value

aten, moe_ep = torch.ops.aten, torch.ops.moe_ep

OPS = ("dispatch", "grouped_gemm", "grouped_gemm_scaled", "grouped_gemm_dw", "combine", "combine_backward")
FUSED = ("expert_mlp", "expert_mlp_backward")
CHECK = "check_ids"


@dataclass(frozen=True)
class Site:
    """A node to decide, and the name of its op."""

    node: Node
    op: str


class ChooseKernels(RewritePass[Site]):
    def __init__(self) -> None:
        self.chosen: list[tuple[str, str, str]] = []  # (node, implementation, why not the others)

    def find(self, graph: Graph) -> Iterator[tuple[Node, Site]]:
        for op in (*OPS, *FUSED, CHECK):
            for node in graph.find_nodes(op="call_function", target=getattr(moe_ep, op).default):
                yield node, Site(node, op)

    def rewrite(self, graph: Graph, site: Site) -> None:
        node = site.node
        device = next(value(n).device.type for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor))
        if device == "cuda":
            how = {CHECK: self._check_on_cuda} | dict.fromkeys(OPS, self._on_cuda)
            how.get(site.op, self._fused_on_cuda)(graph, site)
        else:
            self.chosen.append((node.name, "moe_ep", ""))

    # -- CUDA -------------------------------------------------------------------------------

    def _check_on_cuda(self, graph: Graph, site: Site) -> None:
        """An assertion on the device, which Inductor writes into a kernel, and the ids themselves: where its kernels
        have assertions.  The op is a launch for each of its steps, and a copy."""
        ids, num_classes = site.node.args
        assert isinstance(ids, Node)
        if torch.version.hip or not inductor_config.assert_indirect_indexing:
            self.chosen.append((site.node.name, "moe_ep", "Inductor: its kernels have no assertions here"))
            return
        with graph.inserting_before(site.node):
            low = emit(graph, aten.lt.Scalar, ids, 0, like=ids)
            high = emit(graph, aten.ge.Scalar, ids, num_classes, like=ids)
            wrong = emit(graph, aten.any.default, emit(graph, aten.logical_or.default, low, high, like=ids), like=ids)
            right = emit(graph, aten.logical_not.default, wrong, like=ids)
            graph.call_function(aten._assert_async.msg, (right, f"an expert's id is outside [0, {num_classes})"))
        site.node.replace_all_uses_with(ids)
        self.chosen.append((site.node.name, "Inductor", ""))

    def _on_cuda(self, graph: Graph, site: Site) -> None:
        node, op = site.node, site.op
        args = list(node.args)
        vals: Any = map_arg(node.args[:2], lambda n: n.meta["val"])
        if op == "grouped_gemm" and cuda.takes_addresses(*vals):
            self.chosen.append((node.name, "triton, by addresses", ""))
            return
        with graph.inserting_before(node):
            if op in ("grouped_gemm", "grouped_gemm_scaled"):
                weights: Any = args[1]
                args[1] = weights[0] if len(weights) == 1 else _stacked(graph, weights, like=node)
            reason = _why_not_triton(op, map_arg(tuple(args), lambda n: n.meta["val"]))
            lacking = f"triton: {reason}" if reason else ""
            if op == "grouped_gemm" and reason is None and _timed(*args[:2]):
                new, name = _by_time(graph, node, *args), "the faster one, by Inductor"
            elif op == "grouped_gemm" and (cost := _prefer_grouped_mm(*args[:2])) is not None:
                new, name, lacking = _grouped_mm(graph, node, *args), "aten._grouped_mm", cost
            elif reason is None:
                target = getattr(torch.ops.moe_ep_triton, op).default
                new, name = emit(graph, target, *args, like=node, val=node.meta["val"]), "triton"
            else:
                new, name = node, "moe_ep"
        if new is not node:
            node.replace_all_uses_with(new)
        self.chosen.append((node.name, name, lacking))

    def _fused_on_cuda(self, graph: Graph, site: Site) -> None:
        """One call for a training step: Inductor could fuse nothing into its kernels, and what they hand each other is
        freed inside.  An inference does without one output, which a call cannot know; with separate weights it is
        one call too, of another op, which reads them by their addresses."""
        node, forward = site.node, site.op == "expert_mlp"
        reason = _why_not_fused(node, forward)
        vals: Any = map_arg(node.args, lambda n: n.meta["val"])
        apart = forward and any(cuda.takes_addresses(vals[0], w) for w in vals[3:6])
        read = [n for n in node.users if n.users]
        results = [n for n in read if n.target is operator.getitem and n.args[1] == 0]
        if reason is None and forward and results == read:
            with graph.inserting_before(node):
                out, name = _inference_in_one_call(graph, node) if apart else _inference(graph, node)
            for result in results:
                result.replace_all_uses_with(out)
            self.chosen.append((node.name, name, ""))
        else:
            lacking = f"triton: {reason}" if reason else ""
            self.chosen.append((node.name, "moe_ep" if reason else "triton, in one call", lacking))


def _why_not_fused(node: Node, forward: bool) -> str | None:
    vals: Any = map_arg(node.args, lambda n: n.meta["val"])
    if forward:
        x, ids, weights, gate, up, down, num_experts, activation, gated, *biases = vals
        top_k, routing = ids.shape[1], cuda.why_not_routing(ids, num_experts)
    else:
        _, x, _, weights, offsets, _, gate, up, down, activation, gated, _, _, *biases = vals
        num_experts, routing, top_k = offsets.shape[0], None, 1 if weights is None else weights.shape[1]
    return routing or cuda.why_not_mlp(x, weights, gate, up, down, num_experts, top_k, activation, gated, *biases)


def _inference_in_one_call(graph: Graph, node: Node) -> tuple[Node, str]:
    """The same by a call that writes no products before the activation."""
    val = next(value(n) for n in node.users if n.args[1] == 0)
    new = emit(graph, torch.ops.moe_ep_triton.expert_mlp_result.default, *node.args, like=node, val=val)
    return new, "triton, in one call"


def _inference(graph: Graph, node: Node) -> tuple[Node, str]:
    """(result, by whom the last product is done) of an `expert_mlp` whose other outputs nobody reads."""
    x, ids, weights, gate, up, down, num_experts, activation, gated, *biases = node.args
    bias_EG, bias_ED = [*biases, None, None][:2]
    top_k, triton = value(ids).shape[1], torch.ops.moe_ep_triton  # type: ignore[arg-type]

    def stack(w: Any) -> Any:
        if not w:
            return None
        return w[0] if value(w[0]).dim() == 3 else _stacked(graph, w, like=node)

    def part(of: Node, index: int) -> Node:
        return emit(graph, operator.getitem, of, index, like=node)

    first = stack(gate), stack(up)
    rows: Any = _rows_of_tiles(x, *first, ids, gated)
    routing = emit(graph, triton.route_rows.default, ids, num_experts, rows, like=node)
    order, offsets, position, tiles = (part(routing, i) for i in range(4))
    arguments = (x, *first, offsets, order, top_k, activation, gated, False, bias_EG, tiles, rows)
    a, last = part(emit(graph, triton.gated_gemm.default, *arguments, like=node), 0), stack(down)
    if bias_ED is not None:  # added where our product ends
        y, name = emit(graph, triton.grouped_gemm.default, a, last, offsets, bias_ED, tiles, rows, like=node), "triton"
    elif _timed(a, last):
        y, name = _by_time(graph, node, a, last, offsets), "triton and the faster one, by Inductor"
    elif _prefer_grouped_mm(a, last) is not None:
        product = emit(graph, moe_ep.grouped_gemm.default, a, [last], offsets, like=node)
        y, name = _grouped_mm(graph, product, a, last, offsets), "triton and aten._grouped_mm"
        graph.erase_node(product)
    else:
        y, name = emit(graph, triton.grouped_gemm.default, a, last, offsets, None, tiles, rows, like=node), "triton"
    return emit(graph, triton.combine.default, y, weights, order, offsets, top_k, position, like=node), name


def _stacked(graph: Graph, weights: Any, like: Node) -> Node:
    """One stack of matrices, by ops that Inductor takes behind its decompositions."""
    matrices = [emit(graph, aten.unsqueeze.default, w, 0, like=like) for w in weights]
    return emit(graph, aten.cat.default, matrices, like=like)


def _rows_of_tiles(x: Any, gate: Node | None, up: Node, ids: Any, gated: Any) -> int:
    from moe_compile.kernels.gated_gemm import tile_rows

    R = value(ids).shape[0] * value(ids).shape[1]
    return tile_rows(value(x), None if gate is None else value(gate), value(up), R, gated)


def _why_not_triton(op: str, vals: tuple[Any, ...]) -> str | None:
    try:
        module = import_module(f"moe_compile.kernels.{op}")
    except ImportError:
        return "triton is not installed"
    return module.why_not(*vals)  # type: ignore[no-any-return]


def _takes_grouped_mm(x_RD: Tensor, w_EFD: Tensor) -> bool:
    """Whether torch's own grouped product can have these operands."""
    aligned = all(isinstance(s, int) and s * x_RD.element_size() % 16 == 0 for s in (*w_EFD.shape[1:], x_RD.shape[1]))
    packed = w_EFD.stride(-1) == 1 or w_EFD.stride(-2) == 1
    return x_RD.dtype == w_EFD.dtype == torch.bfloat16 and aligned and packed


def _timed(x: Any, w: Any) -> bool:
    """Whether Inductor is to time both products, as the user asked by `max_autotune`."""
    asked = inductor_config.max_autotune or inductor_config.max_autotune_gemm
    return asked and _takes_grouped_mm(value(x), value(w))


def _by_time(graph: Graph, like: Node, x: Any, w: Any, offsets: Any) -> Node:
    autotune.register()
    return emit(graph, torch.ops.moe_ep_timed.grouped_gemm.default, x, w, offsets, like=like)


def _prefer_grouped_mm(x: Any, w: Any) -> str | None:
    """Why torch's own grouped product is the better choice, or None."""
    x_RD, w_EFD = value(x), value(w)
    if not _takes_grouped_mm(x_RD, w_EFD):
        return None
    ours, theirs = (grouped_gemm_us(name, x_RD, w_EFD) for name in ("triton", "grouped_mm"))
    return f"triton: {ours:.0f} us estimated, {theirs:.0f} us with aten._grouped_mm" if theirs < ours else None


def _grouped_mm(graph: Graph, node: Node, x: Any, w: Any, offsets: Any) -> Node:
    """aten._grouped_mm, with the rows behind the last offset, which it leaves unset, as zeros."""
    transposed = emit(graph, aten.permute.default, w, [0, 2, 1], like=node)
    product = emit(graph, aten._grouped_mm.default, x, transposed, offsets, like=node, val=value(node))
    # behind Inductor's decompositions: it takes no `arange` here
    rows = emit(graph, torch.ops.prims.iota.default, value(node).shape[0], like=node, val=_rows(node))
    rows.kwargs = {**_IOTA, "device": value(node).device}
    stop = emit(graph, aten.select.int, offsets, 0, -1, like=node)
    kept = emit(graph, aten.unsqueeze.default, emit(graph, aten.lt.Tensor, rows, stop, like=node), 1, like=node)
    zero = emit(graph, aten.full.default, [], 0.0, like=node, val=value(node).new_empty(()))
    zero.kwargs = {"dtype": value(node).dtype, "device": value(node).device}
    return emit(graph, aten.where.self, kept, product, zero, like=node)


_IOTA: dict[str, Any] = {"start": 0, "step": 1, "dtype": torch.int32, "requires_grad": False}


def _rows(node: Node) -> Tensor:
    return value(node).new_empty(value(node).shape[0], dtype=torch.int32)
