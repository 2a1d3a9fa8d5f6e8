"""Idioms that are rewritten: GShard's tables where each expert marks the tokens that it keeps, some of those it got."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_gshard import GShard, GShardOfTwo, GShardWithoutBias
from tests.detect.loops import E, idiom


class Marked(GShardWithoutBias):
    """As DeepSpeed writes a first choice; the methods are what a variant or a mutant changes."""

    def scores(self, gates: Tensor, mask: Tensor) -> Tensor:
        return mask * gates.detach()

    def few(self, mask: Tensor, index: Tensor) -> Tensor:
        return torch.zeros_like(mask).scatter_(0, index, 1)

    def at(self, mask: Tensor) -> Tensor:
        return torch.sum((torch.cumsum(mask, dim=0) - 1) * mask, dim=1)

    def kept(self, scores: Tensor) -> Tensor:
        return scores.sort(0, descending=True).indices[: self.capacity]

    def slot(self, at: Tensor) -> Tensor:
        return F.one_hot(at, self.capacity)

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates = F.softmax(torch.cat([x[:, :2], weights], 1), 1)
        mask = F.one_hot(ids, num_classes=E)
        mask = mask * self.few(mask, self.kept(self.scores(gates, mask)))
        gates = gates * mask.to(gates.dtype)
        return torch.einsum("se,sc->sec", gates, self.slot(self.at(mask)).to(gates.dtype))


@idiom(flat=True, distinct=False)
class MarkedByGates(Marked):
    """Those with the highest gates are kept."""


@idiom(flat=True, distinct=False)
class MarkedBySort(Marked):
    """The first of a sorting, in a table of another dtype, which is not changed in place."""

    def few(self, mask: Tensor, index: Tensor) -> Tensor:
        return torch.zeros(mask.shape).scatter(-2, index.flip(0), 1.0).bool()


@idiom(flat=True, distinct=False)
class MarkedFewer(Marked):
    """More slots than are needed, and places from one on."""

    def kept(self, scores: Tensor) -> Tensor:
        return scores.argsort(0)[-2:]

    def at(self, mask: Tensor) -> Tensor:
        return torch.sum(torch.cumsum(mask, dim=0) * mask, dim=1)


@idiom(flat=True, distinct=False)
class MarkedLoosely(GShard):
    """An index of any rows, the same one more than once too, of tables that are compared with."""

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask = F.one_hot(ids, E).float()
        order = mask.argsort(0, descending=True)
        index = torch.cat([order[:1], order[:1], order[-1:]])
        mask = torch.zeros_like(mask).scatter(0, index, 1) * mask
        at = ((torch.cumsum(mask, 0) - 1) * mask).sum(1)
        slot = at[:, None] == torch.arange(self.capacity)
        return (weights[:, 0, None] * mask)[:, :, None] * slot[:, None, :]


@idiom(distinct=False)
class MarkedBeforeAnother(GShardOfTwo):
    """A second choice has the places behind those that the first choice's marks left."""

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates = F.softmax(torch.cat([x[:, :2], weights], 1), 1)
        mask1, mask2 = F.one_hot(ids[:, 0], E), F.one_hot(ids[:, 1], E)
        index = (mask1 * gates.detach()).argsort(0, descending=True)[:2]
        mask1 = mask1 * torch.zeros_like(mask1).scatter_(0, index, 1)
        first, second = self.places(mask1, mask2)
        mask2 = mask2 * (second < self.capacity)
        one, two = weights[:, 0] * 0.5, weights[:, 1]
        return self.one(one, mask1, first) + self.one(two, mask2, second)
