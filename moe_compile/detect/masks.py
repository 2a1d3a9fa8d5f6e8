"""Rules for masks over (token, k, expert): how they are made of ids, turned into truths, reshaped and reduced.

They give a `Member`, or what is left of one without dimensions, `Emptiness`; weights that were multiplied by a mask
(routing_weights.py) are summed over k here too.  What a mask selects when it is an index is for selection.py to say; an
expert's own mask is taken out of that of all in entries.py.
"""

from typing import Any

import torch
from torch import Tensor

from moe_compile.detect.dense_values import DenseWeight
from moe_compile.detect.grids import GRID, folded, in_grid
from moe_compile.detect.ids import flat_as_ids, ids_in_column, ids_in_grid, ids_node, transposed
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.shapes import same_size
from moe_compile.detect.sorted_values import FlatIds
from moe_compile.detect.values import (
    Constant,
    Emptiness,
    Expert,
    Hits,
    Index,
    MaskedWeights,
    Member,
    Plain,
    Unknown,
    Value,
    Visit,
)
from moe_compile.detect.visit_index import number_in, visit

# -- making masks ---------------------------------------------------------------------------


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
        return with_fields(value, kind=wanted)
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
        return with_fields(value, kind=flip[value.kind])
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
    return with_fields(value, dims=tuple(value.dims[d] for d in order))


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
            return with_fields(value, dims=rest, kind="any") if rest else None
        if drop and all(value.dims[d] == "one" for d in drop):
            return with_fields(value, dims=tuple(n for i, n in enumerate(value.dims) if i not in drop))
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
        return with_fields(value, dims=(*value.dims[:at], "one", *value.dims[at:]))
    more = val.dim() - len(value.dims)
    before = call.val(call.node.args[0]).shape
    if more == -1 and in_grid(value.dims):  # mask.view(-1), mask.view(-1, K)
        rest = call.val(call.node.args[0]).shape[2:]
        return with_fields(value, dims=folded(value.dims)) if all(map(same_size, val.shape[1:], rest)) else None
    same = more > 0 and all(map(same_size, val.shape, before)) and all(map(same_size, val.shape[-more:], [1] * more))
    return with_fields(value, dims=(*value.dims, *["one"] * more)) if same else None


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
        return with_fields(value, dims=tuple("one" if i in gone else d for i, d in enumerate(value.dims)), kind=kind)
    if not rest and value.expert is not None:
        return Emptiness(value.ids, value.expert, kind)
    return with_fields(value, dims=rest, kind=kind)


def with_fields(value: Any, **changes: Any) -> Any:
    """The same value with other fields; what it was is not changed."""
    return type(value)(**{**{f: getattr(value, f) for f in value.__dataclass_fields__}, **changes})


RULES: dict[str, tuple[Rule, ...]] = {
    "one_hot": (one_hot,),
    "eq": (equal,),
    "chosen": (chosen,),
    **{
        op: (positive,)
        for op in ("gt", "greater", "ne", "not_equal", "ge", "greater_equal", "lt", "less", "le", "less_equal")
    },
    **{op: (cast,) for op in ("to", "_to_copy", "bool", "long", "int", "contiguous", "clone")},
    **{op: (negate,) for op in ("logical_not", "bitwise_not")},
    **{op: (reorder,) for op in ("permute", "transpose", "t")},
    "unsqueeze": (unsqueeze,),
    **{op: (squeeze, unsqueeze) for op in ("view", "reshape")},
    "squeeze": (squeeze,),
    "flatten": (squeeze, unsqueeze),
    **{op: (reduce,) for op in ("sum", "any", "count_nonzero")},
}
