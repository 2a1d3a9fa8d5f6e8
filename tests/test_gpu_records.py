"""What the parts of the GPU's benchmarks leave behind: one file a machine, whatever ends them; and its table."""

import contextlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_page, limits, peers, records, timing
from benchmarks.records import Record
from benchmarks.timing import Machine, why_wrong

pytest.importorskip("triton", reason="triton has no build for this platform")
ROOT = Path(__file__).resolve().parent.parent
CPU = Machine("cpu", torch.float32)
ROW = {"shape": "1,2,3,4,5", "routing": "zipf", "what": "layer forward", "way": "moe_compile fused"}


def test_parts_add_up(tmp_path: Path) -> None:
    """A row takes the place of the older one of its key alone, also from another process's record."""
    first, second = (Record(tmp_path, "NVIDIA H200", bench, "it") for bench in ("kernels_gpu", "slices"))
    first.add(ROW | {"time_us": 2.0})
    second.add(ROW | {"time_us": 3.0})
    first.add(ROW | {"way": "torch._grouped_mm", "time_us": 4.0})
    first.add(ROW | {"time_us": 1.0})
    rows = json.loads((tmp_path / "nvidia_h200.json").read_text())["rows"]
    assert [(row["bench"], row["time_us"]) for row in rows] == [
        ("kernels_gpu", 1.0), ("slices", 3.0), ("kernels_gpu", 4.0)]  # fmt: skip
    assert {"date", "command", "torch", "triton", "transformers"} <= set(rows[0])
    assert [path.name for path in tmp_path.iterdir()] == ["nvidia_h200.json"]
    assert first.has("2020", **ROW) and not first.has("2999", **ROW) and not first.has(None, **ROW)
    assert not first.has("2020", **(ROW | {"routing": "balanced"}))
    (tmp_path / "nvidia_h200.json").write_text("{")
    with pytest.raises(ValueError, match="is no record of results"):
        first.rows()


def test_parts() -> None:
    parts = [records.part_of(list(range(10)), f"{i}/4") for i in (1, 2, 3, 4)]
    assert list(itertools.chain(*parts)) == list(range(10)) and max(map(len, parts)) == 3
    for wrong in ("0/4", "5/4", "1/0", "1", "a/b"):
        with pytest.raises(ValueError, match="expected i/n"):
            records.part_of([], wrong)


def test_what_matters_comes_first() -> None:
    from benchmarks.kernels_gpu import SHAPES, jobs

    todo = jobs(SHAPES, list(peers.ROUTINGS))
    rounds = [todo[i : i + 10] for i in range(0, len(todo), 10)]
    assert [(part[0].what, part[0].routing) for part in rounds] == [
        ("layers", "balanced"), ("kernels", "balanced"), ("layers", "zipf"), ("layers", "one_empty"),
        ("last layers", "balanced"), ("last layers", "zipf"), ("last layers", "one_empty"),
    ]  # fmt: skip
    assert all([job.shape for job in part] == SHAPES for part in rounds)
    last = [name for name, way in peers.ways(torch.zeros(1, 1, dtype=torch.int64), 1).items() if way.last]
    assert last == ["HF eager", "HF eager, inductor", "Liger"]


def test_a_second_run_goes_on(tmp_path: Path) -> None:
    """Rows are in the file as they come; with --since none of them is measured again."""

    def run(*more: str) -> list[str]:
        command = [sys.executable, "-m", "benchmarks.kernels_gpu", "--dry", "--out", str(tmp_path), *more]
        layers = ["--layers", "moe_compile fused", "torch._grouped_mm", "--routing", "zipf"]
        result = subprocess.run([*command, *layers], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return [line for line in result.stdout.splitlines() if "right, not timed" in line]

    assert len(run()) == 4
    file = tmp_path / "dry_run.json"
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 5 and rows[0]["command"].startswith("python -m benchmarks.kernels_gpu --dry")  # a graph too
    file.write_text(json.dumps({"machine": "dry run", "rows": rows[1:]}))
    assert len(run("--since", "2020-01-01 00:00:00")) == 1
    assert len(json.loads(file.read_text())["rows"]) == 5


def rows_of(way: peers.Way, monkeypatch: pytest.MonkeyPatch, *, name: str = "moe_compile it", **limit: Any) -> list:
    from benchmarks import gpu_rows

    rows = gpu_rows.Rows("12,32,16,4,2", "zipf", limit.pop("machine", CPU), gpu_rows.Limits(**limit))
    monkeypatch.setattr(gpu_rows, "layer_ways", lambda *_: {name: way})
    return list(rows.layers())


def right(monkeypatch: pytest.MonkeyPatch, routing: str = "zipf") -> Any:
    from benchmarks import gpu_rows

    rows = gpu_rows.Rows("12,32,16,4,2", routing, CPU)
    return peers.ours(rows.ids, rows.E)["moe_compile fused"].layer


def test_a_way_that_takes_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its reason; what is over after the time of the whole command is no row of it."""
    from benchmarks.gpu_rows import NoTime

    def slow(*leaves: Tensor) -> Tensor:
        with contextlib.suppress(Exception):  # as compilers do
            time.sleep(60)
        raise AssertionError("not stopped")

    began = time.monotonic()
    found = rows_of(peers.Way(slow), monkeypatch, row_s=0.2)
    assert time.monotonic() - began < 30
    assert [row["red"] for row in found] == ["no end after 0 s"] * 2
    with pytest.raises(NoTime):
        rows_of(peers.Way(slow), monkeypatch, row_s=100.0, stop=time.monotonic() + 0.2)


def test_a_way_that_cannot_be_stopped_ends_the_process(tmp_path: Path) -> None:
    """And is in the file."""
    code = f"""
import signal, sys, time
from pathlib import Path
from benchmarks import limits
from benchmarks.records import Record
record = Record(Path({str(tmp_path)!r}), "it", "kernels_gpu", "it")
with limits.limited(0.1, lambda: record.add({{"shape": "x", "red": "hangs"}}), grace_s=0.2):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)  # nothing in Python hears of it
    time.sleep(60)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert result.returncode == records.LEFT_OUT, result.stderr
    assert json.loads((tmp_path / "it.json").read_text())["rows"][0]["red"] == "hangs"


def test_a_limit_leaves_nothing_behind() -> None:
    with limits.limited(0.2, lambda: None):
        pass
    time.sleep(0.3)
    with pytest.raises(limits.TimeUp), limits.limited(-1.0, lambda: None):
        pass


def test_ours_gives_the_same_bits_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = right(monkeypatch), [0]

    def other_bits(*leaves: Tensor) -> Tensor:
        calls[0] += 1
        return layer(*leaves) * (1 + 2e-7 * calls[0])

    ours, peer = (rows_of(peers.Way(other_bits), monkeypatch, name=name) for name in ("moe_compile", "HF it"))
    assert [row["red"] for row in ours] == ["a second run gives other bits"] * 2
    assert [row["red"] for row in peer] == [None] * 2


def test_a_job_that_cannot_begin_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu_rows, kernels_gpu

    def fails(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(gpu_rows, "layer_ways", fails)
    todo = kernels_gpu.jobs(["12,32,16,4,2"], ["zipf"], ["any"])
    (row,) = kernels_gpu.measured(todo, CPU, gpu_rows.Limits())
    assert row["red"] == "RuntimeError: CUDA out of memory" and records.is_ours(row["way"])


@pytest.mark.parametrize("routing", peers.ROUTINGS)
def test_our_error_beside_a_loop_in_bf16(routing: str) -> None:
    """Ours is at most as far off as the loop; a result rounded once too often is red, where that of a peer is not."""
    from benchmarks import gpu_rows

    machine = Machine("cpu", torch.bfloat16, "aot_eager")
    rows = gpu_rows.Rows("96,128,64,5,2", routing, machine)
    fused = peers.ours(rows.ids, rows.E)["moe_compile fused"].layer
    assert fused is not None
    found = {
        "moe_compile": peers.Way(fused),
        "moe_compile rough": peers.Way(rough(fused)),
        "HF": peers.Way(rough(fused)),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_rows, "layer_ways", lambda *_: found)
        for row in rows.layers():
            if row["way"] == "moe_compile rough":
                assert row["red"].startswith("error ") and row["error_ratio"] > timing.BOUND_OF_RATIO
            else:
                assert row["red"] is None and (row["way"] == "HF" or row["error_ratio"] <= 1.05), row


def rough(layer: Any) -> Any:
    """Each result of it as if it were of fewer bits, within the bounds of what is right at all."""

    def call(*leaves: Tensor) -> Tensor:
        out = layer(*leaves)
        noise = torch.linspace(-1, 1, out.numel()).reshape(out.shape).sign() * 3e-3
        return out + (out * noise).to(out.dtype)

    return call


def test_bounds_are_those_of_roundings() -> None:
    """Of n roundings to bf16, one after the other: within the bound, and not within half of it."""
    exact = torch.randn(400, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for spread in (exact, exact.sign() * (1 + exact.abs() / 1e2)):  # of all sizes, and just above a power of two
        assert why_wrong(spread.bfloat16(), spread) is None
        assert why_wrong(spread.float(), spread) is None
        assert why_wrong((spread * (1 + 0.004 * exact.sign())).bfloat16(), spread) is not None
    twice = (exact.bfloat16().double() * 1.1).bfloat16()
    assert why_wrong(twice, exact * 1.1) and why_wrong(twice, exact * 1.1, 2) is None
    assert why_wrong(exact.bfloat16() * float("nan"), exact) and why_wrong(exact[1:].bfloat16(), exact)
    one_off = exact.bfloat16()
    one_off[7, 7] += 0.05
    assert "of the largest" in (why_wrong(one_off, exact) or "")
    assert why_wrong(torch.empty(0, 5, dtype=torch.bfloat16), torch.empty(0, 5)) is None


def test_what_a_layer_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused op keeps what the formula says, whatever K is at one K * I; the general ops keep more, and would be red."""
    from benchmarks import gpu_rows

    kept = {}
    for shape in ("64,32,64,8,1", "64,32,16,8,4"):
        rows = gpu_rows.Rows(shape, "zipf", Machine("cpu", torch.float32, "aot_eager"))
        T, H, W, E, K = map(int, shape.split(","))
        for name in ("moe_compile fused", "moe_ep", "moe_compile"):
            both = next(row for row in rows.layers([name]) if row["what"] == "layer f+b")
            assert both["red"] is None
            kept[name, K] = both["kept_bytes"]
        formula = 4 * (T * H + 2 * T * K * W + T * K) + 4 * T * K + 4 * E
        assert kept["moe_compile fused", K] == formula
        assert kept["moe_ep", K] <= timing.BOUND_OF_KEPT * formula + 8 * T * K < kept["moe_compile", K]
    general = peers.ours(rows.ids, rows.E)["moe_compile"]._replace(lean=True)
    monkeypatch.setattr(gpu_rows, "layer_ways", lambda *_: {"moe_compile": general})
    forward, both = rows.layers()
    assert forward["red"] is None and "bytes for its backward, expected" in both["red"]


def measured(way: str, what: str, time_us: float, **more: Any) -> dict:
    row = ROW | {"shape": "40960,768,256,128,8", "way": way, "what": what, "time_us": time_us, "flop": 10**12}
    return row | {"bytes": 10**9, "dense_tflops": 800.0, "peak_bytes": 2**30, "kept_bytes": 2**29, "red": None} | more


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(tmp_path, "NVIDIA H200", "kernels_gpu", "it")
    for way, time_us in (("moe_compile fused", 2000.0), ("torch._grouped_mm", 4000.0), ("HF grouped_mm", 5000.0)):
        record.add(measured(way, "layer forward", time_us))
        record.add(measured(way, "layer f+b", 10000.0 - time_us, flop=3 * 10**12))
    record.add(measured("HF eager", "layer forward", 0.0, red="no end after 150 s") | {"time_us": None})
    text = gpu_page.summary("NVIDIA H200", record.rows())
    line = next(line for line in text.splitlines() if line.startswith("| 40960"))
    assert line == (
        "| 40960,768,256,128,8 | 500 | 62 % | 500 | torch._grouped_mm: 2.00 | 375 | 47 % | HF grouped_mm: 0.62 | 0.50 | "
        "1.00 | 337, 355 | not known yet |"
    )
    assert "Red or left out: kernels_gpu 40960,768,256,128,8 zipf layer forward HF eager: no end after 150 s." in text
    monkeypatch.setitem(gpu_page.REASONS, "40960,768,256,128,8", "that is why")
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- kernels_gpu: this is written by the command -->\n<!-- end of kernels_gpu -->\nb\n")
    gpu_page.write(page, "NVIDIA H200", record.rows())
    assert "that is why |" in page.read_text() and page.read_text().endswith("\nb\n")
    assert gpu_page.summary("x", []).startswith("x: no layer was measured.")
