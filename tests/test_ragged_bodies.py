"""Each batching rule of moe_compile/ragged.py: an expert's body for all experts at once, against the loop."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import moe_compile  # noqa: F401
from moe_compile.pipeline import canonicalise
from moe_compile.ragged import RULES
from tests.golden import detected, gradients, run

T, K, E, D = 9, 2, 3, 4


class Experts(nn.Module):
    """A weight [E, D, D], a wide one [E, 2D, D], a vector [E, D], a number [E] and separate linear layers."""

    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.wide = nn.Parameter(torch.randn(E, D, D)), nn.Parameter(torch.randn(E, 2 * D, D))
        self.v, self.s = nn.Parameter(torch.randn(E, D)), nn.Parameter(torch.rand(E) + 0.5)
        self.linears = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.body = body

    def loop(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            own = (self.w[e], self.wide[e], self.v[e], self.s[e], self.linears[e])
            out.index_add_(0, t, self.body(x[t], *own) * weights[t, k, None])
        return out


f = nn.functional


def blocks(scales: Tensor) -> Tensor:
    """[2, 2] as [D, D]"""
    return scales.repeat_interleave(2, 0).repeat_interleave(2, dim=-1)


BODIES: dict[str, Callable[..., Tensor]] = {
    "linear": lambda x, w, wide, v, s, m: m(x),
    "linear, stacked bias": lambda x, w, wide, v, s, m: f.linear(x, w, v),
    "matmul": lambda x, w, wide, v, s, m: x @ w,
    "matmul, separate": lambda x, w, wide, v, s, m: x @ m.weight.t(),
    "t": lambda x, w, wide, v, s, m: x @ w.t(),
    "numpy_T": lambda x, w, wide, v, s, m: x @ w.T,
    "mT": lambda x, w, wide, v, s, m: x @ w.mT,
    "transpose": lambda x, w, wide, v, s, m: x @ w.transpose(0, 1),
    "permute": lambda x, w, wide, v, s, m: x @ w.permute(1, 0),
    "addmm": lambda x, w, wide, v, s, m: torch.addmm(v, x, w),
    "chunk": lambda x, w, wide, v, s, m: f.linear(x, wide.chunk(2)[0]) * f.linear(x, wide.chunk(2)[1]),
    "split": lambda x, w, wide, v, s, m: f.linear(x, wide.split([D, D])[1]),
    "slice": lambda x, w, wide, v, s, m: f.linear(x, wide[D:]),
    "strided slice": lambda x, w, wide, v, s, m: f.linear(x, wide[::2]),
    "select": lambda x, w, wide, v, s, m: x * wide[3],
    "select behind": lambda x, w, wide, v, s, m: x * w[:, -1],
    "view": lambda x, w, wide, v, s, m: f.linear(x, wide.view(2, D, D)[0]),
    "reshape": lambda x, w, wide, v, s, m: f.linear(x, wide.reshape(2, D * D)[1].reshape(D, D)),
    "flatten": lambda x, w, wide, v, s, m: x * w.flatten()[:D],
    "unsqueeze": lambda x, w, wide, v, s, m: x * v.unsqueeze(0),
    "unsqueeze behind": lambda x, w, wide, v, s, m: x * v.unsqueeze(-1)[:, 0],
    "squeeze": lambda x, w, wide, v, s, m: x * v.unsqueeze(0).squeeze(0),
    "unbind": lambda x, w, wide, v, s, m: x * w.unbind(1)[2],
    "cat": lambda x, w, wide, v, s, m: f.linear(x, torch.cat([w[:2], wide[:2]])),
    "sum": lambda x, w, wide, v, s, m: x * w.sum(1),
    "mean": lambda x, w, wide, v, s, m: x * w.mean(-1),
    "softmax": lambda x, w, wide, v, s, m: x @ w.softmax(-1),
    "pointwise on stacks": lambda x, w, wide, v, s, m: x @ (w * s + v.sigmoid()),
    "a number": lambda x, w, wide, v, s, m: x * s,
    "a vector": lambda x, w, wide, v, s, m: torch.tanh(x + v) - v,
    "casts": lambda x, w, wide, v, s, m: f.linear(x.double(), w.double()).float(),
    "layer_norm": lambda x, w, wide, v, s, m: f.layer_norm(x, (D,), v, w[0], 1e-3),
    "rms_norm": lambda x, w, wide, v, s, m: f.rms_norm(x, (D,), v, 1e-3),
    "clamped gate": lambda x, w, wide, v, s, m: f.linear(x, wide)[:, ::2].clamp(max=1) * f.linear(x, wide)[:, 1::2],
    "expand": lambda x, w, wide, v, s, m: f.linear(x, w[:1].expand(D, -1)) + x @ v.expand(2, D, D)[1],
    "repeat_interleave": lambda x, w, wide, v, s, m: x @ (w * blocks(w[:2, ::2])),
    "blocks by expand": lambda x, w, wide, v, s, m: x @ (w.view(2, 2, 2, 2) * w[:2, None, :2, None]).view(D, D),
    "where": lambda x, w, wide, v, s, m: torch.where(x > v, x, x * s),
    "detach": lambda x, w, wide, v, s, m: x * v.detach() + x,
}


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """Skewed: expert 2 is chosen by one token only."""
    g = torch.Generator().manual_seed(3)
    ids = torch.tensor([[0, 1]] * (T - 1) + [[2, 0]])
    return torch.randn(T, D, generator=g), ids, torch.rand(T, K, generator=g)


@pytest.mark.parametrize("name", BODIES)
def test_a_body_for_all_experts_at_once(name: str) -> None:
    module, (x, ids, weights) = Experts(BODIES[name]), routed()
    gm, report = detected(module, Experts.loop, x, ids, weights)
    assert report.applied, str(report)
    first, *_ = canonicalise(gm)
    assert first.applied, str(first)
    leaves = [x.requires_grad_(), weights.requires_grad_(), *module.parameters()]
    ours, theirs = run(gm, module, x, ids, weights), module.loop(x, ids, weights)
    torch.testing.assert_close(ours, theirs)
    weight = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    grads = [torch.autograd.grad((o * weight).sum(), leaves, allow_unused=True) for o in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(zero if a is None else a.abs().sum(), zero if b is None else b.abs().sum())
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


def test_every_rule_has_a_body() -> None:
    """The ops of the table that a body above can reach; pointwise ones are one rule."""
    rules = {name for name, rule in RULES.items() if rule.__name__ != "pointwise"}
    said = " ".join(BODIES) + " getitem split_with_sizes view"
    assert not [r for r in rules if r not in said]


def test_gradients_helper_weighs_every_element() -> None:
    x = torch.ones(3, requires_grad=True)
    assert gradients(x * 2, x)[0].tolist() == [-2.0, 0.0, 2.0]
