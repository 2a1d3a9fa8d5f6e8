"""Mutants of weights that are gathered by one expert of each token."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_picked_columns import (
    PickedByColumn,
    PickedByColumnBiased,
    PickedByColumnBmm,
    PickedByColumnListed,
    PickedByVector,
    PickedMatmul,
)
from tests.detect.loops import D, E, mutant

# -- by column ------------------------------------------------------------------------------


@mutant("something else is added for column 1 of the expert ids than for column 0", distinct=False)
class GatheredColumnOfWeights(PickedByColumn):
    """The other expert's weight."""

    def weigh(self, y: Tensor, weights: Tensor, k: int) -> Tensor:
        return y * weights[:, 1 - k, None]


@mutant("something else is added for column 1 of the expert ids than for column 0", distinct=False)
class GatheredColumnOfWeightsAlike(PickedByColumn):
    """The first expert's weight for both."""

    def weigh(self, y: Tensor, weights: Tensor, k: int) -> Tensor:
        return y * weights[:, :1]


@mutant("experts of columns [0, 2] of the ids are added, of 3", top_k=3, distinct=False)
class GatheredColumnLeftOut(PickedByColumn):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        out = self.start(x)
        for k in (0, 2):
            out = out + self.weigh(self.expert(x, *self.weights_of(ids[:, k])), weights, k)
        return out


@mutant("something else is added for column 1 of the expert ids than for column 0", distinct=False)
class GatheredColumnOfScaledTokens(PickedByColumn):
    """The second expert gets something else."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        out = self.start(x)
        for k in range(ids.shape[1]):
            out = out + self.weigh(self.expert(x * (k + 1), *self.weights_of(ids[:, k])), weights, k)
        return out


@mutant("the function holds 2 sums over experts, which share their loops", distinct=False)
class GatheredColumnOfOtherWeights(PickedByColumn):
    """The last product by the other expert."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        out = self.start(x)
        for k in range(ids.shape[1]):
            w1, w3, _ = self.weights_of(ids[:, k])
            out = out + self.weigh(self.expert(x, w1, w3, self.w2[ids[:, 1 - k]]), weights, k)
        return out


@mutant("the function holds 2 sums over experts, which share their loops", distinct=False)
class GatheredColumnsSubtracted(PickedByColumn):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        out = self.start(x)
        for k in range(ids.shape[1]):
            out = out - self.weigh(self.expert(x, *self.weights_of(ids[:, k])), weights, k)
        return out


@mutant("the function holds 2 sums over experts, which share their loops", distinct=False)
class GatheredColumnsWithFactor(PickedByColumn):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        out = self.start(x)
        for k in range(ids.shape[1]):
            out = torch.add(out, self.weigh(self.expert(x, *self.weights_of(ids[:, k])), weights, k), alpha=2)
        return out


@mutant("aten.einsum at file.py ends a single product with matrices gathered by select", distinct=False)
class GatheredColumnsMixTokens(PickedByColumn):
    def expert(self, x: Tensor, *own: Tensor) -> Tensor:
        w1, w3, w2 = own
        h = torch.einsum("td,tfd->tf", x, w1)
        return torch.einsum("tf,tdf->td", h - h.mean(0), w2)


@mutant("aten.einsum at file.py ends a single product with matrices gathered by select", distinct=False)
class GatheredColumnsRolled(PickedByColumn):
    """Each token's last product is with the row of the token before."""

    def expert(self, x: Tensor, *own: Tensor) -> Tensor:
        w1, w3, w2 = own
        return torch.einsum("tf,tdf->td", torch.einsum("td,tfd->tf", x, w1).roll(1, 0), w2)


@mutant("the function holds 2 sums over experts, which share their loops", distinct=False)
class GatheredColumnsRolledWeights(PickedByColumn):
    def weights_of(self, ids: Tensor) -> tuple[Tensor, ...]:
        return self.w1[ids], self.w3[ids], self.w2[ids].roll(1, 0)


@mutant("the function holds 2 sums over experts, which share their loops", distinct=False)
class GatheredColumnsDropout(PickedByColumnBmm):
    def expert(self, x: Tensor, *own: Tensor) -> Tensor:
        return F.dropout(super().expert(x, *own), 0.5)


@mutant("the function holds 2 sums over experts, which share their loops", distinct=False)
class GatheredColumnsNoGrad(PickedByColumn):
    def weigh(self, y: Tensor, weights: Tensor, k: int) -> Tensor:
        with torch.no_grad():
            return super().weigh(y, weights, k)


@mutant("something else is added for column 1 of the expert ids than for column 0", distinct=False)
class GatheredColumnsNoGradWeights(PickedByColumn):
    """A column that is taken under no_grad has no gradient."""

    def weigh(self, y: Tensor, weights: Tensor, k: int) -> Tensor:
        with torch.no_grad():
            column = weights[:, k]
        return y * column.unsqueeze(-1)


@mutant("something else is added for column 1 of the expert ids than for column 0", distinct=False)
class GatheredColumnsNoGradUnbound(PickedByColumn):
    def weigh(self, y: Tensor, weights: Tensor, k: int) -> Tensor:
        with torch.no_grad():
            columns = weights.unbind(1)
        return y * columns[k].unsqueeze(-1)


@mutant("nothing is summed over experts", distinct=False)
class GatheredColumnsNoGradView(PickedByColumnBmm):
    """A view of the tokens has no gradient there."""

    def expert(self, x: Tensor, *own: Tensor) -> Tensor:
        with torch.no_grad():
            column = x.unsqueeze(-1)
        w1, w3, w2 = own
        return torch.bmm(w2, torch.bmm(w1, column).tanh()).squeeze(-1)


@mutant("4 experts are used, w3 holds 8", distinct=False)
class GatheredColumnsOfFewer(PickedByColumn):
    """Ids that no expert of the last product has are an error there alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w3 = torch.nn.Parameter(torch.cat([self.w3.detach(), self.w3.detach()]))


@mutant("select is changed in place while the experts run", distinct=False, forward_only=True)
class GatheredColumnsOfChangedIds(PickedByColumn):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        ids = ids.clone()
        out = self.start(x)
        for k in range(ids.shape[1]):
            out = out + self.weigh(self.expert(x, *self.weights_of(ids[:, k])), weights, k)
            ids.add_(1).remainder_(E)
        return out


@mutant("add is changed in place while the experts run", distinct=False, forward_only=True)
class GatheredColumnsAddedToInput(PickedByColumnBmm):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        return super().forward(x + 1, ids, weights)

    def start(self, x: Tensor) -> Tensor:
        return x


@mutant("the function holds 2 sums over experts, which share their loops", distinct=False, forward_only=True)
class GatheredColumnsReadBetween(PickedByColumnBmm):
    """What the first expert added is read before the second adds."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        out = self.start(x)
        for k in range(ids.shape[1]):
            out += self.weigh(self.expert(x, *self.weights_of(ids[:, k])), weights, k)
            if k == 0:
                first = out.norm(dim=-1, keepdim=True)
        return out / (1 + first)


@mutant("view is read after it was changed in place through another name", distinct=False)
class GatheredColumnsReadAfter(PickedByColumnBmm):
    """Another name of the sum."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        out = self.start(x)
        seen = out.view(-1)
        for k in range(ids.shape[1]):
            out += self.weigh(self.expert(x, *self.weights_of(ids[:, k])), weights, k)
        return out + seen.view_as(out)


@mutant("something else is added for column 1 of the expert ids than for column 0", distinct=False)
class GatheredColumnsScaledBetween(PickedByColumn):
    """The first expert's result counts half."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        out = self.start(x)
        for k in range(ids.shape[1]):
            out = out / 2 + self.weigh(self.expert(x, *self.weights_of(ids[:, k])), weights, k)
        return out


@mutant("nothing is summed over experts", distinct=False)
class GatheredColumnsWithBiasTwice(PickedByColumnBiased):
    """baddbmm with a factor."""

    def expert(self, x: Tensor, *own: Tensor) -> Tensor:
        b13, w13, b2, w2 = own
        gate, up = torch.baddbmm(b13.unsqueeze(1), x.unsqueeze(1), w13, beta=2).chunk(2, dim=-1)
        return torch.bmm(gate.sigmoid() * up, w2).squeeze(1) + b2


@mutant("nothing is summed over experts", distinct=False)
class GatheredColumnsWithBiasOfOthers(PickedByColumnBiased):
    def weights_of(self, ids: Tensor) -> tuple[Tensor, ...]:
        b13, w13, b2, w2 = super().weights_of(ids)
        return b13.roll(1, 0), w13, b2, w2


@mutant("something else is added for column 1 of the expert ids than for column 0", distinct=False)
class GatheredColumnsOfAnyStart(PickedByColumnListed):
    """Each column adds to something of its own."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        out = x
        for k in range(ids.shape[1]):
            out = out + (x.sin() + self.expert(x, *self.weights_of(ids[:, k])) * weights[:, k, None] * (k + 1))
        return out


# -- by one vector --------------------------------------------------------------------------


@mutant("aten.einsum at file.py ends a single product with matrices gathered by ids", flat=True, distinct=False)
class GatheredVectorOfOneMatrix(PickedByVector):
    """One product is none of experts': a cache is read so."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        return torch.einsum("td,tfd->tf", x, self.w1[ids])


@mutant("nothing is summed over experts", flat=True, distinct=False)
class GatheredVectorRolled(PickedByVector):
    def weights_of(self, ids: Tensor) -> tuple[Tensor, ...]:
        return self.w1[ids].roll(1, 0), self.w3[ids].roll(1, 0), self.w2[ids]


@mutant("nothing is summed over experts", flat=True, distinct=False)
class GatheredVectorOfOtherLetters(PickedByVector):
    """The matrices of all tokens are added."""

    def expert(self, x: Tensor, *own: Tensor) -> Tensor:
        w1, w3, w2 = own
        h = torch.einsum("td,sfd->tf", x, w1)
        return torch.einsum("tf,sdf->td", h, w2)


@mutant("bmm_1 is read after it was changed in place through another name", flat=True, distinct=False)
class GatheredVectorChangedAfter(PickedByVector):
    """Another name of the result is read after it changed."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        w1, _, w2 = self.weights_of(ids)
        y = torch.bmm(w2, torch.bmm(w1, x.unsqueeze(-1)).tanh())
        flat = y.squeeze(-1)
        flat.add_(x)
        return flat + y.squeeze(-1)


@mutant("table is changed in place while the experts run", flat=True, distinct=False)
class GatheredVectorOfChangedWeights(PickedByVector):
    """The weights are scaled in place behind the products."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(E, D, D))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        h = torch.einsum("td,tfd->tf", x, self.table[ids]).tanh()
        self.table.mul_(0.5)
        return torch.einsum("td,tfd->tf", h, self.table[ids])


# -- by a table -----------------------------------------------------------------------------


@mutant("nothing is summed over experts", distinct=False)
class GatheredMatmulTurned(PickedMatmul):
    """The choices of a token change places."""

    def weights_of(self, ids: Tensor) -> tuple[Tensor, ...]:
        return self.w1[ids], self.w3[ids], self.w2[ids].flip(1)


@mutant("nothing is summed over experts", distinct=False, top_k=1)
class GatheredMatmulOfOneKept(PickedMatmul):
    """The dimension of the choices stays."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        w1, _, w2 = self.weights_of(ids)
        return (w2 @ torch.relu(w1 @ x[:, None, :, None])).squeeze(-1)
