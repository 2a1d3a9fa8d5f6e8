"""The long run: `python -m tests.fuzz --cases 10000 [--seed 0] [--report FILE]`.

Counts what came of the programs, with and without edits; prints every wrong rewrite as a program to run.
"""

import collections
import random
import time
from pathlib import Path
from typing import Annotated

import typer
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.check import check
from tests.fuzz.grammar import Parts, programs


def main(
    cases: Annotated[int, typer.Option(min=1)] = 10_000,
    start: Annotated[int, typer.Option("--seed", help="Another seed, other programs.")] = 0,
    report: Annotated[Path | None, typer.Option(help="Where the counts and the wrong programs go.")] = None,
) -> None:
    """Check random programs; exit with an error if one was rewritten wrongly."""
    counts: collections.Counter[str] = collections.Counter()
    reasons: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    seen: set[str] = set()
    began = time.monotonic()

    def one(parts: Parts) -> None:
        if parts.source in seen or len(seen) >= cases:
            return
        seen.add(parts.source)
        try:
            found = check(parts)
        except Exception as error:
            found = "wrong"
            wrong.append(f"# edits: {parts.edits}\n# {type(error).__name__}: {error}\n{parts.source}")
            print(wrong[-1], flush=True)
        result, _, reason = found.partition(": ")
        counts[f"{'edited' if parts.edits else 'plain'} {parts.form} {result}"] += 1
        if not parts.edits and result == "refused":
            reasons[f"{parts.form}: {reason}"] += 1

    options = settings(
        max_examples=200, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    number = start * 1000
    while len(seen) < cases:
        seed(number)(options(given(programs())(one)))()
        number += 1
        print(f"{len(seen)} programs, {len(wrong)} wrong, {time.monotonic() - began:.0f} s", flush=True)
    lines = [f"{len(seen)} programs in {time.monotonic() - began:.0f} s, {len(wrong)} rewritten wrongly"]
    lines += [f"  {name:28} {count}" for name, count in sorted(counts.items())]
    lines += ["why programs without edits were refused:"]
    lines += [f"  {count:5} {reason}" for reason, count in reasons.most_common(30)]
    print("\n".join(lines))
    if report is not None:
        report.write_text("\n".join([*lines, *wrong]) + "\n")
    random.seed()
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
