"""Idioms that are rewritten: rows of all experts at once, sorted by expert (grouped) or in their own order (batched)."""

import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.loops import FF, D, E, K, idiom, weight

if HAS_TRANSFORMERS := importlib.util.find_spec("transformers") is not None:
    importlib.import_module("transformers.integrations.moe")  # registers `grouped_mm_fallback`


def bmm(w_EFD: Tensor, mine_R: Tensor, x_RD: Tensor) -> Tensor:
    """The product of each row with the weight of its expert, gathered by row."""
    return torch.bmm(w_EFD[mine_R], x_RD.unsqueeze(-1)).squeeze(-1)


def grouped_mm(x_RD: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """`torch._grouped_mm` takes no float64 and no rows of 24 bytes; transformers' stands in for it."""
    return torch.ops.transformers.grouped_mm_fallback(x_RD, w_EDF, ends_E)


class Sorted(nn.Module):
    """The grouped form.  A mutant changes one step of it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.bias, self.scale = weight(E, FF, D), weight(E, D, FF), weight(E, FF), weight(E)
        self.mix = weight(FF, FF)

    def flat(self, ids: Tensor) -> Tensor:
        return ids.reshape(-1)

    def order(self, flat: Tensor) -> Tensor:
        return torch.argsort(flat)

    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order // K]

    def ends(self, mine: Tensor) -> Tensor:
        return torch.histc(mine.float(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)

    def first(self, x: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return bmm(w, mine, x)

    def second(self, h: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return bmm(w, mine, h)

    def act(self, h: Tensor, mine: Tensor) -> Tensor:
        return F.silu(h)

    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return y * weights.reshape(-1)[order].unsqueeze(-1)

    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        return y[order.argsort()]

    def total(self, y: Tensor) -> Tensor:
        return y.view(-1, K, D).sum(1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = self.flat(ids)
        order = self.order(flat)
        mine = flat[order]
        h = self.act(self.first(self.rows(x, order), self.up, mine), mine)
        y = self.weigh(self.second(h, self.down, mine), weights, order)
        return self.total(self.unsort(y, order))


class Grouped(Sorted):
    """The same with grouped products over offsets."""

    def first(self, x: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return grouped_mm(x, w.transpose(1, 2), self.ends(mine))

    def second(self, h: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return grouped_mm(h, w.transpose(1, 2), self.ends(mine))


class Batched(Sorted):
    """The batched form: rows in the order of the pairs."""

    def repeat(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(K, 0)

    def second_ids(self, ids: Tensor) -> Tensor:
        return self.flat(ids)

    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return y * weights.reshape(-1, 1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mine = self.flat(ids)
        h = self.act(self.first(self.repeat(x), self.up, mine), mine)
        y = self.second(h, self.down, self.second_ids(ids))
        return self.total(self.weigh(y, weights, mine))


class Added(Sorted):
    """Sorted rows are added to their tokens.  `add` is what a mutant changes."""

    def add(self, x: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add_(0, token, y)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = self.flat(ids)
        order = self.order(flat)
        mine = flat[order]
        h = self.act(self.first(self.rows(x, order), self.up, mine), mine)
        return self.add(x, order // ids.shape[1], self.weigh(self.second(h, self.down, mine), weights, order))


# -- grouped --------------------------------------------------------------------------------


@idiom()
class SortedByBmm(Sorted):
    pass


if HAS_TRANSFORMERS:

    @idiom()
    class GroupedByProducts(Grouped):
        pass

    @idiom()
    class GroupedAsHuggingFace(Grouped):
        """With a bias added in place, and the inverse permutation by assignment."""

        def first(self, x: Tensor, w: Tensor, mine: Tensor) -> Tensor:
            return super().first(x, w, mine).add_(self.bias[mine])

        def unsort(self, y: Tensor, order: Tensor) -> Tensor:
            inverse = torch.empty_like(order)
            inverse[order] = torch.arange(order.size(0))
            return y[inverse]

    @idiom()
    class GroupedWithWeightsOfTheNext(Grouped):
        """Expert e has the weights of another: honoured."""

        def first(self, x: Tensor, w: Tensor, mine: Tensor) -> Tensor:
            return super().first(x, w.roll(1, 0), mine)

    @idiom()
    class GroupedByOffsetsOfUnsortedIds(Grouped):
        """Counts do not depend on the order of what is counted."""

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            ends = self.ends(ids.flatten())
            order = self.order(ids.flatten())
            h = F.silu(grouped_mm(self.rows(x, order), self.up.transpose(1, 2), ends))
            y = self.weigh(grouped_mm(h, self.down.transpose(1, 2), ends), weights, order)
            return self.total(self.unsort(y, order))


@idiom()
class SortedStably(Sorted):
    def order(self, flat: Tensor) -> Tensor:
        return torch.sort(flat, stable=True)[1]


@idiom()
class SortedRepeated(Sorted):
    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x.repeat_interleave(K, 0)[order]


@idiom()
class SortedTiled(Sorted):
    """Rows by pair, of whatever meaning: here pair p has token p % T."""

    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x.repeat(K, 1)[order]


@idiom()
class SortedTransposedWeights(Sorted):
    """Weights by pair, in another order than the ids: honoured."""

    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return y * weights.t().reshape(-1)[order].unsqueeze(-1)


@idiom()
class SortedWeightsTwice(Sorted):
    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        rows = weights.reshape(-1)[order].unsqueeze(-1)
        return y * rows * rows


@idiom()
class SortedWeighedAfter(Sorted):
    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return y[order.argsort()] * weights.reshape(-1, 1)

    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        return y


@idiom()
class SortedNegativeDimension(Sorted):
    def total(self, y: Tensor) -> Tensor:
        return y.view(-1, K, D).sum(-2)


@idiom()
class SortedFlooredDivision(Sorted):
    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[torch.div(order, K, rounding_mode="floor")]


@idiom()
class SortedByFloats(Sorted):
    def order(self, flat: Tensor) -> Tensor:
        return torch.sort(flat.float())[1]


@idiom()
class SortedDetachedGate(Sorted):
    def act(self, h: Tensor, mine: Tensor) -> Tensor:
        return h * torch.sigmoid(h).detach()


@idiom()
class AddedToTokens(Added):
    pass


@idiom(top_k=1)
class AddedOneExpert(Added):
    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order // 1]


@idiom(top_k=E)
class AddedAllExperts(Added):
    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order // E]


@idiom(top_k=1)
class AddedToWhatWasReadOneExpert(AddedOneExpert):
    """`out[token] += y`, where every token occurs once."""

    def add(self, x: Tensor, token: Tensor, y: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[token] += y
        return out


@idiom()
class AddedByPut(Added):
    def add(self, x: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x).index_put_((token,), y, accumulate=True)


@idiom()
class AddedToTheInput(Added):
    def add(self, x: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return x.index_add(0, token, y)


# -- weights gathered by row, and changed -----------------------------------------------------


@idiom()
class GatheredTransposed(Sorted):
    def first(self, x: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return torch.bmm(x.unsqueeze(1), w[mine].transpose(1, 2)).squeeze(1)


@idiom()
class GatheredPermuted(Sorted):
    def first(self, x: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return torch.bmm(x.unsqueeze(1), w[mine].permute(0, 2, 1)).squeeze(1)


@idiom()
class GatheredMatrixTransposed(Sorted):
    def first(self, x: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return torch.bmm(x.unsqueeze(1), w[mine].mT).squeeze(1)


@idiom()
class GatheredCast(Sorted):
    def first(self, x: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return torch.bmm(w[mine].double(), x.double().unsqueeze(-1)).squeeze(-1).to(x.dtype)


@idiom()
class GatheredScaled(Sorted):
    def first(self, x: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return bmm(w, mine, x) + torch.bmm(w[mine] * 2, x.unsqueeze(-1)).squeeze(-1)


@idiom()
class GatheredScaledByFeatures(Sorted):
    def first(self, x: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return torch.bmm(w[mine] * self.mix[:1, :D], x.unsqueeze(-1)).squeeze(-1)


@idiom()
class GatheredAdded(Sorted):
    def first(self, x: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return torch.bmm(w[mine] + self.down.transpose(1, 2)[mine], x.unsqueeze(-1)).squeeze(-1)


@idiom()
class GatheredBiasScaled(Sorted):
    def act(self, h: Tensor, mine: Tensor) -> Tensor:
        return F.silu(h + self.bias[mine].clamp(min=-0.1) * 3)


# -- batched --------------------------------------------------------------------------------


@idiom()
class BatchedAsHuggingFace(Batched):
    pass


@idiom(top_k=1)
class BatchedOneExpert(Batched):
    def repeat(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(1, 0)

    def total(self, y: Tensor) -> Tensor:
        return y.view(-1, 1, D).sum(1)


@idiom()
class BatchedWithBias(Batched):
    def act(self, h: Tensor, mine: Tensor) -> Tensor:
        return h.add_(self.bias[mine]).relu_()


@idiom()
class BatchedReturnsRows(Batched):
    """What one expert computes is an output too, after its change in place."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        mine = self.flat(ids)
        h = self.first(self.repeat(x), self.up, mine).relu_()
        return self.total(self.weigh(self.second(h, self.down, mine), weights, mine)), h


@idiom()
class BatchedVectors(Batched):
    """Experts without a matrix."""

    def first(self, x: Tensor, w: Tensor, mine: Tensor) -> Tensor:
        return torch.cat([x, x], 1).narrow(1, 0, FF) * self.bias[mine]


@idiom()
class BatchedScaledByRow(Batched):
    """Each row has a factor of its own, from its place."""

    def act(self, h: Tensor, mine: Tensor) -> Tensor:
        return h * torch.arange(h.shape[0]).unsqueeze(1)


@idiom()
class BatchedReadsIds(Batched):
    """The id of a row is a number like others, and says which rows are blanked."""

    def act(self, h: Tensor, mine: Tensor) -> Tensor:
        return (h * mine.unsqueeze(-1)).masked_fill((mine == 2).unsqueeze(-1), 0.0)


@idiom()
class BatchedWeightsOfATransposedTable(Batched):
    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return y * weights.t().reshape(-1, 1)


# -- ids that are not an expert's -----------------------------------------------------------


@idiom()
class BatchedClamped(Batched):
    """An id past the experts is the last expert's, one before them the first's."""

    def flat(self, ids: Tensor) -> Tensor:
        return ids.reshape(-1).clamp(0, E - 1)


@idiom()
class BatchedClampedToFewer(Batched):
    def flat(self, ids: Tensor) -> Tensor:
        return ids.reshape(-1).clamp(0, E - 2)


class SentinelsMasked(Grouped):
    """Ids past the experts count for nothing, as in transformers with expert parallelism."""

    bound, highest = E, E - 1

    def __init__(self) -> None:
        super().__init__()
        self.last_bias = weight(D)

    def last(self, y: Tensor, outside: Tensor) -> Tensor:
        return y.masked_fill(outside, 0.0)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mine, order = torch.sort(ids.reshape(-1))
        ends, outside = self.ends(mine), (mine >= self.bound).unsqueeze(-1)
        mine.clamp_(max=self.highest)
        rows = x[order // K].masked_fill_(outside, 0.0)
        h = grouped_mm(rows, self.up.mT, ends).add_(self.bias[mine]).masked_fill(outside, 0.0)
        y = self.last(grouped_mm(F.silu(h), self.down.mT, ends), outside)
        return self.total(self.unsort(self.weigh(y, weights, order), order))


if HAS_TRANSFORMERS:
    idiom()(SentinelsMasked)


# -- ops of other libraries -----------------------------------------------------------------


@torch.library.custom_op("tests_detect::mul", mutates_args=())
def normed(w: Tensor, factor: float) -> Tensor:
    """Named like a row-wise op, which it is not."""
    return w * factor / w.norm()


normed.register_fake(lambda w, factor: torch.empty_like(w))


@idiom()
class AnotherProductOfWeights(Sorted):
    """A call on an expert's own weight alone that nobody knows is made outside."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            h = F.linear(x[t], torch.ops.tests_detect.mul(self.up[e].detach(), 2.0))
            out.index_add_(0, t, F.linear(h, self.down[e]) * weights[t, k, None])
        return out
