"""Rules for counting: how many rows each expert has, where they start, and what Python read of it.

`Counts` and `Starts` are vectors over experts, `RowSum` a sum of the numbers of rows of some experts.  In a capture in
which some experts are known to have no rows (`Facts.empty`), numbers that are zero there say which.  What rows lie
between two such sums is for sliced_rows.py to say.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

from moe_compile.detect.dense_values import Spread
from moe_compile.detect.ids import INTEGERS, not_distinct, unflattened
from moe_compile.detect.interpreter import Call, Interpreter, Rule
from moe_compile.detect.nodes import ZEROS, name_of
from moe_compile.detect.shapes import equal_sizes, same_size
from moe_compile.detect.sorted_values import Counts, FlatIds, Ones, RowSum, Starts
from moe_compile.detect.values import Constant, Emptiness, Member, Plain, RowTuple, Unknown, Value

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
    total = resolved(call, call.arg(0), call.arg(1))
    if total is None or isinstance(total, int) or list(total.times.values()) != [1]:
        return None
    if call.node in call.run.facts.empty:
        call.run.empty |= {(total.ids, expert) for expert in total.times}
    return _single(total)


def resolved(call: Call, reads: list[Value], number: list[int]) -> RowSum | int | None:
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


RULES: dict[str, tuple[Rule, ...]] = {
    **{op: (ones,) for op in ("scatter", "scatter_")},
    **{op: (whole_ones,) for op in ("to", "_to_copy", "long", "int")},
    "sum": (sum_of_ones,),
    "bincount": (bincount,),
    "cumsum": (running_sum,),
    **{op: (less_own,) for op in ("sub", "subtract")},
    **{op: (zero_first,) for op in ("cat", "pad", "constant_pad_nd")},
    **{op: (entry,) for op in ("select", "unbind")},
    "host_read": (host_read,),
    "host_number": (host_number,),
}
