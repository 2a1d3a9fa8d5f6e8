"""Loops over numbers and lists of modules that tell one expert from another: by its number, or by what it is.

One visit stands for many experts only where nothing of that happens (moe_compile/numbers.py, stand_ins.py).  Each of
these is refused, or rewritten right; `BY_NUMBER` says why the experts of each are traced apart.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.loops import FF, D, E, Idiom, Listed, Mlp, Mutant, Stacked

IDIOMS: dict[str, Idiom] = {}  # of this file alone: they are run with loops of few numbers
MUTANTS: dict[str, Mutant] = {}
BY_NUMBER: dict[str, str | None] = {}


def idiom() -> Callable[[type], type]:
    def register(cls: type) -> type:
        IDIOMS[cls.__name__] = Idiom(cls)
        return cls

    return register


def mutant(reason: str) -> Callable[[type], type]:
    def register(cls: type) -> type:
        MUTANTS[cls.__name__] = Mutant(cls, reason)
        return cls

    return register


def apart(why: str | None) -> Any:
    """Why the experts are traced one by one; None: they are not."""

    def register(cls: type) -> type:
        BY_NUMBER[cls.__name__] = why
        return cls

    return register


class Ranged(Stacked):
    """`scale(e)` is what a mutant changes."""

    def scale(self, e: int) -> Any:
        return 1.0

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None] * self.scale(e))
        return out


class Enumerated(Listed):
    """`apply_expert(e, expert, x)` is what a mutant changes."""

    def run_one(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return expert(x)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.run_one(e, expert, x[t]) * weights[t, k, None])
        return out


# -- what Python sees of a number -----------------------------------------------------------


@apart("expert 1 differs from expert 0: 0.5 where that has 1.0")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class NumberIsTwo(Ranged):
    def scale(self, e: int) -> Any:
        return 0.5 if e == 2 else 1.0


@apart("Python computes with an index (mod)")
@mutant("expert 1 differs from expert 0: 0.5 where that has 1.0")
class OddNumbers(Ranged):
    def scale(self, e: int) -> Any:
        return 0.5 if e % 2 else 1.0


@apart("Python computes with an index (and)")
@mutant("expert 1 differs from expert 0: 0.5 where that has 1.0")
class OddBits(Ranged):
    def scale(self, e: int) -> Any:
        return 0.5 if e & 1 else 1.0


@apart("expert 1 differs from expert 0: 0.5 where that has 1.0")
@mutant("expert 1 differs from expert 0: 0.5 where that has 1.0")
class NotTheFirst(Ranged):
    def scale(self, e: int) -> Any:
        return 0.5 if e else 1.0


@apart("Python computes with an index (hash)")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class AmongSet(Ranged):
    def scale(self, e: int) -> Any:
        return 0.5 if e in {2, 3} else 1.0


@apart("expert 1 differs from expert 0: 0.5 where that has 1.0")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class AmongTuple(Ranged):
    def scale(self, e: int) -> Any:
        return 0.5 if e in (2, 3) else 1.0


@apart("Python computes with an index (index)")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class EntryOfList(Ranged):
    def __init__(self) -> None:
        super().__init__()
        self.scales = [1.0, 1.0, 0.5, 1.0]

    def scale(self, e: int) -> Any:
        return self.scales[e]


@apart("Python computes with an index (index)")
@mutant("expert 1 differs from expert 0: 2.0 where that has 1.0")
class SliceOfList(Ranged):
    def scale(self, e: int) -> Any:
        return 1.0 + sum([1.0, 1.0, 1.0, 1.0][:e])


@apart("Python computes with an index (index)")
@mutant("expert 1 differs from expert 0: 2.0 where that has 1.0")
class CountsTo(Ranged):
    def scale(self, e: int) -> Any:
        scale = 1.0
        for _ in range(e):
            scale *= 2.0
        return scale


@apart("Python computes with an index (rmul)")
@mutant("expert 1 differs from expert 0: 1.0 where that has 0.0")
class ListTimesNumber(Ranged):
    def scale(self, e: int) -> Any:
        return float(len([0] * e))


@apart("Python computes with an index (format)")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class AttributeByName(Ranged):
    scale_2 = 0.5

    def scale(self, e: int) -> Any:
        return getattr(self, f"scale_{e}", 1.0)


@apart("Python computes with an index (str)")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class EntryByText(Ranged):
    def __init__(self) -> None:
        super().__init__()
        self.scales = {"2": 0.5}

    def scale(self, e: int) -> Any:
        return self.scales.get(str(e), 1.0)


@apart("Python computes with an index (int)")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class TextByPercent(Ranged):
    def scale(self, e: int) -> Any:
        return 0.5 if "%d" % e == "2" else 1.0  # noqa: UP031


@apart("Python computes with an index (repr)")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class TextOfTuple(Ranged):
    def scale(self, e: int) -> Any:
        return 0.5 if str((e, 0)) == "(2, 0)" else 1.0


@apart("Python computes with an index (hash)")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class EntryOfDict(Ranged):
    def __init__(self) -> None:
        super().__init__()
        self.scales = {2: 0.5}

    def scale(self, e: int) -> Any:
        return self.scales.get(e, 1.0)


@apart("Python computes with an index (float)")
@mutant("expert 1 differs from expert 0: # where that has 1.0")
class Roots(Ranged):
    def scale(self, e: int) -> Any:
        return math.sqrt(e) + (1.0 if e == 0 else 0.4142135623730951)


@apart("Python computes with an index (bit_length)")
@mutant("expert 1 differs from expert 0: 1 where that has 0")
class BitLength(Ranged):
    def scale(self, e: int) -> Any:
        return e.bit_length()


@apart(None)
@idiom()
class AsksItsType(Ranged):
    """A number is an int for whoever asks."""

    def scale(self, e: int) -> Any:
        return 0.5 if isinstance(e, int) and not isinstance(e, (Tensor, str, float)) else 1.0


@apart("AsksExactType.scale uses type")
@idiom()
class AsksExactType(Ranged):
    def scale(self, e: int) -> Any:
        return 0.5 if type(e) is int else 1.0


@apart("IsThatNumber.scale asks whether two values are one object")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class IsThatNumber(Ranged):
    def __init__(self) -> None:
        super().__init__()
        self.special = 2

    def scale(self, e: int) -> Any:
        return 0.5 if e is self.special else 1.0


@apart("CaughtNumber.scale has a try statement")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class CaughtNumber(Ranged):
    def scale(self, e: int) -> Any:
        try:
            return [1.0, 1.0, 0.5, 1.0][e]
        except BaseException:
            return 1.0


@apart("an index is used by full")
@mutant("Python decides on data: aten.equal.default")
class ComparedByTorch(Ranged):
    def scale(self, e: int) -> Any:
        return 0.5 if torch.equal(torch.ones(2), torch.full((2,), e)) else 1.0


@apart(None)
@idiom()
class AsksInVain(Ranged):
    def scale(self, e: int) -> Any:
        return 1.0 if e < 2 and e != 7 and e is not None and e <= 3 else 1.0  # noqa: RUF034


# -- numbers in tensors ---------------------------------------------------------------------


@apart("an index is used by mul")
@mutant("expert 1 differs from expert 0: 1 where that has 0")
class TimesNumber(Ranged):
    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e, x) * e


@apart("Python computes with an index (float)")
@idiom()
class FilledWithNumber(Ranged):
    def scale(self, e: int) -> Any:
        return torch.full((D,), float(e))


@apart("an index is used by clamp")
@mutant("expert 1 differs from expert 0: 1 where that has 0")
class ClampedByNumber(Ranged):
    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e, x).clamp(max=e)


@apart("Python computes with an index (truediv)")
@mutant("dropout with p = 0.1 draws random numbers expert by expert")
class DropsByNumber(Ranged):
    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.dropout(super().expert(e, x), e / 10, True)


@apart("Python computes with an index (add)")
@idiom()
class WeightOfNext(Ranged):
    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert((e + 1) % E, x)


@apart("Python computes with an index (xor)")
@idiom()
class WeightOfPair(Ranged):
    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e ^ 1, x)


@apart("Python computes with an index (rsub)")
@idiom()
class WeightsFromTheEnd(Ranged):
    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(E - 1 - e, x)


@apart("Python computes with an index (neg)")
@mutant("expert 1 differs from expert 0: it reads outer select_2, that one slice w13")
class WeightsByNegative(Ranged):
    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(-e, x)


class ByColumn(Ranged):
    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.rand(D, E))


@apart("expert 0 adds something else when its experts are visited one by one")
@idiom()
class ColumnOfNumber(ByColumn):
    def scale(self, e: int) -> Any:
        return self.factors[:, e]


@apart("Python computes with an index (index)")
@idiom()
class ColumnsToNumber(ByColumn):
    def scale(self, e: int) -> Any:
        return self.factors[:, :e].sum(1) + 1.0


@apart("4 experts are used, x holds 11")
@mutant("4 experts are used, x holds 11")
class RowOfTokens(Ranged):
    """Entry e of the tokens: not the expert's own."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None] * x[e])
        return out


@apart("an index is used by __setitem__")
@mutant("zeros is read after it was changed in place through another name")
class MarksItsNumber(Ranged):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, load = torch.zeros_like(x), torch.zeros(E)
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None] * (1.0 + load.sum()))
            load[e] = 1.0
        return out


# -- what an iteration leaves ---------------------------------------------------------------


@apart("an iteration leaves something for the next")
@mutant("expert 1 differs from expert 0: 0.5 where that has 1.0")
class HalvesEachTime(Ranged):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, scale = torch.zeros_like(x), 1.0
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None] * scale)
            scale = scale * 0.5
        return out


@apart("an iteration leaves something for the next")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class CountsInClosure(Ranged):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, count = torch.zeros_like(x), 0

        def scale() -> float:
            nonlocal count
            count += 1
            return 0.5 if count == 3 else 1.0

        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None] * scale())
        return out


@apart("an iteration leaves something for the next")
@idiom()
class UsedAfterwards(Ranged):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out * (e + 1)


@apart("an iteration leaves something for the next")
@mutant("aten.sym_numel at file.py is not known to be row-wise (it reads index)")
class RowsUsedAfterwards(Ranged):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out + t.numel()


@apart("index reads or changes what visits change")
@mutant("expert 1 differs from expert 0: it reads token mul_, that one token clone")
class HalvesTokens(Ranged):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, rows = torch.zeros_like(x), x.clone()
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, rows[t]) * weights[t, k, None])
            rows.mul_(0.5)
        return out


@apart("dropout is not known to be the same at every visit")
@mutant("dropout with p = 0.5 draws random numbers expert by expert")
class DropsInLoop(Ranged):
    def expert(self, e: int, x: Tensor) -> Tensor:
        return F.dropout(super().expert(e, x), 0.5, True)


@apart("the loop was left early")
@mutant("3 experts are used, w2 holds 4")
class StopsAtThree(Ranged):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            if e == 3:
                break
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@apart("the loop visits experts [1, 2, 3], not each of 0..2 once")
@mutant("the loop visits experts [1, 2, 3], not each of 0..2 once")
class WithoutTheFirst(Ranged):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(1, E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@apart("the loop visits experts [0, 2], not each of 0..1 once")
@mutant("the loop visits experts [0, 2], not each of 0..1 once")
class EachSecond(Ranged):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(0, E, 2):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@apart("there are two loops over experts")
@mutant("the loop visits experts [0, 1, 2, 3, 0, 1, ... 3], not each of 0..15 once")
class LoopInLoop(Ranged):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for f in range(E):
            for e in range(E):
                t, k = torch.where(ids == e)
                out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None] * (0.5 if e > f else 1.0))
        return out


@apart("an iteration leaves something for the next")
@idiom()
class LoopBefore(Ranged):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, factor = torch.zeros_like(x), 1.0
        for _ in range(3):
            factor = factor * 0.5
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None] * factor)
        return out


# -- forms that are right -------------------------------------------------------------------


@apart(None)
@idiom()
class RangedPlainly(Ranged):
    pass


@apart(None)
@idiom()
class EnumeratedPlainly(Enumerated):
    pass


@apart(None)
@idiom()
class IndexedPlainly(Listed):
    pass


@apart(None)
@idiom()
class ElseOfLoop(Ranged):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        else:
            out = out * 2.0
        return out


@apart("")
@idiom()
class BackwardsRange(Ranged):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in reversed(range(E)):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@apart(None)
@idiom()
class DownwardRange(Ranged):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E - 1, -1, -1):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@apart("a list of modules is reached in other ways than by the index")
@mutant("the loop visits experts [1, 2, 3, 4], not each of 0..3 once")
class FromOne(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts, 1):
            t, k = torch.where(ids + 1 == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@apart("a list of modules is reached in other ways than by the index")
@idiom()
class Zipped(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in zip(range(E), self.experts, strict=True):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@apart(None)
@idiom()
class SkippedIfEmpty(Ranged):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            if t.numel() == 0:
                continue
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@apart(None)
@idiom()
class SkippedIfNobody(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.any():
                t, k = torch.where(mask)
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@apart(None)
@idiom()
class HalfAnswersOtherwise(Ranged):
    """Two visits whose experts take turns."""

    def scale(self, e: int) -> Any:
        return 0.5 if e in (0, 2) else 0.5  # noqa: RUF034


@apart(None)
@idiom()
class HalfOfModules(Enumerated):
    def run_one(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return expert(x) if e in (0, 2) else expert(x)  # noqa: RUF034


# -- modules that are not alike -------------------------------------------------------------


class ScaledMlp(Mlp):
    factor: Any = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class ScaledModules(Enumerated):
    def __init__(self) -> None:
        Listed.__init__(self, ScaledMlp)


@apart("the modules of a list are not alike")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class OneFactor(ScaledModules):
    def __init__(self) -> None:
        super().__init__()
        self.experts[2].factor = 0.5


@apart("the modules of a list are not alike")
@mutant("expert 2 differs from expert 0: 0.0 where that has -0.0")
class OneSignOfZero(ScaledModules):
    def __init__(self) -> None:
        super().__init__()
        for i, expert in enumerate(self.experts):
            expert.factor = 0.0 if i == 2 else -0.0


@apart("the modules of a list are not alike")
@mutant("expert 2 differs from expert 0: 1 where that has 1.0")
class OneInteger(ScaledModules):
    def __init__(self) -> None:
        super().__init__()
        for i, expert in enumerate(self.experts):
            expert.factor = 1 if i == 2 else 1.0


class FactorsInList(ScaledMlp):
    def __init__(self) -> None:
        super().__init__()
        self.factors = [[1.0], {"a": 1.0}]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factors[1]["a"]  # type: ignore[call-overload]


@apart("the modules of a list are not alike")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class OneNestedFactor(Enumerated):
    def __init__(self) -> None:
        Listed.__init__(self, FactorsInList)
        self.experts[2].factors[1]["a"] = 0.5  # type: ignore[index, operator, union-attr]


@apart(None)
@idiom()
class NestedFactors(Enumerated):
    def __init__(self) -> None:
        Listed.__init__(self, FactorsInList)


@apart("the modules of a list are not alike")
@mutant("expert 2 differs from expert 0: aten.relu where that has aten.gelu")
class OneActivation(Enumerated):
    def __init__(self) -> None:
        super().__init__()
        self.experts[2].act = F.relu


@apart("the modules of a list are not alike")
@mutant("expert 2 differs from expert 0: 2 arguments for 3")
class OneModuleWithoutBias(Enumerated):
    def __init__(self) -> None:
        super().__init__()
        self.experts[2] = Mlp(bias=False)


@apart("the modules of a list are not alike")
@mutant("expert 2 differs from expert 0: torch.float64 where that has torch.float32")
class OneInDouble(Enumerated):
    def __init__(self) -> None:
        super().__init__()
        self.experts[2].double()

    def run_one(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return expert(x.to(expert.up.weight.dtype)).to(x.dtype)


@apart("the modules of a list are not alike")
@idiom()
class OneFrozen(Enumerated):
    def __init__(self) -> None:
        super().__init__()
        self.experts[2].requires_grad_(False)


@apart("the modules of a list are not alike")
@idiom()
class OneTied(Enumerated):
    """Its weights are those of another."""

    def __init__(self) -> None:
        super().__init__()
        self.experts[2].up.weight = self.experts[1].up.weight  # type: ignore[union-attr]


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)))


@apart("the modules of a list are not alike")
@idiom()
class OneTiedInside(Enumerated):
    def __init__(self) -> None:
        Listed.__init__(self, Square)
        self.experts[2].a.weight = self.experts[2].b.weight  # type: ignore[union-attr]


@apart(None)
@idiom()
class AllTiedInside(Enumerated):
    def __init__(self) -> None:
        Listed.__init__(self, Square)
        for expert in self.experts:
            expert.a = expert.b


@apart("the modules of a list are not alike")
@idiom()
class TiedInAChain(Enumerated):
    """The second layer of each is the first of the next."""

    def __init__(self) -> None:
        Listed.__init__(self, Square)
        for i in range(E - 1):
            self.experts[i].b = self.experts[i + 1].a


@apart(None)
@idiom()
class SharedLayer(Enumerated):
    def __init__(self) -> None:
        Listed.__init__(self, Square)
        for expert in self.experts:
            expert.a = self.experts[0].a  # type: ignore[union-attr]


@apart("the modules of a list are not alike")
@idiom()
class RepeatedExpert(Enumerated):
    def __init__(self) -> None:
        super().__init__()
        self.experts[2] = self.experts[1]


# -- modules that something else knows ------------------------------------------------------


@apart("IsTheFirst.run_one asks whether two values are one object")
@mutant("expert 1 differs from expert 0: 1.0 where that has 0.5")
class IsTheFirst(Enumerated):
    def run_one(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return expert(x) * (0.5 if expert is self.experts[0] else 1.0)


@apart("a list of modules is reached in other ways than by the index")
@mutant("expert 1 differs from expert 0: 1.0 where that has 0.5")
class EqualsTheFirst(Enumerated):
    def run_one(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return expert(x) * (0.5 if expert == self.experts[0] else 1.0)


@apart("a dict holds a part")
@mutant("expert 1 differs from expert 0: 1.0 where that has 0.5")
class EqualsSpecial(Enumerated):
    def __init__(self) -> None:
        super().__init__()
        self.special = self.experts[0]

    def run_one(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return expert(x) * (0.5 if expert == self.special else 1.0)


@apart("a dict holds a part")
@mutant("expert 1 differs from expert 0: 1.0 where that has 0.5")
class LocalFirst(Enumerated):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, first = torch.zeros_like(x), self.experts[0]
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None] * (0.5 if expert == first else 1.0))
        return out


@apart("a list of modules is reached in other ways than by the index")
@mutant("expert 1 differs from expert 0: 0.5 where that has 1.0")
class AmongOthers(Enumerated):
    def run_one(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return expert(x) * (0.5 if expert in self.experts[1:] else 1.0)


@apart("a list of modules is reached in other ways than by the index")
@mutant("expert 1 differs from expert 0: 1.0 where that has 0.5")
class ByModule(Enumerated):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        scales = {expert: 0.5 for expert in self.experts[:1]}
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None] * scales.get(expert, 1.0))
        return out


@apart("ByChildren.run_one uses children")
@mutant("expert 1 differs from expert 0: 1.0 where that has 0.5")
class ByChildren(Enumerated):
    def run_one(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return expert(x) * (0.5 if expert == next(self.experts.children()) else 1.0)


@apart("a dict holds a part")
@mutant("expert 1 differs from expert 0: 1.0 where that has 0.5")
class WeightIsKnown(Enumerated):
    """The first one's weight is found among others by its identity."""

    def __init__(self) -> None:
        super().__init__()
        self.special = self.experts[0].up  # type: ignore[union-attr]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        scales = {self.special.weight: 0.5}
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None] * scales.get(expert.up.weight, 1.0))
        return out


# -- several lists --------------------------------------------------------------------------


class TwoLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(D, FF) for _ in range(E))
        self.down = nn.ModuleList(nn.Linear(FF, D) for _ in range(E))

    def run(self, e: int, x: Tensor) -> Tensor:
        return self.down[e](F.gelu(self.up[e](x)))

    forward = Listed.forward

    @property
    def experts(self) -> Any:
        return self.up


@apart(None)
@idiom()
class TwoListsAlike(TwoLists):
    pass


@apart("Python computes with an index (rsub)")
@idiom()
class OneListBackwards(TwoLists):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.down[E - 1 - e](F.gelu(self.up[e](x)))


@apart("a list of modules is reached in other ways than by the index")
@mutant(
    "expert 1 differs from expert 0: experts_0_up_weight is used twice there, experts_0_up_weight and experts_1_up_weight here"
)
class AlsoTheFirst(Enumerated):
    def run_one(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return expert(x) + self.experts[0](x)


@apart(None)
@idiom()
class NestedLists(Listed):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.experts = nn.ModuleList(nn.ModuleList([nn.Linear(D, FF), nn.Linear(FF, D)]) for _ in range(E))

    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e][1](F.gelu(self.experts[e][0](x)))  # type: ignore[index]


@apart("the modules of a list are not alike")
@idiom()
class TwoListsOfTheSame(TwoLists):
    """The second list holds modules of the first, moved by one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.down = nn.ModuleList(self.up[(i + 1) % E] for i in range(E))


class MoreModules(Listed):
    def __init__(self) -> None:
        super().__init__(num_experts=E + 1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@apart(None)
@idiom()
class MoreModulesThanExperts(MoreModules):
    pass


@apart("a list has fewer modules than the loop has numbers")
@mutant("it does not run on fake tensors: IndexError: index 3 is out of range")
class FewerModulesThanExperts(MoreModules):
    def __init__(self) -> None:
        super().__init__()
        del self.experts[E - 1 :]


class CountingMlp(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1.0)  # type: ignore[operator, union-attr]
        return super().forward(x)


@apart("a visit changes a parameter or buffer of its module")
@idiom()
class CountsCalls(Enumerated):
    def __init__(self) -> None:
        Listed.__init__(self, CountingMlp)


class BufferedMlp(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


@apart(None)
@idiom()
class WithBuffers(Enumerated):
    def __init__(self) -> None:
        Listed.__init__(self, BufferedMlp)


class MadeMlp(nn.Module):
    """Its weights are used as they lie, and the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.rand(D, FF)), nn.Parameter(torch.rand(D, FF))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x @ self.a) @ self.b.t()


@apart("expert 0 adds something else when its experts are visited one by one")
@idiom()
class TransposedWeights(Enumerated):
    def __init__(self) -> None:
        Listed.__init__(self, MadeMlp)


class AsksGradient(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (0.5 if self.up.weight.requires_grad and self.up.weight.is_leaf else 1.0)


@apart(None)
@idiom()
class WeightsAreLeaves(Enumerated):
    def __init__(self) -> None:
        Listed.__init__(self, AsksGradient)


class PartialMlp(Mlp):
    def __init__(self, slope: float = 0.1) -> None:
        super().__init__(functools.partial(F.leaky_relu, negative_slope=slope))


@apart("the modules of a list are not alike")
@mutant("expert 2 differs from expert 0: 0.2 where that has 0.1")
class OnePartial(Enumerated):
    def __init__(self) -> None:
        Listed.__init__(self, PartialMlp)
        self.experts[2] = PartialMlp(0.2)


@apart("MatchesByName.run_one matches a class")
@mutant("expert 1 differs from expert 0: 1.0 where that has 0.5")
class MatchesByName(Enumerated):
    """An attribute that no code names but in a pattern."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = self.experts[0]

    def run_one(self, e: int, expert: Any, x: Tensor) -> Tensor:
        match self:
            case MatchesByName(hidden=first):
                return expert(x) * (0.5 if expert == first else 1.0)
        return expert(x)


@apart("no loop over numbers runs over the list of modules")
@idiom()
class OtherLoops(Listed):
    """A list of modules that nobody reaches by number, and a loop over numbers that is short."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for _ in range(1):
            for e, name in enumerate(self.experts._modules):
                t, k = torch.where(ids == e)
                out.index_add_(0, t, self.experts._modules[name](x[t]) * weights[t, k, None])  # type: ignore[misc]
        return out


class ChangesWeight(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.up.weight.mul_(1.5)
        return super().forward(x)


@apart("a visit changes a parameter or buffer of its module")
@idiom()
class ChangesWeights(Enumerated):
    def __init__(self) -> None:
        Listed.__init__(self, ChangesWeight)


class ByAttribute(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * getattr(self.up.weight, "factor", 1.0)


@apart("")
@mutant("it could read factor, an attribute of experts.2.up.weight")
class FactorOnParameter(Enumerated):
    def __init__(self) -> None:
        Listed.__init__(self, ByAttribute)
        self.experts[2].up.weight.factor = 0.5  # type: ignore[union-attr]


@apart("the modules of a list are not alike")
@idiom()
class ListOutOfOrder(Enumerated):
    """Walked over in another order than numbered."""

    def __init__(self) -> None:
        super().__init__()
        modules = self.experts._modules
        modules["1"] = modules.pop("1")


@apart("the modules of a list are not alike")
@idiom()
class NumberedOutOfOrder(ListOutOfOrder):
    forward = Listed.forward  # type: ignore[assignment]


class Optional(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.extra: nn.Module | None = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.extra is None else super().forward(self.extra(x))


@apart("the modules of a list are not alike")
@idiom()
class OneWithoutExtra(Enumerated):
    def __init__(self) -> None:
        Listed.__init__(self, Optional)
        self.experts[2].extra = None


class Swallows:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> bool:
        return True


@apart("Python computes with an index (index)")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class SwallowsErrors(Ranged):
    def scale(self, e: int) -> Any:
        with Swallows():
            return [1.0, 1.0, 0.5, 1.0][e]
        return 1.0


@apart("the modules of a list are not alike")
@mutant("expert 2 differs from expert 0: aten.mul.Tensor where that has aten.linear")
class OneForward(Enumerated):
    """A method of one instance."""

    def __init__(self) -> None:
        super().__init__()
        one = self.experts[2]
        one.forward = functools.partial(_doubled, one)  # type: ignore[method-assign]


def _doubled(one: Mlp, x: Tensor) -> Tensor:
    return 2 * Mlp.forward(one, x)


SCALES: dict[str, float] = {"two": 0.5}


class ByClassTable(Mlp):
    name = "one"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * SCALES.get(self.name, 1.0)


@apart("the modules of a list are not alike")
@mutant("expert 2 differs from expert 0: 0.5 where that has 1.0")
class OneName(Enumerated):
    def __init__(self) -> None:
        Listed.__init__(self, ByClassTable)
        self.experts[2].name = "two"


class FlaggedMlp(Mlp):
    def __init__(self, flag: bool = False) -> None:
        super().__init__()
        self.register_buffer("flag", torch.tensor(flag))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (0.5 if self.flag else 1.0)


@apart("Python decides on")
@mutant("Python decides on experts_0_flag, not shown to say whether an expert was chosen")
class OneFlag(Enumerated):
    def __init__(self) -> None:
        Listed.__init__(self, FlaggedMlp)
        self.experts[2] = FlaggedMlp(True)


@apart("Python decides on")
@mutant("Python decides on lt, not shown to say whether an expert was chosen")
class MadeTable(Ranged):
    def scale(self, e: int) -> Any:
        return 0.5 if torch.tensor([1.0, 1.0, 0.5, 1.0])[e] < 0.7 else 1.0
