"""Rules for tables [T, E] in which each expert has marked C tokens at most.

    few  = zeros_like(mask).scatter_(0, scores.topk(C, dim=0).indices, 1)    # who is kept if an expert has too many
    mask = mask * few
    at   = cumsum(mask, 0) - 1                                               # below C, without any comparison

Each column of such an index [C, E] names C rows, so a column of the table has C ones at most, whichever they are.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compile.detect.dense_values import Dense
from moe_compile.detect.ids import INTEGERS
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.nodes import ZEROS
from moe_compile.detect.shapes import same_size
from moe_compile.detect.sum_values import Buffer
from moe_compile.detect.values import Plain, Value

KEEPS_MARKS = ("to", "_to_copy", "bool", "long", "int", "float", "type_as", "clone", "contiguous", "detach")


@dataclass(frozen=True)
class Marks(Dense):
    """A table of zeros and ones [T, E] with `most` ones in a column at most."""

    most: Any


def marked(call: Call) -> Value | None:
    """zeros.scatter(0, index[C, E], 1)."""
    start, index, val = call.arg(0), call.arg(2, "index"), call.val()
    zero = isinstance(start, Buffer) and start.kind == "zero"  # of a floating type
    if not (zero or str(getattr(call.node.args[0], "target", "")) in ZEROS) or not isinstance(index, Plain):
        return None
    if call.number(1, "dim") not in (0, -2) or not isinstance(val, Tensor) or val.dim() != 2:
        return None
    number = call.number(3, "value")
    if type(number) not in (int, float, bool) or number != 1 or "reduce" in call.kwargs or len(call.args) > 4:
        return None
    rows = call.val(index.node)
    return Marks(rows.shape[0]) if rows.dim() == 2 and rows.dtype in INTEGERS else None


def cast(call: Call) -> Value | None:
    """In another dtype, which has zero and one too."""
    table, val = call.arg(0), call.val()
    if not isinstance(table, Marks) or not isinstance(val, Tensor) or val.dtype == torch.float8_e8m0fnu:
        return None
    before = call.val(call.node.args[0]).shape
    return table if len(before) == val.dim() and all(map(same_size, before, val.shape)) else None


RULES: dict[str, tuple[Rule, ...]] = {
    **{op: (marked,) for op in ("scatter", "scatter_")},
    **{op: (cast,) for op in KEEPS_MARKS},
}
