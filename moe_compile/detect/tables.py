"""Rules for tables of zeros and ones [T, E] or [T, K, E] that say who is chosen, where no ids do.

mask = one_hot(ids, E) * (position <= capacity)    # those who came too late chose nobody
mask = (ids == e) & (weights > c)                  # those who are not sure enough

A row of such a table has one entry at most for each of its ids, so it has ids of its own, with -1 for nobody:
`region.ids_kept`, `region.ids_where`, or `region.ids_in` if the table came from outside.  A table of gates that was
scattered into zeros has `region.ids_above`.  They become nodes of the graph, so that rules, surveys and passes see ids
as ever, and go again if no region needs them.
"""

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from moe_compile.detect.dense_values import Dense, DenseWeight, Spread
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.marks import Marks
from moe_compile.detect.nodes import op_of
from moe_compile.detect.routing_weights import one_weight_a_token
from moe_compile.detect.selection import index_vectors
from moe_compile.detect.shapes import equal_sizes
from moe_compile.detect.values import Column, Constant, Index, Member, Plain, Rows, Selection, Value
from moe_compile.region import ids_above, ids_by_sizes, ids_in, ids_kept, ids_stacked, ids_where
from moe_compile.rewrite import emit

aten = torch.ops.aten

SAME_TRUTH = frozenset(
    """
    to _to_copy bool long int float half type_as clone contiguous detach alias unsqueeze view reshape expand t
    transpose permute select slice
""".split()
)


def table(call: Call) -> Value | None:
    """An argument that the caller has shown to be a table (`Facts.tables`)."""
    val = call.val()
    if not isinstance(val, Tensor) or val.dim() not in (2, 3) or not isinstance(val.shape[-1], int):
        return None
    ids = call.run.write_ids(call.node, ids_in, (call.node,), val.new_empty(val.shape[:-1], dtype=torch.int64), None)
    return Member(ids, (*range(val.dim() - 1), "e"), None, None)


def keep(call: Call) -> Value | None:
    """mask * truths, mask & truths: those of the chosen experts for which it is true."""
    for i in (0, 1):
        mask, other, node = call.arg(i), call.arg(1 - i), call.node.args[1 - i]
        if not isinstance(mask, Member) or not isinstance(node, Node) or (i and _in_place(call)):
            continue
        ids, out = mask.ids, call.val()
        rank = ids.meta["val"].dim()
        turned = mask.kind == "mask" and mask.dims == (1, 0, "e")
        whole = turned or (mask.kind == "mask" and mask.dims == (*range(rank), "e"))
        by_token = mask.kind in ("count", "any") and mask.dims == (0, "e") and rank == 2
        kind = mask.kind
        if kind == "count" and "mul" not in call.op:  # 2 & 1 is nothing
            if "logical_and" not in call.op:
                continue
            kind = "any"
        before = call.val(call.node.args[i])
        if not (whole or by_token) or mask.expert is not None or not _is_truth(call, other, node):
            continue
        if not call.run.unchanged(ids):  # they are read here once more
            continue
        if out.dim() != before.dim() or not equal_sizes(call.run, out.shape, before.shape):
            return None
        entries = call.node
        if turned:
            entries = call.run.write_ids(
                call.node, aten.permute.default, (call.node, [1, 0, 2]), out.permute(1, 0, 2), None
            )
        kept = call.run.write_ids(entries, ids_kept, (ids, entries), ids.meta["val"], ids)
        return Member(kept, mask.dims, None, None, kind)
    return None


def keep_of_one(call: Call) -> Value | None:
    """(ids == e) & truths: of one expert's pairs, or tokens, those for which it is true.

    Truths that differ from expert to expert make other ids for each, which no sum takes.
    """
    for i in (0, 1):
        mask, other, truths = call.arg(i), call.arg(1 - i), call.node.args[1 - i]
        if not isinstance(mask, Member) or not isinstance(truths, Node) or _in_place(call):
            continue
        ids = mask.ids
        rank = ids.meta["val"].dim()
        whole = mask.kind == "mask" and mask.dims == tuple(range(rank))
        by_token = mask.kind == "any" and mask.dims == (0,) and rank == 2
        if mask.expert is None or mask.classes is not None or not (whole or by_token):
            continue
        if not _is_truth(call, other, truths):
            continue
        before, out = call.val(call.node.args[i]), call.val()
        first = call.run.canonical[truths]
        if not call.run.unchanged(ids) or not call.run.unchanged(first):
            continue
        if out.dim() != before.dim() or not equal_sizes(call.run, out.shape, before.shape):
            return None
        if call.val(truths).dim() != before.dim():
            return None  # of another rank, it is along the k
        kept = call.run.write_ids(max(ids, first), ids_where, (ids, first), ids.meta["val"], ids)
        return Member(kept, mask.dims, mask.expert, None, mask.kind)
    return None


def gates(call: Call) -> Value | None:
    """gates > 0, gates[:, e] > 0, gates != 0, gates[:, e].nonzero(), of a table that is zero but for chosen experts."""
    table, op = call.arg(0), call.op
    column = isinstance(table, DenseWeight) and table.role == "column"
    whole = isinstance(table, Spread) and table.fill == 0 and table.dims in ((0, "e"), ("e", 0))
    if not column and not whole:
        return None
    number, bound = call.number(1, "other"), None
    if op in ("gt", "greater") and type(number) in (int, float) and 0 <= number < math.inf:
        bound = float(number)
    elif op in ("to", "_to_copy", "bool"):
        if call.val().dtype != torch.bool:
            return None
    elif op in ("ne", "not_equal", "nonzero"):
        if op != "nonzero" and not (type(number) in (int, float) and number == 0):
            return None
    else:
        return None
    assert isinstance(table, Spread | DenseWeight)
    ids = ids_of_gates(call, table, bound)
    if ids is None:
        return None
    if isinstance(table, Spread):
        return Member(ids, table.dims, None, None, "any") if op != "nonzero" else None
    rank = call.val(call.node.args[0]).dim()
    if rank == 1 and op == "nonzero":
        return Index(Selection(ids, table.expert, None, "token"), (0,))
    return Member(ids, (0, *["one"] * (rank - 1)), table.expert, None, "any") if op != "nonzero" else None


def ids_of_gates(call: Call, table: Spread | DenseWeight, bound: float | None) -> Node | None:
    """The ids that a table of gates holds: entries above `bound`, or that are not zero."""
    source, chosen = table.node, call.val(table.ids)
    if bound is None and not op_of(source).startswith("scatter"):
        return None  # 0 / 0 is not zero
    top_k = chosen.shape[1] if chosen.dim() == 2 else None
    val = call.val(source)
    fits = isinstance(top_k, int) and isinstance(val.shape[1], int) and top_k <= val.shape[1]
    if not fits or not call.run.unchanged(source):
        return None
    sizes = val.new_empty(val.shape[0], top_k, dtype=torch.int64)
    return call.run.write_ids(source, ids_above, (source, bound, top_k), sizes, None)


def gates_of_rows(call: Call) -> Value | None:
    """gates[:, e:e + 1] at the tokens of expert e."""
    weight = call.arg(0)
    if not isinstance(weight, DenseWeight) or weight.role != "column" or call.val(call.node.args[0]).dim() != 2:
        return None
    picked, selection = index_vectors(call, 1 if call.op == "index" else 2)
    if not isinstance(selection, Selection) or picked != [0] or (call.op != "index" and call.number(1) != 0):
        return None
    column = Column(weight.node, weight.expert)
    rows = one_weight_a_token(call, column, selection, call.val().select(1, 0))
    if not isinstance(rows, Rows):
        return rows
    return Rows(selection, call.run.expr(call, aten.unsqueeze.default, [rows.expr, 1]))


def _in_place(call: Call) -> bool:
    return call.op.endswith("_") and not call.op.endswith("__")


def _is_truth(call: Call, value: Any, node: Node) -> bool:
    """Whether all entries are 0 or 1."""
    if isinstance(value, Member) and value.kind != "count":
        return True
    if isinstance(call.run.values[node], Marks):
        return call.run.unchanged(node)
    while isinstance(call.run.values[node], Plain | Constant | Dense) and isinstance(call.val(node), Tensor):
        if call.val(node).dtype == torch.bool:
            return True
        viewed = op_of(node) in SAME_TRUTH and node.target is not aten.view.dtype
        if not viewed or not isinstance(node.args[0], Node) or not call.run.unchanged(node):
            return False
        node = node.args[0]
    return False


# -- writing ids out ------------------------------------------------------------------------


def written_out(graph: Graph, ids: Node, like: Node) -> Node:
    """The ids as ATen ops, in the place of the node that stood for them."""
    if ids.target not in _WRITTEN:
        if ids.target is aten.reshape.default and isinstance(ids.args[0], Node):  # of groups of tokens, in one
            written_out(graph, ids.args[0], like)
        return ids
    before: Any = ids.args[0]
    if ids.target is ids_stacked:
        for one in before:
            written_out(graph, one, like)
        before = ids.args[0]
    elif ids.target in (ids_kept, ids_where):
        before = written_out(graph, before, like)
    with graph.inserting_before(ids):
        made = _WRITTEN[ids.target](graph, before, *ids.args[1:], like)
    ids.replace_all_uses_with(made)
    return made


def _in(graph: Graph, table: Node, like: Node) -> Node:
    val = table.meta["val"]
    E = val.shape[-1]
    numbers = emit(graph, aten.arange.start, 1, E + 1, like=like, val=val.new_empty(E, dtype=torch.int64))
    numbers.kwargs = {"device": val.device}
    found = emit(graph, aten.mul.Tensor, emit(graph, aten.ne.Scalar, table, 0, like=like), numbers, like=like)
    return emit(graph, aten.sub.Tensor, emit(graph, aten.sum.dim_IntList, found, [-1], like=like), 1, like=like)


def _stacked(graph: Graph, ids: Any, like: Node) -> Node:
    wide = [
        i if i.meta["val"].dtype == torch.int64 else emit(graph, aten.to.dtype, i, torch.int64, like=like) for i in ids
    ]
    return emit(graph, aten.stack.default, wide, -1, like=like)


def _by_sizes(graph: Graph, sizes: Node, rows: Node, whole: bool, like: Node) -> Node:
    val = rows.meta["val"]
    sized = sizes.meta["val"].new_empty(sizes.meta["val"].shape, dtype=torch.int64, device=val.device)
    sizes = emit(graph, aten.to.device, sizes, val.device, torch.int64, like=like, val=sized)
    while rows.meta["val"].dim() > 1:
        rows = emit(graph, aten.select.int, rows, 1, 0, like=like)
    ones = emit(graph, aten.full_like.default, rows, 1, like=like, val=val.new_empty(val.shape[:1], dtype=torch.int64))
    ones.kwargs = {"dtype": torch.int64}
    ends = emit(graph, aten.cumsum.default, sizes, 0, like=like)
    at = emit(graph, aten.sub.Tensor, emit(graph, aten.cumsum.default, ones, 0, like=like), 1, like=like)
    ids = emit(graph, aten.searchsorted.Tensor, ends, at, like=like, val=at.meta["val"])
    ids.kwargs = {"right": True}
    if not whole:
        return ids
    total = emit(graph, aten.sum.default, ones, like=like)
    fits = emit(graph, aten.eq.Tensor, emit(graph, aten.sum.default, sizes, like=like), total, like=like)
    known = emit(graph, aten.all.default, emit(graph, aten.ge.Scalar, sizes, 0, like=like), like=like)
    fits = emit(graph, aten.logical_and.default, fits, known, like=like)
    return emit(graph, aten.where.ScalarOther, fits, ids, -1, like=like)


def _kept(graph: Graph, ids: Node, table: Any, like: Node) -> Node:
    inside = emit(graph, aten.clamp.default, ids, 0, like=like)
    if inside.meta["val"].dtype != torch.int64:
        inside = emit(graph, aten.to.dtype, inside, torch.int64, like=like)
    if table.meta["val"].dim() > ids.meta["val"].dim():
        inside = emit(graph, aten.unsqueeze.default, inside, -1, like=like)
    kept = emit(graph, aten.gather.default, table, -1, inside, like=like)
    if kept.meta["val"].dim() > ids.meta["val"].dim():
        kept = emit(graph, aten.squeeze.dim, kept, -1, like=like)
    kept = emit(graph, aten.ne.Scalar, kept, 0, like=like)
    kept = emit(graph, aten.logical_and.default, emit(graph, aten.ge.Scalar, ids, 0, like=like), kept, like=like)
    return emit(graph, aten.where.ScalarOther, kept, ids, -1, like=like)


def _where(graph: Graph, ids: Node, truths: Any, like: Node) -> Node:
    if ids.meta["val"].dtype == torch.uint8:  # has no -1
        ids = emit(graph, aten.to.dtype, ids, torch.int64, like=like)
    if truths.meta["val"].dtype != torch.bool:
        truths = emit(graph, aten.ne.Scalar, truths, 0, like=like)
    if truths.meta["val"].dim() < ids.meta["val"].dim():
        truths = emit(graph, aten.unsqueeze.default, truths, -1, like=like)
    return emit(graph, aten.where.ScalarOther, truths, ids, -1, like=like)


def _above(graph: Graph, table: Node, bound: float | None, top_k: int, like: Node) -> Node:
    val = table.meta["val"]
    E = val.shape[-1]
    found = (aten.ne.Scalar, table, 0) if bound is None else (aten.gt.Scalar, table, bound)
    truths = emit(graph, *found, like=like)
    numbers = emit(graph, aten.arange.start_step, E, 0, -1, like=like, val=val.new_empty(E, dtype=torch.int64))
    numbers.kwargs = {"device": val.device}
    numbers = emit(graph, aten.where.ScalarOther, truths, numbers, 0, like=like)
    top = emit(graph, operator.getitem, emit(graph, aten.topk.default, numbers, top_k, like=like), 0, like=like)
    ids = emit(graph, aten.rsub.Scalar, top, E, like=like)
    return emit(graph, aten.where.ScalarOther, emit(graph, aten.gt.Scalar, top, 0, like=like), ids, -1, like=like)


_WRITTEN: dict[Any, Any] = {
    ids_above: _above,
    ids_by_sizes: _by_sizes,
    ids_in: _in,
    ids_kept: _kept,
    ids_where: _where,
    ids_stacked: _stacked,
}
_PRODUCTS = ("mul", "mul_", "__and__", "bitwise_and", "bitwise_and_", "logical_and", "logical_and_")
RULES: dict[str, tuple[Rule, ...]] = {
    "table": (table,),
    **{op: (gates,) for op in ("gt", "greater", "ne", "not_equal", "nonzero", "to", "_to_copy", "bool")},
    **{op: (gates_of_rows,) for op in ("index", "index_select")},
    **{op: (keep, keep_of_one) for op in _PRODUCTS},
}
