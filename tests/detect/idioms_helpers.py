"""Idioms that are rewritten: the body of the loop is a method, a function of its own or a closure."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.loops import E, Listed, Stacked, idiom


@idiom(any_ids=True)
class AddedByHelper(Stacked):
    """`one` and `total` are what a mutant changes."""

    def one(self, x: Tensor, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        t, k = torch.where(ids == e)
        return torch.zeros_like(x).index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])

    def total(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = self.total(x)
        for e in range(E):
            out += self.one(x, ids, weights, e)
        return out


@idiom(any_ids=True)
class AddedByHelperFromTheRight(AddedByHelper):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = self.total(x)
        for e in range(E):
            out = torch.add(self.one(x, ids, weights, e), out)
        return out


@idiom(any_ids=True)
class SummedByPython(Listed):
    def one(self, x: Tensor, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        t, k = torch.where(ids == e)
        return torch.zeros_like(x).index_add(0, t, self.run(e, x[t]) * weights[t, k, None])

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return sum(self.one(x, ids, weights, e) for e in range(E))  # type: ignore[return-value]


@idiom(any_ids=True)
class HelperReturnsEarly(Listed):
    """`one` is what a mutant changes."""

    def one(self, x: Tensor, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        mask = (ids == e).any(-1)
        if not mask.any():
            return torch.zeros_like(x)
        y = torch.zeros_like(x)
        y[mask] = self.run(e, x[mask]) * (weights * (ids == e)).sum(-1)[mask, None]
        return y

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            out = out + self.one(x, ids, weights, e)
        return out


@idiom(any_ids=True)
class AddsInHelper(Stacked):
    def add(self, out: Tensor, x: Tensor, ids: Tensor, weights: Tensor, e: int) -> None:
        t, k = torch.where(ids == e)
        out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            self.add(out, x, ids, weights, e)
        return out


@idiom(any_ids=True)
class AddsInClosure(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)

        def add(e: int) -> None:
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])

        for e in range(E):
            add(e)
        return out


def swiglu(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    gate, up = F.linear(x, w13).chunk(2, -1)
    return F.linear(F.silu(gate) * up, w2)


@idiom(any_ids=True)
class BodyIsAFunction(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, swiglu(x[t], self.w13[e], self.w2[e]) * weights[t, k, None])
        return out
