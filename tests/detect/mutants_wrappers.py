"""Forwards and helpers behind decorators: what a decorator's function does is the program's as well.

Around a loop over chosen experts it may hold what no visit can compare, as long as the loop does not call it.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tests.detect.loops import Listed, Mlp, Stacked, idiom, mutant
from tests.detect.mutants_index import Chosen, visited

REGISTRY: dict[str, Any] = {"lock": threading.Lock(), "names": iter("ab")}  # nothing that can be compared
CALLS: list[int] = []


def registered(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As transformers chooses between implementations."""

    @functools.wraps(forward)
    def choose(self: Stacked, *args: Any) -> Tensor:
        return REGISTRY.get("eager", forward)(self, *args)

    return choose


def peeking(forward: Callable[..., Tensor]) -> Callable[..., Any]:
    """Without arguments, a number."""

    @functools.wraps(forward)
    def choose(self: Stacked, *args: Any) -> Any:
        return forward(self, *args) if args else 1.0

    return choose


def counted(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def count(self: Mlp, x: Tensor) -> Tensor:
        CALLS.append(1)
        return forward(self, x)

    return count


def twice(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def double(self: Mlp, x: Tensor) -> Tensor:
        return 2 * forward(self, x)

    return double


@visited(None)
@idiom()
class Registered(Chosen):
    @registered
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for e in hit:
            self.contribute(out, mask, e[0], x, weights)
        return out


@visited(None)
@idiom()
class RegisteredTwice(Chosen):
    @registered
    @registered
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for e in hit:
            self.contribute(out, mask, e[0], x, weights)
        return out


@visited("an iteration calls peeking.<locals>.choose")
@idiom()
class CallsItsDecorator(Chosen):
    @peeking
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for e in hit:
            self.contribute(out, mask, e[0], x, weights, self.forward())  # type: ignore[call-arg]
        return out


@visited("an iteration leaves something for the next")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class StateOnItsDecorator(Chosen):
    @registered
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        seen: list[int] = StateOnItsDecorator.forward.seen  # type: ignore[attr-defined]
        seen.clear()
        for e in hit:
            StateOnItsDecorator.forward.seen.append(1)  # type: ignore[attr-defined]
            scale = 0.5 if len(StateOnItsDecorator.forward.seen) == 3 else 1.0  # type: ignore[attr-defined]
            self.contribute(out, mask, e[0], x, weights, scale)
        seen.clear()
        return out


StateOnItsDecorator.forward.seen = []  # type: ignore[attr-defined]


@visited("a builtins.str_ascii_iterator is in reach")
@idiom()
class LooksIntoItsDecorator(Chosen):
    """What is behind a function may be read through it."""

    @registered
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for e in hit:
            scale = float(len(LooksIntoItsDecorator.forward.__closure__ or "1"))
            self.contribute(out, mask, e[0], x, weights, scale)
        return out


class CountedMlp(Mlp):
    forward = counted(Mlp.forward)  # type: ignore[assignment]


class DoubledMlp(Mlp):
    forward = twice(Mlp.forward)  # type: ignore[assignment]


@mutant("it changes CALLS when it runs")
class ExpertsThatCount(Listed):
    def __init__(self) -> None:
        super().__init__(CountedMlp)


@idiom()
class ExpertsTwice(Listed):
    def __init__(self) -> None:
        super().__init__(DoubledMlp)


@mutant("expert 1 differs from expert 0: aten.mul.Tensor where that has aten.linear")
class OneExpertTwice(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[1] = DoubledMlp()
