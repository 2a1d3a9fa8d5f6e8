"""Idioms that are rewritten: a loop over the columns of the ids, and one over the experts, in either order."""

import torch
from torch import Tensor

from tests.detect.loops import D, E, K, Listed, Stacked, idiom


@idiom(any_ids=True, distinct=False)
class ColumnsFirst(Listed):
    """`weigh` and `rows` are what a mutant changes."""

    def weigh(self, weights: Tensor, mask: Tensor, k: int, e: int) -> Tensor:
        return weights[mask, k].unsqueeze(1)

    def rows(self, x: Tensor, mask: Tensor, k: int) -> Tensor:
        return x[mask]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for k in range(ids.shape[1]):
            for e in range(E):
                mask = ids[:, k] == e
                if mask.any():
                    out[mask] += self.run(e, self.rows(x, mask, k)) * self.weigh(weights, mask, k, e)
        return out


@idiom(any_ids=True, distinct=False)
class ExpertsFirst(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            for k in range(K):
                t = torch.where(ids[..., k] == e)[0]
                if len(t) == 0:
                    continue
                out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k : k + 1])
        return out


@idiom(any_ids=True, distinct=False)
class ColumnsUnbound(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for column, w in zip(ids.unbind(1), weights.unbind(-1), strict=True):
            for e, expert in enumerate(self.experts):
                mask = column == e
                out[mask] = out[mask] + expert(x[mask]) * w[mask, None]
        return out


@idiom(any_ids=True, distinct=False)
class ColumnsOfTokens(ColumnsFirst):
    """What a token hands its second expert differs from what it hands its first."""

    def rows(self, x: Tensor, mask: Tensor, k: int) -> Tensor:
        return torch.stack([x, x * 2 - 1], 1)[:, k][mask]


@idiom(any_ids=True, distinct=False, top_k=E)
class ColumnsAsManyAsExperts(ColumnsFirst):
    pass


@idiom(any_ids=True, distinct=False, top_k=3)
class ColumnsUnweighed(ColumnsFirst):
    def weigh(self, weights: Tensor, mask: Tensor, k: int, e: int) -> Tensor:
        return weights[mask].amax(-1, keepdim=True)


@idiom(any_ids=True, distinct=False)
class FirstColumnAssigned(Listed):
    """Into zeros; the second is added."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for k in range(K):
            for e in range(E):
                mask = ids[:, k] == e
                if k == 0:
                    out[mask] = self.run(e, x[mask]) * weights[mask, k, None]
                else:
                    out[mask] += self.run(e, x[mask]) * weights[mask, k, None]
        return out


@idiom(any_ids=True, distinct=False)
class ColumnsThenSum(Listed):
    """Into a buffer that holds something."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = x.tanh()
        for e in range(E):
            for k in range(K):
                t = (ids[:, k] == e).nonzero().flatten()
                out = out.index_add(0, t, self.run(e, x[t].view(-1, D)) * weights[:, k].unsqueeze(-1)[t])
        return out


@idiom(distinct=False)
class ZippedRange(Listed):
    """A range and a list of experts, side by side."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in zip(range(E), self.experts, strict=False):
            t, k = torch.where(ids == e)
            if t.numel() == 0:
                continue
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out
