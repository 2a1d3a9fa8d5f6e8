"""One visit for many experts: a loop over chosen experts whose body is traced once for a class of them.

    for e in hit.nonzero():      # e is a number that nobody knows, for all classes that are alike

The loop gets an index without a value.  Whatever Python asks about it (`e == num_experts`) is evaluated for all experts
that the visit stands for; those with another answer wait for a visit of their own.  A visit stands for its experts if
it leaves the Python state as it found it (loop_state.py), if no index became a number, and if no computation can differ
from visit to visit (visit_checks.py).  Else `OneByOne`: the loop is traced expert by expert.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils._python_dispatch import _disable_current_modes

from moe_compile.detect.facts import VISIT_OFFSET
from moe_compile.loop_state import Calls, OneByOne, State, check_loop, loop_head, shared
from moe_compile.numbers import EQUAL, Number, long_enough, numbers_in, symbol_of
from moe_compile.python_state import Functions
from moe_compile.stand_ins import Lists

MOST = 3  # classes of experts that are visited together
OFFSET = VISIT_OFFSET  # an index is a size less this

_lib = torch.library.Library("moe_ep_capture", "FRAGMENT")
_lib.define("visit(Tensor hits, SymInt number, bool scalar) -> Tensor")
_lib.define("visited(Tensor number) -> Tensor")
torch.library.register_fake(
    "moe_ep_capture::visit", lambda hits, number, scalar: hits.new_empty(() if scalar else (1,), dtype=torch.int64)
)
torch.library.register_fake("moe_ep_capture::visited", lambda number: number.new_empty(()))


@dataclass
class Visit:
    """One pass through a loop: the experts it stands for, and the nodes at its beginning and end."""

    numbers: list[int]
    begin: Any = None  # tensors while the trace runs, nodes afterwards
    end: Any = None


class Visits:
    """The visits of one trace.  `lengths`: vectors as long as the index of each, plus `OFFSET`."""

    def __init__(self, functions: Functions, module: nn.Module, lengths: Sequence[Tensor], lists: Lists | None) -> None:
        self.functions, self.module, self.lengths = functions, module, lengths
        self.done: list[Visit] = []
        self.failed: OneByOne | None = None
        self._indices: dict[int, tuple[Tensor, Any]] = {}  # tensors that are an index, and the index as a number
        self._open: Visit | None = None
        self.calls = Calls()
        self.by_number = False  # the loop runs over numbers
        self.number: Number | None = None
        self.lists = lists
        self._stand_ins: dict[int, nn.Module] = {}

    def fail(self, why: str) -> OneByOne:
        self.failed = OneByOne(why)
        return self.failed

    def over(self, hits: Tensor, table: Tensor, numbers: range) -> "_Loop":
        """The list of chosen experts, for the `for` statement of the program that asked for it."""
        if self.done:
            raise self.fail("there are two loops over experts")
        try:
            frame = _program()
            return _Loop(self, hits, table.dim() == 1, list(numbers), loop_head(frame))
        except OneByOne as why:
            raise self.fail(str(why)) from None

    def check(self) -> list[Visit]:
        """The visits; `OneByOne` if a loop was left early, or something failed on the way."""
        if self._open is not None:
            self.fail("the loop was left early")
        if self.failed is not None:
            raise self.failed
        return self.done

    def over_numbers(
        self, frame: FrameType, head: int, numbers: Sequence[int], modules: nn.ModuleList | None
    ) -> "_Numbers | None":
        """The numbers, or the modules with their numbers, for a `for` statement; None: it is too short to matter."""
        if not long_enough(numbers):
            return None
        if self.by_number or self.done:
            raise self.fail("there are two loops over experts")
        self.by_number = True
        try:
            check_loop(frame.f_code, head)
            return _Numbers(self, list(numbers), head, modules)
        except OneByOne as why:
            raise self.fail(str(why)) from None

    @property
    def is_open(self) -> bool:
        """Whether a visit has begun and not ended."""
        return self._open is not None

    # -- the index ---------------------------------------------------------------------------

    def _next(self, numbers: list[int]) -> Any:
        """A number for the next visit, which begins."""
        if len(self.done) == len(self.lengths):
            raise self.fail(f"there are more than {len(self.lengths)} kinds of experts")
        self._open = Visit(numbers)
        self.done.append(self._open)
        return self.lengths[len(self.done) - 1].shape[0] - OFFSET

    def begin(self, hits: Tensor, scalar: bool, numbers: list[int]) -> Tensor:
        number = self._next(numbers)
        with torch._C.DisableTorchFunction():
            index = torch.ops.moe_ep_capture.visit(hits, number, scalar)
        self._indices[id(index)] = (index, number)
        assert self._open is not None
        self._open.begin = index
        return index

    def begin_number(self, numbers: list[int]) -> Number:
        symbol = self._next(numbers)
        assert self._open is not None
        with torch._C.DisableTorchFunction():
            self._open.begin = torch.ops.moe_ep_capture.visit(self.lengths[len(self.done) - 1], symbol, True)
        self._stand_ins.clear()
        self.number = Number(self, symbol)
        return self.number

    def end(self) -> None:
        assert self._open is not None
        with torch._C.DisableTorchFunction():
            self._open.end = torch.ops.moe_ep_capture.visited(self._open.begin)
        self._open = None

    def is_index(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self._indices

    def check_call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """An index may be compared and computed with; nothing else may get hold of it, or of its memory."""
        if self.by_number and numbers_in((args, kwargs)):
            if kwargs or (func not in EQUAL and func is not torch.Tensor.__getitem__):
                raise self.fail(f"an index is used by {getattr(func, '__name__', func)}")
        nested = [a for arg in (*args, *kwargs.values()) for a in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        if not any(map(self.is_index, nested)):
            return
        if kwargs or (func not in _SAME_INDEX and func not in _ASKS):
            name = getattr(func, "__name__", str(func))
            raise self.fail(f"an index is used by {name}")

    def follow(self, func: Any, args: Any, result: Any) -> None:
        """Note that a result is the index too."""
        if func in _SAME_INDEX and self.is_index(args[0]) and isinstance(result, Tensor):
            if result.numel() == 1 and result.dtype == torch.int64:
                self._indices[id(result)] = (result, self._indices[id(args[0])][1])

    def select(self, source: Tensor, index: Any) -> tuple[Tensor, Any]:
        """source[index] with the index of a visit in it: what it selects from the source, and the rest of the index."""
        places = index if isinstance(index, tuple) else (index,)
        at = next(i for i, place in enumerate(places) if type(place) is Number or self.is_index(place))
        if any(not isinstance(p, slice) or p != slice(None) for p in places[:at]):
            raise self.fail("an index stands behind others")
        symbol = symbol_of(places[at]) if type(places[at]) is Number else self._indices[id(places[at])][1]
        selected = source.select(at, symbol)
        return selected, (*places[:at], *places[at + 1 :])

    def has_index(self, index: Any) -> bool:
        places = index if isinstance(index, tuple) else (index,)
        return any(type(i) is Number or (self.is_index(i) and i.dim() == 0) for i in places)

    # -- a number as the index ---------------------------------------------------------------

    def equal(self, tensor: Tensor, number: Number) -> Tensor:
        """ids == e"""
        self._check_current(number)
        if not tensor.dim() or tensor.dtype not in (torch.int32, torch.int64):
            raise self.fail(f"an index is compared with a tensor of {tensor.dtype}")
        with torch._C.DisableTorchFunction():
            return tensor == torch.ops.moe_ep_capture.visit(tensor, symbol_of(number), True)

    def ask(self, number: Number, test: Callable[[int], Any]) -> Any:
        """What a question about the number alone has for an answer, for the experts of this visit."""
        self._check_current(number)
        assert self._open is not None
        return self._split({n: test(n) for n in self._open.numbers})

    def _check_current(self, number: Number) -> None:
        if self._open is None or number is not self.number:
            raise self.fail("Python asks about an index after its visit")

    def _split(self, answers: dict[int, Any]) -> Any:
        """The answer of the first expert; those with another wait for a visit of their own."""
        assert self._open is not None
        first = answers[self._open.numbers[0]]
        self._later += [n for n, answer in answers.items() if answer is not first]
        self._open.numbers = [n for n, answer in answers.items() if answer is first]
        return first

    def reached(self, found: nn.ModuleList, index: Any) -> nn.Module | None:
        """What stands for the member of a list that an index of a visit chooses; None for any other index."""
        if type(index) is Number:
            return self.stand_in(found, index)
        first = type(index) is int and index == 0 and self._open is None
        if self.lists is not None and id(found) in self.lists.known and not first:
            raise self.fail("a list of modules is reached in other ways than by the index")
        return None

    def stand_in(self, found: nn.ModuleList, number: Number) -> nn.Module:
        self._check_current(number)
        assert self.lists is not None and self._open is not None
        if id(found) not in self.lists.known:
            raise self.fail("the modules of a list are not alike")
        if max(self._open.numbers) >= len(found):
            raise self.fail("a list has fewer modules than the loop has numbers")
        if id(found) not in self._stand_ins:
            self._stand_ins[id(found)] = self.lists.stand_in(found, symbol_of(number))
        return self._stand_ins[id(found)]

    def truth(self, asked: Tensor) -> bool | None:
        """The answer to a question about the index alone, for the experts of this visit; None: it is about more."""
        root = _node_of(asked)
        parts = None if root is None else _about_index(root)
        if parts is None or root is None:
            return None
        if self._open is None or {str(p.target) for p in parts} & {"moe_ep_capture.visited.default"}:
            raise self.fail("Python asks about an index after its visit")
        with _disable_current_modes():
            answers = {n: bool(_value(root, n)) for n in self._open.numbers}
        return self._split(answers)  # type: ignore[no-any-return]

    _later: list[int]


class _Loop:
    """The iterator of one loop over chosen experts."""

    def __init__(self, visits: Visits, hits: Tensor, scalar: bool, numbers: list[int], head: int) -> None:
        self.visits, self.hits, self.scalar, self.head = visits, hits, scalar, head
        visits._later = numbers
        self.before: State | None = None

    def __iter__(self) -> "_Loop":
        return self

    def __next__(self) -> Any:
        visits, frame = self.visits, sys._getframe(1)
        try:
            if self.before is not None:
                visits.calls.end()
            now = self._state(frame)
            if self.before is not None:
                if not self.before.same(now):
                    raise OneByOne("an iteration leaves something for the next")
                visits.end()
            self.before = now
            numbers, visits._later = visits._later, []
            if not numbers:
                raise StopIteration
            visits.calls.begin(now.wrappers)
        except OneByOne as why:
            raise visits.fail(str(why)) from None
        return self._visit(numbers)

    def _state(self, frame: FrameType) -> State:
        return shared(frame, self.head, self.visits.functions, self.visits.module)

    def _visit(self, numbers: list[int]) -> Any:
        return self.visits.begin(self.hits, self.scalar, numbers)


class _Numbers(_Loop):
    """The iterator of one loop over numbers, or over modules with their numbers."""

    def __init__(self, visits: Visits, numbers: list[int], head: int, modules: nn.ModuleList | None) -> None:
        self.visits, self.head, self.modules = visits, head, modules
        visits._later = numbers
        self.before = None

    def _state(self, frame: FrameType) -> State:
        visits = self.visits
        assert visits.lists is not None
        now = shared(frame, self.head, visits.functions, visits.module, visits.lists.skipped())
        visits.lists.check_reach(now.seen.values())
        return now

    def _visit(self, numbers: list[int]) -> Any:
        number = self.visits.begin_number(numbers)
        return number if self.modules is None else (number, self.visits.stand_in(self.modules, number))


_SAME_INDEX = {
    torch.Tensor.__getitem__,
    torch.Tensor.squeeze,
    torch.squeeze,
    torch.Tensor.flatten,
    torch.Tensor.view,
    torch.Tensor.reshape,
    torch.Tensor.long,
    torch.Tensor.detach,
}
_ASKS: set[Any] = {torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge, torch.remainder, torch.add, torch.sub}
_ASKS |= {getattr(torch.Tensor, f"__{name}__") for name in "eq ne lt le gt ge mod add sub mul floordiv bool".split()}
_ASKS |= {
    getattr(torch.Tensor, name) for name in "eq ne lt le gt ge any all dim size numel add sub mul remainder".split()
}
_ASKS |= {getattr(torch.Tensor, name).__get__ for name in "shape device dtype ndim".split()}


def _program() -> FrameType:
    """The innermost frame that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "moe_compile"):
        frame = frame.f_back
    assert frame is not None
    return frame


def _node_of(tensor: Tensor) -> Node | None:
    mode = get_proxy_mode()
    assert mode is not None
    found = get_proxy_slot(tensor, mode.tracer, None, lambda slot: slot.proxy.node)
    return found if isinstance(found, Node) else None


def _about_index(root: Node) -> set[Node] | None:
    """The nodes behind a value that rests on an index and numbers alone; None for any other value."""
    parts: set[Node] = set()
    todo, rests = [root], False
    while todo:
        node = todo.pop()
        if node in parts:
            continue
        parts.add(node)
        if node.target is torch.ops.moe_ep_capture.visit.default:
            rests = True
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is None or schema.is_mutable or not str(node.target).startswith("aten."):
            return None
        if torch.Tag.nondeterministic_seeded in node.target.tags or not node.all_input_nodes:  # type: ignore[union-attr]
            return None
        todo += node.all_input_nodes
    return parts if rests else None


def _value(node: Node, number: int) -> Any:
    """A node behind a question, with the index as a number."""
    if node.target is torch.ops.moe_ep_capture.visit.default:
        return torch.tensor(number if node.args[2] else [number])
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: _value(n, number))
    kwargs = {k: v for k, v in kwargs.items() if k != "device"}
    return node.target(*args, **kwargs)  # type: ignore[operator]
