"""Tables that a benchmark writes into a page of docs/, between two marks that name it."""

from collections.abc import Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, with the first column to the left and numbers to the right."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_into(page: Path, name: str, text: str) -> None:
    """Put a text between the marks of a benchmark.  Raises `ValueError` if the page has none."""
    first, last = f"<!-- {name}: this is written by the command -->", f"<!-- end of {name} -->"
    before, _, rest = page.read_text().partition(first)
    _, found, after = rest.partition(last)
    if not found:
        raise ValueError(f"{page} has no place for the text: {first} {last}")
    page.write_text(f"{before}{first}\n{text}\n{last}{after}")
