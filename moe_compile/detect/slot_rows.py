"""Rules for rows that are put into slots [E, C, ...] by index, and read back from there.

    places = cumsum(one_hot(ids, E), 0) - 1                   # ids [R], or [T, K] as a vector
    at     = places.gather(1, ids[:, None]).squeeze(1)        # [R]: how many before this one chose the same expert
    kept   = at < C
    buffer = zeros(E, C, D);  buffer[ids[kept], at[kept]] = x[token[kept]]
    made   = body(buffer)                                     # as in slot_sums.py
    out.index_add(0, token[kept], made[ids[kept], at[kept]] * weights[kept][:, None])

or, for all rows, with a slot more for all who are late, whose results are multiplied by zero:

    buffer = zeros(E, C + 1, D);  buffer[ids, at.clamp(max=C)] = x
    out    = made[ids, at.clamp(max=C)] * (weights * kept)[:, None]

`at` is a count of those before at the same expert, so no two that are kept have one slot, and what is read at a row's
own expert and place is what its expert made of it.  What is put elsewhere, or read elsewhere, has no rule.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.dense import ancestors
from moe_compile.detect.interpreter import Call, Interpreter, Rule, op_of
from moe_compile.detect.selection import everyone, same_size, unflattened
from moe_compile.detect.slot_lists import bodies
from moe_compile.detect.slots import Count, Early, Places, at_most
from moe_compile.detect.sums import add_term, total_of
from moe_compile.detect.values import (
    Buffer,
    Dense,
    Every,
    FlatIds,
    Pieces,
    Plain,
    Positions,
    Repeated,
    Rows,
    RowTuple,
    Selection,
    Sum,
    Unknown,
    Value,
)
from moe_compile.region import Expr, Leaf, ids_where

aten = torch.ops.aten


@dataclass(frozen=True)
class OfKept(Value):
    """An index vector of the rows that are not late: their "row" (a "table" of one column), "token", "expert", "place".

    ids: of all rows, [T] or [T, K], those of late ones being -1.  classes: of a place, which ids are no error.
    """

    ids: Node
    count: Count
    bound: Any
    what: str
    classes: Any = None


@dataclass(frozen=True)
class Put:
    """How slots were filled: those before place `upto` have the row of `ids` that has this place, or zeros."""

    ids: Node
    count: Count
    upto: Any


@dataclass(frozen=True)
class Fetched(Dense):
    """What was read for each row of `ids` [R, ...]: its own if its place is less than `upto`, else that of others."""

    of_experts = True
    expr: Expr
    ids: Node
    count: Count
    upto: Any


@dataclass(frozen=True)
class Gate(Dense):
    """A number for each row [R], or [R, 1]: that of `weights` [R], but zero where the row is late by `early`."""

    early: Early
    truths: Node
    weights: Node
    column: bool = False


@dataclass(frozen=True)
class OfPairs(Dense):
    """A row for each pair of `ids` [T, K], zero for those of nobody: [T * K, ...], or as a `grid` [T, K, ...]."""

    expr: Expr
    ids: Node
    grid: bool = False


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
        while _column_of(index) is not None:
            index = _column_of(index)
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


def _column_of(node: Any) -> Node | None:
    """The vector of which a node is a column [R, 1], or a whole slice."""
    before = node.args[0] if isinstance(node, Node) and node.args else None
    if not isinstance(before, Node) or op_of(node) not in ("unsqueeze", "view", "reshape", "slice"):
        return None
    mine, whole = node.meta["val"].shape, before.meta["val"].shape
    fits = same_size(mine[0], whole[0]) and len(whole) == 1 and all(same_size(s, 1) for s in mine[1:])
    return before if fits else None


def as_vector(call: Call) -> Value | None:
    """at.view(-1), at[:, 0] of places [R, 1]; [:, None] of a gate."""
    value = call.arg(0)
    if isinstance(value, Gate):
        if value.column or _column_of(call.node) is None:
            return None
        return replace(value, column=call.val().dim() == 2) if call.val().dim() < 3 else None
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
    ids = _kept_ids(call, early, call.node.args[0])
    if ids is None:
        return None
    table = OfKept(ids, early.count, early.bound, "table")
    return RowTuple((replace(table, what="row"),)) if call.op == "where" else table


def _kept_ids(call: Call, early: Early, node: Any) -> Node | None:
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
    if not isinstance(value, OfKept) or value.what != "row" or call.number(1) != _top_k(value.ids):
        return None
    floor = call.op == "floor_divide" or call.kwargs.get("rounding_mode") in ("floor", "trunc")
    return replace(value, what="token") if floor and call.val().dtype == torch.int64 else None


# -- reading by index -----------------------------------------------------------------------


def read(call: Call) -> Value | None:
    """x[kept], x[token[kept]]; made[ids[kept], at[kept]], made[ids, at]."""
    if _elsewhere(call):
        return None
    indices = call.arg(1)
    indices = indices if isinstance(indices, list) else [indices]
    if len(indices) == 2:
        return _from_slots(call, indices)
    if len(indices) != 1 or not isinstance(of := indices[0], OfKept):
        return None
    value, node = call.arg(0), call.node.args[0]
    assert isinstance(node, Node)
    source, mine, rows = call.run.canonical.get(node, node), call.val(node), call.val(of.ids).numel()
    leaf, chosen = call.run.table.leaf, _selection(of.ids)
    if of.what == "token":
        fits = isinstance(value, Plain) and mine.dim() > 1 and same_size(mine.shape[0], call.val(of.ids).shape[0])
        return Rows(chosen, leaf("token", source, call.val())) if fits and mine.is_floating_point() else None
    if of.what != "row" or not same_size(mine.shape[0], rows):
        return None
    if source is of.count.ids and isinstance(value, Plain | FlatIds):
        return replace(of, what="expert")
    if isinstance(value, Places):
        own = value.dims == (0,) and value.masked and value.count == of.count and value.valid is of.count.ids
        own = own and (value.below is None or at_most(of.bound, value.below))
        return replace(of, what="place", classes=value.classes) if own else None
    if isinstance(value, Positions):
        pairs = value.shape == "pairs" and value.top_k == _top_k(of.ids)
        return replace(of, what="token") if pairs or (value.shape == "all" and _top_k(of.ids) == 1) else None
    if isinstance(value, Repeated):
        return Rows(chosen, value.expr) if value.selection.top_k == _top_k(of.ids) else None
    if not isinstance(value, Plain) or not mine.is_floating_point():
        return None
    role = "token" if mine.dim() > 1 and call.val(of.ids).dim() == 1 else "flat_pair"
    return Rows(chosen, leaf(role, source, call.val()))


def _from_slots(call: Call, indices: list[Any]) -> Value | None:
    made = call.arg(0)
    if isinstance(made, Plain) and _own_slots(indices):
        return _from_list(call, indices[0])
    if not isinstance(made, Every) or not isinstance(made.slots, Put) or made.flat or made.expr.level != "row":
        return None
    laid = made.slots
    if _own_slots(indices):
        if (indices[0].ids, indices[0].count) != (laid.ids, laid.count) or not at_most(indices[0].bound, laid.upto):
            return None
        return Rows(_selection(laid.ids), _sized(made.expr, call.val()))
    nodes: Any = call.node.args[1]
    at = _all_slots(call, indices, nodes, made.expr.val.shape[0])
    if at is None or at.count != laid.count or laid.ids is not unflattened(call.run, laid.count.ids):
        return None
    upto = _least(laid.upto, at.below)
    return None if upto is None else Fetched(_sized(made.expr, call.val()), laid.ids, laid.count, upto)


def _from_list(call: Call, of: OfKept) -> Value | None:
    """The same of slots on which each expert ran on its own."""
    made: Any = call.node.args[0]
    val = call.val(made)
    slots = [v for n in ancestors(made) if isinstance(v := call.run.values.get(n), Every) and isinstance(v.slots, Put)]
    if not slots or val.dim() < 3 or type(val.shape[0]) is not int:
        return None
    found = bodies(call.run, call.node, made, val.shape[0], val.shape[1], val.dim() - 1)
    if found is None or isinstance(found, Unknown):
        return found
    exprs, laid = found
    put = laid.slots
    if not isinstance(put, Put) or (put.ids, put.count, laid.num) != (of.ids, of.count, len(exprs)):
        return None
    if not at_most(of.bound, put.upto) or any(e.level != "row" for e in exprs):
        return None
    rows = [Rows(_selection(of.ids), _sized(expr, call.val())) for expr in exprs]
    return Pieces(tuple(enumerate(rows)), len(rows))


def _own_slots(indices: list[Any]) -> bool:
    """Whether an index is that of the slots of the rows that are kept."""
    e, at = indices
    both = isinstance(e, OfKept) and isinstance(at, OfKept) and (e.what, at.what) == ("expert", "place")
    return both and (e.ids, e.count, e.bound) == (at.ids, at.count, at.bound)


def _all_slots(call: Call, indices: list[Any], nodes: Any, slots: Any) -> Places | None:
    """The places of an index of all rows at their experts, if all are less than that."""
    at, e = indices[1], nodes[0]
    if not isinstance(at, Places) or at.dims != (0,) or not at.masked or at.below is None:
        return None
    own = _of_rows(call.run, at.count) and at.valid is at.count.ids and call.run.canonical.get(e, e) is at.count.ids
    return at if own and at_most(at.below, slots) else None


# -- putting into slots ---------------------------------------------------------------------


def put(call: Call) -> Value | None:
    """buffer[ids[kept], at[kept]] = rows, buffer[ids, at] = x: into zeros."""
    buffer, indices, rows = call.arg(0), call.arg(1), call.arg(2)
    if not isinstance(buffer, Buffer) or buffer.kind != "zero" or len(indices) != 2 or _elsewhere(call):
        return None
    val, nodes = call.val(), call.node.args
    if val.dim() < 3 or type(val.shape[0]) is not int or val.shape[0] < 2 or not call.run.is_fresh(buffer.node):
        return None
    if _own_slots(indices):
        of = indices[0]
        if not isinstance(rows, Rows) or rows.selection != _selection(of.ids) or rows.dim or rows.expr.level != "row":
            return None
        laid, expr = Put(of.ids, of.count, of.bound), rows.expr
        if not at_most(of.bound, val.shape[1]):
            return None
        classes = indices[1].classes
    else:
        at = _all_slots(call, indices, nodes[1], val.shape[1])
        if at is None or call.number(3, "accumulate", False) or (found := _all_rows(call, at, rows, nodes[2])) is None:
            return None
        laid, expr = Put(unflattened(call.run, at.count.ids), at.count, at.below - 1), found
        classes = at.classes
    if classes is None or not at_most(classes, val.shape[0]):
        return None  # an id of none of these experts is an error
    if expr.val.dtype != val.dtype or expr.val.dim() != val.dim() - 1 or not _same(expr.val.shape[1:], val.shape[2:]):
        return None
    return Every(_sized(expr, val.select(0, 0)), val.shape[0], False, None, laid)


def _all_rows(call: Call, at: Places, rows: Any, node: Any) -> Expr | None:
    """What is put for all rows of the ids."""
    ids = unflattened(call.run, at.count.ids)
    if isinstance(rows, Repeated):
        return rows.expr if rows.selection.top_k == _top_k(ids) and call.val(ids).dim() == 2 else None
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
    if (upto := _least(value.slots.upto, slots)) is None:
        return None
    whole = value.expr.val.new_empty((slots, *value.expr.val.shape[1:]))
    return replace(value, expr=_sized(value.expr, whole), slots=replace(value.slots, upto=upto))


# -- back to tokens -------------------------------------------------------------------------


def added(call: Call) -> Value | None:
    """total.index_add(0, token[kept], rows), total[kept] = rows."""
    adds = call.op.startswith("index_add")
    index, rows, total = call.arg(2 if adds else 1), call.arg(3 if adds else 2), total_of(call)
    index = index[0] if isinstance(index, list) and len(index) == 1 else index
    if not isinstance(index, OfKept) or not isinstance(rows, Rows) or rows.selection != _selection(index.ids):
        return None
    if not isinstance(total, Buffer | Sum) or _elsewhere(call):
        return None
    accumulate = adds or call.number(3, "accumulate", False)
    zero = isinstance(total, Buffer) and total.kind == "zero"
    of_token = index.what == "token" or (index.what == "row" and call.val(index.ids).dim() == 1)
    if adds and (call.number(1) != 0 or call.number(4, "alpha", 1) != 1):
        return None
    if rows.dim or rows.expr.level != "row" or (isinstance(total, Buffer) and total.kind == "empty"):
        return None
    if of_token and (accumulate or (zero and _top_k(index.ids) == 1)):
        call.run.reads.setdefault(index.ids, set()).add("number")
        chosen = everyone(index.ids, "slots")
        return add_term(call, total, Rows(chosen, rows.expr), chosen)
    if index.what != "row" or not zero or not isinstance(total, Buffer) or not call.run.is_fresh(total.node):
        return None
    fits = same_size(call.val().shape[0], call.val(index.ids).numel()) and call.val().dtype == rows.expr.val.dtype
    fits = fits and _same(call.val().shape[1:], rows.expr.val.shape[1:]) and call.val().dim() == rows.expr.val.dim()
    return OfPairs(rows.expr, index.ids) if fits else None


def product(call: Call) -> Value | None:
    """made * (weights * kept)[:, None], made * kept[:, None]; rows of pairs * weights."""
    if _elsewhere(call) or call.kwargs or call.op.endswith("_"):
        return None
    for i in (0, 1):
        value, other, node = call.arg(i), call.arg(1 - i), call.node.args[1 - i]
        if isinstance(value, Early) and isinstance(other, Value) and other.plain and isinstance(node, Node):
            val, truths = call.val(node), call.node.args[i]
            fits = value.dims == (0,) and val.dim() == 1 and val.is_floating_point() and val.dtype == call.val().dtype
            if fits and same_size(val.shape[0], call.val(truths).shape[0]):
                return Gate(value, truths, call.run.canonical.get(node, node))  # type: ignore[arg-type]
        if isinstance(value, Fetched):
            return _masked(call, value, other, node)
        if isinstance(value, OfPairs) and isinstance(other, Plain) and isinstance(node, Node):
            rank = 2 if value.grid else 1
            expr = _weighed(call, value.expr, other.node, call.val(node), rank, call.val(value.ids))
            return None if expr is None else replace(value, expr=expr)
    return None


def chosen(call: Call) -> Value | None:
    """where(kept[:, None], made, 0)"""
    if len(call.args) != 3 or not isinstance(call.arg(1), Fetched) or _elsewhere(call):
        return None
    other = call.arg(2)
    zero = (isinstance(other, Buffer) and other.kind == "zero") or (type(other) in (int, float) and other == 0)
    if not zero or not isinstance(call.arg(0), Early) or call.val().dim() != call.val(call.node.args[1]).dim():
        return None
    return _masked(call, call.arg(1), call.arg(0), call.node.args[0])


def _masked(call: Call, value: Fetched, gate: Any, node: Any) -> Value | None:
    """Rows that were read, without those of the late ones."""
    out = call.val()
    if isinstance(gate, Plain) and isinstance(node, Node):
        weighed = _weighed(call, value.expr, gate.node, call.val(node), 1, call.val(value.ids))
        return None if weighed is None else replace(value, expr=weighed)
    early, truths = (gate.early, gate.truths) if isinstance(gate, Gate) else (gate, node)
    column = gate.column if isinstance(gate, Gate) else isinstance(early, Early) and early.dims == (0, "one")
    if not isinstance(early, Early) or not column or early.count != value.count or not at_most(early.bound, value.upto):
        return None
    if out.dim() != 2 or out.dtype != value.expr.val.dtype or not _same(out.shape[1:], value.expr.val.shape[1:]):
        return None
    expr: Expr | None = value.expr
    if isinstance(gate, Gate):
        expr = _weighed(call, value.expr, gate.weights, call.val(gate.weights).unsqueeze(1), 1, call.val(value.ids))
    before = truths.args[0]
    while isinstance(before, Node) and isinstance(call.run.values.get(before), Early):  # a view or a copy of it
        truths, before = before, before.args[0]
    ids = _kept_ids(call, replace(early, dims=(0,)), truths)
    if ids is None or expr is None or call.val(truths).dim() != 1:
        return None
    if call.val(ids).dim() == 2:
        return OfPairs(expr, ids)
    call.run.reads.setdefault(ids, set()).add("number")
    return Sum(Buffer(call.node, "zero"), (Rows(everyone(ids, "slots"), expr),))


def _weighed(call: Call, expr: Expr, node: Node, val: Tensor, rank: int, ids: Tensor) -> Expr | None:
    """Rows times weights [R, 1, ...], or [T, K, 1, ...] if `rank` is 2."""
    if val.dtype != expr.val.dtype or call.val().dtype != val.dtype or val.dim() != expr.val.dim() + rank - 1:
        return None
    lead = ids.shape if rank == 2 else (ids.numel(),)
    if not _same(val.shape[:rank], lead) or not all(type(s) is int and s == 1 for s in val.shape[rank:]):
        return None
    rows = val.new_empty((expr.val.shape[0], *node.meta["val"].shape[rank:]))
    leaf = call.run.table.leaf("pair" if rank == 2 else "flat_pair", node, rows)
    for dim in range(leaf.val.dim(), expr.val.dim()):
        leaf = call.run.table.call(aten.unsqueeze.default, (leaf, dim), {}, leaf.val.unsqueeze(dim))
    return call.run.table.call(aten.mul.Tensor, (expr, leaf), {}, expr.val)


def grid(call: Call) -> Value | None:
    """rows.view(T, K, D)"""
    value, val = call.arg(0), call.val()
    if not isinstance(value, OfPairs) or value.grid or val.dim() != value.expr.val.dim() + 1:
        return None
    fits = _same(val.shape[:2], call.val(value.ids).shape) and _same(val.shape[2:], value.expr.val.shape[1:])
    return replace(value, grid=True) if fits else None


def total(call: Call) -> Value | None:
    """rows.view(T, K, D).sum(1)"""
    value, dims = call.arg(0), call.number(1, "dim")
    dims = dims if isinstance(dims, list) else [dims]
    if not isinstance(value, OfPairs) or not value.grid or dims != [1] or call.number(2, "keepdim", False):
        return None
    if call.val().dtype != value.expr.val.dtype or _elsewhere(call):
        return None
    call.run.reads.setdefault(value.ids, set()).add("number")
    return Sum(Buffer(call.node, "zero"), (Rows(everyone(value.ids, "slots"), value.expr),))


# -- help -----------------------------------------------------------------------------------


def _selection(ids: Node) -> Selection:
    """The rows that are not nobody's, in their order."""
    return everyone(ids, "kept")


def _top_k(ids: Node) -> int:
    val = ids.meta["val"]
    return int(val.shape[1]) if val.dim() == 2 else 1


def _sized(expr: Expr, val: Tensor) -> Expr:
    """The same for another number of rows."""
    if isinstance(expr, Leaf):
        return Leaf(expr.role, expr.node, val)
    return Expr(expr.target, expr.args, expr.kwargs, expr.level, val)


def _least(a: Any, b: Any) -> Any:
    """The lesser of two sizes, if that can be said."""
    return a if at_most(a, b) else b if at_most(b, a) else None


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))


def _elsewhere(call: Call) -> bool:
    """Whether the op runs in another grad mode or autocast than the sum around it."""
    return bool(call.run.autocasts or call.run.no_grad)


RULES: dict[str, tuple[Rule, ...]] = {
    "gather": (own_place,),
    "index": (own_place, read),
    **{op: (as_vector, grid) for op in ("view", "reshape", "_unsafe_view", "flatten")},
    **{op: (as_vector,) for op in ("unsqueeze", "select", "squeeze")},
    "nonzero": (kept,),
    "where": (kept, chosen),
    "unbind": (columns,),
    **{op: (token,) for op in ("floor_divide", "div")},
    **{op: (put, added) for op in ("index_put", "index_put_", "_index_put_impl_")},
    **{op: (added,) for op in ("index_add", "index_add_")},
    "slice": (as_vector, first_slots),
    "mul": (product,),
    "sum": (total,),
}
