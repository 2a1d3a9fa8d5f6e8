"""Mutants of masks over ids that were sorted or transposed, and of masks that keep their dimensions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_masks import (
    MaskKeepsDimension,
    MaskOfSorted,
    MasksZipped,
    TruthKeepsDimension,
    TurnedIds,
    WeightsInside,
)
from tests.detect.loops import E, K, Listed, mutant

# -- rows that were sorted ------------------------------------------------------------------


@mutant("mean along dimension 0 lets rows depend on each other")
class SortedRowsMix(MaskOfSorted):
    def run(self, e: int, x: Tensor) -> Tensor:
        return super().run(e, x - x.mean(0))


@mutant("aten.index_put_ at file.py overwrites what was added by other ids")
class SortedIdsChange(MaskOfSorted):
    """After the first expert, the second takes what is the first's."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = torch.argsort(ids.reshape(-1), stable=True)
        sorted_ids, rows = self.ids_of(ids, order).clone(), self.rows(x, order)
        y = torch.zeros_like(rows)
        for e in range(E):
            t = torch.where(sorted_ids == e)[0]
            y[t] = self.run(e, rows[t])
            sorted_ids.clamp_(min=1)
        return self.total(y, weights, order)


@mutant("aten.index.Tensor at file.py is not known to be row-wise (it reads index, rows)")
class SortedRowsChange(MaskOfSorted):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = torch.argsort(ids.reshape(-1), stable=True)
        sorted_ids, rows = self.ids_of(ids, order), self.rows(x, order)
        y = torch.zeros_like(rows)
        for e in range(E):
            t = torch.where(sorted_ids == e)[0]
            y[t] = self.run(e, rows[t])
            rows *= 0.5
        return self.total(y, weights, order)


@mutant("aten.index_put_ at file.py adds the rows of one selection at the places of another")
class SortedLandElsewhere(MaskOfSorted):
    """The rows of one expert are set where they would lie unsorted."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = torch.argsort(ids.reshape(-1), stable=True)
        sorted_ids, rows = self.ids_of(ids, order), self.rows(x, order)
        y = torch.zeros_like(rows)
        for e in range(E):
            t = torch.where(sorted_ids == e)[0]
            y[torch.where(ids.view(-1) == e)[0]] = self.run(e, rows[t])
        return self.total(y, weights, order)


@mutant("the loop visits experts [0, 1, 2, 3, 0], not each of 0..4 once")
class SortedExpertTwice(MaskOfSorted):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = torch.argsort(ids.reshape(-1), stable=True)
        sorted_ids, rows = self.ids_of(ids, order), self.rows(x, order)
        y = torch.zeros_like(rows)
        for e in (*range(E), 0):
            t = torch.where(sorted_ids == e)[0]
            y[t] += self.run(e, rows[t])
        return self.total(y, weights, order)


@mutant("unsqueeze is (33, 1), the expert ids are (22,)")
class SortedWeighedByToken(MaskOfSorted):
    """Entries of a shorter table, by a row's place among the sorted."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = torch.argsort(ids.reshape(-1), stable=True)
        sorted_ids, rows = self.ids_of(ids, order), self.rows(x, order)
        y, of_token = torch.zeros_like(rows), weights.sum(1).repeat(K + 1)
        for e in range(E):
            t = torch.where(sorted_ids == e)[0]
            y[t] = self.run(e, rows[t]) * of_token[t, None]
        return self.total(y, weights, order)


# -- other masks ----------------------------------------------------------------------------


@mutant("rows are gathered along dimensions [1] of the expert ids", tokens=K)
class TurnedMeansToken(TurnedIds):
    """As many tokens as a token has experts: the first index is k."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids.t() == e)
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@mutant("t is read after it was changed in place through another name")
class TurnedThenChanged(TurnedIds):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, mine = torch.zeros_like(x), ids.clone()
        turned = mine.t()
        for e in range(E):
            k, t = torch.where(turned == e)
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
            mine.clamp_(min=1)
        return out


@mutant("a Python loop runs over chosen rows, not over experts")
class RowsOneByOne(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            for t, k in torch.argwhere(ids == e).unbind(0):
                out[t] += self.run(e, x[t]) * weights[t, k]
        return out


@mutant(
    "a token that chose an expert twice counts once: the ids (ids) are not shown to be distinct, as those of topk are",
    distinct=False,
    repeats=True,
)
class TruthOfRepeatedIds(TruthKeepsDimension):
    pass


@mutant("nothing is summed over experts")
class MaskOverTokens(MaskKeepsDimension):
    def mine(self, ids: Tensor, e: int) -> Tensor:
        return (ids == e).sum(0, keepdim=True).sum(1, keepdim=True)


@mutant("nothing is summed over experts")
class MaskOfSquares(MaskKeepsDimension):
    def mine(self, ids: Tensor, e: int) -> Tensor:
        return super().mine(ids, e) * (e + super().mine(ids, e)) / 2


@mutant("nothing is summed over experts", tokens=1)
class MaskOfAllTokens(MaskKeepsDimension):
    """Along the tokens, of which there is one in the trace."""

    def mine(self, ids: Tensor, e: int) -> Tensor:
        return (ids[:, :1] == e).sum(0, keepdim=True)


# -- masks and experts side by side ---------------------------------------------------------


@mutant("the loop visits experts [0, 1, 3, 3], not each of 0..3 once")
class MasksOfAnotherOrder(MasksZipped):
    def masks(self, ids: Tensor) -> Any:
        masks = F.one_hot(ids, E).permute(2, 1, 0)
        return [masks[0], masks[1], masks[3], masks[3]]


@mutant("rows are selected by getitem, which is not shown to say which ids are those of an expert")
class FewerMasks(MasksZipped):
    def masks(self, ids: Tensor) -> Any:
        return F.one_hot(ids, E).permute(2, 1, 0)[:-1]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for mask, expert in zip(self.masks(ids), self.experts, strict=False):
            k, t = torch.where(mask)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("rows are selected by getitem, which is not shown to say which ids are those of an expert")
class MasksOfTokensZipped(MasksZipped):
    """As many tokens as experts, whose masks stand side by side with the experts."""

    def masks(self, ids: Tensor) -> Any:
        return F.one_hot(ids, E)[:E]


@mutant("rows are selected by getitem, which is not shown to say which ids are those of an expert")
class MasksFromTheEnd(MasksZipped):
    def masks(self, ids: Tensor) -> Any:
        return F.one_hot(ids, E).permute(2, 1, 0).flip(0)


@mutant("aten.add.Tensor at file.py is not known to be row-wise (it reads index)")
class WeightsInsideOfOthers(WeightsInside):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out[t] += expert(x[t], weights[(t + 1) % len(x), k, None])
        return out
