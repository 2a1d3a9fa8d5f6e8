"""Weights in Hugging Face's layout, written from sharded models: `save_safetensors`.

All ranks know the same steps, and take them in the same order.  A step is some tensors of the checkpoint that one rank
writes:

    own       it has them: its experts, where the layout has them one by one, or what is replicated
    in rows   stacked experts, or what FSDP splits: each rank sends it its rows, one shard at a time
    whole     anything that transformers converts from whole tensors: each in turn is gathered

Only the first of the ranks that hold the same sends or writes.
"""

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from moe_compile.errors import MoeCompileError
from moe_compile.parallel import gradients, hf_names
from moe_compile.parallel.folders import on_first, replaced
from moe_compile.parallel.hf_names import Conversion
from moe_compile.parallel.mesh import shard_sizes
from moe_compile.parallel.safetensors_files import INDEX, NAMES, SINGLE, Writer, some
from moe_compile.parallel.shards import holders
from moe_compile.parallel.slots import Slot, firsts, slots

Write = Callable[[Tensor], None]


@torch.no_grad()
def save_safetensors(model: nn.Module, path: str | os.PathLike[str], max_file_bytes: int = 5_000_000_000) -> None:
    """Write a model's weights into a folder, as `from_pretrained` and `load_safetensors` read them.

    All ranks call it, and see the same folder.  A model of transformers is written with its config, in the layout that
    it was loaded from, or else in that of its `save_pretrained`.  Each rank writes files of its own, up to
    `max_file_bytes` long, or as long as the experts of one layer that are saved together.  What the folder held stays
    until the new weights are complete (folders.py); its other files, a tokenizer's, are kept.

    Raises `MoeCompileError` for what is on `meta`, or has a dtype that safetensors does not.
    """
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    if gradients.ATTRIBUTE not in vars(inner) and dist.is_initialized() and dist.get_world_size() > 1:
        raise MoeCompileError("this model is not of parallelize: every rank would write the same files")
    with hf_names.saving(inner):
        steps = _steps(inner)
        with replaced(path, (SINGLE, INDEX), _is_weights) as new:
            _write(steps, new, max_file_bytes)
            on_first(lambda: _write_config(inner, new))


def _is_weights(name: str) -> bool:
    return name in (SINGLE, INDEX) or re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) is not None


def _write_config(model: nn.Module, path: str) -> None:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        return
    config = copy.deepcopy(config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config.save_pretrained(path)
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.save_pretrained(path)


# -- what is written, by whom -------------------------------------------------------------------


@dataclass
class _Step:
    """writer: a rank.  tensors: of the dtypes and shapes that it writes.  run: every rank's part in it."""

    writer: int
    tensors: dict[str, Tensor]
    run: Callable[[Write], None]


def _steps(model: nn.Module) -> list[_Step]:
    own = _once(model, slots(model))
    for name, slot in own.items():
        if slot.tensor.device.type == "meta":
            raise MoeCompileError(f"{name} is on meta, and has no numbers to save")
        if slot.tensor.dtype not in NAMES:
            raise MoeCompileError(f"{name} is {slot.tensor.dtype}, which safetensors have no name for")
    owners = _owners(model)
    found: list[_Step] = []
    for conversion in hf_names.writing(model, {name: slot.meta() for name, slot in own.items()}):
        found += _plan(model, conversion, {name: own[name] for name in conversion.names()}, owners)
    names = [name for step in found for name in step.tensors]
    if twice := {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set():
        raise MoeCompileError(f"several tensors would have one name: {some(sorted(twice))}")
    return found


def _once(model: nn.Module, own: dict[str, Slot]) -> dict[str, Slot]:
    """Without second names of what is shared, and what the class says need not be saved."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    dropped = getattr(model, "_keys_to_ignore_on_save", None) or ()
    kept: dict[tuple[int, int | None], str] = {}
    for name in sorted(own, key=lambda name: name in tied):  # stable: names that others are tied to come first
        kept.setdefault((id(own[name].tensor), own[name].row), name)
    return {name: slot for name, slot in own.items() if name in kept.values() and name not in dropped}


def _owners(model: nn.Module) -> list[int]:
    """The rank of each shard of the experts that writes it."""
    found = [(holder, shards) for _, holder, shards in holders(model)]
    if not found:
        return [0]
    holder, shards = found[0]
    packed = holder._parameters[shards.families[0].name]
    assert packed is not None
    mine = shards.rank if firsts(model)(packed) else None
    every: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return [every.index(i) for i in range(shards.mesh.size())]


def _plan(model: nn.Module, conversion: Conversion, own: dict[str, Slot], owners: list[int]) -> Iterator[_Step]:
    tensors = hf_names.written(model, {name: slot.meta() for name, slot in own.items()})
    slot = next(iter(own.values()))
    if conversion.converter is None and len(own) == 1 and [t.shape for t in tensors.values()] == [slot.meta().shape]:
        yield _plain(tensors, slot, owners)
    elif (steps := _by_expert(model, conversion, own, tensors, owners)) is not None:
        yield from steps
    else:

        def whole(write: Write) -> None:
            gathered = {name: _whole(slot) for name, slot in own.items()}
            if _me() == owners[0]:
                found = hf_names.written(model, gathered)
                for name in tensors:
                    write(found[name])

        yield _Step(owners[0], tensors, whole)


def _plain(tensors: dict[str, Tensor], slot: Slot, owners: list[int]) -> _Step:
    """One tensor, whose name alone may change."""
    if slot.row is not None and _in_rows(slot.tensor):
        sizes = shard_sizes(slot.tensor.shape[0], len(owners))
        writer = owners[next(i for i in range(len(sizes)) if slot.row < sum(sizes[: i + 1]))]
        shard = owners.index(writer)

        def one(write: Write) -> None:
            if slot.shard() == shard:
                weight = slot.rows()  # with all that have a part of it
                if _me() == writer:
                    write(weight)

        return _Step(writer, tensors, one)
    if not isinstance(slot.tensor, DTensor):
        return _Step(0, tensors, lambda write: write(slot.tensor) if _me() == 0 else None)
    if not _in_rows(slot.tensor):

        def whole(write: Write) -> None:
            gathered = _whole(slot)
            if _me() == owners[0]:
                write(gathered)

        return _Step(owners[0], tensors, whole)
    ranks = owners if slot.is_expert else _first_copy(slot.tensor)

    def rows(write: Write) -> None:
        mine = slot.rows() if slot.is_expert else slot.local()
        for rank, piece in zip(ranks, _pieces(slot.tensor, len(ranks)), strict=True):
            if piece.shape[0]:
                _hand(mine, slot.own(piece), rank, ranks[0], write)

    return _Step(ranks[0], tensors, rows)


def _hand(local: Tensor, piece: Tensor, sender: int, writer: int, write: Write) -> None:
    """Have a rank's shard written by another."""
    if _me() == sender == writer:
        write(local)
    elif _me() == sender:
        dist.send(local.contiguous(), writer)
    elif _me() == writer:
        arrived = torch.empty_like(piece, device=local.device)
        dist.recv(arrived, sender)
        write(arrived)


def _by_expert(
    model: nn.Module, conversion: Conversion, own: dict[str, Slot], tensors: dict[str, Tensor], owners: list[int]
) -> list[_Step] | None:
    """A step for each shard of the experts, if its rows become tensors of their own: None, if not.

    Of E experts come groups of E tensors, `w1` of each and `w3` of each.  Those of the first L experts have names
    that show the order; a rank's own are those of its place in each group.
    """
    if not hf_names.written_by_expert(conversion):
        return None
    if not all(s.is_expert and not s.is_flat and s.row is None and _in_rows(s.tensor) for s in own.values()):
        return None
    number = next(iter(own.values())).tensor.shape[0]
    if any(s.tensor.shape[0] != number for s in own.values()) or len(tensors) % number:
        return None
    names = [list(tensors)[i : i + number] for i in range(0, len(tensors), number)]
    steps: list[_Step] = []
    start = 0
    for writer, size in zip(owners, shard_sizes(number, len(owners)), strict=True):
        local = {name: s.meta()[:size] for name, s in own.items()}
        first = list(hf_names.written(model, local))
        if first != [name for group in names for name in group[:size]]:
            return None
        mine = [name for group in names for name in group[start : start + size]]
        steps.append(_own(model, own, dict(zip(first, mine, strict=True)), tensors, writer, len(steps)))
        start += size
    return steps


def _own(
    model: nn.Module,
    own: dict[str, Slot],
    names: dict[str, str],
    tensors: dict[str, Tensor],
    writer: int,
    shard: int,
) -> _Step:
    """names: what transformers calls them, if there were no other experts, and what they are called."""

    def run(write: Write) -> None:
        if next(iter(own.values())).shard() != shard:
            return
        rows = {name: slot.rows() for name, slot in own.items()}
        if _me() == writer:
            found = hf_names.written(model, {name: weight.cpu() for name, weight in rows.items()})
            for name in names:
                write(found[name])

    return _Step(writer, {name: tensors[name] for name in names.values()}, run)


def _in_rows(tensor: Tensor) -> bool:
    """Whether ranks hold rows of it, in their order, and copies of these, or over "edp" parts."""
    if not isinstance(tensor, DTensor):
        return False
    names = tensor.device_mesh.mesh_dim_names or ()
    shards = [p for p, n in zip(tensor.placements, names, strict=True) if not p.is_replicate() and n != "edp"]
    return len(shards) == 1 and type(shards[0]) is Shard and shards[0].dim == 0


def _first_copy(tensor: DTensor) -> list[int]:
    """The ranks that hold the first copy, in the order of the rows.

    A mesh names the ranks of its own copy alone, if it is a part of another: with "tp" others lie beside it.
    """
    index = [slice(None) if p.is_shard() else 0 for p in tensor.placements]
    mine = tensor.device_mesh.mesh[tuple(index)]
    ranks: list[int] = (mine - mine.min()).tolist()
    return ranks


def _pieces(tensor: Tensor, number: int) -> list[Tensor]:
    """On meta: the rows of each shard, as `Shard(0)` has them."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    found = list(whole.chunk(number))
    return found + [whole[:0]] * (number - len(found))


def _whole(slot: Slot) -> Tensor:
    tensor = slot.tensor.full_tensor() if isinstance(slot.tensor, DTensor) else slot.tensor
    return (slot.own(tensor) if slot.row is None else tensor[slot.row]).detach().cpu()


def _me() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


# -- files ----------------------------------------------------------------------------------


def _write(steps: list[_Step], path: str, most: int) -> None:
    """Take the steps; each rank has one file open at a time."""
    files = _files(steps, most)
    names = (
        [SINGLE]
        if len(files) == 1
        else [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    )
    place = {id(step): i for i, file in enumerate(files) for step in file}
    current, writer = -1, None
    for step in steps:
        if step.writer == _me() and place[id(step)] != current:
            if writer is not None:
                writer.close()
            current = place[id(step)]
            tensors = [item for s in files[current] for item in s.tensors.items()]
            writer = Writer(os.path.join(path, names[current]), tensors)
        step.run(writer.write if writer is not None else _nothing)
    if writer is not None:
        writer.close()
    if len(files) > 1:
        on_first(lambda: _write_index(os.path.join(path, INDEX), dict(zip(names, files, strict=True))))


def _nothing(tensor: Tensor) -> None:
    raise AssertionError("a rank without a file has nothing to write")


def _files(steps: list[_Step], most: int) -> list[list[_Step]]:
    """Which steps share a file: of one writer, in their order, up to so many bytes."""
    files: list[list[_Step]] = []
    for writer in sorted({step.writer for step in steps}):
        size = most + 1
        for step in steps:
            if step.writer == writer:
                added = sum(t.nbytes for t in step.tensors.values())
                if size + added > most:
                    files.append([])
                    size = 0
                files[-1].append(step)
                size += added
    return files


def _write_index(path: str, files: dict[str, list[_Step]]) -> None:
    tensors = {name: (file, t) for file, steps in files.items() for step in steps for name, t in step.tensors.items()}
    index = {
        "metadata": {"total_size": sum(t.nbytes for _, t in tensors.values())},
        "weight_map": {name: file for name, (file, _) in sorted(tensors.items())},
    }
    with open(path, "w") as file:
        json.dump(index, file, indent=2)
