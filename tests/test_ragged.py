"""Each batching rule of ragged.py, alone: values and gradients against the `experts` node that it batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import moe_compile  # noqa: F401  the ops' kernels
from moe_compile.passes.dispatch_experts import DispatchExperts
from moe_compile.ragged import RULES, _op
from moe_compile.region import experts
from tests.tiny import close

aten = torch.ops.aten
T, K, E, D, FF = 9, 2, 4, 6, 5
Body = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # rows x [r, D]; of each expert: w [FF, D], v [D], s []

CASES: dict[str, Body] = {
    "linear": lambda x, w, v, s: (
        F.linear(F.linear(x, w), w.t(), v) + F.linear(F.linear(torch.stack([x, 2 * x], 1), w, w[:, 0]), w.t(), v).sum(1)
    ),
    "matmul": lambda x, w, v, s: x @ w.t() @ w,
    "abs": lambda x, w, v, s: x * v.abs(),
    "add": lambda x, w, v, s: (x + v) * (v + s),
    "addcmul": lambda x, w, v, s: torch.addcmul(v, x, v),
    "clamp": lambda x, w, v, s: x * v.clamp(-0.5, 0.5),
    "clamp_max": lambda x, w, v, s: x * v.clamp_max(0.1),
    "clamp_min": lambda x, w, v, s: x * v.clamp_min(0.1),
    "clone": lambda x, w, v, s: x * v.clone(),
    "contiguous": lambda x, w, v, s: F.linear(F.linear(x, w), aten.contiguous(w.t())),
    "cos": lambda x, w, v, s: x * v.cos(),
    "detach": lambda x, w, v, s: x * v.detach() + v,
    "div": lambda x, w, v, s: x / (1 + s * s) + x.div(v * v + 1),
    "exp": lambda x, w, v, s: x * v.exp(),
    "ge": lambda x, w, v, s: x * (v >= 0).to(x.dtype),
    "gelu": lambda x, w, v, s: x * F.gelu(v),
    "gt": lambda x, w, v, s: x * (v > 0).to(x.dtype),
    "le": lambda x, w, v, s: x * (v <= 0).to(x.dtype),
    "log": lambda x, w, v, s: x * (v * v + 1).log(),
    "lt": lambda x, w, v, s: x * (x < v).to(x.dtype),
    "masked_fill": lambda x, w, v, s: x.masked_fill(x > v, 0.0),
    "maximum": lambda x, w, v, s: torch.maximum(x, v),
    "minimum": lambda x, w, v, s: torch.minimum(x, v),
    "mul": lambda x, w, v, s: x * v * s,
    "multiply": lambda x, w, v, s: torch.multiply(x, v),
    "neg": lambda x, w, v, s: x * -v,
    "pow": lambda x, w, v, s: x * v.pow(2),
    "reciprocal": lambda x, w, v, s: x * (v * v + 1).reciprocal(),
    "relu": lambda x, w, v, s: x * v.relu(),
    "rsqrt": lambda x, w, v, s: x * (v * v + 1).rsqrt(),
    "rsub": lambda x, w, v, s: x * torch.rsub(v, 1.0),
    "sigmoid": lambda x, w, v, s: x * v.sigmoid(),
    "silu": lambda x, w, v, s: x * F.silu(v),
    "sin": lambda x, w, v, s: x * v.sin(),
    "softplus": lambda x, w, v, s: x * F.softplus(v),
    "sqrt": lambda x, w, v, s: x * (v * v + 1).sqrt(),
    "square": lambda x, w, v, s: x * v.square(),
    "sub": lambda x, w, v, s: (x - v) * (2 - s),
    "tanh": lambda x, w, v, s: x * v.tanh(),
    "to": lambda x, w, v, s: x * v.to(torch.float64).to(torch.float32),
    "_to_copy": lambda x, w, v, s: x * aten._to_copy(aten._to_copy(v, dtype=torch.float64), dtype=torch.float32),
    "true_divide": lambda x, w, v, s: torch.true_divide(x, v * v + 1),
    "type_as": lambda x, w, v, s: x * v.double().type_as(s),
    "where": lambda x, w, v, s: torch.where(v > 0, x, v),
    "layer_norm": lambda x, w, v, s: F.layer_norm(x, (D,), v, v * s),
    "rms_norm": lambda x, w, v, s: F.rms_norm(x, (D,), v, 1e-5),
    "t": lambda x, w, v, s: F.linear(F.linear(x, w), w.t()),
    "transpose": lambda x, w, v, s: x @ w.transpose(0, -1) @ w,
    "expand": lambda x, w, v, s: F.linear(x, v.expand(3, D)).sum(1, True) * s.expand(D) + x @ w[:1].expand(D, -1),
    "repeat_interleave": lambda x, w, v, s: x * v[:3].repeat_interleave(2, 0) @ w[:3].repeat_interleave(2, dim=-2),
    "numpy_T": lambda x, w, v, s: x @ w.T @ w,
    "mT": lambda x, w, v, s: x @ w.mT @ w,
    "squeeze": lambda x, w, v, s: x * v.unsqueeze(0).squeeze(0) + v.unsqueeze(1).squeeze(-1),
    "permute": lambda x, w, v, s: x @ w.permute(1, 0) @ w,
    "view": lambda x, w, v, s: x * w.view(D, FF).sum(1),
    "reshape": lambda x, w, v, s: x * w.t().reshape(FF * D)[:D],
    "flatten": lambda x, w, v, s: x * w.flatten()[3 : 3 + D],
    "getitem": lambda x, w, v, s: x * w.split(2)[1].sum(0),
    "select": lambda x, w, v, s: x * w[2] * w[:, 1].sum(0),
    "slice": lambda x, w, v, s: F.linear(x, w[1::2]).sum(-1, keepdim=True) * w[:, 1:4].sum(),
    "unsqueeze": lambda x, w, v, s: x * (v.unsqueeze(0) * v.unsqueeze(-1)).sum(-1),
    "softmax": lambda x, w, v, s: x * v.softmax(-1) + F.linear(F.linear(x, w.softmax(0)), w.softmax(1).t()),
    "cat": lambda x, w, v, s: F.linear(x, torch.cat([w, w[:1]])) + torch.cat([v[:2], v[2:]]),
    "unbind": lambda x, w, v, s: x * w.unbind()[0] + x * w.unbind(1)[2].sum(),
    "sum": lambda x, w, v, s: x * w.sum() + w.sum(0) + w.sum((0, 1)) + w.sum(1, keepdim=True).sum(),
    "mean": lambda x, w, v, s: x * w.mean() + w.mean(0) + w.mean(-1).mean(),
    "chunk": lambda x, w, v, s: (
        x * torch.cat(v.chunk(2)[::-1]) + F.linear(x[:, :3], w.chunk(2, -1)[0]).sum(-1, keepdim=True)
    ),
    "split": lambda x, w, v, s: F.linear(x, w.split(2)[0]).sum(-1, keepdim=True) * v,
    "split_with_sizes": lambda x, w, v, s: F.linear(x, w.split([1, 4])[1]).sum(-1, keepdim=True) * v,
}
REFUSED: dict[str, tuple[Body, str]] = {
    "a product of weights": (lambda x, w, v, s: x @ (w.t() @ w), "a product of two expert weights"),
    "an op without a rule": (lambda x, w, v, s: x * v.cumsum(0), "no rule for aten.cumsum on expert weights"),
    "repeated as a whole": (
        lambda x, w, v, s: x * v[:3].repeat_interleave(2),
        "no rule for repeat_interleave by 2 along None on expert weights",
    ),
}


def body_of(f: Body) -> GraphModule:
    example = torch.randn(7, D), torch.randn(FF, D), torch.randn(D), torch.randn(())
    gm = make_fx(f, tracing_mode="fake", pre_dispatch=True)(*example)
    for node, name in zip(
        gm.graph.find_nodes(op="placeholder"), ("token_0", "param_0", "param_1", "param_2"), strict=True
    ):
        node._rename(name)
    return gm


def outer(f: Body, separate: bool) -> GraphModule:
    """ids, x and the parameters of all experts, as one stack or one by one, into an `experts` node."""
    graph, fakes = Graph(), FakeTensorMode()

    def placeholder(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
        node = graph.placeholder(name)
        with fakes:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    ids, x = placeholder("ids", T, K, dtype=torch.int64), placeholder("x", T, D)
    shapes = (FF, D), (D,), ()
    params: list[Any] = []
    for i, shape in enumerate(shapes):
        names = [f"p{i}_{e}" for e in range(E)]
        params.append([placeholder(n, *shape) for n in names] if separate else placeholder(f"p{i}", E, *shape))
    owner = torch.nn.Module()
    owner.body = body_of(f)
    node = graph.call_function(experts, (ids, [x], [], params, [], graph.get_attr("body"), E, None))
    with fakes:
        node.meta["val"] = torch.empty(T, D)
    graph.output(node)
    return GraphModule(owner, graph)


def results(gm: GraphModule, separate: bool) -> list[Tensor]:
    torch.manual_seed(0)
    ids = torch.tensor([0, 2, 3])[torch.rand(T, 3).argsort(-1)][:, :K]  # nobody chooses expert 1
    x = torch.randn(T, D, requires_grad=True)
    stacks = [torch.randn(E, *shape, requires_grad=True) for shape in ((FF, D), (D,), ())]
    params = [w[e] for w in stacks for e in range(E)] if separate else stacks
    out = gm(ids, x, *params)
    grads = torch.autograd.grad(out, [x, *stacks], torch.randn(out.shape), allow_unused=True)
    return [out, *(torch.zeros(()) if g is None else g for g in grads)]


@pytest.mark.parametrize("separate", [False, True], ids=["stacked", "separate"])
@pytest.mark.parametrize("name", CASES)
def test_rule(name: str, separate: bool) -> None:
    gm = outer(CASES[name], separate)
    assert name in {_op(n) for n in gm.body.graph.nodes if n.op == "call_function"}
    want = results(gm, separate)
    report = DispatchExperts()(gm)
    assert report.applied, str(report)
    for mine, theirs in zip(results(gm, separate), want, strict=True):
        same = close(mine, theirs) if theirs.any() else not mine.any()
        assert same


def test_every_rule_is_tested() -> None:
    assert set(RULES) == set(CASES)


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name: str) -> None:
    body, reason = REFUSED[name]
    gm = outer(body, False)
    before = str(gm.graph)
    report = DispatchExperts()(gm)
    assert [r for _, r in report.refused] == [reason]
    assert str(gm.graph) == before
