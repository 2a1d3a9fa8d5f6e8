"""Small mixture-of-experts modules, written by hand: the idioms that are rewritten, and the mutants that must not be.

`@idiom(...)` and `@mutant(reason)` put a module class into `IDIOMS` or `MUTANTS`.  All have `forward(x, ids, weights)`
with T tokens of width D, K experts per token out of E.
"""

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moe_compile import region
from moe_compile.analysis import analyse
from moe_compile.pipeline import canonicalise

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
    repeats: bool = False  # call with ids that repeat in a row
    forward_only: bool = False  # autograd refuses the original's backward
    late: bool = False  # refused after the analysis: by a pass, or by what it reads in Python


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


def routed(
    seed: int = 0, tokens: int = T, top_k: int = K, num_experts: int = E, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
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


# -- mutants: another function of the rows for one expert -----------------------------------


@mutant("expert 2 differs from expert 0: aten.relu where that has aten.gelu")
class OtherActivation(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[2].act = F.relu


@mutant("expert 2 differs from expert 0: 2.0 where that has 1.0")
class OtherScale(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) * (2.0 if e == 2 else 1.0)


@mutant("expert 1 differs from expert 0: 2 where that has 1")
class IndexAsNumber(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) * (e + 1)


@mutant("expert 2 differs from expert 0: aten.to.dtype where that has token x")
class OtherDtype(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x.double().float() if e == 2 else x)


@mutant("expert 1 differs from expert 0: aten.mul.Tensor where that has aten.linear")
class OtherForward(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[1].forward = lambda x: x * 2  # type: ignore[method-assign]


@mutant("expert 3 differs from expert 0: 5 arguments for 4")
class OtherEps(Listed):
    def __init__(self) -> None:
        super().__init__(lambda: Normed(nn.LayerNorm))
        self.experts[3].norm.eps = 0.1


@mutant(
    "expert 1 differs from expert 0: experts_1_up_weight is torch.float32 (4, 6), experts_0_up_weight is torch.float32 (10, 6)"
)
class OtherWidth(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[1].up, self.experts[1].down = nn.Linear(D, 4), nn.Linear(4, D)


@mutant("expert 3 differs from expert 0: 2 arguments for 3")
class OneWithoutBias(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[3].up = nn.Linear(D, FF, bias=False)


@mutant("dropout with p = 0.5 draws random numbers expert by expert")
class Dropout(Listed):
    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)))


@mutant("dropout with p = 0.5 draws random numbers expert by expert")
class OneWithDropout(Listed):
    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Linear(D, D), nn.Dropout(0.0)))
        self.experts[1][1].p = 0.5


@mutant("no rule for aten.dropout on expert weights", late=True)
class DropConnect(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            y = F.linear(F.linear(x[t], F.dropout(self.w13[e, :FF], 0.5)), self.w2[e])
            out.index_add_(0, t, y * weights[t, k, None])
        return out


@mutant("aten.randn_like at loops.py is not known to be row-wise (it reads rows)")
class Noise(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x + 0.1 * torch.randn_like(x))


@mutant("module experts.2 has hooks")
class HookOnOne(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[2].register_forward_hook(lambda m, a, y: y * 2)


@mutant("it puts a hook on a tensor, which a trace would lose")
class TensorHook(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        y = self.experts[e](x)
        if y.requires_grad:
            y.register_hook(lambda g: g * 2)
        return y


@mutant("expert 3 differs from expert 0: token x where that has aten.linear")
class BranchOnIndex(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) if e < 3 else x


@mutant("expert 1 differs from expert 0: aten.linear where that has token x")
class BranchOnNumber(Listed):
    def __init__(self) -> None:
        super().__init__()
        for i, expert in enumerate(self.experts):
            expert.depth = 2 if i == 1 else 1

    def run(self, e: int, x: Tensor) -> Tensor:
        for _ in range(self.experts[e].depth):
            x = self.experts[e](x)
        return x


@mutant("Python decides on gt, not shown to say whether an expert was chosen")
class BranchOnTensor(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        y = self.experts[e](x)
        if e == 1 and y.abs().sum() > 0.1:
            y = y * 2
        return y


@mutant("Python decides on gt, not shown to say whether an expert was chosen")
class BranchOnWeight(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        if self.experts[e].up.bias[0] > 0:
            x = x * 2
        return self.experts[e](x)


@mutant(
    "expert 1 differs from expert 0: experts_0_up_weight is used twice there, experts_1_up_weight and experts_1_gate_weight here"
)
class TiedInOneOnly(Listed):
    def __init__(self) -> None:
        super().__init__(Gated)
        self.experts[0].up.weight = self.experts[0].gate.weight


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


@mutant("it uses the custom autograd function Double, whose gradient a trace would lose")
class OwnGradient(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return Double.apply(self.experts[e](x))


# -- mutants: rows that meet ----------------------------------------------------------------


@mutant("mean along dimension 0 lets rows depend on each other")
class MeanOverRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x - x.mean(0, keepdim=True))


@mutant("softmax along dimension 0 lets rows depend on each other")
class SoftmaxOverRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x).softmax(0)


@mutant("cumsum along dimension 0 lets rows depend on each other")
class CumsumOverRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x).cumsum(0)


@mutant("sum reduces over all rows")
class SumOverAll(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) / (1 + x.sum().abs())


@mutant("linalg_vector_norm reduces over all rows")
class NormOverAll(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) / (1 + x.norm())


@mutant("add_1, a size known only at run time, is used in the expert")
class DividedByRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) / (x.shape[0] + 1)


@mutant("aten.batch_norm at loops.py is not known to be row-wise (it reads rows)")
class BatchNorm(Listed):
    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)))


@mutant("flip along dimension 0 lets rows depend on each other")
class FlippedRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x).flip(0)


@mutant("aten.roll at loops.py is not known to be row-wise (it reads rows)")
class RolledRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x).roll(1, 0)


@mutant("t moves the rows' dimension")
class Attention(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e]((x @ x.t()).softmax(-1) @ x)


@mutant("add adds a tensor of shape (7919, 1) across the rows")
class PositionOfRow(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x + torch.arange(x.shape[0]).unsqueeze(1))


@mutant("slice along dimension 0 lets rows depend on each other")
class FirstRow(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) + x[:1]


@mutant("aten.slice.Tensor at loops.py is not known to be row-wise (it reads index)")
class Capacity(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            t, k = t[:2], k[:2]
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("reshape to (6, 7919) mixes rows and features")
class ViewAcross(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x.reshape(D, -1).t())


@mutant("rows are gathered along dimensions [None, 0] of the expert ids")
class ColumnsOfX(Listed):
    """Selects features, not rows; D and T are the same number."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], x.shape[0] + D)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(1, t, (F.pad(x, (0, x.shape[0]))[:, t].t() * weights[t, k, None]).t())
        return out[:, :D]


# -- mutants: other rows, other weights -----------------------------------------------------


@mutant("column 1 of the weights is read for the rows of expert 0")
class WeightsOfAnother(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        probs = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, _ = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * probs[:, (e + 1) % E][t].unsqueeze(-1))
        return out


@mutant("unsqueeze is (11, 4, 1), the expert ids are (11, 2)")
class WeightsByWideTable(Listed):
    """probs[t, k] of a [T, E] table: column k, not column id."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        probs = torch.zeros(x.shape[0], E).scatter(1, ids, weights) + 0.1
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * probs[t, k, None])
        return out


@mutant("weights of expert 1 are read for the rows of expert 0")
class MaskedWeightsOfAnother(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1)
            out[mask] += expert(x[mask]) * (weights * (ids == (e + 1) % E)).sum(-1)[mask].unsqueeze(-1)
        return out


@mutant("nothing is summed over experts")
class PlacesOfAnother(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            u, _ = torch.where(ids == (e + 1) % E)
            if t.shape[0] == u.shape[0]:
                out.index_add_(0, u, expert(x[t]) * weights[t, k, None])
        return out


@mutant(
    "aten.index_put_ at loops.py keeps only one of two equal tokens: the ids (ids) are not shown to be distinct, as those of topk are",
    distinct=False,
    repeats=True,
)
class RepeatedIds(Listed):
    """`out[mask] +=` adds once for a token that chose an expert twice."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out[t] += expert(x[t]) * weights[t, k, None]
        return out


@mutant(
    "a token that chose an expert twice counts once: the ids (ids) are not shown to be distinct, as those of topk are",
    distinct=False,
    repeats=True,
)
class RepeatedIdsByToken(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1)
            out[mask] += expert(x[mask])
        return out


@mutant(
    "a token that chose an expert twice counts once: the ids (getitem_1) are not shown to be distinct, as those of topk are",
    distinct=False,
    repeats=True,
)
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


@mutant("aten.index_put_ at loops.py overwrites what another expert of the same token wrote")
class LastWins(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1)
            out[mask] = expert(x[mask])
        return out


@mutant("aten.index_add_ at loops.py does not add rows to tokens along dimension 0 with factor 1")
class Alpha(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None], alpha=0.5)
        return out


@mutant("expert 1 differs from expert 0: it reads token mul, that one token x")
class OtherInputForOne(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        twice = x * 2
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert((twice if e == 1 else x)[t]) * weights[t, k, None])
        return out


@mutant("the iterations choose their rows in different ways")
class TwoIds(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        other = (ids + 1) % E
        for e, expert in enumerate(self.experts):
            t, k = torch.where((ids if e < 2 else other) == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("the loop visits experts [0, 1, 3], not each of 0..2 once")
class MissingExpert(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in (0, 1, 3):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@mutant("3 experts are used, w2 holds 4")
class VisitsFewer(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E - 1):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@mutant("the loop visits experts [0, 1, 2, 3, 1], not each of 0..4 once")
class VisitsTwice(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in (0, 1, 2, 3, 1):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@mutant("nothing is summed over experts")
class FloatIds(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, ids.float() * 0.75, weights)


@mutant("the sum is (14, 6), its terms are (7919, 6), the expert ids are (11, 2)")
class LongerBuffer(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0] + 3, D)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("cat is (22, 6), the expert ids are (11, 2)")
class LongerInput(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        longer = torch.cat([x, x])
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(longer[t]) * weights[t, k, None])
        return out


# -- mutants: iterations that know of each other --------------------------------------------


@mutant("aten.linear at loops.py is not known to be row-wise (it reads sumread)")
class ReadsSum(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t] + out[t]) * weights[t, k, None])
        return out


@mutant("sum along dimension 0 lets rows depend on each other")
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


@mutant("expert 1 differs from expert 0: 0.5 where that has 1.0")
class CarriesNumber(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        scale = 1.0
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None] * scale)
            scale *= 0.5
        return out


@mutant("CountsChosen.forward carries count from one iteration to the next and skips some")
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


@mutant("CountsIfAny.forward carries count from one iteration to the next and skips some")
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


@mutant("expert 3 adds something else when some experts have no rows")
class PositionAmongChosen(Stacked):
    """The i-th chosen expert has the weights i."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for i, e in enumerate(torch.greater(mask.sum((-1, -2)), 0).nonzero()):
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, self.expert(i, x[t]) * weights[t, k, None])
        return out


@mutant("expert 3 adds something else when some experts have no rows")
class ZipWithChosen(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for e, expert in zip(torch.greater(mask.sum((-1, -2)), 0).nonzero(), self.experts):  # noqa: B905
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("CountsInAttribute.run (loops.py) sets the attribute calls")
class CountsInAttribute(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def run(self, e: int, x: Tensor) -> Tensor:
        self.calls += 1
        return self.experts[e](x) * self.calls


@mutant("it changes self.seen when it runs")
class AppendsToList(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def run(self, e: int, x: Tensor) -> Tensor:
        self.seen.append(e)
        return self.experts[e](x)


@mutant("it changes self.experts.1.stats when it runs")
class AppendsToChildsDict(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[1].stats = {"rows": []}

    def run(self, e: int, x: Tensor) -> Tensor:
        self.experts[1].stats["rows"].append(e)
        return self.experts[e](x)


SEEN: list[int] = []


@mutant("it changes SEEN when it runs")
class AppendsToGlobal(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        SEEN.append(e)
        return self.experts[e](x)


@mutant("it changes self.kept when it runs")
class KeepsTensors(Listed):
    """A list of what the experts computed, for somebody outside."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}

    def run(self, e: int, x: Tensor) -> Tensor:
        y = self.experts[e](x)
        self.kept[e] = y
        return y


@mutant("Prints.run (loops.py) calls print")
class Prints(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        print("", end="")
        return self.experts[e](x)


@mutant("what surrounds the sum differs when some experts have no rows")
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


@mutant("expert 2 adds nothing when some experts have no rows")
class IfAnyOfAnother(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if (ids == (e + 1) % E).any():
                t, k = torch.where(ids == e)
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("expert 2 adds nothing when some experts have no rows")
class IfAnyOfOtherToo(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if (ids == (e + 1) % E).any():
                if (ids == e).any():
                    t, k = torch.where(ids == e)
                    out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("expert 3 adds nothing when some experts have no rows")
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


@mutant("expert 2 adds nothing when some experts have no rows")
class RowsOfAnother(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if torch.where(ids == (e + 1) % E)[0].numel() == 0:
                continue
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("expert 1 differs from expert 0: aten.linear where that has aten.mul.Tensor")
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


@mutant("it decides on the number of rows that an expert gets (r > 3)")
class MoreThanThreeRows(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.numel() > 3:
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("expert 0 adds nothing when an expert has one row")
class MoreThanOneRow(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.numel() > 1:
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("expert 2 adds something else when an expert has one row")
class OneRowByAnother(Listed):
    """Experts 2 and 3 are exchanged for a single row."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            other = {2: 3, 3: 2}.get(e, e) if t.numel() == 1 else e
            out.index_add_(0, t, self.experts[other](x[t]) * weights[t, k, None])
        return out


@mutant("Python decides on gt, not shown to say whether an expert was chosen")
class SumOfMaskAboveTwo(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.sum() > 2:
                t, k = torch.where(mask)
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("Python decides on lt, not shown to say whether an expert was chosen")
class BreaksAtTheLast(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if e > ids.max():
                break
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("BreaksAtEmpty.forward leaves a loop early, depending on data")
class BreaksAtEmpty(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.numel() == 0:
                break
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("what surrounds the sum differs when some experts have no rows")
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


@mutant("what surrounds the sum differs when some experts have no rows")
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


@mutant("what surrounds the sum differs when an expert has one row")
class AfterwardsIfOneRow(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out * 2 if torch.where(ids == 0)[0].numel() == 1 else out


@mutant("what surrounds the sum differs when some experts have no rows")
class EarlyReturn(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if not (ids == 0).any():
            return x
        return super().forward(x, ids, weights)


@mutant("a Python loop runs over nonzero, not shown to be the list of chosen experts")
class ChosenOfOtherIds(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        others = F.one_hot((ids + 1) % E, E).permute(2, 1, 0)
        for e in torch.greater(others.sum((-1, -2)), 0).nonzero():
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, self.expert(e[0], x[t]) * weights[t, k, None])
        return out


@mutant("a Python loop runs over the rows of an expert")
class LoopsOverRows(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            for t in torch.where(ids == e)[0]:
                out[t] += expert(x[t])
        return out


# -- mutants: what is used outside ----------------------------------------------------------


@mutant("what the loop selects is used outside of it too (unbind)")
class LeaksRows(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out, penalty = torch.zeros_like(x), torch.zeros(())
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y = expert(x[t])
            penalty = penalty + y.square().sum()
            out.index_add_(0, t, y * weights[t, k, None])
        return out, penalty


@mutant("what surrounds the sum differs when some experts have no rows")
class LeaksNumberOfRows(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out / (1 + torch.where(ids == 0)[0].shape[0])


@mutant("aten.index_put_ at loops.py is not known to be row-wise (it reads index)")
class LeaksSelection(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        out[t] = 0
        return out


@mutant("view is read after it was changed in place through another name")
class ReadsAlias(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        alias = out.view(-1)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out + alias.sum()


@mutant("zeros is read after it was changed in place through another name")
class ReadsAliasOfAlias(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        big = torch.zeros(2, *x.shape)
        out = big[0]
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return big.sum(0)


@mutant("aten.index_add_ at loops.py changes an input of the region in place")
class AddsIntoInput(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = x.detach().view(x.shape)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, (expert(x[t]) * weights[t, k, None]).detach())
        return out


@mutant("aten.linear at loops.py is not known to be row-wise (it reads sumread)")
class AddsIntoWhatItReads(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = x * 1.0
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            rows = rows.index_add(0, t, expert(rows[t]) * weights[t, k, None])
        return rows


@mutant("expert 1 differs from expert 0: it reads token mul_, that one token clone")
class ChangesInput(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        x = x.detach().clone()
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
            x.mul_(0.5)
        return out


@mutant("expert 1 differs from expert 0: it reads slice mul_, that one slice mul", forward_only=True)
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


@mutant("the iterations choose their rows in different ways")
class ChangesIds(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        ids = ids.clone()
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
            ids.masked_fill_(ids == e, E - 1)
        return out


@mutant("aten.linear at loops.py runs under no_grad inside the expert loop")
class NoGradForOne(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        with torch.no_grad() if e == 1 else contextlib.nullcontext():
            return self.experts[e](x)


@mutant("aten.mul.Tensor at loops.py runs under no_grad inside the expert loop")
class NoGradInside(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
        return self.experts[e](x) + y


@mutant("nothing is summed over experts")
class UnorderedDense(Listed):
    """Every expert on every token: no rows are selected."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        probs = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
        return sum((probs[:, e, None] * self.run(e, x) for e in range(E)), torch.zeros_like(x))


@mutant("nothing is summed over experts")
class SecondChoiceOnly(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where((ids == e) & (weights > 0.3))
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("Python takes len() of an expert's rows, which cannot be followed as shape[0] or numel() can")
class IfLength(Stacked):
    """Right, but Python gets a plain number that nobody can follow."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            if len(t) > 0:
                out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@mutant("what surrounds the sum differs when some experts have no rows")
class CountsList(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        hits = torch.greater(mask.sum((-1, -2)), 0).nonzero().squeeze(-1).tolist()
        for e in hits:
            k, t = torch.where(mask[e])
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out * 2 if len(hits) == 3 else out


@mutant("it decides on the number of rows that an expert gets (Ne(r, 3))")
class CountsTable(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        hits = torch.greater(mask.sum((-1, -2)), 0).nonzero()
        for e in hits:
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, self.expert(e[0], x[t]) * weights[t, k, None])
        return out * 2 if hits.shape[0] == 3 else out


@mutant("expert 3 adds something else when some experts have no rows")
class NextExpert(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        experts = iter(self.experts)
        for e in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, next(experts)(x[t]) * weights[t, k, None])
        return out


@mutant("it changes a default of KeepsInDefault.run when it runs")
class KeepsInDefault(Listed):
    def run(self, e: int, x: Tensor, seen: list = []) -> Tensor:  # type: ignore[type-arg]  # noqa: B006
        seen.append(e)
        return self.experts[e](x)


@mutant("it reads a tensor that is neither an argument nor a parameter or buffer of its module")
class ChangesData(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        y = self.experts[e](x)
        self.experts[e].up.weight.data.mul_(0.5)
        return y


@mutant("linear_1 is read after it was changed in place through another name")
class InPlaceOnView(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        h = self.experts[e](x)
        h[:, :2].mul_(2)
        return h


@mutant("aten.sub.Tensor at loops.py is not known to be row-wise (it reads index)")
class PreviousToken(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t - 1]) * weights[t, k, None])
        return out


@mutant("aten.unsqueeze at loops.py is not known to be row-wise (it reads index)")
class TokenAsNumber(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * t[:, None])
        return out


@mutant("aten.index_add_ at loops.py does not add rows to tokens along dimension 0 with factor 1")
class AddsAtChoice(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, k, expert(x[t]) * weights[t, k, None])
        return out


@mutant("aten.flip at loops.py is not known to be row-wise (it reads index)")
class AddsBackwards(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t.flip(0), expert(x[t]) * weights[t, k, None])
        return out


@mutant("column 0 of the weights is read for the rows of expert 1")
class FirstWeight(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, 0, None])
        return out


@mutant("aten.sort at loops.py is not known to be row-wise (it reads rows)")
class SortedRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x).sort(0).values


@mutant("linalg_vector_norm along dimension 0 lets rows depend on each other")
class NormOverRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return F.normalize(self.experts[e](x), dim=0)


@mutant("add, a size known only at run time, is used in the expert")
class LayerNormOverRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return F.layer_norm(self.experts[e](x), x.shape)


@mutant("mean reduces over all rows")
class AboveMean(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x).masked_fill(x > x.mean(), 0)


@mutant("aten.pad at loops.py is not known to be row-wise (it reads rows)")
class AddsNeighbour(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        y = self.experts[e](x)
        return y + F.pad(y, (0, 0, 1, 0))[:-1]


@mutant("the sum is (11, 6), its terms are (7919, 1), the expert ids are (11, 2)")
class AssignsBroadcast(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_put_((t,), expert(x[t]).sum(-1, keepdim=True), accumulate=True)
        return out


@mutant("no weight belongs to an expert")
class ZeroesChosen(Listed):
    """Changes the sum between two iterations."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
            out.mul_(0.5)
        return out


@mutant("no weight belongs to an expert")
class Clamped(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out = out.index_add(0, t, expert(x[t]) * weights[t, k, None]).clamp(-1, 1)
        return out


@mutant("aten.index_add_ at loops.py adds into memory that was never set")
class EmptyBuffer(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out * 0


@mutant("aten.index_put_ at loops.py overwrites what another expert of the same token wrote")
class OnesBuffer(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.ones_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out[t] = expert(x[t]) * weights[t, k, None]
        return out


@mutant("Python asks about nonzero_1, not shown to say which experts were chosen")
class ReportsOther(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if torch.where((ids + 1) % E == e)[0].numel() == 0:
                continue
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("expert 1 differs from expert 0: # where that has #")
class RandomScale(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) * random.random()


@mutant("", late=True)
class RandomScaleForAll(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x * random.random(), ids, weights)


@mutant("no weight belongs to an expert")
class SingleExpert(Listed):
    """Right, but nothing tells an expert's weights from shared ones."""

    def __init__(self) -> None:
        super().__init__(num_experts=1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, ids * 0, weights)


@mutant("expert 4 adds nothing when some experts have no rows")
class TwoInTheMiddle(Listed):
    """Of nine experts, 4 and 5 run if the other one was chosen."""

    def __init__(self) -> None:
        super().__init__(num_experts=9)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ids = ids * 2 + 1
        out = torch.zeros_like(x)
        for e in range(9):
            if (ids == {4: 5, 5: 4}.get(e, e)).any():
                t, k = torch.where(ids == e)
                out.index_add_(0, t, self.experts[e](x[t]) * weights[t, k, None])
        return out


@mutant("expert 4 adds nothing when some experts have no rows")
class TwoInTheMiddleByRows(Listed):
    def __init__(self) -> None:
        super().__init__(num_experts=9)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ids = ids * 2 + 1
        out = torch.zeros_like(x)
        for e in range(9):
            if torch.where(ids == {4: 5, 5: 4}.get(e, e))[0].shape[0] > 0:
                t, k = torch.where(ids == e)
                out.index_add_(0, t, self.experts[e](x[t]) * weights[t, k, None])
        return out


@mutant("aten.to.dtype at loops.py runs in an autocast region of its own")
class NoAutocastInside(Listed):
    """Under autocast the experts stay in float32."""

    def run(self, e: int, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.experts[e](x.float())


@mutant("aten.linear at loops.py runs in an autocast region of its own")
class AutocastInside(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.experts[e](x).float()


# -- proving and comparing ------------------------------------------------------------------


def arguments(
    case: Idiom | Mutant, seed: int = 0, tokens: int = T, routing: str = "even", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids, weights; routing: "even", "skewed" (all tokens choose alike), "unchosen" (nobody chooses expert 1)."""
    x, ids, weights = routed(seed, tokens, case.top_k, dtype=dtype)
    if routing == "skewed":
        ids = ids[:1].expand_as(ids).contiguous() if tokens else ids
    if routing == "unchosen" and case.top_k < E:
        ids = torch.tensor([0, 2, 3])[torch.rand(tokens, 3).argsort(-1)][:, : case.top_k].contiguous()
    if getattr(case, "repeats", False):
        ids = ids[:, :1].expand_as(ids).contiguous()
    return x, (ids[:, 0].contiguous() if case.flat else ids), weights


def any_length(args: tuple[Tensor, ...]) -> list[Tensor]:
    """The arguments with a symbol for the number of tokens."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    dims: Any = lambda t: StatelessSymbolicContext([DimDynamic.DUCK, *[DimDynamic.STATIC] * (t.dim() - 1)])  # noqa: E731
    return [
        mode.from_tensor(t, source=ConstantSource(f"arg_{i}"), symbolic_context=dims(t)) for i, t in enumerate(args)
    ]


class Proof:
    """A module's forward, proven and rewritten, to be called like the module."""

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Tensor, ...],
        distinct: bool,
        edit: Callable[[GraphModule], None] | None = None,
    ) -> None:
        self.module = module
        found = analyse(type(module).forward, module, any_length(args), {}, distinct=(1,) if distinct else ())
        if edit is not None:
            edit(found.gm)
        self.detected = found.gm.graph.find_nodes(op="call_function", target=region.experts)
        self.reports = canonicalise(found.gm)
        assert not found.gm.graph.find_nodes(op="call_function", target=region.experts), str(self.reports[0])
        self.gm, self.state = found.gm, found.capture.state
        self.single = found.capture.out_spec.is_leaf()

    def __call__(self, *args: Tensor) -> Any:
        module = self.module
        known = dict(module.named_parameters(remove_duplicate=False)) | dict(
            module.named_buffers(remove_duplicate=False)
        )
        out = self.gm(*args, *[known[name] for name in self.state])
        return out[0] if self.single else out


def outcome(
    run: Callable[..., Any], module: nn.Module, args: tuple[Tensor, ...], backward: bool = True
) -> dict[str, Tensor | None]:
    """Outputs, changed buffers and all gradients of a call."""
    module.zero_grad()
    before = {n: b.clone() for n, b in module.named_buffers()}
    mine = [a.detach().clone().requires_grad_() if a.is_floating_point() else a.clone() for a in args]
    out = run(*mine)
    outs = out if isinstance(out, tuple) else (out,)
    torch.manual_seed(1)
    loss = sum(
        (o.float() if o.dtype == torch.bfloat16 else o).mul(torch.randn(o.shape).to(o.dtype)).sum() for o in outs
    )
    if backward and isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()
    result: dict[str, Tensor | None] = {f"output {i}": o.detach() for i, o in enumerate(outs)}
    result |= {f"buffer {n}": b.clone() for n, b in module.named_buffers()}
    result |= {f"gradient of {n}": p.grad for n, p in module.named_parameters()}
    result |= {f"gradient of argument {i}": a.grad for i, a in enumerate(mine) if a.is_floating_point()}
    for n, b in module.named_buffers():
        b.data.copy_(before[n])
    return result


def differences(got: dict[str, Tensor | None], want: dict[str, Tensor | None], rtol: float) -> list[str]:
    """What does not agree, relative to the norm of each."""
    found = [n for n in want if n not in got]
    for name, value in want.items():
        mine = got.get(name)
        mine, value = (torch.zeros(()) if v is None else v.detach().double() for v in (mine, value))
        if mine.numel() == value.numel() == 0:
            continue
        distance = (
            (mine - value).norm() if mine.shape == value.shape or not mine.dim() or not value.dim() else torch.inf
        )
        if not distance <= rtol * value.norm() + 1e-12:
            found.append(name)
    return found
