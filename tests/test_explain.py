"""`explain` and `rewrite`: what is said about a model, and that saying it changes nothing."""

import ast
import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import moe_compile
from moe_compile import Report, explain, rewrite
from moe_compile.advice import ADVICE
from moe_compile.cost import Gain, short
from tests.tiny import FF, Block, D, E, Experts, K, Net, Separate, T, close, compiled, routed

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


class Everyone(Experts):
    """Every expert on every token, weighed by a table."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            gate, up = F.linear(x, self.w13[e]).chunk(2, -1)
            y = F.linear(self.act(gate) * up, self.w2[e])
            out = out + y * (weights * (ids == e)).sum(-1).unsqueeze(-1)
        return out


def test_the_whole_report() -> None:
    """One note for all regions that are alike; advice for those that were refused."""
    report = explain(nn.Sequential(Block(), Block(), Block(Together()), Block(Everyone())), torch.randn(2, 6, D))
    places = [r.location for r in report.regions]
    for i, r in enumerate(report.regions):
        reason = r.reason and re.sub(r"\.py:\d+", ".py:2", r.reason)
        report.regions[i] = dataclasses.replace(r, location=f"file.py:{i}", reason=reason)
    assert len(set(places)) == 3
    assert (
        str(report)
        == """\
module     location   form   experts  top-k  result
---------  ---------  -----  -------  -----  ----------------------------------------------------------------------------------------------
0.experts  file.py:0  loop   4        2      rewritten
1.experts  file.py:1  loop   4        2      rewritten
2.experts  file.py:2  -      -        -      left as it is: aten.linear at test_explain.py:2 is not known to be row-wise (it reads sumread)
3.experts  file.py:3  dense  4        2      rewritten
0.experts and 1 more:
  an expert runs linear, silu, mul, linear, mul
  strategy grouped; estimated forward: 18.4 kFLOP, 2 launches instead of 41
2.experts:
  would help: experts that read their input, not the sum so far
3.experts:
  an expert runs linear, silu, mul, linear, mul
  strategy grouped; estimated forward: 18.4 kFLOP instead of 36.9 kFLOP, 1 launch instead of 37
3 of 4 regions rewritten"""
    )


def test_what_a_rewrite_saves() -> None:
    """A loop runs the same products; a dense form runs all experts on all tokens."""
    per_row = 2 * (2 * FF * D + D * FF)
    for number in (4, 16):
        blocks = [Block(cls(number), num_experts=number) for cls in (Experts, Everyone)]
        loop, dense = (explain(block, torch.randn(T, D)).regions[0] for block in blocks)
        assert loop.gain is not None and dense.gain is not None
        assert loop.gain.flops_before == loop.gain.flops_after == dense.gain.flops_after == T * K * per_row
        assert dense.gain.flops_before == T * number * per_row
        assert loop.gain.launches_before > 9 * number and dense.gain.launches_before > 4 * number
        assert loop.gain.launches_after < 10 and dense.gain.launches_after < 15
        assert loop.strategy == dense.strategy == "grouped"
        assert loop.body == ("linear", "silu", "mul", "linear", "mul")


def test_estimates_in_words() -> None:
    assert [short(x) for x in (0, 12, 3456, 7.89e6, 1.5e9, 2e13)] == ["0 ", "12 ", "3.46 k", "7.89 M", "1.5 G", "20 T"]
    assert str(Gain(4e6, 4e6, 50, 7)) == "4 MFLOP, 7 launches instead of 50"
    assert str(Gain(8e6, 4e6, 50, 7)) == "4 MFLOP instead of 8 MFLOP, 7 launches instead of 50"


def test_advice_is_about_reasons_that_exist() -> None:
    """Each entry's words are in some text of the sources that gives reasons."""
    files = [p for p in Path(moe_compile.__file__).parent.rglob("*.py") if p.name != "advice.py"]
    texts = [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else str(node.value)
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    generated = (" calls print", " calls input", "it reads sumread")  # words that a reason is given at run time
    for words, text in ADVICE:
        assert text
        assert words in generated or any(words in t for t in texts), words


class Prints(Experts):
    def gate(self, x: Tensor) -> Tensor:
        print(len(x))
        return super().gate(x)


class Asks(Experts):
    def gate(self, x: Tensor) -> Tensor:
        return super().gate(x) * float(input())


@pytest.mark.parametrize(
    ("experts", "words"), [(Together(), "sumread"), (Prints(), "calls print"), (Asks(), "calls input")]
)
def test_advice_of_words_made_at_run_time(experts: nn.Module, words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.input", lambda: "2")
        region = explain(experts, *routed()).regions[0]
    assert words in str(region.reason) and region.advice == next(text for w, text in ADVICE if words in w)
    assert f"would help: {region.advice}" in str(Report([region]))


def test_nothing_found() -> None:
    report = explain(nn.Linear(D, D), torch.randn(2, D))
    assert report.regions == [] and str(report) == "no expert region found"


def test_graphs_of_a_region() -> None:
    region = explain(Experts(), *routed()).regions[0]
    assert region.module == "" and "(root)" in str(Report([region]))
    assert "index_add" in region.before
    assert "moe_ep.expert_mlp" in region.after and "aten.index_add_" not in region.after
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
