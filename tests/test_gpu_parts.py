"""`make gpu`: parts that go on whatever is red, that are run again where they left something out, and a summary."""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, limits, slices
from benchmarks.records import LEFT_OUT, RED, Record

pytest.importorskip("triton", reason="triton has no build for this platform")
ROOT = Path(__file__).resolve().parent.parent
REPORT = """<testsuites><testsuite><testcase classname="tests.kernels.test_tma" name="a" time="1.5"/>
<testcase classname="tests.kernels.test_tma" name="b[x]" time="2"><failure message="no">no</failure></testcase>
<testcase classname="tests.kernels.test_tma.Some" name="c"><skipped/></testcase>
<testcase classname="tests.kernels.test_errors" name="d" time="1"/></testsuite></testsuites>"""


def test_parts_of_the_tests_are_all_of_them() -> None:
    parts = [gpu.test_files(f"{i}/{gpu.TESTS}") for i in range(1, gpu.TESTS + 1)]
    assert sorted(itertools.chain(*parts)) == sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    with pytest.raises(ValueError, match="expected i/n"):
        gpu.test_files("4/3")


def pytest_that(status: int, report: str | None) -> gpu.Run:
    def run(command: list[str], seconds: float) -> int:
        assert "-ra" in command and seconds == gpu.TEST_S
        if report is not None:
            Path(command[-1].removeprefix("--junitxml=")).write_text(report)
        return status

    return run


def test_what_the_tests_gave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row a file: red with the names of what failed, or because there is no result."""
    files = [ROOT / "tests" / "kernels" / f"test_{name}.py" for name in ("tma", "errors", "combine")]
    monkeypatch.setattr(gpu, "test_files", lambda *_: files)
    record = Record(tmp_path, "it", "tests", "it")
    assert gpu.tests("1/1", record, run=pytest_that(1, REPORT)) == RED
    rows = {row["shape"]: row for row in record.rows()}
    assert [rows["test_tma"][name] for name in ("passed", "failed", "skipped", "seconds")] == [1, 1, 1, 3.5]
    assert rows["test_tma"]["red"] == "failed: b[x]" and rows["test_errors"]["red"] is None
    assert rows["test_combine"]["red"] == "no result: pytest ended with 1"
    monkeypatch.setattr(gpu, "test_files", lambda *_: files[1:2])
    assert gpu.tests("1/1", Record(tmp_path, "it", "tests", "it"), run=pytest_that(0, REPORT)) == 0
    for report in (None, REPORT):
        stopped = Record(None, "it", "tests", "it")
        assert gpu.tests("1/1", stopped, run=pytest_that(gpu.STOPPED, report)) == LEFT_OUT
        assert stopped.added[0]["red"].startswith("stopped after ")


def test_a_process_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE_S", 0.5)
    began = time.monotonic()
    for first in ("", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "):
        assert gpu.run([sys.executable, "-c", f"{first}import time; time.sleep(60)"], 1.0) == gpu.STOPPED
    assert time.monotonic() - began < 40
    assert gpu.run([sys.executable, "-c", "raise SystemExit(7)"], 60) == 7


def test_every_part_is_run_whatever_another_gave() -> None:
    """One that left something out is run again, up to a few times, and one that is red is not."""
    gives = {"a": [RED], "b": [LEFT_OUT, gpu.STOPPED, 0], "c": [LEFT_OUT] * gpu.AGAIN, "d": [-9], "e": [0]}
    asked: list[str] = []

    def run(command: list[str], seconds: float) -> int:
        assert seconds < 600
        asked.append(command[2])
        return gives[command[2]][asked.count(command[2]) - 1]

    found = gpu.all_parts([["python", "-m", name] for name in gives], run)
    assert found == {"a": RED, "b": 0, "c": LEFT_OUT, "d": -9, "e": 0}
    assert "".join(asked) == "a" + "b" * 3 + "c" * gpu.AGAIN + "de"


def test_the_commands() -> None:
    commands = [" ".join(command[2:]) for command in gpu.parts([], "2026-11-22 10:00:00", False)]
    assert len(commands) == gpu.TESTS + gpu.KERNELS + len(gpu.MODELS) + 1
    assert commands[0] == "benchmarks.gpu tests --part 1/3" and commands[-1] == "benchmarks.tune"
    assert commands[gpu.TESTS] == "benchmarks.kernels_gpu --part 1/14 --since 2026-11-22 10:00:00"
    assert list(gpu.MODELS) == list(slices.MODELS)
    assert not [c for c in gpu.parts(["tests", "tune"], "", False) if c[2] in ("benchmarks.gpu", "benchmarks.tune")]


def test_the_verdict() -> None:
    right = {"bench": "tests", "shape": "test_tma", "way": "moe_compile", "what": "tests", "routing": "", "passed": 3}
    peer = right | {"bench": "slices", "way": "HF eager", "red": "out of memory"}
    ours = right | {"bench": "slices", "way": "moe_compile, of HF eager", "red": "losses differ"}
    assert gpu.verdict([right, peer], {"a": 0}) == (
        0, "Tests of kernels: 3 passed, 0 failed, 0 skipped. 0 rows timed, 0 of ours red.")  # fmt: skip
    status, text = gpu.verdict([right, ours], {"a": LEFT_OUT})
    assert status == RED and "RED slices test_tma tests moe_compile, of HF eager: losses differ" in text
    assert gpu.verdict([], {"a": LEFT_OUT})[0] == LEFT_OUT
    status, text = gpu.verdict([], {"a": -9})
    assert status == RED and "exit status -9: a" in text


def test_a_part_of_the_tests_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "tests", "--dry", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (row,) = json.loads((tmp_path / "dry_run.json").read_text())["rows"]
    assert row["shape"] == "test_bias_gradient" and row["passed"] > 0 and row["red"] is None
    summary = subprocess.run([*command[:3], "summary", *command[4:]], cwd=ROOT, capture_output=True, text=True)
    assert summary.returncode == 0 and f"{row['passed']} passed, 0 failed" in summary.stdout, summary.stderr


def test_slices_are_kept_way_by_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A way that takes too long is left out with its reason; a later run measures what is not there, after HF eager."""
    asked: list[str] = []
    tokens, options = torch.zeros(2, 8), argparse.Namespace(since=None, way_limit_s=0.3, dry=True)

    def measure(model: str, way: str, *_: Any) -> slices.Found:
        asked.append(way)
        if way == "HF grouped_mm":
            time.sleep(60)
        return slices.Found(model, way, losses=[1.0])

    monkeypatch.setattr(slices, "measure", measure)
    monkeypatch.setattr(slices, "free", lambda _: None)
    record = Record(tmp_path, "it", "slices", "it")
    assert slices.steps_of("mixtral", tokens, record, options, time.monotonic() + 100)
    assert asked == list(slices.WAYS) and [row["way"] for row in record.rows()] == asked
    assert {row["way"]: row["red"] for row in record.rows() if row["red"]} == {"HF grouped_mm": "no end after 0 s"}
    kept = [row for row in record.rows() if row["way"] != "HF eager, inductor"]
    (tmp_path / "it.json").write_text(json.dumps({"machine": "it", "rows": kept}))
    asked.clear()
    options.since = "2020"
    assert slices.steps_of("mixtral", tokens, record, options, time.monotonic() + 100)
    assert asked == ["HF eager", "HF eager, inductor"]
    assert slices.steps_of("mixtral", tokens, record, options, time.monotonic() + 100) and len(asked) == 2
    options.since = None
    assert not slices.steps_of("mixtral", tokens, Record(None, "it", "slices", "it"), options, time.monotonic())


def test_a_slice_gives_its_memory_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled holds the old model: it is forgotten before memory is collected."""
    done: list[str] = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(slices.gc, "collect", lambda: done.append("collect"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty"))
    slices.free("cuda")
    assert done == ["reset", "collect", "empty"]


def test_limits_are_of_one_kind() -> None:
    """A part that is stopped by its own clock, and by a way that hangs, ends before `make gpu` stops it."""
    assert 60 * 9 + limits.GRACE_S < gpu.PART_S < 600
