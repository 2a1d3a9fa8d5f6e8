"""Idioms that are rewritten: who is chosen, and what an expert computes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.loops import FF, D, E, K, Listed, Mlp, Stacked, idiom, weight

# -- who is chosen --------------------------------------------------------------------------


@idiom(any_ids=True)
class RangeWhere(Listed):
    pass


@idiom(any_ids=True)
class EnumerateWhere(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k].unsqueeze(-1))
        return out


@idiom(any_ids=True)
class NonzeroAsTuple(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = (ids == e).nonzero(as_tuple=True)
            out = out.index_add(0, t, expert(x[t]) * weights[t, k, None])
        return out


@idiom(any_ids=True)
class NonzeroTable(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            table = (ids == e).nonzero()
            t, k = table[:, 0], table[:, 1]
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@idiom()
class ChosenOnly(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(ids, self.num_experts).permute(2, 1, 0)
            hit = torch.greater(mask.sum((-1, -2)), 0).nonzero()
        for e in hit:
            e = e[0]
            k, t = torch.where(mask[e])
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@idiom()
class ChosenFromStartToEnd(Stacked):
    """Weights by expert, a class for masked tokens, and a copy of the list: `chosen` is what a mutant changes."""

    def chosen(self, hit: Tensor) -> Tensor:
        return hit[:]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        table = torch.zeros(x.shape[0], self.num_experts, dtype=x.dtype).scatter(1, ids, weights)
        mask = F.one_hot(ids, self.num_experts + 1).permute(2, 1, 0)
        for e in self.chosen(torch.greater(mask.sum((-1, -2)), 0).nonzero()):
            e = e[0]
            if e == self.num_experts:
                continue
            _, t = torch.where(mask[e])
            out.index_add_(0, t, self.expert(e, x[t]) * table[t, e, None])
        return out


@idiom()
class LoopOrNot(Stacked):
    """The other branch uses names of the loop."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self.num_experts == E:
            out = torch.zeros_like(x)
            for e in range(E):
                t, k = torch.where(ids == e)
                if t.numel() > 0:
                    y = self.expert(e, x[t])
                    out.index_add_(0, t, y * weights[t, k, None])
        else:
            y = x * 2
            out = y
        return out


@idiom()
class ChosenAsNumbers(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, self.num_experts).permute(2, 1, 0)
        for e in torch.greater(mask.sum((-1, -2)), 0).nonzero().squeeze(-1).tolist():
            k, t = torch.where(mask[e])
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@idiom()
class OldMixtral(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros((x.shape[0], D), dtype=x.dtype, device=x.device)
        mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            expert = self.experts[e]
            idx, top_x = torch.where(mask[e])
            rows = x[None, top_x].reshape(-1, D)
            out.index_add_(0, top_x, (expert(rows) * weights[top_x, idx, None]).to(x.dtype))
        return out


@idiom()
class OldMixtralHit(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros((x.shape[0], D), dtype=x.dtype, device=x.device)
        mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for e in hit:
            expert = self.experts[e]
            idx, top_x = torch.where(mask[e].squeeze(0))
            rows = x[None, top_x].reshape(-1, D)
            out.index_add_(0, top_x, (expert(rows) * weights[top_x, idx, None]).to(x.dtype))
        return out


@idiom(any_ids=True)
class TokenMask(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = ids == e
            mask = chosen.any(-1)
            out[mask] += expert(x[mask]) * (weights * chosen).sum(-1)[mask].unsqueeze(-1)
        return out


@idiom(any_ids=True)
class TokenMaskIfAny(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1)
            if mask.any():
                w = (weights * (ids == e)).sum(-1)
                out[mask] += expert(x[mask]) * w[mask, None]
        return out


@idiom(any_ids=True)
class SkipIfNotAny(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if not mask.any():
                continue
            t, k = torch.where(mask)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@idiom(any_ids=True)
class SkipIfSumIsZero(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.sum() == 0:
                continue
            t, k = torch.where(mask)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@idiom(any_ids=True)
class SkipIfNoRows(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.numel() == 0:
                continue
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@idiom(any_ids=True)
class IfRows(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.shape[0] > 0:
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@idiom(top_k=1, flat=True, any_ids=True)
class SwitchAssign(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            out[mask] = expert(x[mask])
        return out * weights[:, :1]


@idiom()
class Columns(Listed):
    """weights as a [T, E] table."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        probs = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, ids, weights)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t = torch.where(ids == e)[0]
            out.index_add_(0, t, expert(x[t]) * probs[:, e][t].unsqueeze(-1))
        return out


@idiom(any_ids=True)
class PutAccumulate(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_put_((t,), expert(x[t]) * weights[t, k, None], accumulate=True)
        return out


@idiom(any_ids=True)
class StartsKnown(Listed):
    """The sum starts from something else than zero."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = x * 2
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out = out.index_add(0, t, expert(x[t]) * weights[t, k, None])
        return out + 1


@idiom(any_ids=True)
class WeightsBefore(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t] * weights[t, k, None]))
        return out


@idiom(any_ids=True)
class Permuted(Listed):
    """Expert e has the weights of another: honoured."""

    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[(e + 1) % E](x)


@idiom(any_ids=True)
class Backwards(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in reversed(range(E)):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.experts[e](x[t]) * weights[t, k, None])
        return out


@idiom(any_ids=True)
class Transposed(nn.Module):
    """[E, D, F] with biases and interleaved gates."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1, self.w2, self.b2 = weight(E, D, 2 * FF), weight(E, 2 * FF), weight(E, FF, D), weight(E, D)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            h = x[t] @ self.w1[e] + self.b1[e]
            gate, up = h[..., ::2].clamp(max=1.0), h[..., 1::2].clamp(-1.0, 1.0)
            y = (gate * torch.sigmoid(1.7 * gate) * (up + 1)) @ self.w2[e] + self.b2[e]
            out.index_add_(0, t, y * weights[t, k, None])
        return out


@idiom(distinct=False)
class WithRouter(Listed):
    """Router and loop in one function."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        probs = self.gate(x).softmax(-1)
        top, chosen = probs.topk(K, -1)
        top = top / top.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (chosen == e).any(-1)
            if mask.any():
                w = (top * (chosen == e)).sum(-1)
                out[mask] += expert(x[mask]) * w[mask].unsqueeze(-1)
        return out


@idiom(any_ids=True)
class BatchOfSequences(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        b = x[None]
        flat = b.reshape(-1, b.shape[-1])
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(flat[t]) * weights[t, k, None])
        return out.reshape(b.shape)[0]


@idiom(any_ids=True)
class ShiftedStack(Stacked):
    """Expert e with the first weight of e and the second of e + 1."""

    def expert(self, e: Any, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.w13[e]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.w2[(e + 1) % E])

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@idiom(any_ids=True)
class ScaledByMean(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) * self.experts[e].up.weight.mean()


@idiom(any_ids=True)
class MaxOfRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return torch.max(self.experts[e](x), x)


@idiom(any_ids=True)
class ScaledByMeanOfSlice(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            y = self.expert(e, x[t]) * self.w2[e].abs().sum() / (1 + self.w13[e].mean())
            out.index_add_(0, t, y * weights[t, k, None])
        return out


@idiom(any_ids=True)
class ChangesRowsInPlace(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        x += 1
        return self.experts[e](x).mul_(0.5)


@idiom(any_ids=True)
class RaisesRowsInPlace(Listed):
    """`pow_` and `pow` name their overloads differently."""

    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x.pow_(2)).pow_(torch.full((), 2.0))


@idiom(any_ids=True)
class OtherIds(Listed):
    """The ids that choose are computed from those that come in."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, (ids + 1) % E, weights)


@idiom(any_ids=True)
class Shared(Listed):
    """Experts 0 and 3 are one module."""

    def __init__(self) -> None:
        super().__init__()
        self.experts[3] = self.experts[0]


@idiom(any_ids=True)
class Frozen(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts.requires_grad_(False)


@idiom(any_ids=True)
class SomeFrozen(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[1].requires_grad_(False)


@idiom(any_ids=True)
class Returns(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        return super().forward(x, ids, weights), weights * 2


@idiom(top_k=1, any_ids=True)
class OneOfMany(Listed):
    pass


@idiom(top_k=E, any_ids=True)
class AllOfThem(Listed):
    pass


@idiom(any_ids=True)
class SharedExpertFirst(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.shared = Mlp()

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = self.shared(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@idiom(any_ids=True)
class CountsForEverybody(Stacked):
    """A buffer that counts the rows of all experts, outside of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(E))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        self.load.add_((ids[:, :, None] == torch.arange(E)).sum((0, 1)))
        return out


@idiom(any_ids=True)
class ComputedTwice(Listed):
    """The same value without and with a gradient."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            size = (x * 2).abs().mean()
        twice = x * 2
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(twice[t]) * weights[t, k, None])
        return out * size


# -- what an expert computes ----------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm, self.mlp = norm(D), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class HandNorm(nn.Module):
    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((D, FF), (D, FF), (FF, D)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Scaled(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(D, D), nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.b(self.a(x))


class SoftmaxFeatures(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class Detached(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)).detach() * self.up(x))


class TiedGate(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.up.weight = self.gate.weight


class NoDropout(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.0, self.training)


EXPERTS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: Mlp(F.relu), "silu": lambda: Mlp(F.silu, bias=False), "tanh": lambda: Mlp(torch.tanh),
    "gelu_tanh": lambda: Mlp(nn.GELU(approximate="tanh")), "relu2": lambda: Mlp(lambda x: F.relu(x).square()),
    "gated": Gated, "scaled": Scaled, "layer_norm": lambda: Normed(nn.LayerNorm), "rms_norm": lambda: Normed(nn.RMSNorm),
    "hand_norm": lambda: Normed(HandNorm), "lora": Lora, "softmax": SoftmaxFeatures, "detached": Detached,
    "tied_gate": TiedGate, "no_dropout": NoDropout,
    "sequential": lambda: nn.Sequential(nn.Linear(D, FF), nn.ReLU(), nn.Linear(FF, D), nn.Dropout(0.0)),
    "identity_norm": lambda: nn.LayerNorm(D), "no_affine": lambda: Normed(lambda d: nn.LayerNorm(d, elementwise_affine=False)),
}  # fmt: skip
