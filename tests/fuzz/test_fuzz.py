"""Random programs: whatever is rewritten has the numbers of what was written.  The long run: `python -m tests.fuzz`."""

import pytest

from tests.fuzz.check import check
from tests.fuzz.grammar import program
from tests.fuzz.tally import Tally


@pytest.mark.parametrize("start", range(0, 60, 10))
def test_numbers(start: int) -> None:
    for number in range(start, start + 10):
        check(program(number))


def test_a_report_can_be_read_again() -> None:
    tally = Tally()
    for number, result in enumerate(["rewritten", "refused", "invalid", "refused"] * 5):
        tally.add(program(number), result, "a reason: with 3 numbers in moe_fuzz_3.py:12")
    assert Tally.parse(tally.text()) == tally
