"""Loops over chosen experts that tell one visit from another: by what Python remembers, or by what it asks of the index.

One visit stands for many experts only where nothing of that happens (moe_compile/visits.py).  Each of these is refused,
or rewritten right; `ONE_BY_ONE` says why the visits of each are traced apart.
"""

import collections
import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.loops import D, E, Stacked, idiom, mutant

ONE_BY_ONE: dict[str, str | None] = {}


def visited(why: str | None) -> Any:
    """Why the visits are traced one by one; None: they are not."""

    def register(cls: type) -> type:
        ONE_BY_ONE[cls.__name__] = why
        return cls

    return register


class Chosen(Stacked):
    """The parts of a loop over chosen experts."""

    def begin(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        return torch.zeros_like(x), mask, torch.greater(mask.sum((-1, -2)), 0).nonzero()

    def contribute(self, out: Tensor, mask: Tensor, e: Any, x: Tensor, weights: Tensor, scale: Any = 1.0) -> None:
        k, t = torch.where(mask[e])
        out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None] * scale)


class Simple(Chosen):
    """`scale(e)` is what a mutant changes."""

    def scale(self, e: Tensor) -> Any:
        return 1.0

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for e in hit:
            self.contribute(out, mask, e[0], x, weights, self.scale(e[0]))
        return out


# -- what Python remembers ------------------------------------------------------------------


@visited("an iteration leaves something for the next")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class LocalList(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        seen: list[int] = []
        for e in hit:
            seen += [1]
            self.contribute(out, mask, e[0], x, weights, 0.5 if len(seen) == 3 else 1.0)
        return out


@visited("an iteration leaves something for the next")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class ClosureCounter(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        count = 0

        def scale() -> float:
            nonlocal count
            count += 1
            return 0.5 if count == 3 else 1.0

        for e in hit:
            self.contribute(out, mask, e[0], x, weights, scale())
        return out


@visited("an iteration leaves something for the next")
@mutant("expert 1 adds something else when some experts have no rows")
class SilentCounter(Chosen):
    """The count says how many were skipped: nothing shows as long as all are visited."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        count = -1

        def scale(e: Tensor) -> float:
            nonlocal count
            count += 1
            return 0.5 if e - count == 1 else 1.0

        for e in hit:
            self.contribute(out, mask, e[0], x, weights, scale(e[0]))
        return out


class Box:
    def __init__(self) -> None:
        self.number = 0


@visited(None)
@mutant("SetsByName.scale (file.py) sets attributes by name (setattr)")
class SetsByName(Simple):
    def __init__(self) -> None:
        super().__init__()
        self.box = Box()

    def scale(self, e: Tensor) -> Any:
        setattr(self.box, "number", self.box.number + 1)  # noqa: B010
        return 0.5 if self.box.number == 3 else 1.0


@visited("a builtins.list_iterator is in reach")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class LocalIterator(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        scales = iter([1.0, 1.0, 0.5, 1.0])
        for e in hit:
            self.contribute(out, mask, e[0], x, weights, next(scales))
        return out


def numbers() -> Iterator[float]:
    yield from itertools.cycle([1.0, 1.0, 0.5])


@visited("a builtins.generator is in reach")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class LocalGenerator(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        scales = numbers()
        for e in hit:
            self.contribute(out, mask, e[0], x, weights, next(scales))
        return out


@visited("a builtins.list_iterator is in reach")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class BoundNext(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        step = iter([1.0, 1.0, 0.5, 1.0]).__next__
        for e in hit:
            self.contribute(out, mask, e[0], x, weights, step())
        return out


@visited("an iteration leaves something for the next")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class DefaultArgument(Simple):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        DefaultArgument.scale.__defaults__[0].clear()  # type: ignore[index, attr-defined]
        return super().forward(x, ids, weights)

    def scale(self, e: Tensor, seen: list[int] = []) -> Any:  # noqa: B006
        seen += [1]
        return 0.5 if len(seen) % 4 == 3 else 1.0


@visited("an iteration leaves something for the next")
@mutant("expert 1 differs from expert 0: 1.0 where that has 0.5")
class Rotates(Simple):
    """After as many turns as there are experts nothing has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = collections.deque([1.0, 1.0, 0.5, 1.0])

    def scale(self, e: Tensor) -> Any:
        self.turn.rotate(1)
        return self.turn[0]


@visited("an iteration leaves something for the next")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class ListOfTheClass(Simple):
    seen: list[int] = []  # noqa: RUF012

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self.seen.clear()
        return super().forward(x, ids, weights)

    def scale(self, e: Tensor) -> Any:
        self.seen.append(1)
        return 0.5 if len(self.seen) % 4 == 3 else 1.0


@functools.lru_cache(None)
def kept() -> list[int]:
    return []


@visited("a functools._lru_cache_wrapper is in reach")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class CachedList(Simple):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        kept().clear()
        return super().forward(x, ids, weights)

    def scale(self, e: Tensor) -> Any:
        kept().append(1)
        return 0.5 if len(kept()) % 4 == 3 else 1.0


@visited("an iteration leaves something for the next")
@mutant("expert 1 differs from expert 0: 0.5 where that has 1.0")
class InnerLoop(Chosen):
    """What is carried is set in a loop inside of the loop."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        scale = 1.0
        for e in hit:
            for _ in range(1):
                self.contribute(out, mask, e[0], x, weights, scale)
                scale = scale * 0.5
        return out


@visited("an iteration leaves something for the next")
@mutant("expert 1 differs from expert 0: 1.0 where that has 0.5")
class OnlyTheFirst(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        first = True
        for e in hit:
            self.contribute(out, mask, e[0], x, weights, 0.5 if first else 1.0)
            first = False
        return out


@visited("an iteration leaves something for the next")
@mutant("AfterTheLast.forward carries e from one iteration to the next and skips some")
class AfterTheLast(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for e in hit:
            self.contribute(out, mask, e[0], x, weights)
        return out * (e + 1)


# -- what tensors remember ------------------------------------------------------------------


@visited("index reads or changes what visits change")
@mutant("expert 1 differs from expert 0: it reads token mul_, that one token clone")
class ChangesTokens(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        rows = x.clone()
        for e in hit:
            self.contribute(out, mask, e[0], rows, weights)
            rows.mul_(0.5)
        return out


@visited("detach reads or changes what visits change")
@mutant("1 experts are used, w2 holds 4")
class ReadsTheSum(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for e in hit:
            self.contribute(out, mask, e[0], x, weights, 1.0 + out.detach().mean())
        return out


@visited("an iteration leaves something for the next")
@mutant("expert 3 adds something else when some experts have no rows")
class CarriesRows(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        state = torch.ones(D)
        for e in hit:
            self.contribute(out, mask, e[0], x, weights, state)
            state = state * 0.5
        return out


@visited("clone reads or changes what visits change")
@mutant("what surrounds the sum differs when some experts have no rows")
class CarriesInPlace(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        state = torch.ones(D)
        for e in hit:
            self.contribute(out, mask, e[0], x, weights, state.clone())
            state *= 0.5
        return out


@visited("rand is not known to be the same at every visit")
@mutant("what surrounds the sum differs when some experts have no rows")
class NoiseEachVisit(Simple):
    def scale(self, e: Tensor) -> Any:
        return torch.rand(1)


@visited("an iteration leaves something for the next")
@mutant("aten.index.Tensor at file.py runs under no_grad inside the expert loop")
class LeavesNoGrad(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for e in hit:
            self.contribute(out, mask, e[0], x, weights)
            torch._C._set_grad_enabled(False)
        torch._C._set_grad_enabled(True)
        return out


@visited("it changes whether a tensor needs a gradient")
@mutant("it changes whether a tensor needs a gradient")
class LeavesNoGradient(Chosen):
    """After the first visit the tokens have no gradient."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for e in hit:
            self.contribute(out, mask, e[0], x, weights)
            x.requires_grad_(False)
        return out


@visited("an index is used by __setitem__")
@mutant("zeros is read after it was changed in place through another name")
class MarksItsIndex(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        load = torch.zeros(E)
        for e in hit:
            self.contribute(out, mask, e[0], x, weights, 1.0 + load.sum())
            load[e[0]] = 1.0
        return out


# -- what Python asks of the index ----------------------------------------------------------


@visited("the list is not what a for statement runs over")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class Position(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for i, e in enumerate(hit):
            self.contribute(out, mask, e[0], x, weights, 0.5 if i == 2 else 1.0)
        return out


@visited("the list is not what a for statement runs over")
@mutant("expert 1 adds something else when some experts have no rows")
class SilentPosition(Chosen):
    """How many were skipped: nothing shows as long as all are visited."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for i, e in enumerate(hit):
            self.contribute(out, mask, e[0], x, weights, 0.5 if e[0] - i == 1 else 1.0)
        return out


@visited("expert 1 differs from expert 0: 0.5 where that has 1.0")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class OneIsSpecial(Simple):
    def scale(self, e: Tensor) -> Any:
        return 0.5 if e == 2 else 1.0


def is_special(number: Tensor) -> bool:
    return bool((number % 3 == 2).any())


@visited("expert 1 differs from expert 0: 0.5 where that has 1.0")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class AskedElsewhere(Simple):
    def scale(self, e: Tensor) -> Any:
        return 0.5 if is_special(e) else 1.0


@visited("expert 1 differs from expert 0: 0.5 where that has 1.0")
@mutant("expert 1 differs from expert 0: 0.5 where that has 1.0")
class AmongNumbers(Simple):
    def scale(self, e: Tensor) -> Any:
        return 0.5 if e in (1, 2) else 1.0


@visited("an index is used by item")
@mutant("expert 2 differs from expert 0: 2.0 where that has 1.0")
class ItemOfSome(Simple):
    def scale(self, e: Tensor) -> Any:
        return float(e.item()) if e > 1 else 1.0


@visited("CaughtItem.scale has a try statement")
@mutant("expert 1 differs from expert 0: -1.0 where that has -0.5")
class CaughtItem(Simple):
    def scale(self, e: Tensor) -> Any:
        try:
            return 1.0 / (int(e) - 2)
        except ZeroDivisionError:
            return 1.0


@visited("CaughtAnything.scale has a try statement")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class CaughtAnything(Simple):
    def scale(self, e: Tensor) -> Any:
        try:
            return [1.0, 1.0, 0.5, 1.0][e]
        except:  # noqa: E722
            return 1.0


@visited("Suppressed.scale uses suppress")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class Suppressed(Simple):
    def scale(self, e: Tensor) -> Any:
        with contextlib.suppress(BaseException):
            return [1.0, 1.0, 0.5, 1.0][e]
        return 1.0


@visited("an index is used by __format__")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class Formatted(Simple):
    def scale(self, e: Tensor) -> Any:
        return 0.5 if f"{e}" == "2" else 1.0


@visited("an index is used by __repr__")
@mutant("Python looks at where a tensor lies, or makes text of it (__repr__)")
class Spelled(Simple):
    def scale(self, e: Tensor) -> Any:
        return 0.5 if str(e) == "tensor(2)" else 1.0


@visited("an index is used by storage_offset")
@mutant("Python looks at where a tensor lies, or makes text of it (storage_offset)")
class WhereItLies(Simple):
    def scale(self, e: Tensor) -> Any:
        return 0.5 if e.storage_offset() == 2 else 1.0


@visited("an index is used by equal")
@mutant("Python decides on data: aten.equal.default")
class EqualToBuffer(Simple):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("special", torch.tensor(2))

    def scale(self, e: Tensor) -> Any:
        return 0.5 if torch.equal(e, self.special) else 1.0


@visited("Python decides on eq, not shown to say whether an expert was chosen")
@mutant("Python decides on eq, not shown to say whether an expert was chosen")
class ComparedToBuffer(Simple):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("special", torch.tensor(2))

    def scale(self, e: Tensor) -> Any:
        return 0.5 if e == self.special else 1.0


@visited("index_add_ reads or changes what visits change")
@mutant("expert 1 differs from expert 0: 2 where that has 1")
class FactorIsIndex(Simple):
    def scale(self, e: Tensor) -> Any:
        return e + 1


@visited("Python decides on data")
@idiom()
class FactorOfNext(Simple):
    """A factor that belongs to another expert."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.rand(E, 1))

    def scale(self, e: Tensor) -> Any:
        return self.factors[(e + 1) % E]


@visited("the loop was left early")
@mutant("3 experts are used, w2 holds 4")
class StopsAtIndex(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for e in hit:
            if e[0] == 3:
                break
            self.contribute(out, mask, e[0], x, weights)
        return out


@visited("StopsIfEmpty.forward leaves a loop early, depending on data")
@mutant("StopsIfEmpty.forward leaves a loop early, depending on data")
class StopsIfEmpty(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for e in hit:
            self.contribute(out, mask, e[0], x, weights)
            if not mask[0].any():
                break
        return out


# -- forms that are right -------------------------------------------------------------------


@visited(None)
@idiom()
class Plainly(Simple):
    pass


@visited(None)
@idiom()
class AsksWithoutEffect(Simple):
    def scale(self, e: Tensor) -> Any:
        return 1.0 if e in (1, 2) else 1.0  # noqa: RUF034


@visited(None)
@idiom()
class ByTensorInDict(Simple):
    """A tensor is found by its identity, that is not at all."""

    def scale(self, e: Tensor) -> Any:
        return {torch.tensor(2): 0.5}.get(e, 1.0)


@visited(None)
@idiom()
class FactorOfExpert(Simple):
    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.rand(E, 1))

    def scale(self, e: Tensor) -> Any:
        return self.factors[e]


@visited("expert 0 adds something else when its experts are visited one by one")
@idiom()
class ColumnOfExpert(Simple):
    """One column for each expert: the last dimension is chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.rand(D, E))

    def scale(self, e: Tensor) -> Any:
        return self.factors[:, e]


@visited("an iteration leaves something for the next")
@idiom()
class NewTensorEachTime(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for e in hit:
            k, t = torch.where(mask[e[0]])
            out = out.index_add(0, t, self.expert(e[0], x[t]) * weights[t, k, None])
        return out


@visited("the list is not what a for statement runs over")
@idiom()
class InComprehension(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        [self.contribute(out, mask, e[0], x, weights) for e in hit]
        return out


@visited(None)
@idiom()
class SkipsEmpty(Chosen):
    """Asks again whether somebody chose the expert, by a number of rows."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for e in hit:
            k, t = torch.where(mask[e[0]])
            if t.numel() == 0:
                continue
            out.index_add_(0, t, self.expert(e[0], x[t]) * weights[t, k, None])
        return out


@visited(None)
@idiom()
class ComparesIds(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, _, hit = self.begin(x, ids)
        for e in hit.squeeze(-1):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@visited(None)
@idiom()
class AddsByIndexing(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        _, mask, hit = self.begin(x, ids)
        out = torch.zeros_like(x)
        for e in hit:
            k, t = torch.where(mask[e[0]])
            out[t] += self.expert(e[0], x[t]) * weights[t, k, None]
        return out


# -- the index itself is changed ------------------------------------------------------------


@visited("an index is used by add_")
@idiom()
class CountsUp(Simple):
    """Each expert has the weights of the next."""

    def scale(self, e: Tensor) -> Any:
        e += 1
        return 1.0

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for e in hit:
            k, t = torch.where(mask[e[0]])
            self.scale(e)
            out.index_add_(0, t, self.expert(e[0] % E, x[t]) * weights[t, k, None])
        return out


@visited("an index is used by __get__")
@mutant("it reads a tensor that is neither an argument nor a parameter or buffer of its module")
class ChangesItsData(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for e in hit:
            k, t = torch.where(mask[e[0]])
            e.data.fill_(0)
            out.index_add_(0, t, self.expert(e[0], x[t]) * weights[t, k, None])
        return out


@visited("Python decides on data")
@mutant("expert 1 differs from expert 0: outer select_3 where that has aten.select.int")
class OtherBits(Simple):
    """The index as another dtype."""

    def scale(self, e: Tensor) -> Any:
        return self.w2[e.view(torch.float64).long()][:, 0]


@visited("there are two loops over experts")
@mutant("the loop visits experts [0, 0, 0, 0, 1, 1, ... 3], not each of 0..15 once")
class TwoLoops(Chosen):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        for e in hit:
            for f in hit:
                self.contribute(out, mask, e[0], x, weights, 0.5 if e > f else 1.0)
        return out


@visited("an iteration leaves something for the next")
@mutant("ListsItsExperts.forward writes into kept in a loop that skips iterations")
class ListsItsExperts(Chosen):
    """What was kept of each visit is used after the loop."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask, hit = self.begin(x, ids)
        kept = {}
        for e in hit:
            kept[0] = e
            self.contribute(out, mask, e[0], x, weights)
        return out * kept[0]
