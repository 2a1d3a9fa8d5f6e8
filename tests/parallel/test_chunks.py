"""Every check of checks_chunks.py, on the world sizes that it is listed for."""

import pytest

from tests.parallel import checks_chunks, ranks

CHECKS = {size: [check.__name__ for check in found] for size, found in checks_chunks.CHECKS.items()}


@pytest.mark.parametrize("group", ranks.groups(CHECKS, most=6), ids=ranks.name_of)
def test_chunks(group: tuple[int, list[str]]) -> None:
    wrong = ranks.faults(ranks.run(*group, "tests.parallel.checks_chunks"))
    assert not wrong, wrong
