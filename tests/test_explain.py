"""`explain` and `rewrite`: what is said about a model, and that saying it changes nothing."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from moe_compile import Report, explain, rewrite
from tests.tiny import Block, D, E, Experts, K, Net, Separate, close, compiled, routed

pytestmark = pytest.mark.usefixtures("fresh")


class Together(Separate):
    """Not an expert region: each iteration reads what the last one wrote."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            x = x.index_add(0, t, expert(x[t]) * weights[t, k, None])
        return x


def test_a_table() -> None:
    model = nn.Sequential(Block(), Block(Together()))
    report = explain(model, torch.randn(2, 6, D))
    good, bad = report.regions
    line = Experts.forward.__code__.co_firstlineno
    assert (good.matched, good.module, good.location) == (True, "0.experts", f"tiny.py:{line}")
    assert (good.form, good.num_experts, good.top_k, good.reason) == ("loop", E, K, None)
    assert (bad.matched, bad.module) == (False, "1.experts")
    assert bad.reason
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "location", "form", "experts", "top-k", "result"]
    assert lines[2].split() == ["0.experts", f"tiny.py:{line}", "loop", str(E), str(K), "rewritten"]
    assert lines[3].endswith(f"left as it is: {bad.reason}")
    assert lines[-1] == "1 of 2 regions rewritten"


def test_nothing_found() -> None:
    report = explain(nn.Linear(D, D), torch.randn(2, D))
    assert report.regions == [] and str(report) == "no expert region found"


def test_graphs_of_a_region() -> None:
    region = explain(Experts(), *routed()).regions[0]
    assert region.module == "" and "(root)" in str(Report([region]))
    assert "index_add" in region.before
    assert "moe_ep.dispatch" in region.after and "moe_ep.combine" in region.after
    assert any(line.startswith("DispatchExperts: 1 applied") for line in region.passes)
    assert "before" not in repr(region)


def test_keywords_and_functions() -> None:
    model = Experts()
    x, ids, weights = routed()
    assert explain(model, x, weights=weights, ids=ids).regions[0].matched
    assert explain(lambda x: model(x, ids, weights), x).regions[0].matched


def test_a_model_that_is_compiled_already() -> None:
    model, x = Net(2), torch.randn(2, 6, D)
    run = compiled(model)
    run(x)
    assert [r.module for r in explain(run, x).regions] == ["layers.0.experts", "layers.1.experts"]
    model.compile(backend="moe_ep", options={"inner": "eager"})
    assert [r.matched for r in explain(model, x).regions] == [True, True]
    assert model._compiled_call_impl is not None
    assert [r.matched for r in explain(model, x).regions] == [True, True]


def test_parts_that_are_compiled_already() -> None:
    model, x = Net(2), torch.randn(2, 6, D)
    for layer in model.layers:
        layer.compile(backend="moe_ep", options={"inner": "eager"})
    model(x)
    assert [r.module for r in explain(model, x).regions] == ["layers.0.experts", "layers.1.experts"]
    assert all(layer._compiled_call_impl is not None for layer in model.layers)


def test_graph_breaks_are_not_counted_twice() -> None:
    class Breaks(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.layers[0](x)
            torch._dynamo.graph_break()
            return x + self.layers[1](x)

    model = Breaks(2)
    for _ in range(10):
        report = explain(model, torch.randn(2, 6, D))
    assert [r.module for r in report.regions] == ["layers.0.experts", "layers.1.experts"]


def test_each_layer_has_a_line_after_breaks_in_a_loop() -> None:
    class Breaks(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
                torch._dynamo.graph_break()
            return x

    report = explain(Breaks(3), torch.randn(2, 6, D))
    assert "layers.0.experts" in [r.module for r in report.regions]


def test_changes_nothing() -> None:
    model, x = Net(1), torch.randn(2, 6, D)
    model.layers[0].register_buffer("calls", torch.zeros(()))
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    want = model(x)
    explain(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())
    assert close(model(x), want)
    run = compiled(model, fullgraph=True)
    assert close(run(x), want)


def test_an_error_in_the_model_is_the_models_own() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ones(3, 3)

    with pytest.raises(Exception, match=r"shape|size|mat1"):
        explain(Fails(), torch.randn(2, 4))
    assert explain(Experts(), *routed()).regions[0].matched


def batched(x: Tensor, ids: Tensor, weights: Tensor, w: Tensor) -> Tensor:
    rows = x.repeat_interleave(K, 0)
    y = torch.bmm(rows.unsqueeze(1), w[ids.reshape(-1)]).squeeze(1) * weights.reshape(-1, 1)
    return y.view(x.shape[0], K, -1).sum(1)


def test_rewrite_of_a_traced_graph() -> None:
    inputs = (*routed(), torch.randn(E, D, D))
    gm = make_fx(batched, tracing_mode="fake", pre_dispatch=True)(*inputs)
    report = rewrite(gm)
    assert [(r.matched, r.num_experts, r.top_k) for r in report.regions] == [(True, E, K)], report
    assert close(gm(*inputs), batched(*inputs))
    assert "moe_ep.combine" in report.regions[0].after


def test_rewrite_of_a_graph_without_experts() -> None:
    x = torch.randn(2, D)
    gm = make_fx(lambda x: x + 1, tracing_mode="fake")(x)
    assert not any(r.matched for r in rewrite(gm).regions)
    assert close(gm(x), x + 1)


def test_many_explanations_of_one_model() -> None:
    model, x = Net(1), torch.randn(2, 6, D)
    for _ in range(10):
        assert [r.matched for r in explain(model, x).regions] == [True]
