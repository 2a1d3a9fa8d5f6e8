"""Rules for who is chosen: what a mask selects as an index, and rows that are gathered by a selection.

A `Selection` names the rows of one expert, or of all; masks come from masks.py, and what is computed of the rows that
are gathered here is for rows.py.
"""

from typing import Any

import torch
from torch.fx import Node

from moe_compile.detect.grids import as_table, folded, grid_of, in_grid
from moe_compile.detect.ids import top_k
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.nodes import op_of
from moe_compile.detect.routing_weights import one_weight_a_token
from moe_compile.detect.shapes import equal_sizes, misfit
from moe_compile.detect.sorted_values import TokenOf
from moe_compile.detect.values import (
    Column,
    Hits,
    Index,
    MaskedWeights,
    Member,
    Plain,
    Repeated,
    Rows,
    RowTuple,
    Selection,
    Sorted,
    Unknown,
    Value,
)

# -- choosing -------------------------------------------------------------------------------


def nonzero(call: Call) -> Value | None:
    """where(mask), mask.nonzero(): the selection, or the list of experts that somebody chose."""
    if call.op == "where" and len(call.args) != 1:
        return None
    chosen = choose(call.arg(0))
    if chosen is None:
        return None
    if isinstance(chosen, Unknown) or (call.op == "nonzero" and not isinstance(chosen, Hits)):
        return chosen if isinstance(chosen, Unknown) else Index(chosen, call.arg(0).dims)
    if isinstance(chosen, Hits):
        return chosen
    return RowTuple(tuple(Index(chosen, d) for d in call.arg(0).dims))


def choose(value: Any) -> Selection | Hits | Unknown | None:
    """What a mask selects when it is used as an index."""
    if not isinstance(value, Member) or value.kind not in ("mask", "any"):
        return None
    if value.dims == ("e",):
        return Hits(value.ids, value.classes) if value.kind == "any" else None
    if value.expert is None or "e" in value.dims or "one" in value.dims:
        return Unknown("a mask over several experts at once selects rows")
    rank, dims = value.ids.meta["val"].dim(), folded(value.dims)
    if dims in ((0,), (0, 1), (1, 0)) and len(dims) == rank and value.kind == "mask":
        return Selection(value.ids, value.expert, value.classes, "pair", by_slot=dims == (1, 0))
    if dims == (0,) and value.kind == "any":
        return Selection(value.ids, value.expert, value.classes, "token")
    return Unknown(f"a mask over dimensions {value.dims} of the ids selects rows")


# -- gathering rows -------------------------------------------------------------------------


def gather_rows(call: Call) -> Value | None:
    """x[token], weights[token, k], table[:, e][token]; a mask in the index is what it selects."""
    value = call.arg(0)
    if call.op == "index_select" and call.number(1) != 0:
        return None
    picked, selection = index_vectors(call, 1 if call.op == "index" else 2)
    if selection is None:
        return None
    if isinstance(selection, Unknown):
        return selection
    table, val = call.run.table, call.val()
    if in_grid(picked):
        grid, sizes = grid_of(selection.ids), call.val(call.node.args[0]).shape[:2]
        if grid is None or len(sizes) != 2 or not equal_sizes(call.run, sizes, grid):
            return Unknown("rows are gathered by other tokens than those of the expert ids")
        picked = list(folded(picked))
        if isinstance(value, Plain):
            value = Plain(as_table(call.run, value.node))
    elif grid_of(selection.ids) and isinstance(value, MaskedWeights) and val.dim() != 1:
        return Unknown("weights are gathered by other tokens than those of the expert ids")
    if picked == [0] and (rows := one_weight_a_token(call, value, selection, val)):
        return rows
    if isinstance(value, Column) and picked == [0]:
        value = Plain(call.run.canonical[call.node.args[0]])  # type: ignore[index]
    if isinstance(value, Repeated | Sorted):  # x.repeat_interleave(K, 0) at the places of an expert's pairs
        value = Plain(call.run.canonical[call.node.args[0]])  # type: ignore[index]
    if not isinstance(value, Plain):
        return None
    source: Any = value.node
    if picked == [0] and op_of(source) == "unsqueeze" and source.args[1] in (1, -1):
        inner = call.run.otherwise(source.args[0])
        rows = one_weight_a_token(call, inner, selection, val.select(1, 0))
        if isinstance(rows, Rows):
            return Rows(selection, call.run.expr(call, torch.ops.aten.unsqueeze.default, [rows.expr, 1]))
        if rows is not None:
            return rows
    if picked == [0]:
        kind = Sorted if selection.expert is None and selection.order != "flat" else Rows
        return misfit(call.run, selection, value.node, 1) or kind(selection, table.leaf("token", value.node, val))
    if picked == [0, 1] and selection.per == "pair":
        return misfit(call.run, selection, value.node, 2) or Rows(selection, table.leaf("pair", value.node, val))
    if picked == [None, 0] and op_of(source) == "unsqueeze" and source.args[1] == 0:
        row = val.select(0, 0)
        if wrong := misfit(call.run, selection, source.args[0], 1):
            return wrong
        return Rows(selection, table.leaf("token", source.args[0], row), dim=1)
    return Unknown(f"rows are gathered along dimensions {picked} of the expert ids")


def everyone(ids: Node, order: Any) -> Selection:
    """All pairs at once, laid out by `order`."""
    k = top_k(ids)
    return Selection(ids, None, None, "pair", order, k if isinstance(k, int) else 0)


def index_vectors(call: Call, position: int) -> tuple[list[Any], Selection | Unknown | None]:
    """For an index [Index, None, mask] or a single one: the ids' dimension behind each place, and the one selection."""
    picked: list[Any] = []
    found: set[Selection] = set()
    indices, nodes = call.arg(position), call.node.args[position]
    indices = indices if isinstance(indices, list) else [indices]
    nodes = nodes if isinstance(nodes, (list, tuple)) else [nodes] * len(indices)
    for index, node in zip(indices, nodes, strict=True):
        if isinstance(index, Member):
            if call.val(node).dtype not in (torch.bool, torch.uint8):
                return [], Unknown("a mask of numbers is an index: it picks rows 0 and 1")
            chosen = choose(index)
            if not isinstance(chosen, Selection):
                return [], chosen if isinstance(chosen, Unknown) else None
            picked += index.dims
            found.add(chosen)
        elif isinstance(index, Index):
            picked.append(index.dim)
            found.add(index.selection)
        elif isinstance(index, TokenOf):
            picked.append(0)
            found.add(everyone(index.ids, index.order))
        elif index is None:
            picked.append(None)
        else:
            return [], Unknown("one index is the selection's, another is not") if found else None
    if len(found) > 1:
        return [], Unknown("rows of two different selections are mixed")
    return picked, next(iter(found), None)


RULES: dict[str, tuple[Rule, ...]] = {
    **{op: (nonzero,) for op in ("nonzero", "nonzero_numpy")},
    "where": (nonzero,),
    **{op: (gather_rows,) for op in ("index", "index_select")},
}
