"""The contract of the hook: how calls arrive, what is guarded, what is left alone."""

import copy
import operator
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
from moe_compile import MoeCompileError, arguments, dynamo_hook, kinds
from tests import tiny
from tests.tiny import (
    FF,
    Block,
    D,
    E,
    Experts,
    K,
    Net,
    Separate,
    T,
    check_same,
    close,
    compiled,
    graphs,
    original,
    regions,
    routed,
)

pytestmark = pytest.mark.usefixtures("fresh")


def matched(found: list[Any], number: int) -> None:
    assert [r.matched for r in found] == [True] * number, [r.reason for r in found]


# -- how calls arrive -----------------------------------------------------------------------


class Calls(nn.Module):
    """A child called in one of the ways that arrive differently in Dynamo."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.child, self.how = Experts(), how
        if how == "stored":
            self.method = self.child.forward

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self.how == "call":
            return self.child(x, ids, weights)
        if self.how == "keywords":
            return self.child(x, weights=weights, ids=ids)
        if self.how == "forward":
            return self.child.forward(x, ids, weights)
        if self.how == "class":
            return Experts.forward(self.child, x, ids, weights)
        return self.method(x, ids, weights)


@pytest.mark.parametrize("how", ["call", "keywords", "forward", "class", "stored"])
def test_ways_to_call(how: str) -> None:
    model = Calls(how)
    reference = Calls("call")
    reference.load_state_dict(model.state_dict())
    with regions() as found:
        check_same(compiled(model, fullgraph=True), reference, model, reference, *routed())
    matched(found, 1)
    assert found[0].module.split(".")[0] in ("child", "method")


def test_module_compile() -> None:
    model = Net(1)
    reference = original(model)
    model.compile(backend="moe_ep", fullgraph=True, options={"inner": "eager"})
    with regions() as found:
        check_same(model, reference, model, reference, torch.randn(2, 6, D))
    matched(found, 1)


def test_module_compile_of_the_experts_themselves() -> None:
    model = Experts()
    reference = original(model)
    model.compile(backend="moe_ep", fullgraph=True, options={"inner": "eager"})
    with regions() as found:
        check_same(model, reference, model, reference, *routed())
    matched(found, 1)


@pytest.mark.parametrize("what", [Experts, Separate])
def test_top_frame(what: type[nn.Module]) -> None:
    """`torch.compile(experts)`: nothing calls the function that holds the loop."""
    model = what()
    reference = original(model)
    with regions() as found:
        check_same(compiled(model, fullgraph=True), reference, model, reference, *routed())
    matched(found, 1)


def test_function_around_a_block() -> None:
    model = Block()
    reference = original(model)
    run = compiled(lambda x: model(x) * 2, fullgraph=True)
    with regions() as found:
        check_same(run, lambda x: reference(x) * 2, model, reference, torch.randn(3, 4, D))
    matched(found, 1)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_whole_model(inner: str) -> None:
    model = Net(3)
    reference = original(model)
    with regions() as found:
        check_same(compiled(model, inner, fullgraph=True), reference, model, reference, torch.randn(2, 6, D))
    matched(found, 3)
    assert [r.module for r in found] == [f"layers.{i}.experts" for i in range(3)]
    assert graphs() == 1


def test_whole_model_by_inductor() -> None:
    """Slow: Inductor compiles C++."""
    model = Net(1)
    reference = original(model)
    run = compiled(model, "inductor", fullgraph=True)
    check_same(run, reference, model, reference, torch.randn(2, 6, D))
    check_same(run, reference, model, reference, torch.randn(3, 5, D))


def test_name_and_place_in_the_report() -> None:
    with regions() as found:
        compiled(Net(1))(torch.randn(2, 3, D))
    line = Experts.forward.__code__.co_firstlineno
    assert (found[0].module, found[0].location) == ("layers.0.experts", f"tiny.py:{line}")
    assert (found[0].form, found[0].num_experts, found[0].top_k) == ("loop", E, K)


# -- this backend only ----------------------------------------------------------------------


def test_other_backends_do_not_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    rewritten = dynamo_hook._rewritten
    monkeypatch.setattr(dynamo_hook, "_rewritten", lambda *args: looked.append(args) or rewritten(*args))
    x = torch.randn(2, 6, D)
    model = Net(1)
    want = original(model)(x)
    for backend in ("eager", "aot_eager"):
        assert close(torch.compile(model, backend=backend)(x), want)
    assert not looked
    torch._dynamo.reset()
    assert close(compiled(model)(x), want)
    assert looked
    looked.clear()
    torch._dynamo.reset()
    for backend in ("eager", "aot_eager"):
        assert close(torch.compile(model, backend=backend)(x), want)
    assert not looked


def test_top_frames_of_other_backends_are_not_framed() -> None:
    assert "framed" not in torch.compile(Experts(), backend="eager").forward.__code__.co_names
    assert torch.compile(Experts(), backend="eager").forward.__wrapped__.__name__ != "framed"
    assert compiled(Experts()).forward.__wrapped__.__name__ == "framed"
    assert compiled(Block()).forward.__wrapped__.__name__ != "framed", (
        "only where the module's own forward holds the loop"
    )


def test_like_modules_share_what_is_compiled() -> None:
    """Each layer compiled on its own, more of them than Dynamo's limit of recompilations."""
    for make in (Block, Experts, Separate):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        models = [make() for _ in range(10)]
        inputs = routed() if make is not Block else (torch.randn(2, 6, D),)
        for model in models:
            model.compile(backend="moe_ep", fullgraph=True, options={"inner": "eager"})
            assert close(model(*inputs), model.forward(*inputs))
        assert graphs() == 1


def test_importing_changes_no_setting() -> None:
    run_python(
        "import torch, torch._dynamo\n"
        "read = lambda: {k: torch._dynamo.config._config[k].user_override for k in torch._dynamo.config._config}\n"
        "before = read()\n"
        "import moe_compile\n"
        "assert read() == before"
    )


def run_python(program: str, **environment: str) -> Any:
    import os
    import subprocess
    import sys

    result = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result


def test_entry_point_without_an_import() -> None:
    result = run_python(
        "import sys, torch\n"
        "from torch import nn\n"
        "class Experts(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = nn.Parameter(torch.randn(4, 8, 8))\n"
        "    def forward(self, x, ids, p):\n"
        "        out = torch.zeros_like(x)\n"
        "        for e in range(4):\n"
        "            t, k = torch.where(ids == e)\n"
        "            out.index_add_(0, t, (x[t] @ self.w[e]) * p[t, k, None])\n"
        "        return out\n"
        "m = Experts()\n"
        "assert 'moe_compile' not in sys.modules\n"
        "assert 'moe_ep' in torch._dynamo.list_backends()\n"
        "c = torch.compile(m, backend='moe_ep', fullgraph=True, options={'inner': 'eager', 'strict': True})\n"
        "args = torch.randn(6, 8), torch.rand(6, 4).argsort(-1)[:, :2], torch.rand(6, 2)\n"
        "torch.testing.assert_close(c(*args), m(*args))\n"
        "print('fine')\n"
    )
    assert "fine" in result.stdout


# -- graph breaks, checkpointing, modes -----------------------------------------------------


class Breaks(Net):
    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + layer(x)
            if i == 0:
                torch._dynamo.graph_break()
        return self.head(x)


class BreakingBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


def test_regions_after_a_graph_break() -> None:
    model = Breaks(3)
    reference = original(model)
    with regions() as found:
        check_same(compiled(model), reference, model, reference, torch.randn(2, 6, D))
    assert all(r.matched for r in found)
    assert "layers.0.experts" in {r.module for r in found}
    assert "experts" in {r.module for r in found}, "the layers after the break are frames of their own"


def test_graph_break_inside_a_layer() -> None:
    model = Net(2, BreakingBlock)
    reference = original(model)
    with regions() as found:
        check_same(compiled(model), reference, model, reference, torch.randn(2, 6, D))
    matched(found, 1)  # one compiled function for both layers


def test_print_in_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    class Prints(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.layers[0](x)
            print("between")
            return x + self.layers[1](x)

    model = Prints(2)
    x = torch.randn(2, 6, D)
    with regions() as found:
        assert close(compiled(model)(x), original(model)(x))
    assert {(r.module, r.matched) for r in found} == {("layers.0.experts", True), ("layers.1.experts", True)}
    assert capsys.readouterr().out.count("between") == 2


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_function(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + checkpoint(layer, x, use_reentrant=use_reentrant)
            return self.head(x)

    model = Checkpointed(2)
    reference = original(model)
    with regions() as found:
        check_same(compiled(model, "aot_eager"), reference, model, reference, torch.randn(2, 6, D))
    assert found and all(r.matched for r in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", [Experts, Separate])
def test_autocast(what: type[nn.Module], dtype: torch.dtype) -> None:
    model = Block(what())
    reference = original(model)
    x = torch.randn(4, 6, D)

    def under(f: Any) -> Any:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=dtype):
                return f(x)

        return run

    with regions() as found:
        check_same(under(compiled(model, "aot_eager")), under(reference), model, reference, x, rtol=0.03)
        check_same(compiled(under(model), "aot_eager"), under(reference), model, reference, x, rtol=0.03)
        check_same(compiled(model, "aot_eager"), reference, model, reference, x)
    assert found and all(r.matched for r in found), found[0].reason


def test_no_grad_and_inference_mode() -> None:
    model = Net(1)
    reference = original(model)
    run = compiled(model, "aot_eager", fullgraph=True)
    x = torch.randn(2, 6, D)
    with torch.no_grad():
        out = run(x)
    assert not out.requires_grad and close(out, reference(x))
    with torch.inference_mode():
        out = run(x)
    assert out.is_inference() and close(out, reference(x))
    check_same(run, reference, model, reference, x)


# -- what changes after compilation ---------------------------------------------------------


@pytest.mark.parametrize("what", [Experts, Separate])
def test_changed_weights(what: type[nn.Module]) -> None:
    model = Block(what())
    run = compiled(model, "aot_eager", fullgraph=True)
    x = torch.randn(2, 6, D)

    def check(dtype: torch.dtype = torch.float32, rtol: float = 1e-5) -> None:
        reference = original(model)
        check_same(run, reference, model, reference, x.to(dtype), rtol=rtol)

    check()
    before = graphs()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    check()
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})
    check()
    assert graphs() == before
    model.to(torch.float64)
    check(torch.float64, 1e-12)
    model.bfloat16()
    check(torch.bfloat16, 0.03)
    model.float()
    check()


class Limited(Experts):
    """Reads all sorts of things in Python."""

    SCALE = 1.5

    def __init__(self) -> None:
        super().__init__()
        self.limit = 0.4
        self.config = types.SimpleNamespace(
            limit=0.7, inner=types.SimpleNamespace(alpha=1.1), pair=[0.5, 2.0], table={"a": 0.25}
        )

    def gate(self, x: Tensor) -> Tensor:
        x = self.act(x).clamp(max=self.limit) * self.SCALE + SHIFT * settings["shift"]
        x = x.clamp(max=self.config.limit * self.config.inner.alpha) + self.config.pair[0] + self.config.table["a"]
        return helper(x) * getattr(self, "extra", 1.0)


SHIFT = 0.25
settings = {"shift": 0.5}


def helper(x: Tensor) -> Tensor:
    return x * 1.25


def other_helper(x: Tensor) -> Tensor:
    return x * 0.75


def other_gate(self: Any, x: Tensor) -> Tensor:
    return x * 3


CHANGES: dict[str, Any] = {
    "child module": lambda m, mp: setattr(m, "act", nn.GELU()),
    "child's attribute": lambda m, mp: setattr(m, "act", nn.GELU("tanh")),
    "float": lambda m, mp: setattr(m, "limit", 0.1),
    "float to int": lambda m, mp: setattr(m, "limit", 1),
    "class attribute": lambda m, mp: mp.setattr(Limited, "SCALE", 2.5),
    "instance over class attribute": lambda m, mp: setattr(m, "SCALE", 3.5),
    "nested object": lambda m, mp: setattr(m.config, "limit", 0.05),
    "nested object, two deep": lambda m, mp: setattr(m.config.inner, "alpha", 0.05),
    "object replaced": lambda m, mp: setattr(m.config, "inner", types.SimpleNamespace(alpha=0.01)),
    "list in place": lambda m, mp: m.config.pair.__setitem__(0, -0.5),
    "list replaced": lambda m, mp: setattr(m.config, "pair", (-1.0, 0.0)),
    "dict in place": lambda m, mp: m.config.table.__setitem__("a", -0.5),
    "global": lambda m, mp: mp.setitem(globals(), "SHIFT", 1.5),
    "global dict": lambda m, mp: mp.setitem(settings, "shift", -2.0),
    "global function": lambda m, mp: mp.setitem(globals(), "helper", other_helper),
    "method of the class": lambda m, mp: mp.setattr(Limited, "gate", other_gate),
    "method of the instance": lambda m, mp: setattr(m, "gate", types.MethodType(other_gate, m)),
    "attribute that was absent": lambda m, mp: setattr(m, "extra", 2.0),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_python_values(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Limited()
    run = compiled(model, fullgraph=True)
    inputs = routed()
    with regions() as found:
        reference = original(model)
        check_same(run, reference, model, reference, *inputs)
    matched(found, 1)
    was = run(*inputs)
    CHANGES[what](model, monkeypatch)
    want = model.forward(*inputs)
    assert not close(was, want), "the change must matter"
    assert close(run(*inputs), want)


class Config:
    """Reads that go through Python of its own."""

    def __init__(self) -> None:
        self._limit = 0.5

    @property
    def limit(self) -> float:
        return self._limit

    def scaled(self, by: float) -> float:
        return self._hidden * by

    _hidden = 0.75


class Indirect(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config()

    def gate(self, x: Tensor) -> Tensor:
        from tests import knobs

        return (x * knobs.SLOPE).clamp(max=self.config.limit * self.config.scaled(2.0)) * knobs.inner["a"][1]


@pytest.mark.parametrize(
    "change",
    [
        lambda m, mp, k: setattr(m.config, "_limit", 0.1),
        lambda m, mp, k: setattr(m.config, "_hidden", 0.1),
        lambda m, mp, k: mp.setattr(Config, "_hidden", 0.2),
        lambda m, mp, k: setattr(k, "SLOPE", 0.2),
        lambda m, mp, k: setattr(k, "inner", {"a": (0, 5.0)}),
        lambda m, mp, k: k.inner["a"].__setitem__(1, 3.0),
    ],
    ids=["property", "method", "class", "module", "dict", "list in a dict"],
)
def test_changed_values_behind_python(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import tests

    knobs = types.ModuleType("tests.knobs")
    knobs.SLOPE, knobs.inner = 1.5, {"a": [0, 2.0]}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tests.knobs", knobs)
    monkeypatch.setattr(tests, "knobs", knobs, raising=False)
    model, inputs = Indirect(), routed()
    run = compiled(model)
    with regions() as found:
        was = run(*inputs)
    assert close(was, model.forward(*inputs))
    change(model, monkeypatch, knobs)
    assert not close(was, model.forward(*inputs)), "the change must matter"
    assert close(run(*inputs), model.forward(*inputs)), found[0].reason or "rewritten"


def test_the_same_value_changed_many_times() -> None:
    """Dynamo would make an int or float that changes into an input; the rewrite needs each value."""
    model = Limited()
    run = compiled(model, fullgraph=True)
    inputs = routed()
    for limit in (0.1, 0.2, 0.3, 0.4, 0.1, 1):
        model.limit = limit
        model.config.limit = 2 * limit
        assert close(run(*inputs), model.forward(*inputs))


def test_a_global_changed_many_times(monkeypatch: pytest.MonkeyPatch) -> None:
    run = compiled(model := Limited(), fullgraph=True)
    inputs = routed()
    for shift in (1, 2, 3, 1.5, 2.5):
        monkeypatch.setitem(globals(), "SHIFT", shift)
        assert close(run(*inputs), model.forward(*inputs))


def with_limit(limit: float) -> type[Experts]:
    """Two of these have equal code; only a closure tells them apart."""

    class Closed(Experts):
        def gate(self, x: Tensor) -> Tensor:
            return x.clamp(max=limit)

    return Closed


def test_closures_with_equal_code() -> None:
    one, two = with_limit(0.1)(), with_limit(0.6)()
    inputs = routed()
    for model in (one, two, one):
        assert close(compiled(model, fullgraph=True)(*inputs), model(*inputs))


def test_a_closure_that_changes() -> None:
    limit = 0.1

    class Closed(Experts):
        def gate(self, x: Tensor) -> Tensor:
            return x.clamp(max=limit)

    model, inputs = Closed(), routed()
    run = compiled(model, fullgraph=True)
    for value in (0.1, 0.5, 0.9):
        limit = value
        assert close(run(*inputs), model(*inputs))


def forward_with_a_default(limit: float) -> Any:
    def forward(self: Any, x: Tensor, ids: Tensor, weights: Tensor, limit: float = limit) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, (x[t] @ self.w2[e, :, :D]).clamp(max=limit) * weights[t, k, None])
        return out

    return forward


def test_defaults_with_equal_code() -> None:
    inputs = routed()
    for limit in (0.1, 0.5):
        model = type("Defaults", (Experts,), {"forward": forward_with_a_default(limit)})()
        assert close(compiled(model, fullgraph=True)(*inputs), model(*inputs))


def test_constant_arguments() -> None:
    model, inputs = type("Defaults", (Experts,), {"forward": forward_with_a_default(0.1)})(), routed()

    def call(limit: float) -> Any:
        return lambda x, ids, weights: model(x, ids, weights, limit=limit)

    for limit in (0.2, 0.7):
        with regions() as found:
            assert close(compiled(call(limit))(*inputs), call(limit)(*inputs))
        matched(found, 1)


class Unguardable(Experts):
    def __init__(self, thing: Any) -> None:
        super().__init__()
        self.thing = thing

    def gate(self, x: Tensor) -> Tensor:
        return x * float(self.thing[0])


def test_what_cannot_be_guarded_is_refused() -> None:
    import numpy

    for thing in (numpy.array([1.5]), torch.tensor([1.5])):
        torch._dynamo.reset()
        model, inputs = Unguardable(thing), routed()
        with regions() as found:
            assert close(compiled(model)(*inputs), model(*inputs))
        assert not found[0].matched
        assert "thing" in (found[0].reason or "")


class Scale(nn.Module):
    """Reads a value of an object that is no module."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        return x * float(self.settings.scale)


class Behind(nn.Module):
    """Has a sibling by way of their parent, which is no child of it."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.up = [parent]

    def forward(self, x: Tensor) -> Tensor:
        return self.up[0].helper(x)


class ByName(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.helper = Scale(types.SimpleNamespace(scale=2.0))
        self.one = (self.helper,)

    def gate(self, x: Tensor) -> Tensor:
        return self.helper(x)


class ByChildren(ByName):
    def gate(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class ByOtherReference(ByName):
    def gate(self, x: Tensor) -> Tensor:
        return self.one[0](x)


class ByPattern(ByName):
    def gate(self, x: Tensor) -> Tensor:
        match self:
            case Experts(helper=found):
                return found(x)
        return x


class ByContainer(ByName):
    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(nn.Identity(), Scale(self.helper.settings))

    def gate(self, x: Tensor) -> Tensor:
        return self.chain(x)


class Listing(nn.ModuleList):
    """A container of the user's own."""


class ByOwnContainer(ByName):
    def __init__(self) -> None:
        super().__init__()
        self.chain = Listing([Scale(self.helper.settings)])

    def gate(self, x: Tensor) -> Tensor:
        return self.chain[0](x)


class BySibling(ByName):
    def __init__(self) -> None:
        super().__init__()
        self.behind = Behind(self)

    def gate(self, x: Tensor) -> Tensor:
        return self.behind(x)


@pytest.mark.parametrize(
    "cls", [ByName, ByChildren, ByOtherReference, ByPattern, ByContainer, ByOwnContainer, BySibling]
)
def test_what_a_child_reads_however_it_is_reached(cls: type) -> None:
    model, inputs = cls(), routed()
    run = compiled(model)
    for scale in (2.0, 3.0, 0.5):
        model.helper.settings.scale = scale
        assert close(run(*inputs), model.forward(*inputs))


def test_children_that_are_not_reached_may_read_anything() -> None:
    """A router beside the experts reads its config, an object that could not be guarded."""
    import numpy

    class Apart(Experts):
        def __init__(self) -> None:
            super().__init__()
            self.helper = Scale(types.SimpleNamespace(scale=numpy.array(1.5)))

    for cls, matches in ((Apart, True), (type("Used", (Apart,), {"gate": ByName.gate}), False)):
        model, inputs = cls(), routed()
        with regions() as found:
            assert close(compiled(model)(*inputs), model(*inputs))
        assert [r.matched for r in found] == [matches], found[0].reason


def test_randomness_and_clocks_are_refused() -> None:
    class Random(Experts):
        def gate(self, x: Tensor) -> Tensor:
            import random

            return x * (1 + 0 * random.random())

    with regions() as found:
        compiled(Random())(*routed())
    assert "random" in (found[0].reason or "") and not found[0].matched


def test_train_and_eval_with_dropout() -> None:
    expert = lambda: nn.Sequential(nn.Linear(D, FF), nn.Dropout(0.5), nn.Linear(FF, D))  # noqa: E731
    model, inputs = Separate(expert), routed()
    run = compiled(model)
    for mode in (False, True, False):
        model.train(mode)
        torch.manual_seed(3)
        with regions() as found:
            out = run(*inputs)
        if not mode:
            assert close(out, model(*inputs))
        else:
            assert not close(out, model.eval()(*inputs)), "dropout was lost"
            assert all(r.matched or r.reason for r in found)


def test_tied_weights_untied_later() -> None:
    model, inputs = Separate(lambda: nn.Linear(D, D, bias=False)), routed()
    model.experts[1].weight = model.experts[0].weight
    run = compiled(model, fullgraph=True)
    assert close(run(*inputs), model(*inputs))
    model.experts[1].weight = nn.Parameter(torch.randn(D, D))
    assert close(run(*inputs), model(*inputs))


def test_tied_weights_have_one_gradient() -> None:
    model = Separate(lambda: nn.Linear(D, D, bias=False))
    model.experts[1].weight = model.experts[0].weight
    reference = original(model)
    assert reference.experts[1].weight is reference.experts[0].weight
    check_same(compiled(model, fullgraph=True), reference, model, reference, *routed())


def test_one_expert_swapped_for_another_kind() -> None:
    model, inputs = Separate(), routed()
    run = compiled(model)
    assert close(run(*inputs), model(*inputs))
    model.experts[2] = nn.Sequential(nn.Linear(D, FF), nn.GELU(), nn.Linear(FF, D))
    assert close(run(*inputs), model(*inputs))
    model.experts[2] = nn.Linear(D, D)
    assert close(run(*inputs), model(*inputs))


def test_a_bias_added_and_removed() -> None:
    model, inputs = Separate(lambda: nn.Linear(D, D, bias=False)), routed()
    run = compiled(model)
    assert close(run(*inputs), model(*inputs))
    for expert in model.experts:
        expert.bias = nn.Parameter(torch.randn(D))
    assert close(run(*inputs), model(*inputs))
    for expert in model.experts:
        expert.bias = None
    assert close(run(*inputs), model(*inputs))


def test_an_expert_appended() -> None:
    model, (x, ids, weights) = Separate(), routed()
    run = compiled(model)
    assert close(run(x, ids, weights), model(x, ids, weights))
    model.experts.append(nn.Sequential(nn.Linear(D, FF), nn.SiLU(), nn.Linear(FF, D)))
    ids = ids.clone()
    ids[::2, 0] = E
    assert close(run(x, ids, weights), model(x, ids, weights))


def test_frozen_weights() -> None:
    model, inputs = Block(), torch.randn(2, 6, D)
    run = compiled(model, "aot_eager", fullgraph=True)
    for frozen in (False, True, False):
        model.experts.requires_grad_(not frozen)
        reference = original(model)
        check_same(run, reference, model, reference, inputs)


# -- recompilation and captures -------------------------------------------------------------


def test_sizes_recompile_once() -> None:
    model = Net(2)
    run = compiled(model, "aot_eager", fullgraph=True)
    for batch, length in ((2, 6), (3, 7)):
        run(torch.randn(batch, length, D))
    assert graphs() <= 2
    before = graphs()
    for batch, length in ((4, 9), (5, 3), (7, 11), (2, 6)):
        x = torch.randn(batch, length, D)
        assert close(run(x), original(model)(x))
    assert graphs() == before


def test_dynamic_from_the_start() -> None:
    model = Net(1)
    run = compiled(model, "aot_eager", fullgraph=True, dynamic=True)
    for batch, length in ((2, 6), (3, 7), (5, 2)):
        x = torch.randn(batch, length, D)
        assert close(run(x), original(model)(x))
    assert graphs() == 1


def proofs() -> int:
    return sum(map(len, kinds._known.values()))


def test_like_layers_share_a_proof() -> None:
    model = Net(6)
    with regions() as found:
        compiled(model, fullgraph=True)(torch.randn(2, 6, D, requires_grad=True))
    matched(found, 6)
    assert proofs() == 1
    compiled(Net(3), fullgraph=True)(torch.randn(2, 6, D, requires_grad=True))
    assert proofs() == 1
    compiled(Net(1, lambda: Block(Experts(act=nn.GELU()))), fullgraph=True)(torch.randn(2, 6, D, requires_grad=True))
    assert proofs() == 2


def test_proofs_outlive_a_reset() -> None:
    model, x = Net(2), torch.randn(2, 6, D, requires_grad=True)
    compiled(model)(x)
    torch._dynamo.reset()
    compiled(model)(x)
    assert proofs() == 1
    kinds.forget()
    assert proofs() == 0


def test_two_models_of_one_class() -> None:
    small, large = Experts(4), Experts(6, width=12)
    inputs = routed(), routed(num_experts=6, width=12)
    for model, args in zip((small, large, small), (*inputs, inputs[0]), strict=True):
        reference = original(model)
        check_same(compiled(model, fullgraph=True), reference, model, reference, *args)


# -- sizes and ids at the edge --------------------------------------------------------------


@pytest.mark.parametrize("what", [Experts, Separate])
@pytest.mark.parametrize("tokens", [0, 1, 2, 33])
def test_numbers_of_tokens(what: type[nn.Module], tokens: int) -> None:
    model = what()
    reference = original(model)
    check_same(compiled(model, "aot_eager", fullgraph=True), reference, model, reference, *routed(tokens))


def test_numbers_of_tokens_one_after_another() -> None:
    model = Experts()
    reference = original(model)
    run = compiled(model, "aot_eager", fullgraph=True)
    for tokens in (5, 1, 0, 7, 2, 1, 0):
        check_same(run, reference, model, reference, *routed(tokens))


@pytest.mark.parametrize("what", [Experts, Separate])
def test_an_expert_that_nobody_chose(what: type[nn.Module]) -> None:
    model = what()
    reference = original(model)
    x, ids, weights = routed()
    for ids_TK in (ids % 2, torch.full_like(ids, 3)):
        check_same(compiled(model, "aot_eager", fullgraph=True), reference, model, reference, x, ids_TK, weights)


@pytest.mark.parametrize("bad", [-1, E, 1000])
def test_ids_out_of_range(bad: int) -> None:
    model, (x, ids, weights) = Experts(), routed()
    ids[3, 1] = bad
    with pytest.raises(RuntimeError) as want:
        model(x, ids, weights)
    with pytest.raises(RuntimeError) as got:
        compiled(model, fullgraph=True)(x, ids, weights)
    assert type(got.value) is type(want.value)


def test_ids_out_of_range_add_nothing_in_a_loop_over_all() -> None:
    model, (x, ids, weights) = Separate(), routed()
    ids[3, 1], ids[5, 0] = E, -1
    assert close(compiled(model, fullgraph=True)(x, ids, weights), model(x, ids, weights))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_other_dtypes_of_ids(dtype: torch.dtype) -> None:
    model, (x, ids, weights) = Separate(), routed()
    assert close(compiled(model, fullgraph=True)(x, ids.to(dtype), weights), model(x, ids.to(dtype), weights))


class Matrices(nn.Module):
    """Experts of one matrix each, in any dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(E, D, D).mul(3).to(dtype), requires_grad=False)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, _ = torch.where(ids == e)
            out.index_add_(0, t, x[t] @ self.w[e])
        return out


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.int32, torch.float64, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, (x, ids, _) = Matrices(dtype), routed()
    x = (3 * x).to(dtype)
    out, want = compiled(model)(x, ids), model(x, ids)
    assert out.dtype == want.dtype
    torch.testing.assert_close(
        out, want, rtol=2e-2 if dtype is torch.float16 else 1e-5, atol=2e-2 if dtype is torch.float16 else 1e-5
    )


# -- hooks, copies, other things left alone -------------------------------------------------


def test_experts_with_hooks_are_left_alone() -> None:
    model, fired = Separate(), []
    model.experts[1].register_forward_hook(lambda m, a, out: fired.append(1) or out * 2)
    inputs = routed()
    want = model(*inputs)
    fired.clear()
    with regions() as found:
        assert close(compiled(model)(*inputs), want)
    assert fired
    assert "has hooks" in (found[0].reason or "")


def test_hooks_around_the_region_still_fire() -> None:
    model = Net(1)
    seen: list[Tensor] = []
    model.layers[0].router.register_forward_hook(lambda m, a, out: seen.append(out) or None)
    model.layers[0].experts.register_forward_hook(lambda m, a, out: out * 2)
    reference = original(model)
    x = torch.randn(2, 6, D)
    with regions() as found:
        out = compiled(model)(x)
    matched(found, 1)
    assert len(seen) == 1 and close(out, reference(x))


def test_hooks_are_seen_wherever_dynamo_sees_them() -> None:
    """Dynamo does not guard hooks unless asked (`skip_nnmodule_hook_guards`); asked, a new hook counts here too."""
    model, inputs = Separate(), routed()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        run = compiled(model)
        assert close(run(*inputs), model(*inputs))
        model.experts[1].register_forward_hook(lambda m, a, out: out * 2)
        assert close(run(*inputs), model(*inputs))


def test_hooks_for_all_modules() -> None:
    model, inputs = Separate(), routed()
    want = model(*inputs)
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, a, out: out * 2 if isinstance(m, nn.SiLU) else None
    )
    try:
        with regions() as found:
            out = compiled(model)(*inputs)
        assert close(out, model(*inputs)) and not close(out, want)
    finally:
        handle.remove()
    assert not any(r.matched for r in found)


def test_copies_of_a_compiled_model() -> None:
    model, x = Net(1), torch.randn(2, 6, D)
    run = compiled(model)
    want = run(x)
    again = copy.deepcopy(run)
    assert close(again(x), want)
    loaded = pickle.loads(pickle.dumps(model))
    assert close(compiled(loaded)(x), want)
    model.compile(backend="moe_ep", options={"inner": "eager"})
    assert close(pickle.loads(pickle.dumps(model))(x), want)
    assert close(copy.deepcopy(model)(x), want)


def test_state_dict_is_untouched() -> None:
    model, x = Net(1), torch.randn(2, 6, D)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compiled(model)(x)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert all(isinstance(p, nn.Parameter) and type(p.data) is Tensor for p in model.parameters())


def test_parameters_on_meta() -> None:
    with torch.device("meta"):
        model = Net(1)
        x = torch.randn(2, 6, D)
    assert compiled(model)(x).device.type == "meta"


def test_default_device_and_dtype() -> None:
    model, inputs = Separate(), routed()
    torch.set_default_dtype(torch.float64)
    try:
        out = compiled(model)(*inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.dtype == torch.float32 and close(out, model(*inputs))


def test_arguments_that_are_no_tensors() -> None:
    class Takes(Separate):
        def forward(self, x: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                t, k = torch.where(pair[0] == e)
                out.index_add_(0, t, expert(x[t]) * pair[1][t, k, None])
            return out

    model, (x, ids, weights) = Takes(), routed()
    with regions() as found:
        assert close(compiled(model)(x, (ids, weights)), model(x, (ids, weights)))
    assert "argument" in (found[0].reason or "")


# -- versions -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0+cu130", "2.12.1", "2.13.0a0+git123"])
def test_supported_versions(version: str) -> None:
    dynamo_hook.check_version(version)


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0", "2.14.0", "3.0.0"])
def test_unsupported_versions(version: str) -> None:
    with pytest.raises(MoeCompileError, match=r"torch .* is not supported: moe_compile needs torch >= 2.11 and < 2.14"):
        dynamo_hook.check_version(version)


def test_dynamo_has_what_the_hook_uses() -> None:
    """The places in Dynamo that dynamo_hook.py touches, as they are in torch 2.11 to 2.13."""
    import inspect

    from torch._dynamo.eval_frame import OptimizedModule
    from torch._dynamo.variables.functions import UserFunctionVariable

    assert list(inspect.signature(UserFunctionVariable.call_function).parameters) == ["self", "tx", "args", "kwargs"]
    assert "wrap_top_frame" in torch._dynamo.config._config
    assert callable(OptimizedModule._initialize)
    seen = []

    def backend(gm: Any, inputs: Any, **options: Any) -> Any:
        seen.append(options)
        return gm

    torch.compile(lambda x: x + 1, backend=backend, options={"a": 1})(torch.ones(2))
    assert seen == [{"options": {"a": 1}}]
    assert moe_compile.backend.options_of(torch._dynamo.optimize("eager").callback) is None  # type: ignore[attr-defined]
    assert tiny.T


@pytest.mark.parametrize(("dim", "distinct"), [(-1, True), (1, True), (0, False)])
def test_only_a_topk_along_the_rows_gives_distinct_ids(dim: int, distinct: bool) -> None:
    graph = torch.fx.Graph()
    scores = graph.placeholder("scores")
    ids = graph.call_function(operator.getitem, (graph.call_function(torch.topk, (scores, 2), {"dim": dim}), 1))
    ids.meta["example_value"] = torch.zeros(3, 2, dtype=torch.int64)
    assert arguments.from_topk(ids) is distinct


class LastOfTwo(Experts):
    """Keeps one of two equal tokens, and so needs ids that are distinct."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            gate, up = F.linear(x[t], self.w13[e]).chunk(2, -1)
            out[t] = out[t] + F.linear(F.silu(gate) * up, self.w2[e]) * weights[t, k, None]
        return out


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda ids: ids.clamp_(max=1),
    "through a view": lambda ids: ids.view(-1).clamp_(max=1),
    "by assignment": lambda ids: ids.__setitem__(slice(None), 0),
    "by out": lambda ids: torch.clamp(ids, max=1, out=ids),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("how", IN_PLACE)
def test_ids_of_a_topk_that_were_changed_are_not_distinct(how: str, mode: Any) -> None:
    class Changed(Block):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = torch.topk(self.router(x).softmax(-1), self.top_k)
            IN_PLACE[how](ids)
            return self.experts(x, ids, weights)

    model = Changed(LastOfTwo())
    reference, x = original(model), torch.randn(T, D)
    with mode(), regions() as found:
        assert torch.equal(compiled(model)(x), reference(x))
    assert [r.matched for r in found] == [False]
    assert found[0].reason is not None and "not shown to be distinct" in found[0].reason


def test_ids_of_a_topk_are_distinct() -> None:
    model = Block(LastOfTwo())
    reference = original(model)
    with regions() as found:
        check_same(compiled(model), reference, model, reference, torch.randn(T, D))
    matched(found, 1)
