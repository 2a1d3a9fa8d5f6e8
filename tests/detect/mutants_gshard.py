"""Mutants of tables of slots: slots of two tokens, places of other tokens, experts that mix slots, other tables."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_gshard import CAPACITY, GShard, GShardListed, GShardOfTwo, GShardUnbound
from tests.detect.loops import E, mutant

BATCH = "aten.bmm at file.py multiplies the rows of all experts at once already"
NOTHING = "nothing is summed over experts"
LATE = "tokens whose place is behind the last slot are not shown to be dropped"
SECOND = "the places of a later choice are not behind those of the choices before it"


class Parts(GShard):
    """A first choice in pieces that a mutant changes."""

    def mask(self, ids: Tensor) -> Tensor:
        return F.one_hot(ids, E)

    def places(self, mask: Tensor) -> Tensor:
        return torch.cumsum(mask, 0) - 1

    def kept(self, mask: Tensor, places: Tensor) -> Tensor:
        return mask * (places < self.capacity)

    def at(self, mask: Tensor, places: Tensor) -> Tensor:
        return (places * mask).sum(1)

    def slot(self, at: Tensor) -> Tensor:
        return F.one_hot(at, self.capacity)

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask = self.mask(ids)
        places = self.places(mask)
        mask = self.kept(mask, places)
        return weights[:, 0, None, None] * mask[:, :, None] * self.slot(self.at(mask, places))[:, None, :]


# -- places ---------------------------------------------------------------------------------


@mutant(BATCH, flat=True)
class SlotsAlongExperts(Parts):
    def places(self, mask: Tensor) -> Tensor:
        return torch.cumsum(mask, 1) - 1


@mutant(BATCH, flat=True)
class SlotsCountedBackwards(Parts):
    """No two tokens in one slot, but nobody shows it."""

    def places(self, mask: Tensor) -> Tensor:
        return mask.flip(0).cumsum(0).flip(0) - 1


@mutant(BATCH, flat=True)
class SlotsOfOneForAll(Parts):
    def places(self, mask: Tensor) -> Tensor:
        return torch.zeros_like(mask)


@mutant(BATCH, flat=True)
class SlotsCountedTwice(Parts):
    """Two tokens behind each other share a slot."""

    def places(self, mask: Tensor) -> Tensor:
        return (torch.cumsum(mask, 0) - 1) // 2


@mutant(BATCH, flat=True)
class SlotsCountedByOthers(Parts):
    """Those who chose the expert before."""

    def places(self, mask: Tensor) -> Tensor:
        return torch.cumsum(mask.roll(1, 1), 0) - 1

    def at(self, mask: Tensor, places: Tensor) -> Tensor:
        return (places * mask).sum(1).clamp(min=0)


@mutant(BATCH, flat=True, tokens=40)
class SlotsCountedRoughly(Parts):
    """bfloat16 counts to 256."""

    def places(self, mask: Tensor) -> Tensor:
        return torch.cumsum(mask.bfloat16(), 0) - 1

    def at(self, mask: Tensor, places: Tensor) -> Tensor:
        return (places * mask).sum(1).long()


@mutant(BATCH, flat=True)
class SlotsScaled(Parts):
    def places(self, mask: Tensor) -> Tensor:
        return (torch.cumsum(mask, 0) - 1) * 0


@mutant(BATCH, flat=True)
class SlotsBelowZero(Parts):
    """The first token of an expert has place -1, which the clamp makes that of the second."""

    def places(self, mask: Tensor) -> Tensor:
        return torch.cumsum(mask, 0) - 2

    def at(self, mask: Tensor, places: Tensor) -> Tensor:
        return (places * mask).sum(1).clamp(min=0)


@mutant(BATCH, flat=True)
class SlotsRounded(Parts):
    """In float32 a thousand million more and less loses the places."""

    def places(self, mask: Tensor) -> Tensor:
        return torch.cumsum(mask.float(), 0) + 1e9 - 1e9 - 1

    def at(self, mask: Tensor, places: Tensor) -> Tensor:
        return (places * mask).sum(1).clamp(0, self.capacity - 1).long()


@mutant(BATCH, flat=True)
class SlotsOfOneClass(Parts):
    """A mask of one class is broadcast over all experts: each has every token."""

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask = F.one_hot(ids * 0, 1)
        mask = mask * (torch.cumsum(mask, 0) - 1 < self.capacity)
        at = ((torch.cumsum(F.one_hot(ids * 0, 1), 0) - 1) * mask).sum(1)
        gates = torch.cat([x[:, :2], weights], 1) * mask
        return gates[:, :, None] * self.slot(at)[:, None, :]


# -- late tokens ----------------------------------------------------------------------------


@mutant(LATE, flat=True)
class SlotsForLate(Parts):
    """Late tokens share the last slot."""

    def kept(self, mask: Tensor, places: Tensor) -> Tensor:
        return mask

    def at(self, mask: Tensor, places: Tensor) -> Tensor:
        return (places * mask).sum(1).clamp(0, self.capacity - 1)


@mutant("tokens are dropped from place 4 on, there are 3 slots", flat=True)
class SlotsForOneTooMany(Parts):
    """One token too many, in the last slot."""

    def kept(self, mask: Tensor, places: Tensor) -> Tensor:
        return mask * (places <= self.capacity)

    def at(self, mask: Tensor, places: Tensor) -> Tensor:
        return (places * mask).sum(1).clamp(0, self.capacity - 1)


@mutant(BATCH, flat=True, tokens=2)
class SlotsThatRaise(Parts):
    """one_hot raises if anybody is late."""

    def kept(self, mask: Tensor, places: Tensor) -> Tensor:
        return mask


@mutant(BATCH, flat=True, tokens=2)
class SlotsThatRaiseAtTheEnd(Parts):
    def kept(self, mask: Tensor, places: Tensor) -> Tensor:
        return mask * (places < self.capacity + 1)


@mutant(BATCH, flat=True)
class SlotsForTheLate(Parts):
    """The late ones alone."""

    def kept(self, mask: Tensor, places: Tensor) -> Tensor:
        return mask * (places >= self.capacity)

    def at(self, mask: Tensor, places: Tensor) -> Tensor:
        return ((places - self.capacity) * mask).sum(1).clamp(0, self.capacity - 1)


@mutant(LATE, flat=True)
class SlotsCutByOther(Parts):
    """By places of others."""

    def kept(self, mask: Tensor, places: Tensor) -> Tensor:
        return mask * (torch.cumsum(mask.roll(1, 0), 0) - 1 < self.capacity)

    def at(self, mask: Tensor, places: Tensor) -> Tensor:
        return (places * mask).sum(1).clamp(0, self.capacity - 1)


@mutant(BATCH, flat=True)
class SlotsWherePlacesAre(Parts):
    """Dropped tokens have slot 0 of their expert too."""

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask = F.one_hot(ids, E)
        places = torch.cumsum(mask, 0) - 1
        at = (places * mask * (places < self.capacity)).sum(1)
        return weights[:, 0, None, None] * mask[:, :, None] * F.one_hot(at, self.capacity)[:, None, :]


@mutant(LATE, flat=True)
class SlotsCutAlmostThere(Parts):
    """Compared in float32, that bound is 3: one token too many, in the last slot."""

    def kept(self, mask: Tensor, places: Tensor) -> Tensor:
        return mask * (places <= 2.9999999999)

    def at(self, mask: Tensor, places: Tensor) -> Tensor:
        return (places * mask).sum(1).clamp(0, self.capacity - 1)


# -- two choices ----------------------------------------------------------------------------


@mutant(SECOND)
class SlotsOfBothFromZero(GShardOfTwo):
    def places(self, mask1: Tensor, mask2: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cumsum(mask1, 0) - 1, torch.cumsum(mask2, 0) - 1


@mutant(SECOND)
class SlotsBehindThemselves(GShardOfTwo):
    def places(self, mask1: Tensor, mask2: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cumsum(mask1, 0) - 1, torch.cumsum(mask2, 0) - 1 + mask2.sum(0, keepdim=True)


@mutant(SECOND)
class SlotsBehindSome(GShardOfTwo):
    """Behind those of the first choices that were kept, of which every third was not."""

    def places(self, mask1: Tensor, mask2: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.cumsum(mask1, 0) - 1
        some = mask1 * (torch.arange(mask1.shape[0]) % 3 != 0)[:, None]
        return first, torch.cumsum(mask2, 0) - 1 + some.sum(0, keepdim=True)


@mutant(SECOND)
class SlotsBehindFewer(GShardOfTwo):
    """Behind those of the first choices that have places 0 and 1."""

    def places(self, mask1: Tensor, mask2: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.cumsum(mask1, 0) - 1
        return first, torch.cumsum(mask2, 0) - 1 + (mask1 * (first < 2)).sum(0, keepdim=True)


@mutant(BATCH, tokens=40)
class SlotsBehindRoughly(GShardOfTwo):
    """bfloat16 counts to 256."""

    def places(self, mask1: Tensor, mask2: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.cumsum(mask1, 0) - 1
        return first, torch.cumsum(mask2, 0) - 1 + mask1.bfloat16().sum(0).long()


@mutant(BATCH)
class SlotsOneBefore(GShardOfTwo):
    """The first of the second choices in the last slot of the first ones."""

    def places(self, mask1: Tensor, mask2: Tensor) -> tuple[Tensor, Tensor]:
        first, second = super().places(mask1, mask2)
        return first, (second - 1).clamp(min=0)


@mutant(SECOND)
class SlotsOneBeforeInPlace(GShardOfTwo):
    def places(self, mask1: Tensor, mask2: Tensor) -> tuple[Tensor, Tensor]:
        first, second = super().places(mask1, mask2)
        first += 1
        return first, second


@mutant(SECOND)
class SlotsOfFirstAgain(GShardOfTwo):
    """Both choices of the first expert."""

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().combine(x, ids[:, [0, 0]], weights) + super().combine(x, ids[:, [0, 0]], weights)


@mutant(BATCH)
class SlotsWithOtherPlaces(GShardOfTwo):
    def one(self, gates: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        return super().one(gates, mask, places.roll(1, 0).clamp(0, self.capacity - 1))


# -- dispatch and combine -------------------------------------------------------------------


@mutant(BATCH, flat=True)
class SlotsLeftByOthers(Parts):
    """Weights of other experts' slots."""

    def total(self, combine: Tensor, made: Tensor) -> Tensor:
        return torch.einsum("tec,ecm->tm", combine.roll(1, 1), made)


@mutant(BATCH, flat=True)
class SlotsLeftTurned(Parts):
    """As many slots as experts, exchanged."""

    capacity = E

    def total(self, combine: Tensor, made: Tensor) -> Tensor:
        return torch.einsum("tce,ecm->tm", combine, made)


@mutant(BATCH, flat=True)
class SlotsLaidTurned(Parts):
    capacity = E

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        combine = self.combine(x, ids, weights)
        rows = torch.einsum("tec,tm->cem", self.dispatch(combine).to(x.dtype), x)
        return self.total(combine, self.made(rows))


@mutant("tokens leave other slots than they were put into", flat=True)
class SlotsOfTwoTables(Parts):
    """Tokens whose weight is small have a slot, but leave it with nothing."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        combine = self.combine(x, ids, weights)
        other = self.combine(x, (ids + 1) % E, weights)
        rows = torch.einsum("tec,tm->ecm", self.dispatch(other).to(x.dtype), x)
        return self.total(combine, self.made(rows))


class LeftElsewhere(Parts):
    """`left(mask, places)`: the table by which tokens leave, of the mask before any was dropped."""

    def left(self, mask: Tensor, places: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask = self.mask(ids)
        places = self.places(mask)
        kept = self.kept(mask, places)
        laid = kept[:, :, None] * self.slot(self.at(kept, places))[:, None, :]
        rows = torch.einsum("tec,tm->ecm", laid.to(x.dtype), x)
        combine = weights[:, 0, None, None] * kept[:, :, None] * self.left(mask, places)
        return self.total(combine, self.made(rows))


@mutant("tokens are dropped from place 3 on, there are 2 slots", flat=True)
class SlotsLeftFromOneBefore(LeftElsewhere):
    """The last token of an expert leaves with what was made of the one before it."""

    def left(self, mask: Tensor, places: Tensor) -> Tensor:
        return F.one_hot(places.clamp(0, self.capacity - 2), self.capacity)


@mutant("tokens have a slot whose place is not theirs", flat=True)
class SlotsLeftFromTheFirst(LeftElsewhere):
    """The last token of an expert leaves with what was made of the first."""

    def left(self, mask: Tensor, places: Tensor) -> Tensor:
        return self.slot(self.at(mask * (places < self.capacity - 1), places))[:, None, :]


@mutant(BATCH, flat=True)
class SlotsOverNothing(Parts):
    """0 / 0 for tokens that were dropped."""

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask = self.mask(ids)
        gates = weights[:, :1] * self.kept(mask, self.places(mask))
        return super().combine(x, ids, weights) / gates.sum(1)[:, None, None]


@mutant(BATCH, flat=True)
class SlotsFlatByEinsum(GShard):
    """Not read, but no error."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = self.combine(x, ids, weights).view(x.shape[0], -1)
        rows = torch.einsum("ts,tm->sm", flat.bool().to(x.dtype), x).view(E, self.capacity, -1)
        return flat.mm(self.made(rows).view(E * self.capacity, -1))


@mutant(BATCH, flat=True)
class SlotsFilledTwice(Parts):
    """Each slot has the token behind too."""

    def dispatch(self, combine: Tensor) -> Tensor:
        return combine.bool() | combine.roll(1, 0).bool()


@mutant(BATCH, flat=True)
class SlotsFilledElsewhere(Parts):
    """Slots of others are filled too."""

    def dispatch(self, combine: Tensor) -> Tensor:
        return combine >= 0


@mutant(BATCH, flat=True)
class SlotsDetached(Parts):
    def total(self, combine: Tensor, made: Tensor) -> Tensor:
        return super().total(combine.detach(), made)


@mutant(BATCH, flat=True)
class SlotsWithoutGradient(Parts):
    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            return super().combine(x, ids, weights)


@mutant("aten.permute at file.py runs under no_grad among the experts", flat=True)
class SlotsViewedWithoutGradient(Parts):
    """A view has no gradient either."""

    def total(self, combine: Tensor, made: Tensor) -> Tensor:
        with torch.no_grad():
            combine = combine.permute(1, 2, 0).permute(2, 0, 1)
        return super().total(combine, made)


@mutant("aten.reshape at file.py runs under no_grad among the experts", flat=True)
class SlotsMadeWithoutGradient(Parts):
    def total(self, combine: Tensor, made: Tensor) -> Tensor:
        with torch.no_grad():
            made = made.reshape(E * made.shape[1], -1)
        return super().total(combine, made.reshape(E, -1, made.shape[1]))


@mutant(BATCH, flat=True, forward_only=True)
class SlotsWhoseGatesChange(Parts):
    """After the table was made of them."""

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates = weights * 1.0
        made = super().combine(x, ids, gates)
        gates += 1
        return made


@mutant("mul_3 is read after it was changed in place through another name", flat=True, forward_only=True)
class SlotsChangeInPlace(Parts):
    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        made = super().combine(x, ids, weights)
        made.view(-1).add_(0.1)
        return made


# -- experts --------------------------------------------------------------------------------


@mutant(BATCH, flat=True)
class SlotsMixed(GShard):
    def made(self, rows: Tensor) -> Tensor:
        return super().made(rows).softmax(1)


@mutant(BATCH, flat=True)
class SlotsCentred(GShard):
    def made(self, rows: Tensor) -> Tensor:
        made = super().made(rows)
        return made - made.mean(1, keepdim=True)


@mutant(NOTHING, flat=True)
class SlotsOfOtherExperts(GShard):
    def made(self, rows: Tensor) -> Tensor:
        return super().made(rows.roll(1, 0))


@mutant(BATCH, flat=True)
class SlotsInOtherOrder(GShard):
    def made(self, rows: Tensor) -> Tensor:
        return super().made(rows).flip(1)


@mutant(BATCH, flat=True)
class SlotsTransposed(GShard):
    """As many slots as features."""

    capacity = 6

    def made(self, rows: Tensor) -> Tensor:
        return super().made(rows.transpose(1, 2))


@mutant(BATCH, flat=True)
class SlotsWithPlaces(GShard):
    """What an expert makes depends on the slot."""

    def made(self, rows: Tensor) -> Tensor:
        return super().made(rows) + torch.arange(CAPACITY, dtype=rows.dtype)[:, None]


@mutant("mean along dimension 0 lets rows depend on each other")
class SlotsListedMeans(GShardUnbound):
    def run(self, e: int, rows: Tensor) -> Tensor:
        made = super().run(e, rows)
        return made - made.mean(0)


@mutant("expert 0 runs on other rows than those of its slots")
class SlotsRotated(GShardListed):
    """Experts on the slots of others."""

    def parts(self, rows: Tensor) -> list[Tensor]:
        return [rows[(e + 1) % E] for e in range(E)]
