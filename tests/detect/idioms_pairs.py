"""Idioms that are rewritten: the token of each pair by an index that is counted, weights on [T, K], results gathered."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.idioms_dense import StackedAndSummed
from tests.detect.loops import FF, D, E, idiom, weight


@idiom()
class PairsByCount(nn.Module):
    """Weights gathered by row.  `rows`, `order` and `add` are what a mutant changes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = weight(E, D, FF), weight(E, FF, D)

    def rows(self, x: Tensor, top_k: int) -> Tensor:
        return x[torch.arange(x.shape[0]).repeat_interleave(top_k)]

    def add(self, y: Tensor, weights: Tensor) -> Tensor:
        return (y * weights.reshape(-1)[:, None]).view(-1, weights.shape[1], D).sum(1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        h = torch.bmm(self.rows(x, ids.shape[1]).unsqueeze(1), self.up[flat])
        return self.add(torch.bmm(F.silu(h), self.down[flat]).squeeze(1), weights)


@idiom()
class PairsByDivision(PairsByCount):
    def rows(self, x: Tensor, top_k: int) -> Tensor:
        return x[torch.arange(x.shape[0] * top_k) // top_k]


@idiom()
class PairsByGrid(PairsByCount):
    def rows(self, x: Tensor, top_k: int) -> Tensor:
        return x[torch.arange(x.shape[0])[:, None].expand(-1, top_k).reshape(-1)]


@idiom()
class PairsExpanded(PairsByCount):
    def rows(self, x: Tensor, top_k: int) -> Tensor:
        return x.unsqueeze(1).expand(-1, top_k, -1).reshape(-1, D)


@idiom()
class PairsRepeated(PairsByCount):
    def rows(self, x: Tensor, top_k: int) -> Tensor:
        return x[:, None].repeat(1, top_k, 1).view(-1, D)


@idiom()
class GridWeighed(PairsByCount):
    def add(self, y: Tensor, weights: Tensor) -> Tensor:
        return (y.view(*weights.shape, D) * weights[..., None]).sum(1)


@idiom()
class GridByEinsum(PairsByCount):
    def add(self, y: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("tk,tkd->td", weights, y.view(*weights.shape, D))


@idiom()
class ResultsGathered(StackedAndSummed):
    """Every expert on every token, then those that were chosen; twice the same is right too."""

    def pick(self, every: Tensor, ids: Tensor) -> Tensor:
        return every.gather(1, ids.unsqueeze(-1).expand(-1, -1, D))

    def add(self, chosen: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        return (chosen * weights.unsqueeze(-1)).sum(1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.add(self.pick(self.results(x, 1), ids), weights)


@idiom(distinct=False)
class ResultsGatheredByEinsum(ResultsGathered):
    def add(self, chosen: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        return torch.einsum("bkh,bk->bh", chosen, weights)


@idiom(distinct=False)
class ResultsGatheredTwice(ResultsGathered):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, ids[:, [0, 0]], weights)


@idiom()
class PairsAddedByCount(PairsByCount):
    """Added at counted tokens, into a residual; rows and biases as matrices of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.b1, self.b2 = weight(E, FF), weight(E, D)

    def tokens(self, x: Tensor, top_k: int) -> Tensor:
        return torch.arange(x.shape[0] * top_k) // top_k

    def wide(self, x: Tensor, top_k: int) -> Tensor:
        return x.unsqueeze(1).expand(-1, top_k, -1).reshape(-1, 1, D)

    def bias(self, flat: Tensor) -> Tensor:
        return self.b1[flat].unsqueeze(1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        h = torch.bmm(self.wide(x, ids.shape[1]), self.up[flat]) + self.bias(flat)
        y = torch.bmm(F.silu(h), self.down[flat]).squeeze(1) + self.b2[flat]
        return (x * 0.5).index_add(0, self.tokens(x, ids.shape[1]), y * weights.reshape(-1, 1))
