"""Rules for who is chosen: masks over (token, k, expert), their reductions, nonzero, and gathers by them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moe_compile.detect.by_column import column_of
from moe_compile.detect.grids import GRID, as_table, folded, grid_of, in_grid
from moe_compile.detect.interpreter import Call, Interpreter, Rule, op_of
from moe_compile.detect.values import (
    Buffer,
    Column,
    Constant,
    DenseWeight,
    Each,
    Emptiness,
    Expert,
    FlatIds,
    Hits,
    Index,
    MaskedWeights,
    Member,
    Plain,
    Repeated,
    Rows,
    RowTuple,
    Selection,
    Slice,
    Sorted,
    TokenOf,
    Unknown,
    Value,
    Visit,
)
from moe_compile.region import ids_above
from moe_compile.series import series_of

ZEROS = ("aten.zeros.default", "aten.new_zeros.default", "aten.zeros_like.default")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


# -- making masks ---------------------------------------------------------------------------


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


def one_hot(call: Call) -> Value | None:
    source: Any = call.node.args[0]
    argument = source in call.run.facts.tables  # zeros and ones, but here they are ids (NLLB's masks)
    ids = ids_node(Plain(source) if argument else flat_as_ids(call))
    classes = call.number(1, "num_classes", -1)
    if ids is None or not isinstance(classes, int) or classes < 1:
        return None
    if (dtype := call.val(source).dtype) != torch.int64:
        return Unknown(f"one_hot of {dtype} is an error: it takes int64")
    dims = tuple(range(call.val(ids).dim()))
    return Member(ids, (*dims, "e"), None, classes)


def chosen(call: Call) -> Value | None:
    """Of each expert whether somebody chose it: torch.unique(ids), whose ids are known to be those of experts."""
    ids = ids_node(flat_as_ids(call))
    return None if ids is None else Member(ids, ("e",), None, call.number(1), "any")


def equal(call: Call) -> Value | None:
    left, right = call.arg(0), call.arg(1)
    number = call.number(1)
    if number is None and isinstance(left, Constant):
        left, right, number = right, left, call.number(0)
    left = flat_as_ids(call) if isinstance(left, FlatIds) else left
    if isinstance(left, Member | Emptiness):
        return _compare(left, {0: "none", 1: "mask"}.get(number)) if type(number) in (int, bool) else None
    if isinstance(left, Visit):
        left, right = right, left
    if isinstance(right, Visit):
        number = number_in(right)
    if isinstance(number, bool) or not isinstance(number, Expert):
        return None
    if (table := ids_in_grid(call, left)) is not None:
        return Member(table, (*GRID, 1), number, None)
    left, ones = ids_in_column(call, left)
    if (ids := ids_node(left)) is None:
        return None
    if (turned := transposed(call.run, ids)) is not None:
        return Member(turned, (1, 0), number, None)
    return Member(ids, (*range(call.val(ids).dim()), *["one"] * ones), number, None)


def positive(call: Call) -> Value | None:
    """mask > 0, != 0, .bool(), and the same of a count."""
    value = call.arg(0)
    if not isinstance(value, Member | Emptiness):
        return None
    op, number = call.op, call.number(1)
    if (op in ("gt", "greater", "ne", "not_equal") and number == 0) or (op in ("ge", "greater_equal") and number == 1):
        return _compare(value, "any")
    if (op in ("lt", "less") and number == 1) or (op in ("le", "less_equal") and number == 0):
        return _compare(value, "none")
    return None


def _compare(value: Member | Emptiness, wanted: str | None) -> Value | None:
    """The mask or count turned into a truth: `wanted` is "any" (nonzero), "none" (zero) or "mask" (one)."""
    if value.kind == "mask" and wanted in ("any", "mask"):
        return value
    numbers = ("count", "tokens")
    if (value.kind in (*numbers, "any") and wanted == "any") or (value.kind in numbers and wanted == "none"):
        return _with(value, kind=wanted)
    return None


def cast(call: Call) -> Value | None:
    """A change of dtype keeps a mask a mask."""
    value = call.arg(0)
    if isinstance(value, Visit):
        return visit(call) if call.val().dtype == torch.int64 else None
    if not isinstance(value, Member | Emptiness):
        return None
    to_bool = isinstance(call.val(), Tensor) and call.val().dtype == torch.bool
    return _compare(value, "any") if to_bool and value.kind == "count" else value


def negate(call: Call) -> Value | None:
    value = call.arg(0)
    flip = {"any": "none", "none": "any"}
    if isinstance(value, Member | Emptiness) and value.kind in flip and call.val().dtype == torch.bool:
        return _with(value, kind=flip[value.kind])
    return None


# -- shaping and reducing masks -------------------------------------------------------------


def reorder(call: Call) -> Value | None:
    value = call.arg(0)
    if not isinstance(value, Member):
        return None
    rank = len(value.dims)
    if call.op == "permute":
        order = [d % rank for d in call.arg(1)]
    else:
        order = list(range(rank))
        a, b = (0, 1) if call.op == "t" else (call.number(1) % rank, call.number(2) % rank)
        if rank == 2 or call.op != "t":
            order[a], order[b] = order[b], order[a]
    return _with(value, dims=tuple(value.dims[d] for d in order))


def take(call: Call) -> Value | None:
    """mask[e], table[:, e], weights[e], rows of a nonzero table."""
    value, dim, index = call.arg(0), call.number(1, "dim", 0), call.number(2)
    if isinstance(value, Visit):
        return value if dim == index == 0 and call.val().dim() == 0 else None
    if isinstance(call.arg(2), Visit):
        index = number_in(call.arg(2), call.val(call.node.args[0]).shape[dim])
    if isinstance(value, Index) and isinstance(value.dim, tuple) and dim in (1, -1) and isinstance(index, int):
        return Index(value.selection, value.dim[index])
    if not isinstance(index, Expert):
        return None
    inside = isinstance(index, Each) or index >= 0
    if isinstance(value, Member):
        name = value.dims[dim]
        if name == "e" and inside:
            rest = tuple(d for i, d in enumerate(value.dims) if i != dim % len(value.dims))
            return _with(value, dims=rest, expert=index)
        return None
    if isinstance(value, Plain) and inside:
        val = call.val(value.node)
        if isinstance(val, Tensor) and val.dim() == 2 and dim in (1, -1) and val.is_floating_point():
            return None if same_size(val.shape[1], 1) else Column(value.node, index)
        if isinstance(val, Tensor) and dim == 0 and isinstance(val.shape[0], int):
            return Slice(index, call.run.table.leaf("slice", value.node, call.val()))
    return None


def index_mask(call: Call) -> Value | None:
    """mask[e] with the expert's number in a tensor: [1, ...] or without the first dimension."""
    value, indices = call.arg(0), call.arg(1)
    if len(indices) != 1:
        return None
    if isinstance(indices[0], Visit):
        number: Any = number_in(indices[0], call.val(call.node.args[0]).shape[0])
    elif isinstance(indices[0], Constant) and indices[0].number.numel() == 1:
        number = int(indices[0].number.item())
    else:
        return None
    if number is None:
        return None
    position: Any = call.node.args[1]
    lead: tuple[Any, ...] = ("one",) * call.val(position[0]).dim()
    if isinstance(value, Member) and value.dims[0] == "e" and len(lead) <= 1:
        return _with(value, dims=(*lead, *value.dims[1:]), expert=number)
    if isinstance(value, Plain) and not lead and isinstance(call.val(value.node).shape[0], int):
        return Slice(number, call.run.table.leaf("slice", value.node, call.val()))
    return None


def number_in(visit: Visit, size: Any = None) -> Each | None:
    """The experts of a visit, if all of them are in a dimension of that size."""
    fits = size is None or (isinstance(size, int) and max(visit.each.numbers) < size)
    return visit.each if fits and visit.offset == 0 else None


def visit(call: Call) -> Value | None:
    """The index of a visit: as a size, as a number, as a tensor."""
    value = call.arg(1) if call.op == "visit" else call.arg(0)
    if not isinstance(value, Visit):
        return None
    if call.op == "python::sub":
        return Visit(value.each, value.offset - call.args[1]) if isinstance(call.args[1], int) else None
    if call.op in ("visit", "visited", "sym_size"):
        return value
    return value if call.val().numel() == 1 and call.val().dtype == torch.int64 else None


def pick(call: Call) -> Value | None:
    """Of a list of modules the tensor of the visit's own."""
    series, chosen = series_of(call.node.args[0]), call.arg(1)
    number = number_in(chosen, len(series)) if series is not None and isinstance(chosen, Visit) else None
    if number is None or not isinstance(call.arg(0), Plain):
        return None
    return Slice(number, call.run.table.leaf("picked", call.node, call.val()))


def squeeze(call: Call) -> Value | None:
    value = call.arg(0)
    if isinstance(value, Visit):
        return visit(call)
    if isinstance(value, Member) and call.op == "squeeze":
        dims = [call.number(1)] if len(call.args) > 1 and call.number(1) is not None else []
        dims = dims[0] if dims and isinstance(dims[0], list) else dims
        drop = {d % len(value.dims) for d in dims}
        sizes = call.val(call.node.args[0]).shape
        drop = {d for d in drop if not (isinstance(sizes[d], int) and sizes[d] != 1)}  # nothing happens to those
        if dims and not drop:
            return value
        if drop and value.kind in ("mask", "any") and all(value.dims[d] == 1 and same_size(sizes[d], 1) for d in drop):
            rest = tuple(n for n in value.dims if n != 1)
            return _with(value, dims=rest, kind="any") if rest else None
        if drop and all(value.dims[d] == "one" for d in drop):
            return _with(value, dims=tuple(n for i, n in enumerate(value.dims) if i not in drop))
    if isinstance(value, Index) and isinstance(value.dim, tuple) and len(value.dim) == 1:
        return Index(value.selection, value.dim[0]) if call.val().dim() == 1 else None
    return value if isinstance(value, Hits) and call.val().dim() == 1 else None


def unsqueeze(call: Call) -> Value | None:
    """mask[:, None], mask.view(-1, 1, 1)."""
    value, val = call.arg(0), call.val()
    if not isinstance(value, Member):
        return None
    if call.op == "unsqueeze":
        at = call.number(1) % val.dim()
        return _with(value, dims=(*value.dims[:at], "one", *value.dims[at:]))
    more = val.dim() - len(value.dims)
    before = call.val(call.node.args[0]).shape
    if more == -1 and in_grid(value.dims):  # mask.view(-1), mask.view(-1, K)
        rest = call.val(call.node.args[0]).shape[2:]
        return _with(value, dims=folded(value.dims)) if all(map(same_size, val.shape[1:], rest)) else None
    same = more > 0 and all(map(same_size, val.shape, before)) and all(map(same_size, val.shape[-more:], [1] * more))
    return _with(value, dims=(*value.dims, *["one"] * more)) if same else None


def reduce(call: Call) -> Value | None:
    value = call.arg(0)
    if isinstance(value, MaskedWeights) and call.op == "sum":
        dims, rank = call.number(1, "dim"), call.val(call.node.args[0]).dim()
        dims = dims if isinstance(dims, list) else [dims]
        keep = call.number(2, "keepdim", False)
        if [d % rank for d in dims if d is not None] == [rank - 1] and not value.summed:
            if keep:
                if not isinstance(value.expert, int) or rank != 2:
                    return None
                return DenseWeight(value.ids, value.expert, value.classes, "pair", value.weights)
            return MaskedWeights(value.weights, value.ids, value.expert, value.classes, summed=True)
        return None
    if not isinstance(value, Member) or value.kind not in ("mask", "count", "any"):
        return None
    keep = call.number(2, "keepdim", False)
    rank, dims = len(value.dims), call.number(1, "dim")
    dims = list(range(rank)) if dims in (None, []) else dims if isinstance(dims, list) else [dims]
    gone = {d % rank for d in dims}
    if any(value.dims[d] == "e" for d in gone):
        return None
    if (value.kind == "any" and call.op == "sum") or (value.kind == "count" and call.op == "any"):
        kind = "any" if call.op == "any" else "tokens"
    else:
        kind = "count" if call.op in ("sum", "count_nonzero") else "any"
    if kind == "tokens" and len(gone) < rank:
        return None
    rest = tuple(d for i, d in enumerate(value.dims) if i not in gone)
    if keep:
        if not rest or "one" in rest or kind == "tokens":
            return None
        return _with(value, dims=tuple("one" if i in gone else d for i, d in enumerate(value.dims)), kind=kind)
    if not rest and value.expert is not None:
        return Emptiness(value.ids, value.expert, kind)
    return _with(value, dims=rest, kind=kind)


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


def columns(call: Call) -> Value | None:
    """unbind(1) of a nonzero table: its index vectors, in the order of the mask's dimensions; masks of all experts."""
    value, dim = call.arg(0), call.number(1, "dim", 0)
    if isinstance(value, Member) and value.dims[dim] == "e" and value.expert is None:
        rest = tuple(d for i, d in enumerate(value.dims) if i != dim % len(value.dims))
        experts = range(call.val(call.node.args[0]).shape[dim])
        return RowTuple(tuple(_with(value, dims=rest, expert=e) for e in experts))
    if not (isinstance(value, Index) and isinstance(value.dim, tuple) and dim in (1, -1)):
        return None
    return RowTuple(tuple(Index(value.selection, d) for d in value.dim))


def item(call: Call) -> Value | None:
    value = call.arg(0)
    return value.items[call.args[1]] if isinstance(value, RowTuple) and isinstance(call.args[1], int) else None


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


def one_weight_a_token(call: Call, value: Value, selection: Selection, val: Any) -> Rows | Unknown | None:
    """weights * (ids == e) summed over k, or column e of a [T, E] table, read at the tokens of expert e."""
    table = call.run.table
    if isinstance(value, MaskedWeights) and value.summed:
        if value.expert != selection.expert or not some_of(call.run, selection.ids, value.ids):
            return Unknown(f"weights of expert {value.expert} are read for the rows of expert {selection.expert}")
        if selection.per == "pair" and (repeated := not_distinct(call.run, selection.ids)):
            return Unknown(f"weights summed over a token's experts are read for each of them: {repeated}")
        return Rows(selection, table.leaf("pair", value.weights, val))
    if isinstance(value, Column):
        if _of_own_column(call, value, selection):
            return None  # an entry of a token, like any
        if value.expert != selection.expert:
            return Unknown(f"column {value.expert} of the weights is read for the rows of expert {selection.expert}")
        return misfit(call.run, selection, value.table, 1) or Rows(selection, table.leaf("column", value.table, val))
    return None


def _of_own_column(call: Call, value: Column, selection: Selection) -> bool:
    """Whether table[:, k] is read by the ids' column k, of as many."""
    column = column_of(call.run, selection.ids) if selection.ids is not None else None
    return column is not None and column[1:] == (value.expert, call.val(value.table).shape[1])


def some_of(run: Interpreter, ids: Node | None, of: Node) -> bool:
    """Whether each of the ids is in its place among `of` too, or nobody's."""
    while ids is not None and ids is not of:
        ids = run.written.get(ids)
    return ids is of


def same_size(a: Any, b: Any) -> bool:
    """Equal sizes, shown without a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return statically_known_true(a == b)


def equal_sizes(run: Interpreter, mine: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Equal sizes, shown or guarded."""
    if all(map(same_size, mine, theirs)):
        return True
    return run.facts.may_guard and all(a == b for a, b in zip(mine, theirs, strict=True))  # now guards of the trace


def misfit(run: Interpreter, selection: Selection, node: Node, dims: int) -> Unknown | None:
    """A tensor that is read or written by tokens (and k) must have the ids' first `dims` dimensions."""
    assert selection.ids is not None
    mine, theirs = node.meta["val"].shape, selection.ids.meta["val"].shape
    if len(mine) >= dims and equal_sizes(run, mine[:dims], theirs[:dims]):
        return None
    return Unknown(f"{node.name} is {tuple(mine)}, the expert ids are {tuple(theirs)}")


def top_k(ids: Node) -> Any:
    val = ids.meta["val"]
    return val.shape[1] if val.dim() == 2 else 1


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


def whole(call: Call) -> Value | None:
    """hits[:], mask[:], token[:] of `token[:, None]`, table[:] of `table[:, 0]`: all, from its start to its end."""
    value, (dim, *bounds) = call.arg(0), [call.number(i, name, d) for i, name, d in _BOUNDS]
    if bounds not in ([0, _END, 1], [None, None, 1]):
        return None
    return value if isinstance(value, Member) or (isinstance(value, Hits | Index) and dim == 0) else None


_END = 2**63 - 1
_BOUNDS = ((1, "dim", 0), (2, "start", None), (3, "end", None), (4, "step", 1))


def masked_weights(call: Call) -> Value | None:
    """weights * (ids == e) or where(ids == e, weights, 0), before its sum over k."""
    if call.op == "where":
        other = call.arg(2, "other")
        nothing = (isinstance(other, Buffer) and other.kind == "zero") or call.number(2, "other") == 0
        pair = isinstance(call.arg(1), Plain) and call.val().dtype == call.val(call.arg(1).node).dtype
        if len(call.args) != 3 or not nothing or not pair or not isinstance(call.arg(0), Member):
            return None
        orders: tuple[tuple[Any, Any], ...] = ((call.arg(0), call.arg(1)),)
    else:
        orders = ((call.arg(0), call.arg(1)), (call.arg(1), call.arg(0)))
    for mask, weights in orders:
        if isinstance(mask, Member) and mask.kind == "mask" and mask.dims == (0, 1) and mask.expert is not None:
            if isinstance(weights, Plain) and call.val(weights.node).shape == call.val(mask.ids).shape:
                return MaskedWeights(weights.node, mask.ids, mask.expert, mask.classes)
        of_grid = isinstance(mask, Member) and mask.kind == "mask" and mask.dims == (*GRID, 1)
        if of_grid and mask.expert is not None and isinstance(weights, Plain):
            source: Any = mask.ids.args[0]
            if call.val(weights.node).shape == source.meta["val"].shape == call.val().shape:
                return MaskedWeights(as_table(call.run, weights.node), mask.ids, mask.expert, mask.classes)
    return None


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


def _with(value: Any, **changes: Any) -> Any:
    return type(value)(**{**{f: getattr(value, f) for f in value.__dataclass_fields__}, **changes})


RULES: dict[str, tuple[Rule, ...]] = {
    "one_hot": (one_hot,),
    "eq": (equal,),
    "chosen": (chosen,),
    **{
        op: (positive,)
        for op in ("gt", "greater", "ne", "not_equal", "ge", "greater_equal", "lt", "less", "le", "less_equal")
    },
    **{op: (visit,) for op in ("visit", "visited", "sym_size", "python::sub", "detach")},
    **{op: (cast,) for op in ("to", "_to_copy", "bool", "long", "int", "contiguous", "clone")},
    **{op: (negate,) for op in ("logical_not", "bitwise_not")},
    **{op: (reorder,) for op in ("permute", "transpose", "t")},
    "select": (take,),
    "slice": (whole,),
    "unsqueeze": (unsqueeze,),
    **{op: (squeeze, unsqueeze) for op in ("view", "reshape")},
    "squeeze": (squeeze,),
    "flatten": (squeeze, unsqueeze),
    **{op: (reduce,) for op in ("sum", "any", "count_nonzero")},
    **{op: (nonzero,) for op in ("nonzero", "nonzero_numpy")},
    "where": (nonzero, masked_weights),
    "unbind": (columns,),
    "getitem": (item,),
    "index": (index_mask, gather_rows),
    "index_select": (gather_rows,),
    "pick": (pick,),
    "mul": (masked_weights,),
}
