"""Mutants of experts that pass tokens on, of weights that lie flat, and of experts that go by a name."""

from typing import Any

import torch
from torch import Tensor

from tests.detect.idioms_forms import FlatWeights, LastPassesOn, Named
from tests.detect.loops import FF, D, E, Listed, mutant

# -- experts without weights ----------------------------------------------------------------


@mutant("expert 1 differs from expert 0: token x where that has aten.linear")
class MiddlePassesOn(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return x if e == 1 else super().run(e, x)


@mutant("expert 1 differs from expert 0: aten.linear where that has token x")
class FirstPassesOn(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return x if e == 0 else super().run(e, x)


@mutant("expert 2 differs from expert 0: token x where that has aten.linear")
class LastTwoDiffer(LastPassesOn):
    def idle(self, e: int, x: Tensor) -> Tensor:
        return x if e == 2 else 2 * x


@mutant("expert 2 differs from expert 0: aten.mul.Tensor where that has aten.linear")
class LastHaveWeights(LastPassesOn):
    def idle(self, e: int, x: Tensor) -> Tensor:
        return x * self.experts[0].up.weight[e]


@mutant("mean along dimension 0 lets rows depend on each other")
class LastMixesTokens(LastPassesOn):
    def idle(self, e: int, x: Tensor) -> Tensor:
        return x - x.mean(0)


@mutant("expert 2 differs from expert 0: it reads token mul, that one token x")
class LastOfOtherTokens(LastPassesOn):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, other = torch.zeros_like(x), x * 2
        for e in range(E):
            t, k = torch.where(ids == e)
            y = self.experts[e](other[t] if e == 2 else x[t])
            out.index_add_(0, t, y * weights[t, k, None])
        return out


@mutant("the loop visits experts [0, 1, 3], not each of 0..2 once")
class LastLeftOut(LastPassesOn):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in (0, 1, 3):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@mutant("clone is changed in place while the experts run", forward_only=True)
class PassedOnChanged(LastPassesOn):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x = x.clone()
        out = super().forward(x, ids, weights)
        x.mul_(2)
        return out + x


# -- flat weights ---------------------------------------------------------------------------


@mutant("4 experts are used, view_1 holds 8")
class FlatHalves(FlatWeights):
    def pick(self, flat: Tensor, e: int) -> Tensor:
        return flat.view(2 * E, FF // 2, D)[e]


@mutant("expert 1 differs from expert 0: it reads slice view, that one slice view_1")
class FlatOfTwoStacks(FlatWeights):
    def pick(self, flat: Tensor, e: int) -> Tensor:
        return (self.mlp.up if e == 1 else flat).view(E, FF, D)[e]


# -- names ----------------------------------------------------------------------------------


@mutant("Python makes a text of a tensor")
class NamedByData(Named):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, ids, weights) * len(f"{ids[0, 0]}")


@mutant("Python makes a text of a tensor")
class NamedByList(Named):
    def name(self, e: Tensor) -> Any:
        return f"expert_{e}".replace("[", "").replace("]", "").replace("tensor(", "").replace(")", "")
