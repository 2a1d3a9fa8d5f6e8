"""Mutants of loops whose body is in a helper."""

import torch
from torch import Tensor

from tests.detect.idioms_helpers import AddedByHelper, HelperReturnsEarly, SummedByPython
from tests.detect.loops import E, Stacked, mutant


@mutant("1 experts are used, w2 holds 4")
class HelperStartsFromInput(AddedByHelper):
    def one(self, x: Tensor, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        t, k = torch.where(ids == e)
        return x.clone().index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])


@mutant("1 experts are used, w2 holds 4")
class HelperScaled(AddedByHelper):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = self.total(x)
        for e in range(E):
            out = torch.add(out, self.one(x, ids, weights, e), alpha=2)
        return out


@mutant("the loop visits experts [1], not each of 0..0 once")
class HelperCalledTwice(AddedByHelper):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = self.total(x)
        for e in (0, 1, 2, 3, 1):
            out += self.one(x, ids, weights, e)
        return out


@mutant("3 experts are used, w2 holds 4")
class HelperLeftOut(AddedByHelper):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = self.total(x)
        for e in range(E - 1):
            out += self.one(x, ids, weights, e)
        return out


@mutant("1 experts are used, w2 holds 4")
class HelperSeesTheSum(AddedByHelper):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = self.total(x)
        for e in range(E):
            out = out + self.one(x + out, ids, weights, e)
        return out


@mutant("1 experts are used, w2 holds 4", forward_only=True)
class HelperIntoHalf(AddedByHelper):
    """The sum is rounded each time, where it is of another dtype."""

    def total(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x, dtype=torch.bfloat16)


@mutant("2 experts are used, w2 holds 4")
class HelperOfOtherIds(AddedByHelper):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, other = self.total(x), (ids + 1) % E
        for e in range(E):
            out += self.one(x, other if e == 2 else ids, weights, e)
        return out


@mutant("the loop visits experts [3], not each of 0..0 once")
class PartUsedElsewhere(AddedByHelper):
    """What one expert added is used once more."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = self.total(x)
        for e in range(E):
            part = self.one(x, ids, weights, e)
            out += part
        return out + part.relu()


@mutant("no weight belongs to an expert")
class SumOfProducts(SummedByPython):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.ones_like(x)
        for e in range(E):
            out = out * self.one(x, ids, weights, e)
        return out


@mutant(
    "aten.index_put_ at file.py overwrites what another expert of the same token wrote", distinct=False, repeats=True
)
class SetTwiceInHelper(HelperReturnsEarly):
    """A token that chose an expert twice is set once."""

    def one(self, x: Tensor, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        t, k = torch.where(ids == e)
        y = torch.zeros_like(x)
        y[t] = self.run(e, x[t]) * weights[t, k, None]
        return y


@mutant("aten.index_put_ at file.py overwrites what another expert of the same token wrote")
class SetAgain(HelperReturnsEarly):
    """Each expert overwrites what others set."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(E):
            mask = (ids == e).any(-1)
            y[mask] = self.run(e, x[mask]) * (weights * (ids == e)).sum(-1)[mask, None]
        return y


@mutant("what surrounds the sum differs when some experts have no rows")
class ReturnsOnesEarly(HelperReturnsEarly):
    def one(self, x: Tensor, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        if not (ids == e).any():
            return torch.ones_like(x)
        return super().one(x, ids, weights, e)


@mutant("what surrounds the sum differs when some experts have no rows")
class ClosureCounts(Stacked):
    """A closure that sets a variable of the function around it."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, seen = torch.zeros_like(x), 0

        def add(e: int) -> None:
            nonlocal seen
            t, k = torch.where(ids == e)
            if t.numel() > 0:
                seen += 1
                out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])

        for e in range(E):
            add(e)
        return out / max(seen, 1)


@mutant("1 experts are used, w2 holds 4")
class OneBufferForAllHelpers(Stacked):
    """What each adds is added again with the next."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, part = torch.zeros_like(x), torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            part.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
            out += part
        return out


@mutant("aten.index_put_ at file.py overwrites what another expert of the same token wrote")
class LastOneSets(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            y = self.expert(e, x[t]) * weights[t, k, None]
            if e == E - 1:
                out[t] = y
            else:
                out.index_add_(0, t, y)
        return out


@mutant("nothing is summed over experts")
class WeighedWhereNotChosen(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            mine = torch.where(ids == e, torch.zeros_like(weights), weights).sum(-1, keepdim=True)
            out = out + mine * self.expert(e, x)
        return out
