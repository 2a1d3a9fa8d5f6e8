"""Rules for rows that are put into slots [E, C, ...] by index (slot_places.py).

    buffer = zeros(E, C, D);  buffer[ids[kept], at[kept]] = x[token[kept]]

or, for all rows, with a slot more for all who are late:

    buffer = zeros(E, C + 1, D);  buffer[ids, at.clamp(max=C)] = x

Slots may be numbered through, [E * C, ...] (slot_flat.py).  What is put elsewhere has no rule.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from moe_compile.detect.dense_values import Every
from moe_compile.detect.ids import unflattened
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.shapes import same_size
from moe_compile.detect.slot_flat import address
from moe_compile.detect.slot_places import OfKept, elsewhere, least, rows_kept, same, sized, top_k_of
from moe_compile.detect.slots import Count, Places, at_most
from moe_compile.detect.sum_values import Buffer
from moe_compile.detect.values import Plain, Repeated, Rows, Value
from moe_compile.region import Expr


@dataclass(frozen=True)
class Put:
    """How slots were filled: those before place `upto` have the row of `ids` that has this place, or zeros."""

    ids: Node
    count: Count
    upto: Any


def put(call: Call) -> Value | None:
    """buffer[ids[kept], at[kept]] = rows, buffer[ids, at] = x: into zeros; or by numbers of slots."""
    buffer, indices, rows = call.arg(0), call.arg(1), call.arg(2)
    if not isinstance(buffer, Buffer) or buffer.kind != "zero" or not isinstance(indices, list) or elsewhere(call):
        return None
    val, nodes = call.val(), call.node.args
    found = address(call, indices, nodes[1], val)
    if found is None or type(found.num) is not int or found.num < 2 or not call.run.is_fresh(buffer.node):
        return None
    of = found.rows
    if isinstance(of, OfKept):
        if not isinstance(rows, Rows) or rows.selection != rows_kept(of.ids) or rows.dim or rows.expr.level != "row":
            return None
        laid, expr = Put(of.ids, of.count, of.bound), rows.expr
        if not at_most(of.bound, found.slots):
            return None
    else:
        if call.number(3, "accumulate", False) or (mine := _all_rows(call, of, rows, nodes[2])) is None:
            return None
        laid, expr = Put(unflattened(call.run, of.count.ids), of.count, of.below - 1), mine
    if of.classes is None or not at_most(of.classes, found.num):
        return None  # an id of none of these experts is an error
    flat = len(indices) == 1
    rank, behind = val.dim() - (not flat), val.shape[1 if flat else 2 :]
    if expr.val.dtype != val.dtype or expr.val.dim() != rank or not same(expr.val.shape[1:], behind):
        return None
    slots = expr.val.new_empty((found.slots, *behind))
    return Every(sized(expr, slots), found.num, flat, None, laid)


def _all_rows(call: Call, at: Places, rows: Any, node: Any) -> Expr | None:
    """What is put for all rows of the ids."""
    ids = unflattened(call.run, at.count.ids)
    if isinstance(rows, Repeated):
        return rows.expr if rows.selection.top_k == top_k_of(ids) and call.val(ids).dim() == 2 else None
    if not isinstance(rows, Plain) or not isinstance(node, Node):
        return None
    val = call.val(node)
    if val.dim() < 2 or not val.is_floating_point() or not same_size(val.shape[0], call.val(ids).numel()):
        return None
    return call.run.table.leaf("token" if call.val(ids).dim() == 1 else "flat_pair", rows.node, val)


def first_slots(call: Call) -> Value | None:
    """buffer[:, :C]: without those of the late."""
    value, end = call.arg(0), call.number(3, "end", None)
    if not isinstance(value, Every) or not isinstance(value.slots, Put) or value.flat or call.number(1, "dim", 0) != 1:
        return None
    if call.number(2, "start", None) not in (0, None) or call.number(4, "step", 1) != 1 or type(end) is not int:
        return None
    slots = call.val().shape[1]
    if (upto := least(value.slots.upto, slots)) is None:
        return None
    whole = value.expr.val.new_empty((slots, *value.expr.val.shape[1:]))
    return replace(value, expr=sized(value.expr, whole), slots=replace(value.slots, upto=upto))


RULES: dict[str, tuple[Rule, ...]] = {
    **{op: (put,) for op in ("index_put", "index_put_", "_index_put_impl_")},
    "slice": (first_slots,),
}
