"""Mutants of experts on slots: experts that mix rows or differ, slots elsewhere, and batches that need no rewrite."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.idioms_choice import best, scores
from tests.detect.idioms_slots import Slots, slots
from tests.detect.loops import FF, D, E, mutant, weight


@mutant("mean along dimension 0 lets rows depend on each other")
class SlotMeans(Slots):
    def run(self, e: int, x: Tensor) -> Tensor:
        y = super().run(e, x)
        return y - y.mean(0)


@mutant("expert 1 differs from expert 0: 2 where that has 1")
class SlotsOfOther(Slots):
    def run(self, e: int, x: Tensor) -> Tensor:
        return super().run(e, x) * (2 if e == 1 else 1)


@mutant("no weight belongs to an expert")
class SlotsOfOne(Slots):
    def run(self, e: int, x: Tensor) -> Tensor:
        return super().run(0, x)


@mutant("dropout with p = 0.5 draws random numbers expert by expert")
class SlotsDropout(Slots):
    def run(self, e: int, x: Tensor) -> Tensor:
        return F.dropout(super().run(e, x), 0.5)


@mutant("expert 1 runs on other rows than those of its slots")
class SlotsForAll(Slots):
    """Every expert on the same rows: a batch would copy them."""

    def part(self, dispatched: Tensor, e: int) -> Tensor:
        return dispatched[0]


@mutant("linear_1 is not shown to be one value for each token of an expert's list")
class SlotsInChain(Slots):
    """Each expert reads what the one before it made."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        combine = slots(ids, weights)
        made: list[Tensor] = []
        dispatched = torch.einsum("tec,td->ecd", combine.bool().to(x.dtype), x)
        for e in range(E):
            made.append(self.run(e, dispatched[e] + (made[-1] if made else 0)))
        return torch.einsum("tec,ecd->td", combine, torch.stack(made))


@mutant("einsum_1 is read after it was changed in place through another name", forward_only=True)
class SlotsChange(Slots):
    """In memory that all slots share."""

    def part(self, dispatched: Tensor, e: int) -> Tensor:
        return dispatched.view(-1, D).mul_(1.5).view_as(dispatched)[e]


class Batched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = weight(E, D, FF), weight(E, FF, D)


@mutant("an expert that a token chose twice has one place for both: the ids (ids) are not shown to be distinct, as those "
        "of topk are", distinct=False)  # fmt: skip
class SlotsInOneBatch(Batched):
    """As GShard writes it: there is nothing to gather in the experts' products."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        combine = slots(ids, weights)
        dispatched = torch.einsum("tec,td->ecd", combine.bool().to(x.dtype), x)
        made = torch.einsum("ecf,efd->ecd", F.relu(torch.einsum("ecd,edf->ecf", dispatched, self.up)), self.down)
        return torch.einsum("tec,ecd->td", combine, made)


@mutant("aten.bmm at file.py multiplies the rows of all experts at once already")
class ChoiceInOneBatch(Batched):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, tokens = best(scores(x, weights))
        made = torch.bmm(F.relu(torch.bmm(x[tokens], self.up)), self.down) * gates.unsqueeze(-1)
        return torch.zeros_like(x).index_add_(0, tokens.flatten(), made.flatten(0, 1))


@mutant("aten.copy_ at file.py changes an input of the region in place", forward_only=True)
class SlotsCount(Slots):
    """A buffer of the caller's, set beside each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(E))

    def part(self, dispatched: Tensor, e: int) -> Tensor:
        self.load[e] = dispatched.shape[1]
        return dispatched[e]


@mutant("aten.add_.Tensor at file.py changes an input of the region in place", forward_only=True)
class SlotsCountOneMore(SlotsCount):
    def part(self, dispatched: Tensor, e: int) -> Tensor:
        self.load[e].add_(1)
        return dispatched[e]
