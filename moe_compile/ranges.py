"""Ids of which the largest possible is known, and what is only as long as the largest that occurs.

    scores.topk(k)[1]             # in [0, E), and distinct in a row
    torch.unique(ids)             # who was chosen: as a mask over E classes, and then as `mask.nonzero()`
    torch.bincount(ids)           # as many numbers as the largest id says: counted for all E, and nobody sees how many

How many numbers there are is a question about the data like any other (worlds.py).  Python may take those that stand at
a place, and walk over them in a `for` statement, which `check_loops` sees to: neither tells the rest of the program how
many there were.  Sums up to each place (`numpy.cumsum`) are as many, and one is the same however many entries follow.
What would see their number, as a list made of them, is a refusal.
"""

import dis
import functools
import inspect
import itertools
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils._pytree import tree_leaves

from moe_compile.errors import Refusal

HIDDEN = "bincount without minlength: how many numbers Python reads depends on the ids"

_lib = torch.library.Library("moe_ep_capture", "FRAGMENT")
_lib.define("chosen(Tensor ids, int classes) -> Tensor")
torch.library.register_fake(
    "moe_ep_capture::chosen", lambda ids, classes: ids.new_empty((classes,), dtype=torch.bool), lib=_lib
)


_SAME_NUMBERS = frozenset(
    f"aten.{op}" for op in """
    view.default reshape.default _unsafe_view.default flatten.using_ints to.dtype to.device to.dtype_layout
    _to_copy.default clone.default detach.default alias.default contiguous.default squeeze.dim squeeze.default
    unsqueeze.default select.int slice.Tensor
""".split()
)  # fmt: skip
_ARGS = frozenset(("aten.argmax.default", "aten.argmin.default"))


def number_of_classes(ids: Tensor, inputs: Mapping[int, int]) -> int | None:
    """E, if every id is known to be in [0, E): of a topk, max or argmax of E scores, and nobody changed them."""
    mode = get_proxy_mode()
    assert mode is not None
    node = get_proxy_slot(ids, mode.tracer, None, lambda slot: slot.proxy.node)
    if node is None or ids.dtype not in (torch.int64, torch.int32):
        return None
    while node.op == "call_function" and str(node.target) in _SAME_NUMBERS and isinstance(node.args[0], Node):
        if is_written(node) or node.meta["val"].dtype not in (torch.int64, torch.int32):
            return None
        node = node.args[0]
    if is_written(node):
        return None
    if node.op == "placeholder":
        return inputs.get(node.graph.find_nodes(op="placeholder").index(node))
    source, at = (node, 1) if str(node.target) in _ARGS else (node.args[0] if node.args else None, None)
    if at is None and isinstance(source, Node) and node.args[1] == 1:
        at = {"aten.topk.default": 2, "aten.max.dim": 1, "aten.min.dim": 1}.get(str(source.target))
    if not isinstance(source, Node) or at is None:
        return None
    scores: Any = source.args[0]
    dim = source.args[at] if len(source.args) > at else source.kwargs.get("dim", -1 if at == 2 else None)
    width = scores.meta["val"].shape[dim] if isinstance(dim, int) and scores.meta["val"].dim() else None
    return width if isinstance(width, int) else None


def is_written(node: Node) -> bool:
    """Whether anything so far wrote to the memory of a value."""
    memory = node.meta["val"].untyped_storage()._cdata
    for n in node.graph.nodes:
        schema = getattr(n.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            values = (m.meta.get("val") for m in n.all_input_nodes)
            if any(isinstance(v, Tensor) and v.untyped_storage()._cdata == memory for v in values):
                return True
    return False


class Writes:
    """The same of many values, while the graph grows: what was written to so far is looked at once."""

    def __init__(self) -> None:
        self._memory: set[int] = set()
        self._seen: Node | None = None

    def may_reach(self, node: Node | None, value: Tensor) -> bool:
        if node is None:
            return True
        at = self._seen.next if self._seen is not None else next(iter(node.graph.nodes))
        while at.op != "root":
            self._seen = at
            schema = getattr(at.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                values = (m.meta.get("val") for m in at.all_input_nodes)
                self._memory |= {v.untyped_storage()._cdata for v in values if isinstance(v, Tensor)}
            at = at.next
        return value.untyped_storage()._cdata in self._memory


# -- as long as the largest id --------------------------------------------------------------


class Unsized:
    """Vectors by expert that the program has shorter, and what is computed from them entry by entry."""

    def __init__(self) -> None:
        self._first: dict[int, tuple[Tensor, Tensor]] = {}  # a vector, and that of the counts behind it
        self.longer_only = False  # the program has them as long at least: what stands at a place is there

    def _padded(self, args: Any) -> Tensor | None:
        """The counts behind the last of the vectors that cat joins, if the others are no such vectors."""
        *before, last = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) and args[0] else (None,)
        return None if any(self.counts(b) is not None for b in before) else self.counts(last)

    def add(self, counts: Tensor) -> Tensor:
        self._first[id(counts)] = counts, counts
        return counts

    def counts(self, tensor: Any) -> Tensor | None:
        """The counts behind such a vector."""
        return self._first.get(id(tensor), (None, None))[1]

    def look(self, func: Any, args: Any, kwargs: Any) -> None:
        """Refuse a call that would show how long such a vector is."""
        if not self._first or func in _ENTRYWISE or func in _HARMLESS:
            return
        if self.longer_only and func is torch.cat and self._padded(args) is not None:
            return
        if any(id(x) in self._first for x in tree_leaves([args, kwargs])):
            place = args[1] if func is torch.Tensor.__getitem__ else None
            if type(place) is not int or place < 0:
                raise Refusal(HIDDEN)

    def follow(self, func: Any, args: Any, result: Any) -> None:
        counts = self.counts(args[0]) if func in _ENTRYWISE and args else None
        if self.longer_only and func is torch.cat:
            counts = self._padded(args)
        if counts is not None and isinstance(result, Tensor):
            self._first[id(result)] = result, counts


READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__iter__, torch.Tensor.unbind, torch.unbind}
_ENTRYWISE = {
    torch.Tensor.cumsum, torch.cumsum, torch.Tensor.cpu, torch.Tensor.to, torch.Tensor.int, torch.Tensor.long,
    torch.Tensor.detach, torch.Tensor.clone, torch.Tensor.contiguous, *READS,
    torch.Tensor.device.__get__, torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
}  # fmt: skip
_HARMLESS = {torch.Tensor.dim, torch.Tensor.ndim.__get__, torch.Tensor.new_zeros}  # type: ignore[attr-defined]


def _hidden(*_: Any, **__: Any) -> NoReturn:
    raise Refusal(HIDDEN)


class Numbers(list):  # type: ignore[type-arg]
    """The entries of such a vector, as a list or an array of which nobody sees how long it is."""

    def __iter__(self) -> Iterator[Any]:
        return walked(list.__iter__(self))

    def __getitem__(self, place: Any) -> Any:
        return list.__getitem__(self, place) if type(place) is int and place >= 0 else _hidden()

    def cumsum(self, axis: Any = None, dtype: Any = None, out: Any = None) -> "Numbers":
        """Of an array; numpy.cumsum of a list or an array calls it too.  There are as many sums as entries."""
        if axis not in (None, 0, -1) or dtype is not None or out is not None:
            _hidden()
        return type(self)(itertools.accumulate(n + np.int64(0) for n in list.__iter__(self)))

    def tolist(self) -> "Numbers":
        return self


class Bounded(Numbers):
    """The same, of which nobody sees that there are no more."""

    def __iter__(self) -> Iterator[Any]:
        return until_the_end(list.__iter__(self))


def walked(entries: Iterator[Any]) -> Iterator[Any]:
    """The entries; a refusal where something else than a `for` statement sees their end."""
    yield from entries
    if not _in_for_statement(sys._getframe(1)):
        _hidden()


def _in_for_statement(frame: FrameType) -> bool:
    """Whether a frame is at the head of a `for` statement.  A generator's end is seen by whoever runs it, and an
    iterator beside the entries, as of `zip(counter, entries)`, says how many it went on for.
    """
    many = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
    if frame.f_code.co_flags & many or any(isinstance(v, Iterator) for v in frame.f_locals.values()):
        return False
    return frame.f_lasti in _heads(frame.f_code)


@functools.cache
def _heads(code: CodeType) -> frozenset[int]:
    """Where the `for` statements of a function get their next value: FOR_ITER stands behind GET_ITER there, and
    behind something else in a comprehension.
    """
    steps = [s for s in dis.get_instructions(code) if s.opname != "EXTENDED_ARG"]
    return frozenset(b.offset for a, b in itertools.pairwise(steps) if (a.opname, b.opname) == ("GET_ITER", "FOR_ITER"))


def until_the_end(entries: Iterator[Any]) -> Iterator[Any]:
    """The entries; a refusal where a loop would see their end."""
    yield from entries
    _hidden()


for _name in """
    len add radd mul rmul iadd imul eq ne lt le gt ge contains reversed setitem delitem bool sub rsub array str repr
    format copy deepcopy reduce_ex
""".split():
    setattr(Numbers, f"__{_name}__", _hidden)
for _name in "append extend insert pop remove clear index count sort reverse copy".split():
    setattr(Numbers, _name, _hidden)
