"""Idioms that are rewritten: each expert has a list of tokens, as where experts choose theirs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.loops import FF, D, E, Listed, Stacked, idiom, weight


def scores(x: Tensor, weights: Tensor) -> Tensor:
    """[T, E]: any function of the tokens will do."""
    return torch.sigmoid(x[:, :E] + weights.sum(-1, keepdim=True))


def each(tokens: int) -> int:
    """How many tokens an expert chooses."""
    return (tokens + 1) // 2


def best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """For each expert the best of [T, E], and which tokens those are: [E, C]."""
    values, tokens = scores.t().topk(each(scores.shape[0]))
    return values, tokens


@idiom(distinct=False)
class ExpertChoice(Listed):
    """`lists`, `run` and `put` are what a mutant changes."""

    def lists(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return best(scores(x, weights))

    def put(self, out: Tensor, tokens: Tensor, y: Tensor) -> Tensor:
        return out.index_add_(0, tokens, y)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, tokens = self.lists(x, weights)
        out = torch.zeros_like(x)
        for e in range(len(self.experts)):
            out = self.put(out, tokens[e], self.run(e, x[tokens[e]]) * gates[e, :, None])
        return out


@idiom(distinct=False)
class ChoiceOnTop(ExpertChoice):
    """Into a residual, out of place."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, tokens = self.lists(x, weights)
        out = x * 0.5
        for gate, token, expert in zip(gates, tokens, self.experts, strict=True):
            out = out.index_add(0, token, gate.unsqueeze(-1) * expert(x.index_select(0, token)))
        return out + x


@idiom(distinct=False)
class ChoiceOneByOne(ExpertChoice):
    """A topk for each expert."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        every, out = scores(x, weights), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            gate, token = every[:, e].topk(each(x.shape[0]))
            out.index_add_(0, token, expert(x[token]) * gate[:, None])
        return out


@idiom(distinct=False)
class ChoiceOfAll(ExpertChoice):
    """The rows of all experts are gathered before the loop; tokens may repeat."""

    def lists(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        gates, tokens = best(scores(x, weights))
        return torch.cat([gates, gates * 2], 1), torch.cat([tokens, tokens], 1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, tokens = self.lists(x, weights)
        rows, out = x[tokens], torch.zeros_like(x)
        for e in range(len(self.experts)):
            out.index_add_(0, tokens[e], self.run(e, rows[e]) * gates[e, :, None])
        return out


@idiom(distinct=False)
class ChoiceOfStacked(Stacked):
    """`weight_of` is what a mutant changes."""

    def weight_of(self, e: int) -> int:
        return e

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, tokens = best(scores(x, weights))
        out = torch.zeros_like(x)
        for e in range(E):
            y = self.expert(self.weight_of(e), x[tokens[e]])
            out.index_add_(0, tokens[e], y * gates[e].unsqueeze(-1))
        return out


@idiom(distinct=False)
class ChoiceOfTurned(ChoiceOfStacked):
    """Each list goes to the next expert's weights."""

    def weight_of(self, e: int) -> int:
        return (e + 1) % E


@idiom(distinct=False)
class ChoiceOfLastFirst(ExpertChoice):
    """The last expert first, in place inside of the experts, with work that all share."""

    def run(self, e: int, x: Tensor) -> Tensor:
        return super().run(e, x).mul_(0.5).relu_()

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        h, (gates, tokens) = F.layer_norm(x, (D,)), self.lists(x, weights)
        out = torch.zeros_like(x)
        for e in reversed(range(E)):
            y = self.run(e, h[tokens[e]]) + x[tokens[e]]
            out.index_add_(0, tokens[e], y * gates[e, :, None])
        return out


@idiom(distinct=False)
class ChoiceWithoutGates(nn.Module):
    """Bare products, and a bias of each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.bias, self.down = weight(E, D, FF), weight(E, FF), weight(E, FF, D)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        _, tokens = best(scores(x, weights))
        out = torch.zeros_like(x)
        for e in range(E):
            out.index_add_(0, tokens[e], torch.tanh(x[tokens[e]] @ self.up[e] + self.bias[e]) @ self.down[e])
        return out


@idiom(distinct=False)
class ChoiceMoved(ExpertChoice):
    """The rows of one list are added at the places of another."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, tokens = self.lists(x, weights)
        out = torch.zeros_like(x)
        for e in range(E):
            out.index_add_(0, tokens[e], self.run(e, x[tokens[(e + 1) % E]]) * gates[e, :, None])
        return out


@idiom(distinct=False)
class ChoiceSeen(ExpertChoice):
    """What an expert makes is used outside too."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gates, tokens = self.lists(x, weights)
        out, seen = torch.zeros_like(x), []
        for e in range(E):
            y = self.run(e, x[tokens[e]])
            out.index_add_(0, tokens[e], y * gates[e, :, None])
            seen.append(y.sum())
        return out, torch.stack(seen)


@idiom(distinct=False)
class ChoiceInPlaceOnTop(ExpertChoice):
    """Into a residual, in place."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, tokens = self.lists(x, weights)
        out = torch.sin(x)
        for e, expert in enumerate(self.experts):
            out.index_add_(0, tokens[e], gates[e, :, None] * expert(x[tokens[e]]))
        return out


@idiom(distinct=False)
class ChoiceScattered(ExpertChoice):
    def put(self, out: Tensor, tokens: Tensor, y: Tensor) -> Tensor:
        return out.scatter_add_(0, tokens[:, None].expand_as(y), y)


@idiom(distinct=False, empty=False)
class ChoiceScatteredOnTop(ChoiceInPlaceOnTop):
    """One token each."""

    def lists(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return scores(x, weights).t().topk(1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, tokens = self.lists(x, weights)
        out = x * 0.5
        for e, expert in enumerate(self.experts):
            y = gates[e].unsqueeze(-1) * expert(x[tokens[e]])
            out = out.scatter_add(0, tokens[e].unsqueeze(-1).repeat(1, D), y)
        return out
