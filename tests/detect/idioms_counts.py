"""Idioms that are rewritten: Python reads how many rows each expert gets, and slices rows that are sorted by expert."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.loops import SCORES, D, E, K, Listed, Stacked, idiom


class Split(Stacked):
    """A product for each piece of `split`, and the pieces joined again.  A mutant changes one step of it."""

    def sizes(self, ids: Tensor) -> Any:
        zeros = torch.zeros([ids.size(0), E], dtype=torch.float32)
        return zeros.scatter(1, ids, 1).long().sum(0).tolist()

    def order(self, ids: Tensor) -> Tensor:
        return ids.flatten().sort(0)[1]

    def split(self, x: Tensor, sizes: Any) -> Any:
        return x.split(sizes, dim=0)

    def product(self, x: Tensor, w: Tensor, sizes: Any) -> Tensor:
        pieces = self.split(x, sizes)
        out = []
        for e in range(E):
            out.append(F.linear(pieces[e], w[e]))
        return self.join(out)

    def join(self, pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces, dim=0)

    def weigh(self, y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
        return y * weights.flatten()[order][:, None]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sizes, order = self.sizes(ids), self.order(ids)
        token = order.div(K, rounding_mode="trunc")
        gate, up = self.product(x[token], self.w13, sizes).chunk(2, dim=-1)
        y = self.weigh(self.product(F.silu(gate) * up, self.w2, sizes), weights, order)
        return torch.zeros_like(x).index_add(0, token, y)


class Inferred(Listed):
    """Slices by a running offset, skipping experts without rows; results in a list, then back in their own order."""

    def counts(self, ids: Tensor) -> Tensor:
        counts = ids.new_zeros((ids.shape[0], len(self.experts)))
        counts.scatter_(1, ids, 1)
        return counts.sum(dim=0)

    def order(self, ids: Tensor) -> Tensor:
        return ids.view(-1).argsort()

    def rows(self, x: Tensor, order: Tensor) -> Tensor:
        return x[order // K]

    def read(self, counts: Tensor) -> Any:
        return counts.cpu().numpy()

    def outputs(self, rows: Tensor, sizes: Any) -> Tensor:
        outputs = []
        start = 0
        for e, size in enumerate(sizes):
            end = start + size
            if size == 0:
                continue
            expert = self.experts[e]
            outputs.append(expert(rows[start:end]))
            start = end
        return torch.cat(outputs, dim=0) if len(outputs) else rows.new_empty(0)

    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        back = torch.empty_like(y)
        back[order] = y
        return back

    def total(self, y: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y_TKD = y.view(*ids.shape, -1).type(weights.dtype)
        return y_TKD.mul_(weights.unsqueeze(dim=-1)).sum(dim=1).type(y.dtype)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sizes = self.read(self.counts(ids))
        order = self.order(ids)
        y = self.outputs(self.rows(x, order), sizes)
        return self.total(self.unsort(y, order), ids, weights)


class Ends(Listed):
    """Slices of the sorted order itself; results are added to their tokens at once."""

    def ends(self, ids: Tensor) -> Any:
        return torch.bincount(ids.view(-1), minlength=E).cumsum(0).tolist()

    def order(self, ids: Tensor) -> Tensor:
        return ids.view(-1).argsort()

    def empty(self, start: Any, end: Any, e: int) -> bool:
        return start == end

    def accumulate(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return out.index_add_(0, token, y)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        order, ends = self.order(ids), self.ends(ids)
        token, flat = order // K, weights.view(-1, 1)
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            if self.empty(start, end, e):
                continue
            mine = token[start:end]
            out = self.accumulate(out, mine, self.experts[e](x[mine]) * flat[order[start:end]])
        return out


class Set(Listed):
    """Results are set where the expert's rows lie."""

    def counts(self, ids: Tensor) -> Tensor:
        return torch.bincount(ids.reshape(-1), minlength=E)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.reshape(-1).argsort(stable=True)
        rows = x[order // K]
        out = torch.empty_like(rows)
        start = 0
        for e, n in enumerate(self.counts(ids).tolist()):
            if n > 0:
                out[start : start + n] = self.run(e, rows[start : start + n])
            start += n
        return (weights.unsqueeze(-1) * out[order.argsort()].view(-1, K, D)).sum(1)


# -- split and join -------------------------------------------------------------------------


@idiom()
class SplitAsJetMoe(Split):
    pass


@idiom(distinct=SCORES)
class SplitByBincount(Split):
    def sizes(self, ids: Tensor) -> Any:
        return torch.bincount(ids.flatten(), minlength=E).tolist()

    def split(self, x: Tensor, sizes: Any) -> Any:
        return torch.split(x, sizes)


@idiom(distinct=False)
class SplitByOneHot(Split):
    def sizes(self, ids: Tensor) -> Any:
        return F.one_hot(ids, E).sum((0, 1)).tolist()


@idiom(distinct=False)
class SplitByOneHotOfFlatIds(Split):
    def sizes(self, ids: Tensor) -> Any:
        return F.one_hot(ids.flatten(), E).sum(0).tolist()


@idiom(distinct=False)
class SplitByHistogram(Split):
    def sizes(self, ids: Tensor) -> Any:
        return ids.flatten().float().histc(bins=E, min=0, max=E - 1).int().tolist()


@idiom(distinct=False)
class SplitByMasks(Split):
    def sizes(self, ids: Tensor) -> Any:
        return [(ids == e).sum().item() for e in range(E)]


# -- a list of results ----------------------------------------------------------------------


@idiom(empty=False)
class InferredAsDeepSeek(Inferred):
    pass


@idiom(empty=False, distinct=False)
class InferredByBincount(Inferred):
    def counts(self, ids: Tensor) -> Tensor:
        return torch.bincount(ids.view(-1), minlength=E)

    def read(self, counts: Tensor) -> Any:
        return counts.tolist()


@idiom(empty=False)
class InferredWeighedInOrder(Inferred):
    def total(self, y: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return (y * weights.view(-1, 1)).view(-1, K, D).sum(1)

    def unsort(self, y: Tensor, order: Tensor) -> Tensor:
        return y[order.argsort()]


@idiom()
class InferredAddedToTokens(Inferred):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sizes, order = self.read(self.counts(ids)), self.order(ids)
        y = self.outputs(self.rows(x, order), sizes) * weights.reshape(-1)[order].unsqueeze(1)
        return x.new_zeros(x.shape).index_add(0, order // K, y)


@idiom(empty=False)
class InferredByEnds(Listed):
    """Offsets by numpy."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sizes = torch.bincount(ids.view(-1), minlength=E).cpu().numpy()
        order = ids.view(-1).argsort()
        rows, ends = x[order // K], sizes.cumsum()
        outputs = []
        for e, expert in enumerate(self.experts):
            begin = ends[e] - sizes[e]
            if begin < ends[e]:
                outputs.append(expert(rows[begin : ends[e]]))
        y = torch.cat(outputs) * weights.reshape(-1, 1)[order]
        return torch.zeros_like(x).index_add(0, order // K, y)


@idiom(empty=False)
class InferredByTensors(Inferred):
    """The sizes stay tensors, and so do the offsets that add them up."""

    def read(self, counts: Tensor) -> Any:
        return counts


@idiom()
class InferredWithoutSkipping(Inferred):
    def outputs(self, rows: Tensor, sizes: Any) -> Tensor:
        bounds = [0, *itertools.accumulate(sizes.tolist())]
        return torch.cat([self.experts[e](rows[bounds[e] : bounds[e + 1]]) for e in range(E)])

    def total(self, y: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return (weights.unsqueeze(-1) * y.view(-1, K, D)).sum(1)


# -- slices of the order --------------------------------------------------------------------


@idiom(distinct=False)
class EndsAddedToTokens(Ends):
    pass


@idiom(distinct=False)
class EndsByNumpy(Ends):
    def ends(self, ids: Tensor) -> Any:
        return ids.view(-1).bincount(minlength=E).cpu().numpy().cumsum(0)


@idiom(distinct=False, forward_only=True)
class EndsAsFirstDeepSeek(Ends):
    def ends(self, ids: Tensor) -> Any:
        return ids.view(-1).bincount(minlength=E).cpu().numpy().cumsum(0)

    def accumulate(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return out.scatter_reduce_(0, token.view(-1, 1).repeat(1, D), y, reduce="sum")


@idiom(distinct=False)
class EndsAddedByScatter(Ends):
    def accumulate(self, out: Tensor, token: Tensor, y: Tensor) -> Tensor:
        return out.scatter_add_(0, token[:, None].expand_as(y), y)


@idiom(distinct=False)
class EndsByOffsets(Ends):
    """Bounds as entries of tensors."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        order = self.order(ids)
        ends = torch.bincount(ids.view(-1), minlength=E).cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends])
        for e in range(E):
            mine = order[offsets[e] : offsets[e + 1]]
            y = self.experts[e](x[mine // K]) * weights.view(-1)[mine].unsqueeze(-1)
            out.index_add_(0, mine // K, y)
        return out


@idiom(distinct=False)
class EndsPadded(Ends):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        order = self.order(ids)
        counts = F.one_hot(ids, E).sum(0).sum(0)
        offsets = F.pad(counts.cumsum(0), (1, 0)).tolist()
        rows, flat = x.repeat_interleave(K, 0), weights.view(-1)
        for e in range(E):
            lo, hi = offsets[e], offsets[e + 1]
            if hi > lo:
                mine = order[lo:hi]
                out.index_add_(0, mine // K, self.experts[e](rows[mine]) * flat[mine].unsqueeze(-1))
        return out


@idiom(distinct=False)
class EndsLessCounts(Ends):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        order = self.order(ids)
        counts = torch.bincount(ids.view(-1), minlength=E)
        starts = (counts.cumsum(0) - counts).tolist()
        for e, (start, n) in enumerate(zip(starts, counts.tolist(), strict=True)):
            mine = order[start : start + n]
            out.index_add_(0, mine // K, self.experts[e](x[mine // K]) * weights[mine // K, mine % K, None])
        return out


@idiom(distinct=False)
class EndsWithoutTheLastExpert(Ends):
    """Ids of the last expert are no error, and add nothing."""

    def empty(self, start: Any, end: Any, e: int) -> bool:
        return e == E - 1 or start == end


# -- rows that are set ----------------------------------------------------------------------


@idiom(empty=False, distinct=False)
class SetByExpert(Set):
    pass


@idiom(empty=False, distinct=SCORES)
class SetByItem(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = torch.argsort(ids.flatten(), stable=True)
        rows = x[order // K]
        out = torch.zeros_like(rows)
        counts = torch.bincount(ids.view(-1), minlength=E)
        start = 0
        for e in range(E):
            n = counts[e].item()
            if not n:
                continue
            out[start : start + n] = self.run(e, rows[start : start + n])
            start = start + n
        y = out * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add_(0, order // K, y)
