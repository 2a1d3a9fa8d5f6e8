"""Mutants of slots that are numbered through: slots of two rows, of other experts, of other widths."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_slot_flat import FlatSlotForLate, FlatSlots, FlatSlotsListed, FlatSlotsOfAll
from tests.detect.idioms_slot_rows import CAPACITY
from tests.detect.loops import D, E, mutant
from tests.detect.mutants_slot_rows import LT, PUT, READ, SET

# -- rows that are not late -----------------------------------------------------------------


@mutant(READ)
class FlatSlotsOfOtherWidth(FlatSlots):
    """Numbers of 4 slots an expert, in a buffer that has 6."""

    width, slots = CAPACITY + 1, 2 * CAPACITY


@mutant("aten.add.Tensor at file.py numbers 3 slots of an expert, 2 apart")
class FlatSlotsThatOverlap(FlatSlots):
    """The last slot of an expert is the first of the next."""

    width, slots = CAPACITY - 1, 2 * CAPACITY


@mutant(READ)
class FlatSlotsOfAllThatOverlap(FlatSlotsOfAll):
    width, slots = CAPACITY - 1, 2 * CAPACITY


@mutant("aten.mul.Tensor at file.py is not known to be row-wise (it reads ofkept)")
class FlatSlotsTurned(FlatSlots):
    """By place, then by expert; as many slots as experts."""

    width = slots = E

    def slot(self, e: Tensor, at: Tensor) -> Tensor:
        return at * self.width + e


@mutant(READ)
class FlatSlotsSeenTurned(FlatSlots):
    """As many slots as experts: those of all experts at one place are one expert's."""

    width = slots = E

    def put(self, x: Tensor, e: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        return super().put(x, e, at, rows).transpose(0, 1)


@mutant(READ)
class FlatSlotsReadTurned(FlatSlots):
    width = slots = E

    def read(self, made: Tensor, e: Tensor, at: Tensor) -> Tensor:
        return made.transpose(0, 1).reshape(-1, D)[self.slot(e, at)]


@mutant("aten.add.Tensor at file.py numbers 3 slots of an expert, 2 apart")
class FlatSlotsReadByOtherWidth(FlatSlots):
    width = slots = CAPACITY + 1

    def read(self, made: Tensor, e: Tensor, at: Tensor) -> Tensor:
        return made.view(-1, D)[e * 2 + at]


@mutant("aten.sub.Tensor at file.py is not known to be row-wise (it reads ofkept)")
class FlatSlotsReadBefore(FlatSlots):
    def read(self, made: Tensor, e: Tensor, at: Tensor) -> Tensor:
        return made.view(-1, D)[(self.slot(e, at) - 1).clamp(min=0)]


@mutant(READ)
class FlatSlotsReadBackwards(FlatSlots):
    def read(self, made: Tensor, e: Tensor, at: Tensor) -> Tensor:
        return made.view(-1, D).flip(0)[self.slot(e, at)]


@mutant("aten.roll at file.py is not known to be row-wise (it reads ofkept)")
class FlatSlotsReadOfOtherExperts(FlatSlots):
    """Expert and place of different rows."""

    def read(self, made: Tensor, e: Tensor, at: Tensor) -> Tensor:
        return made.view(-1, D)[self.slot(e.roll(1, 0), at)]


@mutant("aten.add.Tensor at file.py is not known to be row-wise (it reads ofkept)")
class FlatSlotsOfOtherExperts(FlatSlots):
    def slot(self, e: Tensor, at: Tensor) -> Tensor:
        return (e + 1) % E * self.width + at


@mutant("aten.add.Tensor at file.py is not known to be row-wise (it reads ofkept)")
class FlatSlotsWithFactor(FlatSlots):
    width = slots = 2 * CAPACITY

    def slot(self, e: Tensor, at: Tensor) -> Tensor:
        return torch.add(e * self.width, at, alpha=2)


@mutant("aten.to.dtype at file.py is not known to be row-wise (it reads ofkept)", tokens=1)
class FlatSlotsOfNarrowNumbers(FlatSlots):
    """Numbers that wrap around."""

    def slot(self, e: Tensor, at: Tensor) -> Tensor:
        return (e.to(torch.int8) * self.width + at).long()


@mutant(SET)
class FlatSlotsOfMoreClasses(FlatSlots):
    """An id of the last class is an error: it has no slots."""

    def at(self, flat: Tensor) -> Tensor:
        places = torch.cumsum(F.one_hot(flat, E + 1), 0) - 1
        return places.gather(1, flat[:, None]).squeeze(1)


@mutant(LT)
class FlatSlotsShared(FlatSlots):
    """Two rows behind each other have one slot."""

    def at(self, flat: Tensor) -> Tensor:
        places = (torch.cumsum(F.one_hot(flat, E), 0) - 1) // 2
        return places.gather(1, flat[:, None]).squeeze(1)


@mutant("aten.add_.Tensor at file.py is not known to be row-wise (it reads ofkept)", forward_only=True)
class FlatSlotsChanged(FlatSlotsOfAll):
    """The numbers are moved in place."""

    def taken(self, slot: Tensor) -> Tensor:
        return slot.add_(1).remainder_(E * self.slots)


@mutant("aten.roll at file.py is not known to be row-wise (it reads ofkept)")
class FlatSlotsTakenBefore(FlatSlotsOfAll):
    def taken(self, slot: Tensor) -> Tensor:
        return slot.roll(1, 0)


@mutant("expert 0 runs on other rows than those of its slots")
class FlatSlotsJoinedBackwards(FlatSlotsListed):
    def made(self, rows: Tensor) -> Tensor:
        return torch.cat([self.experts[e](rows[e]) for e in reversed(range(E))])


@mutant(READ)
class FlatSlotsJoinedByPlace(FlatSlotsListed):
    """Stacked behind the places."""

    width = slots = E

    def made(self, rows: Tensor) -> Tensor:
        return torch.stack([expert(rows[e]) for e, expert in enumerate(self.experts)], 1)


# -- all rows -------------------------------------------------------------------------------


@mutant(PUT, flat=True)
class FlatSlotForLateOfTheNext(FlatSlotForLate):
    """The late have the first slot of the next expert."""

    width, slots = CAPACITY - 1, 2 * CAPACITY


@mutant(PUT, flat=True)
class FlatSlotForLateIsUsed(FlatSlotForLate):
    last = CAPACITY - 1


@mutant(PUT, flat=True)
class FlatSlotForLateIsRead(FlatSlotForLate):
    def own(self, at: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        return rows * weights[:, :1]


@mutant(PUT, flat=True)
class FlatSlotForLateIsReadByOne(FlatSlotForLate):
    """The first who is late keeps what the last one put there."""

    capacity = CAPACITY + 1


@mutant(PUT, flat=True)
class FlatSlotForLateOfOtherIds(FlatSlotForLate):
    def slot(self, ids: Tensor, at: Tensor) -> Tensor:
        return (E - 1 - ids) * (self.width + 1) + at.clamp(max=self.last)


@mutant(PUT, flat=True)
class FlatSlotForLateOfOtherPlaces(FlatSlotForLate):
    def slot(self, ids: Tensor, at: Tensor) -> Tensor:
        return ids * (self.width + 1) + at.roll(1, 0).clamp(max=self.last)
