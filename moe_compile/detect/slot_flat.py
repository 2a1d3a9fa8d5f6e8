"""Rules for slots that are numbered through, [E * C, ...] in the place of [E, C, ...] (slot_places.py).

    slot   = ids[kept] * C + at[kept]                         # or (ids * C + at)[kept]
    buffer = zeros(E * C, D);  buffer[slot] = x[token[kept]]  # then buffer.view(E, C, D)
    made.view(E * C, D)[slot]

or, for all rows, `ids * (C + 1) + at.clamp(max=C)`, of C + 1 slots an expert.  A place that is less than the number by
which the expert is multiplied names a slot of that expert, and no other pair names it.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.nodes import name_of, op_of
from moe_compile.detect.shapes import same_size
from moe_compile.detect.slot_places import FlatPlaces, OfKept, all_slots, elsewhere, own_places, own_slots
from moe_compile.detect.slots import Places, at_most
from moe_compile.detect.values import Unknown, Value


@dataclass(frozen=True)
class Address:
    """The slots that an index names, of `num` experts and `slots` each: its own of each row that is kept, or of all."""

    rows: OfKept | Places
    num: int
    slots: Any


def times(call: Call) -> Value | None:
    """ids[kept] * C"""
    for i in (0, 1):
        value, width = call.arg(i), call.arg(1 - i)
        if isinstance(value, OfKept) and value.what == "expert" and type(width) is int and width > 0:
            whole = call.val().dtype == call.val(call.node.args[i]).dtype
            return replace(value, what="first", width=width) if whole and not call.op.endswith("_") else None
    return None


def add(call: Call) -> Value | None:
    """ids[kept] * C + at[kept]; ids * C + at"""
    if call.number(2, "alpha", 1) != 1 or call.op.endswith("_"):
        return None
    for i in (0, 1):
        at, first, node = call.arg(i), call.arg(1 - i), call.node.args[1 - i]
        if isinstance(at, OfKept) and isinstance(first, OfKept) and (at.what, first.what) == ("place", "first"):
            alike = (at.ids, at.count, at.bound) == (first.ids, first.count, first.bound)
            if alike and not at_most(at.bound, first.width):
                return Unknown(f"{name_of(call.node)} numbers {at.bound} slots of an expert, {first.width} apart")
            return replace(at, what="slot", width=first.width) if alike else None
        if isinstance(at, Places) and at.dims == (0,) and own_places(call.run, at) and call.val().dim() == 1:
            width = _multiplied(call, node, at)
            return None if width is None else FlatPlaces(at, width)
    return None


def _multiplied(call: Call, node: Any, at: Places) -> int | None:
    """C of `ids * C`, with the ids that are counted."""
    if not isinstance(node, Node) or node.op != "call_function" or op_of(node) not in ("mul", "multiply"):
        return None
    if node.meta["val"].dtype != at.count.ids.meta["val"].dtype or elsewhere(call):
        return None
    for ids, width in (node.args, node.args[::-1]):
        mine = isinstance(ids, Node) and call.run.canonical.get(ids, ids) is at.count.ids
        if mine and type(width) is int and width > 0:
            return width
    return None


def address(call: Call, indices: list[Any], nodes: Any, val: Any) -> Address | None:
    """What an index of slots `val`, [E, C, ...] or [E * C, ...], names."""
    if len(indices) == 2 and val.dim() > 2:
        rows = indices[1] if own_slots(indices) else all_slots(call, indices, nodes, val.shape[1])
        return None if rows is None else Address(rows, val.shape[0], val.shape[1])
    at = indices[0]
    if len(indices) != 1 or val.dim() < 2 or type(val.shape[0]) is not int:
        return None
    if isinstance(at, OfKept) and at.what == "slot":
        rows, width = at, at.width
    elif isinstance(at, FlatPlaces) and at.places.below is not None and at_most(at.places.below, at.width):
        rows, width = at.places, at.width
    else:
        return None
    return Address(rows, val.shape[0] // width, width) if val.shape[0] % width == 0 else None


def is_of(found: Address, num: int, slots: Any) -> bool:
    """Whether an index is one of so many slots of so many experts."""
    return found.num == num and same_size(found.slots, slots)


RULES: dict[str, tuple[Rule, ...]] = {
    **{op: (times,) for op in ("mul", "multiply")},
    "add": (add,),
}
