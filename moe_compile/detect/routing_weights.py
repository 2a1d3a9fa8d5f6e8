"""Rules for the routing weights of one expert: weights * mask, and a number a token read at the tokens of that expert.

`gather_rows` (selection.py) reads them; a weight of another expert than the one whose rows it is read for is refused.
"""

from typing import Any

from moe_compile.detect.by_column import column_of
from moe_compile.detect.grids import GRID, as_table
from moe_compile.detect.ids import not_distinct, some_of
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.shapes import misfit
from moe_compile.detect.sum_values import Buffer
from moe_compile.detect.values import Column, MaskedWeights, Member, Plain, Rows, Selection, Unknown, Value


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


RULES: dict[str, tuple[Rule, ...]] = {
    "where": (masked_weights,),
    "mul": (masked_weights,),
}
