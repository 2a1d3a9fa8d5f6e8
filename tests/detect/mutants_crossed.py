"""Mutants of experts that compute all tokens by einsum: other sums, other tables, rows and experts that mix."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.idioms_crossed import Crossed, CrossedAndGathered, ExpertsFirst
from tests.detect.loops import FF, D, E, T, mutant, weight

NOTHING = "nothing is summed over experts"
NOT_ZERO = "{} at file.py sums experts that are not shown to make zero of the tokens of others"


@mutant(NOTHING)
class AllCount(Crossed):
    """A table without zeros."""

    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        return F.softmax(weights.sum(-1, keepdim=True) * torch.arange(E), -1)


@mutant(NOTHING)
class TableOfOnes(Crossed):
    """What is nobody's counts once."""

    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.ones(ids.shape[0], E).scatter(1, ids, weights)


@mutant(NOT_ZERO.format("aten.sum.dim_IntList"))
class BiasAfterTheWeights(Crossed):
    """Each expert's bias reaches every token."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = weight(E, D)

    def total(self, y: Tensor, every: Tensor) -> Tensor:
        return (y * every[..., None] + self.bias).sum(1)


@mutant(NOT_ZERO.format("aten.einsum"))
class BiasInside(Crossed):
    """The same before the last product."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = weight(E, FF)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        h = self.hidden(x) * self.table(ids, weights)[..., None] + self.bias
        return torch.einsum("tef,edf->td", h, self.down)


@mutant(NOTHING)
class OverTokens(Crossed):
    """As many tokens as experts: the table is turned."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x, ids, weights = x[:E], ids[:E], weights[:E]
        return torch.einsum("ted,et->td", self.results(x), self.table(ids, weights))


@mutant(NOTHING)
class EinsumOverTokens(Crossed):
    def total(self, y: Tensor, every: Tensor) -> Tensor:
        return torch.einsum("ted,te->ed", y, every)


@mutant(NOTHING)
class SumOfTokens(Crossed):
    """As many tokens as experts, and the sum is over the tokens."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x, ids, weights = x[:E], ids[:E], weights[:E]
        return (self.results(x) * self.table(ids, weights)[..., None]).sum(0)


@mutant(NOTHING, tokens=E)
class MatrixOfTheToken(Crossed):
    """As many tokens as experts: the second matrix is that of the token's number."""

    def results(self, x: Tensor) -> Tensor:
        return torch.einsum("tef,tdf->ted", self.hidden(x), self.down)


@mutant(NOTHING)
class Softmax(Crossed):
    """Experts compare what they made."""

    def hidden(self, x: Tensor) -> Tensor:
        return torch.einsum("td,efd->tef", x, self.up).softmax(1)


@mutant(NOTHING)
class MeanOfTokens(Crossed):
    def hidden(self, x: Tensor) -> Tensor:
        h = torch.einsum("td,efd->tef", x, self.up)
        return h - h.mean(0, keepdim=True)


@mutant(NOTHING)
class AddedTokenByToken(Crossed):
    """What is added differs from token to token, and is no expert's."""

    def hidden(self, x: Tensor) -> Tensor:
        return torch.einsum("td,efd->tef", x, self.up) + x.sum(-1)[:, None, None]


@mutant(NOTHING)
class Reshaped(ExpertsFirst):
    """[E, T, D] is read as [T, E, D]."""

    def total(self, y: Tensor, every: Tensor) -> Tensor:
        return torch.einsum("ted,te->td", y.reshape(y.shape[1], E, D), every)


@mutant(NOTHING)
class Rolled(Crossed):
    def total(self, y: Tensor, every: Tensor) -> Tensor:
        return torch.einsum("ted,te->td", y.roll(1, 1), every)


@mutant(NOTHING)
class TableChanged(Crossed):
    """Between its making and its use."""

    def total(self, y: Tensor, every: Tensor) -> Tensor:
        every.add_(1)
        return torch.einsum("ted,te->td", y, every)


@mutant("up is changed in place while the experts run", forward_only=True)
class WeightsChanged(Crossed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = self.results(x)
        with torch.no_grad():
            self.up.mul_(1.5)
        return self.total(y, self.table(ids, weights))


TWICE = "a token that chose an expert twice has one entry in the table of weights: "


@mutant(TWICE + "the ids (ids) are not shown to be distinct, as those of topk are", distinct=False, repeats=True)
class TableSetTwice(Crossed):
    pass


@mutant(NOTHING)
class GatheredByOthers(CrossedAndGathered):
    """Of the token before."""

    def chosen(self, y: Tensor, ids: Tensor) -> Tensor:
        return y[(torch.arange(y.shape[0])[:, None] - 1) % T, ids]


@mutant(NOTHING)
class GatheredInParts(CrossedAndGathered):
    """A part of the features."""

    def chosen(self, y: Tensor, ids: Tensor) -> Tensor:
        return F.pad(y.gather(1, ids.unsqueeze(-1).expand(-1, -1, D - 1)), (0, 1))


@mutant(NOTHING)
class GatheredFeatureByFeature(CrossedAndGathered):
    """Another expert for each feature."""

    def chosen(self, y: Tensor, ids: Tensor) -> Tensor:
        return y.gather(1, (ids.unsqueeze(-1) + torch.arange(D)) % E)


@mutant(NOTHING)
class UnderNoGrad(Crossed):
    def results(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().results(x)


@mutant(NOTHING)
class TableKept(Crossed):
    """A row of the table that no token's ids fill: a second choice was dropped."""

    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        mask = F.one_hot(ids, E) * (weights > weights.mean())[..., None]
        return (mask * weights[..., None]).sum(1)


@mutant(NOTHING)
class TableByEquality(Crossed):
    """An id out of range is nobody's, where that of a one-hot is an error."""

    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        return ((ids[..., None] == torch.arange(E)) * weights[..., None]).sum(1)


@mutant(NOTHING)
class TableOfOneMore(Crossed):
    """The same of a class that is cut off."""

    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        return (F.one_hot(ids, E + 1)[..., :E] * weights[..., None]).sum(1)


@mutant(NOT_ZERO.format("aten.einsum"))
class Heads(nn.Module):
    """No experts: all that is computed counts."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = weight(E, FF, D), weight(E, D, FF)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("tef,edf->td", torch.einsum("td,efd->tef", x, self.q), self.o) * weights[:, :1]
