"""Rules for whole rows by an index as wide as they are: gather and scatter_add with a column of tokens, repeated.

The column is a `TokenGrid`; rows come from sliced_rows.py or a sort, and their sum is that of sums.py.
"""

from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.nodes import name_of
from moe_compile.detect.selection import everyone
from moe_compile.detect.shapes import misfit, same_size
from moe_compile.detect.sorted_values import TokenOf
from moe_compile.detect.sum_values import Buffer
from moe_compile.detect.sums import add_term, total_of
from moe_compile.detect.values import Index, Plain, Rows, TokenGrid, Unknown, Value


def token_column(call: Call) -> Value | None:
    """token[:, None], token.view(-1, 1), and repeated for all columns."""
    value, val = call.arg(0), call.val()
    of_all = isinstance(value, TokenOf) and value.order != "flat"
    if (of_all or (isinstance(value, Index) and value.dim == 0)) and call.op in ("unsqueeze", "view", "reshape"):
        column = (
            val.dim() == 2
            and same_size(val.shape[1], 1)
            and same_size(val.shape[0], call.val(call.node.args[0]).shape[0])
        )
        selection = value.selection if isinstance(value, Index) else everyone(value.ids, value.order)  # type: ignore[union-attr]
        return TokenGrid(selection) if column else None
    if isinstance(value, TokenGrid) and call.op in ("repeat", "expand", "expand_as"):
        before = call.val(call.node.args[0])
        return value if val.dim() == 2 and same_size(val.shape[0], before.shape[0]) else None
    return None


def gather(call: Call) -> Value | None:
    """x.gather(0, token[:, None].expand(-1, D)): whole rows."""
    value, index = call.arg(0), call.arg(2)
    if not isinstance(index, TokenGrid) or call.number(1) not in (0, -2) or call.kwargs:
        return None
    if not isinstance(value, Plain):
        return None
    before, wide = call.val(value.node), call.val().dim() == 2 and call.val(call.node.args[0]).dim() == 2
    if not wide or not same_size(call.val().shape[1], before.shape[1]):
        return Unknown(f"{name_of(call.node)} gathers a part of the columns")
    wrong = misfit(call.run, index.selection, value.node, 1)
    return wrong or Rows(index.selection, call.run.table.leaf("token", value.node, call.val()))


def scatter_add(call: Call) -> Value | None:
    """total.scatter_add_(0, token[:, None].expand(-1, D), rows), or scatter_reduce_ with "sum"."""
    index, rows = call.arg(2), call.arg(3)
    if not isinstance(index, TokenGrid):
        return None
    sums = call.op.startswith("scatter_add") or call.number(4, "reduce") == "sum"
    if call.number(1) not in (0, -2) or not sums or call.number(5, "include_self", True) is not True:
        return Unknown(f"{name_of(call.node)} does not add rows to tokens")
    if not isinstance(rows, Rows) or call.val(call.node.args[2]).shape != call.val(call.node.args[3]).shape:
        return Unknown(f"{name_of(call.node)} does not add whole rows to tokens")
    if (total := total_of(call)) is None or (isinstance(total, Buffer) and total.kind == "empty"):
        return Unknown(f"{name_of(call.node)} adds into memory that was never set")
    if tuple(call.val().shape[1:]) != tuple(rows.expr.val.shape[1:]):
        return Unknown(f"{name_of(call.node)} adds rows to a part of the columns")
    return add_term(call, total, rows, index.selection)


RULES: dict[str, tuple[Rule, ...]] = {
    **{op: (token_column,) for op in ("unsqueeze", "view", "reshape", "repeat", "expand", "expand_as")},
    "gather": (gather,),
    **{op: (scatter_add,) for op in ("scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_")},
}
