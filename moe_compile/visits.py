"""One visit for many experts: a loop over chosen experts whose body is traced once for a class of them.

    for e in hit.nonzero():      # e is a number that nobody knows, for all classes that are alike

The loop gets an index without a value.  Whatever Python asks about it (`e == num_experts`) is evaluated for all experts
that the visit stands for; those with another answer wait for a visit of their own.  A visit stands for its experts if
it leaves the Python state as it found it (loop_state.py), if no index became a number, and if `check_visits` finds no
computation that differs from visit to visit.  Else `OneByOne`: the loop is traced expert by expert.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils._python_dispatch import _disable_current_modes

from moe_compile.detect.interpreter import VISIT_OFFSET, is_random, storages
from moe_compile.detect.values import Sum, SumRead, Value
from moe_compile.loop_state import Calls, OneByOne, State, loop_head, shared
from moe_compile.python_state import Functions

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
    """The visits of one trace.  `sizes`: a symbol for the index of each, plus `OFFSET`."""

    def __init__(self, functions: Functions, module: nn.Module, sizes: Sequence[Any]) -> None:
        self.functions, self.module, self.sizes = functions, module, sizes
        self.done: list[Visit] = []
        self.failed: OneByOne | None = None
        self._indices: dict[int, tuple[Tensor, Any]] = {}  # tensors that are an index, and the index as a number
        self._open: Visit | None = None
        self.calls = Calls()

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

    # -- the index ---------------------------------------------------------------------------

    def begin(self, hits: Tensor, scalar: bool, numbers: list[int]) -> Tensor:
        if len(self.done) == len(self.sizes):
            raise self.fail(f"there are more than {len(self.sizes)} kinds of experts")
        number = self.sizes[len(self.done)] - OFFSET
        with torch._C.DisableTorchFunction():
            index = torch.ops.moe_ep_capture.visit(hits, number, scalar)
        self._indices[id(index)] = (index, number)
        self._open = Visit(numbers, index)
        self.done.append(self._open)
        return index

    def end(self) -> None:
        assert self._open is not None
        with torch._C.DisableTorchFunction():
            self._open.end = torch.ops.moe_ep_capture.visited(self._open.begin)
        self._open = None

    def is_index(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self._indices

    def check_call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """An index may be compared and computed with; nothing else may get hold of it, or of its memory."""
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
        at = next(i for i, place in enumerate(places) if self.is_index(place))
        if any(not isinstance(p, slice) or p != slice(None) for p in places[:at]):
            raise self.fail("an index stands behind others")
        selected = source.select(at, self._indices[id(places[at])][1])
        return selected, (*places[:at], *places[at + 1 :])

    def has_index(self, index: Any) -> bool:
        return any(self.is_index(i) and i.dim() == 0 for i in (index if isinstance(index, tuple) else (index,)))

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
        first = answers[self._open.numbers[0]]
        self._later += [n for n, answer in answers.items() if answer is not first]
        self._open.numbers = [n for n, answer in answers.items() if answer is first]
        return first

    _later: list[int]


class _Loop:
    """The iterator of one loop."""

    def __init__(self, visits: Visits, hits: Tensor, scalar: bool, numbers: list[int], head: int) -> None:
        self.visits, self.hits, self.scalar, self.head = visits, hits, scalar, head
        visits._later = numbers
        self.before: State | None = None

    def __iter__(self) -> "_Loop":
        return self

    def __next__(self) -> Tensor:
        visits, frame = self.visits, sys._getframe(1)
        try:
            if self.before is not None:
                visits.calls.end()
            now = shared(frame, self.head, visits.functions, visits.module)
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
        return visits.begin(self.hits, self.scalar, numbers)


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


# -- what the trace has to show -------------------------------------------------------------


def check_guards(visits: Sequence[Visit], sizes: Sequence[Any], guards: Sequence[Any], replaced: Any) -> None:
    """Every decision on the size that stands for an index is right for all experts of its visit."""
    for visit, size in zip(visits, sizes, strict=False):
        symbol = size.node._expr
        if symbol in replaced:
            raise OneByOne(f"an index became a number ({symbol} is {replaced[symbol]})")
        for guard in {g for g in guards if symbol in g.free_symbols}:
            if guard.free_symbols != {symbol}:
                raise OneByOne(f"{guard} compares an index with a size")
            holds = sympy.lambdify(symbol, guard, "math")
            if not all(holds(n + OFFSET) for n in visit.numbers):
                raise OneByOne(f"{guard} does not hold for all experts of a visit")


def check_visits(graph: Graph, values: Mapping[Node, Value], visits: Sequence[Visit]) -> None:
    """Refuse a body that could compute something else at another visit: at random, or by what an earlier one left."""
    order = list(graph.nodes)
    for visit in visits:
        begin, end = order.index(visit.begin), order.index(visit.end)
        old = {s for n in order[:begin] for s in storages(n)}
        body = [n for n in order[begin:end] if n.op == "call_function"]
        for node in body:
            if not _plain_op(node):
                raise OneByOne(f"{node.name} is not known to be the same at every visit")
        changed = {s for n in body for s in _written(n)} & old
        for node in body:
            touches = {s for n in (node, *node.all_input_nodes) for s in storages(n)} & changed
            if touches and not isinstance(values.get(node), Sum | SumRead):
                raise OneByOne(f"{node.name} reads or changes what visits change")


def _plain_op(node: Node) -> bool:
    if getattr(node.target, "__module__", "") == "_operator" or node.target in _MODES:
        return True
    known = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in ("aten", "moe_ep_capture")
    return known and not is_random(node)


_MODES: tuple[Callable[..., Any], ...] = (
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
)


def _written(node: Node) -> Iterator[Any]:
    schema = getattr(node.target, "_schema", None)
    for position, argument in enumerate(schema.arguments if schema is not None and schema.is_mutable else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            source = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            for n in source if isinstance(source, (list, tuple)) else [source]:
                if isinstance(n, Node):
                    yield from storages(n)
