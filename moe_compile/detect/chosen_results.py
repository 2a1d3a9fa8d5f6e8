"""Rules for what every expert made of every token (crossed.py, dense.py): its sum by a product, or the chosen of it.

out = bmm(table[:, None], y).squeeze(1)                                             # y: [T, E, D]
out = (y.gather(1, ids[..., None].expand(T, K, D)) * weights[..., None]).sum(1)     # or y[arange(T)[:, None], ids]
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from moe_compile.detect.crossed import fits, is_whole
from moe_compile.detect.dense import terms_of
from moe_compile.detect.dense_values import Dense, DenseSum, Every, Positions, Spread, Stacked
from moe_compile.detect.every import aten, elsewhere, sum_of, weight_of
from moe_compile.detect.ids import INTEGERS
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.nodes import op_of
from moe_compile.detect.rows import whole_slice
from moe_compile.detect.selection import everyone
from moe_compile.detect.shapes import same_size
from moe_compile.detect.sorted_values import PairGrid
from moe_compile.detect.values import Plain, Value


@dataclass(frozen=True)
class Mixed(Dense):
    """What the experts of each token made, times its weights and added up, as [T, 1, ...]."""

    many: Stacked | Every
    table: Spread


def mix(call: Call) -> Value | None:
    """bmm(table[:, None, :], rows): the sum over the experts of each token, [T, 1, D]."""
    table, many = call.arg(0), call.arg(1)
    if not isinstance(table, Spread) or table.fill != 0 or table.dims != (0, "one", "e") or call.val().dim() != 3:
        return None
    table = Spread(table.node, table.ids, (0, "e"))
    if elsewhere(call) or call.val(call.node.args[0]).dtype != call.val().dtype:
        return None
    if isinstance(many, Stacked):
        by_token = many.dim == 1 and many.table is None and len(many.nodes) == call.val(table.node).shape[1]
        return Mixed(many, table) if by_token else None
    if not isinstance(many, Every) or not many.crossed or not is_whole(many) or not fits(call, many, table):
        return None
    return Mixed(many, table) if many.expr.val.dim() == 2 else None


def unmixed(call: Call) -> Value | None:
    """mixed.squeeze(1), mixed[:, 0], mixed.view(T, D)."""
    value, val = call.arg(0), call.val()
    if not isinstance(value, Mixed) or elsewhere(call) or not isinstance(val, Tensor):
        return None
    if call.op == "slice":
        return value if whole_slice(call) else None
    if val.dim() != 2:
        return None
    before = call.val(call.node.args[0]).shape
    if not same_size(val.shape[0], before[0]) or not same_size(val.shape[1], before[2]):
        return None
    if isinstance(value.many, Stacked):
        return DenseSum(None, terms_of(call, value.many, value.table))
    many = value.many
    expr = call.run.table.call(aten.mul.Tensor, (many.expr, weight_of(call, value.table)), {}, many.expr.val)
    return sum_of(call, replace(many, expr=expr, ids=value.table.ids))


def gather(call: Call) -> Value | None:
    """rows.gather(1, ids[..., None].expand(T, K, D)): what the chosen experts made."""
    many, dim, index = call.arg(0), call.number(1, "dim"), call.node.args[2] if len(call.node.args) > 2 else None
    if not isinstance(many, Every) or not many.crossed or not is_whole(many) or dim not in (1, -2):
        return None
    if not isinstance(index, Node) or op_of(index) not in ("expand", "repeat") or not call.run.values[index].plain:
        return None
    wide: Any = index.args[0]
    ids = wide.args[0] if op_of(wide) == "unsqueeze" and wide.args[1] in (2, -1) else None
    whole = call.val().dim() == 3 and same_size(call.val().shape[2], call.val(call.node.args[0]).shape[2])
    return _chosen(call, many, ids, "number") if whole else None


def index(call: Call) -> Value | None:
    """rows[arange(T)[:, None], ids]; of [E, T, D] rows[ids, arange(T)[:, None]]."""
    many, indices = call.arg(0), call.arg(1)
    if not isinstance(many, Every) or not is_whole(many) or not isinstance(indices, list) or len(indices) != 2:
        return None
    at, chosen = indices if many.crossed else indices[::-1]
    nodes: Any = call.node.args[1]
    first, second = nodes if many.crossed else nodes[::-1]
    if not isinstance(at, Positions) or at.shape != "column" or not isinstance(chosen, Plain):
        return None
    if not same_size(call.val(first).shape[0], many.expr.val.shape[0]):
        return None
    return _chosen(call, many, second, "index")


def _chosen(call: Call, many: Every, ids: Any, how: str) -> Value | None:
    """What the experts `ids` of each token made of it."""
    if not isinstance(ids, Node) or not isinstance(call.run.otherwise(ids), Plain) or elsewhere(call):
        return None
    sizes, val = call.val().shape, call.val(ids)
    if val.dim() != 2 or val.dtype not in INTEGERS[:2] or not isinstance(val.shape[1], int) or many.expr.level != "row":
        return None
    if not all(map(same_size, sizes[:2], val.shape)) or not same_size(sizes[0], many.expr.val.shape[0]):
        return None
    ids = call.run.canonical[ids]
    call.run.reads.setdefault(ids, set()).add(how)
    return PairGrid(everyone(ids, "flat"), many.expr)


RULES: dict[str, tuple[Rule, ...]] = {
    **{op: (mix,) for op in ("bmm", "matmul")},
    **{op: (unmixed,) for op in ("squeeze", "select", "slice", "view", "reshape", "flatten")},
    "gather": (gather,),
    "index": (index,),
}
