"""Mutants of the forms that read counts on the host: other sizes, offsets, ids, orders, and decisions on the numbers."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_counts import Ends, Inferred, Set, Split
from tests.detect.loops import SCORES, D, E, K, Listed, mutant

# -- sizes ----------------------------------------------------------------------------------


@mutant("moe_ep_capture.rows_between at file.py slices rows by the counts of other ids")
class SplitBySizesOfOtherIds(Split):
    def sizes(self, ids: Tensor) -> Any:
        return torch.bincount(((ids + 1) % E).flatten(), minlength=E).tolist()


@mutant(
    "moe_ep_capture.rows_between at file.py slices between numbers that are not where an expert's rows begin and end",
)
class SplitByReversedSizes(Split):
    def sizes(self, ids: Tensor) -> Any:
        return torch.bincount(ids.flatten(), minlength=E).tolist()[::-1]


@mutant(
    "moe_ep_capture.rows_between at file.py slices between numbers that are not where an expert's rows begin and end",
)
class SplitBySwappedSizes(Split):
    def split(self, x: Tensor, sizes: Any) -> Any:
        return x.split([sizes[1], sizes[0], *sizes[2:]])


@mutant("moe_ep_capture.cat_rows at file.py joins the rows of experts [1, 0, 2, 3], of 4")
class SplitIntoOtherPieces(Split):
    """Pieces 0 and 1 change places, and so do the weights: right, but joined in another order than it was sorted."""

    def product(self, x: Tensor, w: Tensor, sizes: Any) -> Tensor:
        pieces = self.split(x, sizes)
        return torch.cat([F.linear(pieces[e], w[e]) for e in (1, 0, 2, 3)])


@mutant("moe_ep_capture.cat_rows at file.py joins something that is not rows")
class SplitAndOneLeftOut(Split):
    def product(self, x: Tensor, w: Tensor, sizes: Any) -> Tensor:
        pieces = self.split(x, sizes)
        done = [F.linear(pieces[e], w[e]) for e in range(E - 1)]
        return torch.cat([*done, pieces[E - 1].new_zeros(pieces[E - 1].shape[0], w.shape[1])])


@mutant(
    "moe_ep_capture.rows_between at file.py slices between numbers that are not where an expert's rows begin and end",
)
class SplitByCountsOfSomeColumns(Split):
    def sizes(self, ids: Tensor) -> Any:
        return torch.bincount(ids[:, :1].flatten().repeat(K), minlength=E).tolist()


@mutant(
    "aten.sum.dim_IntList at file.py counts a token once that chose an expert twice: the ids (ids) "
    "are not shown to be distinct, as those of topk are",
    distinct=False,
)
class SplitByMarksOfRepeatedIds(Split):
    """Marks count a token once: with ids that repeat in a row the sizes are too small."""


@mutant(
    "moe_ep_capture.rows_between at file.py slices between numbers that are not where an expert's rows begin and end",
)
class SplitByNarrowSums(Split):
    def sizes(self, ids: Tensor) -> Any:
        marks = torch.zeros(ids.size(0), E).scatter(1, ids, 1)
        return marks.to(torch.int8).sum(0, dtype=torch.int8).tolist()


@mutant(
    "moe_ep_capture.rows_between at file.py slices between numbers that are not where an expert's rows begin and end",
)
class SplitByMarksOfTwo(Split):
    def sizes(self, ids: Tensor) -> Any:
        return (torch.zeros(ids.size(0), E).scatter(1, ids, 2).long().sum(0) // 2).tolist()


@mutant("zeros is read after it was changed in place through another name")
class SplitByMarksThatWereSet(Split):
    def sizes(self, ids: Tensor) -> Any:
        marks = torch.zeros(ids.size(0), E, dtype=torch.int64)
        marks[:, 0] = 0
        return marks.scatter_(1, ids, 1).sum(0).tolist()


@mutant("what the loop selects is used outside of it too (zero_)", distinct=SCORES)
class SplitByCountsChangedAfterwards(Split):
    """Python has read them by then, the graph must not think that it read what they became."""

    def sizes(self, ids: Tensor) -> Any:
        counts = torch.bincount(ids.flatten(), minlength=E)
        sizes = counts.tolist()
        counts.zero_()
        return sizes


@mutant("bincount is read after it was changed in place through another name")
class SplitByCountsChangedBefore(Split):
    def sizes(self, ids: Tensor) -> Any:
        counts = torch.bincount(ids.flatten(), minlength=E)
        first = counts[0].clone()
        counts[0] = counts[1]
        counts[1] = first
        return counts.tolist()


@mutant(
    "moe_ep_capture.rows_between at file.py slices between numbers that are not where an expert's rows begin and end",
)
class SplitByRolledCounts(Split):
    def sizes(self, ids: Tensor) -> Any:
        return torch.bincount(ids.flatten(), minlength=E).roll(1).tolist()


@mutant("Python splits features by numbers of rows")
class SplitFeatures(Split):
    def split(self, x: Tensor, sizes: Any) -> Any:
        return [p.t() for p in x.t().split(sizes, dim=1)]


@mutant("moe_ep_capture.rows_between at file.py slices something that is not sorted by expert")
class SplitUnsorted(Split):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sizes = self.sizes(ids)
        y = self.product(x.repeat_interleave(K, 0), self.w2.transpose(1, 2), sizes)
        return self.product(y, self.w2, sizes).view(-1, K, D).sum(1)


@mutant("moe_ep_capture.rows_between at file.py slices something that is not sorted by expert")
class SplitDescending(Split):
    def order(self, ids: Tensor) -> Tensor:
        return ids.flatten().sort(0, descending=True)[1]


@mutant("moe_ep_capture.rows_between at file.py slices rows by the counts of other ids")
class SplitOrderOfOtherIds(Split):
    def order(self, ids: Tensor) -> Tensor:
        return (E - 1 - ids).flatten().sort(0)[1]


@mutant("it decides on the number of rows that an expert gets (r + r + r + r > 22)")
class SplitJoinedTwice(Split):
    def join(self, pieces: list[Tensor]) -> Tensor:
        return torch.cat([*pieces, *pieces])[: sum(p.shape[0] for p in pieces)]


@mutant("flip along dimension 0 lets rows depend on each other")
class SplitJoinedWithOthers(Split):
    def product(self, x: Tensor, w: Tensor, sizes: Any) -> Tensor:
        pieces, others = self.split(x, sizes), self.split(x.flip(0), sizes)
        return torch.cat([F.linear(others[0], w[0]), *(F.linear(pieces[e], w[e]) for e in range(1, E))])


@mutant("mul adds a tensor of shape (22, 1) across the rows")
class SplitWeighedUnsorted(Split):
    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return y * weights.flatten()[:, None]


@mutant("moe_ep_capture.cat_rows at file.py runs under no_grad inside the expert loop")
class SplitWithoutGradient(Split):
    def join(self, pieces: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.cat(pieces)


@mutant("mean along dimension 0 lets rows depend on each other")
class SplitMixesRowsOfAnExpert(Split):
    def product(self, x: Tensor, w: Tensor, sizes: Any) -> Tensor:
        pieces = self.split(x, sizes)
        return torch.cat([F.linear(pieces[e] - pieces[e].mean(0), w[e]) for e in range(E)])


@mutant("expert 2 differs from expert 0: aten.abs where that has slice w13")
class SplitOneExpertDiffers(Split):
    def product(self, x: Tensor, w: Tensor, sizes: Any) -> Tensor:
        pieces = self.split(x, sizes)
        return torch.cat([F.linear(pieces[e], w[e] if e != 2 else w[e].abs()) for e in range(E)])


# -- numbers that Python looks at -----------------------------------------------------------


@mutant("Python slices as many rows as the program says, not as an expert gets")
class CapacityByMin(Ends):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order, start = torch.zeros_like(x), self.order(ids), 0
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            mine = order[start : start + min(n, 3)]
            out.index_add_(0, mine // K, self.experts[e](x[mine // K]))
            start += n
        return out


@mutant("Python compares host_number with zero, not shown to be the number of an expert's rows")
class OnlyLargeGroups(Ends):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order, start = torch.zeros_like(x), self.order(ids), 0
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            if n > 3:
                mine = order[start : start + n]
                out.index_add_(0, mine // K, self.experts[e](x[mine // K]))
            start += n
        return out


@mutant(
    "it does not run on fake tensors: TypeError: pad(): argument 'pad' failed to unpack the object "
    'at pos 4 with error "type must be tuple of ints,but got HostNumber"',
)
class PaddedToTheLargest(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sizes = torch.bincount(ids.view(-1), minlength=E).tolist()
        order = ids.view(-1).argsort()
        most, pieces = max(sizes), x[order // K].split(sizes)
        padded = torch.stack([F.pad(p, (0, 0, 0, most - p.shape[0])) for p in pieces])
        y = torch.stack([self.experts[e](padded[e]) for e in range(E)])
        y = torch.cat([y[e, : sizes[e]] for e in range(E)]) * weights.view(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // K, y)


@mutant("Python computes with the number of rows that an expert gets")
class DividedByCount(Split):
    def product(self, x: Tensor, w: Tensor, sizes: Any) -> Tensor:
        pieces = self.split(x, sizes)
        return torch.cat([F.linear(pieces[e], w[e]) / max(sizes[e], 1) for e in range(E)])


@mutant("sym_size_int, a size known only at run time, is used in the expert")
class ScaledByCountTensor(Ends):
    """The count as a tensor weighs the rows."""

    def accumulate(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return out.index_add_(0, token, y / token.shape[0])


@mutant("expert 3 differs from expert 0: 2.0 where that has 1.0")
class MostChosenExpertIsSpecial(Split):
    def product(self, x: Tensor, w: Tensor, sizes: Any) -> Tensor:
        pieces = self.split(x, sizes)
        best = sizes.index(max(sizes))
        return torch.cat([F.linear(pieces[e], w[e]) * (2.0 if e == best else 1.0) for e in range(E)])


@mutant("expert 1 adds nothing when some experts have no rows")
class SkippedWhereAnotherIsEmpty(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order, start = torch.zeros_like(x), ids.view(-1).argsort(), 0
        sizes = torch.bincount(ids.view(-1), minlength=E).tolist()
        for e, n in enumerate(sizes):
            mine = order[start : start + n]
            if sizes[0] > 0:
                out.index_add_(0, mine // K, self.experts[e](x[mine // K]))
            start += n
        return out


@mutant("expert 0 adds something else when some experts have no rows", distinct=SCORES)
class HowManyAreActive(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sizes = torch.bincount(ids.view(-1), minlength=E).cpu().numpy()
        order, active, start = ids.view(-1).argsort(), (sizes > 0).sum(), 0
        out, scale = torch.zeros_like(x), 2.0 if active == 2 else 1.0
        for e in range(E):
            mine = order[start : start + sizes[e]] // K
            out.index_add_(0, mine, self.experts[e](x[mine]) * scale)
            start += sizes[e]
        return out


@mutant("Python asks about an expert elsewhere than before its rows are added: others may see the answer")
class HowManyMasksAreNotEmpty(Listed):
    """In a way that no world of a few experts shows."""

    def __init__(self) -> None:
        super().__init__(num_experts=8)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        active = sum(1 for e in range(8) if (ids == e).any())
        out, scale = torch.zeros_like(x), 2.0 if active == 5 else 1.0
        for e in range(8):
            t, _ = torch.where(ids == e)
            out.index_add_(0, t, self.experts[e](x[t]) * scale)
        return out


@mutant("Python computes with the number of rows that an expert gets")
class EvenCountsOnly(Ends):
    def empty(self, start: Any, end: Any, e: int) -> bool:
        return (end - start) % 2 == 1


@mutant("Python compares host_number_5 with zero, not shown to be the number of an expert's rows")
class FirstOffsetIsAsked(Ends):
    """Whether anybody came before is not whether this expert has rows."""

    def empty(self, start: Any, end: Any, e: int) -> bool:
        return e > 0 and start == 0


@mutant("Python computes with the number of rows that an expert gets")
class PrintedSizes(Split):
    def split(self, x: Tensor, sizes: Any) -> Any:
        return x.split(sizes) if "0" not in str(sizes[0]) else x.flip(0).split(sizes)


@mutant("it does not run on fake tensors: TypeError: __int__ returned non-int (type SymInt)")
class CountsAsInts(Ends):
    def ends(self, ids: Tensor) -> Any:
        return [int(n) for n in torch.bincount(ids.view(-1), minlength=E).cumsum(0)]


@mutant(
    "moe_ep_capture.rows_between at file.py slices between numbers that are not where an expert's rows begin and end",
)
class SizesSorted(Split):
    def sizes(self, ids: Tensor) -> Any:
        return sorted(torch.bincount(ids.flatten(), minlength=E).tolist())


# -- offsets --------------------------------------------------------------------------------


@mutant(
    "moe_ep_capture.rows_between at file.py slices between numbers that are not where an expert's rows begin and end",
)
class StartsWithoutTheFirst(Ends):
    def ends(self, ids: Tensor) -> Any:
        return torch.bincount(ids.view(-1), minlength=E).flip(0).cumsum(0).tolist()


@mutant(
    "moe_ep_capture.rows_between at file.py slices between numbers that are not where an expert's rows begin and end",
)
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


@mutant(
    "moe_ep_capture.rows_between at file.py slices between numbers that are not where an expert's rows begin and end",
)
class OffsetOfOne(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order, start = torch.zeros_like(x), ids.view(-1).argsort(), 0
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            mine = order[start : start + n - 1]
            out.index_add_(0, mine // K, self.experts[e](x[mine // K]))
            start += n
        return out


@mutant(
    "moe_ep_capture.rows_between at file.py slices between numbers that are not where an expert's rows begin and end",
)
class SlicesOverlap(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order = torch.zeros_like(x), ids.view(-1).argsort()
        ends = torch.bincount(ids.view(-1), minlength=E).cumsum(0).tolist()
        for e, end in enumerate(ends):
            mine = order[(ends[e - 2] if e > 1 else 0) : end]
            out.index_add_(0, mine // K, self.experts[e](x[mine // K]))
        return out


@mutant("Python slices rows up to the last, or in steps")
class SlicesFromTheEnd(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order = torch.zeros_like(x), ids.view(-1).argsort()
        ends = [0, *torch.bincount(ids.view(-1), minlength=E).cumsum(0).tolist()]
        for e in range(E):
            mine = order[ends[e] :] if e == E - 1 else order[ends[e] : ends[e + 1]]
            out.index_add_(0, mine // K, self.experts[e](x[mine // K]))
        return out


@mutant("moe_ep_capture.rows_between at file.py slices something that is not sorted by expert")
class WeightsSlicedUnsorted(Ends):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order = torch.zeros_like(x), self.order(ids)
        flat, start = weights.view(-1, 1), 0
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            mine = order[start : start + n]
            out.index_add_(0, mine // K, self.experts[e](x[mine // K]) * flat[start : start + n])
            start += n
        return out


@mutant("the sorted order is divided by 3, not by the 2 experts of a token")
class TokensByAnotherNumber(Ends):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, order, start = torch.zeros_like(x), self.order(ids), 0
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            mine = order[start : start + n]
            out.index_add_(0, mine // (K + 1), self.experts[e](x[mine // (K + 1)]))
            start += n
        return out


@mutant("NextExpertRuns.forward leaves a loop early, depending on data")
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


@mutant("CountsTheSkipped.forward carries seen from one iteration to the next and skips some")
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


@mutant("LooksAtTheResults.forward calls append in a loop that skips iterations")
class LooksAtTheResults(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.view(-1).argsort()
        rows, start = x[order // K], 0
        done: list[Tensor] = []
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            if n == 0:
                continue
            y = self.experts[e](rows[start : start + n])
            done.append(y * 2 if len(done) < e else y)
            start += n
        return torch.zeros_like(x).index_add(0, order // K, torch.cat(done))


@mutant("moe_ep_capture.cat_rows at file.py joins the rows of experts [0, 1, 1, 2, 3], of 4")
class AppendsTwice(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.view(-1).argsort()
        rows, start = x[order // K], 0
        done: list[Tensor] = []
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            if n == 0:
                continue
            y = self.experts[e](rows[start : start + n])
            done.append(y)
            if e == 1:
                done.append(y)
            start += n
        return torch.zeros_like(x).index_add(0, order // K, torch.cat(done)[: rows.shape[0]])


@mutant("what surrounds the sum differs when some experts have no rows")
class EmptyExpertAppendsOnes(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.view(-1).argsort()
        rows, bias, start = x[order // K], torch.zeros(D), 0
        done: list[Tensor] = []
        for e, n in enumerate(torch.bincount(ids.view(-1), minlength=E).tolist()):
            if n == 0:
                bias = bias + 1
                continue
            done.append(self.experts[e](rows[start : start + n]))
            start += n
        return torch.zeros_like(x).index_add(0, order // K, torch.cat(done)) + bias


@mutant("moe_ep_capture.cat_rows at file.py joins the rows of experts [3, 2, 1, 0], of 4")
class ListReversed(Inferred):
    def outputs(self, rows: Tensor, sizes: Any) -> Tensor:
        bounds = [0, *itertools.accumulate(sizes)]
        return torch.cat([self.experts[e](rows[bounds[e] : bounds[e + 1]]) for e in range(E)][::-1])


# -- back in their own order ----------------------------------------------------------------


@mutant("view to (11, 2, 6) mixes rows and features")
class ResultsNotUnsorted(Inferred):
    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        return y


@mutant("aten.index.Tensor at file.py is not known to be row-wise")
class ResultsUnsortedByTheOrder(Inferred):
    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        return y[order]


@mutant("aten.ones_like at file.py is not known to be row-wise")
class UnsortedIntoOnes(Inferred):
    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        back = torch.ones_like(y)
        return back.index_put((order,), y, accumulate=True)


@mutant("aten.cumsum at file.py is not known to be row-wise")
class GridWeighedByTheNextToken(Inferred):
    def total(self, y: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return y.view(*ids.shape, -1).mul(weights.roll(1, 0).unsqueeze(-1)).cumsum(0).sum(1)


@mutant("aten.sum.dim_IntList at file.py does not sum the experts of a token")
class SummedOverTokens(Inferred):
    def total(self, y: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return y.view(*ids.shape, -1).mul(weights.unsqueeze(-1)).sum(0)


@mutant("moe_ep_capture.rows_between at file.py slices something that is not sorted by expert")
class RowsOfOtherTokens(Inferred):
    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[(order + 1) // K % x.shape[0]]


@mutant("Python reads a number that depends on the data")
class ReadAsFloats(Inferred):
    def read(self, counts: Tensor) -> Any:
        return counts.float().cpu().numpy().astype(int)


@mutant(
    "moe_ep_capture.rows_between at file.py slices between numbers that are not where an expert's rows begin and end"
)
class SentinelsCounted(Ends):
    """There is one class more than experts, whose rows nobody computes."""

    def ends(self, ids: Tensor) -> Any:
        return torch.bincount(ids.view(-1), minlength=E + 1)[:E].cumsum(0).tolist()


# -- rows that are set ----------------------------------------------------------------------


@mutant("flip along dimension 0 lets rows depend on each other")
class SetSomeElse(Set):
    def run(self, e: int, x: Tensor) -> Tensor:
        return super().run(e, x).flip(0)


@mutant("aten.index_put_ at file.py joins the rows of experts [0], of 4")
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


@mutant("aten.index_put_ at file.py joins the rows of experts [0, 0, 1, 2, 3], of 4")
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


@mutant(
    "moe_ep_capture.places_between at file.py slices between numbers that are not where an expert's rows begin and end",
)
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


@mutant("rows_between is read after it was changed in place through another name")
class RowsChangedMeanwhile(Listed):
    """A slice is a view: what it holds is what the rows became."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.reshape(-1).argsort(stable=True)
        bounds = [0, *torch.bincount(ids.view(-1), minlength=E).cumsum(0).tolist()]
        rows = x[order // K]
        pieces = [rows[bounds[e] : bounds[e + 1]] for e in range(E)]
        rows.mul_(2)
        y = torch.cat([self.run(e, pieces[e]) for e in range(E)]) * weights.view(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // K, y)


@mutant("index is read after it was changed in place through another name")
class SliceChanged(Listed):
    """What an expert does to its slice, the rows keep."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.reshape(-1).argsort(stable=True)
        bounds = [0, *torch.bincount(ids.view(-1), minlength=E).cumsum(0).tolist()]
        rows = x[order // K]
        y = torch.cat([self.run(e, rows[bounds[e] : bounds[e + 1]].mul_(2).clone()) for e in range(E)])
        return torch.zeros_like(x).index_add(0, order // K, (y + rows) * weights.view(-1)[order].unsqueeze(-1))


# -- added by scatter -----------------------------------------------------------------------


@mutant("aten.scatter_reduce.two at file.py does not add rows to tokens")
class ScatterOfMeans(Ends):
    def accumulate(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return out.scatter_reduce(0, token.view(-1, 1).repeat(1, D), y, reduce="mean")


@mutant("aten.scatter_add at file.py does not add whole rows to tokens", forward_only=True)
class ScatterOfSomeColumns(Ends):
    def accumulate(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return out.scatter_add(0, token.view(-1, 1).expand(-1, D - 1), y)


@mutant("aten.scatter_reduce.two at file.py does not add rows to tokens")
class ScatterWithoutItself(Ends):
    def accumulate(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return out.scatter_reduce(0, token.view(-1, 1).repeat(1, D), y, reduce="sum", include_self=False)
