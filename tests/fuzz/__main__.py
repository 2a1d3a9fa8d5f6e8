"""The long run: `python -m tests.fuzz --cases 1000 [--seed 0] [--jobs 2] [--report FILE]`.

Program n of seed s is `program(s * 1_000_000 + n)`.  Counts what came of the programs, with and without edits; prints
every wrong rewrite as a program to run.  `--merge FILE` adds the counts of an earlier report: with `--cases 0`, that of
several runs.
"""

import collections
import multiprocessing
import time
from pathlib import Path
from typing import Annotated

import typer

from tests.fuzz.run import run
from tests.fuzz.tally import Tally

PER_JOB = 20  # programs between two lines of progress
JOBS_OF_A_PROCESS = 10  # then a fresh one: what torch keeps of old programs slows new ones down
SEEDS = 1_000_000


def main(
    cases: Annotated[int, typer.Option(min=0)] = 1000,
    seed: Annotated[int, typer.Option(help="Another seed, other programs.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once.")] = 1,
    report: Annotated[Path | None, typer.Option(help="Where the counts and the wrong programs go.")] = None,
    merge: Annotated[list[Path] | None, typer.Option(help="A report whose counts are added.")] = None,
) -> None:
    """Check random programs; exit with an error if one was rewritten wrongly."""
    total, began = Tally(), time.monotonic()
    for path in merge or []:
        total += Tally.parse(path.read_text())
    last = seed * SEEDS + cases
    parts = [range(n, min(n + PER_JOB, last)) for n in range(seed * SEEDS, last, PER_JOB)]
    counts: collections.Counter[str] = collections.Counter()
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=JOBS_OF_A_PROCESS) as pool:
        for found in pool.imap(run, parts):
            total += found
            counts.update(programs=found.programs, wrong=len(found.wrong))
            print(f"{dict(counts)} in {time.monotonic() - began:.0f} s", flush=True)
            if report is not None:
                report.write_text(total.text())
    print(total.text())
    if report is not None:
        report.write_text(total.text())
    raise typer.Exit(bool(total.wrong))


if __name__ == "__main__":
    typer.run(main)
