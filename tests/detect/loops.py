"""Small mixture-of-experts modules, written by hand: the idioms that are rewritten, and the mutants that must not be.

`@idiom(...)` and `@mutant(reason)` put a module class into `IDIOMS` or `MUTANTS`.  All have `forward(x, ids, weights)`
with T tokens of width D, K experts per token out of E.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T, K, E, D, FF = 11, 2, 4, 6, 10


@dataclass(frozen=True)
class Idiom:
    make: Callable[[], nn.Module]
    distinct: bool = True  # its ids have to be known as those of a topk
    top_k: int = K
    flat: bool = False  # ids are a vector [T]
    any_ids: bool = False  # ids out of range add nothing
    empty: bool = True  # the original runs with T = 0


@dataclass(frozen=True)
class Mutant:
    make: Callable[[], nn.Module]
    reason: str
    top_k: int = K
    flat: bool = False
    distinct: bool = True
    inputs: Any = None
    repeats: bool = field(default=False)  # call with ids that repeat in a row


IDIOMS: dict[str, Idiom] = {}
MUTANTS: dict[str, Mutant] = {}


def idiom(**options: Any) -> Callable[[type], type]:
    def register(cls: type) -> type:
        IDIOMS[cls.__name__] = Idiom(cls, **options)
        return cls

    return register


def mutant(reason: str, **options: Any) -> Callable[[type], type]:
    def register(cls: type) -> type:
        assert cls.__name__ not in MUTANTS
        MUTANTS[cls.__name__] = Mutant(cls, reason, **options)
        return cls

    return register


def routed(seed: int = 0, tokens: int = T, top_k: int = K, num_experts: int = E, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids without repetition in a row, weights."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, num_experts, generator=g).argsort(-1)[:, :top_k].contiguous()
    x = torch.randn(tokens, D, generator=g, dtype=dtype)
    return x, ids, torch.rand(tokens, top_k, generator=g).to(dtype) + 0.1


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.4 * torch.randn(*shape))


class Stacked(nn.Module):
    """Weights as one tensor for all experts."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = E
        self.w13, self.w2 = weight(E, 2 * FF, D), weight(E, D, FF)

    def expert(self, e: Any, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.w13[e]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.w2[e])


class Mlp(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = F.gelu, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(D, FF, bias), nn.Linear(FF, D, bias), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Listed(nn.Module):
    """Experts as modules.  `run(e, x)` is what a mutant changes."""

    def __init__(self, expert: Callable[[], nn.Module] = Mlp, num_experts: int = E) -> None:
        super().__init__()
        self.experts = nn.ModuleList(expert() for _ in range(num_experts))

    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(len(self.experts)):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


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


@idiom(any_ids=True)
class IfLength(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            if len(t) > 0:
                out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
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


# -- mutants: another function of the rows for one expert -----------------------------------


@mutant("")
class OtherActivation(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[2].act = F.relu


@mutant("")
class OtherScale(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) * (2.0 if e == 2 else 1.0)


@mutant("")
class IndexAsNumber(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) * (e + 1)


@mutant("")
class OtherDtype(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x.double().float() if e == 2 else x)


@mutant("")
class OtherForward(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[1].forward = lambda x: x * 2  # type: ignore[method-assign]


@mutant("")
class OtherEps(Listed):
    def __init__(self) -> None:
        super().__init__(lambda: Normed(nn.LayerNorm))
        self.experts[3].norm.eps = 0.1


@mutant("")
class OtherWidth(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[1].up, self.experts[1].down = nn.Linear(D, 4), nn.Linear(4, D)


@mutant("")
class OneWithoutBias(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[3].up = nn.Linear(D, FF, bias=False)


@mutant("")
class Dropout(Listed):
    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)))


@mutant("")
class OneWithDropout(Listed):
    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Linear(D, D), nn.Dropout(0.0)))
        self.experts[1][1].p = 0.5


@mutant("")
class DropConnect(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            y = F.linear(F.linear(x[t], F.dropout(self.w13[e, :FF], 0.5)), self.w2[e])
            out.index_add_(0, t, y * weights[t, k, None])
        return out


@mutant("")
class Noise(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x + 0.1 * torch.randn_like(x))


@mutant("")
class HookOnOne(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[2].register_forward_hook(lambda m, a, y: y * 2)


@mutant("")
class TensorHook(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        y = self.experts[e](x)
        if y.requires_grad:
            y.register_hook(lambda g: g * 2)
        return y


@mutant("")
class BranchOnIndex(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) if e < 3 else x


@mutant("")
class BranchOnNumber(Listed):
    def __init__(self) -> None:
        super().__init__()
        for i, expert in enumerate(self.experts):
            expert.depth = 2 if i == 1 else 1

    def run(self, e: int, x: Tensor) -> Tensor:
        for _ in range(self.experts[e].depth):
            x = self.experts[e](x)
        return x


@mutant("")
class BranchOnTensor(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        y = self.experts[e](x)
        if e == 1 and y.abs().max() > 0.1:
            y = y * 2
        return y


@mutant("")
class BranchOnWeight(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        if self.experts[e].up.bias[0] > 0:
            x = x * 2
        return self.experts[e](x)


@mutant("")
class TiedInOneOnly(Listed):
    def __init__(self) -> None:
        super().__init__(Gated)
        self.experts[0].up.weight = self.experts[0].gate.weight


@mutant("")
class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


del MUTANTS["Double"]


@mutant("")
class OwnGradient(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return Double.apply(self.experts[e](x))


# -- mutants: rows that meet ----------------------------------------------------------------


@mutant("")
class MeanOverRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x - x.mean(0, keepdim=True))


@mutant("")
class SoftmaxOverRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x).softmax(0)


@mutant("")
class CumsumOverRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x).cumsum(0)


@mutant("")
class SumOverAll(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) / (1 + x.sum().abs())


@mutant("")
class NormOverAll(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) / (1 + x.norm())


@mutant("")
class DividedByRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) / (x.shape[0] + 1)


@mutant("")
class BatchNorm(Listed):
    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)))


@mutant("")
class FlippedRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x).flip(0)


@mutant("")
class RolledRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x).roll(1, 0)


@mutant("")
class Attention(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e]((x @ x.t()).softmax(-1) @ x)


@mutant("")
class PositionOfRow(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x + torch.arange(x.shape[0]).unsqueeze(1))


@mutant("")
class FirstRow(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) + x[:1]


@mutant("")
class Capacity(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            t, k = t[:2], k[:2]
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("")
class ViewAcross(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x.reshape(D, -1).t())


@mutant("")
class ColumnsOfX(Listed):
    """Selects features, not rows; D and T are the same number."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], x.shape[0] + D)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(1, t, (F.pad(x, (0, x.shape[0]))[:, t].t() * weights[t, k, None]).t())
        return out[:, :D]


# -- mutants: other rows, other weights -----------------------------------------------------


@mutant("")
class WeightsOfAnother(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        probs = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, _ = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * probs[:, (e + 1) % E][t].unsqueeze(-1))
        return out


@mutant("")
class WeightsByWideTable(Listed):
    """probs[t, k] of a [T, E] table: column k, not column id."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        probs = torch.zeros(x.shape[0], E).scatter(1, ids, weights) + 0.1
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * probs[t, k, None])
        return out


@mutant("")
class MaskedWeightsOfAnother(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1)
            out[mask] += expert(x[mask]) * (weights * (ids == (e + 1) % E)).sum(-1)[mask].unsqueeze(-1)
        return out


@mutant("")
class PlacesOfAnother(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            u, _ = torch.where(ids == (e + 1) % E)
            if t.shape[0] == u.shape[0]:
                out.index_add_(0, u, expert(x[t]) * weights[t, k, None])
        return out


@mutant("")
class RepeatedIds(Listed):
    """`out[mask] +=` adds once for a token that chose an expert twice."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out[t] += expert(x[t]) * weights[t, k, None]
        return out


MUTANTS["RepeatedIds"] = Mutant(RepeatedIds, "", distinct=False, repeats=True)


@mutant("", distinct=False, repeats=True)
class RepeatedIdsByToken(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1)
            out[mask] += expert(x[mask])
        return out


@mutant("", distinct=False, repeats=True)
class TopkOverTokens(Listed):
    """The indices of a topk over dimension 0 are distinct in a column, not in a row."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        scores = x.sin().abs()[:4, :3] * 0.001
        scores = torch.cat([scores + torch.tensor([[0.0], [1.0], [2.0], [3.0]])])
        chosen = torch.topk(scores, 3, dim=0)[1]  # [3, 3]: rows hold one id three times
        rows = x[:3]
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            mask = (chosen == e).any(-1)
            out[mask] += expert(rows[mask])
        return F.pad(out, (0, 0, 0, x.shape[0] - 3))


@mutant("")
class LastWins(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1)
            out[mask] = expert(x[mask])
        return out


@mutant("")
class Alpha(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None], alpha=0.5)
        return out


@mutant("")
class OtherInputForOne(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        twice = x * 2
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert((twice if e == 1 else x)[t]) * weights[t, k, None])
        return out


@mutant("")
class TwoIds(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        other = (ids + 1) % E
        for e, expert in enumerate(self.experts):
            t, k = torch.where((ids if e < 2 else other) == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("")
class MissingExpert(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in (0, 1, 3):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@mutant("")
class VisitsFewer(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E - 1):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@mutant("")
class VisitsTwice(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in (0, 1, 2, 3, 1):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@mutant("")
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


@mutant("")
class FloatIds(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, ids.float() * 0.75, weights)


@mutant("")
class FewerClasses(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids.clamp(max=E - 2), E - 1).permute(2, 1, 0)
        for e in range(E):
            k, t = torch.where(mask[e])
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@mutant("")
class LongerBuffer(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0] + 3, D)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("")
class LongerInput(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        longer = torch.cat([x, x])
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(longer[t]) * weights[t, k, None])
        return out


# -- mutants: iterations that know of each other --------------------------------------------


@mutant("")
class ReadsSum(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t] + out[t]) * weights[t, k, None])
        return out


@mutant("")
class CarriesTensor(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        state = torch.zeros(D)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y = expert(x[t]) + state
            state = state + y.sum(0)
            out.index_add_(0, t, y * weights[t, k, None])
        return out


@mutant("")
class CarriesNumber(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        scale = 1.0
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None] * scale)
            scale *= 0.5
        return out


@mutant("")
class CountsChosen(Stacked):
    """The number of iterations that ran is used after the loop over chosen experts."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        count = 0
        for e in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, self.expert(e[0], x[t]) * weights[t, k, None])
            count += 1
        return out / count


@mutant("")
class CountsIfAny(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        count = 1
        for e, expert in enumerate(self.experts):
            if (ids == e).any():
                t, k = torch.where(ids == e)
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
                count += 1
        return out / count


@mutant("")
class PositionAmongChosen(Stacked):
    """The i-th chosen expert has the weights i."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for i, e in enumerate(torch.greater(mask.sum((-1, -2)), 0).nonzero()):
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, self.expert(i, x[t]) * weights[t, k, None])
        return out


@mutant("")
class ZipWithChosen(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for e, expert in zip(torch.greater(mask.sum((-1, -2)), 0).nonzero(), self.experts):  # noqa: B905
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("")
class CountsInAttribute(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def run(self, e: int, x: Tensor) -> Tensor:
        self.calls += 1
        return self.experts[e](x) * self.calls


@mutant("")
class AppendsToList(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def run(self, e: int, x: Tensor) -> Tensor:
        self.seen.append(e)
        return self.experts[e](x)


@mutant("")
class AppendsToChildsDict(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[1].stats = {"rows": []}

    def run(self, e: int, x: Tensor) -> Tensor:
        self.experts[1].stats["rows"].append(e)
        return self.experts[e](x)


SEEN: list[int] = []


@mutant("")
class AppendsToGlobal(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        SEEN.append(e)
        return self.experts[e](x)


@mutant("")
class KeepsTensors(Listed):
    """A list of what the experts computed, for somebody outside."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}

    def run(self, e: int, x: Tensor) -> Tensor:
        y = self.experts[e](x)
        self.kept[e] = y
        return y


@mutant("")
class Prints(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        print("", end="")
        return self.experts[e](x)


@mutant("")
class CountsIntoBuffer(Stacked):
    """A buffer that changes only for chosen experts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(E))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for e in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, self.expert(e[0], x[t]) * weights[t, k, None])
            self.load[e[0]] += 1
        return out


# -- mutants: decisions ---------------------------------------------------------------------


@mutant("")
class IfAnyOfAnother(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if (ids == (e + 1) % E).any():
                t, k = torch.where(ids == e)
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("")
class IfAnyOfOtherToo(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if (ids == (e + 1) % E).any():
                if (ids == e).any():
                    t, k = torch.where(ids == e)
                    out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("")
class NestedDecisions(Listed):
    """Experts 1, 2, 3 run only if expert 0 has rows."""

    def add(self, out: Tensor, e: int, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        if e < E and (ids == e).any():
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.experts[e](x[t]) * weights[t, k, None])
            self.add(out, e + 1, x, ids, weights)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        self.add(out, 0, x, ids, weights)
        return out


@mutant("")
class RowsOfAnother(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if torch.where(ids == (e + 1) % E)[0].numel() == 0:
                continue
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("")
class AsManyRowsAsTheFirst(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        first = torch.where(ids == 0)[0].shape[0]
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y = expert(x[t]) * weights[t, k, None]
            if t.shape[0] == first:
                y = y * 2
            out.index_add_(0, t, y)
        return out


@mutant("")
class MoreThanThreeRows(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.numel() > 3:
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("")
class MoreThanOneRow(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.numel() > 1:
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("")
class OneRowByAnother(Listed):
    """Experts 2 and 3 are exchanged for a single row."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            other = {2: 3, 3: 2}.get(e, e) if t.numel() == 1 else e
            out.index_add_(0, t, self.experts[other](x[t]) * weights[t, k, None])
        return out


@mutant("")
class SumOfMaskAboveTwo(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.sum() > 2:
                t, k = torch.where(mask)
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("")
class BreaksAtTheLast(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if e > ids.max():
                break
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("")
class BreaksAtEmpty(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.numel() == 0:
                break
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("")
class OtherwiseIfEmpty(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if (ids == e).any():
                t, k = torch.where(ids == e)
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
            else:
                out = out + 1
        return out


@mutant("")
class AfterwardsIfEmpty(Listed):
    """What follows the loop depends on whether expert 0 has rows."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        if (ids == 0).any():
            return out
        return out + 1


@mutant("")
class AfterwardsIfOneRow(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out * 2 if torch.where(ids == 0)[0].numel() == 1 else out


@mutant("")
class EarlyReturn(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if not (ids == 0).any():
            return x
        return super().forward(x, ids, weights)


@mutant("")
class ChosenOfOtherIds(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        others = F.one_hot((ids + 1) % E, E).permute(2, 1, 0)
        for e in torch.greater(others.sum((-1, -2)), 0).nonzero():
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, self.expert(e[0], x[t]) * weights[t, k, None])
        return out


@mutant("")
class LoopsOverRows(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            for t in torch.where(ids == e)[0]:
                out[t] += expert(x[t])
        return out


# -- mutants: what is used outside ----------------------------------------------------------


@mutant("")
class LeaksRows(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out, penalty = torch.zeros_like(x), torch.zeros(())
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y = expert(x[t])
            penalty = penalty + y.square().sum()
            out.index_add_(0, t, y * weights[t, k, None])
        return out, penalty


@mutant("")
class LeaksNumberOfRows(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out / (1 + torch.where(ids == 0)[0].shape[0])


@mutant("")
class LeaksSelection(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        out[t] = 0
        return out


@mutant("")
class ReadsAlias(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        alias = out.view(-1)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out + alias.sum()


@mutant("")
class ReadsAliasOfAlias(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        big = torch.zeros(2, *x.shape)
        out = big[0]
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return big.sum(0)


@mutant("")
class AddsIntoInput(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = x.view(x.shape)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, (expert(x[t]) * weights[t, k, None]).detach())
        return out


@mutant("")
class AddsIntoWhatItReads(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = x * 1.0
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            rows = rows.index_add(0, t, expert(rows[t]) * weights[t, k, None])
        return rows


@mutant("")
class ChangesInput(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        x = x.detach().clone()
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
            x.mul_(0.5)
        return out


@mutant("")
class ChangesWeights(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        w = self.w13 * 1.0
        for e in range(E):
            t, k = torch.where(ids == e)
            gate, up = F.linear(x[t], w[e]).chunk(2, -1)
            out.index_add_(0, t, F.linear(F.silu(gate) * up, self.w2[e]) * weights[t, k, None])
            w.mul_(0.5)
        return out


@mutant("")
class ChangesIds(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        ids = ids.clone()
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
            ids.masked_fill_(ids == e, E - 1)
        return out


@mutant("")
class NoGradForOne(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(e != 1 and torch.is_grad_enabled()):
            return self.experts[e](x)


@mutant("")
class NoGradInside(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
        return self.experts[e](x) + y


@mutant("")
class MaxOfTwo(Listed):
    """Not a mutant: an op without a rule for tensors of one expert."""

    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) * self.experts[e].up.weight.mean()


@mutant("")
class MaxOfRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return torch.max(self.experts[e](x), x)


@mutant("")
class UnorderedDense(Listed):
    """Every expert on every token: no rows are selected."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        probs = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
        return sum((probs[:, e, None] * self.run(e, x) for e in range(E)), torch.zeros_like(x))


@mutant("")
class SecondChoiceOnly(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where((ids == e) & (weights > 0.3))
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out
