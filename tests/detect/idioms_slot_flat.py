"""Idioms that are rewritten: rows in slots that are numbered through, an expert's behind those of the one before."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.idioms_gshard import GShard
from tests.detect.idioms_slot_rows import CAPACITY, SlotRows
from tests.detect.loops import D, E, K, Mlp, idiom


@idiom(distinct=False)
class FlatSlots(SlotRows):
    """`slot`, `width` and what `SlotRows` has are what a mutant changes."""

    width = CAPACITY

    def slot(self, e: Tensor, at: Tensor) -> Tensor:
        return e * self.width + at

    def put(self, x: Tensor, e: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        buffer = x.new_zeros(E * self.slots, D)
        buffer[self.slot(e, at)] = rows
        return buffer.view(E, self.slots, D)

    def read(self, made: Tensor, e: Tensor, at: Tensor) -> Tensor:
        return made.view(E * self.slots, D)[self.slot(e, at)]


@idiom(distinct=False)
class FlatSlotsOfMore(FlatSlots):
    """More slots than are used; put by index_put; the place stands first."""

    width = slots = CAPACITY + 2

    def slot(self, e: Tensor, at: Tensor) -> Tensor:
        return at + self.width * e

    def put(self, x: Tensor, e: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        buffer = torch.zeros(E * self.slots, D).index_put((self.slot(e, at),), rows)
        return buffer.reshape(E, -1, D)

    def read(self, made: Tensor, e: Tensor, at: Tensor) -> Tensor:
        return made.flatten(0, 1)[self.slot(e, at)]


@idiom(distinct=False)
class FlatSlotsOfAll(FlatSlots):
    """Numbered for all rows, then taken for those who are not late."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        at = self.at(flat)
        kept = self.kept(at)
        slot, token = self.slot(flat, at)[kept], self.token(x)[kept]
        buffer = x.new_zeros(E * self.slots, D)
        buffer[slot] = x[token]
        made = self.made(buffer.view(E, self.slots, D)).reshape(-1, D)
        return self.add(x, token, made[self.taken(slot)] * weights.reshape(-1)[kept][:, None])

    def taken(self, slot: Tensor) -> Tensor:
        return slot


@idiom(distinct=False)
class FlatSlotsMixed(FlatSlots):
    """Put by numbers, read by expert and place."""

    def read(self, made: Tensor, e: Tensor, at: Tensor) -> Tensor:
        return made[e, at]


@idiom(distinct=False)
class FlatSlotsListed(FlatSlots):
    """Experts one by one, joined one behind the other."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.experts = nn.ModuleList(Mlp() for _ in range(E))

    def made(self, rows: Tensor) -> Tensor:
        return torch.cat([expert(rows[e]) for e, expert in enumerate(self.experts)])


@idiom(flat=True, distinct=False)
class FlatSlotForLate(GShard):
    """All rows: the last slot of each expert is for all who are late."""

    slots = CAPACITY + 1
    width = last = CAPACITY

    def slot(self, ids: Tensor, at: Tensor) -> Tensor:
        return ids * (self.width + 1) + at.clamp(max=self.last)

    def own(self, at: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        return rows * (weights[:, 0] * (at < self.capacity))[:, None]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        at = (torch.cumsum(F.one_hot(ids, E), 0) - 1).gather(1, ids[:, None]).squeeze(1)
        slot = self.slot(ids, at)
        buffer = x.new_zeros(E * self.slots, D)
        buffer[slot] = x
        made = self.made(buffer.view(E, self.slots, D))
        return self.own(at, made.view(-1, D)[slot], weights)


@idiom(distinct=False)
class FlatSlotForLateOfPairs(FlatSlotForLate):
    """Two choices."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.view(-1)
        at = SlotRows.at(self, flat)  # type: ignore[arg-type]
        slot, kept = self.slot(flat, at), at < self.capacity
        buffer = x.new_zeros(E * self.slots, D)
        buffer[slot] = x.repeat_interleave(K, 0)
        made = self.made(buffer.view(E, self.slots, D)).view(-1, D)
        return (made[slot] * (weights.view(-1) * kept).unsqueeze(1)).view(-1, K, D).sum(1)
