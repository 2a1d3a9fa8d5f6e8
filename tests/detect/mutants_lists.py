"""Mutants of loops over the ids that occur, and of index vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_lists import (
    OneByMask,
    RepeatedThenMasked,
    Unique,
    UniqueOfLargest,
    WeightsByPair,
)
from tests.detect.loops import SCORES, D, E, K, Listed, mutant

# -- the ids that occur ---------------------------------------------------------------------


MORE = "torch.unique gives more than the experts that were chosen: options are not followed"


@mutant("unique of ids that are not shown to be those of a topk: nobody knows how many there could be")
class UniqueOfAnyIds(Unique):
    """Distinct, but nobody knows how many there could be."""


@mutant("unique of ids that are not shown to be those of a topk: nobody knows how many there could be", distinct=SCORES)
class UniqueOfChangedIds(Unique):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ids = ids.clone()
        ids[0, 0] = 0
        return super().forward(x, ids, weights)


@mutant("unique of ids that are not shown to be those of a topk: nobody knows how many there could be", distinct=SCORES)
class UniqueOfShiftedIds(Unique):
    def chosen(self, ids: Tensor):  # type: ignore[no-untyped-def]
        return torch.unique(ids + 1) - 1


@mutant("what surrounds the sum differs when some experts have no rows", distinct=SCORES)
class UniqueCounted(Unique):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, ids, weights) / len(torch.unique(ids))


@mutant("Python takes a part of the list of chosen experts", distinct=SCORES)
class UniqueInPart(Unique):
    def chosen(self, ids: Tensor):  # type: ignore[no-untyped-def]
        return torch.unique(ids)[1:]


@mutant("a Python loop runs over squeeze, not shown to be the list of chosen experts", distinct=SCORES)
class UniqueOfSomeTokens(Unique):
    def chosen(self, ids: Tensor):  # type: ignore[no-untyped-def]
        return torch.unique(ids[:, 0].contiguous())


@mutant("expert 1 differs from expert 0: 2 where that has 1", distinct=SCORES)
class UniqueNumbered(Unique):
    """How many were chosen before an expert is a number that Python counts."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, e in enumerate(torch.unique(ids)):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None] * (i + 1))  # type: ignore[arg-type]
        return out


@mutant("unique of ids that are not shown to be those of a topk: nobody knows how many there could be")
class UniqueOverTokens(UniqueOfLargest):
    """The token with the largest score of each expert."""

    def best(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        ids = scores.argmax(0).repeat(scores.shape[0])[: scores.shape[0]].clamp(max=E - 1)
        return scores[:, 0], ids


@mutant("2 experts are used, w2 holds 4")
class UniqueOfFewScores(UniqueOfLargest):
    """Of two experts, which are all that the loop can reach."""

    def scores(self, x: Tensor, weights: Tensor) -> Tensor:
        return weights.softmax(-1)


@mutant(MORE, distinct=SCORES)
class UniqueInverse(Unique):
    def chosen(self, ids: Tensor):  # type: ignore[no-untyped-def]
        return torch.unique(ids, return_inverse=True)[0]


@mutant(MORE, distinct=SCORES)
class UniqueByPosition(Unique):
    def chosen(self, ids: Tensor):  # type: ignore[no-untyped-def]
        return torch.unique(ids, True, True)[0]


@mutant("Python puts numbers that it read into a set, or looks them up in a dictionary", distinct=SCORES)
class SetOfIds(Unique):
    def chosen(self, ids: Tensor):  # type: ignore[no-untyped-def]
        return sorted(set(ids.flatten().tolist()))


# -- index vectors --------------------------------------------------------------------------


@mutant("expert 0 adds nothing when an expert has one row")
class LengthUsed(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            if len(t) > 1:
                out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@mutant("sym_size_int, a size known only at run time, is used in the expert")
class LengthInSum(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None] / max(len(t), 1))
        return out


@mutant("rows of two different selections are mixed")
class PairsInTwoOrders(Listed):
    """Tokens in the order of the tokens, weights with those of the first column first."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E)
        for e in range(E):
            _, t = torch.where(mask.permute(2, 1, 0)[e])
            other, k = torch.where(mask.permute(2, 0, 1)[e])
            out.index_add_(0, t, self.run(e, x[t]) * weights[other, k, None])
        return out


@mutant("rows are gathered along dimensions [1, 0] of the expert ids")
class WeightsBySlot(WeightsByPair):
    def pairs(self, mask: Tensor, weights: Tensor) -> Tensor:
        return weights.t()[mask.t()]


@mutant("rows of two different selections are mixed", distinct=False)
class WeightsByPairNotDistinct(WeightsByPair):
    pass


@mutant("aten.index_put_ at file.py overwrites what was added by other ids")
class MaskOfTwoSqueezed(OneByMask):
    """Not of one expert a token: the mask keeps both columns."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            mask = self.mask(ids[:, :1], e)
            out[mask] = self.run(e, x[mask])
        for e in range(E):
            mask = self.mask(ids[:, 1:], e)
            out[mask] = self.run(e, x[mask])
        return out


# -- a row for each pair --------------------------------------------------------------------


@mutant("slice along dimension 0 lets rows depend on each other")
class RepeatedTooOften(RepeatedThenMasked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, x = ids.view(-1), x.repeat_interleave(K + 1, dim=0)
        y = torch.zeros_like(x[: len(flat)])
        for e in range(E):
            y[flat == e] = self.run(e, x[: len(flat)][flat == e])
        return self.add(y, weights)


@mutant("mean reduces over all rows")
class RepeatedThenReadAgain(RepeatedThenMasked):
    """Later experts read what earlier ones wrote."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, y = ids.view(-1), x.repeat_interleave(K, dim=0)
        for e in range(E):
            y[flat == e] = self.run(e, y[flat == e].view(-1, D)) + y.mean()
        return self.add(y, weights)


@mutant("add broadcasts rows of rank 1 to rank 2: rows would meet rows")
class CopiedAlongFeatures(RepeatedThenMasked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, x = ids.flatten(), x.repeat_interleave(K, 0)
        y = torch.zeros(len(flat), len(flat))
        for e in range(E):
            at = (flat == e).nonzero().squeeze(-1)
            y.index_copy_(1, at, self.run(e, x[at]).sum(-1) + torch.zeros(len(flat), 1))
        return (y[:, :D].reshape(*weights.shape, D) * weights.unsqueeze(-1)).sum(1)
