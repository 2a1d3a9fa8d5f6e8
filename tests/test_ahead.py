"""Settings that are compiled ahead for an H200 that nobody has: launches find them; workers cost no more than theirs.

What launches runs in a process of its own, where Triton is no interpreter:

    python -m tests.test_ahead keys
"""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

import triton

from benchmarks import tune
from benchmarks.ahead import Ahead, Task
from benchmarks.products import jobs
from benchmarks.timing import Machine
from benchmarks.tried import Job, candidates, whole
from moe_compile.kernels import settings
from moe_compile.kernels.settings import Setting

ROOT = Path(__file__).resolve().parent.parent
SHAPE = "256,128,64,4,2"
H200 = ("cuda", 90, 32)
SHARED = 232448
ALL = tuple(pair for pairs in tune.ROUNDS for pair in pairs)
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def run(name: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
    found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-W", "ignore", "-m", "tests.test_ahead", name]
    return subprocess.Popen(command, cwd=ROOT, env=found, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def lines(name: str, cache: Path, **environment: str) -> list[str]:
    process = run(name, cache, **environment)
    out, errors = process.communicate()
    assert process.returncode == 0, out + errors[-3000:]
    return out.splitlines()


def task_of(job: Job, setting: Setting) -> Task:
    problem = job.problem
    return Task(SHAPE, problem.kernel, problem.form, problem.D, problem.F, setting)


# -- a launch finds what was compiled ahead -----------------------------------------------------


def test_a_launch_compiles_nothing(tmp_path: Path) -> None:
    """Each product, by its own guess, and by pointers and descriptors, with and without a persistent grid."""
    assert lines("keys", tmp_path) == [
        "workers compiled all 26",
        "kernels compiled by launches: 0, found: 27, of them by descriptors: 12",
        "with rows at another address: 1",  # what can go wrong is seen
        "with an unknown setting: 2",  # its row tiles, too
    ]


def some_settings(job: Job) -> list[Setting]:
    """The guess, and the first of each way of launching."""
    problem = settings.Problem(**{**vars(job.problem), "device": "sm_90"})
    ways: dict[Setting, Setting] = (
        {whole(job, job.seed)[-2:]: job.seed} if "TMA" in settings.NAMES[problem.kernel] else {}
    )
    for setting in candidates(job._replace(problem=problem), SHARED):
        ways.setdefault(setting[-2:] if ways else (), setting)
    return [s for how, s in ways.items() if how in ((), (0, 0), (1, 0), (0, 1), (1, 1))]


def keys() -> None:
    todo = {}
    for job in jobs(SHAPE, Machine("meta"), ALL):
        todo.update({(job.problem, setting): task_of(job, setting) for setting in some_settings(job)})
    with Ahead(todo, H200, 2) as ahead:
        assert all(why is None for _, why in ahead.ready(list(todo), float("inf")))
    print(
        f"workers compiled all {ahead.compiled}" if ahead.compiled == len(todo) else f"{ahead.compiled} of {len(todo)}"
    )
    have_an_h200()
    seen: list[tuple[bool, bool]] = []

    def listener(*, src, cache_hit: bool, **_: object) -> None:
        seen.append((cache_hit, any(str(kind).startswith("tensordesc") for kind in src.signature.values())))

    triton.knobs.compilation.listener = listener
    here = list(jobs(SHAPE, Machine("cpu", torch.bfloat16), ALL))
    for job in here:
        for setting in some_settings(job):
            with settings.pinned(job.problem.kernel, job.problem.form, setting):
                for call in job.calls:
                    call()
    hits = [described for hit, described in seen if hit]
    print(
        f"kernels compiled by launches: {len(seen) - len(hits)}, found: {len(hits)}, of them by descriptors: {sum(hits)}"
    )
    from moe_compile.kernels.grouped_gemm import grouped_gemm

    R, D, F, E = 512, 64, 128, 4
    flat, w_EFD = torch.zeros(R * D + 4, dtype=torch.bfloat16), torch.zeros(E, F, D, dtype=torch.bfloat16)
    offsets_E = torch.arange(1, E + 1, dtype=torch.int32) * (R // E)
    for what, rows, setting in (
        ("rows at another address", flat[4:], here[1].seed), ("an unknown setting", flat[:-4], (64, 32, 32, 4, 2)),
    ):  # fmt: skip
        del seen[:]
        with settings.pinned("grouped_gemm", "d packed", setting):
            grouped_gemm(rows.view(R, D), w_EFD, offsets_E)
        print(f"with {what}: {sum(not hit for hit, _ in seen)}")


def have_an_h200() -> None:
    """What Triton asks about the device; kernels are loaded and launched nowhere."""
    target = triton.backends.compiler.GPUTarget(*H200)
    there = {"get_current_target": lambda: target, "get_current_device": lambda: 0, "get_current_stream": lambda _: 0}
    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 32, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": SHARED}
    )
    launcher = lambda *_: lambda *_: None  # noqa: E731
    triton.runtime.driver.set_active(SimpleNamespace(**there, utils=utils, launcher_cls=launcher))


# -- what workers cost when they fail -----------------------------------------------------------

FAKE = """#!/bin/sh
case "$*" in *--version*) exec {real} "$@" ;; esac
for last; do case "$last" in *.ptx) ptx=$last ;; esac; done
kernel=$(grep -o "entry [a-z_]*" "$ptx")
case "$kernel" in
*dw_kernel) echo $$ $PPID >{hung}; exec sleep 1000 ;;
*backward_kernel) kill -SEGV $PPID ;;
*gated_gemm_kernel) kill -KILL $PPID ;;
*scaled_kernel) echo "ptxas fatal: no" >&2; exit 1 ;;
*) exec {real} "$@" ;;
esac
sleep 1000
"""


@pytest.fixture
def faulty(tmp_path: Path) -> dict[str, str]:
    """Where Triton finds a ptxas that hangs, kills who started it, or gives up, each for another kernel."""
    path = tmp_path / "ptxas"
    path.write_text(FAKE.format(real=PTXAS, hung=tmp_path / "hung"))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {"TRITON_PTXAS_PATH": str(path)}


def seed_tasks() -> dict[object, Task]:
    """By kernel; without one of the two of some."""
    found = [task_of(job, job.seed) for job in jobs(SHAPE, Machine("meta"), ALL)]
    return {task.kernel: task for task in found}


def test_a_worker_that_fails_costs_its_own_setting(tmp_path: Path, faulty: dict[str, str]) -> None:
    assert lines("faults", tmp_path / "cache", **faulty) == [
        "gated_gemm_backward its compiler ended by SIGSEGV",
        "gated_gemm None",  # killed, as where memory runs out: for the launch to try
        "grouped_gemm None",
        "grouped_gemm_scaled None",  # it raised: the launch will say why
        "compiled: 1",
        "without the workers' process: [(0, None), (1, None)]",
    ]


def faults() -> None:
    todo = {kernel: task for kernel, task in seed_tasks().items() if kernel != "grouped_gemm_dw"}
    with Ahead(todo, H200, 2, limit_s=300) as ahead:
        found = {list(todo)[index]: why for index, why in ahead.ready(list(todo), float("inf"))}
    print(*(f"{kernel} {found[kernel]}" for kernel in sorted(found, key=lambda k: (found[k] is None, k))), sep="\n")
    print("compiled:", ahead.compiled)
    with Ahead(todo, H200, 1, limit_s=300) as ahead:
        ahead._process.kill()
        print("without the workers' process:", list(ahead.ready(list(todo)[:2], float("inf"))))


def test_time_limits(tmp_path: Path, faulty: dict[str, str]) -> None:
    """Of a worker, which is ended with its ptxas; and of who waits."""
    began, waited, ended = lines("hangs", tmp_path / "cache", **faulty)
    assert began == "[] after 1 s" and waited == "not compiled after 20 s"
    assert ended == "ended: True"


def hangs() -> None:
    task = seed_tasks()["grouped_gemm_dw"]
    with Ahead({1: task}, H200, 1, limit_s=20) as ahead:
        start = time.monotonic()
        print(list(ahead.ready([1], start + 1)), f"after {time.monotonic() - start:.0f} s")
        ((_, why),) = ahead.ready([1], float("inf"))
        print(why)
        print("ended:", not any(map(alive, hung())))


def hung() -> list[int]:
    """ptxas and who started it; none before."""
    path = Path(os.environ["TRITON_PTXAS_PATH"]).with_name("hung")
    return list(map(int, path.read_text().split())) if path.exists() else []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc: which processes run is not seen")
def test_nothing_is_left_of_a_killed_process(
    tmp_path: Path, faulty: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And until then, one that hangs is no reason for others to wait."""
    monkeypatch.setenv("TRITON_PTXAS_PATH", faulty["TRITON_PTXAS_PATH"])
    process = run("waits", tmp_path / "cache", **faulty)
    assert process.stdout is not None
    server, *ready = (int(process.stdout.readline()) for _ in range(3))
    assert ready == [0, 2]
    assert until(lambda: len(hung()) == 2), "no ptxas was started"
    everybody = [server, *hung()]
    assert all(map(alive, everybody))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert until(lambda: not any(map(alive, everybody))), [pid for pid in everybody if alive(pid)]


def waits() -> None:
    tasks = seed_tasks()
    todo = {0: tasks["grouped_gemm"], 1: tasks["grouped_gemm_dw"]}
    todo[2] = todo[0]._replace(setting=(64, 64, 32, 4, 2))
    with Ahead(todo, H200, 2, limit_s=600) as ahead:
        print(ahead._process.pid, flush=True)
        for index, _ in ahead.ready([0, 1, 2], float("inf")):
            print(index, flush=True)


def until(what: Callable[[], bool], seconds: float = 60.0) -> bool:
    stop = time.monotonic() + seconds
    while not what():
        if time.monotonic() > stop:
            return False
        time.sleep(0.05)
    return True


if __name__ == "__main__":
    {"keys": keys, "faults": faults, "hangs": hangs, "waits": waits}[sys.argv[1]]()
