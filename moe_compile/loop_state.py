"""The Python state that iterations of a loop share: what of it exists, and that an iteration leaves it as it was.

An iteration that starts in the state in which the one before it started does what that one did, but for what it asks
of its own index.  `shared` looks at a running frame: its local variables, and all that the functions of a proof can
reach from there.  What it cannot look into (an iterator, an object of a C library) is `OneByOne`.
"""

import collections
import dis
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_compile.numbers import Number
from moe_compile.python_state import Functions, code_names, is_library, is_torch
from moe_compile.read_walk import NOT_RUN, WALKS


class OneByOne(BaseException):
    """An iteration cannot stand for others.  Not an `Exception`: no handler of the program may take it for its own."""


LOOKS_BEHIND = frozenset(  # names that see, or change, what `shared` does not compare
    "setattr delattr __setattr__ __delattr__ __dict__ vars exec eval globals locals id hash suppress inspect gc "
    "_getframe currentframe settrace setprofile cache_info cache_clear ctypes weakref __class__ type attrgetter "
    "methodcaller copy deepcopy pickle".split()
)
FUNCTIONS = frozenset("__closure__ cell_contents __globals__ __defaults__ __kwdefaults__ __code__".split())
MODULE = frozenset((*vars(nn.Module()), "forward"))  # what torch itself reads of a module
HIDDEN = frozenset(("__dict__", "__weakref__", "__doc__", "__annotations__"))
ATOMS = (
    bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented), slice, range,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.SymInt, torch.SymFloat, torch.SymBool,
    types.CodeType, types.GetSetDescriptorType, types.MemberDescriptorType, types.MethodDescriptorType,
    types.WrapperDescriptorType, types.ClassMethodDescriptorType, types.GenericAlias, types.UnionType,
    torch._ops.OpOverload, torch._ops.OpOverloadPacket, Number,
)  # fmt: skip
BOXES = (list, tuple, set, frozenset, collections.deque)
TABLES = (dict, types.MappingProxyType)
_CACHED = functools._lru_cache_wrapper


@dataclass
class State:
    """What the next iteration could tell from another.

    `wrappers`: functions around the one that runs the loop, which this leaves out: an iteration must not call them.
    """

    live: dict[str, Any]  # local variables
    seen: dict[int, tuple[Any, tuple[Any, ...]]]  # objects in reach, by id, with what each holds
    modes: Any
    wrappers: frozenset[types.CodeType]

    def same(self, after: "State") -> bool:
        """Whether two states hold the same objects in the same places."""
        if list(self.live) != list(after.live) or any(self.live[k] is not after.live[k] for k in self.live):
            return False
        if self.modes != after.modes or len(self.seen) != len(after.seen):
            return False
        objects = [(k, held) for k, (item, held) in self.seen.items() if item is not self.live]
        return all(k in after.seen and _equal(held, after.seen[k][1]) for k, held in objects)


def shared(
    frame: types.FrameType, head: int, functions: Functions, module: nn.Module, skip: frozenset[int] | None = None
) -> State:
    """The state of a frame that stands at the head of a `for` loop, the instruction at `head`.

    `skip`: objects that are not looked into, by id, where the loop runs over numbers (`check_numbers`).
    """
    dead = dead_locals(frame.f_code, head)
    live = {k: v for k, v in frame.f_locals.items() if k not in dead}
    names: frozenset[str] = frozenset()
    while True:  # what is found by a name mentions names: to a fixed point
        walk = _Walk(names, frame.f_code, skip)
        for root in (live, module, *functions):
            walk.visit(root)
        if walk.mentioned <= names:
            return State(live, walk.seen, _modes(), frozenset(walk.wrappers))
        names |= walk.mentioned


class Calls:
    """Notes whether one of some functions is called, from `begin` to `end`, in this thread."""

    def __init__(self) -> None:
        self.found: str | None = None
        self._looking = False

    def begin(self, codes: frozenset[types.CodeType]) -> None:
        if codes and sys.getprofile() is not None:
            raise OneByOne("a profiler is at work")

        def note(frame: types.FrameType, event: str, _: Any) -> None:
            if event == "call" and frame.f_code in codes:
                self.found = frame.f_code.co_qualname

        if codes:
            self._looking = True
            sys.setprofile(note)

    def end(self) -> None:
        self.stop()
        if self.found is not None:
            raise OneByOne(f"an iteration calls {self.found}")

    def stop(self) -> None:
        """Look no longer, whatever became of the iteration."""
        if self._looking:
            sys.setprofile(None)
            self._looking = False


def _equal(old: tuple[Any, ...], new: tuple[Any, ...]) -> bool:
    return len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True))


def _modes() -> Any:
    casts = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    flags = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled())
    depth = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    return (*flags, casts, depth, torch.get_default_dtype(), str(torch.get_default_device()))


class _Walk:
    """Everything that can be reached, each object once, with what it holds."""

    def __init__(self, names: frozenset[str], running: types.CodeType, skip: frozenset[int] | None) -> None:
        self.skip = skip
        self.names, self.running, self.mentioned = names, running, set[str]()
        self.wrappers: set[types.CodeType] = set()
        self.seen: dict[int, tuple[Any, tuple[Any, ...]]] = {}

    def visit(self, root: Any) -> None:
        todo = [root]
        while todo:
            item = todo.pop()
            if type(item) in ATOMS or id(item) in self.seen or (self.skip and id(item) in self.skip):
                continue
            held = self._held(item)
            self.seen[id(item)] = (item, held)
            todo += held

    def _held(self, item: Any) -> tuple[Any, ...]:
        """The objects that an object holds."""
        match item:
            case Tensor():
                return ()
            case types.FunctionType():
                return self._function(item)
            case types.MethodType():
                return (item.__self__, item.__func__)
            case types.BuiltinFunctionType() | types.MethodWrapperType():
                return () if isinstance(item.__self__, types.ModuleType) else (item.__self__,)
            case functools.partial():
                return (item.func, item.args, item.keywords)
            case staticmethod() | classmethod():
                return (item.__func__,)
            case property():
                return (item.fget, item.fset, item.fdel)
            case functools.cached_property():
                return (item.func,)
            case types.ModuleType():
                if is_library(item.__name__):
                    return ()
                return tuple(vars(item)[n] for n in sorted(self.names & vars(item).keys()))
            case type():
                if is_library(item.__module__):
                    return ()
                return tuple(v for k, v in vars(item).items() if self._readable(k) and k not in HIDDEN)
        if type(item).__module__ in ("typing", "logging") or (
            isinstance(item, _CACHED) and is_library(item.__module__)
        ):
            return ()
        own = (type(item), *self._attributes(item))
        if isinstance(item, BOXES):
            return (*own, *item)
        if isinstance(item, collections.defaultdict):
            own = (*own, item.default_factory)
        if isinstance(item, TABLES):
            return (*own, *item.keys(), *item.values())
        if not all(map(_python_class, type(item).__mro__)):
            raise OneByOne(f"a {type(item).__module__}.{type(item).__name__} is in reach")
        return own

    def _readable(self, name: str) -> bool:
        """Whether a function could read an attribute: its name is mentioned, or Python or torch read it themselves."""
        special = name.startswith("__") and name.endswith("__") and name not in NOT_RUN
        return special or name in self.names or name in MODULE or "getattr" in self.names

    def _attributes(self, item: Any) -> tuple[Any, ...]:
        own = vars(item) if hasattr(item, "__dict__") else {}
        held = [x for k, v in own.items() if self._readable(k) for x in (k, v)]
        for cls in type(item).__mro__:
            slots = vars(cls).get("__slots__", ()) if cls is not object else ()
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(item, name):
                    held.append(getattr(item, name))
        return tuple(held)

    def _is_around(self, f: types.FunctionType) -> bool:
        """Whether a function is a decorator's, around the one that runs the loop."""
        return f.__code__ is not self.running and getattr(inspect.unwrap(f), "__code__", None) is self.running

    def _function(self, f: types.FunctionType) -> tuple[Any, ...]:
        if is_library(f.__module__ or ""):
            return ()
        if self._is_around(f) and not FUNCTIONS & self.names:
            self.wrappers.add(f.__code__)
            return tuple(vars(f).values())
        _check_code(f.__code__)
        if self.skip is not None:
            _check_numbers(f.__code__, bool(self.skip))
        self.mentioned |= code_names(f.__code__)
        cells = [c.cell_contents for c in f.__closure__ or () if _filled(c)]
        named = [f.__globals__[n] for n in sorted(code_names(f.__code__)) if n in f.__globals__]
        made = [v for c in named if isinstance(c, type) and not is_library(c.__module__) for v in vars(c).values()]
        return (*cells, *named, *made, *(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values(), *vars(f).values())


def _python_class(cls: type) -> bool:
    """Whether the instances of a class hold nothing but attributes: it was made by a class statement."""
    made = cls.__flags__ & _HEAP and any({"__weakref__", "__slots__"} & vars(c).keys() for c in cls.__mro__)
    return cls is object or (bool(made) and (is_torch(cls.__module__) or not is_library(cls.__module__)))


_HEAP = 1 << 9


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


@functools.cache
def _check_code(code: types.CodeType) -> None:
    """An error that is caught could be one that only a trace raises, and some names look past the state."""
    if found := LOOKS_BEHIND & code_names(code):
        raise OneByOne(f"{code.co_qualname} uses {min(found)}")
    steps = list(dis.get_instructions(code))
    if any(step.opname == "MATCH_CLASS" for step in steps):
        raise OneByOne(f"{code.co_qualname} matches a class, by names that are nowhere mentioned")
    for step, after in itertools.pairwise(steps):
        if step.opname == "PUSH_EXC_INFO" and after.opname != "WITH_EXCEPT_START":
            raise OneByOne(f"{code.co_qualname} has a try statement")
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            _check_code(const)


@functools.cache
def _check_numbers(code: types.CodeType, modules: bool) -> None:
    """The index of a visit is no int, and a stand-in not one of the `modules`: what could tell them apart."""
    names = code_names(code)
    if found := names & (TELLS | WALKS | {"getattr"} if modules else TELLS):
        raise OneByOne(f"{code.co_qualname} uses {min(found)}")
    for step, after in itertools.pairwise(dis.get_instructions(code)):
        if after.opname == "IS_OP" and not (step.opname == "LOAD_CONST" and type(step.argval) in (type(None), bool)):
            raise OneByOne(f"{code.co_qualname} asks whether two values are one object")
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            _check_numbers(const, modules)


TELLS = frozenset("is_ is_not __torch_function__ _is".split())

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

# -- the loop in its bytecode ---------------------------------------------------------------


def loop_head(frame: types.FrameType) -> int:
    """The FOR_ITER of the `for` statement that is about to start in a frame; `OneByOne` if it is anything else."""
    code, steps = frame.f_code, _steps(frame.f_code)
    at = next((i for i, s in enumerate(steps) if s.offset == frame.f_lasti), None)
    if at is None or steps[at].opname != "GET_ITER" or steps[at + 1].opname != "FOR_ITER":
        raise OneByOne("the list is not what a for statement runs over")
    check_loop(code, steps[at + 1].offset)
    return steps[at + 1].offset


def check_loop(code: types.CodeType, at: int) -> None:
    """Raise `OneByOne` unless the FOR_ITER at an offset is that of a `for` statement of a plain function."""
    if code.co_name.startswith("<") or code.co_flags & _GENERATORS:
        raise OneByOne("the loop is in a comprehension, a lambda or a generator")
    steps = _steps(code)
    head = next(s for s in steps if s.offset == at)
    if any(s.opname in ("LIST_APPEND", "SET_ADD", "MAP_ADD") and head.offset < s.offset < head.argval for s in steps):
        raise OneByOne("a comprehension is in the loop")


@functools.cache
def _steps(code: types.CodeType) -> list[dis.Instruction]:
    return list(dis.get_instructions(code))


@functools.cache
def dead_locals(code: types.CodeType, head: int) -> frozenset[str]:
    """Local variables that nobody reads after `head` before they are set again."""
    steps = _steps(code)
    place = {s.offset: i for i, s in enumerate(steps)}
    follow = [tuple(place[o] for o in _next(steps, i)) for i in range(len(steps))]
    for entry in dis.Bytecode(code).exception_entries:  # type: ignore[attr-defined]
        for i, s in enumerate(steps):
            if entry.start <= s.offset < entry.end:
                follow[i] = (*follow[i], place[entry.target])
    reads, sets = zip(*(_touched(s) for s in steps), strict=True)
    live: list[frozenset[str]] = [frozenset()] * len(steps)
    changed = True
    while changed:
        changed = False
        for i in range(len(steps) - 1, -1, -1):
            after: frozenset[str] = frozenset().union(*(live[j] for j in follow[i]))
            now = reads[i] | (after - sets[i])
            changed |= now != live[i]
            live[i] = now
    plain = set(code.co_varnames) - set(code.co_cellvars)
    return frozenset(plain - live[place[head]])


def _next(steps: list[dis.Instruction], i: int) -> Iterator[int]:
    step = steps[i]
    if step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
        yield step.argval
    ends = ("RETURN_VALUE", "RETURN_CONST", "RERAISE", "RAISE_VARARGS")
    if step.opname not in ends and not step.opname.startswith(("JUMP_FORWARD", "JUMP_BACKWARD")):
        yield from (s.offset for s in steps[i + 1 : i + 2])


_READS: dict[str, Callable[[str], tuple[set[str], set[str]]]] = {
    "LOAD_FAST": lambda n: ({n}, set()),
    "LOAD_FAST_CHECK": lambda n: ({n}, set()),
    "LOAD_FAST_AND_CLEAR": lambda n: ({n}, set()),
    "DELETE_FAST": lambda n: ({n}, set()),
    "STORE_FAST": lambda n: (set(), {n}),
}


def _touched(step: dis.Instruction) -> tuple[frozenset[str], frozenset[str]]:
    """The local variables that an instruction reads, and those that it sets."""
    if "_FAST" not in step.opname:
        return frozenset(), frozenset()
    if step.opname not in _READS:
        raise OneByOne(f"the instruction {step.opname} is not known")
    reads, sets = _READS[step.opname](step.argval)
    return frozenset(reads), frozenset(sets)
