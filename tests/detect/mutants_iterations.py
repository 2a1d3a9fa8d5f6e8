"""Mutants: iterations that know of each other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.loops import D, E, Listed, Stacked, mutant

# -- mutants: iterations that know of each other --------------------------------------------


@mutant("aten.linear at file.py is not known to be row-wise (it reads sumread)")
class ReadsSum(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t] + out[t]) * weights[t, k, None])
        return out


@mutant("sum along dimension 0 lets rows depend on each other")
class CarriesTensor(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        state = torch.zeros(D)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y = expert(x[t]) + state
            state = state + y.sum(0)
            out.index_add_(0, t, y * weights[t, k, None])
        return out


@mutant("expert 1 differs from expert 0: 0.5 where that has 1.0")
class CarriesNumber(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        scale = 1.0
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None] * scale)
            scale *= 0.5
        return out


@mutant("CountsChosen.forward carries count from one iteration to the next and skips some")
class CountsChosen(Stacked):
    """The number of iterations that ran is used after the loop over chosen experts."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        count = 0
        for e in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, self.expert(e[0], x[t]) * weights[t, k, None])
            count += 1
        return out / count


@mutant("CountsIfAny.forward carries count from one iteration to the next and skips some")
class CountsIfAny(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        count = 1
        for e, expert in enumerate(self.experts):
            if (ids == e).any():
                t, k = torch.where(ids == e)
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
                count += 1
        return out / count


@mutant("expert 3 adds something else when some experts have no rows")
class PositionAmongChosen(Stacked):
    """The i-th chosen expert has the weights i."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for i, e in enumerate(torch.greater(mask.sum((-1, -2)), 0).nonzero()):
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, self.expert(i, x[t]) * weights[t, k, None])
        return out


@mutant("expert 3 adds something else when some experts have no rows")
class ZipWithChosen(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for e, expert in zip(torch.greater(mask.sum((-1, -2)), 0).nonzero(), self.experts):  # noqa: B905
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("CountsInAttribute.run (file.py) sets the attribute calls")
class CountsInAttribute(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def run(self, e: int, x: Tensor) -> Tensor:
        self.calls += 1
        return self.experts[e](x) * self.calls


@mutant("it changes self.seen when it runs")
class AppendsToList(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def run(self, e: int, x: Tensor) -> Tensor:
        self.seen.append(e)
        return self.experts[e](x)


@mutant("it changes self.experts.1.stats when it runs")
class AppendsToChildsDict(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[1].stats = {"rows": []}

    def run(self, e: int, x: Tensor) -> Tensor:
        self.experts[1].stats["rows"].append(e)
        return self.experts[e](x)


SEEN: list[int] = []


@mutant("it changes SEEN when it runs")
class AppendsToGlobal(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        SEEN.append(e)
        return self.experts[e](x)


@mutant("it changes self.kept when it runs")
class KeepsTensors(Listed):
    """A list of what the experts computed, for somebody outside."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}

    def run(self, e: int, x: Tensor) -> Tensor:
        y = self.experts[e](x)
        self.kept[e] = y
        return y


@mutant("Prints.run (file.py) calls print")
class Prints(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        print("", end="")
        return self.experts[e](x)


@mutant("aten.copy_ at file.py changes an input of the region in place")
class CountsIntoBuffer(Stacked):
    """A buffer that changes only for chosen experts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(E))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for e in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, self.expert(e[0], x[t]) * weights[t, k, None])
            self.load[e[0]] += 1
        return out
