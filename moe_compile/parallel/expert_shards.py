"""Experts' weights that are split once more, over the ranks that hold the same experts ("edp"), as FSDP would.

A rank has part j of n of the weights of its L experts: along one dimension behind that of the experts, so that one
expert a rank can be split too.  They are joined for use and the parts' gradients are sums over the ranks:

    flat_nLCD = wait(all_gather(pad(shard_LCD)))          C = ceil(A / n), the last parts padded
    w_LAD     = join_shards(flat_nLCD, shard_LCD, ...)    the gradient of shard_LCD: a reduce-scatter of that of w_LAD

in the graph, and the collectives are nodes.  What is joined is not kept for the backward, which gathers again
(passes/regather_weights.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

c10d = torch.ops._c10d_functional


def split_dim(shape: Sequence[int], ranks: int, first: int = 1) -> int | None:
    """Along which dimension a stack [E, ...] is split over so many ranks: the first behind that of the experts, from
    `first` on, which they divide, else the longest, of which the last ranks have less.  None if there is none: numbers,
    one an expert, are copied.
    """
    behind = range(first, len(shape))
    even = [d for d in behind if shape[d] % ranks == 0]
    if even:
        return even[0]
    return max(behind, key=lambda d: shape[d], default=None)


def part(size: int, ranks: int, rank: int) -> slice:
    """Which of so many numbers along a dimension a rank has: as DTensor's `Shard` splits them."""
    most = -(-size // ranks)
    return slice(min(size, rank * most), min(size, (rank + 1) * most))


def padded(shard: Tensor, dim: int, most: int) -> Tensor:
    """The shard with zeros behind, so that all ranks have `most` along a dimension."""
    missing = most - shard.shape[dim]
    return F.pad(shard, [0, 0] * (shard.dim() - 1 - dim) + [0, missing]) if missing else shard


@custom_op("moe_ep::join_shards", mutates_args=())
def join_shards(
    flat: Tensor, shard: Tensor, dim: int, size: int, ranks: int, reduce_dtype: torch.dtype, again: bool, group: str
) -> Tensor:
    """The whole of what `flat` [ranks * L, ...] has in parts, `size` long along `dim`.

    The gradient goes to `shard`, this rank's part: the sum over the group, added up in `reduce_dtype`.  again: whether
    a backward gathers the weights again, or keeps them (passes/regather_weights.py).
    """
    parts = flat.unflatten(0, (ranks, -1))
    whole = parts.movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, size)
    return whole.clone(memory_format=torch.contiguous_format)


@join_shards.register_fake
def _(
    flat: Tensor, shard: Tensor, dim: int, size: int, ranks: int, reduce_dtype: torch.dtype, again: bool, group: str
) -> Tensor:
    shape = list(shard.shape)
    shape[dim] = size
    return flat.new_empty(shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, shard, ctx.dim, ctx.size, ctx.ranks, ctx.reduce_dtype, _, ctx.group = inputs
    ctx.own, ctx.dtype = shard.shape[ctx.dim], shard.dtype


def _gradient(ctx: Any, gradient: Tensor) -> Any:
    most = -(-ctx.size // ctx.ranks)
    whole = padded(gradient.to(ctx.reduce_dtype), ctx.dim, most * ctx.ranks)
    parts = whole.unflatten(ctx.dim, (ctx.ranks, most)).movedim(ctx.dim, 0).flatten(0, 1).contiguous()
    mine = c10d.wait_tensor(c10d.reduce_scatter_tensor(parts, "sum", ctx.ranks, ctx.group))
    return None, mine.narrow(ctx.dim, 0, ctx.own).to(ctx.dtype), *[None] * 6


join_shards.register_autograd(_gradient, setup_context=_save)
JOIN_SHARDS = torch.ops.moe_ep.join_shards.default
