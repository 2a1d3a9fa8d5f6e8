"""Rules for rows of all pairs as [T, K, ...], before their sum over k: cast, or times the routing weights.

Here they are still rows, of which the program sees another shape; sums.py adds them.
"""

from typing import Any

import torch

from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.shapes import equal_sizes
from moe_compile.detect.sorted_values import PairGrid
from moe_compile.detect.values import Plain, Value
from moe_compile.region import Leaf

aten = torch.ops.aten


def scale_grid(call: Call) -> Value | None:
    """grid.to(dtype), grid * weights[:, :, None]."""
    grid, other, val = call.arg(0), call.arg(1), call.val()
    if isinstance(other, PairGrid) and not call.op.endswith("_"):
        grid, other = other, grid
    if not isinstance(grid, PairGrid) or val.dim() != grid.expr.val.dim() + 1 or grid.expr.level != "row":
        return None
    flat = grid.expr.val
    if call.op in ("to", "_to_copy"):
        if val.shape != call.val(call.node.args[0]).shape or not val.is_floating_point():
            return None
        expr = call.run.expr(
            call, aten.to.dtype, [grid.expr, val.dtype], val=flat.new_empty(flat.shape, dtype=val.dtype)
        )
        return PairGrid(grid.selection, expr)
    if isinstance(other, Plain):
        theirs = call.val(other.node)
        if theirs.dim() != val.dim() or not equal_sizes(call.run, theirs.shape[:2], val.shape[:2]):
            return None
        mine = flat.new_empty((flat.shape[0], *theirs.shape[2:]), dtype=theirs.dtype)
        factor: Any = call.run.table.leaf("pair", other.node, mine)
    elif type(other) in (int, float):
        factor = other
    else:
        return None
    product = aten.mul.Tensor(flat, factor.val if isinstance(factor, Leaf) else factor)
    expr = call.run.expr(call, aten.mul.Tensor, [grid.expr, factor], val=product)
    if tuple(product.shape[1:]) != tuple(val.shape[2:]):
        return None
    if product.dtype != val.dtype:
        expr = call.run.expr(
            call, aten.to.dtype, [expr, val.dtype], val=product.new_empty(product.shape, dtype=val.dtype)
        )
    return PairGrid(grid.selection, expr)


RULES: dict[str, tuple[Rule, ...]] = {
    **{op: (scale_grid,) for op in ("to", "_to_copy", "long", "int")},
    **{op: (scale_grid,) for op in ("mul", "mul_", "multiply")},
}
