"""Dense parameters, split by torch's own FSDP2 (`fully_shard`); experts' are none of its business.

The units are the decoder layers: the members of the outermost lists with experts inside.  All else is in the unit of
the whole model.  A unit's dense parameters are gathered before its forward and its backward, and their gradients
averaged over all ranks, which is what gradients.py does with replicated ones.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from moe_compile.errors import MoeCompileError


def units(model: nn.Module, readers: list[nn.Module]) -> list[nn.Module]:
    """The members of the outermost lists that have a reader of experts below one of their members.

    A reader itself is none: FSDP's hooks run in Python, and beside them so would those that gather its experts.
    """
    inside = {id(reader) for reader in readers}

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and any(
                id(m) in inside for member in child.children() for m in member.modules()
            ):
                yield from (m for m in child.children() if _may_be_unit(m) and id(m) not in inside)
            else:
                yield from walk(child)

    return list(walk(model))


def _may_be_unit(module: nn.Module) -> bool:
    """Whether a module has something to split, and a forward, around which hooks can stand."""
    has_forward = type(module).forward is not nn.Module.forward or "forward" in vars(module)
    return has_forward and any(True for _ in module.parameters())


def split(
    model: nn.Module, mesh: DeviceMesh, readers: list[nn.Module], ignored: set[nn.Parameter], **kwargs: Any
) -> None:
    """`fully_shard` every unit, then the model."""
    for module in (*units(model, readers), model):
        fully_shard(module, mesh=mesh, ignored_params=ignored, **kwargs)


def check(model: nn.Module) -> None:
    """Raise if FSDP has the model already: its parameters are shards, of which no more can be split off."""
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            raise MoeCompileError(
                f"{name or type(model).__name__} is under fully_shard already; call parallelize first, with "
                f"moe_compile.build_mesh(ep=.., dp_shard=..): it calls fully_shard on the dense parameters itself"
            )
