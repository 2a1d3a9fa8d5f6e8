"""Edited sources of real programs: whatever is rewritten has their numbers.  The long run: `python -m tests.fuzz.sources`."""

import dataclasses
from random import Random

import pytest

from tests.fuzz import sources
from tests.fuzz.source_edits import EDITS, edited
from tests.fuzz.sources import case, check
from tests.fuzz.subjects import subjects
from tests.fuzz.tally import Tally

CHEAP = ("idioms", "mutants")  # whose proofs take a second at most


@pytest.mark.parametrize("start", range(0, 20, 5))
def test_numbers(start: int) -> None:
    for number in range(start, start + 5):
        check(case(number, CHEAP))


def test_the_families_of_transformers() -> None:
    pytest.importorskip("transformers")
    for number in range(4):
        check(case(number, ("families",)))


@pytest.mark.parametrize("name", ["RangeWhere", "ChosenOnly", "GShard"])
def test_sources_as_they_are_are_rewritten(name: str) -> None:
    """Or no edit of them could show anything."""
    assert check(unedited(name)) == "rewritten"


def test_a_wrong_rewrite_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum over experts that is half of what it should be."""
    monkeypatch.setattr(sources.Run, "__call__", halved(sources.Run.__call__))
    with pytest.raises(AssertionError, match="output 0"):
        check(unedited("RangeWhere"))


def unedited(name: str) -> sources.Case:
    subject = next(s for s in subjects("idioms") if s.cls.__name__ == name)
    return dataclasses.replace(
        case(0, ("idioms",)), subject=subject, source=subject.source, plan=subject.plan(Random(0))
    )


def halved(call):  # type: ignore[no-untyped-def]
    def run(self, run, args):  # type: ignore[no-untyped-def]
        found = call(self, run, args)
        if run is not self.model:
            found["output 0"] = found["output 0"] / 2
        return found

    return run


@pytest.mark.parametrize("edit", sorted(set(EDITS), key=lambda e: e.__name__), ids=lambda e: e.__name__)
def test_every_edit_changes_something(edit, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """And leaves a program that can be compiled, nearly always."""
    monkeypatch.setattr("tests.fuzz.source_edits.EDITS", (edit,))
    subject = next(s for s in subjects("idioms") if s.cls.__name__ == "ChosenFromStartToEnd")
    found = []
    for seed in range(10):
        source, said = edited(Random(seed), subject.source, 1)
        if said:
            compile(source, "program", "exec")
            found.append(source)
    assert len({subject.source, *found}) > 2


def test_a_report_can_be_read_again() -> None:
    tally = Tally()
    for number in range(4):
        tally.add(case(number, CHEAP), "rewritten", "")
    tally.wrong.append(str(case(1, CHEAP)))
    assert Tally.parse(tally.text()).counts == tally.counts
    assert len(Tally.parse(tally.text()).wrong) == 1
