"""Rules for experts that compute all tokens at once, batched over the experts, most of it multiplied by zero.

    scores = sigmoid(full(-inf).scatter(1, ids, values))           # [T, E], zero but for the chosen experts
    rows   = x.repeat(E, 1) * scores.t().reshape(-1, 1)            # [E*T, D]: a token that did not choose is zero
    out    = body(rows.view(E, T, D)).sum(0)                       # bmm with [E, D, F], row-wise ops

is the sum over a token's experts alone if the body makes zero of zero.  Where the scores come after the body, it may
make anything of it.  What is multiplied by zero is not computed any more, as in dense.py.
"""

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.dense import ancestors
from moe_compile.detect.dense_values import Every, Infinite, Spread
from moe_compile.detect.ids import not_distinct
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.nodes import name_of, op_of
from moe_compile.detect.rows import whole_slice
from moe_compile.detect.selection import everyone
from moe_compile.detect.shapes import same_size
from moe_compile.detect.sum_values import Buffer, Sum
from moe_compile.detect.values import Plain, Rows, RowTuple, Unknown, Value
from moe_compile.region import Expr

aten = torch.ops.aten

# Ops whose result is zero where their first argument is.  Their slope there is finite, so that no gradient is lost.
ZERO_AT_ZERO = frozenset(
    """
    abs alias celu clone contiguous detach elu gelu hardswish leaky_relu mish neg relu relu6 selu silu sin square tan
    tanh to _to_copy type_as float
""".split()
)
OF_FEATURES = {"chunk": (2, 0), "split": (2, 0), "split_with_sizes": (2, 0), "slice": (1, 0), "select": (1, None)}
POINTWISE = (*ZERO_AT_ZERO, *"add mul sub div true_divide clamp clamp_min clamp_max exp sigmoid softplus pow".split())


# -- tables ---------------------------------------------------------------------------------


def infinite(call: Call) -> Value | None:
    return Infinite() if call.number(1) == -torch.inf and call.val().is_floating_point() else None


def from_infinity(call: Call) -> Value | None:
    """sigmoid, softmax or exp of a table that is minus infinity elsewhere: zero there."""
    table = call.arg(0)
    if not isinstance(table, Spread) or table.fill == 0 or not isinstance(call.val(), Tensor):
        return None
    if call.op in ("softmax", "_softmax") and (table.dims != (0, "e") or call.number(1) not in (1, -1)):
        return None
    cast = call.op in ("to", "_to_copy", "float", "type_as")
    if not call.val().is_floating_point():
        return None
    return Spread(call.node, table.ids, table.dims, table.fill if cast else 0.0)


def flatten_table(call: Call) -> Value | None:
    """table.t().reshape(-1, 1): the weights of the first expert for all tokens, then the second's, ..."""
    table, val = call.arg(0), call.val()
    if not isinstance(table, Spread) or table.dims != ("e", 0) or table.fill != 0:
        return None
    whole = call.val(table.node).numel()
    if val.dim() in (1, 2) and same_size(val.shape[0], whole) and all(s == 1 for s in val.shape[1:]):
        return Spread(table.node, table.ids, ("et", "one")[: val.dim()])
    same = val.dim() == 3 and all(map(same_size, val.shape, (*call.val(call.node.args[0]).shape, 1)))
    return Spread(table.node, table.ids, ("e", 0, "one")) if same else None


# -- tokens for every expert ----------------------------------------------------------------


def repeat(call: Call) -> Value | None:
    """x.repeat(E, 1), x.repeat(E, 1, 1), x.expand(E, T, D), x.unsqueeze(0).expand(E, T, D): all tokens, E times."""
    source, val = call.arg(0), call.val()
    if (
        not isinstance(source, Plain)
        or not isinstance(call.arg(1), list)
        or not call.val(source.node).is_floating_point()
    ):
        return None
    node, sizes = source.node, call.arg(1)
    before = call.val(node)
    if before.dim() == val.dim() and str(node.target) == "aten.unsqueeze.default" and node.args[1] == 0:
        node = node.args[0]  # type: ignore[assignment]
        before = call.val(node)
    flat = call.op == "repeat" and len(sizes) == before.dim()
    if flat:
        once = all(type(s) is int and s == 1 for s in sizes[1:])
    else:
        once = before.dim() == val.dim() - 1 and all(map(same_size, val.shape[1:], before.shape))
    num = sizes[0]
    if type(num) is not int or num < 2 or not once or before.dim() < 2 or (call.run.autocasts or call.run.no_grad):
        return None
    return Every(call.run.table.leaf("token", call.run.canonical[node], before), num, flat)


def reshape(call: Call) -> Value | None:
    """From [E*T, ...] to [E, T, ...] and back."""
    value, val = call.arg(0), call.val()
    if not isinstance(value, Every) or value.crossed:
        return None
    row = value.expr.val.shape
    if val.dim() == len(row) + 1 and all(map(same_size, val.shape, (value.num, *row))):
        return replace(value, flat=False, apart=False)
    if val.dim() == len(row) and all(map(same_size, val.shape, (value.num * row[0], *row[1:]))):
        return replace(value, flat=True, apart=False)
    if value.groups and val.dim() == len(row) + 2:
        wide = (value.num, *value.groups, *row[1:])
        return replace(value, flat=False, apart=True) if all(map(same_size, val.shape, wide)) else None
    return None


# -- the body -------------------------------------------------------------------------------


def product(call: Call) -> Value | None:
    """bmm of [E, T, D] with [E, D, F]: zero rows stay zero."""
    x, stack = call.arg(0), call.arg(1)
    if not (isinstance(x, Every) and isinstance(stack, Plain)) or x.flat or x.apart or x.crossed or elsewhere(call):
        return None
    weight = call.val(stack.node)
    if weight.dim() != 3 or weight.shape[0] != x.num or call.val().dim() != 3:
        return None
    leaf = call.run.table.leaf("slice", stack.node, weight.select(0, 0))
    return made_of(call, x, aten.matmul.default, [x.expr, leaf], x.ids)


def pointwise(call: Call) -> Value | None:
    found = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Every)]
    if not found or elsewhere(call) or call.op.endswith("_") or not isinstance(call.val(), Tensor):
        return None
    first = found[0]
    args: list[Any] = []
    zero: list[Node | None] = []  # by which ids each factor is zero
    for value, node in zip(call.args, call.node.args, strict=True):
        arg, ids = _operand(call, first, value, node)
        if isinstance(arg, Unknown):
            return None
        args.append(arg)
        zero.append(ids)
    if any(isinstance(v, Value) for v in call.kwargs.values()) or call.val().dim() != _rank(first):
        return None
    return made_of(call, first, call.node.target, args, _zero_by(call, args, zero), call.kwargs)


def _operand(call: Call, like: Every, value: Any, node: Any) -> tuple[Any, Node | None]:
    if isinstance(value, Every):
        same = replace(value, expr=like.expr, ids=like.ids) == like and call.val(node).dim() == call.val().dim()
        return (value.expr if same else Unknown("")), value.ids
    if isinstance(value, Spread):
        return _weight(call, like, value)
    if not isinstance(value, Value):
        return value, None
    if not isinstance(value, Plain) or not isinstance(call.val(value.node), Tensor):
        return Unknown(""), None
    if any(isinstance(call.run.values[n], Every) for n in ancestors(value.node)):
        return Unknown(""), None  # as a mean over all tokens, which would have to be computed still
    val, table = call.val(value.node), call.run.table
    before = 1 + (not like.flat) + like.apart  # dimensions of experts and rows
    if val.dim() <= call.val().dim() - before:
        return (table.leaf("outer", value.node, val), None)
    if like.crossed:
        return _slice_of_bias(call, like, value.node, val), None
    if not like.flat and val.dim() == call.val().dim() and same_size(val.shape[0], like.num):
        if all(isinstance(s, int) and s == 1 for s in val.shape[1:before]):
            leaf = table.leaf("slice", value.node, val.select(0, 0))
            return (table.call(aten.select.int, (leaf, 0, 0), {}, leaf.val[0]) if like.apart else leaf), None
    return Unknown(""), None


def _slice_of_bias(call: Call, like: Every, node: Node, val: Tensor) -> Expr | Unknown:
    """What is an expert's of [E, ...] beside [T, E, ...], or of [1, E, ...]."""
    if val.dim() == call.val().dim() and op_of(node) == "unsqueeze" and node.args[1] == 0:
        node, val = node.args[0], val.squeeze(0)  # type: ignore[assignment]
    if val.dim() == call.val().dim() - 1 and same_size(val.shape[0], like.num):
        return call.run.table.leaf("slice", node, val.select(0, 0))
    return Unknown("")


def _weight(call: Call, like: Every, table: Spread) -> tuple[Any, Node | None]:
    """The entry of a table for each row."""
    if like.slots is not None:
        return Unknown(""), None
    wanted = ("et", "one") if like.flat else (0, "e", "one") if like.crossed else ("e", 0, "one")
    whole = call.val(table.node)
    fits = same_size(whole.shape[1], like.num) and same_size(whole.shape[0], like.expr.val.shape[0])
    if table.fill != 0 or table.dims != wanted or call.val().dim() != len(wanted) or not fits:
        return Unknown(""), None
    return weight_of(call, table), table.ids


def weight_of(call: Call, table: Spread) -> Expr:
    """The entry of a table [T, E] for each row, [T, 1]."""
    leaf = call.run.table.leaf("column", table.node, call.val(table.node).select(1, 0))
    return call.run.table.call(aten.unsqueeze.default, (leaf, 1), {}, leaf.val.unsqueeze(1))


def _zero_by(call: Call, args: list[Any], zero: list[Node | None]) -> Node | None:
    """The ids outside of which the result is zero."""
    if call.op == "mul":
        return next((ids for ids in zero if ids is not None), None)
    if call.op in ("add", "sub"):
        return zero[0] if zero[0] is zero[1] else None
    if call.op in ("div", "true_divide"):
        return zero[0] if isinstance(args[1], int | float) and args[1] != 0 else None
    if call.op in ("clamp", "clamp_min", "clamp_max"):
        low, high = (call.number(i, n) for i, n in ((1, "min"), (2, "max")))
        low, high = (None, call.number(1, "max")) if call.op == "clamp_max" else (low, high)
        if not all(isinstance(a, int | float | None) for a in args[1:]):
            return None
        return zero[0] if (low is None or low <= 0) and (high is None or high >= 0) else None
    if call.op == "pow":
        power = args[1]
        return zero[0] if isinstance(power, int | float) and power >= 1 else None
    return zero[0] if call.op in ZERO_AT_ZERO else None


def of_features(call: Call) -> Value | None:
    """chunk, split and slices along dimensions behind the tokens'."""
    value, val = call.arg(0), call.val()
    if not isinstance(value, Every) or elsewhere(call):
        return None
    position, default = OF_FEATURES[call.op]
    rank, dim = _rank(value), call.arg(position, "dim", default)
    if not isinstance(dim, int):
        return None
    dim = dim % rank - rank
    if dim < 1 - _rank(value.expr):  # of tokens or experts
        return value if call.op == "slice" and whole_slice(call) else None
    args = [value.expr, *call.args[1:]]
    args += [0] * (position + 1 - len(args))
    args[position] = dim
    if any(isinstance(a, Value | torch.SymInt) for a in args[1:]) or call.kwargs:
        return None
    if isinstance(val, Tensor):
        return made_of(call, value, call.node.target, args, value.ids)
    whole = call.run.table.call(call.node.target, tuple(args), {}, [_row(value, v) for v in val])
    parts = [call.run.table.call(operator.getitem, (whole, i), {}, v) for i, v in enumerate(whole.val)]
    return RowTuple(tuple(replace(value, expr=part) for part in parts))


def total(call: Call) -> Value | None:
    """[E, T, D].sum(0): the sum over the experts."""
    value, dims = call.arg(0), call.number(1, "dim")
    dims = dims if isinstance(dims, list) else [dims]
    if (
        not isinstance(value, Every)
        or len(dims) != 1
        or dims[0] is None
        or dims[0] % _rank(value) != int(value.crossed)
        or call.number(2, "keepdim", False)
        or value.flat
        or value.slots is not None
    ):
        return None
    return sum_of(call, value)


def sum_of(call: Call, value: Every) -> Value | None:
    """What the experts of a token made, added up; the others' is zero."""
    if value.expr.level != "row" or call.val().dtype != value.expr.val.dtype:
        return None
    if value.ids is None:
        call.run.hints.append(
            f"{name_of(call.node)} sums experts that are not shown to make zero of the tokens of others"
        )
        return None
    if repeated := not_distinct(call.run, value.ids):
        return Unknown(f"a token that chose an expert twice has one entry in the table of weights: {repeated}")
    call.run.reads.setdefault(value.ids, set()).add("number")
    return Sum(Buffer(call.node, "zero"), (Rows(everyone(value.ids, "dense"), value.expr),))


# -- small help -----------------------------------------------------------------------------


def elsewhere(call: Call) -> bool:
    """Whether the op runs in another grad mode or autocast than the sum around it."""
    return bool(call.run.autocasts or call.run.no_grad)


def made_of(
    call: Call, like: Every, target: Any, args: list[Any], ids: Node | None, kwargs: dict[str, Any] | None = None
) -> Every:
    expr = call.run.table.call(target, tuple(args), kwargs or {}, _row(like, call.val()))
    return replace(like, expr=expr, ids=ids)


def _row(like: Every, val: Tensor) -> Tensor:
    """The rows of one expert."""
    if like.crossed:
        return val.select(1, 0)
    if not like.flat:
        return val.select(0, 0).flatten(0, 1) if like.apart else val.select(0, 0)
    return val.new_empty((like.expr.val.shape[0], *val.shape[1:]))


def _rank(value: Every | Expr) -> int:
    if isinstance(value, Expr):
        return int(value.val.dim())
    return int(value.expr.val.dim()) + (not value.flat) + value.apart


RULES: dict[str, tuple[Rule, ...]] = {
    **{op: (from_infinity,) for op in ("softmax", "_softmax")},
    **{op: (repeat,) for op in ("repeat", "expand")},
    **{op: (flatten_table, reshape) for op in ("view", "reshape", "_unsafe_view", "flatten")},
    **{op: (product,) for op in ("bmm", "matmul")},
    **{op: (pointwise,) for op in POINTWISE},
    **{op: (from_infinity, pointwise) for op in ("sigmoid", "exp", "to", "_to_copy", "float", "type_as")},
    **{op: (of_features,) for op in OF_FEATURES},
    "sum": (total,),
    **{op: (infinite,) for op in ("full", "full_like", "new_full")},
}
