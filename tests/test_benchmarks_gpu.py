"""What the GPU's benchmarks do without a GPU: their dry runs, their checks, and how they route tokens."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import peers, slices, timing

pytest.importorskip("triton", reason="triton has no build for this platform")
ROOT = Path(__file__).resolve().parent.parent


def dry(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own: kernels are interpreted there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments, "--dry"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_kernels_and_layers_of_all_ways() -> None:
    result = dry("benchmarks.kernels_gpu", "--routing", "one_empty")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "RED" not in result.stdout
    right = [row for row in result.stdout.splitlines() if "right, not timed" in row]
    ways = "moe_compile fused ", "moe_ep ", "torch._grouped_mm", "HF grouped_mm ", "HF eager ", "HF eager, aot_eager"
    for way in ways:
        assert sum(way in row and " layer " in row for row in right) == 2, result.stdout
    for what in ("dispatch", "combine_backward", "forward+backward"):
        assert any(what in row and "moe_compile" in row for row in right), result.stdout


def test_time_that_is_up_is_said() -> None:
    result = dry("benchmarks.kernels_gpu", "--minutes", "0")
    assert result.returncode == 3, result.stdout + result.stderr
    rows = result.stdout.splitlines()[2:]
    assert len(rows) == 7 and all("left out: no time" in row for row in rows)


@pytest.mark.parametrize("wrong", ["forward", "gradient", "raises"])
def test_a_wrong_way_is_red(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu_rows

    def layer(x, weights, up, down):
        if wrong == "raises":
            raise RuntimeError("CUDA out of memory")
        right = peers.torchs(rows.ids, rows.E).layer
        out = right(x, weights, up, down)
        return out * 1.05 if wrong == "forward" else right(x, weights.detach(), up, down) + 0 * weights.sum()

    machine = timing.Machine("cpu", torch.float32)
    rows = gpu_rows.Rows("12,32,16,4,2", "zipf", machine)
    monkeypatch.setattr(gpu_rows, "layer_ways", lambda *_: {"it": peers.Way(layer)})
    forward, both = rows.layers()
    assert bool(forward["red"]) == (wrong != "gradient"), forward
    assert both["red"] and both["time_us"] is None


def test_gate_last() -> None:
    """A way that wants the gate's rows last gets them so, and its gradient is put back."""
    from benchmarks import gpu_rows

    rows = gpu_rows.Rows("12,32,16,4,2", "balanced", timing.Machine("cpu", torch.float32))
    right = peers.torchs(rows.ids, rows.E).layer
    assert right is not None
    way = peers.Way(lambda x, w, up, down: right(x, w, torch.cat(up.chunk(2, 1)[::-1], 1), down), up_first=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_rows, "layer_ways", lambda *_: {"it": way, "not": way._replace(up_first=False)})
        assert [bool(row["red"]) for row in rows.layers()] == [False, False, True, True]


class GLUMLP(nn.Module):
    """ScatterMoE 0.3's, in plain PyTorch: the same arguments and layouts."""

    def __init__(
        self, input_size: int, hidden_size: int, num_experts: int, top_k: int, bias: bool = False,
        activation: nn.Module = nn.SiLU(),  # noqa: B008
    ) -> None:  # fmt: skip
        super().__init__()
        self.experts, self.output_experts = nn.Module(), nn.Module()
        self.experts.weight = nn.Parameter(torch.empty(num_experts, 2 * hidden_size, input_size))
        self.output_experts.weight = nn.Parameter(torch.empty(num_experts, input_size, hidden_size))
        self.activation = activation

    def forward(self, x: Tensor, expert_p: Tensor, expert_idxs: Tensor) -> Tensor:
        h, gates = torch.einsum("th,tkgh->tkg", x, self.experts.weight[expert_idxs]).chunk(2, dim=-1)
        y = torch.einsum("tki,tkhi->tkh", self.activation(gates) * h, self.output_experts.weight[expert_idxs])
        return (expert_p[..., None] * y).sum(1)


class LigerFusedMoEFunction:
    """Liger's of 0.8.5, likewise."""

    @staticmethod
    def apply(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        assert top_k_index.dtype == torch.int32
        gate, up = torch.einsum("th,tkgh->tkg", x, gate_up_proj[top_k_index]).chunk(2, dim=-1)
        y = torch.einsum("tki,tkhi->tkh", nn.functional.silu(gate) * up, down_proj[top_k_index])
        return (top_k_weights[..., None] * y).sum(1)


STAND_INS: dict[str, Any] = {
    "scattermoe": ("scattermoe.mlp", SimpleNamespace(GLUMLP=GLUMLP)),
    "liger": ("liger_kernel.ops.fused_moe", SimpleNamespace(LigerFusedMoEFunction=LigerFusedMoEFunction)),
}


@pytest.mark.parametrize("package", STAND_INS)
def test_optional_peers_are_called_as_they_want(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with other parameters after the first."""
    from benchmarks import gpu_rows

    name, module = STAND_INS[package]
    monkeypatch.setitem(sys.modules, name, module)
    rows = gpu_rows.Rows("12,32,16,4,2", "zipf", timing.Machine("cpu", torch.float32))
    way = getattr(peers, package)(rows.ids, rows.E)
    monkeypatch.setattr(gpu_rows, "layer_ways", lambda *_: {"it": way, "other order": way._replace(
        up_first=not way.up_first)})  # fmt: skip
    assert [row["red"] for row in rows.layers(["it"])] == [None, None]
    assert all("relative error" in row["red"] for row in rows.layers(["other order"]))


def test_a_package_that_is_not_there() -> None:
    module, why_not = peers._optional("no_such_package.mlp", "GLUMLP")
    assert module is None and why_not.startswith("skipped, no_such_package.mlp: ModuleNotFoundError: No module")


def test_layers_of_some_ways() -> None:
    result = dry("benchmarks.kernels_gpu", "--layers", "torch._grouped_mm", "--routing", "zipf")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = result.stdout.splitlines()[2:]
    assert len(rows) == 2 and all("torch._grouped_mm" in row and "right" in row for row in rows), rows
    result = dry("benchmarks.kernels_gpu", "--layers", "torch.mm")
    assert result.returncode == 2 and "no ways: torch.mm; there are moe_compile fused; " in result.stderr


def test_routings() -> None:
    torch.manual_seed(0)
    T, E, K = 64, 8, 2
    counts = {}
    for routing in peers.ROUTINGS:
        ids = peers.routed(routing, T, E, K, "cpu")
        assert ids.shape == (T, K) and (ids[:, 0] != ids[:, 1]).all()
        counts[routing] = torch.bincount(ids.flatten(), minlength=E)
    assert counts["balanced"].tolist() == [16] * 8
    assert counts["zipf"].max() > 3 * counts["zipf"].min()
    assert (counts["one_empty"] == 0).nonzero().tolist() == [[4]]
    with pytest.raises(ValueError, match="none can be empty"):
        peers.routed("one_empty", 4, 2, 2, "cpu")


@pytest.mark.parametrize("model", slices.MODELS)
def test_slices(model: str) -> None:
    tokens = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
    first = slices.measure(model, "HF eager", tokens, [], True)
    second = slices.measure(model, "HF grouped_mm", tokens, first.losses, True)
    assert not first.red and not second.red, (first.line(), second.line())
    assert first.losses[0] > first.losses[-1]  # it trains


def test_slices_say_what_is_wrong() -> None:
    assert slices.why_wrong([1.0, 2.0], [1.0, 2.0], 1e-4) == ""
    assert slices.why_wrong([1.0, 2.1], [1.0, 2.0], 1e-2) == "losses differ by 5.0e-02, bound 0.01"
    assert slices.why_wrong([1.0, float("nan")], [1.0, 2.0], 1e-2)
    assert slices.measure("mixtral", "HF eager", torch.full((1, 4), 99), [], True).red.startswith("IndexError")
