"""Checkpoints of a model and its optimizer, by the model's own names: `save_checkpoint`, `load_checkpoint`.

torch.distributed.checkpoint writes each shard once, and reads what a rank needs: the number of ranks and the degrees of
the mesh may be others when training goes on, and a model on one process reads them too.

A list of experts is one stacked parameter to the optimizer; in its state dict it becomes the weights of the list again,
of which each rank has its own experts', or all (`full`).  A flat weight [E * F, D], of which it is [E, F, D], has the
model's shape.
"""

import os
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moe_compile.errors import MoeCompileError
from moe_compile.parallel.folders import agree, complete, replaced
from moe_compile.parallel.shards import Family, Shards, holders

METADATA = ".metadata"  # written last, by torch.distributed.checkpoint
State = dict[str, Any]
Families = dict[str, tuple[Family, Shards]]


def save_checkpoint(model: nn.Module, optimizer: Optimizer | None, path: str | os.PathLike[str]) -> None:
    """Write the weights and the optimizer's state into a directory; all ranks call it, and see the same directory.

    What was saved there before stays until the new checkpoint is complete (folders.py): a job that is killed while it
    saves leaves the last one to be loaded.  Other files in the directory are kept.
    """
    model = _original(model)
    with replaced(path, (METADATA,), lambda name: name == METADATA or name.endswith(".distcp")) as new:
        dcp.save(_states(model, optimizer)[0], checkpoint_id=new)


def load_checkpoint(model: nn.Module, optimizer: Optimizer | None, path: str | os.PathLike[str]) -> None:
    """Read what `save_checkpoint` wrote; bitwise the same, whatever the number of ranks and the degrees were.

    `optimizer` has the model's parameters, in the groups that it had; None leaves its state in the file.
    Raises `MoeCompileError`, on all ranks, if there is no checkpoint or it is of another model.
    """
    model = _original(model)
    states, packed = _states(model, optimizer)
    names = [set(group["params"]) for group in states.get("optimizer", {}).get("param_groups", [])]
    path = complete(path, (METADATA,))
    agree(_misfit(states, _translated(model), path))
    dcp.load(states, checkpoint_id=path)
    set_model_state_dict(model, states["model"], options=StateDictOptions(strict=False))  # of a list, a rank's own
    if optimizer is not None:
        for i, (mine, read) in enumerate(zip(packed["param_groups"], states["optimizer"]["param_groups"], strict=True)):
            if set(read["params"]) != names[i]:
                raise MoeCompileError(f"group {i} of the optimizer has other parameters in {os.fspath(path)}")
            mine |= {k: v for k, v in read.items() if k != "params"}
        set_optimizer_state_dict(model, optimizer, packed)


def model_state(model: nn.Module, full: bool = False) -> State:
    """The weights by the model's own names.  full: whole tensors on every rank; else what this rank holds.

    As in all state dicts of torch, values may share memory with the model.
    """
    model = _original(model)
    state: State = get_model_state_dict(model)
    if not full:
        return state
    translated = _translated(model)
    members = {member for family, _ in translated.values() for member in family.members}
    state = {name: value if name in members else _whole(value) for name, value in state.items()}
    for family, _ in translated.values():
        whole = _whole(model.get_parameter(family.name).detach())
        state.update(zip(family.members, whole.unbind(0) if family.listed else [family.own(whole)], strict=True))
    return state


def optimizer_state(model: nn.Module, optimizer: Optimizer, full: bool = False) -> State:
    """{"state": what the optimizer holds, by the model's own names; "param_groups"}, as torch's state dicts are."""
    model = _original(model)
    return _own_names(get_optimizer_state_dict(model, optimizer), _translated(model), full)


# -- help -----------------------------------------------------------------------------------


def _original(model: nn.Module) -> nn.Module:
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def _states(model: nn.Module, optimizer: Optimizer | None) -> tuple[State, State]:
    """(what is written or read, in place, by the model's own names; the optimizer's, as the optimizer has it)."""
    states: State = {"model": model_state(model)}
    packed: State = {}
    if optimizer is not None:
        packed = get_optimizer_state_dict(model, optimizer)
        states["optimizer"] = _own_names(packed, _translated(model), full=False)
    return states, packed


def _translated(model: nn.Module) -> Families:
    """The families that the model has in another shape or under other names, by the names of their parameters."""
    found = [(f.below(name), shards) for name, _, shards in holders(model) for f in shards.families]
    return {family.name: (family, shards) for family, shards in found if family.listed or family.rows}


def _own_names(packed: State, translated: Families, full: bool) -> State:
    state: State = {}
    for name, values in packed["state"].items():
        if name not in translated:
            state[name] = {k: _whole(v) if full else v for k, v in values.items()}
            continue
        family, shards = translated[name]
        if not family.listed:
            state[name] = {k: _of_flat(v, family, shards, full) for k, v in values.items()}
            continue
        own = range(family.num_experts) if full else shards.own(family)
        for i, e in enumerate(own):
            state[family.members[e]] = {k: _of_one(_whole(v) if full else v, i, shards) for k, v in values.items()}
    groups = []
    for group in packed["param_groups"]:
        names = [m for n in group["params"] for m in (translated[n][0].members if n in translated else (n,))]
        groups.append({**group, "params": names})
    return {"state": state, "param_groups": groups}


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _of_one(value: Any, i: int, shards: Shards) -> Any:
    """An expert's part of what the optimizer holds for all, which shares its memory."""
    if not isinstance(value, Tensor) or not value.dim():
        return value.to_local() if isinstance(value, DTensor) else value
    return shards.of_one(value, i)


def _of_flat(value: Any, family: Family, shards: Shards, full: bool) -> Any:
    """What the optimizer holds for a flat weight, in the shape that the model has."""
    if not isinstance(value, Tensor) or not value.dim():
        return value.to_local() if isinstance(value, DTensor) else value
    return family.own(_whole(value)) if full else shards.own_of(value, family)


def _misfit(states: State, translated: Families, path: str | os.PathLike[str]) -> str | None:
    """Why a checkpoint is not of these states, if it is not."""
    if not os.path.exists(os.path.join(path, METADATA)):
        return f"there is no checkpoint in {os.fspath(path)}"
    found = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    groups = {name.split(".")[2] for name in found if name.startswith("optimizer.param_groups.")}
    if "optimizer" in states and len(groups) != (number := len(states["optimizer"]["param_groups"])):
        return f"the checkpoint in {os.fspath(path)} has {len(groups)} groups of parameters, the optimizer {number}"
    wanted = {f"model.{n}": v for n, v in states["model"].items()}
    for name, values in states.get("optimizer", {}).get("state", {}).items():
        wanted |= {f"optimizer.state.{name}.{k}": v for k, v in values.items()}
    for name, value in wanted.items():
        if name not in found:
            return f"the checkpoint in {os.fspath(path)} has no {name}"
        size = getattr(found[name], "size", None)
        if isinstance(value, Tensor) and size is not None and size != value.shape:
            return f"{name} is {tuple(size)} in the checkpoint in {os.fspath(path)}, and {tuple(value.shape)} here"
    others = {f"model.{member}" for family, _ in translated.values() for member in family.members}  # of other ranks
    for name in found:
        if name.startswith("model.") and name not in wanted and name not in others:
            return f"the checkpoint in {os.fspath(path)} has {name}, and this model has not"
    if "optimizer" in states and not states["optimizer"]["state"]:
        if any(name.startswith("optimizer.state.") for name in found):
            return "the optimizer holds nothing yet, and its parameters have gradients: call zero_grad first"
    return None
