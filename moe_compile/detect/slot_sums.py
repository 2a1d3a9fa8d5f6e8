"""Rules for experts on slots: tokens laid out by a table [T, E, C] (slots.py), and added up again by another.

    rows = einsum("tec,tm->ecm", dispatch, x)        # a token at most in each slot
    made = body(rows)                                # [E, C, M]: bmm with [E, M, F], row-wise ops
    out  = einsum("tec,ecm->tm", combine, made)

Each choice of a token is a pair: its row is the token times its number in `dispatch`, what its expert makes of that is
multiplied by its number in `combine`.  What a slot without a token holds is multiplied by zero, and not computed.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.dense import ancestors
from moe_compile.detect.dense_values import Every, Stacked
from moe_compile.detect.every import made_of
from moe_compile.detect.grids import as_table
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.selection import everyone
from moe_compile.detect.shapes import same_size
from moe_compile.detect.slot_lists import bodies
from moe_compile.detect.slot_proofs import counted_along, not_disjoint, number_of, sizes_of, whole
from moe_compile.detect.slots import Slots, Term
from moe_compile.detect.sum_values import Buffer, Sum
from moe_compile.detect.values import Plain, Rows, Selection, Unknown, Value
from moe_compile.region import Expr, ids_stacked
from moe_compile.rewrite import emit

aten = torch.ops.aten


# -- to slots and back ----------------------------------------------------------------------


def einsum(call: Call) -> Value | None:
    """einsum("tec,tm->ecm", table, x), einsum("tec,ecm->tm", table, made), with any letters and in any order.

    Of groups of tokens einsum("gsec,gsm->egcm"), einsum("gsec,egcm->gsm").
    """
    equation, operands, nodes = call.arg(0), call.arg(1), call.node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, list) or len(operands) != 2 or _elsewhere(call):
        return None
    inputs, _, result = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if "." in equation or any(len(set(term)) < len(term) for term in (*letters, result)):
        return None
    for i in (0, 1):
        table, other = operands[i], operands[1 - i]
        if not isinstance(table, Slots) or not whole(table) or table.wide is not None:
            continue
        t, e, c = (letters[i][table.dims.index(d)] for d in (0, "e", "c"))
        mine = letters[1 - i]
        if (along := counted_along(table)) is not None:
            t, c = "".join(letters[i][table.dims.index(d)] for d in (0, 1)), letters[i][table.dims.index(1 - along)] + c
        if (
            isinstance(other, Plain | Stacked)
            and mine[: len(t)] == t
            and result == e + c + mine[len(t) :]
            and not set(e + c) & set(mine[len(t) :])
        ):
            return laid_out(call, table, nodes[i], nodes[1 - i])  # type: ignore[index, arg-type]
        if (
            isinstance(other, Every)
            and not (other.flat or other.crossed)
            and other.apart == (len(c) == 2)
            and mine[: 1 + len(c)] == e + c
            and result == t + mine[1 + len(c) :]
            and not set(t) & set(mine[1 + len(c) :])
        ):
            return total(call, table, nodes[i], other)  # type: ignore[index, arg-type]
        alone = isinstance(other, Plain | Stacked) and len(t) == 1
        if alone and mine[:2] == e + c and result == t + mine[2:] and t not in mine[2:]:
            return total_of_list(call, table, nodes[i], nodes[1 - i])  # type: ignore[index, arg-type]
    return None


def mm(call: Call) -> Value | None:
    """mm of a table [E * C, T], or [E, C, T], with tokens, of a table [T, E * C] with what was made of them."""
    table, other = call.args[:2]
    if not isinstance(table, Slots) or not whole(table) or len(call.args) != 2 or _elsewhere(call):
        return None
    first, second = call.node.args
    assert isinstance(first, Node) and isinstance(second, Node)
    if table.dims == ("e", "c", 0) and isinstance(other, Plain) and call.val(second).dim() == 2:
        return laid_out(call, table, first, second)
    if table.dims == ("ec", 0) and isinstance(other, Plain) and call.val(second).dim() == 2:
        return laid_out(call, table, first, second, flat=True)
    if table.dims == (0, "ec") and isinstance(other, Every) and other.flat:
        return total(call, table, first, other)
    if table.dims == (0, "ec") and isinstance(other, Plain):
        return total_of_list(call, table, first, second, flat=True)
    return None


def laid_out(call: Call, table: Slots, node: Node, tokens: Node, flat: bool = False) -> Value | None:
    """The rows of all slots."""
    x, (length, num, capacity) = call.val(tokens), sizes_of(table, node)
    if type(num) is not int or num < 2 or x.dim() < 2 or not x.is_floating_point() or x.dtype != call.val().dtype:
        return None
    if call.val(node).dtype != x.dtype:  # autocast
        return None
    source, groups, along = call.run.canonical[tokens], None, counted_along(table)
    if along is not None:
        if x.dim() < 3 or not same_size(x.shape[1], call.val(node).shape[table.dims.index(1)]):
            return None
        groups = call.val(node).shape[table.dims.index(1 - along)], capacity
    if not same_size(x.shape[0], length):
        return None
    if why := not_disjoint(call.run, table, capacity):
        call.run.hints.append(why)
        return None
    if groups is None:
        row = x.new_empty((capacity, *x.shape[1:]))
    else:
        source, row = as_table(call.run, source), x.new_empty((groups[0] * capacity, *x.shape[2:]))
    expr: Expr = call.run.table.leaf("token", source, row)
    if any(term.number.op != "one" for term in table.terms):
        if (pairs := _pairs(call, table)) is None:
            return None
        expr = _times(call, expr, pairs, row)
    return Every(expr, num, flat, None, table, groups, groups is not None)


def total(call: Call, table: Slots, node: Node, made: Every) -> Value | None:
    """The sum over slots."""
    _, num, capacity = sizes_of(table, node)
    along, rows = counted_along(table), capacity
    if along is not None:
        rows = call.val(node).shape[table.dims.index(1 - along)] * capacity
    if (
        not isinstance(made.slots, Slots)
        or made.expr.level != "row"
        or {call.val().dtype, call.val(node).dtype} != {made.expr.val.dtype}
    ):
        return None
    if not same_size(num, made.num) or not same_size(rows, made.expr.val.shape[0]):
        return None
    if why := _differ(call, made.slots, table, capacity):
        call.run.hints.append(why)
        return None
    if (pairs := _pairs(call, table)) is None:
        return None
    ids, expr = _ids(call, table), _times(call, made.expr, pairs, made.expr.val)
    call.run.reads.setdefault(ids, set()).add("number")
    return Sum(Buffer(call.node, "zero"), (Rows(everyone(ids, "slots"), expr),))


def total_of_list(call: Call, table: Slots, node: Node, made: Node, flat: bool = False) -> Value | None:
    """The sum over slots on which each expert ran on its own."""
    _, num, capacity = sizes_of(table, node)
    if (
        type(num) is not int
        or call.val(node).dtype != call.val().dtype
        or not any(isinstance(call.run.values.get(n), Every) for n in ancestors(made))
    ):
        return None
    found = bodies(call.run, call.node, made, num, capacity, call.val(made).dim() - (not flat))
    if found is None or isinstance(found, Unknown):
        call.run.hints += [found.reason] if found is not None else []
        return None
    exprs, laid = found
    if (
        not isinstance(laid.slots, Slots)
        or _differ(call, laid.slots, table, capacity)
        or any(e.val.dtype != call.val().dtype or e.level != "row" for e in exprs)
    ):
        return None
    if (pairs := _pairs(call, table)) is None:
        return None
    ids = _ids(call, table)
    rows = [Rows(Selection(ids, e, None), _times(call, expr, pairs, expr.val)) for e, expr in enumerate(exprs)]
    return Sum(Buffer(call.node, "zero"), tuple(rows))


def _differ(call: Call, laid: Slots, table: Slots, capacity: Any) -> str | None:
    """Why tokens are not taken from the slots that they were put into: whose places are theirs in both tables."""
    if why := not_disjoint(call.run, table, capacity):
        return why
    into, out = ({(t.ids, t.place.count) for t in s.terms} for s in (laid, table))  # type: ignore[union-attr]
    same = into == out and len(laid.terms) == len(table.terms) and laid.summed == table.summed
    return None if same else "tokens leave other slots than they were put into"


# -- the pairs of a table -------------------------------------------------------------------


def _in_order(table: Slots) -> list[Term]:
    return sorted(table.terms, key=lambda t: len(t.place.count.base))  # type: ignore[union-attr]


def _ids(call: Call, table: Slots) -> Node:
    """The expert of each choice [T, K]; -1 for nobody."""
    ids: Any = tuple(t.ids for t in _in_order(table))
    if table.summed:
        return ids[0]  # type: ignore[no-any-return]
    val = ids[0].meta["val"]
    known = next((n for n in ids[0].users if n.target is ids_stacked and n.args == (ids,)), None)
    if known is None:
        with call.run.graph.inserting_before(call.node):
            known = call.run.graph.call_function(ids_stacked, (ids,))
        known.meta = {"val": val.new_empty((*val.shape, len(ids)), dtype=torch.int64)}
        call.run.written[known] = None
    return known if val.dim() == 1 else _of_groups(call, known)


def _of_groups(call: Call, node: Node) -> Node:
    """[G, S, K] as [G * S, K]."""
    sizes = [-1, node.meta["val"].shape[2]]
    known = next((n for n in node.users if n.target is aten.reshape.default and n.args == (node, sizes)), None)
    if known is None:
        with call.run.graph.inserting_before(call.node):
            known = emit(call.run.graph, aten.reshape.default, node, sizes, like=call.node)
        call.run.written[known] = None
    return known


def _pairs(call: Call, table: Slots) -> Node | None:
    """The number that each choice has in a table [T, K]."""
    numbers = [number_of(call.run, call.node, t.ids, t.number) for t in _in_order(table)]  # type: ignore[arg-type]
    if any(n is None for n in numbers):
        return None
    if table.summed:
        return numbers[0]
    with call.run.graph.inserting_before(call.node):
        pairs = emit(call.run.graph, aten.stack.default, numbers, -1, like=call.node)
    call.run.written[pairs] = None
    return pairs if pairs.meta["val"].dim() == 2 else _of_groups(call, pairs)


def _times(call: Call, expr: Expr, pairs: Node, row: Tensor) -> Expr:
    """Rows times a number each."""
    leaf = call.run.table.leaf("pair", pairs, pairs.meta["val"].new_empty(row.shape[:1]))
    for dim in range(1, row.dim()):
        leaf = call.run.table.call(aten.unsqueeze.default, (leaf, dim), {}, leaf.val.unsqueeze(dim))
    return call.run.table.call(aten.mul.Tensor, (expr, leaf), {}, row)


# -- products -------------------------------------------------------------------------------


def product(call: Call) -> Value | None:
    """einsum("ecm,emf->ecf", rows, weights), or "efm"; "egcm" with groups of tokens."""
    equation, operands, nodes = call.arg(0), call.arg(1), call.node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, list) or len(operands) != 2 or _elsewhere(call):
        return None
    inputs, _, result = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if "." in equation or any(len(set(term)) != len(term) for term in (*letters, result)):
        return None
    for i in (0, 1):
        rows, stack, mine = operands[i], operands[1 - i], letters[1 - i]
        if not isinstance(rows, Every) or not isinstance(stack, Plain) or rows.flat or rows.crossed:
            continue
        e, c, m = letters[i][0], letters[i][1:-1], letters[i][-1]
        if len(c) != 1 + rows.apart or result[:-1] != e + c:
            continue
        weight, f = call.val(nodes[1 - i]), result[-1]  # type: ignore[index, arg-type]
        if mine not in (e + m + f, e + f + m) or f in e + c or not same_size(weight.shape[0], rows.num):
            return None
        if not same_size(weight.shape[mine.index(m)], call.val(nodes[i]).shape[-1]):  # type: ignore[index, arg-type]
            return None
        leaf: Expr = call.run.table.leaf("slice", stack.node, weight.select(0, 0))
        if mine == e + f + m:
            leaf = call.run.table.call(aten.t.default, (leaf,), {}, leaf.val.t())
        return made_of(call, rows, aten.matmul.default, [rows.expr, leaf], rows.ids)
    return None


def _elsewhere(call: Call) -> bool:
    return bool(call.run.autocasts or call.run.no_grad)


RULES: dict[str, tuple[Rule, ...]] = {"einsum": (einsum, product), "mm": (mm,), "matmul": (mm,)}
