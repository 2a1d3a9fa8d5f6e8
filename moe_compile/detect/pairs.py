"""Rules for all pairs (t, k) at once: more ways to write the token of each, and their sum with weights.

rows = x[arange(T).repeat_interleave(K)]                       # or by arange(T * K) // K, or expanded to [T, K, D]
out  = (rows.view(T, K, D) * weights[..., None]).sum(1)        # or by einsum
out  = (stack of all experts' results).gather(1, ids) ...      # [T, K, D]: of the chosen ones
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.dense_values import Chosen, DenseSum, DenseTerm, DenseWeight, Positions, Stacked
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.nodes import op_of
from moe_compile.detect.rows import whole_slice
from moe_compile.detect.shapes import same_size
from moe_compile.detect.sorted_values import PairGrid
from moe_compile.detect.sum_values import Buffer, Sum
from moe_compile.detect.values import Plain, Repeated, Rows, Selection, Value

aten = torch.ops.aten


# -- the token of each pair -----------------------------------------------------------------


def arange(call: Call) -> Value | None:
    start = call.number(0) if str(call.node.target) in ("aten.arange.start", "aten.arange.start_step") else 0
    step = call.number(2) if str(call.node.target) == "aten.arange.start_step" else 1
    counts = type(start) is int and start == 0 and type(step) is int and step == 1
    known = call.run.fold(call.node, call)
    return Positions("all", 1, known) if counts and call.val().dtype == torch.int64 else None


def position(call: Call) -> Value | None:
    """arange // K, arange.repeat_interleave(K), arange[:, None].expand(T, K).reshape(-1)."""
    value, val = call.arg(0), call.val()
    if not isinstance(value, Positions) or not isinstance(val, Tensor) or val.dtype != torch.int64:
        return None
    if call.op == "slice":
        return value if whole_slice(call) else None
    number, before = call.number(1), call.val(call.node.args[0])
    known = None
    if value.known is not None:
        known = call.run.fold(call.node, Call(call.node, call.op, [value.known, *call.args[1:]], call.kwargs, call.run))
    if value.shape == "all":
        whole = type(number) is int and number > 0
        if call.op == "floor_divide" or (call.op == "div" and call.kwargs.get("rounding_mode") in ("floor", "trunc")):
            return Positions("pairs", number, known) if whole else None
        if call.op == "repeat_interleave" and call.number(2, "dim") in (None, 0, -1):
            return Positions("pairs", number, known) if whole else None
        column = call.op in ("unsqueeze", "view", "reshape") and val.dim() == 2 and same_size(val.shape[1], 1)
        return Positions("column", 1, known) if column else None
    if value.shape == "column" and call.op in ("expand", "repeat") and val.dim() == 2 and type(val.shape[1]) is int:
        return Positions("grid", val.shape[1], known) if same_size(val.shape[0], before.shape[0]) else None
    if value.shape == "grid" and call.op in ("view", "reshape", "flatten") and val.dim() == 1:
        return Positions("pairs", value.top_k, known)
    return None


def token_of_pair(call: Call) -> Value | None:
    """x[positions]."""
    value, indices = call.arg(0), call.arg(1)
    if not isinstance(value, Plain) or len(indices) != 1 or not isinstance(indices[0], Positions):
        return None
    return _repeated(call, value.node, indices[0].top_k) if indices[0].shape == "pairs" else None


def spread_tokens(call: Call) -> Value | None:
    """x.unsqueeze(1).expand(T, K, D).reshape(T * K, D) or (T * K, 1, D), or with repeat(1, K, 1)."""
    value, wide = call.arg(0), call.node.args[0]
    if not isinstance(value, Plain) or not isinstance(wide, Node) or op_of(wide) not in ("expand", "repeat"):
        return None
    single: Any = wide.args[0]
    if op_of(single) != "unsqueeze" or single.args[1] != 1:
        return None
    x, sizes = single.args[0], call.val(wide).shape
    before = call.val(x).shape
    once = (
        len(sizes) == len(before) + 1 and same_size(sizes[0], before[0]) and all(map(same_size, sizes[2:], before[1:]))
    )
    if not once or type(sizes[1]) is not int:
        return None
    if call.val().dim() != len(before) + 1 or not same_size(call.val().shape[1], 1):
        return _repeated(call, x, sizes[1])
    flat = _repeated(call, x, sizes[1], call.val().squeeze(1))
    if not isinstance(flat, Repeated):
        return None
    return Repeated(flat.selection, call.run.expr(call, aten.unsqueeze.default, [flat.expr, 1]))


def _repeated(call: Call, x: Node, top_k: int, val: Tensor | None = None) -> Value | None:
    val, before = call.val() if val is None else val, call.val(x)
    fits = val.dim() == before.dim() and same_size(val.shape[0], before.shape[0] * top_k)
    if not fits or not all(map(same_size, val.shape[1:], before.shape[1:])) or not val.is_floating_point():
        return None
    anyone = Selection(None, None, None, "pair", "flat", top_k)
    return Repeated(anyone, call.run.table.leaf("token", call.run.canonical[x], val))


# -- weights on [T, K, ...] -----------------------------------------------------------------


def weigh_grid(call: Call) -> Value | None:
    """rows.view(T, K, D) * weights[..., None]."""
    for i in (0, 1):
        grid, weights = call.arg(i), call.arg(1 - i)
        if not isinstance(weights, Plain) or not isinstance(weights.node, Node):
            continue
        val, out = call.val(weights.node), call.val()
        if not isinstance(val, Tensor) or val.dim() != out.dim() or not all(same_size(s, 1) for s in val.shape[2:]):
            continue
        if not all(map(same_size, val.shape[:2], out.shape[:2])):
            continue
        if isinstance(grid, PairGrid):
            leaf = call.run.table.leaf("pair", weights.node, val.select(1, 0))
            row = grid.expr.val.to(out.dtype)
            return PairGrid(grid.selection, call.run.table.call(aten.mul.Tensor, (grid.expr, leaf), {}, row))
        if isinstance(grid, Chosen) and grid.weights is None:
            plain: Any = weights.node
            if op_of(plain) == "unsqueeze" and plain.args[1] in (2, -1):
                return Chosen(grid.nodes, grid.ids, plain.args[0], call.node)
    return None


def by_einsum(call: Call) -> Value | None:
    """einsum("tk,tkd->td", weights, rows), with any letters and in any order."""
    equation, operands, nodes = call.arg(0), call.arg(1), call.node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, list) or len(operands) != 2 or "." in equation:
        return None
    inputs, _, result = equation.replace(" ", "").partition("->")
    for i in (0, 1):
        weights, grid = operands[i], operands[1 - i]
        if not isinstance(weights, Plain) or not isinstance(grid, PairGrid | Chosen) or call.val().dim() != 2:
            continue
        a, b = inputs.split(",")[i], inputs.split(",")[1 - i]
        val = call.val(weights.node)
        if len(a) != 2 or len(b) != 3 or len(set(b)) != 3 or a != b[:2] or result != b[0] + b[2]:
            continue
        if {val.dtype, call.val().dtype} != {call.val(nodes[1 - i]).dtype}:  # type: ignore[index]
            continue
        if isinstance(grid, Chosen):
            return DenseSum(None, _terms(grid, weights.node, call.node)) if grid.weights is None else None
        leaf = call.run.table.leaf("pair", weights.node, val.select(1, 0))
        leaf = call.run.table.call(aten.unsqueeze.default, (leaf, 1), {}, leaf.val.unsqueeze(1))
        product = call.run.table.call(aten.mul.Tensor, (grid.expr, leaf), {}, grid.expr.val)
        return Sum(Buffer(call.node, "zero"), (Rows(grid.selection, product),))
    return None


# -- all experts' results, then the chosen --------------------------------------------------


def gather(call: Call) -> Value | None:
    """stack.gather(1, ids[..., None].expand(T, K, D)): what the chosen experts made."""
    many, dim, index = call.arg(0), call.number(1, "dim"), call.node.args[2] if len(call.node.args) > 2 else None
    if not isinstance(many, Stacked) or many.table is not None or many.dim != 1 or dim not in (1, -2):
        return None
    if not isinstance(index, Node) or op_of(index) not in ("expand", "repeat") or not call.run.values[index].plain:
        return None
    wide: Any = index.args[0]
    ids = wide.args[0] if op_of(wide) == "unsqueeze" and wide.args[1] in (2, -1) else None
    if not isinstance(ids, Node) or not isinstance(call.run.otherwise(ids), Plain) or call.val(ids).dim() != 2:
        return None
    sizes, source = call.val().shape, call.val(call.node.args[0]).shape
    whole = same_size(sizes[0], source[0]) and same_size(sizes[2], source[2])
    fits = all(map(same_size, sizes[:2], call.val(ids).shape))
    return Chosen(many.nodes, call.run.canonical[ids]) if whole and fits else None


def sum_chosen(call: Call) -> Value | None:
    value, dims = call.arg(0), call.number(1, "dim")
    dims = dims if isinstance(dims, list) else [dims]
    if not isinstance(value, Chosen) or value.weights is None or value.node is None:
        return None
    if dims not in ([1], [-2]) or call.number(2, "keepdim", False) or call.val().dtype != call.val(value.node).dtype:
        return None
    return DenseSum(None, _terms(value, value.weights, value.node))


def _terms(chosen: Chosen, weights: Node, product: Node) -> tuple[DenseTerm, ...]:
    number = len(chosen.nodes)
    return tuple(
        DenseTerm(product, y, DenseWeight(chosen.ids, e, number, "pair", weights)) for e, y in enumerate(chosen.nodes)
    )


RULES: dict[str, tuple[Rule, ...]] = {
    "arange": (arange,),
    **{
        op: (position,)
        for op in ("floor_divide", "div", "repeat_interleave", "unsqueeze", "expand", "repeat", "flatten", "slice")
    },
    **{op: (position, spread_tokens) for op in ("view", "reshape", "_unsafe_view")},
    "index": (token_of_pair,),
    "mul": (weigh_grid,),
    "einsum": (by_einsum,),
    "gather": (gather,),
    "sum": (sum_chosen,),
}
