"""One file of results for each machine, which the parts of all its benchmarks fill together.

    benchmarks/results/<machine>.json   {"machine": ..., "rows": [{"bench", "shape", "routing", "what", "way", ...}]}

A row is a measurement, or why there is none.  It is known by its first five fields; measured again, it takes the place
of the older one.  Each row says when, with which versions and by which command it was taken, so parts that run one
after the other, or again after one was cut short, add up.  The file is written after each row, whole or not at all.
"""

import importlib.metadata
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

KEY = ("bench", "shape", "routing", "what", "way")
VERSIONS = ("torch", "triton", "transformers")
DATE = "%Y-%m-%d %H:%M:%S"
RED, LEFT_OUT = 1, 3  # exit statuses: one of ours is wrong; or something is left out, for another run
Row = dict[str, Any]


def is_ours(way: str) -> bool:
    """Whether a way of this name is one of this project's."""
    return way.startswith(("moe_compile", "moe_ep"))


def versions() -> Row:
    """The installed ones of VERSIONS."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class Record:
    """The results of a machine; `folder` None keeps them nowhere.  Raises `ValueError` for a file that is no record."""

    def __init__(self, folder: Path | None, machine: str, bench: str, command: str = "") -> None:
        name = re.sub(r"[^a-z0-9]+", "_", machine.lower()).strip("_")
        self.path = None if folder is None else folder / f"{name}.json"
        self.machine, self.bench = machine, bench
        self.stamp = versions() | {"command": command or " ".join(["python -m", f"benchmarks.{bench}", *sys.argv[1:]])}
        self.added: list[Row] = []  # by this process

    def rows(self) -> list[Row]:
        """What the file has now: another process may have added to it."""
        if self.path is None or not self.path.exists():
            return []
        try:
            return list(json.loads(self.path.read_text())["rows"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no record of results: {error!r}") from error

    def add(self, row: Row) -> None:
        """Keep a row, with where it is from, in the place of an older one of the same key."""
        row = dict.fromkeys(KEY, "") | {"bench": self.bench} | row | self.stamp | {"date": time.strftime(DATE)}
        self.added.append(row)
        if self.path is None:
            return
        rows = {key_of(old): old for old in self.rows()} | {key_of(row): row}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(f".{os.getpid()}.part")
        aside.write_text(json.dumps({"machine": self.machine, "rows": list(rows.values())}, indent=1) + "\n")
        aside.replace(self.path)

    def has(self, since: str | None, **fields: str) -> bool:
        """Whether the file has a row of these fields from that time on; None: from no time on."""
        wanted = key_of(dict.fromkeys(KEY, "") | {"bench": self.bench} | fields)
        return since is not None and any(key_of(row) == wanted and row["date"] >= since for row in self.rows())

    def red(self) -> list[Row]:
        """The rows of this process that are ours and wrong."""
        return [row for row in self.added if row.get("red") and is_ours(row["way"])]


def key_of(row: Row) -> tuple[str, ...]:
    """What a row is known by."""
    return tuple(row.get(name, "") for name in KEY)


def part_of(items: list[Any], part: str) -> list[Any]:
    """The i-th of n parts of a list, for "i/n".  Raises `ValueError` for what is none."""
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    i, n = map(int, found.groups()) if found else (0, 0)
    if not 1 <= i <= n:
        raise ValueError(f"part {part!r}, expected i/n with i from 1 to n")
    return items[len(items) * (i - 1) // n : len(items) * i // n]
