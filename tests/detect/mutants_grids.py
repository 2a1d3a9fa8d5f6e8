"""Mutants of tokens in two dimensions."""

from typing import Any

import torch
from torch import Tensor

from tests.detect.idioms_grids import Grid
from tests.detect.loops import E, K, mutant

NOT_IDS = "rows are selected by {}, which is not shown to say which ids are those of an expert"
TWICE = (
    "a token that chose an expert twice counts once: "
    "the ids (reshape_default_3) are not shown to be distinct, as those of topk are"
)


@mutant(
    "expert 1 differs from expert 0: it reads token reshape_default_11, that one token reshape_default_10", tokens=K
)
class GridSumsTokens(Grid):
    """Weights are summed over the tokens of a batch, of which there are as many as experts of a token."""

    def weigh(self, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        return (weights * (ids == e)).sum(1)


@mutant("a mask over dimensions ('S', 'B') of the ids selects rows", tokens=2)
class GridTurned(Grid):
    """As many batches as tokens."""

    def chosen(self, ids: Tensor, e: int) -> Tensor:
        return (ids == e).any(-1).t()


@mutant("a mask over dimensions ('B', 1) of the ids selects rows", tokens=K)
class GridOfOtherPairs(Grid):
    def chosen(self, ids: Tensor, e: int) -> Tensor:
        return (ids == e).any(1)


@mutant(NOT_IDS.format("reshape_1"), tokens=2)
class GridTurnedFlat(Grid):
    def sum_of(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = torch.zeros_like(flat)
        for e in range(E):
            t = (ids == e).any(-1).t().reshape(-1).nonzero().squeeze(-1)
            out.index_add_(0, t, self.run(e, flat[t]))
        return out.view_as(x)


@mutant(TWICE)
class GridTwice(Grid):
    def choose(self, scores: Tensor) -> Any:
        top, ids = scores.topk(K, dim=-1)
        return top, ids[..., :1].expand_as(ids).contiguous()


@mutant(TWICE, tokens=2)
class GridTopAlongTokens(Grid):
    """Distinct among tokens, not among those of a token."""

    def choose(self, scores: Tensor) -> Any:
        return scores[..., :K].topk(K, dim=1)


@mutant("reshape_default_4 is changed in place while the experts run", forward_only=True)
class GridChanges(Grid):
    def sum_of(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x = x.clone()
        out = super().sum_of(x, ids, weights)
        x.mul_(2)
        return out + x


@mutant("aten.index_add_ at file.py does not add rows to tokens along dimension 0 with factor 1")
class GridFirstOnly(Grid):
    """A row of one token, added to all tokens of its batch."""

    def sum_of(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            b, s, k = torch.where(ids == e)
            out.index_add_(
                0, b, (self.run(e, x[b, s]) * weights[b, s, k, None]).unsqueeze(1).expand(-1, x.shape[1], -1)
            )
        return out


@mutant("rows are gathered along dimensions ['S', 'B'] of the expert ids", tokens=2)
class GridIndicesTurned(Grid):
    def sum_of(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            b, s, k = torch.where(ids == e)
            out[b, s] += self.run(e, x[s, b]) * weights[b, s, k, None]
        return out


@mutant("rows are gathered along dimensions ['S', 'B', 1] of the expert ids")
class GridOfOtherRows(Grid):
    """The batches, in another order."""

    def sum_of(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, other = torch.zeros_like(x), x.transpose(0, 1)
        for e in range(E):
            b, s, k = torch.where(ids == e)
            out[b, s] += self.run(e, other.reshape(x.shape)[b, s]) * weights.transpose(0, 1)[s, b, k, None]
        return out
