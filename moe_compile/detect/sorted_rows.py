"""Rules for rows of all experts at once: in flat pair order (t*K + k), or sorted by expert.

Covers the grouped form (sort, gather, grouped GEMM over offsets, unsort) and the batched form (weights gathered by
row).
"""

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.ids import INTEGERS, ids_node, top_k
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.nodes import name_of
from moe_compile.detect.rows import one_row, result, selection_of
from moe_compile.detect.selection import everyone
from moe_compile.detect.shapes import same_size
from moe_compile.detect.sorted_values import Counts, FlatIds, Outside, PairGrid, Permutation, TokenOf
from moe_compile.detect.values import Plain, Repeated, Rows, RowTuple, Selection, Sorted, Unknown, Value
from moe_compile.region import outside_is_zero

aten = torch.ops.aten
EXACT = (*INTEGERS[:2], torch.float32, torch.float64)  # dtypes that hold ids and counts as they are


# -- the ids in flat order, and sorted ------------------------------------------------------


def flatten(call: Call) -> Value | None:
    value = call.arg(0)
    if call.op != "flatten" and call.number(1) not in ([-1], -1):
        return None
    if isinstance(value, Plain) and (ids := ids_node(value)) is not None and call.val().dim() == 1:
        return FlatIds(ids)
    return None


def convert(call: Call) -> Value | None:
    value, val = call.arg(0), call.val()
    if isinstance(value, FlatIds | Counts) and isinstance(val, Tensor):
        return value if val.dtype in EXACT else None
    return value if isinstance(value, Permutation | TokenOf) and val.dtype in INTEGERS[:2] else None


def limit(call: Call) -> Value | None:
    """ids.clamp(0, E - 1): ids outside the experts become experts."""
    value, low, high = call.arg(0), call.number(1, "min"), call.number(2, "max")
    if not isinstance(value, FlatIds):
        return None
    if call.op.startswith("clamp_max"):
        low, high = None, call.number(1, "max")
    if value.limits is not None or not all(type(n) in (int, type(None)) for n in (low, high)):
        return Unknown(f"{name_of(call.node)} maps ids outside the experts to experts")
    return FlatIds(value.ids, value.order, (low, high))


def outside(call: Call) -> Value | None:
    """ids >= E, of every pair; with one more dimension it stays what it is."""
    value, bound = call.arg(0), call.number(1)
    if isinstance(value, Outside):
        return value if call.op == "unsqueeze" and call.number(1) in (1, -1) and call.val().dim() == 2 else None
    if isinstance(value, FlatIds) and value.limits is None and type(bound) is int and call.op.startswith("g"):
        return Outside(value.ids, value.order, bound)
    return None


def blank(call: Call) -> Value | None:
    """Rows of pairs that chose nobody, set to zero: no more than a mark here, `finish` checks that zero they stay."""
    value, mask = call.arg(0), call.arg(1)
    if not (isinstance(value, Rows) and isinstance(mask, Outside)):
        return None
    if value.selection != everyone(mask.ids, mask.order) or call.number(2) != 0 or value.expr.level != "row":
        return Unknown(f"{name_of(call.node)} blanks other rows than those of ids outside the experts")
    if call.val().dim() != call.val(call.node.args[1]).dim():
        return Unknown(f"{name_of(call.node)} broadcasts rows: rows would meet rows")
    return Rows(value.selection, call.run.expr(call, outside_is_zero, [value.expr, mask.bound]))


def sort(call: Call) -> Value | None:
    value = call.arg(0)
    descends = any(a is True for a in call.args[2:]) and "stable" not in str(call.node.target)
    if descends or call.kwargs.get("descending"):
        return None
    if isinstance(value, Permutation) and call.op == "argsort" and not value.inverse:
        return Permutation(value.ids, value.order, inverse=True)
    if isinstance(value, Plain) and (ids := ids_node(value)) is not None and call.val(ids).dim() == 1:
        value = FlatIds(ids)
    if not isinstance(value, FlatIds) or value.order != "flat" or value.limits is not None:
        return None
    order = Permutation(value.ids, call.node)
    return order if call.op == "argsort" else RowTuple((FlatIds(value.ids, call.node), order))


def token_of(call: Call) -> Value | None:
    """permutation // K."""
    value, divisor = call.arg(0), call.number(1)
    if not isinstance(value, Permutation) or value.inverse or isinstance(divisor, bool):
        return None
    if call.op == "div" and call.kwargs.get("rounding_mode") not in ("floor", "trunc"):
        return None
    k = top_k(value.ids)
    if not (isinstance(divisor, int) and isinstance(k, int) and divisor == k):
        return Unknown(f"the sorted order is divided by {divisor}, not by the {k} experts of a token")
    return TokenOf(value.ids, value.order)


def count(call: Call) -> Value | None:
    """histc(ids, bins=E, min=0, max=E-1), bincount(ids, minlength=E)."""
    value = call.arg(0)
    if not isinstance(value, FlatIds) or value.limits is not None:
        return None
    if call.op == "histc":
        bins, low, high = (call.number(i, n) for i, n in ((1, "bins"), (2, "min"), (3, "max")))
        whole = isinstance(bins, int) and low == 0 and high == bins - 1
        return Counts(value.ids, bins) if whole else None
    return None


def running_sum(call: Call) -> Value | None:
    value = call.arg(0)
    exact = isinstance(call.val(), Tensor) and call.val().dtype in EXACT  # a narrow running sum would overflow
    if isinstance(value, Counts) and not value.ends and call.number(1, "dim") in (0, -1) and exact:
        return Counts(value.ids, value.num, ends=True)
    return None


def invert(call: Call) -> Value | None:
    """inverse[permutation] = arange(R)."""
    indices, source = call.arg(1), call.node.args[2]
    if not (len(indices) == 1 and isinstance(indices[0], Permutation) and isinstance(source, Node)):
        return None
    if call.number(3, "accumulate", False) or str(source.target) not in ("aten.arange.default", "aten.arange.start"):
        return None
    if (str(source.target) == "aten.arange.start" and source.args[0] != 0) or indices[0].inverse:
        return None
    sizes = [call.val(n).shape[0] for n in (call.node.args[0], source)]  # a shorter source is repeated
    if not all(same_size(size, call.val(indices[0].ids).numel()) for size in sizes) or call.val().dtype != torch.int64:
        return None
    return Permutation(indices[0].ids, indices[0].order, inverse=True)


# -- rows and weights by row ----------------------------------------------------------------


def repeat(call: Call) -> Value | None:
    """x.repeat_interleave(K, 0): the token of every pair."""
    value, times, dim = call.arg(0), call.number(1, "repeats"), call.number(2, "dim")
    if not isinstance(value, Plain) or not isinstance(times, int) or isinstance(times, bool) or dim != 0:
        return None
    if not isinstance(val := call.val(value.node), Tensor) or not val.is_floating_point():
        return None
    anyone = Selection(None, None, None, "pair", "flat", times)
    return Repeated(anyone, call.run.table.leaf("token", value.node, call.val()))


def by_row(call: Call) -> Value | None:
    """weights[flat ids], values[permutation], rows[inverse permutation]."""
    value, indices = call.arg(0), call.arg(1)
    if len(indices) != 1:
        return None
    index, run = indices[0], call.run
    if isinstance(index, FlatIds) and isinstance(value, Plain):
        first = call.val(value.node).shape[0]
        if not isinstance(first, int):
            return None
        leaf = run.table.leaf("slice", value.node, one_row(call.val()))
        run.reads.setdefault(index.ids, set()).add(index.limits or "index")
        return Rows(everyone(index.ids, index.order), leaf)
    if not isinstance(index, Permutation):
        return None
    if index.inverse:
        if isinstance(value, Rows) and value.selection == everyone(index.ids, index.order):
            return Rows(everyone(index.ids, "flat"), value.expr)
        return Unknown("the unsorting index is used on other rows than it sorted")
    sorted_rows = everyone(index.ids, index.order)
    if isinstance(value, Plain):
        return Sorted(sorted_rows, run.table.leaf("flat_pair", value.node, call.val()))
    if isinstance(value, Repeated):
        if value.selection.top_k != sorted_rows.top_k:
            times = f"{value.selection.top_k} times for {sorted_rows.top_k} experts of a token"
            return Unknown(f"{name_of(call.node)} reads tokens repeated {times}")
        return Sorted(sorted_rows, value.expr)
    if isinstance(value, FlatIds) and value.order == "flat" and value.ids is index.ids:
        return FlatIds(value.ids, index.order, value.limits)
    return None


def grouped_mm(call: Call) -> Value | None:
    """aten._grouped_mm(rows, w [E, D, F], offs): every row times the weight of its expert."""
    selection = selection_of(call)
    if selection is None or isinstance(selection, Unknown):
        return selection
    offsets = call.arg(2, "offs")
    if not (isinstance(offsets, Counts) and offsets.ends and offsets.ids is selection.ids):
        return Unknown("the offsets of the grouped product are not the ends of these rows' groups")
    if selection.order in (None, "flat"):
        return Unknown("the grouped product reads rows that are not sorted by expert")
    x, stack = call.arg(0), call.node.args[1]
    assert isinstance(stack, Node)
    if not (isinstance(x, Rows) and isinstance(call.arg(1), Plain)) or call.arg(3, "bias") is not None:
        return Unknown("the grouped product has a bias, or a weight that depends on the rows")
    weight = call.val(stack)
    if weight.dim() != 3 or weight.shape[0] != offsets.num:
        return Unknown(f"{offsets.num} groups for a weight of shape {tuple(weight.shape)}")
    leaf = call.run.table.leaf("slice", stack, weight.select(0, 0))
    call.run.reads.setdefault(offsets.ids, set()).add("number")
    return result(call, selection, call.run.expr(call, aten.matmul.default, [x.expr, leaf]))


# -- back to tokens -------------------------------------------------------------------------


def grid(call: Call) -> Value | None:
    """rows.view(T, K, ...)."""
    value = call.arg(0)
    if not isinstance(value, Rows) or value.selection.order != "flat" or value.selection.ids is None:
        return None
    before, after, k = call.val(call.node.args[0]), call.val(), value.selection.top_k
    if after.dim() != before.dim() + 1 or not all(map(same_size, after.shape[1:], (k, *before.shape[1:]))):
        return None
    return PairGrid(value.selection, value.expr)


RULES: dict[str, tuple[Rule, ...]] = {
    **{op: (flatten, grid) for op in ("view", "reshape", "_unsafe_view")},
    "flatten": (flatten,),
    **{op: (convert,) for op in ("to", "_to_copy", "int", "long", "float")},
    **{op: (sort,) for op in ("sort", "argsort")},
    **{op: (token_of,) for op in ("floor_divide", "div")},
    **{op: (count,) for op in ("histc",)},
    "cumsum": (running_sum,),
    **{op: (outside,) for op in ("ge", "greater_equal", "unsqueeze")},
    **{op: (blank,) for op in ("masked_fill", "masked_fill_")},
    **{op: (limit,) for op in ("clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_")},
    **{op: (invert,) for op in ("index_put", "index_put_")},
    "repeat_interleave": (repeat,),
    "index": (by_row,),
    **{op: (grouped_mm,) for op in ("_grouped_mm", "transformers::grouped_mm_fallback")},
}
