"""Mutants of the grouped and batched forms: other orders, offsets, ids, sizes that happen to be equal, lost changes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_sorted import (
    HAS_TRANSFORMERS,
    Added,
    Batched,
    Grouped,
    SentinelsMasked,
    Sorted,
    bmm,
    grouped_mm,
)
from tests.detect.loops import FF, D, E, K, Listed, mutant, weight

# -- the order ------------------------------------------------------------------------------


@mutant("view to (11, 2, 6) mixes rows and features")
class SortedDescending(Sorted):
    """Right, but not the order of offsets."""

    def order(self, flat: Tensor) -> Tensor:
        return torch.argsort(flat, descending=True)


@mutant("the unsorting index is used on other rows than it sorted")
class SortedByTheOrderOfTheOrder(Sorted):
    def order(self, flat: Tensor) -> Tensor:
        return flat.argsort(stable=True).argsort()


@mutant("the sorted order is divided by 2, not by the 1 experts of a token")
class SortedByOtherIds(Sorted):
    def order(self, flat: Tensor) -> Tensor:
        return torch.argsort((flat + 1) % E)


@mutant("the sorted order is divided by 2, not by the 11 experts of a token")
class SortedByTransposedIds(Sorted):
    def order(self, flat: Tensor) -> Tensor:
        return torch.argsort(flat.view(-1, K).t().reshape(-1))


@mutant("the sorted order is divided by 2, not by the 1 experts of a token")
class SortedByColumns(Sorted):
    def flat(self, ids: Tensor) -> Tensor:
        return ids.sort(0)[0].reshape(-1)

    def order(self, flat: Tensor) -> Tensor:
        return torch.argsort(flat.flip(0))


@mutant("bmm of rows with a value that has none")
class SortedTwice(Sorted):
    """Two sorts may put equal ids in two orders."""

    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[torch.sort(order)[0] // K]


@mutant("bmm of rows with a value that has none")
class SortedTokensByRemainder(Sorted):
    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order % x.shape[0]]


@mutant("the sorted order is divided by 3, not by the 2 experts of a token")
class SortedTokensByAnotherNumber(Sorted):
    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order // (K + 1)]


@mutant("bmm of rows with a value that has none")
class SortedTokensOfTheInverse(Sorted):
    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order.argsort() // K]


@mutant("aten.index.Tensor at file.py reads tokens repeated 3 times for 2 experts of a token")
class SortedTokensRepeatedThrice(Sorted):
    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x.repeat_interleave(3, 0)[order]


@mutant("rows of two different selections are mixed")
class SortedTokensInTheirOwnOrder(Sorted):
    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x.repeat_interleave(K, 0)


@mutant("cat is (22, 6), the expert ids are (11, 2)")
class SortedTokensOfMore(Sorted):
    """A longer input, of which the first rows are read."""

    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return torch.cat([x, x]).repeat_interleave(K, 0)[order]


@mutant("reshape_1 is (44,), the expert ids are (11, 2)")
class SortedWeightsOfMore(Sorted):
    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return y * torch.cat([weights, weights]).reshape(-1)[order].unsqueeze(-1)


@mutant("pad is (23,), the expert ids are (11, 2)")
class SortedWeightsOfOneMore(Sorted):
    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return y * F.pad(weights.reshape(-1), (0, 1))[order].unsqueeze(-1)


@mutant("mul adds a tensor of shape (22, 1) across the rows")
class SortedWeightsUnsorted(Sorted):
    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return y * weights.reshape(-1, 1)


@mutant("the unsorting index is used on other rows than it sorted")
class SortedWeightsByTheInverse(Sorted):
    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return y * weights.reshape(-1)[order.argsort()].unsqueeze(-1)


@mutant("rows of two different selections are mixed")
class SortedWeightsAfterUnsorting(Sorted):
    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return y[order.argsort()] * weights.reshape(-1)[order].unsqueeze(-1)

    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        return y


@mutant("view to (11, 2, 6) mixes rows and features")
class SortedHalf(Sorted):
    def order(self, flat: Tensor) -> Tensor:
        return torch.argsort(flat)[: flat.shape[0] // 2].repeat(2)


@mutant("mul adds a tensor of shape (22, 1) across the rows")
class SortedCapacity(Sorted):
    """Only the first rows count."""

    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return super().weigh(y, weights, order) * (torch.arange(order.shape[0]) < 5).unsqueeze(-1)


@mutant("rows of two different selections are mixed")
class SortedBiasOfUnsortedIds(Sorted):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        order = flat.argsort()
        h = bmm(self.up, flat[order], self.rows(x, order)) + self.bias[flat]
        y = self.weigh(bmm(self.down, flat[order], F.silu(h)), weights, order)
        return self.total(self.unsort(y, order))


@mutant("the unsorting index is used on other rows than it sorted")
class SortedIdsChanged(Sorted):
    def first(self, x: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return bmm(w, mine.add_(1).remainder_(E), x)


@mutant("mul is changed in place while the experts run")
class SortedInputChanged(Sorted):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x = x * 1
        flat = ids.reshape(-1)
        order = flat.argsort()
        rows = x[order // K]
        x.mul_(2)
        y = bmm(self.down, flat[order], F.silu(bmm(self.up, flat[order], rows)))
        return self.total(self.unsort(self.weigh(y, weights, order), order)) + x


# -- back to tokens -------------------------------------------------------------------------


@mutant("view to (11, 2, 6) mixes rows and features")
class NotUnsorted(Sorted):
    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        return y


@mutant("the unsorting index is used on other rows than it sorted")
class UnsortedTwice(Sorted):
    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        return y[order.argsort()][order.argsort()]


@mutant("aten.index.Tensor at file.py is not known to be row-wise (it reads rows)")
class UnsortedByTheOrder(Sorted):
    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        return y[order]


@mutant("aten.index.Tensor at file.py is not known to be row-wise (it reads rows)")
class UnsortedByAnother(Sorted):
    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        return y[order.flip(0).argsort()]


@mutant("aten.index.Tensor at file.py is not known to be row-wise (it reads rows)")
class InverseOfOneNumber(Sorted):
    """index_put_ repeats a source of one number."""

    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        inverse = torch.empty_like(order)
        return y[inverse.index_put_((order,), torch.arange(1))]


@mutant("aten.index.Tensor at file.py is not known to be row-wise (it reads rows)")
class InverseFromOne(Sorted):
    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(-1, order.shape[0] - 1)
        return y[inverse]


@mutant("aten.index.Tensor at file.py is not known to be row-wise (it reads rows)")
class InverseAdded(Sorted):
    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        inverse = torch.zeros_like(order).index_put((order,), torch.arange(order.shape[0]), accumulate=True)
        return y[inverse]


@mutant("aten.index.Tensor at file.py is not known to be row-wise (it reads rows)")
class InverseTooLong(Sorted):
    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        inverse = torch.zeros(2 * order.shape[0], dtype=torch.int64)
        inverse[order] = torch.arange(order.shape[0])
        return y[inverse]


@mutant("index_put_ is read after it was changed in place through another name")
class InverseChanged(Sorted):
    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        inverse[0] = 0
        return y[inverse]


@mutant("aten.index_put_ at file.py changes an input of the region in place")
class InverseInABuffer(Sorted):
    """The buffer is changed for good."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inverse", torch.zeros(22, dtype=torch.int64))

    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        self.inverse[order] = torch.arange(order.shape[0])
        return y[self.inverse]


@mutant("aten.sum.dim_IntList at file.py does not sum the experts of a token")
class SumOverTokens(Sorted):
    def total(self, y: Tensor) -> Tensor:
        return y.view(-1, K, D).sum(0)


@mutant("aten.sum.dim_IntList at file.py does not sum the experts of a token", tokens=K)
class SumOverTokensAsManyAsExperts(Sorted):
    def total(self, y: Tensor) -> Tensor:
        return y.view(K, -1, D).sum(0)


@mutant("aten.sum at file.py does not sum the experts of a token")
class SumOfAll(Sorted):
    def total(self, y: Tensor) -> Tensor:
        return y.view(-1, K, D).sum()


@mutant("aten.sum.dim_IntList at file.py does not sum the experts of a token")
class SumOverTwo(Sorted):
    def total(self, y: Tensor) -> Tensor:
        return y.view(-1, K, D).sum((0, 1))


@mutant("aten.mean.dim at file.py is not known to be row-wise (it reads pairgrid)")
class MeanOfExperts(Sorted):
    def total(self, y: Tensor) -> Tensor:
        return y.view(-1, K, D).mean(1)


@mutant("aten.amax at file.py is not known to be row-wise (it reads pairgrid)")
class LargestOfExperts(Sorted):
    def total(self, y: Tensor) -> Tensor:
        return y.view(-1, K, D).amax(1)


@mutant("aten.sum.dim_IntList at file.py changes the dtype while it sums")
class SumInAnotherType(Sorted):
    def total(self, y: Tensor) -> Tensor:
        return y.view(-1, K, D).sum(1, dtype=torch.float64)


@mutant("view to (2, 10, 6) mixes rows and features", tokens=10)
class SumOfNeighbours(Sorted):
    """Pairs of pairs of the wrong tokens: as many as there should be."""

    def total(self, y: Tensor) -> Tensor:
        return y.view(2, -1, D).sum(0)


@mutant("view to (11, 6, 2) mixes rows and features")
class SumsOfFeatures(Sorted):
    def total(self, y: Tensor) -> Tensor:
        return y.view(-1, D, K).sum(2)


# -- added to tokens ------------------------------------------------------------------------


@mutant("aten.index_put_ at file.py keeps only one of the 2 rows of a token")
class AddedToWhatWasRead(Added):
    """`out[token] += y` adds only one of a token's rows, though its experts are distinct."""

    def add(self, x: Tensor, token: Tensor, y: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[token] += y
        return out


@mutant("aten.index_put_ at file.py overwrites what another expert of the same token wrote")
class Assigned(Added):
    def add(self, x: Tensor, token: Tensor, y: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[token] = y
        return out


@mutant("rows of all experts are added more than once")
class AddedTwice(Added):
    def add(self, x: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, token, y).index_add(0, token, y)


@mutant("aten.index_add at file.py does not add rows to tokens along dimension 0 with factor 1")
class AddedByHalf(Added):
    def add(self, x: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, token, y, alpha=0.5)


@mutant("aten.index_add at file.py is not known to be row-wise (it reads rows)")
class AddedToOthers(Added):
    def add(self, x: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, token.flip(0), y)


@mutant("the sum is (12, 6), its terms are (22, 6), the expert ids are (11, 2)")
class AddedToALongerSum(Added):
    def add(self, x: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return torch.zeros(x.shape[0] + 1, D).index_add(0, token, y)[:-1]


@mutant("aten.scatter_reduce.two at file.py does not add rows to tokens")
class AddedByScatterOfMeans(Added):
    def add(self, x: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x).scatter_reduce(0, token.unsqueeze(-1).expand_as(y), y, "mean")


# -- offsets --------------------------------------------------------------------------------

if HAS_TRANSFORMERS:
    NOT_ENDS = "the offsets of the grouped product are not the ends of these rows' groups"

    @mutant(NOT_ENDS)
    class OffsetsAreStarts(Grouped):
        def ends(self, mine: Tensor) -> Tensor:
            counts = torch.histc(mine.float(), bins=E, min=0, max=E - 1)
            return (counts.cumsum(0) - counts).to(torch.int32)

    @mutant(NOT_ENDS)
    class OffsetsAreCounts(Grouped):
        def ends(self, mine: Tensor) -> Tensor:
            return torch.histc(mine.float(), bins=E, min=0, max=E - 1).to(torch.int32).sort()[0]

    @mutant(NOT_ENDS)
    class OffsetsOfOthers(Grouped):
        def ends(self, mine: Tensor) -> Tensor:
            return super().ends((mine + 1) % E)

    @mutant(NOT_ENDS)
    class OffsetsShifted(Grouped):
        def ends(self, mine: Tensor) -> Tensor:
            counts = torch.histc(mine.float(), bins=E, min=0, max=E - 1)
            return counts.roll(1).cumsum(0).to(torch.int32)

    @mutant(NOT_ENDS)
    class OffsetsBackwards(Grouped):
        def ends(self, mine: Tensor) -> Tensor:
            counts = torch.histc(mine.float(), bins=E, min=0, max=E - 1)
            return counts.flip(0).cumsum(0).to(torch.int32)

    @mutant(NOT_ENDS, tokens=70)
    class OffsetsOverflow(Grouped):
        def ends(self, mine: Tensor) -> Tensor:
            counts = torch.histc(mine.float(), bins=E, min=0, max=E - 1)
            return counts.cumsum(0, dtype=torch.int8).to(torch.int32).clamp(min=0)

    @mutant(NOT_ENDS)
    class OffsetsOfOtherBins(Grouped):
        def ends(self, mine: Tensor) -> Tensor:
            return torch.histc(mine.float(), bins=E, min=0, max=E).cumsum(0, dtype=torch.int32)

    @mutant(NOT_ENDS)
    class OffsetsOfFewerBins(Grouped):
        def ends(self, mine: Tensor) -> Tensor:
            counts = torch.histc(mine.float(), bins=E - 1, min=0, max=E - 2)
            return F.pad(counts, (0, 1)).cumsum(0, dtype=torch.int32)

    @mutant(NOT_ENDS)
    class OffsetsOfTheDefaultBins(Grouped):
        def ends(self, mine: Tensor) -> Tensor:
            return torch.histc(mine.float(), bins=E).cumsum(0, dtype=torch.int32)

    @mutant(NOT_ENDS)
    class OffsetsOfShiftedIds(Grouped):
        def ends(self, mine: Tensor) -> Tensor:
            return torch.histc(mine.float() * 0.9, bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)

    @mutant(NOT_ENDS)
    class SecondOffsetsDiffer(Grouped):
        def second(self, h: Tensor, w: Tensor, mine: Tensor) -> Tensor:
            return grouped_mm(h, w.transpose(1, 2), self.ends(mine.clone() * 0 + 1))

    @mutant("view to (11, 2, 6) mixes rows and features")
    class GroupedDescending(Grouped):
        def order(self, flat: Tensor) -> Tensor:
            return torch.argsort(flat, descending=True, stable=True)

    @mutant("select along dimension 0 lets rows depend on each other")
    class GroupedUnsortedRows(Grouped):
        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            ends = self.ends(ids.reshape(-1))
            h = F.silu(grouped_mm(x.repeat_interleave(K, 0) + self.scale[ids.reshape(-1)][0], self.up.mT, ends))
            return (grouped_mm(h, self.down.mT, ends) * weights.reshape(-1, 1)).view(-1, K, D).sum(1)

    @mutant("the grouped product reads rows that are not sorted by expert")
    class GroupedByIdsOfRows(Grouped):
        """Rows in the order of the pairs, products by offsets."""

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            flat = ids.reshape(-1)
            h = bmm(self.up, flat, x.repeat_interleave(K, 0))
            y = grouped_mm(F.silu(h), self.down.mT, self.ends(flat))
            return (y * weights.reshape(-1, 1)).view(-1, K, D).sum(1)

    LAST = "rows of ids outside the experts are blanked, but not the last thing they become"

    @mutant(LAST)
    class SentinelsMaskedFirst(SentinelsMasked):
        def last(self, y: Tensor, outside: Tensor) -> Tensor:
            return y

    @mutant(LAST)
    class SentinelsAddedTo(SentinelsMasked):
        def last(self, y: Tensor, outside: Tensor) -> Tensor:
            return y.masked_fill(outside, 0.0) + self.last_bias

    @mutant(LAST)
    class SentinelsExponentiated(SentinelsMasked):
        def last(self, y: Tensor, outside: Tensor) -> Tensor:
            return y.masked_fill(outside, 0.0).exp()

    @mutant("aten.masked_fill.Scalar at file.py blanks other rows than those of ids outside the experts")
    class SentinelsMaskedWithOnes(SentinelsMasked):
        def last(self, y: Tensor, outside: Tensor) -> Tensor:
            return y.masked_fill(outside, 1.0)

    @mutant("ids from [3] on are blanked, there are 4 experts")
    class SentinelsFromTheLastExpertOn(SentinelsMasked):
        bound = E - 1

    @mutant("ids from [5] on are blanked, there are 4 experts")
    class SentinelsPastOneMore(SentinelsMasked):
        bound = E + 1

    @mutant("ids outside the experts are mapped to experts")
    class SentinelsMappedToFewer(SentinelsMasked):
        highest = E - 2

    @mutant("ids outside the experts are mapped to experts")
    class SentinelsNotMasked(Grouped):
        def act(self, h: Tensor, mine: Tensor) -> Tensor:
            return F.silu(h + self.bias[mine.clamp(max=E - 1)])


# -- which expert ---------------------------------------------------------------------------


@mutant("ids outside the experts are mapped to experts")
class BatchedClampedFromOne(Batched):
    """And what is past the experts is an error."""

    def flat(self, ids: Tensor) -> Tensor:
        return ids.reshape(-1).clamp_min(1)


@mutant("ids outside the experts are mapped to experts")
class BatchedClampedInTwoWays(Batched):
    def second_ids(self, ids: Tensor) -> Tensor:
        return ids.reshape(-1).clamp(0, E - 2)


@mutant("aten.clamp at file.py maps ids outside the experts to experts")
class BatchedClampedTwice(Batched):
    def flat(self, ids: Tensor) -> Tensor:
        return ids.reshape(-1).clamp(0, E - 1).clamp(1, E - 1)


@mutant("ids outside the experts are mapped to experts")
class BatchedClampedPastTheExperts(Batched):
    def flat(self, ids: Tensor) -> Tensor:
        return ids.reshape(-1).clamp(0, E)


@mutant("bmm of rows with a value that has none")
class BatchedOthersDown(Batched):
    def second_ids(self, ids: Tensor) -> Tensor:
        return (ids.reshape(-1) + 1) % E


@mutant("rows of two different selections are mixed")
class BatchedTransposedDown(Batched):
    def second_ids(self, ids: Tensor) -> Tensor:
        return ids.t().reshape(-1)


@mutant("rows of two different selections are mixed", tokens=K)
class BatchedTransposedDownAsManyTokens(Batched):
    def second_ids(self, ids: Tensor) -> Tensor:
        return ids.t().reshape(-1)


@mutant("rows of two different selections are mixed")
class BatchedSortedDown(Batched):
    def second_ids(self, ids: Tensor) -> Tensor:
        return ids.reshape(-1).sort()[0]


@mutant("bmm of rows with a value that has none")
class BatchedTiled(Batched):
    def repeat(self, x: Tensor) -> Tensor:
        return x.repeat(K, 1)


@mutant("bmm of rows with a value that has none", tokens=K)
class BatchedTiledAsManyTokens(Batched):
    def repeat(self, x: Tensor) -> Tensor:
        return x.repeat(K, 1)


@mutant("4 experts are used, up holds 5")
class BatchedMoreWeights(Batched):
    def __init__(self) -> None:
        super().__init__()
        self.up = weight(E + 1, FF, D)


@mutant("aten.roll at file.py is not known to be row-wise (it reads rows)")
class BatchedRolledWeights(Batched):
    """Rolled after they are gathered: each row takes the weights of the row before."""

    def first(self, x: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return torch.bmm(w[mine].roll(1, 0), x.unsqueeze(-1)).squeeze(-1)


# -- rows that see each other ---------------------------------------------------------------


@mutant("mean along dimension 0 lets rows depend on each other")
class SortedMeanOfRows(Sorted):
    def act(self, h: Tensor, mine: Tensor) -> Tensor:
        return h - h.mean(0)


@mutant("cumsum along dimension 0 lets rows depend on each other")
class SortedRunningSum(Sorted):
    def act(self, h: Tensor, mine: Tensor) -> Tensor:
        return h.cumsum(0)


@mutant("slice along dimension 0 lets rows depend on each other")
class SortedFirstRow(Sorted):
    def act(self, h: Tensor, mine: Tensor) -> Tensor:
        return h + h[:1]


@mutant("mul adds a tensor of shape (22, 1) across the rows")
class SortedPlaceOfRow(Sorted):
    def act(self, h: Tensor, mine: Tensor) -> Tensor:
        return h * torch.arange(h.shape[0]).unsqueeze(1)


@mutant("select along dimension 0 lets rows depend on each other")
class SortedFirstRowSet(Sorted):
    def act(self, h: Tensor, mine: Tensor) -> Tensor:
        h[0] = 0
        return F.silu(h)


@mutant("view to (11, 20) mixes rows and features")
class BatchedExpertsOfATokenMixed(Batched):
    def act(self, h: Tensor, mine: Tensor) -> Tensor:
        return h.view(-1, K * FF).softmax(-1).view(-1, FF)


@mutant("aten.sigmoid at file.py runs under no_grad inside the expert loop")
class SortedGateWithoutGradient(Sorted):
    def act(self, h: Tensor, mine: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(h)
        return h * gate


# -- sizes that happen to be equal ----------------------------------------------------------


@mutant("mul broadcasts rows of rank 1 to rank 2: rows would meet rows", tokens=D // K)
class RowsAsFeatures(Sorted):
    """Weights by row meet the features: R == D."""

    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return y * weights.reshape(-1)[order]


@mutant("mul broadcasts rows of rank 1 to rank 2: rows would meet rows", tokens=D // K)
class ExpertScalesAsFeatures(Sorted):
    """One number an expert, by row, meets the features: R == D."""

    def second(self, h: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return bmm(w, mine, h) * self.scale[mine]


@mutant("mul broadcasts rows of rank 1 to rank 2: rows would meet rows", tokens=D // K)
class ExpertScalesAsFeaturesBatched(Batched):
    def second(self, h: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return bmm(w, mine, h) * self.scale[mine]


@mutant("mul broadcasts rows of rank 1 to rank 3: rows would meet rows", tokens=D // K)
class ExpertScalesAsFeaturesOfWeights(Sorted):
    def first(self, x: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return torch.bmm(w[mine] * self.scale[mine], x.unsqueeze(-1)).squeeze(-1)


@mutant("linear multiplies rows with rows", tokens=FF // K)
class ExpertScalesAsBias(Sorted):
    """R == FF."""

    def act(self, h: Tensor, mine: Tensor) -> Tensor:
        return F.linear(h, self.mix, self.scale[mine])


@mutant("addmm multiplies rows with rows", tokens=FF // K)
class ExpertScalesAsAddedBias(Sorted):
    def act(self, h: Tensor, mine: Tensor) -> Tensor:
        return torch.addmm(self.scale[mine], h, self.mix)


@mutant("layer_norm has a weight that depends on the rows", tokens=FF // K)
class ExpertScalesAsNorm(Sorted):
    def act(self, h: Tensor, mine: Tensor) -> Tensor:
        return F.layer_norm(h, (FF,), self.scale[mine])


@mutant("rms_norm has a weight that depends on the rows", tokens=FF // K)
class ExpertScalesAsRmsNorm(Sorted):
    def act(self, h: Tensor, mine: Tensor) -> Tensor:
        return F.rms_norm(h, (FF,), self.scale[mine])


@mutant("layer_norm has a weight that depends on the rows", tokens=D // K)
class ExpertScalesAsNormOfTokens(Batched):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(F.layer_norm(x, (D,), self.scale[ids.reshape(-1)]), ids, weights)


@mutant("matmul of one number a row sums over the rows", tokens=FF // K)
class WeightsTimesAMatrix(Sorted):
    """A vector over the rows times a matrix sums over them."""

    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return y * (weights.reshape(-1)[order] @ self.mix).unsqueeze(-1)


@mutant("linear of one number a row sums over the rows", tokens=FF // K)
class WeightsThroughALayer(Sorted):
    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return y * F.linear(weights.reshape(-1)[order], self.mix).unsqueeze(-1)


@mutant("matmul multiplies rows with rows", tokens=D // K)
class RowsTimesAllWeights(Sorted):
    """[R, D] @ [R, D, FF] multiplies every row with every gathered weight."""

    def first(self, x: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return (x @ w.transpose(1, 2)[mine]).sum(1)


@mutant("slice_1 is (1, 6), the expert ids are (11, 1)", top_k=1)
class OneTokenForAll(Batched):
    """A single row is spread over all."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        h = x[:1].repeat_interleave(1, 0) + self.down[:, :, 0][ids.reshape(-1)]
        return (h * weights.reshape(-1, 1)).view(-1, 1, D).sum(1)


@mutant("mul adds a tensor of shape (1, 1, 6) across the rows")
class WeightsWithOneMoreDimension(Sorted):
    """[1, 1, D] would be one more dimension for each expert's own weight."""

    def first(self, x: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return torch.bmm(w[mine] * self.mix[None, :1, :D], x.unsqueeze(-1)).squeeze(-1)


@mutant("aten.sum.dim_IntList at file.py sums something that is not one value a row")
class BiasAlone(Batched):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.down[:, :, 0][ids.reshape(-1)].view(-1, K, D).sum(1)


# -- changes in place that somebody else sees -----------------------------------------------


@mutant("what aten.index_put_ at file.py changes is read elsewhere")
class InverseInAPartOfAnother(Sorted):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        flat = ids.reshape(-1)
        order = flat.argsort()
        both = torch.zeros(2, order.shape[0], dtype=torch.int64)
        inverse = both[0]
        inverse[order] = torch.arange(order.shape[0])
        y = bmm(self.down, flat[order], F.silu(bmm(self.up, flat[order], self.rows(x, order))))
        return self.total(self.weigh(y, weights, order)[inverse]), both * 1.0


@mutant("what aten.mul_.Tensor at file.py changes is read elsewhere")
class RowsSeenThroughAView(Sorted):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        flat = ids.reshape(-1)
        order = flat.argsort()
        rows = self.rows(x, order)
        seen = rows.view(-1)
        rows.mul_(2)
        y = bmm(self.down, flat[order], F.silu(bmm(self.up, flat[order], rows)))
        return self.total(self.unsort(self.weigh(y, weights, order), order)), seen


@mutant("what aten.relu_ at file.py changes is read elsewhere")
class ActivationSeenThroughAView(Batched):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        mine = self.flat(ids)
        h = self.first(self.repeat(x), self.up, mine)
        seen = h.view(-1)
        h.relu_()
        return self.total(self.weigh(self.second(h, self.down, mine), weights, mine)), seen


# -- ops of other libraries that are named like ATen's --------------------------------------


@torch.library.custom_op("tests_detect::relu", mutates_args=())
def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


@torch.library.custom_op("tests_detect::argsort", mutates_args=())
def backwards(ids: Tensor) -> Tensor:
    return ids.argsort(descending=True)


centred.register_fake(torch.empty_like)
centred.register_autograd(lambda ctx, dy: dy - dy.mean(0))
backwards.register_fake(torch.empty_like)


@mutant("tests_detect.relu at file.py is not known to be row-wise (it reads rows)")
class AnotherRelu(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](torch.ops.tests_detect.relu(x))


@mutant("view to (11, 2, 6) mixes rows and features")
class AnotherSort(Sorted):
    def order(self, flat: Tensor) -> Tensor:
        return torch.ops.tests_detect.argsort(flat)
