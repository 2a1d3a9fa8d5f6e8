"""Mutants of the dense forms: tables that are not zero elsewhere, experts that mix tokens, sums of something else."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_dense import DenseByEquality, DenseLoop, StackedAndSummed, table
from tests.detect.loops import E, mutant

NOTHING = "nothing is summed over experts"


@mutant(NOTHING)
class DenseSoftmax(DenseLoop):
    """No zeros at all."""

    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        return F.softmax(table(ids, weights), -1)


@mutant(NOTHING)
class DenseFromOnes(DenseLoop):
    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.ones(ids.shape[0], E).scatter(1, ids, weights)


@mutant(NOTHING)
class DensePlusLittle(DenseLoop):
    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        return table(ids, weights) + 1e-3


@mutant(NOTHING)
class DenseOverTable(DenseLoop):
    """Infinite where the table is zero."""

    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        return 1 / (1 + table(ids, weights))


@mutant(NOTHING)
class DenseOverExperts(DenseLoop):
    """A number of each expert: if one were zero, 0 / 0 would not be, for all tokens."""

    def table(self, ids: Tensor, weights: Tensor) -> Tensor:
        return table(ids, weights) / (torch.arange(E) - 0.5)


@mutant(
    "a token that chose an expert twice has one entry in the table of weights: the ids (ids) are not shown to be distinct, as those of topk are",
    distinct=False,
    repeats=True,
)
class DenseRepeated(DenseLoop):
    pass


@mutant("mean along dimension 0 lets rows depend on each other")
class DenseMeanOverTokens(DenseLoop):
    def run(self, e: int, x: Tensor) -> Tensor:
        y = self.experts[e](x)
        return y - y.mean(0)


@mutant("flip along dimension 0 lets rows depend on each other")
class DenseFlipped(DenseLoop):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x.flip(0))


@mutant("expert 2 differs from expert 0: aten.relu where that has aten.linear")
class DenseOtherActivation(DenseLoop):
    def run(self, e: int, x: Tensor) -> Tensor:
        y = self.experts[e](x)
        return y.relu() if e == 2 else y


@mutant("linear_1 is not one value a token")
class DenseCarried(DenseLoop):
    """Each expert reads what the one before it made."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        every, out, h = self.table(ids, weights), torch.zeros_like(x), x
        for e in range(E):
            h = self.run(e, h)
            out = out + h * every[:, e, None]
        return out


@mutant("the loop visits experts [0, 1, 2, 2], not each of 0..3 once")
class DenseColumnTwice(DenseLoop):
    def add(self, out: Tensor, y: Tensor, table: Tensor, e: int) -> Tensor:
        return out + y * table[:, min(e, 2), None]


@mutant(NOTHING)
class DenseProduct(DenseLoop):
    def add(self, out: Tensor, y: Tensor, table: Tensor, e: int) -> Tensor:
        return out * (1 + y * table[:, e, None])


@mutant(NOTHING)
class DenseMaximum(DenseLoop):
    def add(self, out: Tensor, y: Tensor, table: Tensor, e: int) -> Tensor:
        return torch.maximum(out, y * table[:, e, None])


@mutant(NOTHING)
class DenseWeightsBefore(DenseLoop):
    """An expert of zeros is not zero."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        every, out = self.table(ids, weights), torch.zeros_like(x)
        for e in range(E):
            out = out + self.run(e, x * every[:, e, None])
        return out


@mutant(NOTHING)
class DenseAlongFeatures(DenseLoop):
    """With as many features as experts the table could be read along them."""

    def add(self, out: Tensor, y: Tensor, table: Tensor, e: int) -> Tensor:
        return out + y * table[e, :1]


@mutant("dropout with p = 0.5 draws random numbers expert by expert")
class DenseDropout(DenseLoop):
    def run(self, e: int, x: Tensor) -> Tensor:
        return F.dropout(self.experts[e](x), 0.5)


@mutant("aten.mul_.Tensor at file.py changes a value outside of the expert", forward_only=True)
class DenseChangesInput(DenseLoop):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x.detach().mul_(1.5) if e == E - 1 else x)


@mutant(NOTHING)
class StackedAndMeaned(StackedAndSummed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return (self.results(x, 1) * self.table(ids, weights).unsqueeze(-1)).mean(1)


@mutant(NOTHING)
class StackedSummedOverTokens(StackedAndSummed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return (self.results(x, 1) * self.table(ids, weights).unsqueeze(-1)).sum(0)[: x.shape[0]]


@mutant(NOTHING)
class StackedByOtherEinsum(StackedAndSummed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("te,ted->d", self.table(ids, weights), self.results(x, 1)).expand(x.shape[0], -1)


@mutant("the experts of a dense sum are weighed by different ids")
class DenseTwoTables(DenseLoop):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tables, out = (self.table(ids, weights), self.table((ids + 1) % E, weights)), torch.zeros_like(x)
        for e in range(E):
            out = out + self.run(e, x) * tables[e % 2][:, e, None]
        return out


@mutant("the grad mode changes among the experts of a dense sum")
class DenseNoGrad(DenseByEquality):
    def run(self, e: int, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.experts[e](x)


@mutant("a dense sum is near an autocast region")
class DenseUnderAutocast(DenseLoop):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x, ids, weights)


@mutant("mul is changed in place while results are added to it")
class DenseStartChanges(DenseLoop):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        every, start = self.table(ids, weights), x * 1.0
        out = start
        for e in range(E):
            out = self.add(out, self.run(e, x), every, e)
            if e == 1:
                start.mul_(2)
        return out
