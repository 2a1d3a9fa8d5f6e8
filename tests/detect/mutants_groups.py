"""Mutants of tables of slots of groups and of all choices of a token: places of other groups, of other choices, twice."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_groups import CAPACITY, GroupsMerged, GroupsOfSlots, GroupsOfTwo, PairsInOrder, PairsOfSlots
from tests.detect.idioms_gshard import GShardOfDeepSpeed
from tests.detect.idioms_lists import UniqueOfOneColumn
from tests.detect.loops import SCORES, D, E, mutant, weight

BATCH = "aten.bmm at file.py multiplies the rows of all experts at once already"
NOTHING = "nothing is summed over experts"
GROUPS = "aten.einsum at file.py multiplies the rows of all experts at once already"
LATE = "tokens whose place is behind the last slot are not shown to be dropped"
SECOND = "the places of a later choice are not behind those of the choices before it"
TOGETHER = "several choices of a token are not counted together"


# -- groups ---------------------------------------------------------------------------------


@mutant(GROUPS, flat=True)
class GroupsCountedAcross(GroupsOfSlots):
    """Tokens of one group share a slot: each is counted among those in its place of the other groups."""

    def places(self, mask: Tensor) -> Tensor:
        return torch.cumsum(mask, 0) - 1


@mutant(GROUPS, flat=True)
class GroupsCountedByOthers(GroupsOfSlots):
    """Places of the other group's tokens."""

    def places(self, mask: Tensor) -> Tensor:
        return (torch.cumsum(mask.flip(0), 1) - 1).clamp(min=0)


@mutant(LATE, flat=True)
class GroupsNotDropped(GroupsOfSlots):
    """Late tokens share the last slot of their group."""

    def combine(self, ids: Tensor, weights: Tensor) -> Tensor:
        mask = F.one_hot(ids, E)
        at = F.one_hot((self.places(mask) * mask).sum(-1).clamp(0, self.capacity - 1), self.capacity)
        return weights[:, :, None, None] * mask[:, :, :, None] * at[:, :, None, :]


@mutant(LATE, flat=True)
class GroupsDroppedByOthers(GroupsOfSlots):
    """Whose place in the other group is late."""

    def combine(self, ids: Tensor, weights: Tensor) -> Tensor:
        mask = F.one_hot(ids, E)
        places = self.places(mask)
        mask = mask * (places.flip(0) < self.capacity)
        at = F.one_hot((places * mask).sum(-1).clamp(0, self.capacity - 1), self.capacity)
        return weights[:, :, None, None] * mask[:, :, :, None] * at[:, :, None, :]


@mutant(GROUPS, flat=True)
class GroupsExchanged(GroupsOfSlots):
    """Tokens leave the slots of the other group."""

    def total(self, combine: Tensor, made: Tensor) -> Tensor:
        return super().total(combine, made.flip(1))


@mutant(GROUPS, flat=True)
class GroupsTurned(GroupsOfSlots):
    """As many slots as groups, exchanged."""

    capacity = 2

    def total(self, combine: Tensor, made: Tensor) -> Tensor:
        return super().total(combine, made.transpose(1, 2))


@mutant(GROUPS, flat=True)
class GroupsTurnedByLetters(GroupsOfSlots):
    capacity = 2

    def total(self, combine: Tensor, made: Tensor) -> Tensor:
        return torch.einsum("gsec,ecgm->gsm", combine, made)


@mutant(NOTHING, flat=True)
class GroupsLaidForAll(GroupsOfSlots):
    """A slot has the tokens of both groups."""

    def laid(self, dispatch: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("gsec,gsm->ecm", dispatch, x)[:, None].expand(-1, 2, -1, -1)


@mutant(GROUPS, flat=True)
class GroupsAdded(GroupsOfSlots):
    """The sum over groups too."""

    def total(self, combine: Tensor, made: Tensor) -> Tensor:
        return torch.einsum("gsec,egcm->sm", combine, made)


@mutant(GROUPS, flat=True)
class GroupsWithBiasOfTheirs(GroupsOfSlots):
    """A bias of each group, not of each expert."""

    def made(self, rows: Tensor) -> Tensor:
        return super().made(rows) + torch.arange(2.0)[:, None, None]


@mutant(GROUPS, flat=True)
class GroupsWithPlaces(GroupsOfSlots):
    def made(self, rows: Tensor) -> Tensor:
        return super().made(rows) * torch.arange(1.0, 1 + CAPACITY)[:, None]


@mutant(GROUPS, flat=True)
class GroupsCentred(GroupsOfSlots):
    def made(self, rows: Tensor) -> Tensor:
        made = super().made(rows)
        return made - made.mean(1, keepdim=True)


@mutant(NOTHING, flat=True)
class GroupsAsExperts(GroupsOfSlots):
    """As many groups as experts, whose weights are the groups'."""

    def groups(self, x: Tensor) -> Tensor:
        return torch.stack([x, x.flip(0), x.roll(1, 0), x.roll(2, 0)])

    def made(self, rows: Tensor) -> Tensor:
        return torch.einsum("egcf,gfm->egcm", F.relu(torch.einsum("egcm,gmf->egcf", rows, self.up)), self.down)


@mutant(BATCH, flat=True)
class GroupsMergedAnew(GroupsMerged):
    """Slots of a group go to the other one's, behind the products."""

    def made(self, rows: Tensor) -> Tensor:
        made = torch.bmm(rows.reshape(E, -1, rows.shape[-1]), self.up)
        return torch.bmm(made, self.down).reshape(E, self.capacity, -1, rows.shape[-1]).transpose(1, 2)


@mutant(SECOND)
class GroupsBothFromZero(GroupsOfTwo):
    def second(self, mask1: Tensor, mask2: Tensor) -> Tensor:
        return torch.cumsum(mask2, 1) - 1


@mutant(GROUPS)
class GroupsBehindAll(GroupsOfTwo):
    """Behind the first choices of another number of tokens: those of all groups in a token's place."""

    def second(self, mask1: Tensor, mask2: Tensor) -> Tensor:
        return torch.cumsum(mask2, 1) - 1 + mask1.sum(0, keepdim=True)


@mutant(GROUPS)
class GroupsReturnedTurned(GroupsOfTwo):
    """Tokens in the place of groups; laid out with their numbers, which were written already."""

    def total(self, combine: Tensor, made: Tensor) -> Tensor:
        return torch.einsum("gsec,egcm->sgm", combine, made)


@mutant(GROUPS)
class GroupsBehindOthers(GroupsOfTwo):
    def second(self, mask1: Tensor, mask2: Tensor) -> Tensor:
        return torch.cumsum(mask2, 1) - 1 + mask1.flip(0).sum(1, keepdim=True)


@mutant("aten.reshape at file.py runs under no_grad among the experts", flat=True)
class GroupsMergedWithoutGradient(GroupsMerged):
    """A view has no gradient either."""

    def made(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            rows = rows.reshape(E, -1, D)
        return super().made(rows)


# -- all choices of a token -----------------------------------------------------------------


@mutant(TOGETHER)
class PairsByColumn(PairsInOrder):
    """Each choice has places of its own: the first ones' and the second ones' are the same."""

    def places(self, mask: Tensor) -> Tensor:
        return mask.cumsum(0) - 1


@mutant(TOGETHER)
class PairsAlongChoices(PairsInOrder):
    def places(self, mask: Tensor) -> Tensor:
        return mask.cumsum(1) - 1


@mutant("an expert that a token chose twice has one place for both: the ids (ids) are not shown to be distinct, as those "
        "of topk are", distinct=False, repeats=True)  # fmt: skip
class PairsOfOneTwice(PairsOfSlots):
    pass


@mutant(BATCH)
class PairsInOtherOrder(PairsInOrder):
    """Counted by token, read by choice."""

    def places(self, mask: Tensor) -> Tensor:
        counted = (mask.reshape(-1, E).cumsum(0) - 1).clamp(min=0)
        return counted.view(mask.shape[1], mask.shape[0], E).transpose(0, 1)


@mutant(BATCH)
class PairsSummedOverTokens(PairsOfSlots):
    """As many tokens as choices."""

    def table(self, weights: Tensor, kept: Tensor, places: Tensor) -> Tensor:
        table = super().table(weights, kept, places)
        return table.flip(0)


@mutant(BATCH)
class PairsOfAnyPlace(PairsInOrder):
    """The place of any choice of a token at the expert of any other: sums before the product."""

    def table(self, weights: Tensor, kept: Tensor, places: Tensor) -> Tensor:
        at = F.one_hot((places * kept).sum(-1), self.capacity).to(weights.dtype)
        return torch.einsum("tke,tjc->tec", weights[:, :, None] * kept, at)


@mutant(LATE)
class PairsLate(PairsOfSlots):
    """Dropped by the number of all tokens before, of whatever expert."""

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask = F.one_hot(ids, E)
        kept = mask * (mask.cumsum(0) - 1 < self.capacity)
        return self.table(weights, kept, self.places(mask))


@mutant("tokens leave other slots than they were put into")
class PairsElsewhere(PairsInOrder):
    """Laid out by one order, added up by another."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        laid = self.combine(x, ids, weights).bool()
        rows = torch.einsum("tec,tm->ecm", laid.to(x.dtype), x)
        mask = F.one_hot(ids, E)
        places = PairsOfSlots.places(self, mask)
        kept = mask * (places < self.capacity)
        return self.total(PairsOfSlots.table(self, weights, kept, places), self.made(rows))  # type: ignore[arg-type]


# -- experts in a list, on pieces -----------------------------------------------------------


class Pieces(GShardOfDeepSpeed):
    """`parts`, `run` and `join` are what a mutant changes."""

    def __init__(self) -> None:
        super().__init__()
        self.list, self.experts = self.experts.deepspeed_experts, None  # type: ignore[assignment]

    def parts(self, rows: Tensor) -> Any:
        return rows.chunk(E, dim=1)

    def run(self, e: int, piece: Tensor) -> Tensor:
        return self.list[e](piece)  # type: ignore[no-any-return]

    def join(self, made: list[Tensor]) -> Tensor:
        return torch.cat(made, dim=1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        combine = self.combine(x, ids, weights)
        rows = self.laid(torch.einsum("sec,sm->ecm", combine.bool().type_as(x), x))
        made = self.join([self.run(e, piece) for e, piece in enumerate(self.parts(rows))])
        return torch.einsum("sec,ecm->sm", combine, made.reshape(E, -1, D))


@mutant("expert 0 runs on other rows than those of its slots")
class PiecesReversed(Pieces):
    def parts(self, rows: Tensor) -> Any:
        return rows.chunk(E, dim=1)[::-1]


@mutant("expert 0 runs on other rows than those of its slots")
class PiecesOfSlots(Pieces):
    """As many slots as experts: a piece has one slot of each."""

    capacity = E

    def parts(self, rows: Tensor) -> Any:
        return [piece.transpose(1, 2) for piece in rows.chunk(E, dim=2)]


@mutant("expert 0 runs on other rows than those of its slots")
class PiecesJoinedReversed(Pieces):
    def join(self, made: list[Tensor]) -> Tensor:
        return torch.cat(made[::-1], dim=1)


@mutant("softmax along dimension 0 lets rows depend on each other")
class PiecesNormalised(Pieces):
    """Over the slots of an expert."""

    def run(self, e: int, piece: Tensor) -> Tensor:
        return super().run(e, piece).softmax(-2)


@mutant("softmax along dimension 0 lets rows depend on each other")
class PiecesNormalisedFromTheFront(Pieces):
    def run(self, e: int, piece: Tensor) -> Tensor:
        return super().run(e, piece).softmax(2)


@mutant("aten.softmax.int at file.py is not known to leave the dimensions before the rows alone")
class PiecesNormalisedAlongOnes(Pieces):
    """Along a dimension that rows of their own would not have."""

    def run(self, e: int, piece: Tensor) -> Tensor:
        return super().run(e, piece).softmax(-3)


@mutant("mean along dimension 0 lets rows depend on each other")
class PiecesCentred(Pieces):
    def run(self, e: int, piece: Tensor) -> Tensor:
        made = super().run(e, piece)
        return made - made.mean(dim=2, keepdim=True)


@mutant("add adds a tensor of shape (3, 1) across the rows")
class PiecesWithPlaces(Pieces):
    def run(self, e: int, piece: Tensor) -> Tensor:
        return super().run(e, piece) + torch.arange(CAPACITY)[:, None]


@mutant("matmul with a weight of shape (1, 1, 6, 6)")
class PiecesTimesShared(Pieces):
    """As many slots as features: what all experts share is of the size of a piece, and none."""

    capacity = D

    def __init__(self) -> None:
        super().__init__()
        self.shared = weight(1, 1, D, D)

    def run(self, e: int, piece: Tensor) -> Tensor:
        return super().run(e, piece) @ self.shared


@mutant("add_3 is not shown to be one value for each token of an expert's list")
class PiecesOfTwo(Pieces):
    """Each expert on what it and the one before made."""

    def join(self, made: list[Tensor]) -> Tensor:
        return torch.cat([a + b for a, b in zip(made, [*made[1:], made[0]], strict=True)], dim=1)


@mutant("expert 0 runs on other rows than those of its slots")
class PiecesWithoutGradient(Pieces):
    """Laid out under no_grad: a view has no gradient either."""

    def laid(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            return super().laid(rows)


# -- lists of the ids -----------------------------------------------------------------------


@mutant("a Python loop runs over squeeze, not shown to be the list of chosen experts", top_k=1, distinct=SCORES)
class UniqueOfOthers(UniqueOfOneColumn):
    """Tokens of experts that nobody else chose are left out, or not, by what the last token chose."""

    def chosen(self, ids: Tensor) -> Tensor:
        return torch.cat([ids[1:], (ids[:1] + 1) % E])[:, 0]


@mutant("a Python loop runs over squeeze, not shown to be the list of chosen experts", distinct=SCORES)
class UniqueOfBothColumns(UniqueOfOneColumn):
    """Experts that are chosen, by second choices perhaps, beside the first choices."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, ids, weights[:, :1])
