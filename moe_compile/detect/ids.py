"""Nodes that hold expert ids: what they are a part or another shape of, and what is known of the numbers in them.

Ids are a vector or a table [T, K] of integers.  What names them otherwise (grids, columns of ones, transposed, flat) is
brought to one node, which the values of the rules (values.py) then have in common.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.by_column import column_of
from moe_compile.detect.grids import as_table, grid_of
from moe_compile.detect.interpreter import Call, Interpreter
from moe_compile.detect.nodes import op_of
from moe_compile.detect.shapes import same_size
from moe_compile.detect.sorted_values import FlatIds
from moe_compile.detect.values import Plain, Value
from moe_compile.region import ids_above

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def ids_node(value: Any) -> Node | None:
    """The node of a value that can hold expert ids: a plain integer vector or matrix."""
    node = value.node if isinstance(value, Plain) else None
    val = node.meta.get("val") if node is not None else None
    return node if isinstance(val, Tensor) and val.dtype in INTEGERS and 1 <= val.dim() <= 2 else None


def ids_in_column(call: Call, value: Any) -> Any:
    """Ids [T, 1, 1, ...] as a vector of ids, and how many dimensions follow; else the value itself and 0."""
    node = value.node if isinstance(value, Plain) else None
    val = node.meta.get("val") if node is not None else None
    if node is None or not isinstance(val, Tensor) or val.dim() < 3 or val.dtype not in INTEGERS:
        return value, 0
    if not all(isinstance(s, int) and s == 1 for s in val.shape[1:]):
        return value, 0
    flat = call.run.write_ids(node, torch.ops.aten.reshape.default, (node, [-1]), val.reshape(-1), None)
    return Plain(flat), val.dim() - 1


def ids_in_grid(call: Call, value: Any) -> Node | None:
    """Ids [B, S, K] as a table [B * S, K]."""
    node = value.node if isinstance(value, Plain) else None
    val = node.meta.get("val") if node is not None else None
    if node is None or not isinstance(val, Tensor) or val.dim() != 3 or val.dtype not in INTEGERS:
        return None
    column = all(isinstance(s, int) and s == 1 for s in val.shape[1:])
    return as_table(call.run, node) if isinstance(val.shape[2], int) and not column else None


def transposed(run: Interpreter, ids: Node) -> Node | None:
    """The table of ids [T, K] of which these are the transpose."""
    source = ids.args[0] if op_of(ids) in ("t", "transpose", "permute") else None
    if not isinstance(source, Node) or _order(ids) != (1, 0) or not run.unchanged(source):
        return None
    table = run.otherwise(source)
    return ids_node(table) if isinstance(table, Plain) and source.meta["val"].dim() == 2 else None


def _order(node: Node) -> tuple[int, ...]:
    """The order in which a transposed matrix has its dimensions."""
    if op_of(node) == "t":
        return (1, 0)
    dims: Any = node.args[1] if op_of(node) == "permute" else node.args[1:3]
    dims = [d % 2 for d in dims]
    return tuple(dims) if op_of(node) == "permute" or dims[0] == dims[1] else (1, 0)


def flat_as_ids(call: Call) -> Value:
    """The first argument; flat ids as a vector of ids, as good as any, also if they were sorted."""
    value = call.arg(0)
    if not isinstance(value, FlatIds):
        return value
    return Plain(call.run.canonical[call.node.all_input_nodes[0]])


def unflattened(run: Interpreter, ids: Node) -> Node:
    """The table of ids that a vector of ids is."""
    flat = run.values.get(ids)
    return flat.ids if isinstance(flat, FlatIds) and flat.order == "flat" and flat.limits is None else ids


def table_of(run: Interpreter, ids: Node) -> Node:
    """The table of ids that a vector of ids is, also if it is the only column."""
    table = unflattened(run, ids)
    column = column_of(run, table)
    if column is None or column[1:] != (0, 1):
        return table
    whole = column[0]
    while op_of(whole) == "slice" and whole.args[2:3] in ((), (0,), (None,)):  # ids[:]
        before: Any = whole.args[0]
        if not all(map(same_size, whole.meta["val"].shape, before.meta["val"].shape)):
            break
        whole = run.canonical.get(before, before)
    return whole


def some_of(run: Interpreter, ids: Node | None, of: Node) -> bool:
    """Whether each of the ids is in its place among `of` too, or nobody's."""
    while ids is not None and ids is not of:
        ids = run.written.get(ids)
    return ids is of


def top_k(ids: Node) -> Any:
    """How many ids a token has: the width of a table, one of a vector."""
    val = ids.meta["val"]
    return val.shape[1] if val.dim() == 2 else 1


_SAME_IDS = (
    "aten.to.dtype",
    "aten._to_copy.default",
    "aten.clone.default",
    "aten.detach.default",
    "aten.alias.default",
)


def not_distinct(run: Interpreter, ids: Node | None) -> str | None:
    """Why a token might choose one expert twice, or None if it cannot: its ids are those of a topk."""
    if ids is None:
        return None
    source: Any = ids
    while run.written.get(source) is not None:
        source = run.written[source]
    if source.target is ids_above:
        return None
    if source in run.written and grid_of(source):
        source = source.args[0]
    if source.meta["val"].dim() == 1 or same_size(source.meta["val"].shape[-1], 1):
        return None
    while isinstance(source, Node) and source.op == "call_function" and str(source.target) in _SAME_IDS:
        if source.meta["val"].dtype not in (torch.int32, torch.int64):
            break  # a narrower type may make two ids one
        source = source.args[0]
    if source in run.facts.distinct_ids:
        return None
    if op_of(source) == "getitem" and source.args[1] == 1 and str(source.args[0].target) == "aten.topk.default":
        dims = source.args[0].args[2:3] or (source.args[0].kwargs.get("dim", -1),)
        if dims[0] in (-1, source.meta["val"].dim() - 1):
            return None
    return f"the ids ({ids.name}) are not shown to be distinct, as those of topk are"
