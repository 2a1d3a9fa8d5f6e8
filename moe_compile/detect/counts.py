"""Rules for rows between two numbers that Python read: the rows of one expert, where they lie in sorted order.

`Counts` and `Starts` are vectors over experts, `RowSum` a sum of the numbers of rows of some experts.  Rows between
two such sums are those of expert e if the first counts all experts before e, and the second e as well.  In a capture
in which some experts are known to have no rows (`Facts.empty`), those may be counted or not.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.ids import INTEGERS, ZEROS, not_distinct, unflattened
from moe_compile.detect.interpreter import Call, Interpreter, Rule, name_of
from moe_compile.detect.selection import everyone
from moe_compile.detect.shapes import equal_sizes, misfit, same_size
from moe_compile.detect.sums import add_term, total_of
from moe_compile.detect.values import (
    Buffer,
    Constant,
    Counts,
    Emptiness,
    Filled,
    FlatIds,
    Index,
    Member,
    Ones,
    PairGrid,
    Permutation,
    Pieces,
    Places,
    Plain,
    Region,
    Repeated,
    Rows,
    RowSum,
    RowTuple,
    Selection,
    Spread,
    Starts,
    TokenGrid,
    TokenOf,
    Unknown,
    Value,
)
from moe_compile.region import Leaf, ids_above, ids_by_sizes

aten = torch.ops.aten
ANY = 2**63 - 1  # ids from 0 on are no error; those of no expert add nothing
EXACT = INTEGERS[:2]


# -- counting -------------------------------------------------------------------------------


def ones(call: Call) -> Value | None:
    """zeros(T, E).scatter(1, ids, 1), of integers."""
    start, ids, val = call.node.args[0], call.arg(2), call.val()
    if call.arg(1) not in (1, -1) or call.arg(3) != 1 or call.kwargs or not isinstance(ids, Plain):
        return None
    if str(getattr(start, "target", "")) not in ZEROS or val.is_floating_point() or val.dim() != 2:
        return None
    return Ones(ids.node, val.shape[1]) if _fits(call, ids.node, val) else None


def whole_ones(call: Call) -> Value | None:
    """The same of a floating type, as integers."""
    value, val = call.arg(0), call.val()
    if isinstance(value, Ones):
        return value if val.dtype in EXACT else None
    if not isinstance(value, Spread) or value.dims != (0, "e") or not isinstance(val, Tensor) or val.dtype not in EXACT:
        return None
    made = value.node.target
    if str(made) not in ("aten.scatter.value", "aten.scatter_.value") or value.node.args[3] != 1:
        return None
    return Ones(value.ids, val.shape[1])


def _fits(call: Call, ids: Node, table: Tensor) -> bool:
    index = call.val(ids)
    same = index.dim() == 2 and equal_sizes(call.run, table.shape[:1], index.shape[:1])
    return same and index.dtype in INTEGERS and isinstance(table.shape[1], int)


def sum_of_ones(call: Call) -> Value | None:
    value, dims = call.arg(0), call.number(1, "dim")
    if not isinstance(value, Ones) or dims not in (0, [0], -2, [-2]) or call.number(2, "keepdim", False):
        return None
    if call.val().dtype not in EXACT:
        return None
    if repeated := not_distinct(call.run, value.ids):
        return Unknown(f"{name_of(call.node)} counts a token once that chose an expert twice: {repeated}")
    return Counts(value.ids, value.num, closed=True)


def bincount(call: Call) -> Value | None:
    value, num = call.arg(0), call.number(1)
    if isinstance(value, FlatIds) and value.limits is None and str(call.node.target).startswith("moe_ep_capture"):
        return Counts(value.ids, num, listed=True)
    return None


def running_sum(call: Call) -> Value | None:
    counts, val = counts_of(call.run, call.arg(0)), call.val()
    if (
        counts is None
        or isinstance(call.arg(0), Counts)
        or val.dtype not in EXACT
        or call.number(1, "dim") not in (0, -1)
    ):
        return None
    return Counts(counts.ids, counts.num, ends=True, closed=counts.closed)


def less_own(call: Call) -> Value | None:
    """ends - counts."""
    ends, own = (counts_of(call.run, call.arg(i)) for i in (0, 1))
    if ends is None or own is None or call.number(2, "alpha", 1) != 1 or not (ends.ends and not own.ends):
        return None
    if (ends.ids, ends.num) != (own.ids, own.num):
        return None
    return Starts(ends.ids, ends.num, ends.num, ends.closed and own.closed, ends.listed or own.listed)


def zero_first(call: Call) -> Value | None:
    """cat([zeros(1), ends]), pad(ends, (1, 0))."""
    if call.op == "cat":
        parts, nodes = call.arg(0), call.node.args[0]
        if len(parts) != 2 or not isinstance(parts[1], Counts) or call.number(1, "dim", 0) not in (0, -1):
            return None
        if not _is_zero(call, nodes[0], parts[0]):  # type: ignore[index]
            return None
        ends = parts[1]
    else:
        ends = call.arg(0)
        if list(call.number(1) or []) != [1, 0] or call.number(2, "mode", "constant") not in ("constant", 0):
            return None
        if call.number(3, "value") not in (None, 0, 0.0):
            return None
    if not isinstance(ends, Counts) or not ends.ends or call.val().dtype not in EXACT:
        return None
    return Starts(ends.ids, ends.num, ends.num + 1, ends.closed, ends.listed)


def _is_zero(call: Call, node: Any, value: Any) -> bool:
    val = call.val(node)
    if val.dim() != 1 or not same_size(val.shape[0], 1):
        return False
    return (isinstance(value, Constant) and bool((value.number == 0).all())) or str(node.target) in ZEROS


def counts_of(run: Interpreter, value: Any) -> Counts | None:
    """How many rows each expert has, however it was counted."""
    if isinstance(value, Member) and value.dims == ("e",) and value.kind == "count" and value.expert is None:
        ids = unflattened(run, value.ids)
        return Counts(ids, value.classes, closed=True) if value.classes else None
    return value if isinstance(value, Counts) else None


def entry(call: Call) -> Value | None:
    """counts[e], ends[e], by a number or by unbind."""
    value = counts_of(call.run, call.arg(0)) or call.arg(0)
    if not isinstance(value, Counts | Starts):
        return None
    if call.op == "unbind":
        return RowTuple(tuple(_entry(value, i) for i in range(_length(value))))
    i = call.number(2)
    if type(i) is not int or call.number(1, "dim", 0) not in (0, -1) or not 0 <= i < _length(value):
        return None
    return _entry(value, i)


def _length(value: Counts | Starts) -> int:
    return value.num if isinstance(value, Counts) else value.length


def _entry(value: Counts | Starts, i: int) -> Value:
    experts: Sequence[int] = range(i) if isinstance(value, Starts) else range(i + 1) if value.ends else (i,)
    row_sum = RowSum(value.ids, dict.fromkeys(experts, 1), value.num, value.closed)
    return row_sum if len(row_sum.times) != 1 else _single(row_sum)


def _single(total: RowSum) -> Value:
    (expert,) = total.times
    return Emptiness(total.ids, expert, "count", total.num, total.closed)


def sum_of(run: Interpreter, value: Any, i: int = 0) -> RowSum | None:
    """Entry i of what Python read, as a sum of numbers of rows."""
    value = counts_of(run, value) or value
    if isinstance(value, Counts | Starts):
        if i >= _length(value):
            return None
        value = _entry(value, i)
    if isinstance(value, Emptiness) and value.kind == "count" and isinstance(value.expert, int):
        return RowSum(unflattened(run, value.ids), {value.expert: 1}, value.num, value.closed)
    return value if isinstance(value, RowSum) else None


# -- what Python read -----------------------------------------------------------------------


def host_read(call: Call) -> Value | None:
    value = call.arg(0)
    return value if isinstance(value, Counts | Starts | RowSum | Emptiness | Member) else None


def host_number(call: Call) -> Value | None:
    """A sum of entries; in a capture that says so, zero."""
    total = _resolved(call, call.arg(0), call.arg(1))
    if total is None or isinstance(total, int) or list(total.times.values()) != [1]:
        return None
    if call.node in call.run.facts.empty:
        call.run.empty |= {(total.ids, expert) for expert in total.times}
    return _single(total)


def _resolved(call: Call, reads: list[Value], number: list[int]) -> RowSum | int | None:
    """[constant, read, first, last + 1, times, ...] as a sum of numbers of rows, all of the same ids."""
    times: dict[int, int] = {}
    parts: list[RowSum] = []
    for read, i, factor in _terms(number):
        part = sum_of(call.run, reads[read], i)
        if part is None:
            return None
        parts.append(part)
        for e, c in part.times.items():
            times[e] = times.get(e, 0) + factor * c
    if not parts:
        return number[0]
    first = parts[0]
    if number[0] or any(p.ids is not first.ids or p.num != first.num for p in parts):
        return None
    return RowSum(first.ids, {e: c for e, c in times.items() if c}, first.num, all(p.closed for p in parts))


def _terms(number: list[int]) -> Iterator[tuple[int, int, int]]:
    for at in range(1, len(number), 4):
        read, first, end, factor = number[at : at + 4]
        for i in range(first, end):
            yield read, i, factor


# -- rows between two numbers ---------------------------------------------------------------


def places_between(call: Call) -> Value | None:
    found = _expert_between(call, call.arg(0), call.arg(1), call.arg(2))
    return found if isinstance(found, Unknown) else Places(found[0], found[1])


def rows_between(call: Call) -> Value | None:
    value = call.arg(0)
    found = _expert_between(call, call.arg(1), call.arg(2), call.arg(3))
    if isinstance(found, Unknown):
        return found
    ids, expert, num, closed = found
    if ids in call.run.facts.sizes:
        rows = _sorted_before(call, value, ids)
        if isinstance(rows, Unknown):
            return rows
        ids, value, closed = rows
    if isinstance(value, Pieces):
        value = dict(value.parts).get(expert, Unknown(f"rows of expert {expert} are read that were not computed"))
    order = value.selection.order if isinstance(value, Rows) else getattr(value, "order", "flat")
    if order == "flat" or (isinstance(value, Permutation) and value.inverse):
        return Unknown(f"{name_of(call.node)} slices something that is not sorted by expert")
    everybody = value.selection if isinstance(value, Rows) else everyone(value.ids, order)
    if everybody != everyone(ids, order):
        return Unknown(f"{name_of(call.node)} slices rows by the counts of other ids")
    classes = num if closed and num is not None else ANY
    mine = one_expert(ids, expert, None if ids.target is ids_above else classes, order)
    match value:
        case Rows(dim=0) if value.expr.level == "row":
            return Rows(mine, value.expr)
        case Permutation():
            return Index(mine, "flat")
        case TokenOf():
            return Index(mine, 0)
    return None


def _sorted_before(call: Call, value: Value, sizes: Node) -> tuple[Node, Value, bool] | Unknown:
    """(ids, rows, whether the sizes are those of all) of rows that are sorted as their sizes, which are given, say."""
    whole = call.number(4)
    if isinstance(value, Plain | Region) and call.val(call.node.args[0]).is_floating_point():
        x: Any = call.node.args[0]
        x = call.run.canonical.get(x, x)
        last = max(x, sizes)
        val = x.meta["val"].new_empty(x.meta["val"].shape[:1], dtype=torch.int64)
        known = (n for n in call.run.written if n.target is ids_by_sizes and n.args[0] is sizes and n.args[2] is whole)
        ids = next((n for n in known if same_size(n.meta["val"].shape[0], val.shape[0])), None)
        ids = ids or call.run.write_ids(last, ids_by_sizes, (sizes, x, whole), val, None)
        leaf = call.run.table.leaf("token", x, call.val())
        return ids, Rows(everyone(ids, ids), leaf), whole
    pieces = [v for _, v in value.parts] if isinstance(value, Pieces) else [value]
    rows = pieces[0]
    if isinstance(rows, Rows) and isinstance(ids := rows.selection.ids, Node) and _sizes_of(ids) is sizes:
        return ids, value, bool(ids.args[2])
    return Unknown(f"{name_of(call.node)} slices rows by sizes that are not shown to be theirs")


def _sizes_of(ids: Any) -> Any:
    """The sizes behind ids that say nothing else."""
    return ids.args[0] if isinstance(ids, Node) and ids.target is ids_by_sizes else ids


def one_expert(ids: Node, expert: int, classes: int | None, order: Any) -> Selection:
    """The rows of one expert, in the order in which they lie among the sorted."""
    return Selection(ids, expert, classes, "pair", order, everyone(ids, order).top_k)


def _expert_between(
    call: Call, reads: list[Value], start: list[int], end: list[int]
) -> tuple[Node, int, int | None, bool] | Unknown:
    """(ids, expert, number of experts, whether ids of no expert are an error) of the rows between two numbers."""
    wrong = Unknown(f"{name_of(call.node)} slices between numbers that are not where an expert's rows begin and end")
    low, high = _resolved(call, reads, start), _resolved(call, reads, end)
    before = low.times if isinstance(low, RowSum) else {} if low == 0 else None
    if before is None or not isinstance(high, RowSum):
        return wrong
    if isinstance(low, RowSum) and (low.ids, low.num) != (high.ids, high.num):
        return wrong
    own = {e: high.times.get(e, 0) - before.get(e, 0) for e in before.keys() | high.times.keys()}
    mine = [e for e, c in own.items() if c]
    if len(mine) != 1 or own[mine[0]] != 1:
        return wrong
    (expert,) = mine
    nobody = {e for ids, e in call.run.empty if ids is high.ids}
    if high.num is not None:
        call.run.counted[high.ids] = high.num
    if any(before.get(e, 0) != (e < expert) for e in {*range(expert), *before} - nobody):
        return wrong
    return high.ids, expert, high.num, high.closed and (low == 0 or (isinstance(low, RowSum) and low.closed))


def token_of(call: Call) -> Value | None:
    """order[start:end] // K, order[start:end] % K."""
    value, divisor = call.arg(0), call.number(1)
    if not isinstance(value, Index) or value.dim != "flat" or call.val().dtype not in EXACT:
        return None
    if call.op == "div" and call.kwargs.get("rounding_mode") not in ("floor", "trunc"):
        return None
    if type(divisor) is not int or divisor != value.selection.top_k:
        return Unknown(
            f"the sorted order is divided by {divisor}, not by the {value.selection.top_k} experts of a token"
        )
    return Index(value.selection, 1 if call.op == "remainder" else 0)


def whole(call: Call) -> Value | None:
    """rows[:]."""
    value = call.arg(0)
    if not isinstance(value, Rows) or call.number(1, "dim", 0) != 0 or call.number(4, "step", 1) != 1:
        return None
    return value if call.number(2, "start") in (None, 0) and call.number(3, "end") in (None, sys.maxsize) else None


# -- and joined again -----------------------------------------------------------------------


def join(call: Call) -> Value | None:
    """The rows of all experts, one expert's below the other's: each is what its own computed."""
    parts: list[Any] = call.arg(0)
    if not all(isinstance(p, Rows) and p.dim == 0 and p.expr.level == "row" for p in parts):
        return Unknown(f"{name_of(call.node)} joins something that is not rows")
    ids = parts[0].selection.ids
    if ids is not _sizes_of(ids) and not ids.args[2]:
        return Unknown(f"{name_of(call.node)} joins rows that are not shown to be all")
    pieces = joined(call, parts)
    if isinstance(pieces, Pieces) and pieces.classes == ANY:  # without nobody's rows these would be too few
        return replace(pieces, classes=pieces.number)
    return pieces


def joined(call: Call, parts: Sequence[Rows]) -> Value:
    first, experts = parts[0].selection, [e for p in parts if isinstance(e := p.selection.expert, int)]
    if first.ids is None or first.order in (None, "flat") or len(experts) < len(parts):
        return Unknown(f"{name_of(call.node)} joins rows that were not sliced from sorted ones")
    alike = one_expert(first.ids, 0, first.classes, first.order)
    if any(replace(p.selection, expert=0) != alike for p in parts):
        return Unknown(f"{name_of(call.node)} joins rows that were sorted or counted in different ways")
    nobody = {e for ids, e in call.run.empty if ids is first.ids}
    number = call.run.counted.get(first.ids, max((*experts, *nobody)) + 1) if first.classes == ANY else first.classes
    listed = first.ids.target is ids_above  # as many rows as there are gates
    if listed:
        number = first.ids.args[0].meta["val"].shape[1]  # type: ignore[union-attr]
    if number is None or experts != [e for e in range(number) if e not in nobody or e in experts]:
        return Unknown(f"{name_of(call.node)} joins the rows of experts {experts}, of {number}")
    if not listed and not same_size(call.val().shape[0], call.val(first.ids).numel()):
        return Unknown(f"{name_of(call.node)} joins rows that are not those of all pairs")
    everybody = everyone(first.ids, first.order)
    rows = ((e, Rows(everybody, p.expr)) for e, p in zip(experts, parts, strict=True))
    return Pieces(tuple(rows), number, first.classes)  # type: ignore[arg-type]


def fill(call: Call) -> Value | None:
    """out[start:end] = rows, expert by expert."""
    total, indices, new = call.arg(0), call.arg(1), call.arg(2)
    if len(indices) != 1 or not isinstance(indices[0], Places):
        return None
    at = indices[0]
    done = total.rows if isinstance(total, Filled) else ()
    if call.number(3, "accumulate", False) or not isinstance(total, Filled | Buffer):
        return Unknown(f"{name_of(call.node)} sets rows of something that was not made for them")
    if not (isinstance(new, Rows) and new.dim == 0 and new.expr.level == "row" and call.run.is_fresh(call.node)):
        return Unknown(f"{name_of(call.node)} sets something that is not one value a row")
    if (
        _sizes_of(new.selection.ids) is not at.ids
        or new.selection.expert != at.expert
        or new.selection.order in (None, "flat")
    ):
        return Unknown(f"{name_of(call.node)} sets the rows of one expert where another's lie")
    if call.val().dtype != new.expr.val.dtype or tuple(call.val().shape[1:]) != tuple(new.expr.val.shape[1:]):
        return Unknown(f"{name_of(call.node)} changes the dtype or width of the rows that it sets")
    rows = tuple(sorted((*done, new), key=lambda r: _number(r.selection)))
    return Filled(rows, lambda: joined(call, rows))


def _number(chosen: Selection) -> int:
    return chosen.expert if isinstance(chosen.expert, int) else 0  # which `joined` refuses


def by_pair(call: Call) -> Value | None:
    """weights.view(-1)[order[start:end]], x.repeat_interleave(K, 0)[order[start:end]]."""
    value, indices = call.arg(0), call.arg(1)
    if len(indices) != 1 or not isinstance(at := indices[0], Index) or at.dim != "flat":
        return None
    if isinstance(value, Repeated) and value.selection.top_k == at.selection.top_k:
        return Rows(at.selection, value.expr)
    if isinstance(value, Plain) and call.val(value.node).dim():
        return Rows(at.selection, call.run.table.leaf("flat_pair", value.node, call.val()))
    return None


def unsort(call: Call) -> Value | None:
    """out[order] = rows: a row for every pair, in flat order."""
    total, indices, new = call.arg(0), call.arg(1), call.arg(2)
    if len(indices) != 1 or not isinstance(at := indices[0], Permutation) or not isinstance(new, Rows):
        return None
    if not isinstance(total, Buffer) or call.number(3, "accumulate", False) or at.inverse:
        return None
    if new.selection != everyone(at.ids, at.order) or new.dim or new.expr.level != "row":
        return Unknown(f"{name_of(call.node)} sets other rows than were sorted")
    if not call.run.is_fresh(total.node) or not same_size(call.val().shape[0], call.val(at.ids).numel()):
        return Unknown(f"{name_of(call.node)} sets some rows of something")
    if call.val().dtype != new.expr.val.dtype or tuple(call.val().shape[1:]) != tuple(new.expr.val.shape[1:]):
        return Unknown(f"{name_of(call.node)} changes the dtype or width of the rows that it sets")
    return Rows(everyone(at.ids, "flat"), new.expr)


# -- rows of all pairs as [T, K, ...] -------------------------------------------------------


def scale_grid(call: Call) -> Value | None:
    """grid.to(dtype), grid * weights[:, :, None]."""
    grid, other, val = call.arg(0), call.arg(1), call.val()
    if isinstance(other, PairGrid) and not call.op.endswith("_"):
        grid, other = other, grid
    if not isinstance(grid, PairGrid) or val.dim() != grid.expr.val.dim() + 1 or grid.expr.level != "row":
        return None
    flat = grid.expr.val
    if call.op in ("to", "_to_copy"):
        if val.shape != call.val(call.node.args[0]).shape or not val.is_floating_point():
            return None
        expr = call.run.expr(
            call, aten.to.dtype, [grid.expr, val.dtype], val=flat.new_empty(flat.shape, dtype=val.dtype)
        )
        return PairGrid(grid.selection, expr)
    if isinstance(other, Plain):
        theirs = call.val(other.node)
        if theirs.dim() != val.dim() or not equal_sizes(call.run, theirs.shape[:2], val.shape[:2]):
            return None
        mine = flat.new_empty((flat.shape[0], *theirs.shape[2:]), dtype=theirs.dtype)
        factor: Any = call.run.table.leaf("pair", other.node, mine)
    elif type(other) in (int, float):
        factor = other
    else:
        return None
    product = aten.mul.Tensor(flat, factor.val if isinstance(factor, Leaf) else factor)
    expr = call.run.expr(call, aten.mul.Tensor, [grid.expr, factor], val=product)
    if tuple(product.shape[1:]) != tuple(val.shape[2:]):
        return None
    if product.dtype != val.dtype:
        expr = call.run.expr(
            call, aten.to.dtype, [expr, val.dtype], val=product.new_empty(product.shape, dtype=val.dtype)
        )
    return PairGrid(grid.selection, expr)


# -- added by scatter -----------------------------------------------------------------------


def token_column(call: Call) -> Value | None:
    """token[:, None], token.view(-1, 1), and repeated for all columns."""
    value, val = call.arg(0), call.val()
    of_all = isinstance(value, TokenOf) and value.order != "flat"
    if (of_all or (isinstance(value, Index) and value.dim == 0)) and call.op in ("unsqueeze", "view", "reshape"):
        column = (
            val.dim() == 2
            and same_size(val.shape[1], 1)
            and same_size(val.shape[0], call.val(call.node.args[0]).shape[0])
        )
        selection = value.selection if isinstance(value, Index) else everyone(value.ids, value.order)  # type: ignore[union-attr]
        return TokenGrid(selection) if column else None
    if isinstance(value, TokenGrid) and call.op in ("repeat", "expand", "expand_as"):
        before = call.val(call.node.args[0])
        return value if val.dim() == 2 and same_size(val.shape[0], before.shape[0]) else None
    return None


def gather(call: Call) -> Value | None:
    """x.gather(0, token[:, None].expand(-1, D)): whole rows."""
    value, index = call.arg(0), call.arg(2)
    if not isinstance(index, TokenGrid) or call.number(1) not in (0, -2) or call.kwargs:
        return None
    if not isinstance(value, Plain):
        return None
    before, wide = call.val(value.node), call.val().dim() == 2 and call.val(call.node.args[0]).dim() == 2
    if not wide or not same_size(call.val().shape[1], before.shape[1]):
        return Unknown(f"{name_of(call.node)} gathers a part of the columns")
    wrong = misfit(call.run, index.selection, value.node, 1)
    return wrong or Rows(index.selection, call.run.table.leaf("token", value.node, call.val()))


def scatter_add(call: Call) -> Value | None:
    """total.scatter_add_(0, token[:, None].expand(-1, D), rows), or scatter_reduce_ with "sum"."""
    index, rows = call.arg(2), call.arg(3)
    if not isinstance(index, TokenGrid):
        return None
    sums = call.op.startswith("scatter_add") or call.number(4, "reduce") == "sum"
    if call.number(1) not in (0, -2) or not sums or call.number(5, "include_self", True) is not True:
        return Unknown(f"{name_of(call.node)} does not add rows to tokens")
    if not isinstance(rows, Rows) or call.val(call.node.args[2]).shape != call.val(call.node.args[3]).shape:
        return Unknown(f"{name_of(call.node)} does not add whole rows to tokens")
    if (total := total_of(call)) is None or (isinstance(total, Buffer) and total.kind == "empty"):
        return Unknown(f"{name_of(call.node)} adds into memory that was never set")
    if tuple(call.val().shape[1:]) != tuple(rows.expr.val.shape[1:]):
        return Unknown(f"{name_of(call.node)} adds rows to a part of the columns")
    return add_term(call, total, rows, index.selection)


RULES: dict[str, tuple[Rule, ...]] = {
    **{op: (ones,) for op in ("scatter", "scatter_")},
    **{op: (scale_grid, whole_ones) for op in ("to", "_to_copy", "long", "int")},
    **{op: (scale_grid,) for op in ("mul", "mul_", "multiply")},
    "sum": (sum_of_ones,),
    "bincount": (bincount,),
    "cumsum": (running_sum,),
    **{op: (less_own,) for op in ("sub", "subtract")},
    **{op: (zero_first,) for op in ("cat", "pad", "constant_pad_nd")},
    **{op: (entry,) for op in ("select", "unbind")},
    "slice": (whole,),
    **{op: (token_of,) for op in ("floor_divide", "div", "remainder")},
    "host_read": (host_read,),
    "host_number": (host_number,),
    "rows_between": (rows_between,),
    "places_between": (places_between,),
    "cat_rows": (join,),
    "gather": (gather,),
    "index": (by_pair,),
    **{op: (fill, unsort) for op in ("index_put", "index_put_")},
    **{op: (token_column,) for op in ("unsqueeze", "view", "reshape", "repeat", "expand", "expand_as")},
    **{op: (scatter_add,) for op in ("scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_")},
}
