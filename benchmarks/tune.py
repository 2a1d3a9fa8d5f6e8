"""Find the fastest launch settings of the grouped products on this device, and add them to the kernels' table.

    python -m benchmarks.tune [--shapes T,H,I,E,K ...] [--kernels NAME ...] [--limit-s 540] [--jobs 15] [--out FILE]
                              [--log FILE]

For each product of a gated bf16 expert layer of each shape (see benchmarks/kernels_gpu.py) some 20 to 45 settings are
tried: the kernel's own guess and its neighbours, by tiles, warps, stages, and ways of launching.  Each is checked
against the guess on balanced and on Zipf-skewed routing and timed briefly on the first; then the best three, and the
best tile launched in the best way, are timed longer on both, and the smallest product of the two medians is kept.

--jobs processes compile the settings of all products ahead, in this order (benchmarks/ahead.py), while this one checks
and times what is ready; the kernel's own guess goes first.  With 0, and what they leave over, this process compiles.

Products of the forward come first, of all shapes, then those of the backward, then those with float8 weights.  The
table gets a line as soon as a product is done, and the log one before and one after each try; so a run goes on where
another ended, by its limit or by a crash, and does not try again what was under way then; what was only being compiled
ahead was not.  A setting that the device cannot run, that gives other numbers, that takes too long, or that the
compiler does not survive, is passed over; an error after which the device runs nothing more ends the run.  Exit status:
0 if all is done, 3 if another run is to go on.

--dry runs the same on a CPU, on a tiny shape in f32 with Triton's interpreter, with a few settings, and compiles
nothing; it needs --out.
"""

import argparse
import functools
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.ahead import Ahead, Task
from benchmarks.kernels_gpu import DRY, SHAPES
from benchmarks.limits import TimeUp, limited
from benchmarks.products import jobs
from benchmarks.records import LEFT_OUT
from benchmarks.timing import Machine, first_line, why_wrong
from benchmarks.tried import Job, candidates, crossed
from moe_compile.kernels import settings
from moe_compile.kernels.settings import Entry, Problem, Setting

ROUNDS = (
    (("gated_gemm", "gated"), ("grouped_gemm", "d packed")),
    (("gated_gemm_backward", "gated"), ("grouped_gemm_dw", "gathered"), ("grouped_gemm", "f packed")),
    (("grouped_gemm_scaled", "d packed"), ("grouped_gemm_scaled", "f packed")),
)
"""What matters first: (kernel, form)."""

QUICK = {"repeats": 5, "warm_up": 2}
FINAL = 3  # settings that are timed longer
TRY_S = 60.0  # for one setting: compile, check, time; and to compile it ahead


class DeviceLost(Exception):
    """Nothing more runs on the device in this process."""


# -- trying ---------------------------------------------------------------------------------


class Log:
    """What was tried: a line of JSON before and after.  What began and did not end is not tried again."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self.found: dict[str, dict[str, Any]] = {}
        for line in filter(None, lines):
            entry = json.loads(line)
            self.found[_key(entry)] = entry

    def add(self, **entry: Any) -> None:
        """us: how long it takes, by round: null if it was passed over, and then `why`; missing before the try."""
        self.found[_key(entry)] = entry
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def time_us(self, problem: Problem, setting: Setting, round: int) -> float | None:
        """What a try gave, infinity if nothing; None if there was none."""
        entry = self.found.get(_key({"problem": asdict(problem), "setting": list(setting), "round": round}))
        return None if entry is None else math.inf if entry.get("us") is None else float(entry["us"])


def _key(entry: dict[str, Any]) -> str:
    return json.dumps([entry["problem"], list(entry["setting"]), entry["round"]])


Clock = Callable[..., float]
Wanted = tuple[tuple[str, str], ...]  # of ROUNDS
CORES = os.cpu_count() or 1
NOBODY = Ahead()


def best(
    job: Job, to_try: list[Setting], until: float, log: Log, clock: Clock, device: str = "cuda", ahead: Ahead = NOBODY
) -> Setting | None:
    """The fastest setting; None if time was up before all were tried.

    Raises `DeviceLost`; and `RuntimeError` if none of them runs, the kernel's own guess neither.
    """
    references = functools.cache(lambda: [call().clone() for call in job.calls])

    def times(setting: Setting, round: int, why_not: str | None = None) -> float:
        known = log.time_us(job.problem, setting, round)
        if known is not None:
            return known
        entry = {"problem": asdict(job.problem), "setting": list(setting), "round": round}
        if why_not is not None:
            log.add(**entry, us=None, why=why_not)
            print(f"  {list(setting)}: {why_not}", file=sys.stderr)
            return math.inf
        why, took = None, None
        try:
            with limited(TRY_S, lambda: log.add(**entry, us=None, why="cannot be stopped")):
                wanted = references()
                log.add(**entry)
                with settings.pinned(job.problem.kernel, job.problem.form, setting):
                    found = [(call(), ref) for call, ref in zip(job.calls, wanted, strict=True)]
                    why = next(filter(None, (why_wrong(value, ref, 2) for value, ref in found)), None)
                    if why is None:
                        calls = job.calls[:1] if round == 1 else job.calls
                        took = math.prod(clock(call, **(QUICK if round == 1 else {})) for call in calls)
        except TimeUp:
            why = f"no end after {TRY_S:.0f} s"
        except Exception as error:  # too much shared memory, too many registers: the device says no
            why = first_line(error)
        log.add(**entry, us=took, **({"why": why} if why else {}))
        if why:
            print(f"  {list(setting)}: {why}", file=sys.stderr)
            if lost := timing.lost(device):
                raise DeviceLost(f"{job.problem}, setting {list(setting)}: {lost}")
        return math.inf if took is None else took

    first, todo = dict[Setting, float](), [job.seed, *to_try]
    for index, why_not in ahead.ready([(job.problem, setting) for setting in todo], until):
        if time.monotonic() > until:
            return None
        first[todo[index]] = times(todo[index], 1, why_not)
    if any(setting not in first for setting in todo):
        return None
    if (more := crossed(job, first)) is not None:
        first[more] = times(more, 1)
    right = [setting for setting in sorted(first, key=lambda s: first[s]) if first[setting] < math.inf]
    second: dict[Setting, float] = {}
    for setting in right[:FINAL]:
        if time.monotonic() > until:
            return None
        second[setting] = times(setting, 2)
    fastest = min(second, key=lambda s: second[s], default=None)
    if fastest is None or second[fastest] == math.inf:
        raise RuntimeError(f"{job.problem}: no setting runs, the kernel's own guess {list(job.seed)} neither")
    return fastest


def add(entry: Entry, path: Path) -> None:
    """Append an entry to the table."""
    with path.open("a") as file:
        file.write(entry.line() + "\n")


def known(path: Path) -> set[Problem]:
    """What the table has."""
    return {entry.problem for entry in settings.read(path)} if path.exists() else set()


def tune(
    todo: Iterator[Job], table: Path, log: Log, until: float, shared_bytes: int, clock: Clock = timing.time_us,
    most: int | None = None, device: str = "cuda", ahead: Ahead = NOBODY,
) -> bool:  # fmt: skip
    """Add the fastest setting of each product that is not in the table; whether all are done.  Raises `DeviceLost`."""
    for job in todo:
        if job.problem in known(table):
            continue
        if time.monotonic() > until:
            return False
        try:
            setting = best(job, candidates(job, shared_bytes)[:most], until, log, clock, device, ahead)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            continue
        if setting is None:
            print(f"time is up at {job.problem}; run it again to go on")
            return False
        entry = Entry(job.problem, setting)
        add(entry, table)
        print(f"{entry.line()}  (the kernel's own guess: {list(job.seed)})", flush=True)
    return True


def tasks(todo: list[tuple[Wanted, str]], name: str, table: Path, log: Log, shared: int) -> dict[Any, Task]:
    """What is to be compiled on a device of this name, in the order in which it is tried, by problem and setting."""
    found, done = dict[Any, Task](), known(table)
    for wanted, shape in todo:
        for job in jobs(shape, Machine("meta"), wanted):
            problem = replace(job.problem, device=name)
            to_try = candidates(job._replace(problem=problem), shared)
            new = [setting for setting in [job.seed, *to_try] if log.time_us(problem, setting, 1) is None]
            if new and problem not in done:
                # the guess is what the others are compared with
                for setting in dict.fromkeys([job.seed, *new]):
                    found[problem, setting] = Task(shape, problem.kernel, problem.form, problem.D, problem.F, setting)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=None, metavar="T,H,I,E,K")
    parser.add_argument("--kernels", nargs="+", default=list(settings.NAMES), choices=settings.NAMES)
    parser.add_argument("--limit-s", type=float, default=540)
    parser.add_argument("--jobs", type=int, default=CORES - 1, help="processes that compile; 0: this one does")
    parser.add_argument("--out", type=Path, default=None, help="the table; the kernels' own, but for a dry run")
    parser.add_argument("--log", type=Path, default=None, help="what was tried; beside the results of benchmarks")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny")
    chosen = parser.parse_args()
    until = time.monotonic() + chosen.limit_s
    if chosen.dry:
        if chosen.out is None:
            parser.error("--dry needs --out: its settings are of no use")
        if os.environ.get("TRITON_INTERPRET") != "1":  # Triton asked for it when it was imported
            os.environ["TRITON_INTERPRET"] = "1"
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.tune", *sys.argv[1:]])
        machine, shared, most, target = Machine("cpu", torch.float32), 232448, 2, ()
    elif not torch.cuda.is_available():
        print("benchmarks.tune needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    else:
        import triton

        driver: Any = triton.runtime.driver.active
        shared = driver.utils.get_device_properties(0)["max_shared_mem"]
        machine, most, target = Machine(), None, astuple(driver.get_current_target())
    clock: Clock = wall_us if chosen.dry else timing.time_us
    table = chosen.out or settings.TABLE
    name = settings.device_name(torch.device(machine.device))
    beside = table.with_suffix(".log") if chosen.dry else Path(f"benchmarks/results/tuning_{name}.jsonl")
    log = Log(chosen.log or beside)
    rounds = [tuple(pair for pair in pairs if pair[0] in chosen.kernels) for pairs in ROUNDS]
    todo = list(itertools.product(filter(None, rounds), chosen.shapes or (DRY if chosen.dry else SHAPES)))
    num_jobs = 0 if chosen.dry else min(chosen.jobs, CORES - 1)
    to_compile = tasks(todo, name, table, log, shared) if num_jobs > 0 else {}
    with Ahead(to_compile, target, num_jobs, TRY_S) as ahead:
        for wanted, shape in todo:
            if time.monotonic() > until:
                print(f"time is up before {shape}; run it again to go on")
                return LEFT_OUT
            try:
                products = jobs(shape, machine, wanted)
                if not tune(products, table, log, until, shared, clock, most, machine.device, ahead):
                    return LEFT_OUT
            except DeviceLost as error:
                print(f"the device runs nothing more in this process: {error}; run it again to go on", file=sys.stderr)
                return LEFT_OUT
    return 0


def wall_us(call: Callable[[], object], **_: int) -> float:
    """For a dry run."""
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
