"""Parameters in groups that one foreach or fused step can take."""

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters that need gradients, in a group for each mesh that they are on, for any torch optimizer.

    `foreach=True` and `fused=True` take no list in which some are DTensors and others are not: where dense parameters
    are replicated, `torch.optim.AdamW(param_groups(model), fused=True)` works and `model.parameters()` does not.
    """
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
            groups.setdefault(key, []).append(parameter)
    return [{"params": group} for group in groups.values()]
