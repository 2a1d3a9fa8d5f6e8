"""Small models for the tests of the compiler: experts in a plain loop, in a block, in a stack of layers."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile import dynamo_reports
from moe_compile.report import RegionReport

T, K, E, D, FF = 12, 2, 4, 8, 16


class Experts(nn.Module):
    """Stacked weights and a loop over the experts that were chosen, as Hugging Face writes it."""

    def __init__(self, num_experts: int = E, width: int = D, act: nn.Module | None = None) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.w13 = nn.Parameter(0.3 * torch.randn(num_experts, 2 * FF, width))
        self.w2 = nn.Parameter(0.3 * torch.randn(num_experts, width, FF))
        self.act = act or nn.SiLU()

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, self.num_experts).permute(2, 1, 0)
        for e in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            k, t = torch.where(mask[e[0]])
            gate, up = F.linear(x[t], self.w13[e[0]]).chunk(2, -1)
            y = F.linear(self.gate(gate) * up, self.w2[e[0]])
            out.index_add_(0, t, (y * weights[t, k, None]).to(out.dtype))
        return out

    def gate(self, x: Tensor) -> Tensor:
        return self.act(x)


class Separate(nn.Module):
    """A list of experts, each a module."""

    def __init__(self, expert: Callable[[], nn.Module] | None = None, num_experts: int = E) -> None:
        super().__init__()
        make = expert or (lambda: nn.Sequential(nn.Linear(D, FF), nn.SiLU(), nn.Linear(FF, D)))
        self.experts = nn.ModuleList(make() for _ in range(num_experts))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, (expert(x[t]) * weights[t, k, None]).to(out.dtype))
        return out


class Block(nn.Module):
    """A router and experts."""

    def __init__(self, experts: nn.Module | None = None, top_k: int = K, num_experts: int = E) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(D, num_experts)
        self.experts = experts or Experts(num_experts)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        weights, ids = torch.topk(self.router(rows).softmax(-1), self.top_k)
        return self.experts(rows, ids, weights).view_as(x)


class Net(nn.Module):
    """Layers of blocks with a residual."""

    def __init__(self, layers: int = 2, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(layers))
        self.head = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def routed(tokens: int = T, num_experts: int = E, top_k: int = K, width: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of an experts module: x, ids, weights."""
    ids = torch.rand(tokens, num_experts).argsort(-1)[:, :top_k].contiguous()
    return torch.randn(tokens, width), ids, torch.rand(tokens, top_k)


def compiled(model: Any, inner: str = "eager", **kwargs: Any) -> Any:
    """`torch.compile` by this backend; options by keyword."""
    settings = {k: kwargs.pop(k) for k in ("fullgraph", "dynamic", "mode") if k in kwargs}
    return torch.compile(model, backend="moe_ep", options={"inner": inner, **kwargs}, **settings)


def original(model: nn.Module) -> nn.Module:
    """A copy that nothing compiles."""
    return copy.deepcopy(model)


@contextlib.contextmanager
def regions() -> Iterator[list[RegionReport]]:
    """The regions that the hook met meanwhile."""
    found: dynamo_reports.Collected = []
    reports: list[RegionReport] = []
    token = dynamo_reports.collector.set(found)
    try:
        yield reports
    finally:
        dynamo_reports.collector.reset(token)
        reports += [report for _, report in found]


def graphs() -> int:
    """How many graphs were compiled since the last reset."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def check_same(
    run: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    model: nn.Module,
    reference: nn.Module,
    *inputs: Any,
    rtol: float = 1e-5,
) -> None:
    """Outputs and all gradients agree, relative to the norm of each."""
    results = []
    for f, m in ((run, model), (expected, reference)):
        m.zero_grad()
        mine = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
        out = f(*mine)
        torch.manual_seed(1)
        if out.requires_grad:  # a loop that no expert entered gives no gradient; a rewritten one gives zeros
            out.backward(torch.randn(out.shape).to(out.dtype))
        grads = {n: p.grad for n, p in m.named_parameters()} | {str(i): x.grad for i, x in enumerate(mine)}
        results.append((out, grads))
    (out, grads), (want, want_grads) = results
    assert out.dtype == want.dtype
    assert close(out, want, rtol)
    assert grads.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        mine_ = grads[name]
        if grad is None or not bool(grad.any()):
            assert mine_ is None or not mine_.any(), name
        else:
            assert mine_ is not None and close(mine_, grad, rtol), name


def close(a: Tensor, b: Tensor, rtol: float = 1e-5) -> bool:
    """Equal but for a part `rtol` of the norm."""
    if a.shape != b.shape:
        return False
    a, b = a.detach().double(), b.detach().double()
    return bool((a - b).norm() <= rtol * b.norm() + 1e-12)
