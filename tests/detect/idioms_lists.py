"""Idioms that are rewritten: loops over the ids that occur, counts as long as the largest of them, and index vectors
in the other ways in which people write them."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.loops import SCORES, D, E, K, Listed, Stacked, idiom

# -- the ids that occur ---------------------------------------------------------------------


@idiom(distinct=SCORES)
class Unique(Listed):
    """`chosen` is what a mutant changes."""

    def chosen(self, ids: Tensor):  # type: ignore[no-untyped-def]
        return torch.unique(ids)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in self.chosen(ids):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@idiom(distinct=SCORES)
class UniqueAsNumbers(Unique):
    def chosen(self, ids: Tensor):  # type: ignore[no-untyped-def]
        return ids.flatten().unique(sorted=True).tolist()


@idiom(distinct=SCORES)
class UniqueStacked(Stacked):
    """The list is of flat ids, the rows are of the table; a number is taken of each."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.view(-1).unique():
            e = e.item()
            mask = (ids == e).any(-1)
            out[mask] += self.expert(e, x[mask]) * (weights * (ids == e)).sum(-1)[mask].unsqueeze(-1)
        return out


@idiom(distinct=SCORES, top_k=1)
class UniqueOfOneColumn(Stacked):
    """A table of one column, and that column."""

    def chosen(self, ids: Tensor) -> Tensor:
        return ids[:, 0]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, first = torch.zeros_like(x), self.chosen(ids)
        for e in ids.unique():
            t = torch.where(first == e)[0]
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t])
        return out


@idiom(distinct=SCORES, top_k=1)
class UniqueOfOneColumnIfAny(UniqueOfOneColumn):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            mask = self.chosen(ids) == e
            if mask.any():
                t = torch.where(mask)[0]
                out[t] = self.expert(e, x[t]) * weights[t]
        return out


@idiom(distinct=False)
class UniqueOfLargest(Stacked):
    """One expert a token, that of the largest score."""

    def scores(self, x: Tensor, weights: Tensor) -> Tensor:
        return torch.cat([x[:, : E - weights.shape[1]], weights], 1).softmax(-1)

    def best(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        top, ids = scores.max(-1)
        return top, ids

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        top, first = self.best(self.scores(x, weights))
        out = torch.zeros_like(x)
        for e in first.unique():
            mask = first == e
            out[mask] = self.expert(e, x[mask]) * top[mask, None]
        return out


@idiom(distinct=False)
class UniqueOfArgmax(UniqueOfLargest):
    def best(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.argmax(scores, dim=1)
        return scores.gather(1, ids[:, None])[:, 0], ids


# -- counted up to the largest id -----------------------------------------------------------


@idiom(distinct=SCORES)
class Counted(Listed):
    """`ends` and `first` are what a mutant changes."""

    def ends(self, flat: Tensor):  # type: ignore[no-untyped-def]
        return flat.bincount().cpu().numpy().cumsum(0)

    def first(self, ends, e: int):  # type: ignore[no-untyped-def]
        return 0 if e == 0 else ends[e - 1]

    def after(self, out: Tensor, ends) -> Tensor:  # type: ignore[no-untyped-def]
        return out

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.view(-1)
        out, order, ends = torch.zeros_like(x), flat.argsort(), self.ends(flat)
        tokens = order // K
        for e, end in enumerate(ends):
            start = self.first(ends, e)
            if start == end:
                continue
            t = tokens[start:end]
            y = self.run(e, x[t])
            y.mul_(weights.view(-1, 1)[order[start:end]])
            out.scatter_add_(0, t.view(-1, 1).repeat(1, D), y)
        return self.after(out, ends)


@idiom(distinct=SCORES)
class CountedAsList(Counted):
    def ends(self, flat: Tensor):  # type: ignore[no-untyped-def]
        return torch.bincount(flat).cumsum(0).tolist()


@idiom(distinct=SCORES)
class CountedThenSummed(Counted):
    """By numpy's function, of an array."""

    def ends(self, flat: Tensor):  # type: ignore[no-untyped-def]
        return np.cumsum(torch.bincount(flat).cpu().numpy())


@idiom(distinct=SCORES)
class CountedBesideSums(Counted):
    """A list of counts, and of sums: where an expert's rows begin is where they end less their number."""

    def bounds(self, counts, ends, e: int):  # type: ignore[no-untyped-def]
        assert isinstance(ends[e], np.integer) and isinstance(counts[e], int)
        return ends[e] - counts[e], ends[e]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.view(-1)
        out, order, counts = torch.zeros_like(x), flat.argsort(), torch.bincount(flat).tolist()
        ends = np.cumsum(counts, axis=0)
        for e, n in enumerate(counts):
            if n == 0:
                continue
            start, end = self.bounds(counts, ends, e)
            mine = order[start:end]
            out.index_add_(0, mine // K, self.run(e, x[mine // K]) * weights.view(-1, 1)[mine])
        return self.after(out, ends)


# -- index vectors --------------------------------------------------------------------------


@idiom(any_ids=True)
class IfLength(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            if len(t) > 0:
                out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@idiom(any_ids=True)
class SkipWithoutLength(Listed):
    """`table` is what a mutant changes."""

    def table(self, mask: Tensor) -> Tensor:
        return mask.nonzero()

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            table = self.table(ids == e)
            if not len(table):
                continue
            t, k = table[:, 0], table[:, 1]
            out[t] += self.run(e, x[t]) * weights[t, k].unsqueeze(-1)
        return out


@idiom(any_ids=True)
class TableByArgwhere(SkipWithoutLength):
    def table(self, mask: Tensor) -> Tensor:
        return torch.argwhere(mask)


@idiom(any_ids=True)
class TableTransposed(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = (ids == e).nonzero().t()
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k].unsqueeze(-1))
        return out


@idiom(any_ids=True)
class RowsIfAny(Listed):
    """An expert's one row stays a row when it is written back."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            mask = (ids == e).any(-1)
            rows = x[mask]
            if rows.size(0) > 0:
                out[mask] += self.run(e, rows) * (weights * (ids == e)).sum(-1)[mask][:, None]
        return out


@idiom(any_ids=True)
class WeightsByPair(Listed):
    """Tokens by one mask, their weights by another: `pairs` is what a mutant changes."""

    def pairs(self, mask: Tensor, weights: Tensor) -> Tensor:
        return weights[mask]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            mask = ids == e
            tokens = mask.any(-1)
            if tokens.sum() > 0:
                out[tokens] = out[tokens] + self.run(e, x[tokens]) * self.pairs(mask, weights).unsqueeze(-1)
        return out


# -- one expert a token ---------------------------------------------------------------------


@idiom(top_k=1, any_ids=True)
class OneSetByColumn(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t = torch.where(ids[:, 0] == e)[0]
            out[t] = self.run(e, x[t]) * weights[t, 0].unsqueeze(-1)
        return out


@idiom(top_k=1, any_ids=True)
class OneByMask(Listed):
    """`mask` is what a mutant changes."""

    def mask(self, ids: Tensor, e: int) -> Tensor:
        return (ids == e).squeeze(-1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            mask = self.mask(ids, e)
            out[mask] = self.run(e, x[mask])
        return out * weights[:, :1]


# -- a row for each pair --------------------------------------------------------------------


@idiom(any_ids=True)
class RepeatedThenMasked(Listed):
    """`add` is what a mutant changes."""

    def add(self, y: Tensor, weights: Tensor) -> Tensor:
        return (y.view(*weights.shape, D) * weights.unsqueeze(-1)).sum(1)

    def start(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, x = ids.view(-1), x.repeat_interleave(K, dim=0)
        y = self.start(x)
        for e in range(E):
            y[flat == e] = self.run(e, x[flat == e])
        return self.add(y, weights)


@idiom()
class RepeatedIntoUnset(RepeatedThenMasked):
    def start(self, x: Tensor) -> Tensor:
        return torch.empty_like(x)


@idiom(any_ids=True)
class RepeatedAndCopied(RepeatedThenMasked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat, x = ids.flatten(), x.repeat_interleave(K, 0)
        y = self.start(x)
        for e in range(E):
            at = (flat == e).nonzero().squeeze(-1)
            if at.numel() > 0:
                y.index_copy_(0, at, F.relu(self.run(e, x.index_select(0, at))))
        return self.add(y, weights)
