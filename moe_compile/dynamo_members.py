"""The parts of a module, and whatever else a function reads, as Dynamo has them: by variable, and by name (source).

A name is what guards are put on (dynamo_guards.py) and what a rewrite's tensors are asked by, so that Dynamo guards and
lifts them as it always does.
"""

from typing import Any

from torch import nn
from torch._dynamo.source import AttrSource, CellContentsSource, DictGetItemSource, GetItemSource
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.lists import TupleVariable
from torch._guards import Source

from moe_compile.parallel.shards import shards_of
from moe_compile.parts import parts
from moe_compile.places import NOTHING
from moe_compile.reads import Path


class Members:
    """The parts of a module as Dynamo has them, by their qualified names; each is asked for once."""

    def __init__(self, tx: Any, owner: Any) -> None:
        self.tx, self.owner = tx, owner
        self._known = {"": owner}

    def __getitem__(self, path: str) -> Any:
        if path not in self._known:
            before, _, last = path.rpartition(".")
            self._known[path] = self[before].realize().var_getattr(self.tx, last)
        return self._known[path]


def state_of(members: Members, names: str | tuple[str, ...]) -> Any:
    """A parameter or buffer; for a series the tuple of all."""
    if isinstance(names, str):
        return members[names]
    return TupleVariable([members[name].realize() for name in names])


def shard_of(members: Members, name: str) -> Any:
    """This rank's shard of a DTensor parameter: a plain tensor, and a leaf (gradients.py).

    With the DTensor in the graph, a checkpointed region would save the DeviceMesh, which AOTAutograd refuses.
    """
    tx, owner = members.tx, members.owner.value
    parameter = members[name].realize()  # and guards on it
    local = owner.get_parameter(name)._local_tensor
    found = VariableTracker.build(tx, local, AttrSource(parameter.source, "_local_tensor"))
    shards = shards_of(owner.get_submodule(name.rpartition(".")[0]))
    if shards is not None and shards.split is None and shards.dtype(local) != local.dtype:
        found = found.realize().call_method(tx, "to", [VariableTracker.build(tx, shards.dtype(local))], {})
    return found


class _Nobody:
    """The owner of the weights where they are arguments."""

    value, source = NOTHING, None


NOBODY = _Nobody()


def shared_names(module: nn.Module) -> list[str]:
    """The names of parameters that have more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in parts(module).parameters:
        names.setdefault(id(parameter), []).append(name)
    return [name for group in names.values() if len(group) > 1 for name in group]


def source_of(tx: Any, var: Any, members: Members | None, path: Path, named: dict[Path, Source]) -> Source:
    """How Dynamo names the value at the end of a path.  `named`: those found before."""
    if path in named:
        return named[path]
    before, (step, key) = path[:-1], path[-1]
    base: Any = source_of(tx, var, members, before, named) if before else None
    match step:
        case "module":
            assert members is not None
            source = members[key].realize().source
        case "fn":
            source = var.source
        case "globals":
            source = tx.import_source(key)
        case "attr":
            source = AttrSource(base, key)
        case "item":
            source = GetItemSource(base, key) if isinstance(key, int) else DictGetItemSource(base, key)
        case _:
            source = CellContentsSource(GetItemSource(AttrSource(base, "__closure__"), key), "cell_contents")
    named[path] = source
    return source
