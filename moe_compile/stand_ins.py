"""Lists of modules that are alike, and a module that stands for each of them in a visit.

A stand-in is a copy of the first module whose parameters and buffers are `pick(those of all modules, number)`.  Nobody
can tell it from the module that it stands for: the modules agree in all but their tensors, nothing else holds them
(`check_reach`), and while the loop runs nobody reaches into the list in another way.
"""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_compile.loop_state import OneByOne
from moe_compile.parts import parts
from moe_compile.reads import SIMPLE, TORCH_OWN

_lib = torch.library.Library("moe_ep_capture", "FRAGMENT")
_lib.define("pick(Tensor[] tensors, SymInt number, int column) -> Tensor")
_lib.impl("pick", torch.library.fallthrough_kernel, "Autograd")  # a leaf, as a parameter is one
torch.library.register_fake(
    "moe_ep_capture::pick",
    lambda tensors, number, column: tensors[0].new_empty_strided(tensors[0].shape, tensors[0].stride()),
)


TABLES = ("_parameters", "_buffers", "_modules")


class Alike:
    """Modules that differ in their tensors alone.

    `columns`: by a tensor or a module of the first one that differs, those in its place in all of them.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.columns: dict[int, Sequence[Any]] = {}
        self.holders: dict[int, set[int]] = {}  # a module or tensor of them -> the tables that may hold it
        self._common: set[int] = set()
        self._column(modules, None)
        if self._common & self.holders.keys():
            raise OneByOne("modules share parts in other ways")

    def _column(self, items: Sequence[Any], holder: Mapping[str, Any] | None) -> None:
        """Note the tensors or modules in one place, one of each module."""
        first, ids = items[0], set(map(id, items))
        if len(ids) == 1:
            self._common.add(id(first))
            return
        known = self.columns.get(id(first))
        if known is None:
            if len(ids) < len(items) or not ids.isdisjoint(self.holders):
                raise OneByOne("modules share parts")
            self.columns[id(first)] = items
            self.holders.update((i, set()) for i in ids)
        elif any(a is not b for a, b in zip(known, items, strict=True)):
            raise OneByOne("modules share parts in other ways")
        if holder is not None:
            self.holders[id(first)].add(id(holder))
        if known is None:
            (self._modules if isinstance(first, nn.Module) else self._tensors)(items)

    def _tensors(self, tensors: Sequence[Any]) -> None:
        if not all(isinstance(t, Tensor) for t in tensors) or len({_metadata(t) for t in tensors}) != 1:
            raise OneByOne("modules differ in a tensor's shape or dtype")

    def _modules(self, modules: Sequence[Any]) -> None:
        kind = type(modules[0])
        if len(set(map(type, modules))) > 1:
            raise OneByOne("modules have other classes")
        own = [vars(m) for m in modules]
        names = list(own[0])
        if any(list(o) != names for o in own):
            raise OneByOne("modules have other attributes")
        if hasattr(kind, "__del__") or any("__slots__" in vars(c) for c in kind.__mro__):
            raise OneByOne("modules have slots, or notice that they are dropped")
        for name in names:
            values = [o[name] for o in own]
            if name not in TABLES:
                _check_equal(values, name)
                continue
            parts = list(values[0])
            if any(list(table) != parts for table in values):
                raise OneByOne("modules have other parts")
            for part in parts:
                self._column([table[part] for table in values], values[0])

    def inside(self) -> set[int]:
        """The ids of the modules, and of all parts that they have."""
        return self._common | self.holders.keys()

    def stand_in(self, pick: Callable[[Tensor], Tensor]) -> nn.Module:
        """A copy of the first module; `pick` gives what stands for one of its tensors."""
        made: dict[int, Any] = {}

        def part(item: Any) -> Any:
            if id(item) not in self.columns:
                return item
            if id(item) not in made:
                made[id(item)] = module(item)
            return made[id(item)]

        def module(old: nn.Module) -> nn.Module:
            new: Any = object.__new__(type(old))
            vars(new).update(vars(old))
            for table in ("_parameters", "_buffers"):
                vars(new)[table] = {k: None if t is None else pick(t) for k, t in vars(old)[table].items()}
            vars(new)["_modules"] = {k: part(m) for k, m in old._modules.items()}
            return new

        return part(self.modules[0])


def _metadata(t: Tensor) -> Any:
    own = [name for name in vars(t) if name not in TORCH_OWN]
    return (t.shape, t.stride(), t.dtype, t.device, t.layout, t.requires_grad, type(t), *own)


def _check_equal(values: Sequence[Any], name: str) -> None:
    """Raise unless one attribute means the same in all modules: equal numbers and texts, else one object."""
    if len(set(map(id, values))) == 1:
        return
    first = values[0]
    kind = type(first)
    if len(set(map(type, values))) > 1:
        raise OneByOne(f"modules differ in {name}")
    if kind in BOXES and not any(values):
        return
    if kind in (list, tuple):
        if any(len(v) != len(first) for v in values):
            raise OneByOne(f"modules differ in {name}")
        for items in zip(*values, strict=True):
            _check_equal(items, name)
    elif kind in (dict, collections.OrderedDict):
        keys = [[(type(k), k) for k in v] for v in values]
        if any(not isinstance(k, SIMPLE) for k in first) or any(k != keys[0] for k in keys):
            raise OneByOne(f"modules differ in {name}")
        for key in first:
            _check_equal([v[key] for v in values], name)
    elif kind in (set, frozenset) or kind not in SIMPLE or len(set(map(repr, values))) > 1:
        raise OneByOne(f"modules differ in {name}")


BOXES = (list, tuple, dict, collections.OrderedDict, set, frozenset)


class Lists:
    """The lists of a module whose members are alike.

    A trace holds the tensors of a few members alone, not those that are `absent`.
    """

    def __init__(self, module: nn.Module, least: int) -> None:
        self.known = {id(found): (found, alike) for found, alike in alike_lists(module, least)}
        alike = [alike for _, alike in self.known.values()]
        self.columns = [c for a in alike for c in a.columns.values() if isinstance(c[0], Tensor)]
        self._holders: dict[int, set[int]] = {}
        self._column: dict[int, int] = {}
        self.absent: dict[int, Tensor] = {}  # by the id of each the first of its column

    def keep(self, few: Sequence[int]) -> None:
        """Leave out the tensors of all but these members."""
        self.absent = {id(t): c[0] for c in self.columns for n, t in enumerate(c) if n not in few}

    def begin(self, traced: Mapping[int, Tensor]) -> None:
        """`traced`: what a trace has in the place of a tensor."""
        self._column = {id(traced[id(c[0])]): i for i, c in enumerate(self.columns) if id(c[0]) in traced}
        self._holders = {}
        for found, alike in self.known.values():
            self._holders |= alike.holders
            for part in traced.keys() & alike.holders.keys():
                self._holders.setdefault(id(traced[part]), set()).update(alike.holders[part])
            for m in alike.modules:
                self._holders[id(m)] = self._holders[id(m)] | {id(found._modules)}

    def skipped(self) -> frozenset[int]:
        """The members that nobody has to look into, as they are like the first of their list."""
        return frozenset(id(m) for _, alike in self.known.values() for m in alike.modules[1:])

    def stand_in(self, found: nn.ModuleList, number: Any) -> nn.Module:
        """What stands for the member of a number."""

        def pick(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                column = self._column.get(id(tensor))
                made[id(tensor)] = tensor if column is None else _pick(tensor, number, column)
            return made[id(tensor)]

        made: dict[int, Tensor] = {}
        return self.known[id(found)][1].stand_in(pick)

    def check_reach(self, seen: Iterable[tuple[Any, Sequence[Any]]]) -> None:
        """Raise if anything but its own list holds a member, or anything but a member what is in it."""
        for item, held in seen:
            for part in held:
                if id(part) in self._holders and id(item) not in self._holders[id(part)]:
                    raise OneByOne(f"a {type(item).__name__} holds a part of a module that others are like")


def alike_lists(module: nn.Module, least: int) -> list[tuple[nn.ModuleList, Alike]]:
    """The lists of at least so many modules, all alike, which are not in such a list themselves and share no parts.

    Not to be changed.
    """
    of = parts(module)
    if ("alike", least) not in of.memo:
        result: list[tuple[nn.ModuleList, Alike]] = []
        inside: set[int] = set()
        for _, found in of.modules:
            if type(found) is nn.ModuleList and len(found) >= least and id(found) not in inside and _in_order(found):
                with contextlib.suppress(OneByOne):
                    alike = Alike(list(found._modules.values()))  # type: ignore[arg-type]
                    result.append((found, alike))
                    inside |= alike.inside()
        held = [part for _, alike in result for part in alike.holders]
        of.memo["alike", least] = result if len(set(held)) == len(held) else []
    return of.memo["alike", least]  # type: ignore[no-any-return]


def twins(module: nn.Module, least: int) -> dict[int, nn.Module]:
    """The modules in these lists, by id, that are like another: the one in the same place of the first member."""
    memo = parts(module).memo
    if ("twins", least) not in memo:
        columns = [c for _, alike in alike_lists(module, least) for c in alike.columns.values()]
        memo["twins", least] = {id(m): c[0] for c in columns if isinstance(c[0], nn.Module) for m in c[1:]}
    return memo["twins", least]  # type: ignore[no-any-return]


def _in_order(found: nn.ModuleList) -> bool:
    """Whether a list gives its modules, and no gaps, in the order of their numbers."""
    names = [str(i) for i in range(len(found))]
    return list(found._modules) == names and all(isinstance(m, nn.Module) for m in found._modules.values())


def _pick(tensor: Tensor, number: Any, column: int) -> Tensor:
    with torch._C.DisableTorchFunction():
        picked = torch.ops.moe_ep_capture.pick([tensor], number, column)
        return picked.requires_grad_() if tensor.requires_grad else picked  # type: ignore[no-any-return]


@contextlib.contextmanager
def watched(reached: Callable[[nn.ModuleList, Any], Any]) -> Iterator[None]:
    """`reached(list, index)` is asked before a list of modules is indexed, or walked over (index None).

    It answers with the module, or None for what the list has there.
    """
    get, walk = nn.ModuleList.__getitem__, nn.ModuleList.__iter__

    def getitem(self: nn.ModuleList, index: Any) -> Any:
        found = reached(self, index)
        return get(self, index) if found is None else found

    def iterate(self: nn.ModuleList) -> Any:
        reached(self, None)
        return walk(self)

    nn.ModuleList.__getitem__, nn.ModuleList.__iter__ = getitem, iterate  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.ModuleList.__getitem__, nn.ModuleList.__iter__ = get, walk  # type: ignore[method-assign]
