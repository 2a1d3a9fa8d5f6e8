"""Experts' weights, split over the ranks of a mesh, and what they mean.

A family is one weight of all experts.  It is a DTensor parameter with `Shard(0)` over the mesh dimension "ep", whose
global value is the stack [E, ...].  In the model's own terms it is one stacked parameter, or one parameter of each
module of a list; then the DTensor is a parameter of the list, and the modules' own are None.

A module that holds families is in one of three states:

    sharded    the DTensors are its parameters: for optimizers, checkpoints, and the compiled path
    dense      fake tensors of the global shapes are, under the model's own names: what a proof looks at
    gathered   whole weights are, under the model's own names: for a forward that runs as it was written
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moe_compile.parallel.mesh import shard_sizes
from moe_compile.parts import parts

ATTRIBUTE = "_moe_ep_shards"


@dataclass(frozen=True)
class Family:
    """name: of the DTensor, below the module at hand.  members: the names that the model has for it, in the order of
    the experts; one, if it is stacked.
    """

    name: str
    members: tuple[str, ...]
    num_experts: int

    def below(self, prefix: str) -> "Family":
        """The family as seen from a module further out."""
        start = f"{prefix}." if prefix else ""
        return Family(start + self.name, tuple(start + m for m in self.members), self.num_experts)


@dataclass(frozen=True)
class Placement:
    """Where the experts of a module are: what a pass needs to know, and what makes two proofs differ."""

    ranks: int
    rank: int
    group: str  # the name of the process group of "ep"
    families: tuple[Family, ...]
    tp: int = 1  # how many ranks share the tokens of this one
    tp_rank: int = 0
    tp_group: str = ""


class Shards:
    """The families that `holder` holds, and the state they are in."""

    def __init__(
        self,
        mesh: DeviceMesh,
        families: tuple[Family, ...],
        compute_dtype: torch.dtype | None = None,
        tp: DeviceMesh | None = None,
    ) -> None:
        self.mesh = mesh  # one dimension, "ep"
        self.tp = tp  # the ranks that share their tokens, if there are any
        self.families = families
        self.compute_dtype = compute_dtype  # what forwards read the weights in, if not in their own
        self.state = "sharded"
        self.refused: str | None = None  # why compiled code has to gather, if it has to
        self.averages: Any = None  # what takes the gradients (gradients.py)
        self._fakes: dict[str, Tensor] = {}

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    def own(self, family: Family) -> range:
        """The experts of this rank."""
        sizes = shard_sizes(family.num_experts, self.mesh.size())
        start = sum(sizes[: self.rank])
        return range(start, start + sizes[self.rank])

    def dtype(self, weight: Tensor) -> torch.dtype:
        """What a forward reads a weight in: as FSDP's `param_dtype`, for numbers that are not integers."""
        return weight.dtype if self.compute_dtype is None or not weight.is_floating_point() else self.compute_dtype

    def fakes(self, holder: nn.Module) -> dict[str, Tensor]:
        """Fake parameters of the global shapes, by the model's own names."""
        for family in self.families:
            packed = holder._parameters[family.name]
            assert packed is not None
            whole = tuple(packed.shape if len(family.members) == 1 else packed.shape[1:])
            local = packed.to_local() if isinstance(packed, DTensor) else packed
            alike = (whole, self.dtype(packed), local.device, packed.requires_grad)
            for member in family.members:
                known = self._fakes.get(member)
                if known is None or _kind(known) != alike:
                    with FakeTensorMode():
                        fake = torch.empty(whole, dtype=self.dtype(packed), device=local.device)
                        self._fakes[member] = nn.Parameter(fake, requires_grad=packed.requires_grad)
        return self._fakes

    def put(self, holder: nn.Module, state: str, values: dict[str, Tensor]) -> Callable[[], None]:
        """Make these tensors the parameters under the model's own names; the result undoes it."""
        assert self.state == "sharded", f"experts are {self.state}"
        packed = {family.name: holder._parameters[family.name] for family in self.families}
        for family in self.families:
            if family.members != (family.name,):
                del holder._parameters[family.name]
            for member in family.members:
                _slot(holder, member, values[member])
        self.state = state

        def undo() -> None:
            for family in self.families:
                for member in family.members:
                    _slot(holder, member, None)
            for name, parameter in packed.items():
                holder._parameters[name] = parameter
            self.state = "sharded"

        return undo


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return (tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad)


def _slot(holder: nn.Module, member: str, value: Any) -> None:
    """Set an entry of `_parameters` to any tensor, where it stands."""
    owner, _, name = member.rpartition(".")
    holder.get_submodule(owner)._parameters[name] = value


def shards_of(module: nn.Module) -> Shards | None:
    """What the module itself holds."""
    return vars(module).get(ATTRIBUTE)


def holders(module: nn.Module) -> Iterator[tuple[str, nn.Module, Shards]]:
    """The modules at or below this one that hold families."""
    for name, child in parts(module).modules:
        if (shards := shards_of(child)) is not None:
            yield name, child, shards


def placement(module: nn.Module) -> Placement | None:
    """Where the experts at or below a module are, if they are sharded now."""
    found = [(name, shards) for name, _, shards in holders(module) if shards.state == "sharded"]
    if not found:
        return None
    mesh, tp = found[0][1].mesh, found[0][1].tp
    families = tuple(f.below(name) for name, shards in found for f in shards.families)
    here = Placement(mesh.size(), mesh.get_local_rank(), mesh.get_group().group_name, families)
    if tp is None:
        return here
    return replace(here, tp=tp.size(), tp_rank=tp.get_local_rank(), tp_group=tp.get_group().group_name)


@contextlib.contextmanager
def dense(module: nn.Module) -> Iterator[None]:
    """Give the module its dense meaning: fake parameters of the global shapes, under the model's own names."""
    with contextlib.ExitStack() as stack:
        for _, holder, shards in list(holders(module)):
            if shards.state == "sharded":
                stack.callback(shards.put(holder, "dense", shards.fakes(holder)))
        yield


def as_shard(local: Tensor, family: Family, mesh: DeviceMesh) -> DTensor:
    """This rank's experts [L, ...] as the DTensor of all."""
    shape = torch.Size((family.num_experts, *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local.contiguous(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
