"""Every check of checks.py, strategies.py and checks_flat.py, on the world sizes that it is listed for."""

import pytest

from tests.parallel import checks, checks_flat, ranks, strategies

CHECKS = {
    size: [check.__name__ for module in (checks, strategies, checks_flat) for check in module.CHECKS.get(size, [])]
    for size in sorted(checks.CHECKS | strategies.CHECKS)
}


@pytest.mark.parametrize("group", ranks.groups(CHECKS, most=12), ids=ranks.name_of)
def test_parity(group: tuple[int, list[str]]) -> None:
    wrong = ranks.faults(ranks.run(*group))
    assert not wrong, wrong
