"""Mutants of a dispatcher that lists all gates which are not zero."""

from typing import Any

import torch
from torch import Tensor

from tests.detect.idioms_listings import Dispatched, DispatchedSome, Dispatcher
from tests.detect.loops import E, mutant

BETWEEN = (
    "moe_ep_capture.rows_between at file.py slices between numbers that are not where an expert's rows begin and end"
)


@mutant(BETWEEN)
class SignsMatter(Dispatched):
    """Not zero, and above zero, are not the same of these gates."""

    def gates(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :E]).scatter(1, ids, weights)


class CountsMore(Dispatcher):
    def count(self) -> Tensor:
        return (self.gates >= 0).sum(0) * 0 + (self.gates > 0).sum(0)


@mutant(BETWEEN)
class CountedElsewhere(Dispatched):
    def dispatcher(self, gates: Tensor) -> Dispatcher:
        return CountsMore(E, gates)


class OtherTable(Dispatcher):
    def weighed(self) -> Tensor:
        return self.gates * 2


@mutant("aten.gather at file.py is not known to be row-wise (it reads listing)")
class WeighedByAnother(Dispatched):
    def dispatcher(self, gates: Tensor) -> Dispatcher:
        return OtherTable(E, gates)


class ByToken(Dispatcher):
    """Sorted by token: its rows are no expert's."""

    def __init__(self, num_experts: int, gates: Tensor) -> None:
        super().__init__(num_experts, gates)
        self.token = torch.nonzero(gates)[:, 0]


@mutant("aten.index.Tensor at file.py is not known to be row-wise (it reads listing)")
class SortedByToken(Dispatched):
    def dispatcher(self, gates: Tensor) -> Dispatcher:
        return ByToken(E, gates)


class Backwards(Dispatcher):
    def __init__(self, num_experts: int, gates: Tensor) -> None:
        super().__init__(num_experts, gates)
        _, orders = torch.nonzero(gates).sort(0, descending=True)
        self.token = torch.nonzero(gates)[orders[:, 1], 0]


@mutant("aten.sort at file.py is not known to be row-wise (it reads listing)")
class SortedBackwards(Dispatched):
    def dispatcher(self, gates: Tensor) -> Dispatcher:
        return Backwards(E, gates)


@mutant("expert 1 differs from expert 0: 2 where that has 1")
class SecondDispatchedTwice(DispatchedSome):
    def run(self, e: int, x: Tensor) -> Tensor:
        return super().run(e, x) * (2 if e == 1 else 1)


@mutant("mean along dimension 0 lets rows depend on each other")
class RowsMixed(DispatchedSome):
    def run(self, e: int, x: Tensor) -> Tensor:
        return super().run(e, x) - x.mean(0)


@mutant("moe_ep_capture.cat_rows at file.py joins the rows of experts [1, 0, 2, 3], of 4")
class JoinedInAnotherOrder(Dispatched):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        dispatcher = self.dispatcher(self.gates(x, ids, weights))
        rows = dispatcher.dispatch(x)
        return dispatcher.combine([self.run(e, rows[e]) for e in (1, 0, 2, 3)])


class Negates(Dispatcher):
    def combine(self, parts: list[Tensor], weigh: bool = True) -> Any:
        total = super().combine(parts, weigh)
        total[self.gates[:, 0] > 0] = 0
        return total


@mutant("aten.index_put_ at file.py is not known to be row-wise (it reads index)")
class SetElsewhere(Dispatched):
    def dispatcher(self, gates: Tensor) -> Dispatcher:
        return Negates(E, gates)
