"""Names in a checkpoint and names of a model: transformers' own conversions, where it has some.

transformers 5 keeps experts stacked where its checkpoints may have them one by one, under other names:
`experts.0.w1.weight` and `experts.0.w3.weight` are rows of `experts.gate_up_proj`.  Which belong together, and what is
done to them, is transformers' mapping for the class, as `from_pretrained` and `save_pretrained` use it; here it runs on
meta tensors first, so what does not fit is known before a byte is read.  A model of any other kind has one name for
each tensor.

    by expert   every op treats experts alike and apart, so that a rank converts its own
    whole       anything else: converted from whole tensors
"""

import contextlib
import copy
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from moe_compile.errors import MoeCompileError

# What these ops do along dimensions other than the first they do to each expert by itself.
APART = ("Concatenate", "Chunk", "Interleave")


@dataclass
class Conversion:
    """sources: names, in order, by the pattern that they match.  target: the first name that they become."""

    target: str
    sources: dict[str, list[str]] = field(default_factory=dict)
    converter: Any = None  # None: one name, one tensor

    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    def convert(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What tensors, by their names, become, by the names of the model."""
        if self.converter is None:
            return {self.target: tensors[self.names()[0]]}
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                if name in tensors:
                    converter.add_tensor(self.target, name, pattern, tensors[name])
        try:
            found = converter.convert(self.target, model=model, config=model.config)
        except Exception as error:  # theirs may be any
            raise MoeCompileError(f"{self.target} cannot be made of {self.names()[0]}: {error}") from error
        return {name: t[0] if isinstance(t, list) else t for name, t in found.items()}

    def by_expert(self, num_experts: int) -> bool:
        """Whether each expert's tensors become its rows, and nothing else."""
        ops = self.converter.operations if self.converter is not None else []
        if not ops or type(ops[0]).__name__ != "MergeModulelist" or ops[0].dim != 0 or not _apart(ops[1:]):
            return False
        for names in self.sources.values():
            if not _numbered(names, num_experts):
                raise MoeCompileError(
                    f"{self.target} has {num_experts} experts, and the checkpoint {len(names)} tensors such as "
                    f"{names[0]}, not numbered from 0 on"
                )
        return True


def _apart(ops: list[Any]) -> bool:
    return all(type(op).__name__ in APART and op.dim > 0 and _is_theirs(op) for op in ops)


def _is_theirs(op: Any) -> bool:
    return type(op).__module__ == "transformers.core_model_loading"


def _numbered(names: list[str], number: int) -> bool:
    """Whether names differ in one number alone, which counts from 0."""
    parts = [re.split(r"(\d+)", name) for name in names]
    if len(names) != number or len({len(p) for p in parts}) != 1:
        return False
    columns = [c for c in zip(*parts, strict=True) if len(set(c)) > 1]
    return columns == [tuple(str(i) for i in range(number))] or number == 1


def reading(
    model: nn.Module, own: dict[str, Tensor], names: list[str]
) -> tuple[list[Conversion], list[str], list[Any] | None]:
    """(what becomes of the names of a checkpoint, those that no name of the model is made of, what was of use of
    transformers' mapping, which `from_pretrained` leaves with the model for `save_pretrained`).

    own: tensors on meta by the model's names.
    """
    if (theirs := _transformers(model)) is None:
        others = _not_ignored(model, [n for n in names if n not in own])
        return [Conversion(n, {n: [n]}) for n in names if n in own], others, None
    mapping = _mapping(model)
    renamings = [m for m in mapping if isinstance(m, theirs.WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, theirs.WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    found: dict[str, Conversion] = {}
    unexpected = []
    for name in sorted(names, key=theirs.dot_natural_key):
        target, pattern = theirs.rename_source_key(name, renamings, converters, prefix, own)
        if target not in own and name in own:
            target, pattern = theirs.rename_source_key(name, [], [], prefix, own)
        if target not in own:
            unexpected.append(name)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        known = found.setdefault(target, Conversion(target, converter=converter))
        if known.converter is not converter or (converter is None and known.sources):
            raise MoeCompileError(f"{target} is made of {known.names()[0]}, and of {name}")
        known.sources.setdefault(pattern or name, []).append(name)
    return list(found.values()), _not_ignored(model, unexpected), [m for m in mapping if m.was_used()]


def _not_ignored(model: nn.Module, unexpected: list[str]) -> list[str]:
    """Without what the model's class says that checkpoints may have beside its weights."""
    if _transformers(model) is not None:
        info = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unexpected))
        model._adjust_missing_and_unexpected_keys(info)  # type: ignore[operator]
        return [name for name in unexpected if name in info.unexpected_keys]
    patterns: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    return [name for name in unexpected if not any(re.search(p, name) for p in patterns)]


def writing(model: nn.Module, own: dict[str, Tensor]) -> list[Conversion]:
    """What names of the model are saved together."""
    if (theirs := _transformers(model)) is None:
        return [Conversion(n, {n: [n]}) for n in own]
    mapping = [m.reverse_transform() for m in _mapping_of(model)[::-1]]
    converters = [m for m in mapping if isinstance(m, theirs.WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    found: dict[str, Conversion] = {}
    for name in sorted(own, key=theirs.dot_natural_key):
        target, pattern = theirs.apply_converters(name, converters)
        converter = by_pattern[pattern] if pattern is not None else None
        known = found.setdefault(target, Conversion(target, converter=converter))
        known.sources.setdefault(pattern or name, []).append(name)
    return list(found.values())


def written(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds of tensors that are saved together, by its names."""
    if (theirs := _transformers(model)) is None:
        return tensors
    return dict(theirs.revert_weight_conversion(model, tensors))


@contextlib.contextmanager
def saving(model: nn.Module) -> Iterator[None]:
    """Look the mapping up once, not for each tensor."""
    known: Any = getattr(model, "_weight_conversions", None)
    if known is None and _transformers(model) is not None:
        model._weight_conversions = _mapping_of(model)  # type: ignore[assignment]
    try:
        yield
    finally:
        if known is None and _transformers(model) is not None:
            del model._weight_conversions


def _mapping_of(model: nn.Module) -> list[Any]:
    """With which mapping the model was loaded; if it was not, transformers' as `save_pretrained` takes it."""
    known: Any = getattr(model, "_weight_conversions", None)
    if known is not None:
        return list(known)
    theirs = _transformers(model)
    return [m for m in _mapping(model, add_legacy=False) if not isinstance(m, theirs.PrefixChange)]


def written_by_expert(conversion: Conversion) -> bool:
    """Whether each expert's rows become its own tensors: for ops that are reversed, the last splits the experts."""
    ops = conversion.converter.operations if conversion.converter is not None else []
    return bool(ops) and type(ops[-1]).__name__ == "SplitModulelist" and ops[-1].dim == 0 and _apart(ops[:-1])


# -- transformers ---------------------------------------------------------------------------


def _transformers(model: nn.Module) -> Any:
    """transformers' module of conversions, if this model is one of transformers 5."""
    theirs = sys.modules.get("transformers.core_model_loading")
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    return theirs if theirs is not None and isinstance(model, modeling.PreTrainedModel) else None


def _mapping(model: Any, **kwargs: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    with _without_fsdp(model):
        return list(get_model_conversion_mapping(model, **kwargs))


@contextlib.contextmanager
def _without_fsdp(model: nn.Module) -> Iterator[None]:
    """Give modules their own classes again: transformers goes by names of classes, and `fully_shard` makes others."""
    wrapped: list[Any] = [(m, type(m)) for m in model.modules() if isinstance(m, FSDPModule)]
    try:
        for module, cls in wrapped:
            module.__class__ = next(c for c in cls.__mro__[1:] if not issubclass(c, FSDPModule))
        yield
    finally:
        for module, cls in wrapped:
            module.__class__ = cls
