"""Rules for who has a slot of an expert, and which: indices of rows, from masks of those who are not late.

    places = cumsum(one_hot(ids, E), 0) - 1                   # ids [R], or [T, K] as a vector
    at     = places.gather(1, ids[:, None]).squeeze(1)        # [R]: how many before this one chose the same expert
    kept   = at < C
    ids[kept], at[kept], token[kept], x[token[kept]]

`at` is a count of those before at the same expert, so no two that are kept have one slot.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.dense_values import Dense, Positions
from moe_compile.detect.ids import unflattened
from moe_compile.detect.interpreter import Call, Interpreter, Rule
from moe_compile.detect.nodes import op_of
from moe_compile.detect.selection import everyone
from moe_compile.detect.shapes import same_size
from moe_compile.detect.slots import Count, Early, Places, at_most
from moe_compile.detect.sorted_values import FlatIds
from moe_compile.detect.values import Plain, Repeated, Rows, RowTuple, Selection, Value
from moe_compile.region import Expr, Leaf, ids_where

aten = torch.ops.aten


@dataclass(frozen=True)
class OfKept(Value):
    """An index vector of the rows that are not late: their "row" (a "table" of one column), "token", "expert", "place";
    with `width` slots an expert the "first" slot of their expert, and their own "slot" (slot_flat.py).

    ids: of all rows, [T] or [T, K], those of late ones being -1.  classes: of a place, which ids are no error.
    """

    ids: Node
    count: Count
    bound: Any
    what: str
    classes: Any = None
    width: int = 0


@dataclass(frozen=True)
class FlatPlaces(Dense):
    """The slot of each row, of `width` an expert: its expert's first, and its place behind that."""

    places: Places
    width: int


# -- places and who is late -----------------------------------------------------------------


def own_place(call: Call) -> Value | None:
    """places.gather(1, ids[:, None]), places[arange(R), ids]"""
    places = call.arg(0)
    if not isinstance(places, Places) or places.dims != (0, "e") or places.masked or places.below is not None:
        return None
    if not _of_rows(call.run, places.count) or places.valid is not places.count.ids:
        return None
    if call.op == "gather":
        index: Any = call.node.args[2]
        while column_of(index) is not None:
            index = column_of(index)
        fits = call.number(1) in (1, -1) and call.run.canonical.get(index, index) is places.count.ids
        same = call.val().dim() == 2 and same_size(call.val().shape[0], call.val(places.count.ids).shape[0])
        return replace(places, dims=(0, "one"), masked=True) if fits and same else None
    indices, nodes = call.arg(1), call.node.args[1]
    if len(indices) != 2 or not isinstance(indices[0], Positions) or indices[0].shape != "all":
        return None
    at: Any = nodes[1]  # type: ignore[index]
    fits = call.run.canonical.get(at, at) is places.count.ids
    same = same_size(call.val(nodes[0]).shape[0], call.val(at).shape[0]) if fits else False  # type: ignore[index]
    return replace(places, dims=(0,), masked=True) if same else None


def _of_rows(run: Interpreter, count: Count) -> bool:
    """Whether a count is one of a vector of ids, each at its own place among all."""
    return count.ids.meta["val"].dim() == 1 and count.along == 0 and not count.base and count.shift >= -1


def column_of(node: Any) -> Node | None:
    """The vector of which a node is a column [R, 1], or a whole slice."""
    before = node.args[0] if isinstance(node, Node) and node.args else None
    if not isinstance(before, Node) or op_of(node) not in ("unsqueeze", "view", "reshape", "slice"):
        return None
    mine, whole = node.meta["val"].shape, before.meta["val"].shape
    fits = same_size(mine[0], whole[0]) and len(whole) == 1 and all(same_size(s, 1) for s in mine[1:])
    return before if fits else None


def as_vector(call: Call) -> Value | None:
    """at.view(-1), at[:, 0] of places [R, 1]."""
    value = call.arg(0)
    if isinstance(value, OfKept) and value.what == "table" and call.val().dim() == 1:
        if call.op == "select" and call.node.args[1:] not in ((1, 0), (-1, 0)):
            return None
        return replace(value, what="row")
    if not isinstance(value, Places | Early) or value.dims != (0, "one") or call.val().dim() != 1:
        return None
    if call.op == "select" and call.node.args[1:] not in ((1, 0), (-1, 0)):
        return None
    same = same_size(call.val().shape[0], call.val(call.node.args[0]).shape[0])
    return replace(value, dims=(0,)) if same else None


def kept(call: Call) -> Value | None:
    """kept.nonzero(), where(kept), which x[kept] does too."""
    early = call.arg(0)
    if not isinstance(early, Early) or early.dims != (0,) or (call.op == "where" and len(call.args) != 1):
        return None
    ids = kept_ids(call, early, call.node.args[0])
    if ids is None:
        return None
    table = OfKept(ids, early.count, early.bound, "table")
    return RowTuple((replace(table, what="row"),)) if call.op == "where" else table


def kept_ids(call: Call, early: Early, node: Any) -> Node | None:
    """The ids of rows, those of late ones being -1, in the shape that they had before they were a vector."""
    run, flat = call.run, early.count.ids
    if not _of_rows(run, early.count) or early.valid is not flat or not isinstance(node, Node):
        return None
    ids, truths = unflattened(run, flat), run.canonical.get(node, node)
    val = ids.meta["val"]
    if val.dim() > 2 or (val.dim() == 2 and type(val.shape[1]) is not int):
        return None
    if val.dim() == 2:
        wide = truths.meta["val"].new_empty(val.shape)
        truths = run.write_ids(truths, aten.reshape.default, (truths, [-1, val.shape[1]]), wide, None)
    return run.write_ids(max(ids, truths), ids_where, (ids, truths), val, ids)


def columns(call: Call) -> Value | None:
    value = call.arg(0)
    if not isinstance(value, OfKept) or value.what != "table" or call.number(1, "dim", 0) not in (1, -1):
        return None
    return RowTuple((replace(value, what="row"),))


def token(call: Call) -> Value | None:
    """row // K"""
    value = call.arg(0)
    if not isinstance(value, OfKept) or value.what != "row" or call.number(1) != top_k_of(value.ids):
        return None
    floor = call.op == "floor_divide" or call.kwargs.get("rounding_mode") in ("floor", "trunc")
    return replace(value, what="token") if floor and call.val().dtype == torch.int64 else None


# -- reading by these indices ---------------------------------------------------------------


def of_kept(call: Call) -> Value | None:
    """x[kept], x[token[kept]]"""
    indices = call.arg(1)
    indices = indices if isinstance(indices, list) else [indices]
    if len(indices) != 1 or not isinstance(of := indices[0], OfKept) or elsewhere(call):
        return None
    value, node = call.arg(0), call.node.args[0]
    assert isinstance(node, Node)
    source, mine, rows = call.run.canonical.get(node, node), call.val(node), call.val(of.ids).numel()
    leaf, chosen = call.run.table.leaf, rows_kept(of.ids)
    if of.what == "token":
        fits = isinstance(value, Plain) and mine.dim() > 1 and same_size(mine.shape[0], call.val(of.ids).shape[0])
        return Rows(chosen, leaf("token", source, call.val())) if fits and mine.is_floating_point() else None
    if of.what != "row" or not same_size(mine.shape[0], rows):
        return None
    if source is of.count.ids and isinstance(value, Plain | FlatIds):
        return replace(of, what="expert")
    if isinstance(value, Places | FlatPlaces):
        at, width = (value.places, value.width) if isinstance(value, FlatPlaces) else (value, 0)
        own = at.dims == (0,) and own_places(call.run, at) and at.count == of.count
        own = own and (at.below is None or at_most(of.bound, at.below)) and (not width or at_most(of.bound, width))
        return replace(of, what="slot" if width else "place", classes=at.classes, width=width) if own else None
    if isinstance(value, Positions):
        pairs = value.shape == "pairs" and value.top_k == top_k_of(of.ids)
        return replace(of, what="token") if pairs or (value.shape == "all" and top_k_of(of.ids) == 1) else None
    if isinstance(value, Repeated):
        return Rows(chosen, value.expr) if value.selection.top_k == top_k_of(of.ids) else None
    if not isinstance(value, Plain) or not mine.is_floating_point():
        return None
    role = "token" if mine.dim() > 1 and call.val(of.ids).dim() == 1 else "flat_pair"
    return Rows(chosen, leaf(role, source, call.val()))


def own_places(run: Interpreter, at: Places) -> bool:
    """Whether places are those of each row at its own expert, among all rows."""
    return at.masked and _of_rows(run, at.count) and at.valid is at.count.ids


def own_slots(indices: list[Any]) -> bool:
    """Whether an index is that of the slots of the rows that are kept."""
    e, at = indices
    both = isinstance(e, OfKept) and isinstance(at, OfKept) and (e.what, at.what) == ("expert", "place")
    return both and (e.ids, e.count, e.bound) == (at.ids, at.count, at.bound)


def all_slots(call: Call, indices: list[Any], nodes: Any, slots: Any) -> Places | None:
    """The places of an index of all rows at their experts, if all are less than that."""
    at, e = indices[1], nodes[0]
    if not isinstance(at, Places) or at.dims != (0,) or at.below is None:
        return None
    own = own_places(call.run, at) and call.run.canonical.get(e, e) is at.count.ids
    return at if own and at_most(at.below, slots) else None


# -- help -----------------------------------------------------------------------------------


def rows_kept(ids: Node) -> Selection:
    """The rows that are not nobody's, in their order."""
    return everyone(ids, "kept")


def top_k_of(ids: Node) -> int:
    val = ids.meta["val"]
    return int(val.shape[1]) if val.dim() == 2 else 1


def sized(expr: Expr, val: Tensor) -> Expr:
    """The same for another number of rows."""
    if isinstance(expr, Leaf):
        return Leaf(expr.role, expr.node, val)
    return Expr(expr.target, expr.args, expr.kwargs, expr.level, val)


def least(a: Any, b: Any) -> Any:
    """The lesser of two sizes, if that can be said."""
    return a if at_most(a, b) else b if at_most(b, a) else None


def same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))


def elsewhere(call: Call) -> bool:
    """Whether the op runs in another grad mode or autocast than the sum around it."""
    return bool(call.run.autocasts or call.run.no_grad)


RULES: dict[str, tuple[Rule, ...]] = {
    "gather": (own_place,),
    "index": (own_place, of_kept),
    **{op: (as_vector,) for op in ("view", "reshape", "_unsafe_view", "flatten", "unsqueeze", "select", "squeeze")},
    "slice": (as_vector,),
    **{op: (kept,) for op in ("nonzero", "where")},
    "unbind": (columns,),
    **{op: (token,) for op in ("floor_divide", "div")},
}
