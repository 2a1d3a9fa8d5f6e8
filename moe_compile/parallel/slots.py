"""What stands behind each name of a model: where a checkpoint's numbers go, and come from.

A rank holds a box of a named tensor: all of it, the rows that are its shard, or nothing.  Of a list of experts, which
is one packed parameter, each name is one row; a flat weight is a stack here, and its rows in the model.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe_compile.errors import MoeCompileError
from moe_compile.parallel import gradients
from moe_compile.parallel.mesh import device_type
from moe_compile.parallel.safetensors_files import some
from moe_compile.parallel.shards import Family, holders

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Slot:
    """tensor: the parameter or buffer.  row: which expert of a packed list.  family: of experts, which "ep" shards."""

    tensor: Tensor
    row: int | None = None
    family: Family | None = None

    @property
    def is_expert(self) -> bool:
        return self.family is not None

    @property
    def is_flat(self) -> bool:
        """Whether the tensor is [E, F, ..] of what the model has as [E * F, ..]."""
        return self.family is not None and self.family.rows > 0

    def own(self, stack: Tensor) -> Tensor:
        """What the model has, of the stack of some experts; other tensors as they are."""
        return stack if self.family is None else self.family.own(stack)

    def meta(self) -> Tensor:
        """A tensor of the shape and dtype that the name stands for."""
        shape = self.tensor.shape if self.family is None else self.family.unstacked(self.tensor.shape)
        return torch.empty(shape, dtype=self.tensor.dtype, device="meta")

    def box(self) -> Box | None:
        """What this rank holds of it, as slices of all dimensions; None for nothing.

        Raises `MoeCompileError` for a DTensor whose rows are not where `Shard` puts them.
        """
        if not isinstance(self.tensor, DTensor):
            return tuple(slice(0, n) for n in self.tensor.shape)
        if not plain(self.tensor):
            raise MoeCompileError(f"a parameter is placed as {self.tensor.placements}, of which no part can be read")
        mesh, placements = self.tensor.device_mesh, self.tensor.placements
        shape, offset = compute_local_shape_and_global_offset(self.tensor.shape, mesh, placements)
        if not math.prod(shape):
            return None
        box = tuple(slice(start, start + n) for start, n in zip(offset, shape, strict=True))
        if self.is_flat:  # never split between the rows of an expert: Family.behind
            return (slice(box[0].start * shape[1], box[0].stop * shape[1]), *box[2:])
        if self.row is None:
            return box
        return box[1:] if self.row in range(box[0].start, box[0].stop) else None

    def local(self) -> Tensor:
        """The memory of that box."""
        tensor = self.tensor
        if not isinstance(tensor, DTensor):
            return tensor.detach()
        local = tensor.to_local().detach()
        return self.own(local) if self.row is None else self._row()

    def _row(self) -> Tensor:
        tensor: Any = self.tensor
        assert self.row is not None
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        mine: Tensor = tensor.to_local().detach()[self.row - offset[0]]
        return mine

    def rows(self) -> Tensor:
        """The whole weights of this rank's experts, or of the one that is named, if it has it.

        Of what is split over "edp" all ranks with the same experts have to ask, and get the same.
        """
        tensor: Any = self.tensor
        if not isinstance(tensor, DTensor) or tensor.device_mesh.ndim == 1 or tensor.placements[0].is_replicate():
            return self.local()
        split: Any = tensor.placements[0]
        if self.row is None:
            whole: Any = tensor.detach()
            local: Tensor = whole.redistribute(placements=[Replicate(), tensor.placements[1]]).to_local()
            return self.own(local)
        shape = tensor.shape[1:]
        stride = torch.empty(shape, device="meta").stride()
        mesh = tensor.device_mesh["edp"]
        part = DTensor.from_local(
            self._row(), mesh, [Shard(split.dim - 1)], run_check=False, shape=shape, stride=stride
        )
        return part.full_tensor()

    def shard(self) -> int:
        """Which shard of the experts this rank has."""
        assert self.is_expert and isinstance(self.tensor, DTensor)
        return int(self.tensor.device_mesh["ep"].get_local_rank())

    def cut(self, whole: Tensor) -> Tensor | None:
        """This rank's part of the whole tensor."""
        if self.row is None and isinstance(self.tensor, DTensor) and not plain(self.tensor):
            mesh, placements = self.tensor.device_mesh, self.tensor.placements
            return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
        box = self.box()
        return None if box is None else whole[box]


def plain(tensor: Tensor) -> bool:
    """Whether a rank's part is one box: no strided shards, nothing yet to be added up."""
    return not isinstance(tensor, DTensor) or all(p.is_replicate() or type(p) is Shard for p in tensor.placements)


def slots(model: nn.Module) -> dict[str, Slot]:
    """Parameters and persistent buffers by the model's own names; what is shared has several."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward without a backward leaves whole parameters
    families = {
        id(holder._parameters[family.name]): family.below(name)
        for name, holder, shards in holders(model)
        for family in shards.families
    }
    found: dict[str, Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise MoeCompileError(
                f"{prefix or type(model).__name__} has extra state, for which safetensors have no place"
            )
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            family = families.get(id(parameter))
            if family is None or not family.listed:
                found[start + name] = Slot(parameter, family=family)
            else:
                found |= {member: Slot(parameter, e, family) for e, member in enumerate(family.members)}
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[start + name] = Slot(buffer)
    return found


def firsts(model: nn.Module) -> Callable[[Tensor], bool]:
    """Whether this rank is the first of those that hold the same of a tensor, in an order that all agree on."""
    averages: gradients.Averages | None = vars(model).get(gradients.ATTRIBUTE)
    if averages is None:
        return lambda tensor: True
    groups: dict[int, list[Any]] = {id(p): g for p, g in averages.copied()}
    return lambda tensor: all(dist.get_rank(group) == 0 for group in groups.get(id(tensor), [None]))


# -- from meta ------------------------------------------------------------------------------


def materialise(model: nn.Module, device: torch.device | None = None) -> None:
    """Give what is on meta memory, each rank for its own shards.  Parameters hold anything, what is shared stays so.

    Buffers that no checkpoint has are computed by transformers' own `_init_weights`.  Raises `MoeCompileError`, and
    changes nothing, if that does not set them.
    """
    if device is None:
        kind = device_type() if dist.is_initialized() else "cpu"
        device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    _compute_buffers(model, device)
    made: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.device.type == "meta":
                    if id(tensor) not in made:
                        made[id(tensor)] = _empty(tensor, device)
                    table[name] = made[id(tensor)]
    if made:
        model.load_state_dict({}, strict=False)  # hooks, FSDP's and ours, see that parameters are others


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    if not isinstance(tensor, DTensor):
        made = torch.empty_like(tensor, device=device)
    else:
        made = DTensor.from_local(
            torch.empty_like(tensor.to_local(), device=device), tensor.device_mesh, tensor.placements,
            run_check=False, shape=tensor.shape, stride=tensor.stride(),
        )  # fmt: skip
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


@torch.no_grad()
def _compute_buffers(model: nn.Module, device: torch.device) -> None:
    before = [(m, n, b) for m, n, _, b in _lost_buffers(model)]
    if not before:
        return
    results: list[list[Tensor]] = []
    for start in (0, 1):  # what they held before must not matter
        for module, name, buffer in before:
            module._buffers[name] = torch.full(buffer.shape, start, dtype=buffer.dtype, device=device)
        for module in dict.fromkeys(m for m, _, _ in before):
            if (initialise := _initialiser(model, module)) is not None:
                initialise(module)
        results.append([m._buffers[n].clone() for m, n, _ in before])  # type: ignore[union-attr]
    unset = [i for i, (a, b) in enumerate(zip(*results, strict=True)) if a.is_meta or not torch.equal(a, b)]
    for module, name, buffer in before:
        if unset:
            module._buffers[name] = buffer
    if unset:
        names = [name for _, _, name, _ in _lost_buffers(model)]
        raise MoeCompileError(
            f"on meta, and in no checkpoint: {some(names[i] for i in unset)}; give these buffers their values first"
        )


def _lost_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta" and name in module._non_persistent_buffers_set:
                yield module, name, f"{prefix}.{name}" if prefix else name, buffer


def _initialiser(model: nn.Module, module: nn.Module) -> Callable[[nn.Module], None] | None:
    """`_init_weights` of the innermost model of transformers that a module belongs to."""
    owners = [m for m in model.modules() if hasattr(m, "_init_weights") and any(c is module for c in m.modules())]
    return owners[-1]._init_weights if owners else None  # type: ignore[return-value]
