"""Idioms that are rewritten: every expert on every token, weighed by a table that is mostly zero."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.loops import E, Listed, Stacked, idiom


def table(ids: Tensor, weights: Tensor) -> Tensor:
    """[T, E], zero but for the chosen experts."""
    return torch.zeros(ids.shape[0], E, dtype=weights.dtype).scatter(1, ids, weights)


@idiom()
class DenseLoop(Listed):
    """`table` and `add` are what a mutant changes."""

    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        return table(ids, weights)

    def add(self, out: Tensor, y: Tensor, table: Tensor, e: int) -> Tensor:
        return out + y * table[:, e, None]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        every = self.table(ids, weights)
        out = torch.zeros_like(x)
        for e in range(len(self.experts)):
            out = self.add(out, self.run(e, x), every, e)
        return out


@idiom()
class DenseInPlace(DenseLoop):
    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros(ids.shape[0], E, dtype=weights.dtype).scatter_(-1, ids, weights)

    def add(self, out: Tensor, y: Tensor, table: Tensor, e: int) -> Tensor:
        out += table[:, e].unsqueeze(-1) * y
        return out


@idiom()
class DenseOverSum(DenseLoop):
    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        mask = torch.zeros(ids.shape[0], E, dtype=weights.dtype).scatter(1, ids, 1.0)
        probs = F.softmax(weights.sum(-1, keepdim=True) * torch.arange(E), -1).to(weights.dtype)
        chosen = mask * probs
        return chosen / chosen.sum(-1, keepdim=True)

    def add(self, out: Tensor, y: Tensor, table: Tensor, e: int) -> Tensor:
        return out + table[:, e : e + 1] * y


@idiom()
class DenseOverLoad(DenseLoop):
    """Weights of an expert over how many chose it, which is not zero."""

    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        load = F.one_hot(ids, E).sum((0, 1)).float()
        return table(ids, weights) / load.clamp(min=1.0)


@idiom(any_ids=True)
class DenseByEquality(DenseLoop):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(len(self.experts)):
            mine = (weights * (ids == e)).sum(-1)
            out = out + self.run(e, x) * mine.unsqueeze(-1)
        return out


@idiom(any_ids=True)
class DenseByEqualityRepeated(DenseByEquality):
    """An expert that a token chose twice counts with both weights."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, ids[:, [0, 0]], weights)


@idiom()
class DenseOnTop(DenseLoop):
    """Added to a residual; experts over stacked weights with shared work before."""

    def __init__(self) -> None:
        super().__init__()
        self.stacked = Stacked()

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        every, h = self.table(ids, weights), F.layer_norm(x, (x.shape[-1],))
        out = x * 0.5
        for e in range(E):
            out = out + self.stacked.expert(e, h) * every[:, e, None]
        return out


@idiom()
class DenseUnbound(DenseLoop):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return sum(w.unsqueeze(1) * expert(x) for w, expert in zip(self.table(ids, weights).unbind(1), self.experts))  # type: ignore[return-value]  # noqa: B905


@idiom()
class StackedAndSummed(DenseLoop):
    def results(self, x: Tensor, dim: int) -> Tensor:
        return torch.stack([self.run(e, x) for e in range(len(self.experts))], dim=dim)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return (self.results(x, 1) * self.table(ids, weights).unsqueeze(-1)).sum(dim=1)


@idiom()
class StackedFirstAndSummed(StackedAndSummed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return (self.table(ids, weights).t().unsqueeze(-1) * self.results(x, 0)).sum(0)


@idiom()
class StackedByEinsum(StackedAndSummed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("te,ted->td", self.table(ids, weights), self.results(x, 1))


@idiom()
class StackedFirstByEinsum(StackedAndSummed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("ebh, be -> bh", self.results(x, 0), self.table(ids, weights))


@idiom()
class DenseHalvesOfWeights(DenseLoop):
    """In place inside an expert, on what is its own."""

    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x).mul_(0.5).relu_()


@idiom()
class DenseWideTable(DenseLoop):
    """Results in float32, weights, products and sums in float64."""

    def run(self, e: int, x: Tensor) -> Tensor:
        return super().run(e, x).float()

    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        return super().table(ids, weights).double()
