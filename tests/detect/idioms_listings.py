"""Idioms that are rewritten: a dispatcher that lists all gates which are not zero, sorted by expert (Shazeer et al.)."""

from typing import Any

import torch
from torch import Tensor

from tests.detect.loops import E, Listed, idiom


class Dispatcher:
    """As in many repositories.  Its methods are what a mutant changes."""

    def __init__(self, num_experts: int, gates: Tensor) -> None:
        self.gates, self.num_experts = gates, num_experts
        by_column, orders = torch.nonzero(gates).sort(0)
        _, self.expert = by_column.split(1, dim=1)
        self.token = torch.nonzero(gates)[orders[:, 1], 0]
        self.sizes: Any = self.count().tolist()
        self.weights = torch.gather(self.weighed()[self.token.flatten()], 1, self.expert)

    def count(self) -> Tensor:
        return (self.gates > 0).sum(0)

    def weighed(self) -> Tensor:
        return self.gates

    def dispatch(self, x: Tensor) -> Any:
        return torch.split(x[self.token].squeeze(1), self.sizes, dim=0)

    def combine(self, parts: list[Tensor], weigh: bool = True) -> Tensor:
        rows = torch.cat(parts, 0)
        if weigh:
            rows = rows.mul(self.weights)
        zeros = torch.zeros(self.gates.size(0), parts[-1].size(1), requires_grad=True, device=rows.device)
        return zeros.index_add(0, self.token, rows.to(zeros.dtype))


@idiom(distinct=False)
class Dispatched(Listed):
    """`gates`, `dispatcher` and `run` are what a mutant changes."""

    def gates(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :E]).scatter(1, ids, weights.softmax(-1))

    def dispatcher(self, gates: Tensor) -> Dispatcher:
        return Dispatcher(E, gates)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        dispatcher = self.dispatcher(self.gates(x, ids, weights))
        rows = dispatcher.dispatch(x)
        return dispatcher.combine([self.run(e, rows[e]) for e in range(E)])


@idiom(distinct=False)
class DispatchedSome(Dispatched):
    """Some chosen gates are zero: fewer rows than pairs, and tokens of nobody."""

    def gates(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        kept = (weights - 0.6).relu()
        return torch.zeros_like(x[:, :E]).scatter(1, ids, kept / (kept.sum(-1, keepdim=True) + 0.1))


class InLogarithms(Dispatcher):
    def combine(self, parts: list[Tensor], weigh: bool = True) -> Tensor:
        total = super().combine([p.exp() for p in parts], weigh)
        total[total == 0] = 1e-3
        return total.log()


@idiom(distinct=False)
class DispatchedInLogarithms(DispatchedSome):
    def dispatcher(self, gates: Tensor) -> Dispatcher:
        return InLogarithms(E, gates)


class NotZero(Dispatcher):
    def count(self) -> Tensor:
        return (self.gates != 0).sum(0)


@idiom(distinct=False)
class DispatchedOfAnySign(Dispatched):
    def dispatcher(self, gates: Tensor) -> Dispatcher:
        return NotZero(E, gates)

    def gates(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :E]).scatter(1, ids, weights - 0.6)


@idiom(distinct=False)
class DispatchedByOffsets(DispatchedSome):
    """Nothing is joined: each expert's rows are added where its tokens begin."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        dispatcher = self.dispatcher(self.gates(x, ids, weights))
        rows, out, start = dispatcher.dispatch(x), torch.zeros_like(x), 0
        for e in range(E):
            end = start + dispatcher.sizes[e]
            out.index_add_(0, dispatcher.token[start:end], self.run(e, rows[e]) * dispatcher.weights[start:end])
            start = end
        return out


@idiom(distinct=False)
class DispatchedUnweighed(DispatchedSome):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        dispatcher = self.dispatcher(self.gates(x, ids, weights))
        parts = [expert(rows) for expert, rows in zip(self.experts, dispatcher.dispatch(x), strict=True)]
        return dispatcher.combine(parts, weigh=False)
