"""Mutants of rows that are put into slots by index: slots of others, of two rows, of the late, read back elsewhere."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_slot_rows import CAPACITY, SlotForLate, SlotRows, SlotRowsListed, SlotRowsOfPairs
from tests.detect.loops import D, E, mutant

LT = "rows are selected by lt, which is not shown to say which ids are those of an expert"
READ = "aten.index.Tensor at file.py is not known to be row-wise (it reads ofkept)"
SET = "aten.index_put_ at file.py is not known to be row-wise (it reads ofkept, rows)"
INTO = "puts rows into slots by index: that each has one of its own and is read back from there is not shown"
PUT = f"aten.index_put_ at file.py {INTO}"


# -- rows that are not late -----------------------------------------------------------------


@mutant(LT)
class SlotRowsShared(SlotRows):
    """Two rows behind each other have one slot."""

    def at(self, flat: Tensor) -> Tensor:
        places = (torch.cumsum(F.one_hot(flat, E), 0) - 1) // 2
        return places.gather(1, flat[:, None]).squeeze(1)


@mutant(LT)
class SlotRowsOfOtherPlace(SlotRows):
    """Places at another expert: rows of several before have one slot."""

    def at(self, flat: Tensor) -> Tensor:
        places = torch.cumsum(F.one_hot((flat + 1) % E, E), 0) - 1
        return places.gather(1, flat[:, None]).squeeze(1).clamp(min=0)


@mutant(LT)
class SlotRowsOfOtherRow(SlotRows):
    def at(self, flat: Tensor) -> Tensor:
        places = torch.cumsum(F.one_hot(flat, E), 0) - 1
        return places[torch.arange(flat.shape[0]).flip(0), flat].clamp(min=0)


@mutant(LT)
class SlotRowsCountedRoughly(SlotRows):
    """bfloat16 counts to 256."""

    def at(self, flat: Tensor) -> Tensor:
        places = torch.cumsum(F.one_hot(flat, E).bfloat16(), 0) - 1
        return places.gather(1, flat[:, None]).squeeze(1).long()


@mutant(LT)
class SlotRowsInTheLast(SlotRows):
    """All who are late have the last slot."""

    def at(self, flat: Tensor) -> Tensor:
        return super().at(flat).clamp(max=self.slots - 1)


@mutant(SET, tokens=2)
class SlotRowsThatRaise(SlotRows):
    """An error if anybody is late."""

    def kept(self, at: Tensor) -> Tensor:
        return at <= self.capacity


@mutant(SET)
class SlotRowsOfMoreClasses(SlotRows):
    """An id of the last class is an error: it has no slots."""

    def at(self, flat: Tensor) -> Tensor:
        places = torch.cumsum(F.one_hot(flat, E + 1), 0) - 1
        return places.gather(1, flat[:, None]).squeeze(1)


@mutant(PUT, flat=True)
class SlotForLateOfMoreClasses(SlotForLate):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask = F.one_hot(ids, E + 1)
        at = ((torch.cumsum(mask, 0) - 1) * mask).sum(1)
        inside = at.clamp(max=self.last)
        return self.own(at, self.read(self.made(self.put(x, ids, inside)), ids, inside), weights)


@mutant(READ)
class SlotRowsOfOtherTokens(SlotRows):
    """Tokens in another order than that of the pairs."""

    def token(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[0]).repeat(2)


@mutant(SET)
class SlotRowsIntoOthers(SlotRows):
    """Slots that nobody is put into are not zero: the sum of what experts make of all slots would differ."""

    def put(self, x: Tensor, e: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        buffer = x.new_ones(E, self.slots, D)
        buffer[e, at] = rows
        return buffer


@mutant("aten.index_put at file.py is not known to be row-wise (it reads ofkept, rows)")
class SlotRowsPutTwice(SlotRows):
    def put(self, x: Tensor, e: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        return super().put(x, e, at, rows).index_put((e, at), rows * 2)


@mutant("aten.index_put at file.py is not known to be row-wise (it reads ofkept, rows)")
class SlotRowsTurned(SlotRows):
    """As many slots as experts, exchanged."""

    slots = E

    def put(self, x: Tensor, e: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        return x.new_zeros(E, self.slots, D).index_put((at, e), rows)


@mutant("index_put_ is read after it was changed in place through another name")
class SlotRowsChanged(SlotRows):
    """What one expert gets is changed behind."""

    def put(self, x: Tensor, e: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        buffer = super().put(x, e, at, rows)
        buffer[0].add_(1)
        return buffer


@mutant(READ)
class SlotRowsReadTurned(SlotRows):
    capacity = slots = E

    def read(self, made: Tensor, e: Tensor, at: Tensor) -> Tensor:
        return made.transpose(0, 1)[e, at]


@mutant(READ)
class SlotRowsReadBackwards(SlotRows):
    def read(self, made: Tensor, e: Tensor, at: Tensor) -> Tensor:
        return made.flip(1)[e, at]


@mutant("aten.sub.Tensor at file.py is not known to be row-wise (it reads ofkept)")
class SlotRowsReadBefore(SlotRows):
    """With what was made of the row before at the same expert."""

    def read(self, made: Tensor, e: Tensor, at: Tensor) -> Tensor:
        return made[e, at] + made[e, (at - 1).clamp(min=0)]


@mutant(READ)
class SlotRowsNormalised(SlotRows):
    """Over the slots of an expert."""

    def made(self, rows: Tensor) -> Tensor:
        return super().made(rows).softmax(1)


@mutant("softmax along dimension 0 lets rows depend on each other")
class SlotRowsWeighedTogether(SlotRows):
    def read(self, made: Tensor, e: Tensor, at: Tensor) -> Tensor:
        return made[e, at].softmax(0)


@mutant("aten.index_put at file.py is not known to be row-wise (it reads ofkept, rows)")
class SlotRowsSet(SlotRows):
    """The last choice of a token wins."""

    def add(self, x: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return torch.zeros_like(x).index_put((token,), rows)


@mutant(READ)
class SlotRowsWithoutGradient(SlotRows):
    def read(self, made: Tensor, e: Tensor, at: Tensor) -> Tensor:
        with torch.no_grad():
            return made[e, at]


@mutant("expert 0 runs on other rows than those of its slots")
class SlotRowsOfOtherExperts(SlotRowsListed):
    def made(self, rows: Tensor) -> Tensor:
        return torch.stack([expert(rows[(e + 1) % E]) for e, expert in enumerate(self.experts)])


@mutant("mean along dimension 0 lets rows depend on each other")
class SlotRowsCentred(SlotRowsListed):
    def made(self, rows: Tensor) -> Tensor:
        made = [expert(rows[e]) for e, expert in enumerate(self.experts)]
        return torch.stack([y - y.mean(0) for y in made])


@mutant(PUT)
class SlotRowsOfPairsShifted(SlotRowsOfPairs):
    """What is added to pairs that are late too."""

    def sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        return super().sum(rows + 1, weights)


@mutant(PUT)
class SlotRowsOfPairsTurned(SlotRowsOfPairs):
    """Summed over others than the choices of a token."""

    def sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        return (rows.view(2, -1, D) * weights.t()[..., None]).sum(0)


# -- all rows -------------------------------------------------------------------------------


@mutant(PUT, flat=True)
class SlotForLateIsUsed(SlotForLate):
    """The slot of the late is that of one who is not."""

    last = CAPACITY - 1


@mutant(PUT, flat=True)
class SlotForLateIsRead(SlotForLate):
    def own(self, at: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        return rows * weights[:, :1]


@mutant(PUT, flat=True)
class SlotForLateIsReadByOne(SlotForLate):
    """The first who is late keeps what the last one put there."""

    capacity = CAPACITY + 1


@mutant(PUT, flat=True)
class SlotForLateOfOthers(SlotForLate):
    def own(self, at: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        return rows * (weights[:, 0] * (at < self.capacity).roll(1, 0))[:, None]


@mutant(PUT, flat=True)
class SlotForLateShifted(SlotForLate):
    def own(self, at: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        return torch.where((at < self.capacity)[:, None], rows, torch.ones_like(rows)) * weights[:, :1]


@mutant(PUT, flat=True)
class SlotForLateReadBefore(SlotForLate):
    def read(self, made: Tensor, ids: Tensor, at: Tensor) -> Tensor:
        return made[:, 1:][ids, at.clamp(max=CAPACITY - 1)]


@mutant(f"aten.index_put at file.py {INTO}", flat=True)
class SlotForLateAdded(SlotForLate):
    def put(self, x: Tensor, ids: Tensor, at: Tensor) -> Tensor:
        return x.new_zeros(E, CAPACITY + 1, D).index_put((ids, at), x, accumulate=True)


@mutant(f"aten.index_put at file.py {INTO}", flat=True)
class SlotForLateMean(SlotForLate):
    """One row for all."""

    def put(self, x: Tensor, ids: Tensor, at: Tensor) -> Tensor:
        return x.new_zeros(E, CAPACITY + 1, D).index_put((ids, at), x.mean(0))
