"""`clip_grad_norm_` over gradients on several meshes: experts' shards, FSDP's, copies of both, and whole tensors."""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from moe_compile.errors import MoeCompileError
from moe_compile.parallel.mesh import device_type


@torch.no_grad()
def clip_grad_norm_(
    model_or_parameters: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale all gradients, in place, so that their norm is `max_norm` at most; returns the norm that they had.

    What `torch.nn.utils.clip_grad_norm_` does on one process that has the whole model; every rank has to call it, with
    the same parameters, and gets the same number: a float32 scalar, float64 if a gradient is.  A gradient that is no
    DTensor is taken to be the same on all ranks.  norm_type: above 0, or infinity.

    Raises `MoeCompileError` for another norm_type; RuntimeError, on all ranks, for a norm that is not finite, if
    `error_if_nonfinite`.
    """
    if isinstance(model_or_parameters, nn.Module):
        parameters = list(model_or_parameters.parameters())
    elif isinstance(model_or_parameters, Tensor):
        parameters = [model_or_parameters]  # type: ignore[list-item]
    else:
        parameters = list(model_or_parameters)  # type: ignore[arg-type]
    norm_type, max_norm = float(norm_type), float(max_norm)
    if not norm_type > 0:
        raise MoeCompileError(f"norm_type={norm_type}: it is a number above 0, or infinity")
    grads = [_whole_or_shard(p) for p in parameters if p.grad is not None]
    total = _total(parameters, grads, norm_type)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            f"clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            f"`error_if_nonfinite=False`"
        )
    # not through parameters: of DTensors on several meshes, no foreach op takes a list
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for local in _alike(grads):
        here = factor.to(local[0].device)
        if foreach is False:
            for grad in local:
                grad.mul_(here)
        else:
            torch._foreach_mul_(local, here)
    return total


def _whole_or_shard(parameter: Tensor) -> Tensor:
    """The gradient; what ranks have yet to add up is added up."""
    grad = parameter.grad
    assert grad is not None
    if isinstance(grad, DTensor) and any(p.is_partial() for p in grad.placements):
        parameter.grad = grad = grad.redistribute(
            placements=[Replicate() if p.is_partial() else p for p in grad.placements]
        )
    return grad


def _total(parameters: Sequence[Tensor], grads: list[Tensor], norm_type: float) -> Tensor:
    """The norm of all gradients of all ranks, the same on each.

    Ranks add up what they hold, a shard that several hold divided by their number: one all-reduce of one number.
    """
    double = any(p.dtype == torch.float64 for p in parameters)
    device = parameters[0].device if parameters else torch.device("cpu")
    spread = any(isinstance(p, DTensor) for p in parameters)
    where = torch.device(device_type()) if spread else device
    mine = torch.zeros(2, dtype=torch.float64, device=where)  # the number; for infinity, whether there is a NaN
    for copies, norms in _norms(grads, norm_type, spread):
        norms = norms.to(where, torch.float64)
        if math.isinf(norm_type):
            mine[0] = torch.maximum(mine[0], norms.nan_to_num(0.0, math.inf).max())
            mine[1] = torch.maximum(mine[1], norms.isnan().any().double())
        else:
            mine[0] += norms.pow(norm_type).sum() / copies
    if spread:
        dist.all_reduce(mine, dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM)
    total = torch.where(mine[1] > 0, math.nan, mine[0])
    if not math.isinf(norm_type):
        total = total.pow(1 / norm_type)
    return total.to(device, torch.float64 if double else torch.float32)


def _norms(grads: list[Tensor], norm_type: float, spread: bool) -> Iterator[tuple[int, Tensor]]:
    """(how many ranks hold the same, the norms of what this rank has of them)."""
    groups: dict[int, list[Tensor]] = {}
    for grad in grads:
        copies = dist.get_world_size() if spread else 1
        if isinstance(grad, DTensor):
            sizes = [grad.device_mesh.size(i) for i, p in enumerate(grad.placements) if not p.is_replicate()]
            copies //= math.prod(sizes)
        groups.setdefault(copies, []).append(grad)
    for copies, found in groups.items():
        for local in _alike(found):
            dtype = torch.float64 if local[0].dtype == torch.float64 else torch.float32
            yield copies, torch.stack(torch._foreach_norm(local, norm_type, dtype))


def _alike(grads: list[Tensor]) -> list[list[Tensor]]:
    """What this rank has of them, but for what is empty, by device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        if local.numel():
            groups.setdefault((local.device, local.dtype), []).append(local)
    return list(groups.values())
