"""Idioms that are rewritten: experts that pass tokens on, weights that lie flat, experts that go by a name."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.loops import FF, D, E, Listed, Mlp, Stacked, idiom, weight

EXPERTS = 2  # with weights; the last E - EXPERTS have none


@idiom(any_ids=True)
class LastPassesOn(Listed):
    """`idle` is what the experts without weights do."""

    def run(self, e: int, x: Tensor) -> Tensor:
        return super().run(e, x) if e < EXPERTS else self.idle(e, x)

    def idle(self, e: int, x: Tensor) -> Tensor:
        return x


@idiom(any_ids=True)
class LastNormalises(LastPassesOn):
    def idle(self, e: int, x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,)) * 0.5


@idiom()
class PassedOnIfChosen(Stacked):
    """The stack of the first layer has rows that nobody reads."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for chosen in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            e = int(chosen.item())
            k, t = torch.where(mask[e].squeeze(0))
            if t.numel() == 0:
                continue
            y = x[t] if e >= EXPERTS else F.linear(F.silu(F.linear(x[t], self.w13[e])[:, :FF]), self.w2[e])
            out.index_add_(0, t, y * weights[t, k, None])
        return out


class Flat(nn.Module):
    """The weights of all experts one under the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = weight(E * FF, D), weight(E * FF, D)


@idiom()
class FlatWeights(nn.Module):
    """`pick` is what a mutant changes."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Flat()

    def pick(self, flat: Tensor, e: int) -> Tensor:
        return flat.view(-1, FF, D)[e]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E + 1).permute(2, 1, 0)
        for e in range(E):
            k, t = torch.where(mask[e])
            up, down = self.pick(self.mlp.up, e), self.pick(self.mlp.down, e)
            y = F.silu(x[t].matmul(up.T)).matmul(down)
            out.index_add_(0, t, y * weights[t, k, None])
        return out


@idiom()
class Named(nn.ModuleDict):
    """`name` is what a mutant changes."""

    def __init__(self) -> None:
        super().__init__({f"expert_{e}": Mlp() for e in range(E)})

    def name(self, e: Tensor) -> str:
        return f"expert_{e[0]}"

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for e in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            k, t = torch.where(mask[e].squeeze(0))
            out.index_add_(0, t, self[self.name(e)](x[None, t].reshape(-1, D)) * weights[t, k, None])
        return out


@idiom()
class FlatFromOtherIndex(FlatWeights):
    def pick(self, flat: Tensor, e: int) -> Tensor:
        return flat.view(E, FF, D)[(e + 1) % E]


@idiom()
class ThreeOfOneName(Named):
    def name(self, e: Tensor) -> str:
        return f"expert_{min(int(e[0]), 1)}"
