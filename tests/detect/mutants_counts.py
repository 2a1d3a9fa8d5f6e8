"""Mutants of the forms that read counts on the host: other sizes, offsets, ids, orders, and decisions on the numbers."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_counts import Ends, Inferred, Set, Split
from tests.detect.loops import D, E, K, Listed, mutant

# -- sizes ----------------------------------------------------------------------------------


@mutant("?")
class SplitBySizesOfOtherIds(Split):
    def sizes(self, ids: Tensor) -> Any:
        return torch.bincount(((ids + 1) % E).flatten(), minlength=E).tolist()


@mutant("?")
class SplitByReversedSizes(Split):
    def sizes(self, ids: Tensor) -> Any:
        return torch.bincount(ids.flatten(), minlength=E).tolist()[::-1]


@mutant("?")
class SplitBySwappedSizes(Split):
    def split(self, x: Tensor, sizes: Any) -> Any:
        return x.split([sizes[1], sizes[0], *sizes[2:]])


@mutant("?")
class SplitIntoOtherPieces(Split):
    """Pieces 0 and 1 change places, and so do the weights: right, but joined in another order than it was sorted."""

    def product(self, x: Tensor, w: Tensor, sizes: Any) -> Tensor:
        pieces = self.split(x, sizes)
        return torch.cat([F.linear(pieces[e], w[e]) for e in (1, 0, 2, 3)])


@mutant("?")
class SplitAndOneLeftOut(Split):
    def product(self, x: Tensor, w: Tensor, sizes: Any) -> Tensor:
        pieces = self.split(x, sizes)
        return torch.cat([F.linear(pieces[min(e, 2)], w[e]) for e in range(E)])[: x.shape[0]]


@mutant("?")
class SplitByCountsOfSomeColumns(Split):
    def sizes(self, ids: Tensor) -> Any:
        return torch.bincount(ids[:, :1].flatten().repeat(K), minlength=E).tolist()


@mutant("?", distinct=False)
class SplitByMarksOfRepeatedIds(Split):
    """Marks count a token once: with ids that repeat in a row the sizes are too small."""


@mutant("?")
class SplitByNarrowSums(Split):
    def sizes(self, ids: Tensor) -> Any:
        marks = torch.zeros(ids.size(0), E).scatter(1, ids, 1)
        return marks.to(torch.int8).sum(0, dtype=torch.int8).tolist()


@mutant("?")
class SplitByMarksOfTwo(Split):
    def sizes(self, ids: Tensor) -> Any:
        return (torch.zeros(ids.size(0), E).scatter(1, ids, 2).long().sum(0) // 2).tolist()


@mutant("?")
class SplitByMarksThatWereSet(Split):
    def sizes(self, ids: Tensor) -> Any:
        marks = torch.zeros(ids.size(0), E, dtype=torch.int64)
        marks[:, 0] = 1
        return marks.scatter_(1, ids, 1).sum(0).tolist()


@mutant("?")
class SplitByCountsChangedAfterwards(Split):
    """Python has read them by then, the graph must not think that it read what they became."""

    def sizes(self, ids: Tensor) -> Any:
        counts = torch.bincount(ids.flatten(), minlength=E)
        sizes = counts.tolist()
        counts.zero_()
        return sizes


@mutant("?")
class SplitByCountsChangedBefore(Split):
    def sizes(self, ids: Tensor) -> Any:
        counts = torch.bincount(ids.flatten(), minlength=E)
        first = counts[0].clone()
        counts[0] = counts[1]
        counts[1] = first
        return counts.tolist()


@mutant("?")
class SplitByRolledCounts(Split):
    def sizes(self, ids: Tensor) -> Any:
        return torch.bincount(ids.flatten(), minlength=E).roll(1).tolist()


@mutant("?")
class SplitFeatures(Split):
    def split(self, x: Tensor, sizes: Any) -> Any:
        return [p.t() for p in x.t().split(sizes, dim=1)]


@mutant("?")
class SplitUnsorted(Split):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sizes = self.sizes(ids)
        y = self.product(x.repeat_interleave(K, 0), self.w2.transpose(1, 2), sizes)
        return self.product(y, self.w2, sizes).view(-1, K, D).sum(1)


@mutant("?")
class SplitDescending(Split):
    def order(self, ids: Tensor) -> Tensor:
        return ids.flatten().sort(0, descending=True)[1]


@mutant("?")
class SplitOrderOfOtherIds(Split):
    def order(self, ids: Tensor) -> Tensor:
        return (E - 1 - ids).flatten().sort(0)[1]


@mutant("?")
class SplitJoinedTwice(Split):
    def join(self, pieces: list[Tensor]) -> Tensor:
        return torch.cat([*pieces, *pieces])[: sum(p.shape[0] for p in pieces)]


@mutant("?")
class SplitJoinedWithOthers(Split):
    def product(self, x: Tensor, w: Tensor, sizes: Any) -> Tensor:
        pieces, others = self.split(x, sizes), self.split(x.flip(0), sizes)
        return torch.cat([F.linear(others[0], w[0]), *(F.linear(pieces[e], w[e]) for e in range(1, E))])


@mutant("?")
class SplitWeighedUnsorted(Split):
    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return y * weights.flatten()[:, None]


@mutant("?")
class SplitWithoutGradient(Split):
    def join(self, pieces: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.cat(pieces)


@mutant("?")
class SplitMixesRowsOfAnExpert(Split):
    def product(self, x: Tensor, w: Tensor, sizes: Any) -> Tensor:
        pieces = self.split(x, sizes)
        return torch.cat([F.linear(pieces[e] - pieces[e].mean(0), w[e]) for e in range(E)])


@mutant("?")
class SplitOneExpertDiffers(Split):
    def product(self, x: Tensor, w: Tensor, sizes: Any) -> Tensor:
        pieces = self.split(x, sizes)
        return torch.cat([F.linear(pieces[e], w[e] if e != 2 else w[e].abs()) for e in range(E)])


# -- numbers that Python looks at -----------------------------------------------------------


@mutant("?")
class CapacityByMin(Ends):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order, start = torch.zeros_like(x), self.order(ids), 0
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            mine = order[start : start + min(n, 3)]
            out.index_add_(0, mine // K, self.experts[e](x[mine // K]))
            start += n
        return out


@mutant("?")
class OnlyLargeGroups(Ends):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order, start = torch.zeros_like(x), self.order(ids), 0
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            if n > 3:
                mine = order[start : start + n]
                out.index_add_(0, mine // K, self.experts[e](x[mine // K]))
            start += n
        return out


@mutant("?")
class PaddedToTheLargest(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sizes = torch.bincount(ids.view(-1), minlength=E).tolist()
        order = ids.view(-1).argsort()
        most, pieces = max(sizes), x[order // K].split(sizes)
        padded = torch.stack([F.pad(p, (0, 0, 0, most - p.shape[0])) for p in pieces])
        y = torch.stack([self.experts[e](padded[e]) for e in range(E)])
        y = torch.cat([y[e, : sizes[e]] for e in range(E)]) * weights.view(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // K, y)


@mutant("?")
class DividedByCount(Split):
    def product(self, x: Tensor, w: Tensor, sizes: Any) -> Tensor:
        pieces = self.split(x, sizes)
        return torch.cat([F.linear(pieces[e], w[e]) / max(sizes[e], 1) for e in range(E)])


@mutant("?")
class ScaledByCountTensor(Ends):
    """The count as a tensor weighs the rows."""

    def accumulate(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return out.index_add_(0, token, y / token.shape[0])


@mutant("?")
class MostChosenExpertIsSpecial(Split):
    def product(self, x: Tensor, w: Tensor, sizes: Any) -> Tensor:
        pieces = self.split(x, sizes)
        best = sizes.index(max(sizes))
        return torch.cat([F.linear(pieces[e], w[e]) * (2.0 if e == best else 1.0) for e in range(E)])


@mutant("?")
class EmptyExpertChangesAnother(Ends):
    def empty(self, start: Any, end: Any, e: int) -> bool:
        return start == end or e == 3


@mutant("?")
class EvenCountsOnly(Ends):
    def empty(self, start: Any, end: Any, e: int) -> bool:
        return (end - start) % 2 == 1


@mutant("?")
class FirstOffsetIsAsked(Ends):
    """Whether anybody came before is not whether this expert has rows."""

    def empty(self, start: Any, end: Any, e: int) -> bool:
        return start == 0


@mutant("?")
class PrintedSizes(Split):
    def split(self, x: Tensor, sizes: Any) -> Any:
        return x.split(sizes) if "0" not in str(sizes[0]) else x.flip(0).split(sizes)


@mutant("?")
class CountsAsInts(Ends):
    def ends(self, ids: Tensor) -> Any:
        return [int(n) for n in torch.bincount(ids.view(-1), minlength=E).cumsum(0)]


@mutant("?")
class SizesSorted(Split):
    def sizes(self, ids: Tensor) -> Any:
        return sorted(torch.bincount(ids.flatten(), minlength=E).tolist())


# -- offsets --------------------------------------------------------------------------------


@mutant("?")
class StartsWithoutTheFirst(Ends):
    def ends(self, ids: Tensor) -> Any:
        return torch.bincount(ids.view(-1), minlength=E).flip(0).cumsum(0).tolist()


@mutant("?")
class OffsetNotUpdatedWhenSkipped(Listed):
    """Not added to for experts that are left out for another reason."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order, start = torch.zeros_like(x), ids.view(-1).argsort(), 0
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            if e == 1:
                continue
            mine = order[start : start + n]
            out.index_add_(0, mine // K, self.experts[e](x[mine // K]))
            start += n
        return out


@mutant("?")
class OffsetOfOne(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order, start = torch.zeros_like(x), ids.view(-1).argsort(), 0
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            mine = order[start : start + n - 1]
            out.index_add_(0, mine // K, self.experts[e](x[mine // K]))
            start += n
        return out


@mutant("?")
class SlicesOverlap(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order = torch.zeros_like(x), ids.view(-1).argsort()
        ends = torch.bincount(ids.view(-1), minlength=E).cumsum(0).tolist()
        for e, end in enumerate(ends):
            mine = order[(ends[e - 2] if e > 1 else 0) : end]
            out.index_add_(0, mine // K, self.experts[e](x[mine // K]))
        return out


@mutant("?")
class SlicesFromTheEnd(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order = torch.zeros_like(x), ids.view(-1).argsort()
        ends = [0, *torch.bincount(ids.view(-1), minlength=E).cumsum(0).tolist()]
        for e in range(E):
            mine = order[ends[e] :] if e == E - 1 else order[ends[e] : ends[e + 1]]
            out.index_add_(0, mine // K, self.experts[e](x[mine // K]))
        return out


@mutant("?")
class WeightsSlicedUnsorted(Ends):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order = torch.zeros_like(x), self.order(ids)
        flat, start = weights.view(-1, 1), 0
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            mine = order[start : start + n]
            out.index_add_(0, mine // K, self.experts[e](x[mine // K]) * flat[start : start + n])
            start += n
        return out


@mutant("?")
class TokensByAnotherNumber(Ends):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order, start = torch.zeros_like(x), self.order(ids), 0
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            mine = order[start : start + n]
            out.index_add_(0, mine // (K + 1), self.experts[e](x[mine // (K + 1)]))
            start += n
        return out


@mutant("?")
class NextExpertRuns(Ends):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order, start = torch.zeros_like(x), self.order(ids), 0
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            if n == 0:
                continue
            mine = order[start : start + n]
            out.index_add_(0, mine // K, self.experts[e](x[mine // K]))
            start += n
            if e == 2:
                break
        return out


# -- what an iteration tells the next -------------------------------------------------------


@mutant("?")
class CountsTheSkipped(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order, start, seen, one = torch.zeros_like(x), ids.view(-1).argsort(), 0, 0, 1
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            if n == 0:
                continue
            mine = order[start : start + n]
            y = [*self.experts][seen : seen + one][0](x[mine // K])
            out.index_add_(0, mine // K, y)
            start += n
            seen += one
        return out


@mutant("?")
class LooksAtTheResults(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.view(-1).argsort()
        rows, start, done = x[order // K], 0, []
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            if n == 0:
                continue
            y = self.experts[e](rows[start : start + n])
            done.append(y * 2 if len(done) == 3 else y)
            start += n
        return torch.zeros_like(x).index_add(0, order // K, torch.cat(done))


@mutant("?")
class AppendsTwice(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.view(-1).argsort()
        rows, start, done = x[order // K], 0, []
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            if n == 0:
                continue
            y = self.experts[e](rows[start : start + n])
            done.append(y)
            if e == 1:
                done.append(y)
            start += n
        return torch.zeros_like(x).index_add(0, order // K, torch.cat(done)[: rows.shape[0]])


@mutant("?")
class EmptyExpertAppendsOnes(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.view(-1).argsort()
        rows, bias, start, done = x[order // K], torch.zeros(D), 0, []
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            if n == 0:
                bias = bias + 1
                continue
            done.append(self.experts[e](rows[start : start + n]))
            start += n
        return torch.zeros_like(x).index_add(0, order // K, torch.cat(done)) + bias


@mutant("?")
class ListReversed(Inferred):
    def outputs(self, rows: Tensor, sizes: Any) -> Tensor:
        bounds = [0, *itertools.accumulate(sizes)]
        return torch.cat([self.experts[e](rows[bounds[e] : bounds[e + 1]]) for e in range(E)][::-1])


# -- back in their own order ----------------------------------------------------------------


@mutant("?")
class ResultsNotUnsorted(Inferred):
    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        return y


@mutant("?")
class ResultsUnsortedByTheOrder(Inferred):
    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        return y[order]


@mutant("?")
class UnsortedIntoOnes(Inferred):
    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        back = torch.ones_like(y)
        return back.index_put((order,), y, accumulate=True)


@mutant("?")
class GridWeighedByTheNextToken(Inferred):
    def total(self, y: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return y.view(*ids.shape, -1).mul(weights.roll(1, 0).unsqueeze(-1)).cumsum(0).sum(1)


@mutant("?")
class SummedOverTokens(Inferred):
    def total(self, y: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return y.view(*ids.shape, -1).mul(weights.unsqueeze(-1)).sum(0)


@mutant("?")
class RowsOfOtherTokens(Inferred):
    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[(order + 1) // K % x.shape[0]]


@mutant("?")
class ReadAsFloats(Inferred):
    def read(self, counts: Tensor) -> Any:
        return counts.float().tolist()


@mutant("?")
class SentinelsCounted(Inferred):
    """The last class is nobody's: its rows are not computed."""

    def counts(self, ids: Tensor) -> Tensor:
        return torch.bincount(ids.view(-1), minlength=E)[: E - 1]


# -- rows that are set ----------------------------------------------------------------------


@mutant("?")
class SetSomeElse(Set):
    def run(self, e: int, x: Tensor) -> Tensor:
        return super().run(e, x).flip(0)


@mutant("?")
class SetAndRead(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.reshape(-1).argsort(stable=True)
        rows, sizes = x[order // K], torch.bincount(ids.view(-1), minlength=E).tolist()
        out = torch.zeros_like(rows)
        start = 0
        for e in range(E):
            out[start : start + sizes[e]] = self.run(e, rows[start : start + sizes[e]]) + out.sum(0)
            start += sizes[e]
        return (weights.unsqueeze(-1) * out[order.argsort()].view(-1, K, D)).sum(1)


@mutant("?")
class SetTwice(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.reshape(-1).argsort(stable=True)
        rows, sizes = x[order // K], torch.bincount(ids.view(-1), minlength=E).tolist()
        out = torch.zeros_like(rows)
        start = 0
        for e in range(E):
            out[start : start + sizes[e]] = self.run(e, rows[start : start + sizes[e]])
            start += sizes[e]
        out[: sizes[0]] = self.run(1, rows[: sizes[0]])
        return (weights.unsqueeze(-1) * out[order.argsort()].view(-1, K, D)).sum(1)


@mutant("?")
class SetWhereAnotherLies(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.reshape(-1).argsort(stable=True)
        rows, sizes = x[order // K], torch.bincount(ids.view(-1), minlength=E).tolist()
        out = torch.zeros(rows.shape[0] + 1, D)
        start = 0
        for e in range(E):
            out[start + 1 : start + 1 + sizes[e]] = self.run(e, rows[start : start + sizes[e]])
            start += sizes[e]
        return (weights.unsqueeze(-1) * out[1:][order.argsort()].view(-1, K, D)).sum(1)


@mutant("?")
class RowsChangedMeanwhile(Listed):
    """A slice is a view: what it holds is what the rows became."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.reshape(-1).argsort(stable=True)
        rows, sizes = x[order // K], torch.bincount(ids.view(-1), minlength=E).tolist()
        pieces = rows.split(sizes)
        rows.mul_(2)
        y = torch.cat([self.run(e, pieces[e]) for e in range(E)]) * weights.view(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // K, y)


@mutant("?")
class SliceChanged(Listed):
    """What an expert does to its slice, the rows keep."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.reshape(-1).argsort(stable=True)
        rows, sizes = x[order // K], torch.bincount(ids.view(-1), minlength=E).tolist()
        pieces = rows.split(sizes)
        y = torch.cat([self.run(e, pieces[e].mul_(2)) for e in range(E)]) * weights.view(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // K, y + rows)


# -- added by scatter -----------------------------------------------------------------------


@mutant("?")
class ScatterOfMeans(Ends):
    def accumulate(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return out.scatter_reduce(0, token.view(-1, 1).repeat(1, D), y, reduce="mean")


@mutant("?")
class ScatterOfSomeColumns(Ends):
    def accumulate(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return out.scatter_add(0, token.view(-1, 1).expand(-1, D - 1), y)


@mutant("?")
class ScatterWithoutItself(Ends):
    def accumulate(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return out.scatter_reduce(0, token.view(-1, 1).repeat(1, D), y, reduce="sum", include_self=False)
