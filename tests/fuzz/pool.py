"""A long run: parts of it in processes of their own, counts and wrong programs as they come."""

import collections
import multiprocessing
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.fuzz.tally import Tally

PER_JOB = 20  # programs between two lines of progress
JOBS_OF_A_PROCESS = 10  # then a fresh one: what torch keeps of old programs slows new ones down
SEEDS = 1_000_000


def long_run(
    run: Callable[[range], Tally], cases: int, seed: int, jobs: int, report: Path | None, merge: Iterable[Path] = ()
) -> Tally:
    """What `run` finds of so many numbers from seed * SEEDS on, and of earlier reports."""
    total, began = Tally(), time.monotonic()
    for path in merge:
        total += Tally.parse(path.read_text())
    last = seed * SEEDS + cases
    parts = [range(n, min(n + PER_JOB, last)) for n in range(seed * SEEDS, last, PER_JOB)]
    counts: collections.Counter[str] = collections.Counter()
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=JOBS_OF_A_PROCESS) as pool:
        for found in pool.imap(run, parts, chunksize=1):
            total += found
            counts.update(programs=found.programs, wrong=len(found.wrong))
            print(f"{dict(counts)} in {time.monotonic() - began:.0f} s", flush=True)
            if report is not None:
                report.write_text(total.text())
    print(total.text())
    if report is not None:
        report.write_text(total.text())
    return total
