"""Idioms that are rewritten: every expert on every token by einsum or matmul, then a table of weights, or the chosen."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.idioms_dense import StackedAndSummed, table
from tests.detect.loops import FF, D, E, idiom, weight


@idiom()
class Crossed(nn.Module):
    """[T, E, ..] throughout.  The methods are what a variant or a mutant changes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = weight(E, FF, D), weight(E, D, FF)

    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        return table(ids, weights)

    def hidden(self, x: Tensor) -> Tensor:
        return F.silu(torch.einsum("td,efd->tef", x, self.up))

    def results(self, x: Tensor) -> Tensor:
        return torch.einsum("tef,edf->ted", self.hidden(x), self.down)

    def total(self, y: Tensor, every: Tensor) -> Tensor:
        return torch.einsum("ted,te->td", y, every)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.total(self.results(x), self.table(ids, weights))


@idiom()
class CrossedAndSummed(Crossed):
    """A gated expert with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.b1, self.b2 = weight(E, D, 2 * FF), weight(E, 2 * FF), weight(E, D)

    def hidden(self, x: Tensor) -> Tensor:
        gate, up = (torch.einsum("td,edf->tef", x, self.both) + self.b1).chunk(2, -1)
        return F.silu(gate) * up

    def results(self, x: Tensor) -> Tensor:
        return torch.einsum("ef n, tef -> ten", self.down.mT, self.hidden(x)) + self.b2[None]

    def total(self, y: Tensor, every: Tensor) -> Tensor:
        return (y * every.unsqueeze(-1)).sum(dim=-2)


@idiom()
class CrossedInside(Crossed):
    """The weights before the last product, which sums over the experts too."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("tef,edf->td", self.hidden(x) * self.table(ids, weights)[..., None], self.down)


@idiom()
class CrossedOfThree(Crossed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("te,tef,edf->td", self.table(ids, weights), self.hidden(x), self.down)


@idiom()
class CrossedOneHot(Crossed):
    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        return (F.one_hot(ids, E) * weights[..., None]).sum(1)


@idiom()
class CrossedOneHotByEinsum(Crossed):
    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("tk,tke->te", weights, F.one_hot(ids, E).to(weights.dtype))


@idiom(flat=True, distinct=False)
class CrossedTopOne(Crossed):
    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        return F.one_hot(ids, E) * weights[:, :1]


@idiom()
class CrossedByProduct(Crossed):
    def total(self, y: Tensor, every: Tensor) -> Tensor:
        return torch.bmm(every[:, None], y).squeeze(1)


@idiom()
class ExpertsFirst(Crossed):
    """[E, T, ..] by matmul."""

    def hidden(self, x: Tensor) -> Tensor:
        return F.silu(torch.matmul(x, self.up.transpose(1, 2)))

    def results(self, x: Tensor) -> Tensor:
        return torch.matmul(self.hidden(x), self.down.mT)

    def total(self, y: Tensor, every: Tensor) -> Tensor:
        return (y * every.t()[..., None]).sum(0)


@idiom()
class ExpertsFirstTurned(ExpertsFirst):
    def total(self, y: Tensor, every: Tensor) -> Tensor:
        return (y.permute(1, 0, 2) * every[..., None]).sum(1)


@idiom()
class ExpertsFirstByEinsum(ExpertsFirst):
    def results(self, x: Tensor) -> Tensor:
        return torch.einsum("etf,edf->ted", torch.einsum("td,efd->etf", x, self.up).relu(), self.down)

    def total(self, y: Tensor, every: Tensor) -> Tensor:
        return torch.einsum("et,etd->td", every.t(), y.transpose(0, 1))


@idiom(distinct=False)
class CrossedAndGathered(Crossed):
    def chosen(self, y: Tensor, ids: Tensor) -> Tensor:
        return y.gather(1, ids.unsqueeze(-1).expand(-1, -1, D))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return (self.chosen(self.results(x), ids) * weights[..., None]).sum(1)


@idiom(distinct=False)
class CrossedAndPicked(CrossedAndGathered):
    def chosen(self, y: Tensor, ids: Tensor) -> Tensor:
        return y[torch.arange(y.shape[0])[:, None], ids]


@idiom(distinct=False)
class ExpertsFirstAndPicked(ExpertsFirst, CrossedAndGathered):
    def chosen(self, y: Tensor, ids: Tensor) -> Tensor:
        return y[ids, torch.arange(y.shape[1])[:, None]]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("tkd,tk->td", self.chosen(self.results(x), ids), weights)


@idiom()
class CrossedBesideHeads(Crossed):
    """The same einsums with other weights, of which all count, as heads have them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = weight(3, FF, D), weight(3, D, FF)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        heads = torch.einsum("td,efd->tef", x, self.q)
        return super().forward(x + torch.einsum("tef,edf->td", heads, self.o), ids, weights)


@idiom()
class StackedByProduct(StackedAndSummed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.bmm(self.table(ids, weights).unsqueeze(1), self.results(x, 1))[:, 0]
