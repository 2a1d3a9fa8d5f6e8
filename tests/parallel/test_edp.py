"""Every check of checks_edp.py, on the world sizes that it is listed for."""

import pytest

from tests.parallel import checks_edp, ranks

CHECKS = {size: [check.__name__ for check in found] for size, found in checks_edp.CHECKS.items()}


@pytest.mark.parametrize("group", ranks.groups(CHECKS, 7), ids=ranks.name_of)
def test_edp(group: tuple[int, list[str]]) -> None:
    wrong = ranks.faults(ranks.run(*group, checks_edp.__name__))
    assert not wrong, wrong
