"""Rules for rows between two numbers that Python read: the rows of one expert, where they lie in sorted order.

Rows between two sums of counts (counts.py) are those of expert e if the first counts all experts before e, and the
second e as well.  In a capture in which some experts are known to have no rows, those may be counted or not.
"""

import sys
from typing import Any

import torch
from torch.fx import Node

from moe_compile.detect.counts import EXACT, resolved
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.nodes import name_of
from moe_compile.detect.selection import everyone
from moe_compile.detect.shapes import same_size
from moe_compile.detect.sorted_values import Permutation, Pieces, Places, RowSum, TokenOf
from moe_compile.detect.sum_values import Region
from moe_compile.detect.values import Index, Plain, Repeated, Rows, Selection, Unknown, Value
from moe_compile.region import ids_above, ids_by_sizes

ANY = 2**63 - 1  # ids from 0 on are no error; those of no expert add nothing


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
    if isinstance(rows, Rows) and isinstance(ids := rows.selection.ids, Node) and sizes_of(ids) is sizes:
        return ids, value, bool(ids.args[2])
    return Unknown(f"{name_of(call.node)} slices rows by sizes that are not shown to be theirs")


def sizes_of(ids: Any) -> Any:
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
    low, high = resolved(call, reads, start), resolved(call, reads, end)
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


RULES: dict[str, tuple[Rule, ...]] = {
    "rows_between": (rows_between,),
    "places_between": (places_between,),
    **{op: (token_of,) for op in ("floor_divide", "div", "remainder")},
    "slice": (whole,),
    "index": (by_pair,),
}
