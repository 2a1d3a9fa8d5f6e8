"""Idioms that are rewritten: masks with a condition of the pair or the token, and tables of gates that say who is chosen."""

import torch
from torch import Tensor

from tests.detect.loops import D, E, Listed, Stacked, idiom

SURE = 0.4  # of weights in [0.1, 1.1)


# -- conditions -----------------------------------------------------------------------------


@idiom(any_ids=True, distinct=False)
class SurePairs(Listed):
    """`mask` is what a mutant changes."""

    def mask(self, x: Tensor, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        return (ids == e) & (weights > SURE)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(self.mask(x, ids, weights, e))
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@idiom(any_ids=True, distinct=False)
class RealTokens(SurePairs):
    def mask(self, x: Tensor, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        return (x[:, 0] > 0).unsqueeze(1).logical_and(ids == e)


@idiom(any_ids=True, distinct=False)
class SureRealTokens(SurePairs):
    """Two conditions, and one as numbers."""

    def mask(self, x: Tensor, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        return ((ids == e) * (x[:, :1] > 0).float() * (weights > SURE)).bool()


@idiom(any_ids=True, distinct=False)
class FirstColumnOnly(SurePairs):
    def mask(self, x: Tensor, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        return (ids == e) & (torch.arange(ids.shape[1]) == 0)[None]


@idiom(any_ids=True, distinct=False)
class SureIfAny(SurePairs):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            mask = self.mask(x, ids, weights, e)
            if not mask.any():
                continue
            t, k = torch.where(mask)
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@idiom(any_ids=True)
class RealTokensIfAny(Listed):
    """`rows` and `weigh` are what a mutant changes."""

    def rows(self, x: Tensor, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        return (ids == e).any(-1) & (x[:, 0] > 0)

    def weigh(self, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        return (weights * (ids == e)).sum(-1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            mask = self.rows(x, ids, weights, e)
            if mask.any():
                out[mask] += self.run(e, x[mask]) * self.weigh(ids, weights, e)[mask].unsqueeze(1)
        return out


@idiom(any_ids=True, flat=True, distinct=False)
class SureOfOne(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            rows = ((ids == e) & (weights[:, 0] > SURE)).nonzero().squeeze(-1)
            out[rows] = self.run(e, x[rows]) * weights[rows, :1]
        return out


@idiom(any_ids=True)
class SureOnAllTokens(Listed):
    """Every expert on every token."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            out = out + self.run(e, x) * (weights * ((ids == e) & (weights > SURE))).sum(-1, keepdim=True)
        return out


# -- gates ----------------------------------------------------------------------------------


@idiom(distinct=False)
class Gates(Listed):
    """`gates` and `chosen` are what a mutant changes."""

    def gates(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :E]).scatter(1, ids, torch.where(weights > SURE, weights, 0))

    def chosen(self, gates: Tensor, e: int) -> Tensor:
        return (gates[:, e] > 0).nonzero().squeeze(-1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, out = self.gates(x, ids, weights), torch.zeros_like(x)
        for e in range(E):
            t = self.chosen(gates, e)
            out.index_add_(0, t, self.run(e, x[t]) * gates[t, e].unsqueeze(1))
        return out


@idiom(distinct=False)
class GatesNotZero(Gates):
    def chosen(self, gates: Tensor, e: int) -> Tensor:
        return gates[:, e].nonzero().squeeze(-1)


@idiom(distinct=False)
class GatesOfNumber(Gates):
    """Gates that are normalised, and large enough."""

    def gates(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates = super().gates(x, ids, weights)
        return gates / (gates.sum(-1, keepdim=True) + 0.01)

    def chosen(self, gates: Tensor, e: int) -> Tensor:
        return torch.where(gates[:, e] > 0.3)[0]


@idiom(distinct=False)
class GatesIfAny(Stacked):
    """With a table of masks, columns that stay columns, and an assignment into zeros."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates = torch.zeros_like(x[:, :E]).scatter_(1, ids, weights)
        out = torch.zeros_like(x)
        chosen = (gates > 0).t()
        for e in range(E):
            rows = chosen[e].nonzero().view(-1)
            if rows.numel() > 0:
                out[rows] += self.expert(e, x[rows]) * gates[rows, e : e + 1]
        return out


@idiom(distinct=False)
class GatesOfRealTokens(Gates):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, out, real = self.gates(x, ids, weights), torch.zeros_like(x), x[:, D - 1] > 0
        for e in range(E):
            mask = (gates[:, e] != 0) & real
            out[mask] += self.run(e, x[mask]) * gates[mask, e].view(-1, 1)
        return out
