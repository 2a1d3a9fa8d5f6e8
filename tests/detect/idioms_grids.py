"""Idioms that are rewritten: tokens in two dimensions [B, S], with ids [B, S, K] that nothing flattens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.loops import D, E, K, Listed, idiom, weight


class Grid(Listed):
    """Two batches of tokens, and the router.  `choose` and `experts_of` are what an idiom or a mutant changes."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = weight(D, E)

    def choose(self, scores: Tensor) -> Any:
        return scores.topk(K, dim=-1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x = torch.stack([x, x * weights[:, :1] + 0.1])
        scores, ids = self.choose(x @ self.gate)
        return self.sum_of(x, ids, scores.softmax(-1)).sum(0)

    def sum_of(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            mask = self.chosen(ids, e)
            if mask.any():
                out[mask] += self.run(e, x[mask]) * self.weigh(ids, weights, e)[mask].unsqueeze(-1)
        return out

    def chosen(self, ids: Tensor, e: int) -> Tensor:
        return (ids == e).any(dim=-1)

    def weigh(self, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        return (weights * (ids == e)).sum(-1)


@idiom()
class GridMasks(Grid):
    pass


@idiom()
class GridPairs(Grid):
    def sum_of(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            b, s, k = torch.where(ids == e)
            out[b, s] += self.run(e, x[b, s]) * weights[b, s, k, None]
        return out


@idiom()
class GridByTable(Grid):
    """As makeMoE does: rows of flat tokens, added to those of the grid."""

    def choose(self, scores: Tensor) -> Any:
        top, ids = scores.topk(K, dim=-1)
        return torch.full_like(scores, float("-inf")).scatter(-1, ids, top), ids

    def sum_of(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        flat, table = x.view(-1, x.size(-1)), weights.view(-1, weights.size(-1))
        for e, expert in enumerate(self.experts):
            mask = self.chosen(ids, e)
            rows = mask.view(-1)
            if rows.any():
                out[mask] += (expert(flat[rows]) * table[rows, e].unsqueeze(1)).squeeze(1)
        return out


@idiom()
class GridFlattened(Grid):
    """The mask is made in the grid, the sum is flat."""

    def sum_of(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        out, w = torch.zeros_like(flat), weights.flatten(0, 1)
        for e in range(E):
            t, k = (ids == e).flatten(0, 1).nonzero(as_tuple=True)
            out.index_add_(0, t, F.relu(self.run(e, flat[t])) * w[t, k, None])
        return out.view_as(x)
