"""Idioms that are rewritten: rows that are put into slots by index, and read back from there."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.idioms_gshard import GShard
from tests.detect.loops import D, E, K, Mlp, idiom

CAPACITY = 3


@idiom(distinct=False)
class SlotRows(GShard):
    """Rows of pairs that are not late, as in an implementation of capacity by hand.  The methods are what others change."""

    slots = CAPACITY

    def at(self, flat: Tensor) -> Tensor:
        places = torch.cumsum(F.one_hot(flat, E), 0) - 1
        return places.gather(1, flat[:, None]).squeeze(1)

    def kept(self, at: Tensor) -> Tensor:
        return at < self.capacity

    def token(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[0]).repeat_interleave(K)

    def put(self, x: Tensor, e: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        buffer = x.new_zeros(E, self.slots, D)
        buffer[e, at] = rows
        return buffer

    def read(self, made: Tensor, e: Tensor, at: Tensor) -> Tensor:
        return made[e, at]

    def add(self, x: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, token, rows)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        at = self.at(flat)
        kept = self.kept(at)
        token, e, place = self.token(x)[kept], flat[kept], at[kept]
        made = self.made(self.put(x, e, place, x[token]))
        return self.add(x, token, self.read(made, e, place) * weights.reshape(-1)[kept][:, None])


@idiom(distinct=False)
class SlotRowsByPlace(SlotRows):
    """Places from one, of which the first slot is nobody's; more slots than are used."""

    slots = CAPACITY + 2

    def at(self, flat: Tensor) -> Tensor:
        return torch.cumsum(F.one_hot(flat, E), 0)[torch.arange(flat.shape[0]), flat]

    def token(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[0] * K) // K

    def add(self, x: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return x.index_put((token,), rows, accumulate=True)


@idiom(distinct=False)
class SlotRowsListed(SlotRows):
    """Experts one by one, joined."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.experts = nn.ModuleList(Mlp() for _ in range(E))

    def made(self, rows: Tensor) -> Tensor:
        return torch.stack([expert(rows[e]) for e, expert in enumerate(self.experts)])


@idiom(distinct=False)
class SlotRowsOfPairs(SlotRows):
    """Rows of all pairs, which are zero where one is late, summed over the choices of a token."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        at = self.at(flat)
        rows = self.kept(at).nonzero().squeeze(-1)
        e, place = flat[rows], at[rows]
        made = self.made(self.put(x, e, place, x[rows // K] * weights.reshape(-1)[rows].unsqueeze(-1)))
        out = x.new_zeros(flat.shape[0], D)
        out[rows] = made[e, place]
        return self.sum(out, weights)

    def sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        return (rows.view(-1, K, D) * weights[..., None]).sum(1)


@idiom(flat=True, distinct=False)
class SlotRowsOfOne(SlotRows):
    """One expert a token."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        at = self.at(ids)
        kept = torch.where(self.kept(at))[0]
        out = torch.zeros_like(x)
        out[kept] = self.made(self.put(x, ids[kept], at[kept], x[kept]))[ids[kept], at[kept]]
        return out * weights[:, :1]


@idiom(flat=True, distinct=False)
class SlotForLate(GShard):
    """All rows: a slot more of each expert is for all who are late.  The methods are what others change."""

    last = CAPACITY

    def put(self, x: Tensor, ids: Tensor, at: Tensor) -> Tensor:
        slots = x.new_zeros(E, CAPACITY + 1, D)
        slots[ids, at] = x
        return slots

    def own(self, at: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        return rows * (weights[:, 0] * (at < self.capacity))[:, None]

    def read(self, made: Tensor, ids: Tensor, at: Tensor) -> Tensor:
        return made[ids, at]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask = F.one_hot(ids, E)
        at = ((torch.cumsum(mask, 0) - 1) * mask).sum(1)
        inside = at.clamp(max=self.last)
        return self.own(at, self.read(self.made(self.put(x, ids, inside)), ids, inside), weights)


@idiom(flat=True, distinct=False)
class SlotForLateChosen(SlotForLate):
    def own(self, at: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        return torch.where((at < self.capacity)[:, None], rows * weights[:, :1], 0.0)


@idiom(distinct=False)
class SlotForLateOfPairs(GShard):
    """Two choices; experts do not run on the slot of the late."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.view(-1)
        at = SlotRows.at(self, flat)  # type: ignore[arg-type]
        kept = at < self.capacity
        slots = x.new_zeros(E, CAPACITY + 1, D)
        slots[flat, at.clamp(max=CAPACITY)] = x.repeat_interleave(K, 0)
        made = self.made(slots[:, :CAPACITY])
        rows = made[flat, at.clamp(max=CAPACITY - 1)] * (weights.view(-1) * kept).unsqueeze(1)
        return rows.view(-1, K, D).sum(1)
