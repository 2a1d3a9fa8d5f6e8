"""Write dispatch, two products with an activation between them, and combine as one `expert_mlp`.

Before:
    x_RD, offsets, order = moe_ep.dispatch(x, ids, E)
    gate, up = aten.chunk(moe_ep.grouped_gemm(x_RD, [w13], offsets), 2, -1)
    y_RD     = moe_ep.grouped_gemm(aten.silu(gate) * up, [w2], offsets)
    out      = moe_ep.combine(y_RD, weights, order, offsets, K)

After:
    out = moe_ep.expert_mlp(x, ids, weights, [], [w13], [w2], E, "silu", True)[0]

Biases that were gathered by row are added before the activation and behind the last product, and go with them; so do a
limit, an alpha, a shift and numbers in pairs (activations.py), as in

    h         = moe_ep.grouped_gemm(x_RD, [w13], offsets) + aten.index(b13, [expert_R])
    gate, up  = aten.clamp(h[:, ::2], None, 7.0), aten.clamp(h[:, 1::2], -7.0, 7.0)
    a         = (up + 1) * (gate * aten.sigmoid(gate * 1.702))

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
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moe_compile import cuda
from moe_compile.expert_mlp import has_kernel
from moe_compile.mlp_pattern import Mlp, fakes, matched
from moe_compile.rewrite import RewritePass, emit, value
from moe_compile.series import series_of

aten, moe_ep = torch.ops.aten, torch.ops.moe_ep
RESHAPES = (
    aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints,
)  # fmt: skip


class FuseExperts(RewritePass[Mlp]):
    def find(self, graph: Graph) -> Iterator[tuple[Node, Mlp]]:
        for combine in graph.find_nodes(op="call_function", target=moe_ep.combine.default):
            if (found := matched(combine)) is not None:
                yield combine, found

    def refuse(self, found: Mlp) -> str | None:
        x: Any = found.dispatch.args[0]
        weights: Any = found.combine.args[1]
        of_weights = None if weights is None else value(weights).dtype
        biases = [value(b) for b in (*found.first_biases, found.last_bias) if b is not None]
        parts = [value(x), *fakes(found.gate), *fakes(found.up), *fakes(found.down), *biases]
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
        rest: list[Any] = [num_experts, found.activation, found.gated]
        target: Any = moe_ep.expert_mlp.default
        routed = [value(n) if isinstance(n, Node) else None for n in (x, ids, weights)]
        with graph.inserting_before(combine):
            if found.first_biases or found.last_bias is not None:
                first: Any = found.first_biases[0] if found.first_biases else None
                if len(found.first_biases) > 1:
                    first = emit(graph, aten.cat.default, list(found.first_biases), 1, like=combine)
                rest += [first, found.last_bias]
            vals = [value(n) if isinstance(n, Node) else n for n in rest]
            val = target(*routed, *map(fakes, (found.gate, found.up, found.down)), *vals)
            new = emit(graph, target, x, ids, weights, *lists, *rest, like=combine, val=val)
            out = emit(graph, operator.getitem, new, 0, like=combine)
        combine.replace_all_uses_with(out)


def _why_not_cuda(found: Mlp) -> str | None:
    x, ids, num_experts = found.dispatch.args
    weights: Any = found.combine.args[1]
    gate, up, down = (
        fakes(w) if (series := series_of(w)) is None else [series.example] * len(series)
        for w in (found.gate, found.up, found.down)
    )
    top_k: Any = found.combine.args[4]
    return cuda.why_not_mlp(
        value(x), None if weights is None else value(weights), gate, up, down, num_experts, top_k,  # type: ignore[arg-type]
        found.activation, found.gated, *(value(b) for b in (*found.first_biases, found.last_bias) if b is not None),
    ) or cuda.why_not_routing(value(ids), num_experts)  # type: ignore[arg-type]  # fmt: skip


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
