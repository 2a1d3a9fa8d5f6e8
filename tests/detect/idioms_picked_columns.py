"""Idioms that are rewritten: weights gathered by one expert of each token, column by column or for one column alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.idioms_sorted import Batched
from tests.detect.loops import FF, D, E, idiom, weight


@idiom(distinct=False)
class PickedByColumn(nn.Module):
    """`weights_of`, `expert`, `weigh`, `start` and `column` are what a mutant changes."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = weight(E, FF, D), weight(E, FF, D), weight(E, D, FF)

    def column(self, ids: Tensor, k: int) -> Tensor:
        return ids[:, k]

    def weights_of(self, ids: Tensor) -> tuple[Tensor, ...]:
        return self.w1[ids], self.w3[ids], self.w2[ids]

    def expert(self, x: Tensor, *own: Tensor) -> Tensor:
        w1, w3, w2 = own
        h = F.silu(torch.einsum("td,tfd->tf", x, w1)) * torch.einsum("td,tfd->tf", x, w3)
        return torch.einsum("tf,tdf->td", h, w2)

    def weigh(self, y: Tensor, weights: Tensor, k: int) -> Tensor:
        return y * weights[:, k, None]

    def start(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        out = self.start(x)
        for k in range(ids.shape[1]):
            own = self.weights_of(self.column(ids, k))
            out = out + self.weigh(self.expert(x, *own), weights, k)
        return out


@idiom(distinct=False, top_k=3)
class PickedByColumnBmm(PickedByColumn):
    """bmm with vectors as columns; added in place."""

    def expert(self, x: Tensor, *own: Tensor) -> Tensor:
        w1, w3, w2 = own
        x = x.unsqueeze(-1)
        h = F.silu(torch.bmm(w1, x)) * torch.bmm(w3, x)
        return torch.bmm(w2, h).squeeze(-1)

    def weigh(self, y: Tensor, weights: Tensor, k: int) -> Tensor:
        return weights[:, k : k + 1] * y

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        out = self.start(x)
        for k in range(ids.shape[1]):
            out += self.weigh(self.expert(x, *self.weights_of(ids[:, k])), weights, k)
        return out


@idiom(distinct=False)
class PickedByColumnBiased(PickedByColumn):
    """Gate and up in one, [E, D, 2F], biases with baddbmm and by index, weights by einsum; added to x."""

    def __init__(self) -> None:
        super().__init__()
        self.w13, self.b13, self.w2, self.b2 = weight(E, D, 2 * FF), weight(E, 2 * FF), weight(E, FF, D), weight(E, D)

    def weights_of(self, ids: Tensor) -> tuple[Tensor, ...]:
        return self.b13[ids], self.w13[ids], self.b2[ids], self.w2[ids]

    def expert(self, x: Tensor, *own: Tensor) -> Tensor:
        b13, w13, b2, w2 = own
        gate, up = torch.baddbmm(b13.unsqueeze(1), x.unsqueeze(1), w13).chunk(2, dim=-1)
        return torch.bmm(gate.sigmoid() * up, w2).squeeze(1) + b2

    def weigh(self, y: Tensor, weights: Tensor, k: int) -> Tensor:
        return torch.einsum("td,t->td", y, weights[:, k])

    def start(self, x: Tensor) -> Tensor:
        return x.tanh()


@idiom(distinct=False, top_k=3)
class PickedByColumnListed(PickedByColumn):
    """sum() of a list; columns of unbind; matrices turned after they are gathered."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        columns = zip(ids.unbind(1), weights.unbind(-1), strict=True)
        return sum(self.expert(x, *self.weights_of(i)) * w.unsqueeze(-1) for i, w in columns)

    def weights_of(self, ids: Tensor) -> tuple[Tensor, ...]:
        return self.w1[ids].transpose(1, 2), self.w2.index_select(0, ids).mT

    def expert(self, x: Tensor, *own: Tensor) -> Tensor:
        w1, w2 = own
        return (F.gelu(x[:, None] @ w1) @ w2)[:, 0]


@idiom(distinct=False)
class PickedByColumnAppended(PickedByColumn):
    """Without a start."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        out = None
        for k in range(ids.shape[1]):
            y = self.weigh(self.expert(x, *self.weights_of(ids[:, k])), weights, k)
            out = y if out is None else out + y
        return out


@idiom(distinct=False, flat=True)
class PickedByVector(PickedByColumn):
    """One expert a token; its rows go on as ordinary values."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        y = self.expert(x, *self.weights_of(ids)) * weights[:, :1]
        return F.layer_norm(x + y, (D,))


@idiom(distinct=False, flat=True)
class PickedByVectorAlone(PickedByColumnBiased):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        return self.expert(x, *self.weights_of(ids))


@idiom(distinct=False)
class PickedFirstOfTable(PickedByColumnBmm):
    """The first choice alone, which is read twice."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        first = ids[:, 0]
        y = self.expert(x, *self.weights_of(first)) * weights.amax(-1, keepdim=True)
        return y, y.norm(dim=-1)


@idiom(distinct=False)
class PickedMatmul(PickedByColumn):
    """[T, K, F, D] @ [T, 1, D, 1]."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        w1, w3, w2 = self.weights_of(ids)
        column = x[:, None, :, None]
        h = F.silu(torch.matmul(w1, column).squeeze(-1)) * (w3 @ column).squeeze(-1)
        y = (w2 @ h.unsqueeze(-1)).squeeze(-1)
        return (y * weights.unsqueeze(-1)).sum(1)


@idiom(distinct=False)
class PickedMatmulRows(PickedByColumnBiased):
    """[T, K, 1, D] @ [T, K, D, F], the tokens repeated; a bias of the expert."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        b13, w13, b2, w2 = self.weights_of(ids)
        rows = x.unsqueeze(1).expand(-1, ids.shape[1], -1).unsqueeze(2)
        gate, up = (torch.matmul(rows, w13).squeeze(2) + b13).split(FF, -1)
        y = ((gate.tanh() * up)[:, :, None, :] @ w2)[..., 0, :] + b2
        return torch.einsum("tk,tkd->td", weights, y)


@idiom(distinct=False, top_k=1)
class PickedMatmulAlone(PickedMatmul):
    """One expert a token in a table of ids, whose dimension is dropped."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        w1, _, w2 = self.weights_of(ids)
        h = torch.relu(w1 @ x[:, None, :, None])
        return (w2 @ h).squeeze(-1).squeeze(1)


# -- of which a part is rewritten -----------------------------------------------------------


@idiom(distinct=False)
class PickedInTurn(PickedByColumn):
    """The second expert gets what the first made: the first alone is a region."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        for k in range(ids.shape[1]):
            x = x + self.weigh(self.expert(x, *self.weights_of(ids[:, k])), weights, k)
        return x


@idiom(distinct=False)
class PickedByTwoTables(PickedByColumn):
    """The second expert is the one after the second choice: columns of two tables are no sum over pairs."""

    def column(self, ids: Tensor, k: int) -> Tensor:
        return ids[:, 0] if k == 0 else (ids + 1).remainder(E)[:, 1]


@idiom(flat=True, distinct=False)
class PickedByVectorKeepsOne(PickedByVectorAlone):
    """A dimension that stays: what all tokens have is added to each, behind the region."""

    def expert(self, x: Tensor, *own: Tensor) -> Tensor:
        b13, w13, b2, w2 = own
        gate, up = torch.baddbmm(b13.unsqueeze(1), x.unsqueeze(1), w13).chunk(2, dim=-1)
        return torch.bmm(gate.sigmoid() * up, w2) + b2


@idiom(distinct=False)
class PickedByRemainder(Batched):
    """Pairs in a row, by a vector that is no table of ids: each pair is a token with one expert."""

    def flat(self, ids: Tensor) -> Tensor:
        return ids.reshape(-1) % (E - 1)
