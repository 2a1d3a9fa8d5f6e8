"""Every check of checks.py, strategies.py, checks_flat.py and checks_together.py, on the world sizes that it is listed
for."""

import pytest

from tests.parallel import checks, checks_flat, checks_together, ranks, strategies

MODULES = (checks, strategies, checks_flat, checks_together)
CHECKS = {
    size: [check.__name__ for module in MODULES for check in module.CHECKS.get(size, [])]
    for size in sorted(checks.CHECKS | strategies.CHECKS)
}


@pytest.mark.parametrize("group", ranks.groups(CHECKS, most=12), ids=ranks.name_of)
def test_parity(group: tuple[int, list[str]]) -> None:
    wrong = ranks.faults(ranks.run(*group))
    assert not wrong, wrong
