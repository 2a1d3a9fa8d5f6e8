"""A wrong program made smaller: `python -m tests.fuzz.reduce NUMBER`.  Lines are left out as long as it stays wrong."""

from typing import Annotated

import typer

from tests.fuzz.check import check_source
from tests.fuzz.grammar import program
from tests.fuzz.parts import Parts


def is_wrong(source: str, parts: Parts) -> bool:
    try:
        check_source(source, parts)
    except Exception:
        return True
    return False


def reduce(source: str, parts: Parts) -> str:
    """A program of fewer lines that is wrong too."""
    start = source.count("\n", 0, source.index("\nclass Expert")) + 1
    lines, changed = source.splitlines(), True
    while changed:
        changed = False
        for at in range(len(lines) - 1, start, -1):
            fewer = [*lines[:at], *lines[at + 1 :]]
            if is_wrong("\n".join(fewer) + "\n", parts):
                lines, changed = fewer, True
    return "\n".join(lines) + "\n"


def main(number: Annotated[int, typer.Argument(help="The program's number, as the long run prints it.")]) -> None:
    """Print the reduced program, and what is wrong with it."""
    parts = program(number)
    if not is_wrong(parts.source, parts):
        print(f"program {number}: {check_source(parts.source, parts)}")
        return
    source = reduce(parts.source, parts)
    print(source)
    check_source(source, parts)


if __name__ == "__main__":
    typer.run(main)
