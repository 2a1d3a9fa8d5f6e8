"""Mutants: rows meet, rows or weights of another expert are read, results land elsewhere."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.loops import D, E, Listed, Stacked, mutant

# -- mutants: rows that meet ----------------------------------------------------------------


@mutant("mean along dimension 0 lets rows depend on each other")
class MeanOverRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x - x.mean(0, keepdim=True))


@mutant("std reduces over all rows")
class DeviationOfAll(Listed):
    """The argument says how it is estimated, and not along what."""

    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x / x.std(False))


@mutant("softmax along dimension 0 lets rows depend on each other")
class SoftmaxOverRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x).softmax(0)


@mutant("cumsum along dimension 0 lets rows depend on each other")
class CumsumOverRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x).cumsum(0)


@mutant("sum reduces over all rows")
class SumOverAll(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) / (1 + x.sum().abs())


@mutant("linalg_vector_norm reduces over all rows")
class NormOverAll(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) / (1 + x.norm())


@mutant("add, a size known only at run time, is used in the expert")
class DividedByRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) / (x.shape[0] + 1)


@mutant("aten.batch_norm at file.py is not known to be row-wise (it reads rows)")
class BatchNorm(Listed):
    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)))


@mutant("flip along dimension 0 lets rows depend on each other")
class FlippedRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x).flip(0)


@mutant("aten.roll at file.py is not known to be row-wise (it reads rows)")
class RolledRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x).roll(1, 0)


@mutant("t moves the rows' dimension")
class Attention(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e]((x @ x.t()).softmax(-1) @ x)


@mutant("add adds a tensor of shape (r, 1) across the rows")
class PositionOfRow(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x + torch.arange(x.shape[0]).unsqueeze(1))


@mutant("pow_ adds a tensor of shape (r, 1) across the rows")
class RaisedByPosition(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x.pow_(1 + torch.arange(x.shape[0]).unsqueeze(1)))


@mutant("slice along dimension 0 lets rows depend on each other")
class FirstRow(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) + x[:1]


@mutant("aten.slice.Tensor at file.py is not known to be row-wise (it reads index)")
class Capacity(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            t, k = t[:2], k[:2]
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("reshape to (6, 7919) mixes rows and features")
class ViewAcross(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x.reshape(D, -1).t())


@mutant("rows are gathered along dimensions [None, 0] of the expert ids")
class ColumnsOfX(Listed):
    """Selects features, not rows; D and T are the same number."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], x.shape[0] + D)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(1, t, (F.pad(x, (0, x.shape[0]))[:, t].t() * weights[t, k, None]).t())
        return out[:, :D]


# -- mutants: other rows, other weights -----------------------------------------------------


@mutant("column 1 of the weights is read for the rows of expert 0")
class WeightsOfAnother(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        probs = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, _ = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * probs[:, (e + 1) % E][t].unsqueeze(-1))
        return out


@mutant("unsqueeze is (11, 4, 1), the expert ids are (11, 2)")
class WeightsByWideTable(Listed):
    """probs[t, k] of a [T, E] table: column k, not column id."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        probs = torch.zeros(x.shape[0], E).scatter(1, ids, weights) + 0.1
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * probs[t, k, None])
        return out


@mutant("weights of expert 1 are read for the rows of expert 0")
class MaskedWeightsOfAnother(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1)
            out[mask] += expert(x[mask]) * (weights * (ids == (e + 1) % E)).sum(-1)[mask].unsqueeze(-1)
        return out


@mutant("it decides on the number of rows that an expert gets (Eq(r, r))")
class PlacesOfAnother(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            u, _ = torch.where(ids == (e + 1) % E)
            if t.shape[0] == u.shape[0]:
                out.index_add_(0, u, expert(x[t]) * weights[t, k, None])
        return out


@mutant(
    "aten.index_put_ at file.py keeps only one of two equal tokens: the ids (ids) are not shown to be distinct, as those of topk are",
    distinct=False,
    repeats=True,
)
class RepeatedIds(Listed):
    """`out[mask] +=` adds once for a token that chose an expert twice."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out[t] += expert(x[t]) * weights[t, k, None]
        return out


@mutant(
    "a token that chose an expert twice counts once: the ids (ids) are not shown to be distinct, as those of topk are",
    distinct=False,
    repeats=True,
)
class RepeatedIdsByToken(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1)
            out[mask] += expert(x[mask])
        return out


@mutant(
    "a token that chose an expert twice counts once: the ids (to) are not shown to be distinct, as those of topk are"
)
class NarrowIds(Listed):
    """In a narrower type two ids become one."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        scores = F.one_hot(ids[:, 0], 512) + 0.5 * F.one_hot(ids[:, 0] + 256, 512)
        out, chosen = torch.zeros_like(x), torch.topk(scores, 2)[1].to(torch.uint8)
        for e, expert in enumerate(self.experts):
            mask = (chosen == e).any(-1)
            out[mask] += expert(x[mask])
        return out


@mutant(
    "a token that chose an expert twice counts once: the ids (getitem_1) are not shown to be distinct, as those of topk are",
    distinct=False,
    repeats=True,
)
class TopkOverTokens(Listed):
    """The indices of a topk over dimension 0 are distinct in a column, not in a row."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        scores = x.sin().abs()[:4, :3] * 0.001
        scores = torch.cat([scores + torch.tensor([[0.0], [1.0], [2.0], [3.0]])])
        chosen = torch.topk(scores, 3, dim=0)[1]  # [3, 3]: rows hold one id three times
        rows = x[:3]
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            mask = (chosen == e).any(-1)
            out[mask] += expert(rows[mask])
        return F.pad(out, (0, 0, 0, x.shape[0] - 3))


@mutant("aten.index_put_ at file.py overwrites what another expert of the same token wrote")
class LastWins(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1)
            out[mask] = expert(x[mask])
        return out


@mutant("aten.index_add_ at file.py does not add rows to tokens along dimension 0 with factor 1")
class Alpha(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None], alpha=0.5)
        return out


@mutant("expert 1 differs from expert 0: it reads token mul, that one token x")
class OtherInputForOne(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        twice = x * 2
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert((twice if e == 1 else x)[t]) * weights[t, k, None])
        return out


@mutant("the iterations choose their rows in different ways")
class TwoIds(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        other = (ids + 1) % E
        for e, expert in enumerate(self.experts):
            t, k = torch.where((ids if e < 2 else other) == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("the loop visits experts [0, 1, 3], not each of 0..2 once")
class MissingExpert(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in (0, 1, 3):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@mutant("3 experts are used, w2 holds 4")
class VisitsFewer(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E - 1):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@mutant("the loop visits experts [0, 1, 2, 3, 1], not each of 0..4 once")
class VisitsTwice(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in (0, 1, 2, 3, 1):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@mutant("rows are selected by eq, which is not shown to say which ids are those of an expert")
class FloatIds(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, ids.float() * 0.75, weights)


@mutant("the sum is (14, 6), its terms are (7919, 6), the expert ids are (11, 2)")
class LongerBuffer(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0] + 3, D)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("cat is (22, 6), the expert ids are (11, 2)")
class LongerInput(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        longer = torch.cat([x, x])
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(longer[t]) * weights[t, k, None])
        return out
