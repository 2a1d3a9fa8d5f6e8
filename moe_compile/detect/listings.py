"""Rules for the list of all gates that are not zero, sorted by expert, as a dispatcher makes it.

    by_column, orders = torch.nonzero(gates).sort(0)               # [N, 2], each column on its own
    token   = torch.nonzero(gates)[orders[:, 1], 0]                # of each row, sorted by expert
    sizes   = (gates > 0).sum(0).tolist()
    weight  = gates[token].gather(1, by_column[:, 1:])

Such a list has a row for each id of `region.ids_above` but those that are nobody, who come last in sorted order and add
nothing.  So its rows are those of all pairs, sorted by those ids.
"""

from typing import Any

import torch
from torch.fx import Node

from moe_compile.detect.dense_values import Spread
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.nodes import op_of
from moe_compile.detect.selection import everyone
from moe_compile.detect.shapes import same_size
from moe_compile.detect.sorted_values import Counts, Listing, TokenOf
from moe_compile.detect.tables import ids_of_gates
from moe_compile.detect.values import Member, Rows, RowTuple, Value
from moe_compile.region import Leaf, ids_above

aten = torch.ops.aten

NOT_NEGATIVE = ("softmax", "_softmax", "sigmoid", "exp", "relu", "abs", "square", "softplus")
SAME_SIGN = "to _to_copy clone contiguous detach alias select slice view reshape gather squeeze sum".split()


def nonzero(call: Call) -> Value | None:
    table = call.arg(0)
    if not isinstance(table, Spread) or table.dims != (0, "e") or table.fill != 0:
        return None
    ids = ids_of_gates(call, table, None)
    return Listing(ids, "pairs") if ids is not None else None


def sort(call: Call) -> Value | None:
    """nonzero(gates).sort(0): each column on its own."""
    value = call.arg(0)
    if not isinstance(value, Listing) or value.what != "pairs" or str(call.node.target) != "aten.sort.default":
        return None
    if call.number(1, "dim", -1) not in (0, -2) or call.number(2, "descending", False) is not False:
        return None
    return RowTuple((Listing(value.ids, "columns", call.node), Listing(value.ids, "orders", call.node)))


def column(call: Call) -> Value | None:
    """pairs[:, 0], columns[:, 1], orders[:, 1]."""
    value = call.arg(0)
    if not isinstance(value, Listing) or call.number(1, "dim", 0) not in (1, -1):
        return None
    return _column(value, call.number(2, "index"))


def columns(call: Call) -> Value | None:
    """columns.split(1, 1), columns.chunk(2, 1), columns.unbind(1), columns[:, 1:]."""
    value = call.arg(0)
    if not isinstance(value, Listing) or value.what != "columns":
        return None
    if call.op == "slice":
        whole = call.number(1, "dim", 0) == 1 and call.number(2) == 1 and call.number(4, "step", 1) == 1
        return _column(value, 1) if whole and call.val().shape[1] == 1 else None
    size, dim = (1, call.number(1, "dim", 0)) if call.op == "unbind" else (call.number(1), call.number(2, "dim", 0))
    if dim not in (1, -1) or size != (2 if call.op == "chunk" else 1):
        return None
    return RowTuple(tuple(_column(value, i) or value for i in (0, 1)))


def _column(value: Listing, i: Any) -> Value | None:
    named = {("pairs", 0): "tokens", ("columns", 1): "experts", ("orders", 1): "order"}
    what = named.get((value.what, i)) if type(i) is int else None
    return Listing(value.ids, what, value.order) if what else None


def flat(call: Call) -> Value | None:
    """A vector is flat."""
    value = call.arg(0)
    if isinstance(value, Listing) and value.what != "experts" and call.val().shape == call.val(_first(call)).shape:
        return value
    vector = isinstance(value, TokenOf) and value.ids.target is ids_above and call.val().dim() == 1
    return value if vector else None


def _first(call: Call) -> Node:
    return call.node.all_input_nodes[0]


def token_of(call: Call) -> Value | None:
    """tokens[order]."""
    value, index = call.arg(0), call.arg(1)
    if not isinstance(value, Listing) or value.what != "tokens" or len(index) != 1 or not isinstance(index[0], Listing):
        return None
    order = index[0]
    return TokenOf(value.ids, order.order) if order.what == "order" and order.ids is value.ids else None


def gate(call: Call) -> Value | None:
    """gates[token].gather(1, expert): the gate of each row."""
    rows, expert = call.arg(0), call.arg(2)
    if not isinstance(rows, Rows) or not isinstance(expert, Listing) or call.number(1) not in (1, -1):
        return None
    if expert.what != "experts" or rows.selection != everyone(expert.ids, expert.order) or rows.dim or call.kwargs:
        return None
    leaf, val = rows.expr, call.val()
    if not isinstance(leaf, Leaf) or leaf.role != "token" or leaf.node is not expert.ids.args[0] or val.dim() != 2:
        return None  # of another table
    number = call.run.table.leaf("column", leaf.node, val.select(1, 0))
    return Rows(rows.selection, call.run.expr(call, aten.unsqueeze.default, [number, 1]))


def sizes(call: Call) -> Value | None:
    """(gates > 0).sum(0), of gates that are not negative: how many each expert gets."""
    value, dims = call.arg(0), call.number(1, "dim")
    if not isinstance(value, Member) or value.ids.target is not ids_above or value.dims != (0, "e"):
        return None
    if value.kind != "any" or dims not in (0, [0], -2, [-2]) or call.number(2, "keepdim", False):
        return None
    table, bound, top_k = value.ids.args
    ids = value.ids
    if bound is not None:
        if bound != 0 or not not_negative(table):
            return None
        ids = call.run.write_ids(table, ids_above, (table, None, top_k), ids.meta["val"], None)  # type: ignore[arg-type]
    return Counts(ids, table.meta["val"].shape[1]) if call.val().dtype == torch.int64 else None  # type: ignore[union-attr]


def not_negative(table: Any) -> bool:
    """Whether what was scattered into zeros is shown to be 0 or more, or not a number."""
    while isinstance(table, Node) and op_of(table) in ("to", "_to_copy"):
        table = table.args[0]
    if not isinstance(table, Node) or op_of(table) not in ("scatter", "scatter_"):
        return False
    return _not_negative(table.args[3])


def _not_negative(arg: Any) -> bool:
    """Of a value; NaN is neither."""
    if type(arg) in (int, float):
        return bool(arg >= 0)
    if not isinstance(arg, Node) or arg.op != "call_function":
        return False
    op = op_of(arg)
    if op in NOT_NEGATIVE:
        return True
    if op == "getitem" and arg.args[1] == 0 and op_of(arg.args[0]) == "topk":  # type: ignore[arg-type]
        return _not_negative(arg.args[0].args[0])  # type: ignore[union-attr]
    if op in SAME_SIGN:
        return _not_negative(arg.args[0])
    return op in ("mul", "div", "add") and not arg.kwargs and all(map(_not_negative, arg.args))


def stays(call: Call) -> Value | None:
    """rows.squeeze(1) of rows that are wider."""
    value, dim = call.arg(0), call.number(1)
    if not isinstance(value, Rows) or value.dim or type(dim) is not int:
        return None
    size = call.val(_first(call)).shape[dim]
    return value if isinstance(size, int) and size != 1 and same_size(size, call.val().shape[dim]) else None


RULES: dict[str, tuple[Rule, ...]] = {
    **{op: (nonzero,) for op in ("nonzero",)},
    "sort": (sort,),
    "select": (column,),
    **{op: (columns,) for op in ("split", "chunk", "unbind", "slice")},
    **{op: (flat,) for op in ("flatten", "view", "reshape")},
    "index": (token_of,),
    "gather": (gate,),
    "sum": (sizes,),
    "squeeze": (stays,),
}
