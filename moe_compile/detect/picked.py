"""Rules for weights that are gathered for each pair of a token and an expert, as small batches of inference have them.

    w1, w2 = self.w1[ids], self.w2[ids]                        # [T, K, F, D], [T, K, D, F]
    h      = act(einsum("td,tkfd->tkf", x, w1) + self.b1[ids])
    out    = einsum("tkd,tk->td", einsum("tkf,tkdf->tkd", h, w2), weights)

A value [T, K, ...] is that of rows in the order of the pairs; the sum over k is a region, whose ids are those of the
gathers.  With a vector of ids, as one column of a table is, it is [T, ...], a row a token (picked_columns.py says where
its region ends).  Everything is an ordinary value for whoever else reads it.  Products are in picked_products.py.
"""

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.dense import ancestors
from moe_compile.detect.dense_values import Picked
from moe_compile.detect.every import OF_FEATURES, POINTWISE
from moe_compile.detect.ids import INTEGERS, ids_node
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.nodes import op_of, out_of_place
from moe_compile.detect.rows import POINTWISE as BY_ROW
from moe_compile.detect.selection import everyone
from moe_compile.detect.shapes import same_size
from moe_compile.detect.sum_values import Buffer, Sum
from moe_compile.detect.unify import parts_of
from moe_compile.detect.values import Plain, Rows, RowTuple, Value
from moe_compile.region import Expr

aten = torch.ops.aten

PRODUCTS = (aten.linear.default, aten.matmul.default)
SHAPED = ("unsqueeze", "squeeze", "view", "reshape", "_unsafe_view", "flatten")  # ops that keep the order of numbers


def gather(call: Call) -> Value | None:
    """stack[ids], stack[ids, ...], stack.index_select(0, ids): what belongs to the expert of each pair.

    One vector for each token is an ordinary value, which `_operand` knows among the experts' own: so that rows that
    are picked by any vector do not pass for weights.
    """
    stack, by_index = call.arg(0), call.op == "index"
    indices = call.arg(1) if by_index else [call.arg(2)]
    if not isinstance(stack, Plain) or len(indices) != 1 or elsewhere(call):
        return None
    if not by_index and call.number(1) not in (0, -call.val(stack.node).dim()):
        return None
    ids, val, whole = ids_node(indices[0]), call.val(), call.val(stack.node)
    if ids is None or call.val(ids).dtype not in INTEGERS[:2]:
        return None
    if not isinstance(whole.shape[0], int) or whole.dim() < 2 or not val.is_floating_point():
        return None
    rank = call.val(ids).dim()
    if (rank == 2 and not isinstance(call.val(ids).shape[1], int)) or (rank == 1 and whole.dim() != 3):
        return None
    if not by_index:
        call.run.reads.setdefault(ids, set()).add("number")  # none from the end
    return Picked(call.run.table.leaf("slice", stack.node, val.new_empty(val.shape[rank:])), ids)


# -- the body -------------------------------------------------------------------------------


def pointwise(call: Call) -> Value | None:
    found = [v for v in call.args if isinstance(v, Picked)]
    val = call.val()
    if not found or elsewhere(call) or not isinstance(val, Tensor):
        return None
    first, target = found[0], call.node.target
    if call.op.endswith("_"):
        mine: Any = call.node.args[0]
        if call.arg(0) is not first or first.expr.level != "row" or not call.run.is_fresh(mine):
            return None
        target = out_of_place(target)
        if target is None:
            return None
    if any(isinstance(v, Value) for v in call.kwargs.values()) or not of_pairs(call, first, val):
        return None
    if not all(isinstance(s, int) and s > 0 for s in val.shape[num_dims(call, first) :]):
        return None  # a row meets all tokens
    args: list[Any] = []
    for value, node in zip(call.args, call.node.args, strict=True):
        arg = _operand(call, first, value, node) if isinstance(value, Value) else value
        if arg is None and value is not None:
            return None
        args.append(arg)
    exprs = [a for a in args if isinstance(a, Expr)]
    if target is not call.node.target and {e.val.dtype for e in exprs} != {val.dtype}:
        return None
    if (flat := _unviewed(call, args)) is not None:  # [R, F, 1] as [R, F], as experts are written elsewhere
        width = next(e for e in flat if isinstance(e, Expr)).val.shape[-1]
        rows = val.new_empty((call.val(first.ids).numel(), width))
        row = call.run.table.call(target, tuple(flat), call.kwargs, rows)
        return replace(first, expr=shaped_expr(call, row, list(val.shape[num_dims(call, first) :])))
    return made(call, first, target, args, call.kwargs)


def _unviewed(call: Call, args: list[Any]) -> list[Any] | None:
    """The operands before they became views of one shape, if each was a vector."""
    exprs = [a for a in args if isinstance(a, Expr)]
    vectors = [e.target is aten.reshape.default and e.args[0].val.dim() == 1 + (e.level == "row") for e in exprs]
    if not all(vectors) or all(e.level != "row" for e in exprs):
        return None
    first, *others = [list(e.args[1][e.level == "row" :]) for e in exprs]
    if any(sizes != first for sizes in others):
        return None
    return [a.args[0] if isinstance(a, Expr) else a for a in args]


def _operand(call: Call, like: Picked, value: Value, node: Any) -> Expr | None:
    """What a row has of an operand."""
    here, out, n = call.val(node), call.val(), num_dims(call, like)
    if isinstance(value, Picked):
        return value.expr if value.ids is like.ids and here.dim() == out.dim() else None
    if not value.plain or not isinstance(here, Tensor) or (n == 2 and not isinstance(value, Plain)):
        return None
    source = call.run.canonical.get(node, node)
    if needs_picked(call, source):
        return None
    if here.dim() <= out.dim() - n:
        return call.run.table.leaf("outer", source, here)
    if here.dim() != out.dim():
        return None
    if n == 2:
        return _weights(call, like, source, here) if call.op == "mul" else None
    if not same_size(here.shape[0], call.val(like.ids).shape[0]):
        return None
    return own_vector(call, like, node) or call.run.table.leaf("token", source, here)


def _weights(call: Call, like: Picked, source: Node, val: Tensor) -> Expr | None:
    """[T, K, 1]: one number a pair."""
    ids = call.val(like.ids).shape
    if not all(map(same_size, val.shape, [*ids, *[1] * (val.dim() - 2)])):
        return None
    return call.run.table.leaf("pair", source, val.select(1, 0))


def own_vector(call: Call, like: Picked, node: Node) -> Expr | None:
    """b[ids], b[ids].unsqueeze(-1): a vector that belongs to the expert of each token."""
    val, source = call.val(node), unshaped(call, node)
    if source.op != "call_function" or op_of(source) != "index" or source in call.run.ungraded:
        return None
    stack, indices = source.args[:2]
    if not isinstance(stack, Node) or [call.run.canonical.get(i) for i in indices] != [like.ids]:  # type: ignore[union-attr, arg-type]
        return None
    whole = call.val(stack)
    if not isinstance(call.run.values[stack], Plain) or whole.dim() != 2 or not isinstance(whole.shape[0], int):
        return None
    vector = call.run.table.leaf("slice", call.run.canonical[stack], whole.select(0, 0))
    return shaped_expr(call, vector, list(val.shape[1:]))


def unshaped(call: Call, node: Node) -> Node:
    """The value of which this one is a view, with the same numbers in the same order."""
    while node.op == "call_function" and op_of(node) in SHAPED and node not in call.run.ungraded:
        before: Any = node.args[0]
        if call.val(before).dtype != call.val(node).dtype:
            break
        node = before
    return node


def of_features(call: Call) -> Value | None:
    """chunk, split and slices along dimensions behind those of the pairs."""
    value, val = call.arg(0), call.val()
    if not isinstance(value, Picked) or elsewhere(call):
        return None
    position, default = OF_FEATURES[call.op]
    rank, dim, n = call.val(call.node.args[0]).dim(), call.arg(position, "dim", default), num_dims(call, value)
    if not isinstance(dim, int):
        return None
    if dim % rank < n:
        whole = call.op == "slice" and all(map(same_size, val.shape, call.val(call.node.args[0]).shape))
        return value if whole and call.number(4, "step", 1) == 1 else None
    args = [value.expr, *call.args[1:]]
    args += [0] * (position + 1 - len(args))
    args[position] = dim % rank - n + (value.expr.level == "row")
    if any(isinstance(a, Value | torch.SymInt) for a in args[1:]) or call.kwargs:
        return None
    if isinstance(val, Tensor):
        return made(call, value, call.node.target, args)
    vals = [of_row(call, value, v, value.expr.level) for v in val]
    whole_expr = call.run.table.call(call.node.target, tuple(args), {}, vals)
    parts = [call.run.table.call(operator.getitem, (whole_expr, i), {}, v) for i, v in enumerate(whole_expr.val)]
    return RowTuple(tuple(replace(value, expr=part) for part in parts))


def shaped(call: Call) -> Value | None:
    """unsqueeze, squeeze and views of what each pair has."""
    value, val = call.arg(0), call.val()
    if not isinstance(value, Picked) or elsewhere(call) or val.dtype != value.expr.val.dtype:
        return None
    n, sizes = num_dims(call, value), list(val.shape)
    if not of_pairs(call, value, val) or not all(isinstance(s, int) for s in sizes[n:]):
        return None
    return replace(value, expr=shaped_expr(call, value.expr, sizes[n:]))


def shaped_expr(call: Call, expr: Expr, sizes: list[int]) -> Expr:
    """What a row has, in another shape; in the one that it had before, if it had one."""
    row = expr.level == "row"
    inner = expr.args[0] if expr.target is aten.reshape.default else expr
    if list(inner.val.shape[row:]) == sizes:
        return inner  # type: ignore[no-any-return]
    val = inner.val.new_empty([*inner.val.shape[:row], *sizes])
    return call.run.table.call(aten.reshape.default, (inner, [*[-1] * row, *sizes]), {}, val)


def transpose(call: Call) -> Value | None:
    """w[ids].transpose(1, 2), w[ids].mT"""
    value = call.arg(0)
    if not isinstance(value, Picked) or elsewhere(call):
        return None
    n, rank = num_dims(call, value), call.val().dim()
    a, b = (call.number(1), call.number(2)) if call.op == "transpose" else (-2, -1)
    if not (type(a) is int and type(b) is int) or min(a % rank, b % rank) < n:
        return None
    shift = n - (value.expr.level == "row")
    dims = sorted((a % rank - shift, b % rank - shift))
    if value.expr.target is aten.transpose.int and list(value.expr.args[1:]) == dims:
        return replace(value, expr=value.expr.args[0])
    return made(call, value, aten.transpose.int, [value.expr, *dims])


# -- the sum over the experts of a token ----------------------------------------------------


def weighed(call: Call) -> Value | None:
    """einsum("tkd,tk->td"); einsum("td,t->td")"""
    equation, operands, nodes = call.arg(0), call.arg(1), call.node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, list) or len(operands) != 2 or "." in equation:
        return None
    inputs, _, result = equation.replace(" ", "").partition("->")
    for i in (0, 1):
        grid, weights = operands[i], operands[1 - i]
        other: Any = nodes[1 - i]  # type: ignore[index]
        if not isinstance(grid, Picked) or not isinstance(weights, Value) or not weights.plain or elsewhere(call):
            continue
        n, row = num_dims(call, grid), grid.expr.val
        if isinstance(weights, Picked) or (n == 2 and not isinstance(weights, Plain)) or grid.expr.level != "row":
            continue
        a, b, val = inputs.split(",")[i], inputs.split(",")[1 - i], call.val(other)
        whole = len(a) == len(set(a)) == row.dim() + n - 1 == n + 1
        if not whole or b != a[:n] or result != a[0] + a[n] or val.dtype != call.val().dtype:
            continue
        source = call.run.canonical.get(other, other)
        if needs_picked(call, source):
            continue
        if n == 1 and not same_size(val.shape[0], call.val(grid.ids).shape[0]):
            continue
        leaf = call.run.table.leaf("pair", source, val.select(1, 0)) if n == 2 else None
        leaf = leaf or call.run.table.leaf("token", source, val)
        column = call.run.table.call(aten.unsqueeze.default, (leaf, 1), {}, leaf.val.unsqueeze(1))
        product = replace(grid, expr=call.run.table.call(aten.mul.Tensor, (grid.expr, column), {}, row))
        return summed(call, product) if n == 2 else product
    return None


def total(call: Call) -> Value | None:
    """[T, K, D].sum(1); [T, 1, D].squeeze(1) and [:, 0]"""
    value = call.arg(0)
    if not isinstance(value, Picked) or num_dims(call, value) != 2 or elsewhere(call):
        return None
    dims, rank = call.number(1, "dim"), call.val(call.node.args[0]).dim()
    dims = dims if isinstance(dims, list) else [dims]
    if len(dims) != 1 or not isinstance(dims[0], int) or dims[0] % rank != 1:
        return None
    if call.op == "sum":
        return None if call.number(2, "keepdim", False) else summed(call, value)
    one = call.val(value.ids).shape[1] == 1 and (call.op == "squeeze" or call.number(2) in (0, -1))
    return summed(call, value) if one else None


def summed(call: Call, value: Picked) -> Value | None:
    """The sum, if experts have products in it: a sum of looked-up rows, as of embeddings, is none over experts."""
    if not products(value) or call.val().dtype != value.expr.val.dtype:
        return None
    call.run.reads.setdefault(value.ids, set()).add("index")
    return Sum(Buffer(call.node, "zero"), (Rows(everyone(value.ids, "flat"), value.expr),))


def products(value: Picked) -> list[Expr]:
    """The products in what experts make of a row."""
    return [e for e in parts_of(value.expr) if e.target in PRODUCTS] if value.expr.level == "row" else []


# -- small help -----------------------------------------------------------------------------


def elsewhere(call: Call) -> bool:
    """Whether the op runs in another grad mode or autocast than the sum around it."""
    return bool(call.run.autocasts or call.run.no_grad)


def needs_picked(call: Call, node: Node) -> bool:
    """Whether a value is computed of gathered weights, which would have to be gathered still."""
    return any(isinstance(call.run.values.get(n), Picked) for n in ancestors(node))


def num_dims(call: Call, value: Picked) -> int:
    """How many dimensions are those of the pairs: 2 of [T, K, ...], 1 of [T, ...]."""
    return int(call.val(value.ids).dim())


def of_pairs(call: Call, like: Picked, val: Tensor) -> bool:
    """Whether a value has the dimensions of the pairs in front."""
    ids = call.val(like.ids).shape
    return val.dim() >= len(ids) and all(map(same_size, val.shape, ids))


def made(call: Call, like: Picked, target: Any, args: list[Any], kwargs: dict[str, Any] | None = None) -> Picked:
    level = "row" if any(isinstance(a, Expr) and a.level == "row" for a in args) else "param"
    expr = call.run.table.call(target, tuple(args), kwargs or {}, of_row(call, like, call.val(), level))
    return replace(like, expr=expr)


def of_row(call: Call, like: Picked, val: Tensor, level: str = "row") -> Tensor:
    """[T, K, ...] as rows of pairs; as what belongs to one expert."""
    rows = [call.val(like.ids).numel()] if level == "row" else []
    return val.new_empty([*rows, *val.shape[num_dims(call, like) :]])


RULES: dict[str, tuple[Rule, ...]] = {
    **{op: (gather,) for op in ("index", "index_select")},
    "einsum": (weighed,),
    **{op: (pointwise,) for op in (*POINTWISE, *BY_ROW)},
    **{op + "_": (pointwise,) for op in ("add", "sub", "mul", "div", "relu", "silu", "clamp")},
    **{op: (of_features,) for op in OF_FEATURES},
    **{op: (shaped,) for op in SHAPED},
    **{op: (transpose,) for op in ("transpose", "mT")},
    "select": (total, of_features),
    "squeeze": (total, shaped),
    "sum": (total,),
}
