"""Idioms that are rewritten: GShard's tables [T, E, C], which say the slot of each token at its expert."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.loops import FF, D, E, Mlp, idiom, weight

CAPACITY = 3


@idiom(flat=True, distinct=False)
class GShard(nn.Module):
    """One expert a token; what was late is dropped.  The methods are what a variant or a mutant changes."""

    bias = True
    capacity = CAPACITY

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = weight(E, D, FF), weight(E, FF, D)
        if self.bias:
            self.b1, self.b2 = weight(E, 1, FF), weight(E, 1, D)

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask = F.one_hot(ids, E)
        places = torch.cumsum(mask, 0) - 1
        mask = mask * (places < self.capacity)
        at = (places * mask).sum(1)
        gates = weights[:, 0]
        return gates[:, None, None] * mask[:, :, None] * F.one_hot(at, self.capacity)[:, None, :]

    def dispatch(self, combine: Tensor) -> Tensor:
        return combine.bool()

    def made(self, rows: Tensor) -> Tensor:
        hidden = F.relu(torch.bmm(rows, self.up) + self.b1)
        return torch.bmm(hidden, self.down) + self.b2

    def total(self, combine: Tensor, made: Tensor) -> Tensor:
        return torch.einsum("tec,ecm->tm", combine, made)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        combine = self.combine(x, ids, weights)
        rows = torch.einsum("tec,tm->ecm", self.dispatch(combine).to(x.dtype), x)
        return self.total(combine, self.made(rows))


@idiom(flat=True, distinct=False)
class GShardOfMasks(GShard):
    """The places of the table; the layout from masks, as numbers of the layout."""

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask = F.one_hot(ids, E).float()
        places = torch.cumsum(mask, 0).sub(1.0)
        mask = mask * (places < float(self.capacity)).float()
        at = F.one_hot(places.clamp(0, self.capacity - 1).long(), self.capacity)
        self_dispatch = mask.unsqueeze(-1) * at
        return self_dispatch * weights[:, 0, None, None]

    def dispatch(self, combine: Tensor) -> Tensor:
        return (combine > 0).to(combine.dtype)


@idiom(flat=True, distinct=False)
class GShardOfNothing(GShard):
    """Weights of some tokens are zero, so that their slots are empty: what is made of nothing has a gradient."""

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().combine(x, ids, weights * (torch.arange(x.shape[0]) % 3 > 0)[:, None])


@idiom(flat=True, distinct=False)
class GShardTwiceWeighed(GShard):
    """Tokens are laid out with their weight, and places compared with those of all slots."""

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask = F.one_hot(ids, E)
        places = torch.cumsum(mask, 0)
        mask = mask * (places < self.capacity)
        at = (places * mask).sum(1)
        slot = at[:, None] == torch.arange(self.capacity)
        return (weights[:, 0, None] * mask)[:, :, None] * slot[:, None, :] * 0.5

    def dispatch(self, combine: Tensor) -> Tensor:
        return combine


@idiom(flat=True, distinct=False)
class GShardWithoutBias(GShard):
    """As DeepSpeed writes a first choice."""

    bias = False

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates = F.softmax(torch.cat([x[:, :2], weights], 1), 1)
        mask = F.one_hot(ids, num_classes=E)
        places = torch.cumsum(mask, dim=0) - 1
        mask *= torch.lt(places, self.capacity)
        at = torch.sum(places * mask, dim=1)
        gates = gates * mask.to(gates.dtype)
        return torch.einsum("se,sc->sec", gates, F.one_hot(at, self.capacity).to(gates.dtype))

    def made(self, rows: Tensor) -> Tensor:
        return torch.einsum("ecf,efm->ecm", F.gelu(torch.einsum("ecm,emf->ecf", rows, self.up)), self.down)

    def total(self, combine: Tensor, made: Tensor) -> Tensor:
        return torch.einsum("sec,ecm->sm", combine.type_as(made), made)


@idiom(distinct=False)
class GShardOfTwo(GShard):
    """Two choices, those of all first ones before; gates are normalised."""

    def places(self, mask1: Tensor, mask2: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.cumsum(mask1, 0) - 1
        second = torch.cumsum(mask2, 0) - 1
        second += torch.sum(mask1, 0, keepdim=True)
        return first, second

    def one(self, gates: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        at = F.one_hot((places * mask).sum(1), self.capacity).to(gates.dtype)
        return torch.einsum("se,sc->sec", torch.einsum("s,se->se", gates, mask.to(gates.dtype)), at)

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates = F.softmax(torch.cat([x[:, :2], weights], 1), 1)
        mask1, mask2 = F.one_hot(ids[:, 0], E), F.one_hot(ids[:, 1], E)
        first, second = self.places(mask1, mask2)
        mask1 *= torch.lt(first, self.capacity)
        mask2 *= torch.lt(second, self.capacity)
        gates1 = torch.einsum("se,se->s", gates, mask1.to(gates.dtype))
        gates2 = torch.einsum("se,se->s", gates, mask2.to(gates.dtype))
        whole = torch.clamp(gates1 + gates2, min=torch.finfo(gates.dtype).eps) + 0.5
        gates1 /= whole
        gates2 /= whole
        return self.one(gates1, mask1, first) + self.one(gates2, mask2, second)


@idiom(distinct=False)
class GShardBehindKept(GShardOfTwo):
    """The second choices behind those of the first that are not late."""

    def places(self, mask1: Tensor, mask2: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.cumsum(mask1, 0) - 1
        kept = mask1 * (first < self.capacity)
        return first, torch.cumsum(mask2, 0) - 1 + kept.sum(0)


@idiom(distinct=False)
class GShardFlat(GShardOfTwo):
    """As fairseq writes it: products of matrices with flat tables."""

    def one(self, gates: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        at = F.one_hot(torch.sum(places * mask, dim=1), num_classes=self.capacity)
        gates = gates.unsqueeze(-1) * mask.to(gates.dtype)
        return torch.bmm(gates.unsqueeze(-1), at.to(gates.dtype).unsqueeze(1))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        combine = self.combine(x, ids, weights)
        dispatch = combine.bool().to(x.dtype).permute(1, 2, 0)
        T, M = x.shape
        rows = torch.mm(dispatch.reshape(E * self.capacity, T), x).view(E, self.capacity, M)
        made = self.made(rows)
        return combine.view(T, E * self.capacity).mm(made.view(E * self.capacity, M))


@idiom(flat=True, distinct=False)
class GShardFlatCast(GShard):
    """A flat table in another dtype; gates over their sum, which is not zero."""

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        whole = weights.sum(1).clamp(min=1e-6)
        return super().combine(x, ids, weights) / whole[:, None, None]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = self.combine(x, ids, weights).view(x.shape[0], E * self.capacity)
        rows = torch.mm(flat.bool().to(x.dtype).t(), x).view(E, self.capacity, -1)
        return flat.mm(self.made(rows).view(E * self.capacity, -1))


@idiom(flat=True, distinct=False)
class GShardOverTiny(GShard):
    """Tokens that are late are divided by tiny numbers: zero, and so is its gradient."""

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask = F.one_hot(ids, E)
        late = (mask * torch.cumsum(mask, 0)).amax(1) > self.capacity
        whole = (weights.sum(1) * torch.where(late, 1e-25, 1.0)).clamp(min=1e-30)
        return super().combine(x, ids, weights) / whole[:, None, None]


# -- experts one by one ---------------------------------------------------------------------


class GShardListed(GShardOfTwo):
    """`parts` and `join` are what a variant or a mutant changes."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.experts = nn.ModuleList(Mlp() for _ in range(E))

    def parts(self, rows: Tensor) -> Any:
        return rows

    def join(self, made: list[Tensor]) -> Tensor:
        return torch.stack(made)

    def run(self, e: int, rows: Tensor) -> Tensor:
        return self.experts[e](rows)

    def made(self, rows: Tensor) -> Tensor:
        return self.join([self.run(e, part) for e, part in enumerate(self.parts(rows))])


@idiom(distinct=False)
class GShardUnbound(GShardListed):
    def parts(self, rows: Tensor) -> Any:
        return rows.unbind(0)


@idiom(distinct=False)
class GShardSelected(GShardListed):
    def parts(self, rows: Tensor) -> Any:
        return [rows[e] for e in range(E)]

    def join(self, made: list[Tensor]) -> Tensor:
        return torch.cat(made).view(E, self.capacity, D)


@idiom(distinct=False)
class GShardChunks(GShardListed):
    def parts(self, rows: Tensor) -> Any:
        return [part.squeeze(0) for part in rows.chunk(E, 0)]

    def join(self, made: list[Tensor]) -> Tensor:
        return torch.stack(made, 1).transpose(0, 1)


@idiom(flat=True, distinct=False)
class GShardListedFirst(GShardUnbound):
    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return GShard.combine(self, x, ids, weights)


class Experts(nn.Module):
    """As DeepSpeed and fairscale run them: on pieces [1, 1, C, D] of all slots."""

    def __init__(self) -> None:
        super().__init__()
        self.num_local_experts = E
        self.deepspeed_experts = nn.ModuleList(Mlp() for _ in range(E))

    def forward(self, inputs: Tensor) -> Tensor:
        chunks = inputs.chunk(self.num_local_experts, dim=1)
        outputs: list[Tensor] = []
        for chunk, expert in zip(chunks, self.deepspeed_experts, strict=False):
            out = expert(chunk)
            if isinstance(out, tuple):
                out = out[0]
            outputs += [out]
        return torch.cat(outputs, dim=1)


@idiom(distinct=False)
class GShardOfDeepSpeed(GShardOfTwo):
    """Its layer: experts in a list, on [groups of ranks, experts of a rank, C, D], here with one rank."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.experts = Experts()

    def laid(self, rows: Tensor) -> Tensor:
        return rows.reshape(1, E, -1, D)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        combine = self.combine(x, ids, weights)
        dispatched = torch.einsum("sec,sm->ecm", combine.bool().type_as(x), x)
        made = self.experts(self.laid(dispatched)).reshape(E, -1, D)
        return torch.einsum("sec,ecm->sm", combine.type_as(x), made)


class Gated(nn.Module):
    """An expert that slices, normalises, and adds what it got."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * FF), nn.Linear(FF, D)

    def forward(self, x: Tensor) -> Any:
        gate, up = self.up(self.norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up).mul_(0.5), None


@idiom(flat=True, distinct=False)
class GShardOfDeepSpeedGated(GShardOfDeepSpeed):
    def __init__(self) -> None:
        super().__init__()
        self.experts.deepspeed_experts = nn.ModuleList(Gated() for _ in range(E))

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return GShard.combine(self, x, ids, weights)


@idiom(distinct=False)
class GShardPieces(GShardListed):
    """Pieces [1, C, D], joined as they are."""

    def parts(self, rows: Tensor) -> Any:
        return rows.split(1)

    def join(self, made: list[Tensor]) -> Tensor:
        return torch.cat(made, 0)
