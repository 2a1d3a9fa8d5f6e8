"""Lists of modules whose weights are one input each: numbers, gradients, and what must not be taken for a series."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.analysis import analyse
from moe_compile.graph_text import graph_text
from moe_compile.pipeline import canonicalise
from moe_compile.region import experts
from moe_compile.series import expand, series_of
from tests.detect.loops import known
from tests.tiny import FF, D, check_same, compiled, original, regions, routed

E = 9


class Pair(nn.Module):
    """Two matrices of one shape, so that they can stand in each other's place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(0.3 * torch.randn(D, D)) for _ in range(2))
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.a)), self.b) * self.scale


class Pairs(nn.Module):
    """Experts in a list; `run(e, expert, x)` and `before(x)` are what a case changes."""

    def __init__(self, num_modules: int = E) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Pair() for _ in range(num_modules))

    def before(self, x: Tensor) -> Tensor:
        return x

    def run(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return expert(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x = self.before(x)
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.run(e, self.experts[e], x[t]) * weights[t, k, None])
        return out


class Products(Pairs):
    def run(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return F.silu(x @ expert.a) @ expert.b


class Longer(Pairs):
    """The last modules of the list are nobody's."""

    def __init__(self) -> None:
        super().__init__(E + 2)


class Biased(Pairs):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, FF), nn.SiLU(), nn.Linear(FF, D)) for _ in range(E))


class FirstScales(Pairs):
    """The first module's weight is read outside of the loop too."""

    def before(self, x: Tensor) -> Tensor:
        return x * self.experts[0].a.mean()  # type: ignore[operator, union-attr]


class OneHalf(Pairs):
    """Some experts run one of their weights, some the other."""

    def run(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return F.linear(x, expert.a) if e < 4 else F.linear(x, expert.b)


class FirstSwaps(Pairs):
    def run(self, e: int, expert: Any, x: Tensor) -> Tensor:
        first, second = (expert.a, expert.b) if e else (expert.b, expert.a)
        return F.linear(F.silu(F.linear(x, first)), second)


class SameTwice(Pairs):
    def run(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, expert.a)), expert.a) + F.linear(x, expert.b)


class Mapped(Pairs):
    """The rows of one expert, with the weights of another."""

    def run(self, e: int, expert: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.experts[(e + 1) % E].a)  # type: ignore[arg-type]


class AliasChanged(Pairs):
    """A member's weight, under another name, is changed in place: on fakes, not while a trace runs."""

    def __init__(self) -> None:
        super().__init__()
        self.alias = self.experts[3].a

    def before(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.alias.mul_(2.0)  # type: ignore[operator]
        return x


def test_a_trace_changes_no_weight() -> None:
    module = AliasChanged()
    before = module.experts[3].a.detach().clone()  # type: ignore[operator, union-attr]
    proven(module)
    assert torch.equal(before, module.experts[3].a)  # type: ignore[arg-type]


SERIES: dict[type[Pairs], bool] = {
    Pairs: True, Products: True, Longer: True, Biased: True, FirstScales: True, SameTwice: True,
    OneHalf: False, FirstSwaps: False, Mapped: False,
}  # fmt: skip


def proven(module: nn.Module, form: Callable[..., Any] = Pairs.forward) -> Any:
    return analyse(form, module, routed(num_experts=E), {}, known(True))  # type: ignore[arg-type]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("cls", SERIES)
def test_numbers(cls: type[Pairs]) -> None:
    torch.manual_seed(0)
    module = cls()
    found = proven(module)
    assert any(isinstance(names, tuple) for names in found.capture.state) is SERIES[cls]
    reference = original(module)
    with regions() as reports:
        run = compiled(module, fullgraph=True)
        for tokens in (1, 12):
            x, ids, weights = routed(tokens, num_experts=E)
            check_same(run, reference, module, reference, x, ids, weights)
    assert reports and all(r.matched for r in reports)


@pytest.mark.usefixtures("fresh")
def test_weights_and_attributes_of_one_member_may_change() -> None:
    torch.manual_seed(0)
    module = Pairs()
    run, inputs = compiled(module, fullgraph=True), routed(num_experts=E)
    changes: list[Callable[[], Any]] = [
        lambda: module.experts[5].a.data.mul_(2),  # type: ignore[union-attr, operator]
        lambda: setattr(module.experts[6], "a", nn.Parameter(torch.randn(D, D))),
        lambda: setattr(module.experts[7], "scale", 3.0),
        lambda: setattr(module.experts[8], "b", nn.Parameter(torch.randn(D, D), requires_grad=False)),
        lambda: setattr(module.experts[3], "a", module.experts[2].a),
        lambda: module.experts.insert(0, Pair()),
    ]
    for change in (lambda: None, *changes):
        change()
        reference = original(module)
        check_same(run, reference, module, reference, *inputs)


@pytest.mark.usefixtures("fresh")
def test_autocast() -> None:
    torch.manual_seed(0)
    module, (x, ids, weights) = Biased(), routed(num_experts=E)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(module, fullgraph=True)(x, ids, weights), module(x, ids, weights)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("cls", [Pairs, Longer, Biased])
def test_expanded(cls: type[Pairs]) -> None:
    torch.manual_seed(0)
    module, inputs = cls(), routed(num_experts=E)
    found = proven(module)
    state = expand(found.gm.graph, found.capture.state)
    assert not any(series_of(n) for n in found.gm.graph.nodes)
    (node,) = found.gm.graph.find_nodes(op="call_function", target=experts)
    assert all(len(param) == E for param in node.args[3])
    reports = canonicalise(found.gm)
    assert reports[0].applied, reports[0]
    tensors = dict(module.named_parameters())
    assert set(state) == set(tensors)
    (got,) = found.gm(*inputs, *(tensors[name] for name in state))
    torch.testing.assert_close(got, module(*inputs))


def test_prints() -> None:
    found = proven(Pairs())
    assert f"experts_0_a_series: {E} x f32[{D}, {D}]" in graph_text(found.gm.graph)
