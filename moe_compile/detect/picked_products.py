"""Rules for products with weights that were gathered for each pair (picked.py): the matrix of a pair times its vector.

    einsum("td,tkfd->tkf", x, w1)                              # w1 [T, K, F, D]
    torch.matmul(w1, x[:, None, :, None]).squeeze(-1)
    torch.bmm(x.unsqueeze(1), w1).squeeze(1)                   # w1 [T, D, F], by a vector of ids
    torch.baddbmm(b1.unsqueeze(-1), w1, x.unsqueeze(-1))       # w1 [T, F, D]

Each is `linear` or `matmul` of rows with the matrix of one expert, and a view.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.dense_values import Picked
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.nodes import op_of
from moe_compile.detect.picked import (
    elsewhere,
    made,
    needs_picked,
    num_dims,
    of_pairs,
    of_row,
    own_vector,
    shaped_expr,
    unshaped,
)
from moe_compile.detect.shapes import same_size
from moe_compile.detect.values import Value
from moe_compile.region import Expr

aten = torch.ops.aten


def einsum(call: Call) -> Value | None:
    """einsum of tokens "td", or of rows "tkd", with gathered matrices "tkfd" or "tkdf"; of "td" with "tfd" or "tdf"."""
    equation, operands = call.arg(0), call.arg(1)
    if not isinstance(equation, str) or not isinstance(operands, list) or len(operands) != 2 or elsewhere(call):
        return None
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation:
        return None
    for i in (0, 1):
        x, stack = operands[i], operands[1 - i]
        a, b = inputs.split(",")[i], inputs.split(",")[1 - i]
        if not _matrices(stack):
            continue
        n = num_dims(call, stack)
        pair, outer, inner = b[:n], b[n : n + 1], b[n + 1 :]
        if (
            len(set(b)) != n + 2
            or result[:n] != pair
            or a not in (b[0] + outer, b[0] + inner, pair + outer, pair + inner)
        ):
            continue
        flip = a[-1] == outer  # the inner letter comes first
        if result != pair + (inner if flip else outer):
            continue
        node = call.node.args[1][i]  # type: ignore[index]
        if (rows := _rows(call, x, node, stack, len(a) == n + 1)) is None or not _one_dtype(call, rows, stack.expr):
            continue
        if not same_size(rows.val.shape[1], stack.expr.val.shape[0 if flip else 1]):
            continue  # einsum repeats what there is one of
        target = aten.matmul.default if flip else aten.linear.default
        return made(call, stack, *_product(target, rows, stack.expr))
    return None


def matmul(call: Call) -> Value | None:
    """[T, K, F, D] @ [T, K, D, 1] or [T, 1, D, 1]; [T, K, 1, D] @ [T, K, D, F]; without K by a vector of ids."""
    expr = _column(call, 0, 1)
    return None if expr is None else Picked(*expr)


def baddbmm(call: Call) -> Value | None:
    """b + [T, F, D] @ [T, D, 1], b [T, F, 1] of the expert of each token."""
    found = _column(call, 1, 2)
    if found is None or call.number(3, "beta", 1) != 1 or call.number(4, "alpha", 1) != 1:
        return None
    product, ids = found
    like, bias, node = Picked(product, ids), call.arg(0), call.node.args[0]
    if call.val(node).dim() != call.val().dim() or not all(map(same_size, call.val(node).shape, call.val().shape)):
        return None  # it is repeated
    picked = isinstance(bias, Picked) and bias.ids is ids
    own = bias.expr if picked else own_vector(call, like, node)  # type: ignore[arg-type]
    if own is None or own.val.dtype != product.val.dtype:
        return None
    inner, width = product.args[0], product.args[0].val.shape[1]
    row = call.run.table.call(aten.add.Tensor, (inner, shaped_expr(call, own, [width])), {}, inner.val)
    return Picked(shaped_expr(call, row, list(product.val.shape[1:])), ids)


def _column(call: Call, first: int, second: int) -> tuple[Expr, Node] | None:
    """The product of two arguments as a view [R, F, 1] or [R, 1, F] of rows, and its ids."""
    val = call.val()
    if elsewhere(call) or not isinstance(val, Tensor):
        return None
    for matrices, vectors, one in ((first, second, -1), (second, first, -2)):
        stack, x, node = call.arg(matrices), call.arg(vectors), call.node.args[vectors]
        if not _matrices(stack) or not isinstance(x, Value):
            continue
        n, here = num_dims(call, stack), call.val(node)
        if here.dim() != n + 2 or val.dim() != n + 2 or not of_pairs(call, stack, val):
            continue
        if not (isinstance(here.shape[one], int) and here.shape[one] == 1):
            continue
        rows = _vectors(call, stack, x, node)  # type: ignore[arg-type]
        if rows is None or not _one_dtype(call, rows, stack.expr):
            continue
        target = aten.linear.default if one == -1 else aten.matmul.default
        width = stack.expr.val.shape[0 if one == -1 else 1]
        if not same_size(rows.val.shape[1], stack.expr.val.shape[1 if one == -1 else 0]):
            continue
        target, args = _product(target, rows, stack.expr)
        product = call.run.table.call(target, tuple(args), {}, rows.val.new_empty((rows.val.shape[0], width)))
        return shaped_expr(call, product, [width, 1] if one == -1 else [1, width]), stack.ids
    return None


def _matrices(value: Any) -> bool:
    return isinstance(value, Picked) and value.expr.level == "param" and value.expr.val.dim() == 2


def _product(target: Any, rows: Expr, matrix: Expr) -> tuple[Any, list[Expr]]:
    """The product, with the matrix before it was transposed."""
    if matrix.target is aten.transpose.int:
        target = aten.matmul.default if target is aten.linear.default else aten.linear.default
        matrix = matrix.args[0]
    return target, [rows, matrix]


def _vectors(call: Call, like: Picked, x: Value, node: Node) -> Expr | None:
    """A value [T, K, D, 1] or [T, K, 1, D], [T, 1, D, 1], or without K, as rows [R, D]."""
    here, n = call.val(node), num_dims(call, like)
    width = here.shape[n] if same_size(here.shape[n + 1], 1) else here.shape[n + 1]
    if not isinstance(width, int):
        return None
    if isinstance(x, Picked) and x.ids is like.ids:
        return shaped_expr(call, x.expr, [width]) if x.expr.level == "row" and of_pairs(call, like, here) else None
    if not x.plain or not same_size(here.shape[0], call.val(like.ids).shape[0]):
        return None
    source = unshaped(call, node)
    if n == 2 and op_of(source) == "expand" and source not in call.run.ungraded:  # each token K times
        before = call.val(source.args[0])
        wide = of_pairs(call, like, here) and of_pairs(call, like, call.val(source))
        once = (here.shape[0], 1, *call.val(source).shape[2:])
        if not wide or before.dim() != len(once) or not all(map(same_size, before.shape, once)):
            return None
        source = unshaped(call, source.args[0])  # type: ignore[arg-type]
    elif n == 2 and not same_size(here.shape[1], 1):
        return None
    val = call.val(source)
    if val.dim() != 2 or not all(map(same_size, val.shape, (here.shape[0], width))):
        return None
    return None if needs_picked(call, source) else _tokens(call, like, source, val)


def _rows(call: Call, x: Any, node: Any, like: Picked, by_pair: bool) -> Expr | None:
    """A value as rows in the order of the pairs."""
    if isinstance(x, Picked) and x.ids is like.ids:
        return x.expr if by_pair and x.expr.level == "row" else None
    by_pair = by_pair and num_dims(call, like) == 2
    if by_pair or not isinstance(x, Value) or not x.plain:
        return None
    val = call.val(node)
    if val.dim() != 2 or not same_size(val.shape[0], call.val(like.ids).shape[0]) or needs_picked(call, node):
        return None
    return _tokens(call, like, node, val)


def _tokens(call: Call, like: Picked, node: Node, val: Tensor) -> Expr:
    n = num_dims(call, like)
    return call.run.table.leaf(
        "token", call.run.canonical.get(node, node), of_row(call, like, val if n == 1 else val.unsqueeze(1))
    )


def _one_dtype(call: Call, *values: Expr) -> bool:
    return {v.val.dtype for v in values} == {call.val().dtype}


RULES: dict[str, tuple[Rule, ...]] = {
    "einsum": (einsum,),
    **{op: (matmul,) for op in ("matmul", "bmm")},
    "baddbmm": (baddbmm,),
}
