"""Rules for what experts made of rows in slots (slot_rows.py), read by index and given back to tokens.

    made = body(buffer)                                       # as in slot_sums.py
    out.index_add(0, token[kept], made[ids[kept], at[kept]] * weights[kept][:, None])

or, for all rows, where what is read for those who are late is multiplied by zero:

    out = made[ids, at.clamp(max=C)] * (weights * kept)[:, None]

What is read at a row's own expert and place is what its expert made of it.  What is read elsewhere has no rule.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.dense import ancestors
from moe_compile.detect.dense_values import Dense, Every
from moe_compile.detect.ids import unflattened
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.selection import everyone
from moe_compile.detect.shapes import same_size
from moe_compile.detect.slot_flat import Address, address, is_of
from moe_compile.detect.slot_lists import bodies
from moe_compile.detect.slot_places import (
    OfKept,
    column_of,
    elsewhere,
    kept_ids,
    least,
    rows_kept,
    same,
    sized,
    top_k_of,
)
from moe_compile.detect.slot_rows import Put
from moe_compile.detect.slots import Count, Early, at_most
from moe_compile.detect.sorted_values import Pieces
from moe_compile.detect.sum_values import Buffer, Sum
from moe_compile.detect.sums import add_term, total_of
from moe_compile.detect.values import Plain, Rows, Unknown, Value
from moe_compile.region import Expr

aten = torch.ops.aten


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


# -- reading slots --------------------------------------------------------------------------


def read(call: Call) -> Value | None:
    """made[ids[kept], at[kept]], made[ids, at], made.view(E * C, D)[slot]"""
    made, indices, val = call.arg(0), call.arg(1), call.val(call.node.args[0])
    if not isinstance(indices, list) or not isinstance(val, Tensor) or elsewhere(call):
        return None
    found = address(call, indices, call.node.args[1], val)
    if found is None:
        return None
    of = found.rows
    if isinstance(made, Plain):
        return _from_list(call, of, found) if isinstance(of, OfKept) else None
    if not isinstance(made, Every) or not isinstance(made.slots, Put) or made.expr.level != "row":
        return None
    laid = made.slots
    if made.flat != (len(indices) == 1) or not is_of(found, made.num, made.expr.val.shape[0]):
        return None
    if isinstance(of, OfKept):
        if (of.ids, of.count) != (laid.ids, laid.count) or not at_most(of.bound, laid.upto):
            return None
        return Rows(rows_kept(laid.ids), sized(made.expr, call.val()))
    if of.count != laid.count or laid.ids is not unflattened(call.run, laid.count.ids):
        return None
    upto = least(laid.upto, of.below)
    return None if upto is None else Fetched(sized(made.expr, call.val()), laid.ids, laid.count, upto)


def _from_list(call: Call, of: OfKept, named: Address) -> Value | None:
    """The same of slots on which each expert ran on its own."""
    made: Any = call.node.args[0]
    rank = call.val().dim()
    slots = [v for n in ancestors(made) if isinstance(v := call.run.values.get(n), Every) and isinstance(v.slots, Put)]
    if not slots or type(named.num) is not int:
        return None
    found = bodies(call.run, call.node, made, named.num, named.slots, rank)
    if found is None or isinstance(found, Unknown):
        return found
    exprs, laid = found
    put = laid.slots
    if not isinstance(put, Put) or (put.ids, put.count, laid.num) != (of.ids, of.count, len(exprs)):
        return None
    if not at_most(of.bound, put.upto) or any(e.level != "row" for e in exprs):
        return None
    rows = [Rows(rows_kept(of.ids), sized(expr, call.val())) for expr in exprs]
    return Pieces(tuple(enumerate(rows)), len(rows))


# -- back to tokens -------------------------------------------------------------------------


def added(call: Call) -> Value | None:
    """total.index_add(0, token[kept], rows), total[kept] = rows."""
    adds = call.op.startswith("index_add")
    index, rows, total = call.arg(2 if adds else 1), call.arg(3 if adds else 2), total_of(call)
    index = index[0] if isinstance(index, list) and len(index) == 1 else index
    if not isinstance(index, OfKept) or not isinstance(rows, Rows) or rows.selection != rows_kept(index.ids):
        return None
    if not isinstance(total, Buffer | Sum) or elsewhere(call):
        return None
    accumulate = adds or call.number(3, "accumulate", False)
    zero = isinstance(total, Buffer) and total.kind == "zero"
    of_token = index.what == "token" or (index.what == "row" and call.val(index.ids).dim() == 1)
    if adds and (call.number(1) != 0 or call.number(4, "alpha", 1) != 1):
        return None
    if rows.dim or rows.expr.level != "row" or (isinstance(total, Buffer) and total.kind == "empty"):
        return None
    if of_token and (accumulate or (zero and top_k_of(index.ids) == 1)):
        call.run.reads.setdefault(index.ids, set()).add("number")
        chosen = everyone(index.ids, "slots")
        return add_term(call, total, Rows(chosen, rows.expr), chosen)
    if index.what != "row" or not zero or not isinstance(total, Buffer) or not call.run.is_fresh(total.node):
        return None
    fits = same_size(call.val().shape[0], call.val(index.ids).numel()) and call.val().dtype == rows.expr.val.dtype
    fits = fits and same(call.val().shape[1:], rows.expr.val.shape[1:]) and call.val().dim() == rows.expr.val.dim()
    return OfPairs(rows.expr, index.ids) if fits else None


def product(call: Call) -> Value | None:
    """made * (weights * kept)[:, None], made * kept[:, None]; rows of pairs * weights."""
    if elsewhere(call) or call.kwargs or call.op.endswith("_"):
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
    if len(call.args) != 3 or not isinstance(call.arg(1), Fetched) or elsewhere(call):
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
    if out.dim() != 2 or out.dtype != value.expr.val.dtype or not same(out.shape[1:], value.expr.val.shape[1:]):
        return None
    expr: Expr | None = value.expr
    if isinstance(gate, Gate):
        expr = _weighed(call, value.expr, gate.weights, call.val(gate.weights).unsqueeze(1), 1, call.val(value.ids))
    before = truths.args[0]
    while isinstance(before, Node) and isinstance(call.run.values.get(before), Early):  # a view or a copy of it
        truths, before = before, before.args[0]
    ids = kept_ids(call, replace(early, dims=(0,)), truths)
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
    if not same(val.shape[:rank], lead) or not all(type(s) is int and s == 1 for s in val.shape[rank:]):
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
    fits = same(val.shape[:2], call.val(value.ids).shape) and same(val.shape[2:], value.expr.val.shape[1:])
    return replace(value, grid=True) if fits else None


def total(call: Call) -> Value | None:
    """rows.view(T, K, D).sum(1)"""
    value, dims = call.arg(0), call.number(1, "dim")
    dims = dims if isinstance(dims, list) else [dims]
    if not isinstance(value, OfPairs) or not value.grid or dims != [1] or call.number(2, "keepdim", False):
        return None
    if call.val().dtype != value.expr.val.dtype or elsewhere(call):
        return None
    call.run.reads.setdefault(value.ids, set()).add("number")
    return Sum(Buffer(call.node, "zero"), (Rows(everyone(value.ids, "slots"), value.expr),))


def as_column(call: Call) -> Value | None:
    """gate[:, None]"""
    gate = call.arg(0)
    if not isinstance(gate, Gate) or gate.column or column_of(call.node) is None:
        return None
    return replace(gate, column=call.val().dim() == 2) if call.val().dim() < 3 else None


RULES: dict[str, tuple[Rule, ...]] = {
    "index": (read,),
    **{op: (as_column, grid) for op in ("view", "reshape", "_unsafe_view", "flatten")},
    **{op: (as_column,) for op in ("unsqueeze", "slice")},
    "where": (chosen,),
    **{op: (added,) for op in ("index_put", "index_put_", "_index_put_impl_", "index_add", "index_add_")},
    "mul": (product,),
    "sum": (total,),
}
