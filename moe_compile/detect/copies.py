"""Copies that are none where an expert has one row: `contiguous`, `reshape` and the like of rows that lie apart.

    gate, up = h.chunk(2, -1)          # [r, F], every other half of a row of h
    gate.contiguous().mul_(2)          # of several rows changes a copy; a single row lies together: it changes h

A capture has several rows, and shows the copy.  So nobody may change either of the two in place from then on.
"""

from typing import Any

MAY_COPY = {"contiguous", "reshape", "reshape_as", "flatten", "ravel"}


class Copies:
    """What was copied so far, by storage: the name of the call that did."""

    def __init__(self) -> None:
        self._by: dict[Any, str] = {}

    def note(self, call: str, before: set[Any], after: set[Any]) -> None:
        """A call of one of `MAY_COPY` on rows gives other memory than it takes."""
        self._by |= dict.fromkeys(before | after, call)

    def changed(self, call: str, written: set[Any]) -> str | None:
        """Why a change of these storages is not what it seems."""
        copied = next((self._by[s] for s in written if s in self._by), None)
        return None if copied is None else f"{call} changes in place what {copied} copies unless it is a single row"
