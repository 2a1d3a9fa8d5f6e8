"""Mutants of masks with a condition and of tables of gates."""

import torch
from torch import Tensor

from tests.detect.idioms_conditions import SURE, Gates, RealTokensIfAny, SurePairs
from tests.detect.loops import E, mutant

DIFFERENT = "the iterations choose their rows in different ways"
NOT_IDS = "rows are selected by {}, which is not shown to say which ids are those of an expert"


@mutant(DIFFERENT)
class SureByExpert(SurePairs):
    def mask(self, x: Tensor, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        return (ids == e) & (weights > 0.2 * (e + 1))


@mutant(DIFFERENT)
class SureButOne(SurePairs):
    def mask(self, x: Tensor, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        return ids == e if e == 1 else super().mask(x, ids, weights, e)


@mutant(NOT_IDS.format("or_1"))
class OrSure(SurePairs):
    def mask(self, x: Tensor, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        return (ids == e) | (weights > SURE)


@mutant(NOT_IDS.format("where"))
class AndNumbers(SurePairs):
    """1 & 2 is nothing, 1 & 3 is something."""

    def mask(self, x: Tensor, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        return torch.where(((ids == e) & (weights * 10).long()) > 0, True, False)


@mutant(DIFFERENT, distinct=False, forward_only=True)
class SureChanges(SurePairs):
    """What one expert took is not there for those after it."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, left = torch.zeros_like(x), weights > SURE
        for e in range(E):
            t, k = torch.where((ids == e) & left)
            left = left.logical_and(left.sum(-1, keepdim=True) > 1)
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@mutant(DIFFERENT, distinct=False)
class SureChangedInPlace(SurePairs):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, left = torch.zeros_like(x), weights > SURE
        for e in range(E):
            t, k = torch.where((ids == e) & left)
            left.logical_not_()
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@mutant("rows of two different selections are mixed")
class SureRowsOfAll(SurePairs):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where((ids == e) & (weights > SURE))
            n, _ = torch.where((ids == e) & (weights >= SURE))
            out.index_add_(0, t, self.run(e, x[n]) * weights[t, k, None])
        return out


@mutant("weights of expert 0 are read for the rows of expert 0")
class WeighsTheSure(RealTokensIfAny):
    """Weights that are zero for pairs that are among the rows."""

    def weigh(self, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        return (weights * ((ids == e) & (weights > SURE))).sum(-1)


@mutant("weights of expert 1 are read for the rows of expert 0")
class WeighsTheNext(RealTokensIfAny):
    def weigh(self, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        return super().weigh(ids, weights, (e + 1) % E)


@mutant(
    "a token that chose an expert twice counts once: the ids (ids_where_1) are not shown to be distinct, as those of topk are",
    distinct=False,
    repeats=True,
)
class RealTokensTwice(RealTokensIfAny):
    pass


@mutant("no weight belongs to an expert")
class WhereNothingIs(SurePairs):
    """A condition of the running sum."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where((ids == e) & (out[:, :1] <= 0))
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@mutant("expert 1 differs from expert 0: it reads pair unsqueeze_1, that one pair unsqueeze", distinct=False)
class WeightsBlanked(SurePairs):
    """x[mask] = number is no selection of rows."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, left = torch.zeros_like(x), weights.clone()
        for e in range(E):
            left[ids == 2] = float(e)
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.run(e, x[t]) * left[t, k, None])
        return out


# -- gates ----------------------------------------------------------------------------------


@mutant(NOT_IDS.format("gt"))
class GatesOfSoftmax(Gates):
    """Nothing says how many a token has."""

    def gates(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return (x[:, :E].softmax(-1) - 0.25).relu()


@mutant(NOT_IDS.format("gt"))
class GatesOnOnes(Gates):
    def gates(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.full((x.shape[0], E), 0.5).scatter(1, ids, weights)


@mutant(NOT_IDS.format("gt_1"))
class GatesAboveLess(Gates):
    """Zeros are above it."""

    def chosen(self, gates: Tensor, e: int) -> Tensor:
        return torch.where(gates[:, e] > -0.5)[0]


@mutant(NOT_IDS.format("lt"))
class GatesBelow(Gates):
    def chosen(self, gates: Tensor, e: int) -> Tensor:
        return torch.where(gates[:, e] < 0.5)[0]


@mutant(NOT_IDS.format("ne"), forward_only=True)
class GatesOverNothing(Gates):
    """0 / 0 is not zero: a token without gates goes to all experts."""

    def gates(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates = super().gates(x, ids, weights)
        return gates / gates.sum(-1, keepdim=True)

    def chosen(self, gates: Tensor, e: int) -> Tensor:
        return torch.where(gates[:, e] != 0)[0]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, ids, weights).nan_to_num(1.0).clamp(-2, 2)


@mutant("column 1 of the weights is read for the rows of expert 0")
class GatesOfTheNext(Gates):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, out = self.gates(x, ids, weights), torch.zeros_like(x)
        for e in range(E):
            t = self.chosen(gates, e)
            out.index_add_(0, t, self.run(e, x[t]) * gates[t, (e + 1) % E].unsqueeze(1))
        return out


@mutant("scatter is read after it was changed in place through another name")
class GatesChange(Gates):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, out = self.gates(x, ids, weights), torch.zeros_like(x)
        for e in range(E):
            t = self.chosen(gates, e)
            out.index_add_(0, t, self.run(e, x[t]) * gates[t, e].unsqueeze(1))
            gates[:, e] += 1.0
        return out


@mutant(DIFFERENT)
class GatesOfTwoTables(Gates):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        both = self.gates(x, ids, weights), self.gates(x, ids.flip(1), weights)
        for e in range(E):
            t = self.chosen(both[e % 2], e)
            out.index_add_(0, t, self.run(e, x[t]))
        return out
