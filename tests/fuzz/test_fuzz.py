"""Random programs: whatever is rewritten has the numbers of what was written.  The long run: `python -m tests.fuzz`."""

from random import Random

import pytest

from tests.fuzz.check import check
from tests.fuzz.grammar import drawn, program
from tests.fuzz.tally import Tally

hypothesis = pytest.importorskip("hypothesis")
SETTINGS = hypothesis.settings(
    max_examples=10,
    deadline=None,
    derandomize=True,  # no examples of earlier runs: with a seed, the same programs in every run of CI
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)


@pytest.mark.parametrize("seed", range(3))  # other programs each, for workers to share
def test_numbers(seed: int) -> None:
    """Hypothesis draws the programs, and makes one that is wrong simpler."""

    @hypothesis.seed(seed)
    @SETTINGS
    @hypothesis.given(hypothesis.strategies.randoms(use_true_random=False))
    def run(draw: Random) -> None:
        parts = drawn(draw)
        hypothesis.note(f"# {parts.edits}\n{parts.source}")
        check(parts)

    run()


@pytest.mark.parametrize("start", range(0, 30, 10))
def test_numbers_by_seed(start: int) -> None:
    for number in range(start, start + 10):
        check(program(number))


def test_a_report_can_be_read_again() -> None:
    tally = Tally()
    for number, result in enumerate(["rewritten", "refused", "invalid", "refused"] * 5):
        tally.add(program(number), result, "a reason: with 3 numbers in moe_fuzz_3.py:12")
    assert Tally.parse(tally.text()) == tally
