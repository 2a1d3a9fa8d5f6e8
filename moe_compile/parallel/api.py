"""`parallelize`: a model whose experts are split over the ranks of a mesh."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from moe_compile.errors import MoeCompileError
from moe_compile.parallel import fsdp, gather, gradients, state_dicts, tensor_parallel
from moe_compile.parallel.expert_shards import part
from moe_compile.parallel.find import Experts, about_flat_weights, find_experts
from moe_compile.parallel.mesh import check_mesh, dense_mesh, place_of, shard_sizes, split_mesh, tp_mesh
from moe_compile.parallel.shards import ATTRIBUTE, Family, Shards


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    mp_policy: MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool | None = None,
    experts: str = "replicated",
) -> nn.Module:
    """Split the experts of a model over the ranks of `mesh["ep"]`, in place; returns the model.

    Every rank calls it on the whole model, as `build_mesh` made the mesh.  Rank 0's weights become the model's; of
    the experts each rank keeps its own, as DTensor parameters with `Shard(0)`.  All else stays replicated, unless the
    mesh is of `build_mesh(.., dp_shard=..)`: then torch's `fully_shard` splits it, with the decoder layers as units.
    A model on `meta` stays there: `to_empty`, then load it, or initialise it and call
    `moe_compile.parallel.gradients.broadcast(model)`, which gives all copies of a weight the numbers of the first.
    The order of a training script: parallelize, optimizer, `torch.compile(model, backend="moe_ep")`.

    With `dp_shard`, `mp_policy` and `reshard_after_forward` are those of `fully_shard`; experts are computed in
    `param_dtype` too, and kept in their own.  Dynamo does not trace FSDP's hooks, so the model is several graphs:
    `fullgraph=True` works for each layer, `fully_shard`'s units:

        for layer in model.model.layers:
            layer.compile(backend="moe_ep", fullgraph=True)

    With `dp_shard` above `ep` several ranks hold the same experts: "edp" of them, dp_shard / ep.
    `experts="sharded"` splits their weights once more among these, along a dimension behind that of the experts:
    parameters, gradients and optimizer states of a rank are those of E / (ep * edp) experts.  Weights are gathered for
    use, in `param_dtype`, and again for the backward unless `reshard_after_forward=False`; their gradients are
    reduce-scattered in `reduce_dtype`.  Collectives are a part of the graph: `fullgraph=True` holds as before.

    Tensor parallelism comes first, by torch's own plans, on a mesh of `build_mesh(tp=..)`:

        parallelize_module(model, mesh["tp"], {"model.layers.*.self_attn.q_proj": ColwiseParallel(), ...})
        moe_compile.parallelize(model, mesh)

    Plans leave experts out, and give them whole activations: ranks along "tp" have the same tokens, and each runs the
    experts on its part of them.  A parameter between split layers, as a norm of heads, needs a place in the plan.

    Each rank feeds its own batch (those along "tp" the same one), of any size, and takes part in every forward and
    backward.  Gradients are those of the mean over the ranks of their losses, dense and expert ones alike, as
    DistributedDataParallel scales them: after `loss.backward()` an ordinary optimizer takes the step of one process
    that averages the ranks' losses.

    A list of expert modules becomes one stacked DTensor parameter of the list for each weight; the modules' own
    parameters are None.  A flat weight [E * F, D], which the model views as [E, F, D], becomes a DTensor of that shape.
    `state_dict()` has the model's own names and shapes: a stacked weight as a DTensor, of a list the experts of this
    rank.  `load_state_dict` takes the weights of one process, whole, or what `state_dict` gave.

    Experts are found by structure (find.py).  Raises `MoeCompileError` if there are none, or they do not fit the mesh.
    """
    check_mesh(mesh)
    if gradients.ATTRIBUTE in vars(model):
        raise MoeCompileError("this model is parallelized already")
    fsdp.check(model)
    settings = {"mp_policy": mp_policy, "reshard_after_forward": reshard_after_forward}
    settings = {name: value for name, value in settings.items() if value is not None}
    dense = dense_mesh(mesh)
    if settings and dense is None:
        raise MoeCompileError(
            f"{' and '.join(settings)}: for fully_shard, which the mesh does not ask for; make it with "
            f"moe_compile.build_mesh(ep={mesh['ep'].size()}, dp_shard=..)"
        )
    split = split_mesh(mesh, experts)
    is_split = tensor_parallel.check(model, mesh)
    found = find_experts(model)
    if not found:
        raise MoeCompileError(
            f"no experts found in {type(model).__name__}: no function of its modules sums over stacked weights or lists"
            f"{about_flat_weights(model)}"
        )
    tensor_parallel.check_experts(found)
    for one in found:  # before anything changes
        for family in one.families:
            shard_sizes(family.num_experts, mesh["ep"].size())
    averages = gradients.Averages(model, mesh, split is not None)
    vars(model)[gradients.ATTRIBUTE] = averages
    readers: dict[nn.Module, None] = {}
    how: dict[str, Any] = {"regather": reshard_after_forward is not False}
    if mp_policy is not None:
        how |= {"compute_dtype": mp_policy.param_dtype, "reduce_dtype": mp_policy.reduce_dtype}
    for one in found:
        _shard(one, mesh, Shards(mesh["ep"], one.families, tp=tp_mesh(mesh), split=split, **how)).averages = averages
        readers |= dict.fromkeys(one.readers)
    for reader in readers:
        gather.watch(reader)
    gradients.broadcast(model)
    sharded = {p for p, is_expert in averages.parameters() if is_expert}
    if dense is not None:
        fsdp.split(model, dense, list(readers), sharded, **settings)
    if dense is not None or is_split:
        state_dicts.install_dense(model, sharded)
    averages.attach()
    model.register_load_state_dict_post_hook(lambda module, keys: averages.attach())
    return model


def _shard(experts: Experts, mesh: DeviceMesh, shards: Shards) -> Shards:
    holder = experts.holder
    packed = {f.name: nn.Parameter(_split(holder, f, shards, mesh), _needs_grad(holder, f)) for f in experts.families}
    for family in experts.families:
        if family.listed:
            for member in family.members:
                owner, _, name = member.rpartition(".")
                holder.get_submodule(owner)._parameters[name] = None
        holder._parameters[family.name] = packed[family.name]
    vars(holder)[ATTRIBUTE] = shards
    state_dicts.install(holder, shards)
    return shards


def _needs_grad(holder: nn.Module, family: Family) -> bool:
    return holder.get_parameter(family.members[0]).requires_grad


def _split(holder: nn.Module, family: Family, shards: Shards, mesh: DeviceMesh) -> Tensor:
    """The DTensor of a family: rank 0 sends each rank its experts, one shard at a time."""
    weights = [holder.get_parameter(member).detach() for member in family.members]
    sizes = shard_sizes(family.num_experts, shards.mesh.size())
    whole = family.stacked(weights[0].shape)
    dim = shards.split_dim(whole, family)

    def shard(rank: int) -> Tensor:
        i = place_of(mesh, rank, "ep")
        start = sum(sizes[:i])
        mine = slice(start, start + sizes[i])
        rows = torch.stack(weights[mine]) if family.listed else family.stack(weights[0])[mine]
        if dim is not None:
            own = part(whole[dim], shards.edp, place_of(mesh, rank, "edp"))
            rows = rows.narrow(dim, own.start, own.stop - own.start)
        return rows.clone(memory_format=torch.contiguous_format)

    return shards.wrap(_from_first(shard), whole, family)


def _from_first(shard: Callable[[int], Tensor]) -> Tensor:
    """This rank's shard, as rank 0 has it."""
    me = dist.get_rank()
    mine = shard(me)
    if mine.device.type == "meta" or dist.get_world_size() == 1:
        return mine
    for rank in range(1, dist.get_world_size()):
        if me == 0:
            dist.send(shard(rank), rank)
        elif me == rank:
            dist.recv(mine, 0)
    return mine
