"""What a forward does to Python besides its result happens in every call, or the function is refused.

Each module runs an ordinary loop over experts and leaves a trace somewhere else.  Compiled, it must leave the same.
"""

import array
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.test_families import routed as _routed
from tests.tiny import Block, D, E, Separate, T, close, compiled, original, regions

pytestmark = pytest.mark.usefixtures("fresh")
LOG: list[int] = []


class Base(Separate):
    """What the classes below change; their loop is the same, in the function that changes it."""

    LOG: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(log=[], deep=SimpleNamespace(seen={}))
        self.it = iter(range(2, 100))
        self.gen = (0.5 * i for i in range(1, 100))
        self.names = {"a"}
        self.pair: tuple[list[int], int] = ([], 1)
        self.numbers = array.array("i", [0])
        self.raw = bytearray(b"a")


def loop(self: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(self.experts):
        t, k = torch.where(ids == e)
        out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
    return out


class Exchanged(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        self.experts[0] = self.experts[1]
        return out


class Appended(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        self.experts.append(nn.Identity())
        return out


class Iterated(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out * next(self.it)


class Generated(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out * next(self.gen)


class OfTheClass(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        type(self).LOG.append(1)
        return out


class OfAnObject(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        self.cfg.log.append(1)
        return out


class OfAnObjectFurtherIn(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        self.cfg.deep.seen[len(self.cfg.deep.seen)] = 1
        return out


class OfATuple(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        self.pair[0].append(1)
        return out


class OfASet(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        self.names.add(len(self.names))
        return out


class OfAnArray(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        self.numbers.append(1)
        return out


class OfBytes(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        self.raw.append(1)
        return out


class OfAGlobal(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        LOG.append(1)
        return out


class DefaultDtype(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        torch.set_default_dtype(torch.float64)
        return out


class Deterministic(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        torch.use_deterministic_algorithms(True, warn_only=True)
        return out


class Environment(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        os.environ["MOE_TEST"] = "1"
        return out


class Registered(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        self.register_buffer("last", torch.ones(1))
        return out


class Retained(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        x.retain_grad()
        return out


class Frozen(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        self.experts.requires_grad_(False)
        return out


class Mode(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        self.experts.eval()
        return out


class Identity(Base):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out * (2 if id(x) == getattr(self, "known", None) else 1)


def state(model: Any) -> list[Any]:
    """What the modules above may change."""
    return [
        len(model.experts), model.experts[0] is model.experts[1], [*type(model).LOG], [*model.cfg.log],
        {**model.cfg.deep.seen}, [*model.pair[0]], {*model.names}, [*model.numbers], bytes(model.raw), [*LOG],
        torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), os.environ.get("MOE_TEST"),
        sorted(dict(model.named_buffers())), [p.requires_grad for p in model.parameters()], model.experts.training,
        model.it.__reduce__()[-1] if hasattr(model.it, "__reduce__") else None,
    ]  # fmt: skip


def reset() -> None:
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    os.environ.pop("MOE_TEST", None)
    LOG.clear()


CASES = Base.__subclasses__()


def run(cls: type[Base], call: Callable[[Any], Any]) -> list[Any]:
    reset()
    cls.LOG = []
    torch.manual_seed(0)
    model = cls()
    f, seen = call(model), []
    for tokens in (12, 9, 7):
        torch.manual_seed(tokens)
        x, ids, weights = _routed(range(E), tokens)
        x = (x.float() * 2).requires_grad_() * 1
        model.known = id(x)
        try:
            out = f(x, ids, weights.float())
            seen.append((out.detach().clone(), x.retains_grad, state(model)))
        except Exception as error:
            seen.append((str(type(error)), None, state(model)))
    reset()
    return seen


@pytest.mark.parametrize("cls", CASES, ids=lambda c: c.__name__)
def test_nothing_is_lost(cls: type[Base]) -> None:
    want = run(cls, lambda model: model)
    with regions() as found:
        got = run(cls, lambda model: compiled(model))
    for (a, r, s), (b, q, v) in zip(got, want, strict=True):
        assert close(a, b) if isinstance(b, Tensor) else a == b
        assert (r, s) == (q, v), [x.reason for x in found]


def test_the_loop_alone_is_rewritten() -> None:
    model = type("Plain", (Base,), {"forward": loop})()
    with regions() as found:
        compiled(model)(*_routed(range(E)))
    assert [r.matched for r in found] == [True], found[0].reason


class Counting(Block):
    """Counts how often each expert is chosen, as routers without an auxiliary loss do, in a checkpointed forward."""

    def __init__(self) -> None:
        super().__init__()
        self.load: Tensor
        self.register_buffer("load", torch.zeros(E))

    def counted(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(self.top_k)
        self.load.add_(F.one_hot(ids, E).sum((0, 1)))
        return self.experts(x, ids, weights)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.counted, x, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_recomputed_router_counts_once(inner: str) -> None:
    """As the compiler that traces a checkpoint has it; in eager mode the recomputation counts again."""
    model = Counting()
    reference, x = original(model), torch.randn(T, D)
    with regions() as found:
        compiled(model, inner, fullgraph=True)(x).square().sum().backward()
    out = reference(x)
    once = reference.load.clone()
    out.square().sum().backward()
    assert [r.matched for r in found] == [True] and torch.equal(reference.load, 2 * once)
    assert torch.equal(model.load, once) and once.sum() == T * model.top_k
    assert close(model.router.weight.grad, reference.router.weight.grad)
