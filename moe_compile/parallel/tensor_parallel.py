"""Dense parameters that the user split with torch's `parallelize_module`, over the mesh dimension "tp"."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moe_compile.errors import MoeCompileError
from moe_compile.parallel.find import Experts
from moe_compile.parallel.mesh import tp_mesh


def check(model: nn.Module, mesh: DeviceMesh) -> bool:
    """Whether parameters are split already; raises if another mesh than `mesh["tp"]` has them, or not evenly.

    Ranks have parts of one size: layers between the split ones count on it, as attention does on its heads.
    """
    tp = tp_mesh(mesh)
    found = [(name, p) for name, p in model.named_parameters() if isinstance(p, DTensor)]
    for name, parameter in found:
        if tp is None or parameter.device_mesh != tp:
            wanted = "moe_compile.build_mesh(tp=..) makes one" if tp is None else 'parallelize_module takes mesh["tp"]'
            raise MoeCompileError(f"{name} is a DTensor on {parameter.device_mesh}, which is no part of it: {wanted}")
        for placement in parameter.placements:
            if isinstance(placement, Shard) and (size := parameter.shape[placement.dim]) % tp.size():
                fits = [d for d in range(1, size + 1) if size % d == 0]
                nearest = min(fits, key=lambda d: (abs(d - tp.size()), -d))
                raise MoeCompileError(
                    f"{name} has {size} numbers along dimension {placement.dim}, which tp={tp.size()} does not divide; "
                    f"the nearest that fits is tp={nearest}"
                )
    return bool(found)


def check_experts(found: list[Experts]) -> None:
    """Raise if a plan has experts' weights."""
    for experts in found:
        for family in experts.families:
            if isinstance(experts.holder.get_parameter(family.members[0]), DTensor):
                raise MoeCompileError(
                    f"{family.members[0]} of {type(experts.holder).__name__} is split by a plan already: leave experts "
                    f'out of it, they are split over "ep", and the tokens that ranks along "tp" share among these'
                )
