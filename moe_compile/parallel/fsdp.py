"""Dense parameters, split by torch's own FSDP2 (`fully_shard`); experts' are none of its business.

The units are the decoder layers: the members of the outermost lists with experts inside.  All else is in the unit of
the whole model.  A unit's dense parameters are gathered before its forward and its backward, and their gradients
averaged over all ranks, which is what gradients.py does with replicated ones.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from moe_compile.errors import MoeCompileError


def units(model: nn.Module, readers: list[nn.Module]) -> list[nn.Module]:
    """The members of the outermost lists that have a reader of experts below one of their members.

    A reader itself is none: FSDP's hooks run in Python, and beside them so would those that gather its experts.
    Nor is one that shares a parameter with what is outside: FSDP would split it twice, and it would be two.
    """
    inside = {id(reader) for reader in readers}
    uses = _uses(model)

    def walk(module: nn.Module, listed: bool) -> Iterator[nn.Module]:
        for child in module.children():
            if listed and _has_forward(child):
                mine = _uses(child)
                if mine and id(child) not in inside and all(uses[p] == number for p, number in mine.items()):
                    yield child
            else:
                is_list = isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
                yield from walk(child, is_list and any(id(m) in inside for m in child.modules() if m is not child))

    return list(walk(model, False))


def _has_forward(module: nn.Module) -> bool:
    """Whether a module can be called, so that hooks can stand around it."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _uses(module: nn.Module) -> Counter[int]:
    """How many names each parameter has."""
    return Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))


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


def refuse_hooks(fn: Any, tx: Any) -> None:
    """Raise if Dynamo is about to trace a hook of FSDP into a graph that must not break, and say what to call."""
    ours = getattr(fn, "__module__", None) or ""
    if ours.startswith("torch.distributed.fsdp._fully_shard") and getattr(tx, "one_graph", False):
        raise MoeCompileError(
            "fullgraph=True over modules under fully_shard: Dynamo does not trace its hooks. Compile each layer: "
            'for layer in layers: layer.compile(backend="moe_ep", fullgraph=True); or the model without fullgraph'
        )
