"""Idioms that are rewritten: experts with a capacity, whose late tokens are dropped, and experts that nothing weighs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.loops import D, E, Listed, Stacked, idiom

CAPACITY = 3  # of T * K / E = 5.5 pairs


@idiom(distinct=False)
class DroppedPairs(Listed):
    """`kept` is what a mutant changes: a table [T, K, E] of zeros and ones."""

    def kept(self, mask: Tensor) -> Tensor:
        return mask * (mask.cumsum(0) <= CAPACITY)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask, out = self.kept(F.one_hot(ids, E)).permute(2, 1, 0), torch.zeros_like(x)
        for e in range(len(self.experts)):
            k, t = torch.where(mask[e])
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@idiom(distinct=False)
class DroppedInPlace(DroppedPairs):
    def kept(self, mask: Tensor) -> Tensor:
        mask *= torch.lt(mask.cumsum(0) - 1, CAPACITY)
        return mask


@idiom(distinct=False)
class DroppedByAnd(DroppedPairs):
    def kept(self, mask: Tensor) -> Tensor:
        return (mask.cumsum(0) <= CAPACITY) & mask.bool()


@idiom(distinct=False)
class DroppedByLogicalAnd(DroppedPairs):
    def kept(self, mask: Tensor) -> Tensor:
        return torch.logical_and(mask, mask.cumsum(0) <= CAPACITY)


@idiom(distinct=False)
class DroppedByNumbers(DroppedPairs):
    """Tables and truths as float."""

    def kept(self, mask: Tensor) -> Tensor:
        return mask.float() * (mask.cumsum(0) <= CAPACITY).to(torch.float32)


@idiom(distinct=False)
class DroppedTwice(DroppedPairs):
    """And tokens that are no tokens, as in padding."""

    def kept(self, mask: Tensor) -> Tensor:
        real = torch.arange(mask.shape[0])[:, None, None] % 3 != 1
        mask = mask * real
        return mask * (mask.cumsum(0) <= CAPACITY)


@idiom(distinct=False, empty=False)
class FirstChoicesFirst(DroppedPairs):
    """All first choices have a place before any second choice."""

    def kept(self, mask: Tensor) -> Tensor:
        by_choice = mask.transpose(0, 1).reshape(-1, E).cumsum(0).view(-1, mask.shape[0], E).transpose(0, 1)
        return mask * (by_choice <= CAPACITY)


@idiom(distinct=False)
class DroppedAmongChosen(Stacked):
    """As Hugging Face loops over those who were chosen."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mask = torch.zeros_like(x), F.one_hot(ids, E)
        mask = (mask * (mask.cumsum(0) <= CAPACITY)).permute(2, 1, 0)
        for e in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            k, t = torch.where(mask[e].squeeze(0))
            out.index_add_(0, t, self.expert(e[0], x[t]) * weights[t, k, None])
        return out


@idiom()
class DroppedByToken(Listed):
    """One table [T, E] for all choices of a token."""

    def kept(self, mask: Tensor) -> Tensor:
        return mask * (mask.cumsum(0) <= CAPACITY)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        table, out = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, ids, weights), torch.zeros_like(x)
        mask = self.kept(F.one_hot(ids, E).sum(1)).bool().t()
        for e in range(E):
            t = torch.where(mask[e])[0]
            out.index_add_(0, t, self.run(e, x[t]) * table[t, e, None])
        return out


@idiom(distinct=False, flat=True)
class DroppedOfOne(Listed):
    """One expert a token, as in Switch Transformers; what was dropped stays as it was."""

    def kept(self, mask: Tensor) -> Tensor:
        return mask * (mask.cumsum(0) <= CAPACITY)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask, out = self.kept(F.one_hot(ids, E)).bool(), torch.zeros_like(x)
        for e in range(E):
            t = mask.select(1, e).nonzero().squeeze(-1)
            out[t] = self.run(e, x[t])
        return x + out * weights[:, :1]


# -- every expert on every token, and a mask ------------------------------------------------


@idiom(any_ids=True, flat=True, distinct=False)
class Unweighed(Listed):
    """`mask` and `run` are what a mutant changes."""

    def mask(self, ids: Tensor, e: int) -> Tensor:
        return (ids == e)[:, None]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(len(self.experts)):
            out = out + self.run(e, x) * self.mask(ids, e)
        return out * weights[:, :1]


@idiom(any_ids=True, flat=True, distinct=False)
class UnweighedColumn(Unweighed):
    def mask(self, ids: Tensor, e: int) -> Tensor:
        return ids.view(-1, 1) == e


@idiom(any_ids=True, flat=True, distinct=False)
class UnweighedNumbers(Unweighed):
    def mask(self, ids: Tensor, e: int) -> Tensor:
        return (ids == e).view(-1, 1).double()


@idiom(any_ids=True)
class UnweighedOfTwo(Unweighed):
    def mask(self, ids: Tensor, e: int) -> Tensor:
        return (ids == e).any(-1).unsqueeze(-1)


@idiom(any_ids=True, distinct=False)
class UnweighedTimes(Unweighed):
    """An expert that was chosen twice adds twice."""

    def mask(self, ids: Tensor, e: int) -> Tensor:
        return (ids == e).sum(1).unsqueeze(-1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, ids[:, [0, 0]], weights)


@idiom(any_ids=True, flat=True, distinct=False)
class UnweighedMatrices(Unweighed):
    """A token is a matrix [2, D], as an image of patches is one; the ids are [T, 1, 1]."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        patches, column = torch.cat([x, x * 2 - 1], -1).view(-1, 2, D), ids.view(-1, 1, 1)
        out = torch.zeros_like(patches)
        for e in range(len(self.experts)):
            out = out + self.run(e, patches) * (column == e)
        return out.sum(1)
