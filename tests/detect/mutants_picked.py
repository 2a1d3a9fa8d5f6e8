"""Mutants of weights that are gathered for each pair."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_picked import PickedScaled, PickedTransposed, PickedWeights, PickedWithBias
from tests.detect.loops import E, mutant


@mutant("nothing is summed over experts", distinct=False)
class PickedByOthers(PickedWeights):
    """The last product by the ids of the token before."""

    def weights_of(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.w1[ids], self.w3[ids], self.w2[ids.roll(1, 0)]


@mutant("nothing is summed over experts", distinct=False)
class PickedTurned(PickedWeights):
    """The other expert of the token."""

    def weights_of(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.w1[ids], self.w3[ids], self.w2[ids.flip(1)]


@mutant("nothing is summed over experts", distinct=False)
class PickedShuffled(PickedWeights):
    def weights_of(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.w1[ids].roll(1, 0), self.w3[ids], self.w2[ids]


@mutant("nothing is summed over experts", distinct=False)
class PickedMixed(PickedWeights):
    def first(self, x: Tensor, w1: Tensor, w3: Tensor) -> Tensor:
        h = super().first(x, w1, w3)
        return h - h.mean(0)


@mutant("nothing is summed over experts", distinct=False)
class PickedMixedInAToken(PickedWeights):
    def first(self, x: Tensor, w1: Tensor, w3: Tensor) -> Tensor:
        return super().first(x, w1, w3).softmax(1)


@mutant("nothing is summed over experts", distinct=False)
class PickedOtherSlots(PickedWeights):
    def first(self, x: Tensor, w1: Tensor, w3: Tensor) -> Tensor:
        return super().first(x, w1, w3)[:, [1, 0]]


@mutant("nothing is summed over experts", distinct=False)
class PickedFirstSlot(PickedWeights):
    def last(self, h: Tensor, w2: Tensor, ids: Tensor) -> Tensor:
        return torch.einsum("tao, taio -> tai", h[:, :1], w2)


@mutant("nothing is summed over experts", distinct=False)
class PickedSummedBefore(PickedWeights):
    """The first product's inner sum runs over the slots too."""

    def last(self, h: Tensor, w2: Tensor, ids: Tensor) -> Tensor:
        return torch.einsum("tao, tbio -> tbi", h, w2)


@mutant("nothing is summed over experts", distinct=False)
class PickedAcross(PickedWeights):
    def total(self, y: Tensor, weights: Tensor) -> Any:
        return torch.einsum("tai,tb -> ti", y, weights)


@mutant("slice_1 is (11, 1), the expert ids are (11, 2)", distinct=False)
class PickedOneWeight(PickedWeights):
    def total(self, y: Tensor, weights: Tensor) -> Any:
        return torch.einsum("tai,ta -> ti", y, weights[:, :1])


@mutant("nothing is summed over experts", distinct=False)
class PickedMeans(PickedWeights):
    def total(self, y: Tensor, weights: Tensor) -> Any:
        return (y * weights[..., None]).mean(1)


@mutant("nothing is summed over experts", distinct=False)
class PickedOverTokens(PickedWeights):
    def total(self, y: Tensor, weights: Tensor) -> Any:
        return (y * weights[..., None]).sum(0)


@mutant("nothing is summed over experts", distinct=False)
class PickedDropout(PickedWeights):
    def last(self, h: Tensor, w2: Tensor, ids: Tensor) -> Tensor:
        return super().last(F.dropout(h, 0.5), w2, ids)


@mutant("nothing is summed over experts", distinct=False)
class PickedNoGrad(PickedWeights):
    def first(self, x: Tensor, w1: Tensor, w3: Tensor) -> Tensor:
        with torch.no_grad():
            return super().first(x, w1, w3)


@mutant("4 experts are used, w3 holds 8", distinct=False)
class PickedOfFewer(PickedWeights):
    """Ids that no expert of the last product has are an error there alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w3 = torch.nn.Parameter(torch.cat([self.w3.detach(), self.w3.detach()]))


@mutant("nothing is summed over experts", distinct=False)
class PickedChanged(PickedWeights):
    """The gathered weights change after they are read by one product."""

    def first(self, x: Tensor, w1: Tensor, w3: Tensor) -> Tensor:
        h = torch.einsum("ti, taoi -> tao", x.detach(), w1)
        ids = torch.zeros(x.shape[0], 1, dtype=torch.int64)
        return h + torch.einsum("ti, taoi -> tao", x, self.w3[ids])


@mutant("clone is changed in place while the experts run", distinct=False, forward_only=True)
class PickedIdsChanged(PickedWeights):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        ids = ids.clone()
        w1, w3, w2 = self.weights_of(ids)
        y = self.last(self.first(x, w1, w3), w2, ids)
        ids.add_(1).remainder_(E)
        return self.total(y, weights) + self.w1[ids].sum()


@mutant("view is read after it was changed in place through another name", distinct=False)
class PickedReadAfterBias(PickedWithBias):
    """Another name of what changes in place."""

    def bias(self, y: Tensor, ids: Tensor) -> Tensor:
        seen = y.view(-1)
        y += self.b2[ids]
        return y + seen.view_as(y)


@mutant("nothing is summed over experts", distinct=False)
class PickedByTokens(PickedTransposed):
    """A weight a token, not one a pair."""

    def total(self, y: Tensor, weights: Tensor) -> Any:
        return (y * weights[:, :1, None].sin()).sum(1)


@mutant("nothing is summed over experts", distinct=False)
class PickedLookedUp(PickedWeights):
    """Rows of a table are no experts."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        return (self.w1[:, 0][ids] * weights[..., None]).sum(1) + x


@mutant("nothing is summed over experts", distinct=False)
class PickedScaleOfOthers(PickedScaled):
    """The scale is that of the experts of the token before."""

    def scale(self, ids: Tensor) -> Tensor:
        return self.s1[ids.roll(1, 0)]


@mutant("nothing is summed over experts", distinct=False)
class PickedScaleTurned(PickedScaled):
    def scale(self, ids: Tensor) -> Tensor:
        return self.s1[ids.flip(1)]


@mutant("nothing is summed over experts", distinct=False)
class PickedScaleOfSlots(PickedScaled):
    """A scale for each k, whoever the expert is."""

    def scale(self, ids: Tensor) -> Tensor:
        return self.s1[None, : ids.shape[1]]


@mutant("nothing is summed over experts", distinct=False)
class PickedScaleOfTokens(PickedScaled):
    def scale(self, ids: Tensor) -> Tensor:
        return self.s1[ids].mean(1, keepdim=True)


@mutant("nothing is summed over experts", distinct=False)
class PickedScaleByNorm(PickedScaled):
    """Scaled by what the gathered weights of a token have in common."""

    def scale(self, ids: Tensor) -> Tensor:
        s = self.s1[ids]
        return s / s.amax(1, keepdim=True)
