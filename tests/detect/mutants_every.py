"""Mutants of products batched over the experts: zeros that do not stay, tables and sums that are others."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_every import EveryOfZeros, EveryToken, EveryWeighedAfter
from tests.detect.loops import D, E, mutant, weight

NOTHING = "nothing is summed over experts"
NOT_ZERO = "aten.sum.dim_IntList at file.py sums experts that are not shown to make zero of the tokens of others"
TWICE = "a token that chose an expert twice has one entry in the table of weights: the ids (ids) are not shown to be distinct, as those of topk are"


@mutant(NOT_ZERO)
class EveryBias(EveryToken):
    def __init__(self) -> None:
        super().__init__()
        self.b2 = weight(E, D)

    def body(self, rows: Tensor) -> Tensor:
        return super().body(rows) + self.b2[:, None]


@mutant(NOT_ZERO)
class EverySigmoid(EveryToken):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.sigmoid(gate)


@mutant(NOT_ZERO)
class EveryExpOfHidden(EveryToken):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate.exp() + up * 0


@mutant(NOT_ZERO)
class EveryPlusOne(EveryToken):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return up * F.silu(gate) + 1


@mutant(NOT_ZERO)
class EveryClampedAbove(EveryToken):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return (up * gate).clamp(min=0.1)


@mutant(NOT_ZERO)
class EveryClampedByTensor(EveryToken):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.clamp(up * gate, self.w2.square().mean() + 0.1)


@mutant(NOT_ZERO)
class EveryRaised(EveryToken):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate.abs().pow(0.0) * 0.3 + up * 0


@mutant(NOT_ZERO)
class EveryPlusTokens(EveryToken):
    """A residual inside: the token of each expert, weighed by none."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = self.tokens(x, self.scores(ids, weights))
        return self.total(self.body(rows.view(E, -1, D)) + x.repeat(E, 1).view(E, -1, D))


@mutant(NOT_ZERO)
class EveryUnweighed(EveryToken):
    def tokens(self, x: Tensor, scores: Tensor) -> Tensor:
        return x.repeat(E, 1)


@mutant(NOTHING)
class EveryNormalised(EveryToken):
    """0 / 0 has no rule, though it is row-wise."""

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate / (gate.norm(dim=-1, keepdim=True) + 1) + 0 * up


@mutant(NOTHING)
class EveryMeanOverTokens(EveryToken):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return (up - up.mean(1, keepdim=True)) * gate


@mutant(NOTHING)
class EveryFlipped(EveryToken):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return up * gate.flip(0)


@mutant(NOTHING)
class EverySumOverTokens(EveryToken):
    def total(self, y: Tensor) -> Tensor:
        return y.sum(1)


@mutant("view to (4, 11, 6) mixes rows and features")
class EveryInterleaved(EveryToken):
    """The tokens stand in another order than the scores."""

    def tokens(self, x: Tensor, scores: Tensor) -> Tensor:
        return x.repeat_interleave(E, 0) * scores.transpose(0, 1).reshape(-1, 1)


@mutant(NOTHING)
class EveryScoreInterleaved(EveryToken):
    """The scores stand in another order than the tokens."""

    def tokens(self, x: Tensor, scores: Tensor) -> Tensor:
        return x.repeat(E, 1) * scores.reshape(-1, 1)


@mutant(NOTHING)
class EverySoftmaxOfZeros(EveryToken):
    def scores(self, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros(ids.shape[0], E).scatter(1, ids, weights).softmax(-1)


@mutant(NOTHING)
class EverySigmoidOfZeros(EveryToken):
    def scores(self, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros(ids.shape[0], E).scatter(1, ids, weights).sigmoid()


@mutant(NOTHING)
class EverySoftmaxOverTokens(EveryToken):
    def scores(self, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.full((ids.shape[0], E), -torch.inf).scatter(1, ids, weights).softmax(0).nan_to_num()


@mutant(NOTHING)
class EveryOfLittle(EveryToken):
    """Not minus infinity, but a large number: no zero before float32 rounds."""

    def scores(self, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.full((ids.shape[0], E), -3.0).scatter(1, ids, weights).sigmoid()


@mutant(NOTHING)
class EveryAddedToInfinity(EveryToken):
    """Minus infinity plus something is minus infinity."""

    def scores(self, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.full((ids.shape[0], E), -torch.inf).scatter_add(1, ids, weights).sigmoid()


@mutant(NOTHING)
class EveryInfinite(EveryToken):
    def scores(self, ids: Tensor, weights: Tensor) -> Tensor:
        return (torch.full((ids.shape[0], E), -torch.inf).scatter(1, ids, weights) * 0.1).clamp(min=-2)


@mutant(TWICE, distinct=False, repeats=True)
class EveryRepeated(EveryOfZeros):
    pass


@mutant(NOTHING)
class EveryOtherOrderOfBias(EveryWeighedAfter):
    """A bias by token where there are as many as experts."""

    def body(self, rows: Tensor) -> Tensor:
        return super().body(rows) + self.b2.sum(-1)[:, None, None].flip(0).expand(E, rows.shape[1], 1)


@mutant(NOTHING)
class EveryWeighedWithoutGrad(EveryWeighedAfter):
    def body(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            return super().body(rows)


@mutant(NOTHING)
class EveryInPlace(EveryToken):
    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return (up * F.silu(gate)).add_(0.1)
