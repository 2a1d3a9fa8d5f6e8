"""Random programs: whatever is rewritten has the numbers of what was written.  The long run: `python -m tests.fuzz`."""

from hypothesis import HealthCheck, given, settings

from tests.fuzz.check import check
from tests.fuzz.grammar import Parts, programs


@given(programs())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=False)
def test_numbers(parts: Parts) -> None:
    check(parts)
