"""`rewrite` of graphs that torch.export and make_fx give: same outputs and gradients, near misses, what to call."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from moe_compile import rewrite
from tests.detect.idioms import OldMixtral, RangeWhere, TokenMask
from tests.detect.idioms_dense import StackedAndSummed
from tests.detect.idioms_lists import RepeatedThenMasked
from tests.detect.idioms_pairs import GridWeighed
from tests.detect.idioms_sorted import Grouped
from tests.detect.loops import D, E, K, Listed, Stacked, T
from tests.tiny import close


class EveryExpert(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            out = out + self.expert(e, x) * (weights * (ids == e)).sum(-1, keepdim=True)
        return out


class Routed(nn.Module):
    """A router, and experts in one of the forms."""

    def __init__(self, experts: type[nn.Module], residual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.gate, self.residual = experts(), nn.Linear(D, E), residual

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = torch.topk(self.gate(x).softmax(-1), K)
        y = self.experts(x, ids, weights)
        return x + y if self.residual else y


FORMS = (RangeWhere, TokenMask, OldMixtral, RepeatedThenMasked, GridWeighed, Grouped, StackedAndSummed, EveryExpert)


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    sizes = {"x": {0: torch.export.Dim.DYNAMIC}}
    return torch.export.export(model, (torch.randn(T, D),), dynamic_shapes=sizes, strict=False)


def traced(model: nn.Module, pre_dispatch: bool = True) -> GraphModule:
    def call(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, state, (x,))  # type: ignore[no-any-return]

    state = dict(model.named_parameters())
    return make_fx(call, tracing_mode="symbolic", pre_dispatch=pre_dispatch)(state, torch.randn(T, D))


def gradients(run: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    run.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    run(x).backward(torch.randn(x.shape))
    return {n: p.grad for n, p in run.named_parameters()} | {"x": x.grad}


def agree(got: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> bool:
    pairs = ((got[n], g) for n, g in want.items())
    return all(close(a if a is not None else torch.zeros_like(g), g) for a, g in pairs if g is not None)


@pytest.mark.parametrize("form", FORMS)
def test_exported_module(form: type[nn.Module]) -> None:
    model = Routed(form)
    module = exported(model).module()
    report = rewrite(module)
    assert [(r.matched, r.num_experts) for r in report.regions] == [(True, E)], report
    assert any("moe_ep" in str(n.target) for n in module.graph.nodes)
    for tokens in (T, 2, 3 * T):
        x = torch.randn(tokens, D)
        assert close(module(x), model(x))
        assert agree(gradients(module, x), gradients(model, x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("residual", [False, True])
def test_lifted_graph_stays_a_valid_program(form: type[nn.Module], residual: bool) -> None:
    """The weights are inputs; the program's signature names its outputs."""
    model = Routed(form, residual)
    program = exported(model)
    assert [r.matched for r in rewrite(program.graph_module).regions] == [True]
    program.validate()
    x = torch.randn(2 * T, D)
    assert close(program.module()(x), model(x))


@pytest.mark.parametrize("form", [form for form in FORMS if form is not GridWeighed])  # it counts symbolic tokens
def test_traced_function(form: type[nn.Module]) -> None:
    model = Routed(form)
    gm = traced(model)
    assert [r.matched for r in rewrite(gm).regions] == [True]
    for tokens in (T, 2 * T):
        x = torch.randn(tokens, D)
        state = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        mine = x.clone().requires_grad_()
        torch.manual_seed(1)
        out = gm(state, mine)
        out.backward(torch.randn(x.shape))
        assert close(out, model(x))
        assert agree({n: p.grad for n, p in state.items()} | {"x": mine.grad}, gradients(model, x))


@pytest.mark.parametrize(
    "form", [RangeWhere, TokenMask, RepeatedThenMasked, StackedAndSummed, EveryExpert, GridWeighed]
)
@pytest.mark.parametrize("decompose", [False, True])
def test_decomposed_graph(form: type[nn.Module], decompose: bool) -> None:
    """Found, and right; or left as it is, and the report says what to call."""
    model = Routed(form)
    gm = exported(model).run_decompositions().module() if decompose else traced(model, pre_dispatch=False)
    report = rewrite(gm)
    if not all(r.matched for r in report.regions):
        assert "pre_dispatch=True" in str(report.regions[-1].reason)
    assert report.regions
    x = torch.randn(T, D)
    assert close(gm(x) if decompose else gm(dict(model.named_parameters()), x), model(x))


class LeftOut(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(1, E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


class Normalised(Listed):
    """Rows see each other."""

    def run(self, e: int, x: Tensor) -> Tensor:
        y = super().run(e, x)
        return y - y.mean(0)


class OtherActivation(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return F.relu(super().run(e, x)) if e == 2 else super().run(e, x)


class AlsoReturnsRows(Listed):
    """What one expert made is used elsewhere."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            y = self.run(e, x[t])
            out.index_add_(0, t, y * weights[t, k, None])
        return out + y.sum()


class InTwoOrders(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            _, t = torch.where((ids == e).t())
            out.index_add_(0, t, self.run(e, x[t]) * weights[ids == e][:, None])
        return out


@pytest.mark.parametrize("form", [LeftOut, Normalised, OtherActivation, AlsoReturnsRows, InTwoOrders])
@pytest.mark.parametrize("lifted", [False, True])
def test_near_misses_are_left_alone(form: type[nn.Module], lifted: bool) -> None:
    model = Routed(form)
    program = exported(model)
    gm = program.graph_module if lifted else program.module()
    before = str(gm.graph)
    report = rewrite(gm)
    assert not any(r.matched for r in report.regions)
    assert str(gm.graph) == before
    x = torch.randn(2 * T, D)
    assert close(program.module()(x), model(x))


def test_changed_weights_of_an_exported_module() -> None:
    """The rewritten graph reads the parameters that the module has."""
    model = Routed(RangeWhere)
    module = exported(model).module()
    rewrite(module)
    x = torch.randn(T, D)
    with torch.no_grad():
        for a, b in zip(module.parameters(), model.parameters(), strict=True):
            b.mul_(1.5)
            a.copy_(b)
    assert close(module(x), model(x))


def test_a_graph_that_routes_nothing_gets_no_advice() -> None:
    gm = make_fx(lambda x, w: x @ w, tracing_mode="fake")(torch.randn(2, D), torch.randn(D, D))
    assert rewrite(gm).regions == []
