"""Tokens that lie in two dimensions, [B, S]: masks, rows and sums of them as those of B * S tokens.

    mask = (ids == e).any(-1)                      # ids [B, S, K], mask [B, S]
    out[mask] += expert_e(x[mask])                 # out and x [B, S, D]

The ids become a table [B * S, K] of their own; `GRID` stands for the two dimensions that are one of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.interpreter import Interpreter

aten = torch.ops.aten
GRID = ("B", "S")


def as_table(run: Interpreter, node: Node) -> Node:
    """A value [B, S, ...] as [B * S, ...]."""
    val = node.meta["val"]
    rest = val.shape[2:]
    return run.write_ids(node, aten.reshape.default, (node, [-1, *rest]), val.reshape(-1, *rest), None)


def in_grid(dims: Sequence[Any]) -> bool:
    return tuple(dims[:2]) == GRID


def folded(dims: Sequence[Any]) -> tuple[Any, ...]:
    """Dimensions with one in the place of the grid's two."""
    return (0, *dims[2:]) if in_grid(dims) else tuple(dims)


def grid_of(ids: Node | None) -> tuple[Any, ...] | None:
    """[B, S] of ids that were made a table."""
    if ids is None or ids.target is not aten.reshape.default or list(ids.args[1])[1:] == []:  # type: ignore[arg-type]
        return None
    val = ids.args[0].meta["val"]  # type: ignore[union-attr]
    return tuple(val.shape[:2]) if isinstance(val, Tensor) and val.dim() == 3 else None
