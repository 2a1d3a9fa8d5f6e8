"""Mutants of tables of marks: more marks than slots, marks that say something else, places that count others."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_marks import Marked
from tests.detect.loops import E, mutant

BATCH = "aten.einsum at file.py multiplies the rows of all experts at once already"
LATE = "tokens whose place is behind the last slot are not shown to be dropped"
MANY = "tokens are dropped from place 4 on, there are 3 slots"


class Loose(Marked):
    """Places past the last slot are in no slot, and no error."""

    def slot(self, at: Tensor) -> Tensor:
        return at[:, None] == torch.arange(self.capacity)


@mutant(MANY, flat=True)
class OneTooMany(Loose):
    def kept(self, scores: Tensor) -> Tensor:
        return scores.sort(0, descending=True).indices[: self.capacity + 1]


@mutant(MANY, flat=True)
class OneTooManyByPlace(Loose):
    """As many marks as slots, of which the first stays empty."""

    def at(self, mask: Tensor) -> Tensor:
        return torch.sum(torch.cumsum(mask, dim=0) * mask, dim=1)


@mutant(BATCH, flat=True)
class MarksOfTokens(Loose):
    """Three experts are marked for each token."""

    def few(self, mask: Tensor, index: Tensor) -> Tensor:
        return torch.zeros_like(mask).scatter_(1, mask.topk(3, 1).indices, 1)


@mutant(LATE, flat=True)
class MarksForAll(Loose):
    """One row of marks is that of every token."""

    def few(self, mask: Tensor, index: Tensor) -> Tensor:
        return torch.zeros_like(mask[:1]).scatter_(0, index[:1] * 0, 1)


@mutant(BATCH, flat=True)
class MarksChanged(Loose):
    def few(self, mask: Tensor, index: Tensor) -> Tensor:
        few = torch.zeros_like(mask).scatter_(0, index, 1)
        few.fill_(1)
        return few


@mutant(BATCH, flat=True)
class MarksOnOnes(Loose):
    def few(self, mask: Tensor, index: Tensor) -> Tensor:
        table = torch.zeros_like(mask)
        table.add_(1)
        return table.scatter_(0, index, 1)


@mutant("zeros_like is read after it was changed in place through another name", flat=True)
class MarksOnOnesUnseen(Loose):
    """The same through another name."""

    def few(self, mask: Tensor, index: Tensor) -> Tensor:
        table = torch.zeros_like(mask)
        table.view(-1).add_(1)
        return table.scatter(0, index, 1)


@mutant(BATCH, flat=True)
class MarksTwice(Loose):
    def few(self, mask: Tensor, index: Tensor) -> Tensor:
        return torch.zeros_like(mask).scatter_(0, index, 1).scatter_(0, (index + 1) % mask.shape[0], 1)


@mutant(BATCH, flat=True)
class MarksOfTwo(Loose):
    def few(self, mask: Tensor, index: Tensor) -> Tensor:
        return torch.zeros_like(mask).scatter_(0, index, 2)


@mutant(BATCH, flat=True)
class MarksAddedUp(Loose):
    """A token that is marked twice counts twice."""

    def few(self, mask: Tensor, index: Tensor) -> Tensor:
        return torch.zeros_like(mask).scatter_(0, index // 2, 1, reduce="add")


@mutant(BATCH, flat=True)
class MarksOfOthers(Loose):
    """All but the marked ones."""

    def few(self, mask: Tensor, index: Tensor) -> Tensor:
        return 1 - torch.zeros_like(mask).scatter_(0, index, 1)


@mutant(LATE, flat=True)
class MarksAfterCounting(Loose):
    """Places count those who are dropped too, and so are past the last slot."""

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask = F.one_hot(ids, num_classes=E)
        places = torch.cumsum(mask, 0) - 1
        mask = mask * self.few(mask, self.kept(self.scores(weights.sum(1, keepdim=True), mask)))
        at = self.slot((places * mask).sum(1))
        return weights[:, 0, None, None] * mask[:, :, None] * at[:, None, :]
