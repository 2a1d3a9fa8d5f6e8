"""Rules for what is taken out by a number: an expert's mask, column or weights, the vectors of a nonzero table.

The number is a constant, or the index of a visit (visit_index.py), which stands for each of its experts.
"""

from typing import Any

from torch import Tensor

from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.masks import with_fields
from moe_compile.detect.shapes import same_size
from moe_compile.detect.values import (
    Column,
    Constant,
    Each,
    Expert,
    Hits,
    Index,
    Member,
    Plain,
    RowTuple,
    Slice,
    Value,
    Visit,
)
from moe_compile.detect.visit_index import number_in
from moe_compile.series import series_of


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
            return with_fields(value, dims=rest, expert=index)
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
        return with_fields(value, dims=(*lead, *value.dims[1:]), expert=number)
    if isinstance(value, Plain) and not lead and isinstance(call.val(value.node).shape[0], int):
        return Slice(number, call.run.table.leaf("slice", value.node, call.val()))
    return None


def pick(call: Call) -> Value | None:
    """Of a list of modules the tensor of the visit's own."""
    series, chosen = series_of(call.node.args[0]), call.arg(1)
    number = number_in(chosen, len(series)) if series is not None and isinstance(chosen, Visit) else None
    if number is None or not isinstance(call.arg(0), Plain):
        return None
    return Slice(number, call.run.table.leaf("picked", call.node, call.val()))


def columns(call: Call) -> Value | None:
    """unbind(1) of a nonzero table: its index vectors, in the order of the mask's dimensions; masks of all experts."""
    value, dim = call.arg(0), call.number(1, "dim", 0)
    if isinstance(value, Member) and value.dims[dim] == "e" and value.expert is None:
        rest = tuple(d for i, d in enumerate(value.dims) if i != dim % len(value.dims))
        experts = range(call.val(call.node.args[0]).shape[dim])
        return RowTuple(tuple(with_fields(value, dims=rest, expert=e) for e in experts))
    if not (isinstance(value, Index) and isinstance(value.dim, tuple) and dim in (1, -1)):
        return None
    return RowTuple(tuple(Index(value.selection, d) for d in value.dim))


def item(call: Call) -> Value | None:
    value = call.arg(0)
    return value.items[call.args[1]] if isinstance(value, RowTuple) and isinstance(call.args[1], int) else None


def whole(call: Call) -> Value | None:
    """hits[:], mask[:], token[:] of `token[:, None]`, table[:] of `table[:, 0]`: all, from its start to its end."""
    value, (dim, *bounds) = call.arg(0), [call.number(i, name, d) for i, name, d in _BOUNDS]
    if bounds not in ([0, _END, 1], [None, None, 1]):
        return None
    return value if isinstance(value, Member) or (isinstance(value, Hits | Index) and dim == 0) else None


_END = 2**63 - 1
_BOUNDS = ((1, "dim", 0), (2, "start", None), (3, "end", None), (4, "step", 1))


RULES: dict[str, tuple[Rule, ...]] = {
    "select": (take,),
    "slice": (whole,),
    "unbind": (columns,),
    "getitem": (item,),
    "index": (index_mask,),
    "pick": (pick,),
}
