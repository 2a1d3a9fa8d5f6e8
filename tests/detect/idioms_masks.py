"""Idioms that are rewritten: masks of ids that were sorted or transposed, masks that keep their dimensions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.loops import D, E, K, Listed, Mlp, Stacked, idiom

# -- rows that were sorted, and a mask over the sorted ids for each expert ------------------


@idiom(any_ids=True, distinct=False)
class MaskOfSorted(Listed):
    """`rows`, `ids_of` and `total` are what a mutant changes."""

    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order // K]

    def ids_of(self, ids: Tensor, order: Tensor) -> Tensor:
        return ids.reshape(-1)[order]

    def total(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return (y[torch.argsort(order)] * weights.reshape(-1, 1)).view(-1, K, D).sum(1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = torch.argsort(ids.reshape(-1), stable=True)
        sorted_ids, rows = self.ids_of(ids, order), self.rows(x, order)
        y = torch.zeros_like(rows)
        for e in range(E):
            t = torch.where(sorted_ids == e)[0]
            y[t] = self.run(e, rows[t])
        return self.total(y, weights, order)


@idiom(any_ids=True, distinct=False)
class MaskOfSortedWeighed(MaskOfSorted):
    """With weights in the same order, added to tokens at once."""

    def total(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return weights.new_zeros(weights.shape[0], D).index_add_(
            0, order // K, y * weights.view(-1)[order].unsqueeze(-1)
        )


@idiom(any_ids=True, distinct=False)
class MaskOfSortedRead(MaskOfSorted):
    """The sorted rows are read by others too."""

    def total(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return super().total(y + self.rows(weights, order).mean(), weights, order)


@idiom(distinct=False)
class MaskOfSortedOneHot(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sorted_ids, order = ids.flatten().sort()
        rows, w = x.repeat_interleave(K, 0)[order], weights.flatten()[order]
        mask, y = F.one_hot(sorted_ids, E).bool(), torch.zeros_like(rows)
        for e in range(E):
            y[mask[:, e]] += self.expert(e, rows[mask[:, e]]) * w[mask[:, e], None]
        return y[order.argsort()].view(-1, K, D).sum(1)


# -- other masks ----------------------------------------------------------------------------


@idiom(any_ids=True, distinct=False)
class TurnedIds(Listed):
    """`turned` is what a mutant changes."""

    def turned(self, ids: Tensor) -> Tensor:
        return ids.t()

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        turned = self.turned(ids)
        for e in range(E):
            k, t = torch.where(turned == e)
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@idiom(any_ids=True, distinct=False)
class PermutedIds(TurnedIds):
    def turned(self, ids: Tensor) -> Tensor:
        return ids.permute(-1, 0)


@idiom(any_ids=True, distinct=False)
class TransposedIds(TurnedIds):
    def turned(self, ids: Tensor) -> Tensor:
        return ids.transpose(-1, 0)


@idiom(any_ids=True, distinct=False)
class UnboundIndices(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.argwhere(ids == e).unbind(1)
            if t.numel() == 0:
                continue
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@idiom(any_ids=True, distinct=False)
class MaskKeepsDimension(Listed):
    """`mine` is what a mutant changes."""

    def mine(self, ids: Tensor, e: int) -> Tensor:
        return (ids == e).sum(-1, keepdim=True)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            out = out + self.run(e, x) * self.mine(ids, e).to(x.dtype)
        return out


@idiom(any_ids=True)
class TruthKeepsDimension(MaskKeepsDimension):
    def mine(self, ids: Tensor, e: int) -> Tensor:
        return (ids == e).any(1, keepdim=True)


# -- masks and experts side by side ---------------------------------------------------------


@idiom()
class MasksZipped(Listed):
    """`masks` is what a mutant changes."""

    def masks(self, ids: Tensor) -> Any:
        return F.one_hot(ids, E).permute(2, 1, 0)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for mask, expert in zip(self.masks(ids), self.experts, strict=True):
            k, t = torch.where(mask)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@idiom(any_ids=True)
class ListOfMasksZipped(MasksZipped):
    def masks(self, ids: Tensor) -> Any:
        return [(ids == e).t() for e in range(E)]


class Inside(Mlp):
    """An expert that weighs what is between its two products."""

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        return self.down(self.act(self.up(x)) * weights)


@idiom(any_ids=True)
class WeightsInside(Listed):
    def __init__(self) -> None:
        super().__init__(Inside)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out[t] += expert(x[t], weights[t, k, None])
        return out
