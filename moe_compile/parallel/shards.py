"""Experts' weights, split over the ranks of a mesh, and what they mean.

A family is one weight of all experts.  It is a DTensor parameter with `Shard(0)` over the mesh dimension "ep", whose
global value is the stack [E, ...]; on a mesh ("edp", "ep") it may be split further (expert_shards.py).  In the model's
own terms it is one stacked parameter; or one parameter with the experts' rows below each other, [E * rows, ...], flat;
or one parameter of each module of a list: then the DTensor is a parameter of the list, and the modules' own are None.

A module that holds families is in one of three states:

    sharded    the DTensors are its parameters: for optimizers, checkpoints, and the compiled path
    dense      fake tensors of the global shapes are, under the model's own names: what a proof looks at
    gathered   whole weights are, under the model's own names: for a forward that runs as it was written
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe_compile.parallel.expert_shards import part, split_dim
from moe_compile.parallel.mesh import shard_sizes
from moe_compile.parallel.uneven import Rows
from moe_compile.parts import parts

ATTRIBUTE = "_moe_ep_shards"


@dataclass(frozen=True)
class Family:
    """name: of the DTensor, below the module at hand.  members: the names that the model has for it, in the order of
    the experts; one, if it is stacked.  rows: of an expert, if the model's own parameter is flat, else 0.
    """

    name: str
    members: tuple[str, ...]
    num_experts: int
    rows: int = 0

    def below(self, prefix: str) -> "Family":
        """The family as seen from a module further out."""
        start = f"{prefix}." if prefix else ""
        return replace(self, name=start + self.name, members=tuple(start + m for m in self.members))

    @property
    def listed(self) -> bool:
        """Whether the model has a parameter for each expert."""
        return self.members != (self.name,)

    @property
    def behind(self) -> int:
        """The first dimension along which a stack may be split over "edp": what a rank has of a flat one is a box."""
        return 2 if self.rows else 1

    def stack(self, own: Tensor) -> Tensor:
        """The stack [L, ...] of what the model has for some experts in one parameter."""
        return own.unflatten(0, (-1, self.rows)) if self.rows else own

    def own(self, stack: Tensor) -> Tensor:
        """What the model has in one parameter, of the stack of some experts."""
        return stack.flatten(0, 1) if self.rows else stack

    def stacked(self, own: Sequence[int]) -> tuple[int, ...]:
        """The shape of the stack, of that of one parameter of the model."""
        if len(self.members) > 1:
            return (self.num_experts, *own)
        return (own[0] // self.rows, self.rows, *own[1:]) if self.rows else tuple(own)

    def unstacked(self, stack: Sequence[int]) -> tuple[int, ...]:
        """The shape of a parameter of the model, of that of the stack."""
        if len(self.members) > 1:
            return tuple(stack[1:])
        return (stack[0] * stack[1], *stack[2:]) if self.rows else tuple(stack)


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
    edp: int = 1  # over how many ranks the same experts are split
    edp_rank: int = 0
    edp_group: str = ""
    reduce_dtype: torch.dtype | None = None  # of gradients that travel over "edp", if not that of the forward
    regather: bool = True  # for the backward; else what is gathered over "edp" is kept


class Shards:
    """The families that `holder` holds, and the state they are in."""

    def __init__(
        self,
        mesh: DeviceMesh,
        families: tuple[Family, ...],
        compute_dtype: torch.dtype | None = None,
        tp: DeviceMesh | None = None,
        split: DeviceMesh | None = None,
        reduce_dtype: torch.dtype | None = None,
        regather: bool = True,
    ) -> None:
        self.mesh = mesh  # one dimension, "ep"
        self.tp = tp  # the ranks that share their tokens, if there are any
        self.split = split  # ("edp", "ep"), if the ranks that hold the same experts have a part of each
        self.reduce_dtype, self.regather = reduce_dtype, regather
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

    @property
    def edp(self) -> int:
        """Over how many ranks the same experts are split."""
        return 1 if self.split is None else self.split.size(0)

    def split_dim(self, whole: Sequence[int], family: Family) -> int | None:
        """The dimension of a stack [E, ...] along which they are; None if each has all."""
        return None if self.split is None else split_dim(whole, self.edp, family.behind)

    def place(self, rows: Tensor, family: Family) -> DTensor:
        """The DTensor of a family, of whole weights [L, ...] of this rank's experts."""
        shape = (family.num_experts, *rows.shape[1:])
        if self.split is not None and (dim := self.split_dim(shape, family)) is not None:
            mine = part(shape[dim], self.edp, self.split.get_local_rank(0))
            rows = rows.narrow(dim, mine.start, mine.stop - mine.start)
        return self.wrap(rows, shape, family)

    def wrap(self, local: Tensor, shape: Sequence[int], family: Family) -> DTensor:
        """The DTensor of a stack of this shape, of what this rank holds of it."""
        mesh, placements = self.mesh, [Shard(0)]
        if self.split is not None:
            dim = self.split_dim(shape, family)
            mesh, placements = self.split, [Replicate() if dim is None else Shard(dim), Shard(0)]  # type: ignore[list-item]
        return _dtensor(local.contiguous(), mesh, placements, shape)

    def own_of(self, packed: Tensor, family: Family) -> Tensor:
        """A flat weight, or what an optimizer holds for it, as the model has it; of the stack, whose memory it shares.

        A DTensor where each rank has as many experts, else `Rows`: no DTensor has other sizes than `Shard`'s.
        """
        if not isinstance(packed, DTensor) or packed.dim() < 2:
            return packed
        mesh, shape = packed.device_mesh, family.unstacked(packed.shape)
        local = family.own(packed.to_local())
        placements = [Shard(p.dim - 1) if isinstance(p, Shard) and p.dim else p for p in packed.placements]
        if family.num_experts % self.mesh.size() == 0:
            return _dtensor(local, mesh, placements, shape)
        offsets = [self.own(family).start * family.rows] + [0] * (len(shape) - 1)
        for i, p in enumerate(placements):
            if isinstance(p, Shard) and p.dim:
                offsets[p.dim] = part(shape[p.dim], mesh.size(i), mesh.get_local_rank(i)).start
        return Rows(local.detach(), tuple(offsets), shape)

    def of_one(self, packed: Tensor, i: int) -> Tensor:
        """The weight of the i-th expert of this rank, in the memory of all: a DTensor if it is split over "edp"."""
        local = packed.to_local() if isinstance(packed, DTensor) else packed
        mine = local[i]
        if self.split is None or not isinstance(packed, DTensor) or (dim := self._dim_of(packed)) is None:
            return mine
        return _dtensor(mine, self.split["edp"], [Shard(dim - 1)], packed.shape[1:])

    def _dim_of(self, packed: DTensor) -> int | None:
        """Along which dimension it is split over "edp"."""
        placement = packed.placements[0]
        return placement.dim if packed.device_mesh.ndim > 1 and isinstance(placement, Shard) else None

    def dtype(self, weight: Tensor) -> torch.dtype:
        """What a forward reads a weight in: as FSDP's `param_dtype`, for numbers that are not integers."""
        return weight.dtype if self.compute_dtype is None or not weight.is_floating_point() else self.compute_dtype

    def fakes(self, holder: nn.Module) -> dict[str, Tensor]:
        """Fake parameters of the global shapes, by the model's own names."""
        for family in self.families:
            packed = holder._parameters[family.name]
            assert packed is not None
            whole = family.unstacked(packed.shape)
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
            if family.listed:
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


def _dtensor(local: Tensor, mesh: DeviceMesh, placements: Sequence[Any], shape: Sequence[int]) -> DTensor:
    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


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
    if (split := found[0][1].split) is not None:
        edp, shards = split["edp"], found[0][1]
        here = replace(
            here, edp=edp.size(), edp_rank=edp.get_local_rank(), edp_group=edp.get_group().group_name,
            reduce_dtype=shards.reduce_dtype, regather=shards.regather,
        )  # fmt: skip
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
