"""State dicts of sharded experts, by the model's own names.

Dense weights that FSDP splits are DTensors under their names.  A stacked weight keeps its name and is a DTensor; so is
a flat one, in the shape that the model has, or `Rows` where ranks hold other numbers of experts.  The weights of a list
of modules appear one by one, those of this rank's experts only, as DTensors if they are split over "edp": together the
ranks' state dicts are the model's.  Loading takes the weights of one process too.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from moe_compile.parallel.shards import Family, Shards
from moe_compile.parallel.uneven import Rows


def install(holder: nn.Module, shards: Shards) -> None:
    """Have a holder translate its families when state dicts are made and loaded."""

    def save(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for family in shards.families:
            if family.rows and (packed := state.get(prefix + family.name)) is not None:
                state[prefix + family.name] = shards.own_of(packed, family)
            elif family.listed and (packed := state.pop(prefix + family.name, None)) is not None:
                for i, e in enumerate(shards.own(family)):
                    state[prefix + family.members[e]] = shards.of_one(packed, i)

    def load(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for family in shards.families:
            _load(state, prefix, family, shards)

    holder.register_state_dict_post_hook(save)
    holder.register_load_state_dict_pre_hook(load)


def install_dense(model: nn.Module, experts: set[nn.Parameter]) -> None:
    """Have modules take whole tensors for parameters that FSDP splits."""
    for module in model.modules():
        split = [n for n, p in module._parameters.items() if isinstance(p, DTensor) and p not in experts]
        if split:
            module.register_load_state_dict_pre_hook(functools.partial(_load_dense, split))


def _load_dense(names: list[str], module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name in names:
        whole, parameter = state.get(prefix + name), module._parameters.get(name)
        if not isinstance(whole, Tensor) or isinstance(whole, DTensor) or not isinstance(parameter, DTensor):
            continue
        if whole.shape == parameter.shape:
            mesh, placements = parameter.device_mesh, parameter.placements
            state[prefix + name] = distribute_tensor(whole.detach(), mesh, placements, src_data_rank=None)


def _load(state: dict[str, Any], prefix: str, family: Family, shards: Shards) -> None:
    """Put this rank's experts, as a DTensor, in the place of what stands for the whole."""
    own = shards.own(family)
    if not family.listed:
        found = state.get(prefix + family.name)
        if isinstance(found, Tensor) and family.rows and found.shape[:1] == (family.num_experts * family.rows,):
            if isinstance(found, DTensor | Rows):  # what `save` gave
                local = found.to_local() if isinstance(found, DTensor) else found.local
                state[prefix + family.name] = shards.wrap(family.stack(local), family.stacked(found.shape), family)
                return
            found = family.stack(found)
        if isinstance(found, Tensor) and not isinstance(found, DTensor) and found.shape[:1] == (family.num_experts,):
            state[prefix + family.name] = shards.place(found[own.start : own.stop], family)
        return
    found = [state.pop(prefix + member, None) for member in family.members]
    mine = [weight for weight in found[own.start : own.stop] if weight is not None]
    if len(mine) == len(own):
        if not any(isinstance(weight, DTensor) for weight in mine):
            state[prefix + family.name] = shards.place(torch.stack(mine), family)
        elif shards.split is not None and all(w.device_mesh == shards.split["edp"] for w in mine):
            shape = (family.num_experts, *mine[0].shape)  # what `save` gave
            state[prefix + family.name] = shards.wrap(torch.stack([w.to_local() for w in mine]), shape, family)
