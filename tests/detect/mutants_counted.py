"""Mutants of counts up to the largest id that occurs: whoever sees how many they are."""

import itertools

import numpy as np
import torch
from torch import Tensor

from moe_compile.arguments import Known
from tests.detect.idioms_lists import Counted, CountedAsList, CountedBesideSums, CountedThenSummed
from tests.detect.loops import SCORES, E, K, mutant


@mutant("bincount without minlength: how many numbers Python reads depends on the ids")
class CountedOfAnyIds(Counted):
    """Distinct, but nobody knows how many there could be."""


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=SCORES)
class CountedLength(CountedAsList):
    def after(self, out: Tensor, ends) -> Tensor:  # type: ignore[no-untyped-def]
        return out / len(ends)


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=SCORES)
class CountedByHand(CountedAsList):
    def after(self, out: Tensor, ends) -> Tensor:  # type: ignore[no-untyped-def]
        return out / sum(1 for _ in ends)


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=SCORES)
class CountedBesideACounter(CountedAsList):
    """An iterator that has gone on for as many."""

    def after(self, out: Tensor, ends) -> Tensor:  # type: ignore[no-untyped-def]
        numbers = itertools.count()
        for _, _ in zip(numbers, ends, strict=False):
            pass
        return out / next(numbers)


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=SCORES)
class CountedShape(Counted):
    def ends(self, flat: Tensor):  # type: ignore[no-untyped-def]
        counts = flat.bincount()
        return counts.cumsum(0).tolist() if counts.shape[0] == E else counts.cumsum(0).cpu().numpy()


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=SCORES)
class CountedFromTheEnd(Counted):
    def first(self, ends, e: int):  # type: ignore[no-untyped-def]
        return 0 if e == 0 else ends[e - E - 1]


@mutant("what the loop selects is used outside of it too (output)", distinct=SCORES)
class CountedReturned(Counted):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor):  # type: ignore[no-untyped-def, override]
        return super().forward(x, ids, weights), ids.view(-1).bincount()


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=SCORES)
class CountedWithWeights(Counted):
    def ends(self, flat: Tensor):  # type: ignore[no-untyped-def]
        return torch.bincount(flat, weights=flat).long().cumsum(0).tolist()


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=SCORES)
class CountedOnePastTheEnd(Counted):
    """Every expert but the last that occurs."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.view(-1)
        out, order, ends = torch.zeros_like(x), flat.argsort(), [*self.ends(flat)]
        for e, end in enumerate(ends[:-1]):
            start = self.first(ends, e)
            t = (order // K)[start:end]
            out.index_add_(0, t, self.run(e, x[t]) * weights.view(-1, 1)[order[start:end]])
        return out


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=SCORES)
class CountedWithoutSkipping(Counted):
    """Right, but pieces are joined of which it is not shown how many there are."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.view(-1)
        order = flat.argsort()
        out, pieces = torch.zeros_like(x), x[order // K].split(torch.bincount(flat).tolist())
        results = [self.run(e, piece) for e, piece in enumerate(pieces)]
        y = torch.cat(results) * weights.view(-1)[order, None]
        return out.index_add(0, order // K, y)


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=SCORES)
class CountedSize(CountedThenSummed):
    """numpy sees how many there are."""

    def after(self, out: Tensor, ends) -> Tensor:  # type: ignore[no-untyped-def]
        return out / np.size(ends)


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=SCORES)
class CountedLengthOfSums(CountedThenSummed):
    def after(self, out: Tensor, ends) -> Tensor:  # type: ignore[no-untyped-def]
        return out * 2 if len(ends) == E - 1 else out


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=SCORES)
class CountedLastSum(CountedThenSummed):
    def after(self, out: Tensor, ends) -> Tensor:  # type: ignore[no-untyped-def]
        return out / ends[-1]


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=SCORES)
class CountedSumOfAll(CountedThenSummed):
    def after(self, out: Tensor, ends) -> Tensor:  # type: ignore[no-untyped-def]
        return out / np.sum(ends)


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=SCORES)
class CountedThenShifted(CountedThenSummed):
    def ends(self, flat: Tensor):  # type: ignore[no-untyped-def]
        return np.cumsum(np.roll(torch.bincount(flat).cpu().numpy(), 1))


@mutant(
    "moe_ep_capture.rows_between at file.py slices between numbers that are not where an expert's rows begin and end",
    distinct=SCORES,
)
class CountedThenSummedTwice(CountedThenSummed):
    def ends(self, flat: Tensor):  # type: ignore[no-untyped-def]
        return np.cumsum(super().ends(flat))


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=SCORES)
class CountedThenSummedNarrow(CountedThenSummed):
    """Sums that wrap around."""

    def ends(self, flat: Tensor):  # type: ignore[no-untyped-def]
        return np.cumsum(torch.bincount(flat).cpu().numpy(), dtype=np.int8)


@mutant(
    "moe_ep_capture.rows_between at file.py slices between numbers that are not where an expert's rows begin and end",
    distinct=SCORES,
)
class CountedStartsOfOthers(CountedBesideSums):
    def bounds(self, counts, ends, e: int):  # type: ignore[no-untyped-def]
        return ends[e] - counts[0], ends[e]


@mutant(
    "moe_ep_capture.rows_between at file.py slices between numbers that are not where an expert's rows begin and end",
    distinct=SCORES,
)
class CountedEndsOfCounts(CountedBesideSums):
    def bounds(self, counts, ends, e: int):  # type: ignore[no-untyped-def]
        return ends[e] - counts[e], counts[e]


class _CountedOfEight(Counted):
    """A number that no world of a few experts shows."""

    def __init__(self) -> None:
        super().__init__(num_experts=8)

    def number(self, ends) -> int:  # type: ignore[no-untyped-def]
        return 0

    def after(self, out: Tensor, ends) -> Tensor:  # type: ignore[no-untyped-def]
        return out * 2 if self.number(ends) == 5 else out


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=Known((1,), ((1, 8),)))
class CountedByGenerator(_CountedOfEight):
    def number(self, ends) -> int:  # type: ignore[no-untyped-def]
        return sum(1 for _ in ends)


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=Known((1,), ((1, 8),)))
class CountedInAList(_CountedOfEight):
    def number(self, ends) -> int:  # type: ignore[no-untyped-def]
        return len(list(enumerate(ends)))


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=Known((1,), ((1, 8),)))
class CountedByComprehension(_CountedOfEight):
    def number(self, ends) -> int:  # type: ignore[no-untyped-def]
        return len([end for end in ends])


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=Known((1,), ((1, 8),)))
class CountedByTheLast(_CountedOfEight):
    def number(self, ends) -> int:  # type: ignore[no-untyped-def]
        *_, (last, _) = enumerate(ends, 1)
        return last


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=Known((1,), ((1, 8),)))
class CountedBySteps(_CountedOfEight):
    """A generator's `for` ends where it ends."""

    def steps(self, ends):  # type: ignore[no-untyped-def]
        for _ in ends:
            yield 1

    def number(self, ends) -> int:  # type: ignore[no-untyped-def]
        return sum(self.steps(ends))


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=Known((1,), ((1, 8),)))
class CountedInPieces(_CountedOfEight):
    """As many pieces as numbers."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        pieces = ids.view(-1).split(ids.view(-1).bincount().tolist())
        return super().forward(x, ids, weights) * (2 if len(pieces) == 5 else 1)


@mutant("bincount without minlength: how many numbers Python reads depends on the ids", distinct=Known((1,), ((1, 8),)))
class CountedTensors(_CountedOfEight):
    def ends(self, flat: Tensor):  # type: ignore[no-untyped-def]
        return flat.bincount().cumsum(0)

    def number(self, ends) -> int:  # type: ignore[no-untyped-def]
        return sum(1 for _ in ends)


@mutant("bincount without minlength: how many numbers Python reads depends on the ids")
class CountedSumsOfAnyIds(CountedThenSummed):
    """Nobody knows how many there could be."""
