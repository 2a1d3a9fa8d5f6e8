"""Loops over numbers and lists of modules whose body is traced once: `range(E)`, `enumerate(self.experts)`.

    for e in range(E):                            # e is a `Number`: what it is, nobody can see
    for e, expert in enumerate(self.experts):     # expert is a stand-in for all of them (stand_ins.py)

The function runs with a `range` and an `enumerate` of ours.  Called anywhere but at the head of a `for` statement of
the function itself, they are Python's own.  A `Number` is refused everywhere (`OneByOne`) except where it is compared,
with numbers or with ids, or chooses an entry of a tensor or of a list of modules that are alike.
"""

import dis
import functools
import operator
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from moe_compile.visits import Visits

FEW = 8  # loops over fewer numbers are traced one by one


class Number:
    """The index of a visit.  It passes for an int, and nothing of it can be read: each try is `OneByOne`."""

    __slots__ = ("symbol", "visits")

    def __init__(self, visits: "Visits", symbol: Any) -> None:
        object.__setattr__(self, "visits", visits)
        object.__setattr__(self, "symbol", symbol)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return int  # for `isinstance`, which says of it what it says of the number
        if name == "__torch_function__":
            return Number.__torch_function__
        _refuse(name)(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        _refuse(name)(self)


def symbol_of(number: Number) -> Any:
    """A number as an expression of the size that stands for it."""
    return object.__getattribute__(number, "symbol")


def _refuse(name: str) -> Callable[..., NoReturn]:
    def refuse(number: Number, *_: Any) -> NoReturn:
        raise object.__getattribute__(number, "visits").fail(f"Python computes with an index ({name})")

    return refuse


def _compared(name: str) -> Callable[[Number, Any], Any]:
    compare = getattr(operator, name)

    def asked(number: Number, other: Any) -> Any:
        visits = object.__getattribute__(number, "visits")
        if isinstance(other, Tensor) and name == "eq":
            return visits.equal(other, number)
        if type(other) is Number:
            return visits.ask(number, lambda n: compare(n, n) if other is number else _refuse(name)(number))
        if type(other) not in (int, float, bool, str, type(None)):
            raise visits.fail(f"an index is compared with a {type(other).__name__}")
        return visits.ask(number, lambda n: compare(n, other))

    return asked


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Number, f"__{_name}__", _compared(_name))
Number.__bool__ = lambda number: object.__getattribute__(number, "visits").ask(number, bool)  # type: ignore[attr-defined]
for _name in """
    add radd iadd sub rsub isub mul rmul imul matmul rmatmul floordiv rfloordiv truediv rtruediv mod rmod pow rpow
    divmod rdivmod neg pos abs invert and rand or ror xor rxor lshift rlshift rshift rrshift int index float complex
    round trunc floor ceil str repr format bytes hash dir sizeof reduce reduce_ex copy deepcopy
""".split():
    setattr(Number, f"__{_name}__", _refuse(_name))


def long_enough(numbers: Sequence[int]) -> bool:
    """Whether a loop over the numbers is worth more than tracing it one by one."""
    return len(numbers) >= FEW and min(numbers) >= 0


# -- the program with a `range` and an `enumerate` of its own -------------------------------


def has_loops(fn: Callable[..., Any]) -> bool:
    """Whether a function may have a `for` over numbers or modules; it only calls `range` and `enumerate`."""
    return isinstance(fn, types.FunctionType) and _loops(fn.__code__) and not OURS & fn.__globals__.keys()


OURS = frozenset(("range", "enumerate"))


@functools.cache
def _loops(code: types.CodeType) -> bool:
    """They are called wherever they are named: nobody looks at the functions themselves."""
    named = [s for s in dis.get_instructions(code) if s.argval in OURS and s.opname not in ("LOAD_ATTR", "LOAD_METHOD")]
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    calls = all(s.opname == "LOAD_GLOBAL" and (s.arg or 0) & 1 for s in named)
    steps = {s.opname for s in dis.get_instructions(code)}
    return bool(named) and calls and "FOR_ITER" in steps and not any(map(_names_them, inner))


def _names_them(code: types.CodeType) -> bool:
    return bool(OURS & set(code.co_names)) or any(
        _names_them(c) for c in code.co_consts if isinstance(c, types.CodeType)
    )


Over = Callable[[types.FrameType, int, Sequence[int], "nn.ModuleList | None"], "Iterable[Any] | None"]


def program(fn: types.FunctionType, over: Over) -> types.FunctionType:
    """A copy of the function.

    `over(frame, head, numbers, modules)` gives what a `for` statement runs over in the place of the numbers, or of
    `enumerate(modules)`; None: what it says.
    """

    def loop(numbers: Callable[[], Sequence[int]], modules: nn.ModuleList | None = None) -> Iterable[Any] | None:
        frame = sys._getframe(2)
        head = _called_for(frame) if frame.f_code is fn.__code__ else None
        return None if head is None else over(frame, head, numbers(), modules)

    def our_range(*args: Any, **kwargs: Any) -> Any:
        numbers = range(*args, **kwargs)
        found = loop(lambda: numbers)
        return numbers if found is None else found

    def our_enumerate(*args: Any, **kwargs: Any) -> Any:
        found = None
        if len(args) == 1 and not kwargs and type(args[0]) is nn.ModuleList:
            found = loop(lambda: range(len(args[0])), args[0])
        return enumerate(*args, **kwargs) if found is None else found

    before = fn.__globals__["__builtins__"]
    builtins = dict(before if isinstance(before, dict) else vars(before))
    scope = {**fn.__globals__, "__builtins__": builtins | {"range": our_range, "enumerate": our_enumerate}}
    copied = types.FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__, fn.__closure__)
    copied.__kwdefaults__ = fn.__kwdefaults__
    return copied


def _called_for(frame: types.FrameType) -> int | None:
    """The FOR_ITER of the `for` statement whose list a frame is calling for; None if it calls for anything else."""
    steps = _steps(frame.f_code)
    at = max(i for i, s in enumerate(steps) if s.offset <= frame.f_lasti)
    names = [s.opname for s in steps[at : at + 3]]
    return steps[at + 2].offset if names == ["CALL", "GET_ITER", "FOR_ITER"] else None


@functools.cache
def _steps(code: types.CodeType) -> list[dis.Instruction]:
    return list(dis.get_instructions(code))


def numbers_in(args: Any) -> bool:
    """Whether the arguments of a call hold the index of a visit."""
    return any(type(a) is Number or (type(a) in _BOXES and numbers_in(_parts(a))) for a in args)


_BOXES = (tuple, list, dict, slice)


def _parts(box: Any) -> Iterable[Any]:
    if isinstance(box, slice):
        return (box.start, box.stop, box.step)
    return box.values() if isinstance(box, dict) else box


EQUAL = {torch.eq, torch.Tensor.eq, torch.Tensor.__eq__}
