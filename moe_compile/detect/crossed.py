"""Rules for experts that compute all tokens at once by einsum or matmul, in any order of tokens and experts.

    h   = einsum("td,efd->tef", x, w1)                     # or matmul(x, w1): [E, T, F]
    y   = einsum("tef,edf->ted", act(h), w2)
    out = einsum("ted,te->td", y, table)                   # or (y * table[..., None]).sum(1), or in the last product

Until a table or ids say who was chosen, such a product may be anything, as the heads of an attention: what ends
otherwise is an ordinary value.  What is multiplied by zero is not computed any more, as in dense.py.
"""

from dataclasses import replace

from torch.fx import Node

from moe_compile.detect.dense_values import Every, Spread
from moe_compile.detect.every import aten, elsewhere, made_of, sum_of, weight_of
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.nodes import op_of
from moe_compile.detect.one_hot_tables import as_table, equation_of
from moe_compile.detect.shapes import same_size
from moe_compile.detect.values import Plain, Value
from moe_compile.region import Expr

# -- products -------------------------------------------------------------------------------


def begun(call: Call) -> Value | None:
    """einsum("td,efd->tef", x, stack), or "etf": every token with the matrix of every expert."""
    equation = equation_of(call, 2)
    if equation is None:
        return None
    letters, result = equation
    for i in (0, 1):
        x, stack, t, mine = call.arg(1)[i], call.arg(1)[1 - i], letters[i], letters[1 - i]
        if not (isinstance(x, Plain) and isinstance(stack, Plain)) or (len(t), len(mine)) != (2, 3):
            continue
        e, f = mine[0], mine[2] if mine[1] == t[1] else mine[1]
        if t[0] in mine or t[1] not in mine[1:] or result not in (t[0] + e + f, e + t[0] + f):
            return None
        return _every(call, x.node, stack.node, mine[1] == f, crossed=result[1] == e)
    return None


def broadcast(call: Call) -> Value | None:
    """matmul(x, stack) of [T, D], or [1, T, D], with [E, D, F]."""
    x, stack = call.arg(0), call.arg(1)
    if not (isinstance(x, Plain) and isinstance(stack, Plain)) or call.kwargs or len(call.args) != 2:
        return None
    node = x.node
    if call.val(node).dim() == 3 and op_of(node) == "unsqueeze" and node.args[1] == 0:
        node = node.args[0]  # type: ignore[assignment]
    if call.val(node).dim() != 2 or call.val(stack.node).dim() != 3:
        return None
    return _every(call, node, stack.node, turned=False, crossed=False)


def _every(call: Call, x: Node, stack: Node, turned: bool, crossed: bool) -> Value | None:
    rows, weight, val = call.val(x), call.val(stack), call.val()
    num = weight.shape[0]
    if elsewhere(call) or type(num) is not int or num < 2 or not val.is_floating_point():
        return None
    if {rows.dtype, weight.dtype} != {val.dtype}:
        return None
    token = call.run.table.leaf("token", call.run.canonical[x], rows)
    like = Every(token, num, False, crossed=crossed)
    return made_of(call, like, aten.matmul.default, [token, _matrix(call, stack, turned)], None)


def _matrix(call: Call, stack: Node, turned: bool) -> Expr:
    """The matrix of one expert; turned: it is [F, D] in the stack."""
    leaf: Expr = call.run.table.leaf("slice", stack, call.val(stack).select(0, 0))
    return call.run.table.call(aten.t.default, (leaf,), {}, leaf.val.t()) if turned else leaf


def einsum(call: Call) -> Value | None:
    """einsum("tef,edf->ted", rows, stack), einsum("ted,te->td", rows, table), and both in one, "tef,edf,te->td"."""
    equation = equation_of(call, 2) or equation_of(call, 3)
    if equation is None or elsewhere(call):
        return None
    letters, result = equation
    operands, nodes = call.arg(1), call.node.args[1]
    rows = [i for i, v in enumerate(operands) if isinstance(v, Every)]
    if len(rows) != 1 or not is_whole(made := operands[rows[0]]):
        return None
    mine = letters[rows[0]]
    t, e, rest = (*(mine[:2] if made.crossed else mine[1::-1]), mine[2:])
    weighed = False
    for i in sorted(set(range(len(operands))) - set(rows), key=lambda i: isinstance(operands[i], Plain), reverse=True):
        table = as_table(call, operands[i], nodes[i])  # type: ignore[index, arg-type]
        if table is not None and not weighed:
            if letters[i] != "".join(t if d == 0 else e for d in table.dims) or not fits(call, made, table):
                return None
            expr = call.run.table.call(aten.mul.Tensor, (made.expr, _beside(call, made, table)), {}, made.expr.val)
            made, weighed = replace(made, expr=expr, ids=table.ids), True
        elif isinstance(stack := operands[i], Plain) and len(letters[i]) == 3 and len(rest) == 1:
            found = _times_stack(call, made, stack.node, letters[i], e, rest, result[-1:])
            if found is None or result[-1:] in t + e + rest:
                return None
            made, rest = found, result[-1:]
        else:
            return None
    if made.expr.val.dtype != call.val().dtype:
        return None
    if result == t + rest:
        return sum_of(call, made)
    return replace(made, crossed=result[0] == t) if result in (t + e + rest, e + t + rest) else None


def _times_stack(call: Call, rows: Every, stack: Node, letters: str, e: str, m: str, f: str) -> Every | None:
    weight, before = call.val(stack), rows.expr.val
    if letters not in (e + m + f, e + f + m) or not same_size(weight.shape[0], rows.num):
        return None
    if weight.dtype != before.dtype or not same_size(weight.shape[letters.index(m)], before.shape[-1]):
        return None
    row = before.new_empty((before.shape[0], weight.shape[letters.index(f)]))
    expr = call.run.table.call(aten.matmul.default, (rows.expr, _matrix(call, stack, letters[1] == f)), {}, row)
    return replace(rows, expr=expr)


# -- order, and what fits --------------------------------------------------------------------


def turned(call: Call) -> Value | None:
    """[E, T, ...] as [T, E, ...], and back."""
    value, val = call.arg(0), call.val()
    if not isinstance(value, Every) or not is_whole(value) or elsewhere(call):
        return None
    dims = list(range(val.dim()))
    if call.op == "permute":
        order = [d % val.dim() for d in call.arg(1)] if isinstance(call.arg(1), list) else []
    else:
        a, b = call.number(1), call.number(2)
        order = [] if None in (a, b) else [*dims]
        if order:
            order[a % val.dim()], order[b % val.dim()] = dims[b % val.dim()], dims[a % val.dim()]
    return replace(value, crossed=not value.crossed) if order == [1, 0, *dims[2:]] else None


def fits(call: Call, made: Every, table: Spread) -> bool:
    whole = call.val(table.node)
    sizes = same_size(whole.shape[1], made.num) and same_size(whole.shape[0], made.expr.val.shape[0])
    return sizes and whole.dim() == 2 and whole.dtype == made.expr.val.dtype and call.run.unchanged(table.node)


def _beside(call: Call, made: Every, table: Spread) -> Expr:
    """The entry of a table for each row, beside what stands in the row."""
    weight = weight_of(call, table)
    for dim in range(2, made.expr.val.dim()):
        weight = call.run.table.call(aten.unsqueeze.default, (weight, dim), {}, weight.val.unsqueeze(dim))
    return weight


def is_whole(value: Every) -> bool:
    """Whether it is of all tokens, with dimensions of experts and tokens of their own."""
    return value.slots is None and not value.flat and not value.apart


RULES: dict[str, tuple[Rule, ...]] = {
    "einsum": (begun, einsum),
    "matmul": (broadcast,),
    **{op: (turned,) for op in ("permute", "transpose", "swapaxes", "swapdims")},
}
