"""Idioms that are rewritten: products batched over the experts, of all tokens, most of it multiplied by zero."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.loops import FF, D, E, idiom, weight


@idiom()
class EveryToken(nn.Module):
    """Weights on the input, so that tokens of others are zero.  `scores`, `tokens`, `body` and `total` are what a mutant changes."""

    def __init__(self) -> None:
        super().__init__()
        self.w13, self.w2 = weight(E, D, 2 * FF), weight(E, FF, D)

    def scores(self, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.full((ids.shape[0], E), -torch.inf).scatter_(1, ids, weights).float().sigmoid()

    def tokens(self, x: Tensor, scores: Tensor) -> Tensor:
        return x.repeat(E, 1) * scores.transpose(0, 1).reshape(-1, 1)

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return up * F.silu(gate)

    def body(self, rows: Tensor) -> Tensor:
        gate, up = torch.bmm(rows, self.w13).chunk(2, dim=-1)
        return torch.bmm(self.act(gate, up), self.w2)

    def total(self, y: Tensor) -> Tensor:
        return y.view(-1, D).reshape(E, -1, D).sum(dim=0)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = self.tokens(x, self.scores(ids, weights))
        return self.total(self.body(rows.view(E, -1, D)))


@idiom()
class EveryOnTop(EveryToken):
    def total(self, y: Tensor) -> Tensor:
        return super().total(y) + 1.0

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return F.layer_norm(x, (D,)).add_(super().forward(x, ids, weights))


@idiom()
class EveryOfZeros(EveryToken):
    def scores(self, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros(ids.shape[0], E, dtype=weights.dtype).scatter(1, ids, weights)

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        return (F.gelu(gate) * 2 - F.relu(gate)).clamp(-0.4, 0.5) * up.clamp(max=0.7)


@idiom()
class EverySoftmax(EveryToken):
    def scores(self, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.full((ids.shape[0], E), -torch.inf).scatter(1, ids, weights).softmax(-1)


@idiom()
class EveryExp(EveryToken):
    def scores(self, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.full_like(weights[:, :1].expand(-1, E), -torch.inf).scatter(-1, ids, weights).exp()


@idiom()
class EveryExpanded(EveryToken):
    """The hidden layer is square of a relu; scores as [E, T, 1]."""

    def tokens(self, x: Tensor, scores: Tensor) -> Tensor:
        return x.unsqueeze(0).expand(E, -1, -1) * scores.t().unsqueeze(-1)

    def body(self, rows: Tensor) -> Tensor:
        return torch.matmul(F.relu(torch.matmul(rows, self.w13)[..., :FF]).square(), self.w2)


@idiom()
class EveryWeighedAfter(EveryToken):
    """Biases, and gates that make something of nothing: the scores are on the results."""

    def __init__(self) -> None:
        super().__init__()
        self.b13, self.b2 = weight(E, 2 * FF), weight(E, D)

    def body(self, rows: Tensor) -> Tensor:
        both = torch.bmm(rows, self.w13) + self.b13[..., None, :]
        gate, up = both[..., ::2], both[..., 1::2]
        glu = gate.clamp(max=0.7) * torch.sigmoid(gate * 1.7)
        return torch.bmm((up.clamp(min=-0.7, max=0.7) + 1) * glu, self.w2) + self.b2[..., None, :]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = self.body(x.repeat(E, 1).view(E, -1, D))
        return (y * self.scores(ids, weights).transpose(0, 1)[..., None]).sum(dim=0)
