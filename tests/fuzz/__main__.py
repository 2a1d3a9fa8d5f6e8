"""The long run: `python -m tests.fuzz --cases 1000 [--seed 0] [--jobs 2] [--report FILE]`.

Program n of seed s is `program(s * 1_000_000 + n)`.  Counts what came of the programs, with and without edits; prints
every wrong rewrite as a program to run.  `--merge FILE` adds the counts of an earlier report: with `--cases 0`, that of
several runs.
"""

from pathlib import Path
from typing import Annotated

import typer

from tests.fuzz.pool import long_run
from tests.fuzz.run import run


def main(
    cases: Annotated[int, typer.Option(min=0)] = 1000,
    seed: Annotated[int, typer.Option(help="Another seed, other programs.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once.")] = 1,
    report: Annotated[Path | None, typer.Option(help="Where the counts and the wrong programs go.")] = None,
    merge: Annotated[list[Path] | None, typer.Option(help="A report whose counts are added.")] = None,
) -> None:
    """Check random programs; exit with an error if one was rewritten wrongly."""
    raise typer.Exit(bool(long_run(run, cases, seed, jobs, report, merge or []).wrong))


if __name__ == "__main__":
    typer.run(main)
