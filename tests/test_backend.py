"""The backend: options, strict, what it says, and what is no mixture of experts."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_compile import MoeCompileError, dynamo_hook
from moe_compile.backend import moe_ep, options_of
from moe_compile.options import Options
from moe_compile.pipeline import PASS_NAMES
from tests.tiny import Block, D, Experts, Net, Separate, close, compiled, original, regions, routed

pytestmark = pytest.mark.usefixtures("fresh")

BAD = {
    "unknown option 'inne'; moe_ep knows inner, strict, strategy, skip, numerics": {"inne": "eager"},
    "option inner: 'tvm' is not one of 'inductor', 'aot_eager', 'eager'": {"inner": "tvm"},
    "option strategy: 'best' is not one of 'auto', 'grouped', 'alltoall', 'dedup', 'allgather', 'gather_weights'": {
        "strategy": "best"
    },
    "option numerics: 'bitwise' is not one of 'exact', 'fast'": {"numerics": "bitwise"},
    "option strict is 1; it is True or False": {"strict": 1},
    "option chunks is 0; it is a number, 1 or more": {"chunks": 0},
    "option chunks is True; it is a number, 1 or more": {"chunks": True},
    "option chunks is '2'; it is a number, 1 or more": {"chunks": "2"},
    "option skip is 'dispatch_experts'; it is a list of pass names": {"skip": "dispatch_experts"},
    f"option skip: 'dispatch' is not one of {', '.join(map(repr, PASS_NAMES))}": {"skip": ["dispatch"]},
}


@pytest.mark.parametrize("text", BAD)
def test_bad_options(text: str) -> None:
    with pytest.raises(MoeCompileError) as error:
        Options.parse(BAD[text], PASS_NAMES)
    assert str(error.value).startswith(text)


@pytest.mark.parametrize("bad", [{"inne": 1}, {"inner": "tvm"}, {"skip": ["x"]}])
@pytest.mark.parametrize("what", [Experts, Separate, lambda: nn.Linear(D, D)])
def test_bad_options_are_heard_by_the_user(bad: dict[str, Any], what: Any) -> None:
    model = what()
    inputs = routed() if not isinstance(model, nn.Linear) else (torch.randn(2, D),)
    with pytest.raises(Exception, match=r"moe_ep knows|is not one of") as error:
        torch.compile(model, backend="moe_ep", options=bad)(*inputs)
    assert isinstance(error.value, MoeCompileError) or "MoeCompileError" in str(error.value)


@pytest.mark.parametrize("strategy", ["alltoall", "dedup", "allgather", "gather_weights"])
def test_strategies_for_many_processes_on_one(strategy: str) -> None:
    with pytest.raises(Exception, match=f"strategy '{strategy}' moves tokens or weights between processes"):
        compiled(Experts(), strategy=strategy, fullgraph=True)(*routed())
    text = "'grouped' is not one for experts that are sharded over a mesh: use 'auto', 'alltoall', 'dedup'"
    with pytest.raises(MoeCompileError, match=text):
        Options.parse({"strategy": "grouped"}, PASS_NAMES).check_strategy(sharded=True)


def test_chunks_are_of_tokens_that_travel() -> None:
    with pytest.raises(MoeCompileError, match=r"option chunks is 2: .* experts are not sharded over a mesh"):
        Options.parse({"chunks": 2}, PASS_NAMES).check_strategy(sharded=False)
    with pytest.raises(MoeCompileError, match=r"option chunks is 2: .* its weights travel"):
        Options.parse({"chunks": 2, "strategy": "gather_weights"}, PASS_NAMES).check_strategy(sharded=True)
    Options.parse({"chunks": 2}, PASS_NAMES).check_strategy(sharded=True)


def test_sums_by_rank_need_numerics_that_allow_them() -> None:
    with pytest.raises(MoeCompileError, match=r"strategy 'dedup' adds .* needs numerics 'fast'"):
        Options.parse({"strategy": "dedup"}, PASS_NAMES).check_strategy(sharded=True)
    Options.parse({"strategy": "dedup", "numerics": "fast"}, PASS_NAMES).check_strategy(sharded=True)


def test_options_that_are_not_a_dict_of_options() -> None:
    assert Options.parse(None, PASS_NAMES) == Options()
    assert Options.parse({}, PASS_NAMES).inner == "inductor"
    for skip in (["fold_routing_weights"], {"fold_routing_weights"}, ("fold_routing_weights",)):
        assert Options.parse({"skip": skip}, PASS_NAMES).skip == {"fold_routing_weights"}


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_each_inner_compiler(inner: str) -> None:
    model = Block()
    x = torch.randn(2, 6, D)
    with regions() as found:
        assert close(compiled(model, inner, fullgraph=True)(x), model(x))
    assert [r.matched for r in found] == [True]


def test_mode_goes_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    seen = []
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, **kwargs: seen.append(kwargs) or gm)
    model = nn.Linear(D, D)
    torch.compile(model, backend="moe_ep", mode="max-autotune")(torch.randn(2, D))
    torch.compile(model, backend="moe_ep", mode="default")(torch.randn(2, D, D))
    assert seen[0]["config_patches"]["max_autotune"] is True
    assert "max_autotune" not in (seen[1]["config_patches"] or {})


def test_the_backend_as_a_function() -> None:
    model, x = Block(), torch.randn(2, 6, D)
    for backend in (moe_ep, "moe_ep"):
        torch._dynamo.reset()
        with regions() as found:
            assert close(torch.compile(model, backend=backend, fullgraph=True, options={"inner": "eager"})(x), model(x))
        assert [r.matched for r in found] == [True]


def test_options_of_other_compilers() -> None:
    assert options_of(lambda gm, inputs: gm) is None
    assert options_of(None) is None
    assert options_of(moe_ep) == Options()


@pytest.mark.parametrize("skip", [(), *([name] for name in PASS_NAMES), PASS_NAMES])
def test_skip(skip: Any) -> None:
    model, x = Net(1), torch.randn(2, 6, D)
    reference = original(model)
    with regions() as found:
        assert close(compiled(model, skip=list(skip))(x), reference(x))
    rewritten = [r.matched for r in found]
    if "detect_experts" in skip:
        assert rewritten == []
    else:
        assert all(rewritten) is ("dispatch_experts" not in skip)
        if not all(rewritten):
            assert found[0].reason == "the pass dispatch_experts is left out"


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("strategy", ["auto", "grouped"])
def test_other_options(numerics: str, strategy: str) -> None:
    model, x = Block(), torch.randn(2, 6, D)
    assert close(compiled(model, numerics=numerics, strategy=strategy)(x), model(x))


# -- strict ---------------------------------------------------------------------------------


class Bad(Experts):
    """Its experts see each other's rows."""

    def gate(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


def test_strict_passes_a_rewritten_model() -> None:
    model, x = Net(2), torch.randn(2, 6, D)
    assert close(compiled(model, strict=True, fullgraph=True)(x), model(x))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_strict_with_a_refused_region(fullgraph: bool) -> None:
    with pytest.raises(Exception, match=r"strict: layers\.0\.experts \(tiny\.py:\d+\) is not rewritten: ") as error:
        compiled(Net(1, lambda: Block(Bad())), strict=True, fullgraph=fullgraph)(torch.randn(2, 6, D))
    assert isinstance(error.value, RuntimeError)


def test_strict_without_experts() -> None:
    with pytest.raises(Exception, match="strict: no expert region was found in this graph"):
        compiled(nn.Linear(D, D), strict=True)(torch.randn(2, D))


def test_a_refused_region_runs_as_it_is() -> None:
    model, x = Net(1, lambda: Block(Bad())), torch.randn(2, 6, D)
    with regions() as found:
        assert close(compiled(model)(x), model(x))
    assert found and not any(r.matched for r in found)
    assert all(r.reason for r in found)


# -- what it says ---------------------------------------------------------------------------


def test_a_model_without_experts(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(nn.Linear(D, D), nn.ReLU()), torch.randn(3, D)
    with caplog.at_level(logging.INFO, logger="moe_compile"):
        assert close(compiled(model, "aot_eager")(x), model(x))
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("moe_compile")]
    assert lines == ["no expert region found in this graph; it is compiled by aot_eager as it is"]


def test_one_line_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="moe_compile"):
        compiled(Net(2))(torch.randn(2, 6, D, requires_grad=True))
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("moe_compile")]
    assert lines[-1] == "2 of 2 expert regions rewritten"
    assert [line.split(",")[0] for line in lines[:-1]] == ["Experts.forward: proven"]


PROGRAM = """
import torch
from tests.tiny import Net, D, compiled
compiled(Net(2))(torch.randn(2, 6, D))
"""


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result


def test_torch_logs() -> None:
    text = run(TORCH_LOGS="+moe_compile").stderr
    assert "2 of 2 expert regions rewritten" in text
    assert "DispatchExperts: 1 applied" in text
    assert "layers.0.experts tiny.py" in text


def test_torch_trace(tmp_path: Path) -> None:
    run(TORCH_TRACE=str(tmp_path))
    text = "\n".join(p.read_text() for p in tmp_path.glob("*.log"))
    assert "moe_compile_region" in text
    assert "DispatchExperts: 1 applied" in text


def test_silent_by_default() -> None:
    result = run()
    assert "moe_compile" not in result.stderr + result.stdout


# -- from several threads -------------------------------------------------------------------


def test_threads() -> None:
    """Dynamo translates under one lock; compiled models run in any thread."""
    from concurrent.futures import ThreadPoolExecutor

    models = [Block() for _ in range(4)]
    runs = [compiled(m) for m in models]
    xs = [torch.randn(2, 3 + i, D) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda pair: pair[0](pair[1]), zip(runs, xs, strict=True)))
    assert all(close(out, m(x)) for out, m, x in zip(outs, models, xs, strict=True))


def test_the_hook_is_installed_once() -> None:
    from torch._dynamo.variables.functions import UserFunctionVariable

    before = UserFunctionVariable.call_function
    dynamo_hook.install(lambda compiler: None)
    assert UserFunctionVariable.call_function is before
