"""Idioms that are rewritten: tables of slots of tokens in groups [G, S, E, C], and of all choices of a token at once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.idioms_gshard import GShard, GShardOfTwo
from tests.detect.loops import FF, D, E, idiom, weight

CAPACITY = 3


# -- groups of tokens -----------------------------------------------------------------------


@idiom(flat=True, distinct=False)
class GroupsOfSlots(nn.Module):
    """As GShard and Mesh-TensorFlow write it: places are counted in each group.  The methods are what others change."""

    capacity = CAPACITY

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.b1, self.b2 = weight(E, D, FF), weight(E, FF, D), weight(E, 1, FF), weight(E, 1, D)

    def groups(self, x: Tensor) -> Tensor:
        """Two groups, one of which has the tokens in another order."""
        return torch.stack([x, x.flip(0)])

    def places(self, mask: Tensor) -> Tensor:
        return torch.cumsum(mask, 1) - 1

    def combine(self, ids: Tensor, weights: Tensor) -> Tensor:
        mask = F.one_hot(ids, E)
        places = self.places(mask)
        mask = mask * (places < self.capacity)
        at = F.one_hot((places * mask).sum(-1), self.capacity)
        return weights[:, :, None, None] * mask[:, :, :, None] * at[:, :, None, :]

    def laid(self, dispatch: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("gsec,gsm->egcm", dispatch, x)

    def made(self, rows: Tensor) -> Tensor:
        hidden = F.relu(torch.einsum("egcm,emf->egcf", rows, self.up) + self.b1[:, :, None])
        return torch.einsum("egcf,efm->egcm", hidden, self.down) + self.b2[:, :, None]

    def total(self, combine: Tensor, made: Tensor) -> Tensor:
        return torch.einsum("gsec,egcm->gsm", combine, made)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x, ids, weights = self.groups(x), self.groups(ids), self.groups(weights[:, 0])
        combine = self.combine(ids, weights)
        return self.total(combine, self.made(self.laid(combine.bool().to(x.dtype), x)))


@idiom(flat=True, distinct=False)
class GroupsMerged(GroupsOfSlots):
    """Experts on [E, G * C, D]; another width than the tokens'."""

    def made(self, rows: Tensor) -> Tensor:
        made = rows.reshape(E, -1, D)
        made = torch.bmm(F.gelu(torch.bmm(made, self.up) + self.b1), self.down)[:, :, : D - 1]
        return made.reshape(E, -1, self.capacity, D - 1)


@idiom(flat=True, distinct=False)
class GroupsAlongTheSecond(GroupsOfSlots):
    """[S, G, ...]"""

    def groups(self, x: Tensor) -> Tensor:
        return torch.stack([x, x.flip(0)], 1)

    def places(self, mask: Tensor) -> Tensor:
        return torch.cumsum(mask, 0) - 1

    def laid(self, dispatch: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("sgec,sgm->egcm", dispatch, x)

    def total(self, combine: Tensor, made: Tensor) -> Tensor:
        return torch.einsum("egcm,sgec->sgm", made, combine)


@idiom(distinct=False)
class GroupsOfTwo(GroupsOfSlots):
    """Two choices, those of the group's first ones before."""

    def one(self, gates: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        at = F.one_hot((places * mask).sum(2), self.capacity).to(gates.dtype)
        return torch.einsum("gse,gsc->gsec", gates * mask, at)

    def second(self, mask1: Tensor, mask2: Tensor) -> Tensor:
        return torch.cumsum(mask2, 1) - 1 + mask1.sum(1, keepdim=True)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x, gates = self.groups(x), self.groups(F.softmax(torch.cat([x[:, :2], weights], 1), 1))
        mask1, mask2 = (F.one_hot(self.groups(ids[:, k]), E) for k in (0, 1))
        first, second = torch.cumsum(mask1, 1) - 1, self.second(mask1, mask2)
        mask1 = mask1 * (first < self.capacity)
        mask2 = mask2 * (second < self.capacity)
        combine = self.one(gates, mask1, first) + self.one(gates, mask2, second)
        return self.total(combine, self.made(self.laid((combine > 0).type_as(x), x)))


# -- all choices at once --------------------------------------------------------------------


@idiom()
class PairsOfSlots(GShard):
    """Tokens of an expert are counted, whichever of their choices it is."""

    def places(self, mask: Tensor) -> Tensor:
        return (mask.sum(1).cumsum(0) - 1).unsqueeze(1)

    def table(self, weights: Tensor, kept: Tensor, places: Tensor) -> Tensor:
        at = F.one_hot(places.clamp(0, self.capacity - 1), self.capacity) * kept.unsqueeze(-1)
        return torch.einsum("tk,tkec->tec", weights, at.to(weights.dtype))

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask = F.one_hot(ids, E)
        places = self.places(mask)
        kept = mask * (places < self.capacity)
        return self.table(weights, kept, places)


@idiom()
class PairsOfSlotsExpanded(PairsOfSlots):
    def places(self, mask: Tensor) -> Tensor:
        return super().places(mask).expand_as(mask)


@idiom(distinct=False)
class PairsInOrder(PairsOfSlots):
    """Counted one choice after the other, token by token: an expert may be chosen twice."""

    def places(self, mask: Tensor) -> Tensor:
        return mask.reshape(-1, E).cumsum(0).view(-1, mask.shape[1], E) - 1

    def table(self, weights: Tensor, kept: Tensor, places: Tensor) -> Tensor:
        at = F.one_hot((places * kept).sum(-1), self.capacity).to(weights.dtype)
        return torch.einsum("tke,tkc->tec", weights[:, :, None] * kept, at)


@idiom(distinct=False)
class PairsOfFirstFirst(PairsInOrder):
    """All first choices before any second one."""

    def places(self, mask: Tensor) -> Tensor:
        turned = mask.transpose(0, 1)
        return (turned.reshape(-1, E).cumsum(0) - 1).view(turned.shape).transpose(0, 1)


@idiom(distinct=False)
class PairsOfThree(PairsInOrder):
    """One einsum of three factors."""

    def table(self, weights: Tensor, kept: Tensor, places: Tensor) -> Tensor:
        at = F.one_hot((places * kept).sum(-1), self.capacity)
        return torch.einsum("tk,tke,tkc->tec", weights, kept.to(weights.dtype), at.to(weights.dtype))


@idiom(distinct=False)
class PairsTurned(GShard):
    """As nanoMoE writes it: choices first, the router's table of probabilities, products of flat tables."""

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
        mask = F.one_hot(ids, num_classes=E).permute(1, 0, 2)
        rank = torch.cumsum(mask.reshape(ids.shape[1] * x.shape[0], E), dim=0) - 1
        rank = rank.reshape(ids.shape[1], x.shape[0], E)
        mask *= torch.lt(rank, self.capacity)
        rank = torch.sum(mask * rank, dim=-1)
        by_choice = mask * gates[None, :]
        at = F.one_hot(rank, num_classes=self.capacity)
        return torch.sum(by_choice.unsqueeze(3) * at.unsqueeze(2), dim=0)

    def made(self, rows: Tensor) -> Any:
        return torch.bmm(F.gelu(torch.bmm(rows, self.up) + self.b1), self.down) + self.b2

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        combine = self.combine(x, ids, weights)
        made = self.made(combine.bool().permute(1, 2, 0).type_as(x) @ x)
        return combine.view(x.shape[0], E * self.capacity) @ made.view(-1, D)


# -- as many slots as experts ---------------------------------------------------------------


@idiom(flat=True, distinct=False)
class SquareSlots(GShard):
    capacity = E


@idiom(distinct=False)
class SquareSlotsOfTwo(GShardOfTwo):
    capacity = E


@idiom()
class SquarePairs(PairsOfSlots):
    capacity = E


@idiom(flat=True, distinct=False)
class SquareGroups(GroupsOfSlots):
    """As many groups, too."""

    capacity = E

    def groups(self, x: Tensor) -> Tensor:
        return torch.stack([x, x.flip(0), x.roll(1, 0), x.roll(2, 0)])
