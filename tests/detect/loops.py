"""Small mixture-of-experts modules, written by hand: the idioms that are rewritten, and the mutants that must not be.

`@idiom(...)` and `@mutant(reason)` put a module class into `IDIOMS` or `MUTANTS`.  All have `forward(x, ids, weights)`
with T tokens of width D, K experts per token out of E.
"""

import inspect
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
from moe_compile.arguments import Known
from moe_compile.pipeline import canonicalise, narrow

T, K, E, D, FF = 11, 2, 4, 6, 10


@dataclass(frozen=True)
class Idiom:
    make: Callable[[], nn.Module]
    distinct: bool | Known = True  # its ids have to be known as those of a topk; `SCORES`: of E scores
    top_k: int = K
    flat: bool = False  # ids are a vector [T]
    any_ids: bool = False  # ids out of range add nothing
    empty: bool = True  # also rewritten where T = 0
    forward_only: bool = False  # autograd refuses the original's backward
    tokens: int = T


@dataclass(frozen=True)
class Mutant:
    make: Callable[[], nn.Module]
    reason: str
    top_k: int = K
    flat: bool = False
    distinct: bool | Known = True
    repeats: bool = False  # call with ids that repeat in a row
    forward_only: bool = False  # autograd refuses the original's backward
    tokens: int = T
    late: bool = False  # refused after the analysis: by a pass, or by what it reads in Python


def known(distinct: bool | Known) -> Known:
    """What `analyse` is told of the ids."""
    return distinct if isinstance(distinct, Known) else Known((1,) if distinct else ())


SCORES = Known((1,), ((1, E),))
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


# -- proving and comparing ------------------------------------------------------------------


def arguments(
    case: Idiom | Mutant,
    seed: int = 0,
    tokens: int | None = None,
    routing: str = "even",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids, weights; routing: "even", "skewed" (all tokens choose alike), "unchosen" (nobody chooses expert 1)."""
    tokens = case.tokens if tokens is None else tokens
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


def forward_of(module: nn.Module) -> Any:
    """The function that is captured: a module's forward, without its decorators."""
    return inspect.unwrap(type(module).forward)


class Proof:
    """A module's forward, proven and rewritten, to be called like the module."""

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Tensor, ...],
        distinct: bool | Known,
        edit: Callable[[GraphModule], None] | None = None,
        fixed: bool = False,
        skip: frozenset[str] = frozenset(),
    ) -> None:
        """`fixed`: for this number of tokens, not for any.  `skip`: passes that are left out."""
        self.module = module
        found = analyse(forward_of(module), module, list(args) if fixed else any_length(args), {}, known(distinct))
        if edit is not None:
            edit(found.gm)
        self.detected = found.gm.graph.find_nodes(op="call_function", target=region.experts)
        self.reports = [*narrow(found.gm, skip), *canonicalise(found.gm, skip)]
        assert not found.gm.graph.find_nodes(op="call_function", target=region.experts), str(self.reports)
        self.gm, self.state = found.gm, found.capture.state
        self.single = found.capture.out_spec.is_leaf()
        self.kept = found.capture.kept
        self.guards = found.capture.guards()  # on the number of tokens

    def __call__(self, *args: Tensor) -> Any:
        module = self.module
        known = dict(module.named_parameters(remove_duplicate=False)) | dict(
            module.named_buffers(remove_duplicate=False)
        )
        of = lambda names: known[names] if isinstance(names, str) else tuple(known[n] for n in names)  # noqa: E731
        out = self.gm(*args, *map(of, self.state))
        for name, value in zip(self.kept, out[len(out) - len(self.kept) :], strict=True):
            setattr(module, name, value)
        return out[0] if self.single else out[: len(out) - len(self.kept)]


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
        if mine.shape == value.shape and torch.equal(mine.isnan(), value.isnan()):
            mine, value = mine.nan_to_num(), value.nan_to_num()
        distance = (
            (mine - value).norm() if mine.shape == value.shape or not mine.dim() or not value.dim() else torch.inf
        )
        if not distance <= rtol * value.norm() + 1e-12:
            found.append(name)
    return found
