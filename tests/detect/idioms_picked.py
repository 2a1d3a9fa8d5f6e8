"""Idioms that are rewritten: each pair of a token and an expert has weights of its own, gathered by the ids."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.loops import FF, D, E, idiom, weight


@idiom(distinct=False)
class PickedWeights(nn.Module):
    """`weights_of`, `first`, `last` and `total` are what a mutant changes."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = weight(E, FF, D), weight(E, FF, D), weight(E, D, FF)

    def weights_of(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.w1[ids], self.w3[ids], self.w2[ids]

    def first(self, x: Tensor, w1: Tensor, w3: Tensor) -> Tensor:
        return F.silu(torch.einsum("ti, taoi -> tao", x, w1)) * torch.einsum("ti, taoi -> tao", x, w3)

    def last(self, h: Tensor, w2: Tensor, ids: Tensor) -> Tensor:
        return torch.einsum("tao, taio -> tai", h, w2)

    def total(self, y: Tensor, weights: Tensor) -> Any:
        return torch.einsum("tai,ta -> ti", y, weights)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        w1, w3, w2 = self.weights_of(ids)
        return self.total(self.last(self.first(x, w1, w3), w2, ids), weights)


@idiom(distinct=False)
class PickedWithBias(nn.Module):
    """Interleaved gates, clamped; biases, one added in place; a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1, self.w2, self.b2 = weight(E, 2 * FF, D), weight(E, 2 * FF), weight(E, D, FF), weight(E, D)

    def act(self, h: Tensor) -> Tensor:
        gate, up = h[..., ::2], h[..., 1::2]
        gate, up = gate.clamp(min=None, max=0.7), up.clamp(min=-0.7, max=0.7)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    def bias(self, y: Tensor, ids: Tensor) -> Tensor:
        y += self.b2[ids, ...]
        return y

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        h = torch.einsum("beck,bk->bec", self.w1[ids, ...], x) + self.b1[ids, ...]
        y = self.bias(torch.einsum("beck,bek->bec", self.w2[ids, ...], self.act(h)), ids)
        return x + torch.einsum("bec,be->bc", y, weights)


@idiom(distinct=False)
class PickedTransposed(PickedWeights):
    """Weights as [E, D, F]; one product for gate and up; multiplied and summed in two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.w13, self.w2 = weight(E, D, 2 * FF), weight(E, FF, D)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        gate, up = torch.einsum("td,tkdf->tkf", x, self.w13[ids]).chunk(2, dim=-1)
        return self.total(torch.einsum("tkf,tkfd->tkd", F.gelu(gate) * up, self.w2[ids]), weights)

    def total(self, y: Tensor, weights: Tensor) -> Any:
        return (y * weights.unsqueeze(-1)).sum(dim=1)


@idiom(top_k=1)
class PickedAlone(PickedWeights):
    """One expert a token, and no weights."""

    def total(self, y: Tensor, weights: Tensor) -> Any:
        return y.sum(1)


@idiom(distinct=False)
class PickedAndSeen(PickedWeights):
    """The experts' results are returned too."""

    def total(self, y: Tensor, weights: Tensor) -> Any:
        return super().total(y, weights), y


@idiom(distinct=False)
class PickedScaled(PickedWeights):
    """Weights are cast and scaled behind the gather, by what belongs to their expert, to all, or is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.s1, self.s2, self.row = weight(E, FF, 1), weight(E, 1, 1), weight(FF, 1)

    def weights_of(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w1 = (self.w1[ids].double() * self.scale(ids).double()).float()
        return w1, self.w3[ids] * self.row * 2.0, self.w2[ids] - self.s2[ids].sigmoid()

    def scale(self, ids: Tensor) -> Tensor:
        return self.s1[ids]
