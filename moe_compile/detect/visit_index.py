"""Rules for the index of a visit, by which one iteration stands for many experts: as a size, a number, a tensor.

It stays the index as long as nobody computes with it; `number_in` is how the other rules use it as an expert's number.
"""

from typing import Any

import torch

from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.values import Each, Value, Visit


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


RULES: dict[str, tuple[Rule, ...]] = {op: (visit,) for op in ("visit", "visited", "sym_size", "python::sub", "detach")}
