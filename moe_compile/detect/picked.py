"""Rules for weights that are gathered for each pair of a token and an expert, as small batches of inference have them.

    w1, w2 = self.w1[ids], self.w2[ids]                        # [T, K, F, D], [T, K, D, F]
    h      = act(einsum("td,tkfd->tkf", x, w1) + self.b1[ids])
    out    = einsum("tkd,tk->td", einsum("tkf,tkdf->tkd", h, w2), weights)

A value [T, K, ...] is that of rows in the order of the pairs; the sum over k is a region, whose ids are those of the
gathers.  Everything is an ordinary value for whoever else reads it.
"""

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_compile.detect.every import OF_FEATURES, POINTWISE
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.selection import INTEGERS, everyone, ids_node, same_size
from moe_compile.detect.unify import parts_of
from moe_compile.detect.values import Buffer, Picked, Plain, Rows, RowTuple, Sum, Value
from moe_compile.region import Expr

aten = torch.ops.aten

PRODUCTS = (aten.linear.default, aten.matmul.default)


def gather(call: Call) -> Value | None:
    """stack[ids], stack[ids, ...]: what belongs to the expert of each pair."""
    stack, indices = call.arg(0), call.arg(1)
    if not isinstance(stack, Plain) or len(indices) != 1 or _elsewhere(call):
        return None
    ids, val, whole = ids_node(indices[0]), call.val(), call.val(stack.node)
    if ids is None or call.val(ids).dtype not in INTEGERS[:2]:
        return None
    if call.val(ids).dim() != 2 or not isinstance(call.val(ids).shape[1], int):
        if call.val(ids).dim() == 1 and call.val(stack.node).dim() == 3 and call.val().is_floating_point():
            call.run.hints.append(
                "weights are gathered by one expert of each token: only a sum over ids [T, K] is read"
            )
        return None
    if not isinstance(whole.shape[0], int) or whole.dim() < 2 or not val.is_floating_point():
        return None
    return Picked(call.run.table.leaf("slice", stack.node, val.new_empty(val.shape[2:])), ids)


# -- the body -------------------------------------------------------------------------------


def product(call: Call) -> Value | None:
    """einsum of tokens "td", or of rows "tkd", with gathered matrices "tkfd" or "tkdf"."""
    equation, operands = call.arg(0), call.arg(1)
    if not isinstance(equation, str) or not isinstance(operands, list) or len(operands) != 2 or _elsewhere(call):
        return None
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation or len(set(inputs) - {","}) != 4:
        return None
    for i in (0, 1):
        x, stack = operands[i], operands[1 - i]
        a, b = inputs.split(",")[i], inputs.split(",")[1 - i]
        if not isinstance(stack, Picked) or stack.expr.level != "param" or len(b) != 4 or len(set(b)) != 4:
            continue
        if result[:2] != b[:2] or a not in (b[0] + b[2], b[0] + b[3], b[:2] + b[2], b[:2] + b[3]):
            continue
        flip = a[-1] == b[2]  # the inner letter comes first
        if len(result) != 3 or result[2] != (b[3] if flip else b[2]):
            continue
        node = call.node.args[1][i]  # type: ignore[index]
        if (rows := _rows(call, x, node, stack, len(a) == 3)) is None or not _one_dtype(call, rows, stack.expr):
            continue
        inner = stack.expr.val.shape[0 if flip else 1]
        if not same_size(rows.val.shape[1], inner):
            continue  # einsum repeats what there is one of
        target = aten.matmul.default if flip else aten.linear.default
        return _made(call, stack, target, [rows, stack.expr])
    return None


def _rows(call: Call, x: Any, node: Any, like: Picked, by_pair: bool) -> Expr | None:
    """A value as rows in the order of the pairs."""
    if isinstance(x, Picked):
        return x.expr if by_pair and x.ids is like.ids and x.expr.level == "row" else None
    if by_pair or not isinstance(x, Plain) or not same_size(call.val(node).shape[0], call.val(like.ids).shape[0]):
        return None
    return call.run.table.leaf("token", x.node, _by_row(call, like, call.val(node).unsqueeze(1)))


def _one_dtype(call: Call, *values: Expr) -> bool:
    return {v.val.dtype for v in values} == {call.val().dtype}


def pointwise(call: Call) -> Value | None:
    found = [v for v in call.args if isinstance(v, Picked)]
    val = call.val()
    if not found or _elsewhere(call) or not isinstance(val, Tensor):
        return None
    first, target = found[0], call.node.target
    if call.op.endswith("_"):
        mine: Any = call.node.args[0]
        if call.arg(0) is not first or first.expr.level != "row" or not call.run.is_fresh(mine):
            return None
        target = getattr(getattr(aten, call.op[:-1]), target._overloadname)  # type: ignore[union-attr]
    if any(isinstance(v, Value) for v in call.kwargs.values()):
        return None
    args: list[Any] = []
    for value, node in zip(call.args, call.node.args, strict=True):
        if not isinstance(value, Value):
            args.append(value)
            continue
        here = call.val(node)
        if isinstance(value, Picked):
            if value.ids is not first.ids or here.dim() != val.dim():
                return None
            args.append(value.expr)
        elif not isinstance(value, Plain) or not isinstance(here, Tensor):
            return None
        elif here.dim() <= val.dim() - 2:
            args.append(call.run.table.leaf("outer", value.node, here))
        elif (weights := _weights(call, first, value, here)) is not None and call.op == "mul":
            args.append(weights)
        else:
            return None
    if all(not isinstance(a, Expr) or a.level != "row" for a in args):  # of an expert's weights alone, as a cast is
        return replace(first, expr=call.run.table.call(target, tuple(args), call.kwargs, val.new_empty(val.shape[2:])))
    if target is not call.node.target and {a.val.dtype for a in args if isinstance(a, Expr)} != {val.dtype}:
        return None
    return _made(call, first, target, args, call.kwargs)


def _weights(call: Call, like: Picked, value: Plain, val: Tensor) -> Expr | None:
    """[T, K, 1]: one number a pair."""
    ids = call.val(like.ids).shape
    if val.dim() != call.val().dim() or not all(map(same_size, val.shape, [*ids, *[1] * (val.dim() - 2)])):
        return None
    return call.run.table.leaf("pair", value.node, val.select(1, 0))


def of_features(call: Call) -> Value | None:
    """chunk, split and slices along dimensions behind those of the pairs."""
    value, val = call.arg(0), call.val()
    if not isinstance(value, Picked) or value.expr.level != "row" or _elsewhere(call):
        return None
    position, default = OF_FEATURES[call.op]
    rank, dim = call.val(call.node.args[0]).dim(), call.arg(position, "dim", default)
    if not isinstance(dim, int):
        return None
    if dim % rank < 2:
        whole = call.op == "slice" and all(map(same_size, val.shape, call.val(call.node.args[0]).shape))
        return value if whole and call.number(4, "step", 1) == 1 else None
    args = [value.expr, *call.args[1:]]
    args += [0] * (position + 1 - len(args))
    args[position] = dim % rank - 1
    if any(isinstance(a, Value | torch.SymInt) for a in args[1:]) or call.kwargs:
        return None
    if isinstance(val, Tensor):
        return _made(call, value, call.node.target, args)
    whole_expr = call.run.table.call(call.node.target, tuple(args), {}, [_by_row(call, value, v) for v in val])
    parts = [call.run.table.call(operator.getitem, (whole_expr, i), {}, v) for i, v in enumerate(whole_expr.val)]
    return RowTuple(tuple(replace(value, expr=part) for part in parts))


# -- the sum over the experts of a token ----------------------------------------------------


def weighed(call: Call) -> Value | None:
    """einsum("tkd,tk->td")"""
    equation, operands, nodes = call.arg(0), call.arg(1), call.node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, list) or len(operands) != 2 or "." in equation:
        return None
    inputs, _, result = equation.replace(" ", "").partition("->")
    for i in (0, 1):
        grid, weights, other = operands[i], operands[1 - i], nodes[1 - i]  # type: ignore[index]
        if not isinstance(grid, Picked) or not isinstance(weights, Plain) or _elsewhere(call):
            continue
        a, b, val = inputs.split(",")[i], inputs.split(",")[1 - i], call.val(other)
        if len(a) != 3 or len(set(a)) != 3 or b != a[:2] or result != a[0] + a[2] or val.dtype != call.val().dtype:
            continue
        leaf = call.run.table.leaf("pair", weights.node, val.select(1, 0))
        column = call.run.table.call(aten.unsqueeze.default, (leaf, 1), {}, leaf.val.unsqueeze(1))
        row = grid.expr.val
        return _sum(call, replace(grid, expr=call.run.table.call(aten.mul.Tensor, (grid.expr, column), {}, row)))
    return None


def total(call: Call) -> Value | None:
    """[T, K, D].sum(1)"""
    value, dims = call.arg(0), call.number(1, "dim")
    dims = dims if isinstance(dims, list) else [dims]
    if not isinstance(value, Picked) or len(dims) != 1 or not isinstance(dims[0], int) or _elsewhere(call):
        return None
    if dims[0] % call.val(call.node.args[0]).dim() != 1 or call.number(2, "keepdim", False):
        return None
    return _sum(call, value)


def _sum(call: Call, value: Picked) -> Value | None:
    """The sum, if experts have products in it: a sum of looked-up rows, as of embeddings, is none over experts."""
    products = [e for e in parts_of(value.expr) if e.target in PRODUCTS]
    if value.expr.level != "row" or not products or call.val().dtype != value.expr.val.dtype:
        return None
    call.run.reads.setdefault(value.ids, set()).add("index")
    return Sum(Buffer(call.node, "zero"), (Rows(everyone(value.ids, "flat"), value.expr),))


# -- small help -----------------------------------------------------------------------------


def _elsewhere(call: Call) -> bool:
    """Whether the op runs in another grad mode or autocast than the sum around it."""
    return bool(call.run.autocasts or call.run.no_grad)


def _made(call: Call, like: Picked, target: Any, args: list[Any], kwargs: dict[str, Any] | None = None) -> Picked:
    expr = call.run.table.call(target, tuple(args), kwargs or {}, _by_row(call, like, call.val()))
    return replace(like, expr=expr)


def _by_row(call: Call, like: Picked, val: Tensor) -> Tensor:
    """[T, K, ...] as rows of pairs."""
    return val.new_empty((call.val(like.ids).numel(), *val.shape[2:]))


RULES: dict[str, tuple[Rule, ...]] = {
    "index": (gather,),
    "einsum": (product, weighed),
    **{op: (pointwise,) for op in POINTWISE},
    **{op + "_": (pointwise,) for op in ("add", "sub", "mul", "div", "relu", "silu", "clamp")},
    **{op: (of_features,) for op in OF_FEATURES},
    "sum": (total,),
}
