"""The tuner: what it tries, that it keeps the fastest right setting, and that it goes on where it ended."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton has no build for this platform")

from benchmarks import timing, tune
from benchmarks.ahead import Ahead
from benchmarks.records import LEFT_OUT
from benchmarks.tried import Job, candidates, crossed, whole
from benchmarks.tune import DeviceLost, Log, best
from moe_compile.kernels import settings
from moe_compile.kernels.settings import Problem, Setting

ROOT = Path(__file__).resolve().parent.parent
SEED = (64, 64, 16, 8, 2)
PROBLEM = Problem("grouped_gemm", "d packed", "cpu", "fp32", 256, 32, 48)
FAST, WRONG, BROKEN = (32, 64, 32, 4, 2), (64, 64, 32, 4, 2), (128, 64, 32, 4, 2)
SECONDS = {SEED: 3.0, FAST: 2.0, WRONG: 1.0, BROKEN: 0.5}
ALL = [pair for pairs in tune.ROUNDS for pair in pairs]
SEEDS = {"gated_gemm": (128, 64, 64, 8, 3), "gated_gemm_backward": (128, 128, 64, 4, 8, 3)}


def now() -> Setting:
    seed = SEED
    return settings.choose("grouped_gemm", "d packed", torch.device("cpu"), torch.float32, 256, 32, 48, seed=seed)


def job(tried: list[Setting], broken: Callable[[], Tensor] | None = None) -> Job:
    def call() -> Tensor:
        tried.append(now())
        if now() == BROKEN:
            if broken is not None:
                return broken()
            raise RuntimeError("out of resource: shared memory")
        return torch.full((4,), 2.0 if now() == WRONG else 1.0)

    return Job(PROBLEM, SEED, [call, call])


def clock(call: Callable[[], object], **_: int) -> float:
    return SECONDS.get(now()[:5], 9.0)


def found(
    to_try: list[Setting], log: Log | None = None, until: float = float("inf"), **more: Callable
) -> Setting | None:
    return best(job([], **more), to_try, until, log or Log(None), clock, "cpu")


def test_the_fastest_right_one() -> None:
    """One that is faster and wrong, or that raises, is passed over; time that is up is no answer."""
    assert found([WRONG, FAST, BROKEN]) == FAST
    assert found([WRONG, BROKEN]) == SEED
    assert found([FAST], until=0.0) is None


def test_the_second_round_decides() -> None:
    """The best three of the quick round are timed again, on both routings."""
    more = [(32, 64, 32, 4, stages) for stages in (2, 3, 4, 5)]
    quick = dict(zip([SEED, *more], (1.0, 2.0, 3.0, 4.0, 0.5), strict=True))
    slow = dict(zip([SEED, *more], (9.0, 2.0, 0.1, 0.1, 9.0), strict=True))  # two of them never get there
    asked = []

    def clock(call: Callable[[], object], **how: int) -> float:
        asked.append((now(), how))
        return (quick if how else slow)[now()]

    wide = Problem(**{**vars(PROBLEM), "kernel": "grouped_gemm_scaled"})  # neither TMA nor persistent
    it = job([])._replace(problem=wide)
    pins = settings.pinned

    def pinned(_: str, form: str, setting: Setting):
        return pins("grouped_gemm", form, setting)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "pinned", pinned)
        assert best(it, more, float("inf"), Log(None), clock, "cpu") == more[0]
    assert [how for _, how in asked] == [tune.QUICK] * 5 + [{}] * 6


def test_the_best_tile_in_the_best_way_of_launching() -> None:
    plain, fast = (64, 64, 16, 8, 2, 0, 0), (32, 64, 32, 4, 2, 0, 0)
    times = {plain: 3.0, fast: 2.0, (64, 64, 16, 8, 2, 1, 1): 2.5, (64, 64, 16, 8, 2, 0, 1): 2.7}
    assert crossed(job([]), times) == (32, 64, 32, 4, 2, 1, 1)
    assert crossed(job([]), times | {(32, 64, 32, 4, 2, 1, 1): float("inf")}) is None
    assert crossed(job([]), {plain: float("inf")}) is None and crossed(job([]), {plain: 1.0}) is None


def test_a_run_goes_on(tmp_path: Path) -> None:
    """What was tried is not tried again; nor what was under way when a run ended."""
    path = tmp_path / "tried.jsonl"
    assert found([WRONG, FAST], Log(path)) == FAST
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {"us", "setting", "problem", "round"} <= set(lines[1]) and "us" not in lines[0]
    tried: list[Setting] = []
    assert best(job(tried), [WRONG, FAST], float("inf"), Log(path), clock, "cpu") == FAST
    assert tried == []
    text = [line for line in path.read_text().splitlines() if not ('"us"' in line and str(list(FAST)) in line)]
    path.write_text("\n".join(text) + "\n")  # as if it had ended the process
    assert best(job(tried), [WRONG, FAST], float("inf"), Log(path), clock, "cpu") == SEED
    assert FAST not in tried


class Workers(Ahead):
    """They end in an order of their own; the last of all does not before the time is up."""

    def __init__(self, order: list[Setting], why: dict[Setting, str]) -> None:
        super().__init__()
        self.order, self.why = order, why

    def ready(self, names: Sequence[Any], until: float) -> Iterator[tuple[int, str | None]]:
        asked = [setting for problem, setting in names if problem == PROBLEM]
        yield from ((asked.index(setting), self.why.get(setting)) for setting in self.order)


def test_what_is_ready_is_tried(tmp_path: Path) -> None:
    """What a compiler did not survive is passed over, and not tried; with one still under way there is no answer."""
    path, tried = tmp_path / "tried.jsonl", list[Setting]()
    other = (16, 64, 16, 4, 2)

    def answer(order: list[Setting]) -> Setting | None:
        workers = Workers(order, {FAST: "its compiler ended by SIGSEGV"})
        return best(job(tried), [FAST, WRONG, other], float("inf"), Log(path), clock, "cpu", workers)

    assert answer([SEED, WRONG, FAST]) is None
    assert tried == [SEED, SEED, SEED, SEED, WRONG, WRONG]  # twice for reference, then each on both routings
    assert answer([SEED, other, WRONG, FAST]) == SEED
    assert FAST not in tried and other in tried
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [e for e in entries if e["setting"] == list(FAST)] == [
        {
            "problem": vars(PROBLEM),
            "setting": list(FAST),
            "round": 1,
            "us": None,
            "why": "its compiler ended by SIGSEGV",
        }
    ]


def test_what_is_compiled_ahead(tmp_path: Path) -> None:
    """In the order in which it is tried, without what was; the guess again, with which the others are compared."""
    shape, other = "256,128,64,4,2", "256,192,64,4,2"
    pair = (("grouped_gemm", "d packed"),)
    table, path = tmp_path / "table.jsonl", tmp_path / "tried.jsonl"
    todo = [(pair, shape), ((("gated_gemm", "gated"),), shape), (pair, other)]
    found = tune.tasks(todo, "sm_90", table, Log(path), 232448)
    problems = list(dict.fromkeys(problem for problem, _ in found))
    assert [(p.kernel, p.device, p.dtype, p.D, p.F) for p in problems] == [
        ("grouped_gemm", "sm_90", "bf16", 64, 128),
        ("gated_gemm", "sm_90", "bf16", 128, 64),
        ("grouped_gemm", "sm_90", "bf16", 64, 192),
    ]
    first, second, third = ([s for p, s in found if p == problem] for problem in problems)
    seed = (128, 128, 64, 8, 3)
    assert first[0] == seed and first[1:] == candidates(Job(problems[0], seed, []), 232448)
    assert {(task.shape, task.setting) for (p, s), task in found.items() if p == problems[2]} == {
        (other, s) for s in third
    }
    tune.add(settings.Entry(problems[1], second[0]), table)
    log = Log(path)
    for setting in (seed, first[1]):
        log.add(problem=vars(problems[0]), setting=list(setting), round=1, us=1.0)
    for setting in third:
        log.add(problem=vars(problems[2]), setting=list(setting), round=1, us=1.0)
    again = tune.tasks(todo, "sm_90", table, Log(path), 232448)
    assert list(again) == [(problems[0], setting) for setting in [seed, *first[2:]]]


def test_errors_that_stay_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And are no reason to keep the guess: nothing gets into the table."""
    monkeypatch.setattr(tune.timing, "lost", lambda _: "AcceleratorError: an illegal memory access")
    log = Log(tmp_path / "tried.jsonl")
    with pytest.raises(DeviceLost, match=r"setting \[128, 64, 32, 4, 2\]: AcceleratorError"):
        found([BROKEN, FAST], log)
    table = tmp_path / "table.jsonl"
    monkeypatch.setattr(tune, "candidates", lambda *_: [BROKEN, FAST])
    with pytest.raises(DeviceLost):
        tune.tune(iter([job([])]), table, Log(None), float("inf"), 0, clock, device="cpu")
    assert not table.exists()
    monkeypatch.setattr(tune.timing, "lost", lambda _: None)
    assert tune.tune(iter([job([])]), table, log, float("inf"), 0, clock, device="cpu")
    assert settings.read(table)[0].setting == FAST


def test_nothing_runs(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    def fails(_: object, **__: int) -> float:
        raise RuntimeError("no")

    table = tmp_path / "table.jsonl"
    monkey = job([])
    assert tune.tune(iter([monkey]), table, Log(None), float("inf"), 0, fails, most=1, device="cpu")
    assert not table.exists() and "no setting runs" in capsys.readouterr().err


def test_a_lost_device() -> None:
    assert timing.lost("cpu") is None


@pytest.mark.parametrize("rows", [2048, 64, 32, 4])
@pytest.mark.parametrize(("kernel", "form"), ALL, ids=str)
def test_what_is_tried(kernel: str, form: str, rows: int) -> None:
    """Some twenty to forty settings, each of them one, within shared memory and registers."""
    problem = Problem(kernel, form, "sm_90", "bf16", rows, 2048, 768)
    it = Job(problem, SEEDS.get(kernel, (128, 128, 64, 8, 3)), [])
    tried = candidates(it, 232448)
    assert 14 <= len(tried) == len(set(tried)) <= 45
    assert whole(it, it.seed) not in tried
    for setting in tried:
        assert settings.checked(kernel, setting) == setting
        named = dict(zip(settings.NAMES[kernel], setting, strict=True))
        m, n = named["BLOCK_M"], named.get("BLOCK_N") or named["BLOCK_F"] * (2 if kernel == "gated_gemm" else 1)
        assert m * n <= 128 * 32 * named["num_warps"]
        buffers = (named["num_stages"] + 1) // 2 if kernel == "grouped_gemm_dw" else named["num_stages"]
        assert buffers * (m + n) * named["BLOCK_K"] * 2 <= 232448
        assert kernel == "grouped_gemm_dw" or m <= max(16, 2 * rows)
    amd = candidates(it._replace(problem=Problem(kernel, form, "gfx942", "bf16", rows, 2048, 768)), 65536)
    assert 5 <= len(amd) <= 45 and not any("TMA" in settings.NAMES[kernel] and s[-2] for s in amd)


def dry(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.tune", "--dry", "--out", str(folder / "table.jsonl"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_command(tmp_path: Path) -> None:
    """All products, the forward's first; done, it does nothing; its table is none of ours."""
    before = settings.TABLE.read_text()
    result = dry(tmp_path, "--limit-s", "0")
    assert result.returncode == LEFT_OUT and "run it again to go on" in result.stdout, result.stderr
    result = dry(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    entries = settings.read(tmp_path / "table.jsonl")
    assert list(dict.fromkeys((entry.problem.kernel, entry.problem.form) for entry in entries)) == ALL
    assert len(entries) == 8 and {entry.problem.device for entry in entries} == {"cpu"}
    assert "workers" not in result.stderr
    again = dry(tmp_path)
    assert again.returncode == 0 and not again.stdout, again.stdout
    assert settings.TABLE.read_text() == before
    missing = subprocess.run(
        [sys.executable, "-m", "benchmarks.tune", "--dry"], cwd=ROOT, capture_output=True, text=True
    )
    assert missing.returncode == 2 and "--dry needs --out" in missing.stderr
