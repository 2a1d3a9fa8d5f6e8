"""Mutants of tokens by pair, of weights on [T, K] and of gathered results."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_pairs import PairsAddedByCount, PairsByCount, ResultsGathered
from tests.detect.loops import D, E, mutant

NOTHING = "nothing is summed over experts"
NO_ROWS = "bmm of rows with a value that has none"


@mutant(NO_ROWS)
class PairsInTurn(PairsByCount):
    """Token t of every k, then of the next."""

    def rows(self, x: Tensor, top_k: int) -> Tensor:
        return x[torch.arange(x.shape[0]).repeat(top_k)]


@mutant(NO_ROWS)
class PairsByRemainder(PairsByCount):
    def rows(self, x: Tensor, top_k: int) -> Tensor:
        return x[torch.arange(x.shape[0] * top_k) % x.shape[0]]


@mutant(NO_ROWS)
class PairsFromOne(PairsByCount):
    def rows(self, x: Tensor, top_k: int) -> Tensor:
        return x[torch.arange(1, x.shape[0] * top_k + 1) // (top_k + 1)]


@mutant(NO_ROWS)
class PairsByThree(PairsByCount):
    def rows(self, x: Tensor, top_k: int) -> Tensor:
        return x[torch.arange(x.shape[0] * top_k) // 3]


@mutant(NO_ROWS)
class PairsBackwards(PairsByCount):
    def rows(self, x: Tensor, top_k: int) -> Tensor:
        return x[torch.arange(x.shape[0] - 1, -1, -1).repeat_interleave(top_k)]


@mutant(NO_ROWS)
class PairsTransposed(PairsByCount):
    def rows(self, x: Tensor, top_k: int) -> Tensor:
        return x[None].expand(top_k, -1, -1).reshape(-1, D)


@mutant(NO_ROWS)
class PairsOfGridTransposed(PairsByCount):
    def rows(self, x: Tensor, top_k: int) -> Tensor:
        return x[torch.arange(x.shape[0])[:, None].expand(-1, top_k).t().reshape(-1)]


@mutant("slice along dimension 0 lets rows depend on each other", forward_only=True)
class PairsChanged(PairsByCount):
    def rows(self, x: Tensor, top_k: int) -> Tensor:
        rows = super().rows(x, top_k)
        rows[:1].mul_(2)
        return rows


@mutant(NO_ROWS)
class PairsOfTwo(PairsByCount):
    """Two rows in one product."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        both = torch.stack([self.rows(x, ids.shape[1]), self.rows(x, ids.shape[1]) * 2], 1)
        h = torch.bmm(both, self.up[flat])
        return self.add(torch.bmm(F.silu(h), self.down[flat])[:, 0], weights)


@mutant("aten.einsum at file.py is not known to be row-wise (it reads pairgrid)")
class GridOverTokens(PairsByCount):
    def add(self, y: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("tk,tkd->kd", weights, y.view(*weights.shape, D))


@mutant("aten.mul.Tensor at file.py is not known to be row-wise (it reads pairgrid)")
class GridOfFeatures(PairsByCount):
    def add(self, y: Tensor, weights: Tensor) -> Tensor:
        return (y.view(*weights.shape, D) * weights[:, :1, None]).sum(1)


@mutant(NOTHING)
class GatheredOverTokens(ResultsGathered):
    def pick(self, every: Tensor, ids: Tensor) -> Tensor:
        return every.transpose(0, 1).gather(0, ids.t().unsqueeze(-1).expand(-1, -1, D)).transpose(0, 1)


@mutant(NOTHING)
class GatheredByFeature(ResultsGathered):
    """Another expert for each feature."""

    def pick(self, every: Tensor, ids: Tensor) -> Tensor:
        return every.gather(1, (ids.unsqueeze(-1) + torch.arange(D)) % E)


@mutant(NOTHING)
class GatheredUnweighed(ResultsGathered):
    def add(self, chosen: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        return chosen.sum(1)


@mutant(NOTHING)
class GatheredHalf(ResultsGathered):
    """Half of the features only."""

    def pick(self, every: Tensor, ids: Tensor) -> Tensor:
        return F.pad(every.gather(1, ids.unsqueeze(-1).expand(-1, -1, D // 2)), (0, D - D // 2))


@mutant(NOTHING, tokens=E)
class GatheredFirstDimension(ResultsGathered):
    """Tokens in the place of experts, where there are as many."""

    def pick(self, every: Tensor, ids: Tensor) -> Tensor:
        return every.gather(0, ids.unsqueeze(-1).expand(-1, -1, D))


@mutant("mean along dimension 0 lets rows depend on each other")
class GatheredMeans(ResultsGathered):
    def run(self, e: int, x: Tensor) -> Tensor:
        y = super().run(e, x)
        return y - y.mean(0)


@mutant("expert 1 differs from expert 0: 2 where that has 1")
class GatheredScaled(ResultsGathered):
    def run(self, e: int, x: Tensor) -> Tensor:
        return super().run(e, x) * (2 if e == 1 else 1)


@mutant("aten.index_add at file.py is not known to be row-wise (it reads rows)")
class AddedInTurn(PairsAddedByCount):
    def tokens(self, x: Tensor, top_k: int) -> Tensor:
        return torch.arange(x.shape[0]).repeat(top_k)


@mutant("aten.index_add at file.py is not known to be row-wise (it reads rows)", top_k=3)
class AddedByTwo(PairsAddedByCount):
    """Three experts a token, two rows each."""

    def tokens(self, x: Tensor, top_k: int) -> Tensor:
        return torch.arange(x.shape[0] * top_k) // 2 % x.shape[0]


@mutant("aten.index_add at file.py is not known to be row-wise (it reads rows)", top_k=3)
class AddedByFour(PairsAddedByCount):
    def tokens(self, x: Tensor, top_k: int) -> Tensor:
        return torch.arange(x.shape[0] * top_k) // 4


@mutant("bmm of rows with a value that has none")
class WideInTurn(PairsAddedByCount):
    def wide(self, x: Tensor, top_k: int) -> Tensor:
        return x.unsqueeze(0).expand(top_k, -1, -1).reshape(-1, 1, D)


@mutant("bmm of rows with a value that has none")
class WideAsColumns(PairsAddedByCount):
    """Rows of one number."""

    def wide(self, x: Tensor, top_k: int) -> Tensor:
        return x.unsqueeze(1).expand(-1, top_k, -1).reshape(-1, D, 1).transpose(0, 2).reshape(-1, 1, D)


@mutant("unsqueeze along dimension 0 lets rows depend on each other", forward_only=True)
class BiasAcrossRows(PairsAddedByCount):
    """[1, R, F]: rows would meet rows."""

    def bias(self, flat: Tensor) -> Tensor:
        return self.b1[flat].unsqueeze(0)[:, :1]
