"""Weights in Hugging Face's layout, read into sharded models: `load_safetensors`.  Written: hf_save.py."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_compile.errors import MoeCompileError
from moe_compile.parallel import gradients, hf_names
from moe_compile.parallel.folders import agree, complete
from moe_compile.parallel.hf_names import Conversion
from moe_compile.parallel.safetensors_files import INDEX, SINGLE, Files, some
from moe_compile.parallel.slots import Slot, firsts, materialise, plain, slots

REALS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


@torch.no_grad()
def load_safetensors(model: nn.Module, path: str | os.PathLike[str], device: torch.device | None = None) -> nn.Module:
    """Read a model's weights from `model.safetensors`, or from the files of `model.safetensors.index.json`.

    path: a folder with one of them, a file, or an index.  Names and layout are those that `from_pretrained` takes: for
    classes of transformers 5 its own conversions run, others are read by the names of their state dict.  Of a model of
    `parallelize` each rank reads its own shards, one of the ranks that hold the same reads for all, and all ranks have
    to call it.  What is on `meta` gets memory, for a rank's own shards alone, on `device` or where the process group
    works; parameters are then others, so the optimizer comes after.  Numbers are converted to the parameters' dtype.
    Returns the model.

    Raises `MoeCompileError`, on all ranks, before anything is read or changed, if there is no checkpoint, or it does
    not fit: the names that are missing, unexpected, of another shape or of a dtype that is no plain number (quantized
    weights).
    """
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    together = gradients.ATTRIBUTE in vars(inner)
    found: list[tuple[Files, dict[str, Slot], list[_Reading]]] = []
    _attempt(lambda: found.append(_plan(inner, path)), together)
    files, own, readings = found[0]
    materialise(inner, device)
    own = slots(inner)
    _attempt(lambda: _read(inner, files, own, readings), together)
    if together:
        gradients.broadcast(inner)
    return model


def _attempt(work: Callable[[], None], together: bool) -> None:
    """Raise on all ranks what one of them cannot do."""
    problem = None
    try:
        work()
    except (MoeCompileError, OSError) as error:
        problem = str(error)
    if together:
        agree(problem)
    elif problem is not None:
        raise MoeCompileError(problem)


@dataclass
class _Reading:
    """A conversion, the names of the model that come of it, and whether a rank converts its own experts alone."""

    conversion: Conversion
    names: list[str]
    by_expert: bool


def _plan(model: nn.Module, path: str | os.PathLike[str]) -> tuple[Files, dict[str, Slot], list[_Reading]]:
    """What to read for what, from the headers of the files; raises if that is not the model."""
    files, own = Files(complete(path, (SINGLE, INDEX))), slots(model)
    meta = {name: slot.meta() for name, slot in own.items()}
    conversions, unexpected, used = hf_names.reading(model, meta, list(files.entries))
    readings, wrong, reached = [], [], set()
    for conversion in conversions:
        sources = {name: files.meta(name) for name in conversion.names()}
        made = conversion.convert(model, sources)
        for name, tensor in made.items():
            if name not in own:
                unexpected.append(name)
                continue
            slot = own[name]
            reached.add((id(slot.tensor), slot.row))
            if tensor.shape != meta[name].shape:
                wrong.append(f"{name} is {tuple(tensor.shape)}, and {tuple(meta[name].shape)} here")
            for source, t in sources.items():
                if t.dtype != meta[name].dtype and not {t.dtype, meta[name].dtype} <= REALS:
                    wrong.append(f"{source} is {t.dtype}, and {name} {meta[name].dtype}")
        if not unexpected and not wrong:
            readings.append(_Reading(conversion, list(made), _by_expert(conversion, sources, [own[n] for n in made])))
    missing = [name for name, slot in own.items() if (id(slot.tensor), slot.row) not in reached]
    problems = {"missing": missing, "unexpected": unexpected, "wrong": wrong}
    if said := [f"{kind}: {some(sorted(names))}" for kind, names in problems.items() if names]:
        raise MoeCompileError(
            f"the checkpoint in {files.path} is not of this {type(model).__name__}; {'; '.join(said)}"
        )
    if used is not None:
        model._weight_conversions = used  # type: ignore[assignment]
    return files, own, readings


def _by_expert(conversion: Conversion, sources: dict[str, Tensor], targets: list[Slot]) -> bool:
    shapes = {slot.tensor.shape[:1] for slot in targets}
    dims = {len(slot.tensor.shape) - 1 for slot in targets}
    if len(shapes) != 1 or not all(s.is_expert and not s.is_flat and s.row is None for s in targets):
        return False
    return {t.dim() for t in sources.values()} == dims and conversion.by_expert(next(iter(shapes))[0])


def _read(model: nn.Module, files: Files, own: dict[str, Slot], readings: list[_Reading]) -> None:
    first = firsts(model)
    done: set[tuple[int, int | None]] = set()
    for reading in readings:
        mine = {name: own[name] for name in reading.names if first(own[name].tensor)}
        for name, value in _values(model, files, reading, mine).items() if mine else ():
            slot = mine[name]
            local = slot.local()
            if value.shape != local.shape:
                raise MoeCompileError(f"{name}: {tuple(value.shape)} was read for {tuple(local.shape)}")
            if (id(slot.tensor), slot.row) in done and not torch.equal(local, value.to(local)):
                raise MoeCompileError(f"{name} is another tensor in {files.path}, and shared with others here")
            done.add((id(slot.tensor), slot.row))
            local.copy_(value)


def _values(model: nn.Module, files: Files, reading: _Reading, mine: dict[str, Slot]) -> dict[str, Tensor]:
    """This rank's part of some tensors."""
    names = reading.conversion.names()
    if reading.conversion.converter is None:
        ((name, slot),) = mine.items()
        if slot.row is None and not plain(slot.tensor):
            return _cut(mine, {name: files.read(names[0])})
        box = slot.box()
        return {} if box is None else {name: files.read(names[0], box)}
    dtype = next(iter(mine.values())).tensor.dtype  # before they are converted, as `from_pretrained` does
    if not reading.by_expert:
        return _cut(mine, reading.conversion.convert(model, {n: files.read(n).to(dtype) for n in names}))
    boxes = {name: box for name, slot in mine.items() if (box := slot.box()) is not None}
    if not boxes:
        return {}
    experts = next(iter(boxes.values()))[0]
    chosen = [n for found in reading.conversion.sources.values() for n in found[experts]]
    rows = reading.conversion.convert(model, {n: files.read(n).to(dtype) for n in chosen})
    return {name: rows[name][(slice(None), *box[1:])] for name, box in boxes.items()}


def _cut(mine: dict[str, Slot], whole: dict[str, Tensor]) -> dict[str, Tensor]:
    cut = {name: slot.cut(whole[name]) for name, slot in mine.items()}
    return {name: value for name, value in cut.items() if value is not None}
