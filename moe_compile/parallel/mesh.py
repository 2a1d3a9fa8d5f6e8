"""The device mesh of expert parallelism, and what fits it.

Ranks are laid out as (dp_replicate, edp, ep, tp).  The same ranks in two views:

    experts            split over "ep"; dp_replicate * edp * tp copies of each, or with `parallelize(experts="sharded")`
                       split over "edp" besides, in dp_replicate * tp copies
    dense parameters   replicated; with "edp" in the mesh split over dp_shard = edp * ep ranks, in dp_replicate copies;
                       with "tp" those that the user's plan names are split over its ranks besides

Ranks along "tp" have the same tokens, all others their own.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_compile.errors import MoeCompileError

DIMS = ("dp_replicate", "edp", "ep", "tp")
DENSE = "_moe_ep_dense"
EXPERTS = ("replicated", "sharded")


def build_mesh(
    ep: int | None = None, tp: int = 1, dp_replicate: int | None = None, dp_shard: int | None = None
) -> DeviceMesh:
    """A mesh of all ranks: "dp_replicate" and "ep"; with `dp_shard` also "edp", between them; with `tp` above 1 also
    "tp", behind them.

    ep: over how many ranks the experts are split; by default over all that `dp_replicate` leaves, or over `dp_shard`.
    dp_shard: over how many ranks each dense parameter is split, by FSDP2; a multiple of `ep`, and the dimension "edp"
    is dp_shard / ep.  Without it dense parameters are replicated.
    dp_replicate: how many copies there are, of each expert or, with `dp_shard`, of each dense parameter (HSDP); by
    default what the others leave.
    tp: how many ranks share their tokens, and the work on them: ranks `tp * i` to `tp * i + tp - 1` have to be fed the
    same batch.  `mesh["tp"]` is what torch's `parallelize_module` takes, before `moe_compile.parallelize`.
    The process group must exist (`torchrun` and `dist.init_process_group`); it decides between CUDA and CPU.
    Raises `MoeCompileError` with the nearest degrees that fit, if these do not multiply to the number of ranks.
    """
    if not dist.is_initialized():
        raise MoeCompileError("build_mesh needs a process group: start with torchrun, call dist.init_process_group")
    world = dist.get_world_size()
    for name, degree in (("ep", ep), ("tp", tp), ("dp_replicate", dp_replicate), ("dp_shard", dp_shard)):
        if degree is not None and (not isinstance(degree, int) or degree < 1):
            raise MoeCompileError(f"{name}={degree!r}: it is a number of ranks, 1 to {world}")
    if world % tp:
        raise MoeCompileError(
            f"tp={tp} does not divide the {world} ranks; the nearest that fits is tp={_closest(tp, world)}"
        )
    if dp_shard is not None:
        sizes = _sharded(world, tp, ep, dp_replicate, dp_shard)
    else:
        sizes = _replicated(world, tp, ep, dp_replicate)
    names = tuple(d for d in DIMS if d in sizes and (d != "tp" or tp > 1))
    return init_device_mesh(device_type(), tuple(sizes[d] for d in names), mesh_dim_names=names)


def _replicated(world: int, tp: int, ep: int | None, dp_replicate: int | None) -> dict[str, int]:
    whole = world // tp
    if ep is None:
        ep = max(1, whole // (dp_replicate or 1))
    if dp_replicate is None:
        dp_replicate = max(1, whole // ep)
    if ep * dp_replicate != whole:
        best = _closest(ep, whole)
        raise MoeCompileError(
            f"ep={ep} x dp_replicate={dp_replicate}{_times(tp)} is {ep * dp_replicate * tp} ranks, there are {world}; "
            f"the nearest that fits: ep={best} with dp_replicate={whole // best}{_with(tp)}"
        )
    return {"dp_replicate": dp_replicate, "ep": ep, "tp": tp}


def _sharded(world: int, tp: int, ep: int | None, dp_replicate: int | None, dp_shard: int) -> dict[str, int]:
    whole = world // tp
    if dp_replicate is None:
        dp_replicate = max(1, whole // dp_shard)
    if dp_shard * dp_replicate != whole:
        best = _closest(dp_shard, whole)
        raise MoeCompileError(
            f"dp_shard={dp_shard} x dp_replicate={dp_replicate}{_times(tp)} is {dp_shard * dp_replicate * tp} ranks, "
            f"there are {world}; the nearest that fits: dp_shard={best} with dp_replicate={whole // best}{_with(tp)}"
        )
    if ep is None:
        ep = dp_shard
    if dp_shard % ep:
        fits = f"ep={_closest(ep, dp_shard)}"
        if whole % ep == 0:
            larger = min(d for d in _divisors(whole) if d % ep == 0)
            fits += f", or dp_shard={larger} with dp_replicate={whole // larger}"
        raise MoeCompileError(
            f"ep={ep} does not divide dp_shard={dp_shard}: experts are split among the ranks that share the dense "
            f"parameters; the nearest that fits: {fits}"
        )
    return {"dp_replicate": dp_replicate, "edp": dp_shard // ep, "ep": ep, "tp": tp}


def _times(tp: int) -> str:
    return f" x tp={tp}" if tp > 1 else ""


def _with(tp: int) -> str:
    return f" and tp={tp}" if tp > 1 else ""


def dense_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """What `fully_shard` gets: ("dp_shard",), with copies ("dp_replicate", "dp_shard"); None if nothing is sharded."""
    names = mesh.mesh_dim_names or ()
    if "edp" not in names:
        return None
    if (known := vars(mesh).get(DENSE)) is None:
        shard = mesh["edp"].size() * mesh["ep"].size()
        ranks = mesh.mesh.reshape(-1, shard)
        if tp_mesh(mesh) is not None:  # fully_shard joins its mesh with "tp", so both have to come from one
            known = mesh["edp", "ep"]._flatten("dp_shard")
            if mesh["dp_replicate"].size() > 1:
                known = DeviceMesh._concatenate([mesh["dp_replicate"], known])
        elif len(ranks) == 1:
            known = DeviceMesh(mesh.device_type, ranks[0], mesh_dim_names=("dp_shard",))
        else:
            known = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=("dp_replicate", "dp_shard"))
        setattr(mesh, DENSE, known)
    return known


def device_type() -> str:
    """Where the collectives of the default process group work."""
    return "cuda" if torch.cuda.is_available() and "nccl" in str(dist.get_backend()) else "cpu"


def _closest(degree: int, whole: int) -> int:
    """The divisor of `whole` that is next to a degree."""
    return min(_divisors(whole), key=lambda d: (abs(d - degree), -d))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def check_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh, if experts can be placed on it: all ranks, dimension "ep", and none but those of `DIMS`."""
    names = mesh.mesh_dim_names or ()
    if "ep" not in names or names != tuple(d for d in DIMS if d in names):
        raise MoeCompileError(
            f'the mesh has dimensions {names or "without names"}; parallelize takes "ep", with or without '
            f'"dp_replicate" and "edp" before it and "tp" behind it, as moe_compile.build_mesh makes them'
        )
    if mesh.size() != dist.get_world_size():
        raise MoeCompileError(
            f"the mesh has {mesh.size()} ranks, there are {dist.get_world_size()}: all must take part"
        )
    if mesh.mesh.flatten().tolist() != list(range(mesh.size())):
        raise MoeCompileError(f"the mesh has its ranks in another order than 0..{mesh.size() - 1}")
    return mesh


def tp_mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """The ranks that share the tokens of this one, if there are others."""
    names = mesh.mesh_dim_names or ()
    return mesh["tp"] if "tp" in names and mesh["tp"].size() > 1 else None


def place_of(mesh: DeviceMesh, rank: int, dim: str) -> int:
    """Where a rank of the whole mesh is along a dimension: along "ep", which shard of the experts it holds."""
    place = (mesh.mesh == rank).nonzero()[0].tolist()
    return int(place[(mesh.mesh_dim_names or ()).index(dim)])


def split_mesh(mesh: DeviceMesh, experts: str) -> DeviceMesh | None:
    """What experts' weights are split over beside "ep": ("edp", "ep"), if they are to be "sharded" over copies.

    Raises `MoeCompileError`, with what fits, if the mesh has no "edp".
    """
    if experts not in EXPERTS:
        raise MoeCompileError(f"experts={experts!r}: known are {' and '.join(map(repr, EXPERTS))}")
    if experts == "replicated":
        return None
    if "edp" not in (mesh.mesh_dim_names or ()):
        ep, tp = mesh["ep"].size(), 1 if (shared := tp_mesh(mesh)) is None else shared.size()
        copies = mesh.size() // ep // tp
        fits = f"moe_compile.build_mesh(ep={ep}, dp_shard={ep * copies}{f', tp={tp}' if tp > 1 else ''})"
        if copies == 1:
            fits += ", which has one copy of each expert: there is nothing to split until ep is smaller"
        raise MoeCompileError(
            f'experts="sharded": over the ranks of "edp", which are those of dp_shard that hold the same experts, and '
            f"the mesh has dimensions {mesh.mesh_dim_names}; make it with {fits}"
        )
    return mesh["edp", "ep"] if mesh["edp"].size() > 1 else None


def shard_sizes(num_experts: int, ranks: int) -> list[int]:
    """How many experts each rank holds: DTensor's `Shard(0)`, as even as full shards first allow.

    Raises `MoeCompileError` if a rank would hold none.
    """
    sizes = _sizes(num_experts, ranks)
    if sizes[-1] == 0:
        fits = [r for r in range(1, num_experts + 1) if _sizes(num_experts, r)[-1]]
        nearest = min(fits, key=lambda r: (abs(r - ranks), -r))
        raise MoeCompileError(
            f"{num_experts} experts over ep={ranks} ranks: shards of {sizes[0]} leave {sizes.count(0)} ranks without "
            f"an expert; the nearest that fits is ep={nearest}"
        )
    return sizes


def _sizes(num_experts: int, ranks: int) -> list[int]:
    longest = -(-num_experts // ranks)
    return [max(0, min(longest, num_experts - r * longest)) for r in range(ranks)]
