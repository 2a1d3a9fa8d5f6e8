"""What moe_ep and Inductor make for a GPU, run without one: choices, strides, alignments and numbers.

Each test runs one group of cases in a process of its own, where tests/imitated_cuda.py stands in for the device:

    python -m tests.test_imitated_cuda forms
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton has no build for this platform")
ROOT = Path(__file__).resolve().parent.parent

INFERENCE = "combine gated_gemm grouped_gemm route_rows"
TRAINING = "expert_mlp expert_mlp_backward"
FORMS = {  # the ops of an inference, and of a training step
    "stacked": (INFERENCE, TRAINING),
    "separate": ("expert_mlp_result", TRAINING),
    "separate, unlike": (INFERENCE, TRAINING),
    "separate, unfused": (
        "combine dispatch grouped_gemm",
        "combine combine_backward dispatch grouped_gemm grouped_gemm_dw",
    ),
    "bf16": (INFERENCE, TRAINING),
    "f16": (INFERENCE, TRAINING),
    "bf16, by torch": ("_grouped_mm combine gated_gemm route_rows", TRAINING),
    "bf16, by torch, any number": ("_grouped_mm combine gated_gemm route_rows", TRAINING),
    "bf16, timed, ours faster": (INFERENCE, TRAINING),
    "bf16, timed, torch's faster": ("combine gated_gemm route_rows torch_grouped_mm", TRAINING),
    "autocast": (INFERENCE, TRAINING),
    "any number of tokens": (INFERENCE, TRAINING),
    "one token": (INFERENCE, TRAINING),
    "no tokens": ("", TRAINING),
    "ids of nobody": (INFERENCE, "raises"),
    "float8": ("combine dispatch grouped_gemm_scaled", ""),
}
FAMILIES = ("gpt_oss", "nemotron_h", "muse_spark", "deepseek_v4", "openai_privacy_filter")  # those of different ops


def lines(group: str) -> list[str]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.test_imitated_cuda", group]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    return [line for line in result.stdout.splitlines() if ": " in line]


def test_forms() -> None:
    assert lines("forms") == [f"{name}: {one} | {two}" for name, (one, two) in FORMS.items()]


def test_families(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("transformers")
    found = lines("all families" if request.config.getoption("--all-families") else "families")
    assert len(found) >= len(FAMILIES) and all("gemm" in line or "expert_mlp" in line for line in found), found


# -- in the other process -----------------------------------------------------------------------


def sources_written() -> list[str]:
    from tests.imitated_cuda import sources

    return sources


def ops_written() -> str:
    """The ops of experts that Inductor calls in what it wrote since the last time."""
    names = set(re.findall(r"ops\.moe_ep\w*\.(\w+)|aten\.(_grouped_mm)", "\n".join(sources_written())))
    sources_written().clear()
    return " ".join(sorted(a or b for a, b in names))


def check(model: nn.Module, *inputs: Tensor, rtol: float = 1e-5, train: bool = True, **settings: Any) -> str:
    """Equal results and gradients; which ops were used for an inference and for a step."""
    from moe_compile import kinds
    from tests.tiny import check_same, original

    torch._dynamo.reset()
    kinds.forget()
    reference = original(model)
    run = torch.compile(model, backend="moe_ep", fullgraph=True, **settings)
    with torch.no_grad():
        got, want = run(*inputs), reference(*inputs)
        assert (got - want).norm() <= rtol * want.norm()
    inference = ops_written()
    if train:
        check_same(run, reference, model, reference, *inputs, rtol=rtol)
    return f"{inference} | {ops_written()}"


def check_of_ids() -> str:
    """What `one_hot` cannot take is an error on the device, as it was."""
    from tests.tiny import E, Experts, routed

    x, ids, weights = routed()
    run = torch.compile(Experts(), backend="moe_ep", fullgraph=True)
    with torch.no_grad():
        run(x, ids, weights)
        for wrong in (E, -1):
            ids[3, 1] = wrong
            try:
                run(x, ids, weights)
            except Exception as error:
                assert f"an expert's id is outside [0, {E})" in str(error), error
            else:
                raise AssertionError(f"nobody objects to {wrong}")
    assert all("tl.device_assert" in source and "check_ids" not in source for source in sources_written())
    return f"{ops_written()} | raises"


class Autocast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)  # type: ignore[no-any-return]


@contextmanager
def torch_is_faster() -> Iterator[None]:
    from moe_compile.passes import choose_kernels

    estimate = choose_kernels.grouped_gemm_us
    choose_kernels.grouped_gemm_us = lambda name, *_: 1.0 if name == "grouped_mm" else 2.0
    yield
    choose_kernels.grouped_gemm_us = estimate


@contextmanager
def times(found: dict[str, float]) -> Iterator[None]:
    """What Inductor measures of its candidates under `max_autotune`, by a part of their names."""
    from torch._inductor import config
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    def timed(
        self: Any, name: str, nodes: Any, layout: Any, inputs: Any, key: Any, choices: Any, *_: Any, **__: Any
    ) -> Any:
        return {c: next((t for part, t in found.items() if part in c.name), 9.0) for c in choices}

    measure, AlgorithmSelectorCache.do_autotuning = AlgorithmSelectorCache.do_autotuning, timed  # type: ignore[method-assign]
    with config.patch(max_autotune_gemm=True, max_autotune_gemm_backends="ATEN"):
        yield
    AlgorithmSelectorCache.do_autotuning = measure  # type: ignore[method-assign]


def forms() -> Iterator[tuple[str, str]]:
    from tests import float8_models
    from tests.tiny import FF, Block, D, Net, Separate, T

    x, half = torch.randn(T, D), 3e-2
    yield "stacked", check(Net(2), x)
    yield "separate", check(Net(2, lambda: Block(Separate())), x)
    unlike = Separate()
    for linear in (unlike.experts[0][0], unlike.experts[0][2]):
        linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    yield "separate, unlike", check(Block(unlike), x)
    other = lambda: nn.Sequential(nn.Linear(D, FF), nn.Softsign(), nn.Linear(FF, D))  # noqa: E731
    yield "separate, unfused", check(Block(Separate(other)), x)
    yield "bf16", check(Net(1).bfloat16(), x.bfloat16(), rtol=half)
    yield "f16", check(Net(1).half(), x.half(), rtol=half / 8)
    with torch_is_faster():
        yield "bf16, by torch", check(Net(1).bfloat16(), x.bfloat16(), rtol=half)
        yield "bf16, by torch, any number", check(Net(1).bfloat16(), x.bfloat16(), rtol=half, dynamic=True)
    for name, ours in (("bf16, timed, ours faster", 1.0), ("bf16, timed, torch's faster", 3.0)):
        with times({"by_triton": ours, "grouped_mm": 2.0}):
            yield name, check(Net(1).bfloat16(), x.bfloat16(), rtol=half)
    yield "autocast", check(Autocast(Net(1)), x, rtol=half)
    yield "any number of tokens", check(Net(1), x, dynamic=True)
    yield "one token", check(Net(1), x[:1])
    yield "no tokens", check(Net(1), x[:0])
    yield "ids of nobody", check_of_ids()
    scaled = float8_models.LAYERS["chosen"]()
    yield "float8", check(scaled, *float8_models.routed(torch.float32), train=False)


def families(every: bool) -> Iterator[tuple[str, str]]:
    from tests.families import build, representatives
    from tests.test_families import routed

    for family in representatives():
        if every or family.name in FAMILIES:
            yield str(family), check(build(family), *routed())


def main(group: str) -> None:
    from tests import imitated_cuda

    imitated_cuda.install()
    torch.manual_seed(0)
    for name, ops in forms() if group == "forms" else families(group.startswith("all")):
        print(f"{name}: {ops}", flush=True)
    assert not imitated_cuda.uncapturable, imitated_cuda.uncapturable  # mode="reduce-overhead" has all of them


if __name__ == "__main__":
    main(sys.argv[1])
