"""Idioms that are rewritten: tokens are laid out by expert in slots, as GShard does, and each expert runs on its own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.loops import D, E, Listed, Stacked, idiom

CAPACITY = 3


def slots(ids: Tensor, weights: Tensor) -> Tensor:
    """combine [T, E, C]: the weight of token t at place c of expert e."""
    mask = F.one_hot(ids, E)
    places = (mask.sum(1).cumsum(0) - 1).unsqueeze(1).expand_as(mask)
    kept = mask * (places < CAPACITY)
    at = F.one_hot(places.clamp(0, CAPACITY - 1), CAPACITY) * kept.unsqueeze(-1)
    return torch.einsum("tk,tkec->tec", weights, at.to(weights.dtype))


@idiom(distinct=False)
class Slots(Listed):
    """`join` and `part` are what a mutant changes."""

    def part(self, dispatched: Tensor, e: int) -> Tensor:
        return dispatched[e]

    def join(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        combine = slots(ids, weights)
        dispatched = torch.einsum("tec,td->ecd", combine.bool().to(x.dtype), x)
        made = self.join([self.run(e, self.part(dispatched, e)) for e in range(E)])
        return torch.einsum("tec,ecd->td", combine, made)


@idiom(distinct=False)
class SlotsInTheMiddle(Slots):
    def join(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts, 1).transpose(0, 1)


@idiom(distinct=False)
class SlotsOfStacked(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        combine = slots(ids, weights)
        dispatched = torch.einsum("tec,td->ecd", combine.bool().to(x.dtype), x)
        made = torch.cat([self.expert(e, part) for e, part in enumerate(dispatched.unbind(0))])
        return torch.einsum("tec,ecd->td", combine, made.view(E, CAPACITY, D))


@idiom(distinct=False)
class SlotsOfGroups(Listed):
    """As DeepSpeed lays them out: [groups, E, C, D], in pieces of one expert."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        combine = slots(ids, weights)
        dispatched = torch.einsum("sec,sm->ecm", combine.bool().type_as(x), x).reshape(1, E, -1, D)
        pieces = dispatched.chunk(E, dim=1)
        made = torch.cat([expert(piece) for expert, piece in zip(self.experts, pieces, strict=True)], dim=1)
        return torch.einsum("sec,ecm->sm", combine, made.reshape(E, -1, D))
