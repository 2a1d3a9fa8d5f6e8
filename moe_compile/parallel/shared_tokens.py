"""Ops for tokens that the ranks of a tensor-parallel group share: each has all T of them, and runs experts on its part.

Letters    T shared tokens, P ranks that share them, S = ceil(T / P) rows of each; where T is no multiple, rows of
           nobody are added behind the last token.
Gradient   results of the group are shared as the tokens are, and so are their gradients: each rank has the whole of
           both.  So what takes a rank's part gathers the gradient, and what gathers takes this rank's part of it.

Ranks that do not share their tokens would get each other's results.  So before anything moves, they tell each other
their number and some sums over them, weighted by position, which differ where tokens do; rounding is allowed for.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

SUMS = 8  # of each tensor
TOLERANCE = 0.05  # of its norm; sums over other tokens differ by about 0.7 of it

c10d = torch.ops._c10d_functional


@custom_op("moe_ep::token_message", mutates_args=())
def token_message(tensors: list[Tensor]) -> Tensor:
    """[1 + n * (SUMS + 1)]: the number of tokens; then, for each of n tensors [T, ...], sums over it and its norm."""
    number, device = tensors[0].shape[0], tensors[0].device
    parts = [torch.tensor([number], dtype=torch.float64, device=device)]
    for x in tensors:
        rows = x.reshape(number, -1) if number else x.new_zeros(1, 1)
        rows = rows if rows.dtype in (torch.float32, torch.float64, torch.bfloat16) else rows.float()
        by_token, by_feature = _waves(rows.shape[0], 1.0, device), _waves(rows.shape[1], 0.7, device)
        sums = ((rows @ by_feature.to(rows.dtype)).double() * by_token).sum(0)
        norm = torch.linalg.vector_norm(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
        parts += [sums, norm.double().reshape(1)]
    return torch.cat(parts)


def _waves(number: int, step: float, device: torch.device) -> Tensor:
    """[number, SUMS]: cosines of as many frequencies."""
    positions = torch.arange(1, number + 1, dtype=torch.float64, device=device)
    return torch.outer(positions, step * torch.arange(1, SUMS + 1, dtype=torch.float64, device=device).sqrt()).cos()


@token_message.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(1 + len(tensors) * (SUMS + 1), dtype=torch.float64)


@custom_op("moe_ep::check_shared", mutates_args=())
def check_shared(ids_TK: Tensor, messages: Tensor, ranks: int) -> Tensor:
    """A copy of the ids; an error, on all ranks, if the messages of the group say that ranks have other tokens.

    On an accelerator the check runs there and fails at the next synchronisation: the host reads nothing.
    """
    lines = messages.view(ranks, -1)
    blocks = lines[:, 1:].reshape(ranks, -1, SUMS + 1)
    far = (blocks - blocks[:1]).abs() > TOLERANCE * blocks[:, :, -1:].amax(0)
    other = (lines[:, 0] != lines[0, 0]) | far.flatten(1).any(1)
    if ids_TK.device.type != "cpu":
        torch._assert_async(~other.any())
    elif other.any():
        numbers = [int(n) for n in lines[:, 0].tolist()]
        raise RuntimeError(
            f"ranks {other.nonzero().flatten().tolist()} of the tensor-parallel group have other tokens, or another "
            f"routing of them, than its first ({', '.join(map(str, numbers))} tokens): all of the group take the same "
            f"batch, and what splits it among them (SequenceParallel) has to gather it before the experts"
        )
    return ids_TK.clone()


@check_shared.register_fake
def _(ids_TK: Tensor, messages: Tensor, ranks: int) -> Tensor:
    return torch.empty_like(ids_TK)


# -- a rank's part, and the whole -----------------------------------------------------------


@custom_op("moe_ep::own_rows", mutates_args=())
def own_rows(rows: Tensor, rank: int, ranks: int, fill: int, group: str) -> Tensor:
    """[S, ...]: this rank's part of rows [T, ...] that the group shares; `fill` where there are none."""
    most = -(-rows.shape[0] // ranks)
    mine = rows[rank * most : (rank + 1) * most]
    out = rows.new_full((most, *rows.shape[1:]), fill)
    out[: mine.shape[0]] = mine
    return out


@own_rows.register_fake
def _(rows: Tensor, rank: int, ranks: int, fill: int, group: str) -> Tensor:
    return rows.new_empty((rows.shape[0] + ranks - 1) // ranks, *rows.shape[1:])


def _own_save(ctx: Any, inputs: Any, output: Any) -> None:
    rows, _, ctx.ranks, _, ctx.group = inputs
    ctx.number = rows.shape[0]


def _own_gradient(ctx: Any, gradient: Tensor) -> Any:
    whole = c10d.wait_tensor(c10d.all_gather_into_tensor(gradient.contiguous(), ctx.ranks, ctx.group))
    return whole[: ctx.number], None, None, None, None


own_rows.register_autograd(_own_gradient, setup_context=_own_save)


@custom_op("moe_ep::joined", mutates_args=())
def joined(whole: Tensor, own: Tensor, shared: Tensor, rank: int, ranks: int, group: str) -> Tensor:
    """[T, ...]: the rows [P * S, ...] that were gathered from all ranks, as many as `shared` [T, ...] has.

    The gradient goes to `own` [S, ...], what this rank had gathered.
    """
    return whole[: shared.shape[0]].clone(memory_format=torch.contiguous_format)


@joined.register_fake
def _(whole: Tensor, own: Tensor, shared: Tensor, rank: int, ranks: int, group: str) -> Tensor:
    return whole.new_empty(shared.shape[0], *whole.shape[1:])


def _joined_save(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, _, ctx.rank, ctx.ranks, ctx.group = inputs


def _joined_gradient(ctx: Any, gradient: Tensor) -> Any:
    return None, own_rows(gradient, ctx.rank, ctx.ranks, 0, ctx.group), None, None, None, None


joined.register_autograd(_joined_gradient, setup_context=_joined_save)


@custom_op("moe_ep::read_by_parts", mutates_args=())
def read_by_parts(value: Tensor, group: str) -> Tensor:
    """A copy of what all ranks read for their parts of the tokens; its gradient is the sum over the group."""
    return value.clone()


@read_by_parts.register_fake
def _(value: Tensor, group: str) -> Tensor:
    return torch.empty_like(value)


def _read_save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.group = inputs[1]


def _read_gradient(ctx: Any, gradient: Tensor) -> Any:
    return c10d.wait_tensor(c10d.all_reduce(gradient.contiguous(), "sum", ctx.group)), None


read_by_parts.register_autograd(_read_gradient, setup_context=_read_save)
READ_BY_PARTS = torch.ops.moe_ep.read_by_parts.default
