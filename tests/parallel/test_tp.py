"""Every check of checks_tp.py, on the world sizes that it is listed for."""

import pytest

from tests.parallel import checks_tp, ranks

CHECKS = {size: [check.__name__ for check in found] for size, found in checks_tp.CHECKS.items()}


@pytest.mark.parametrize("group", ranks.groups(CHECKS, 11), ids=ranks.name_of)
def test_tensor_parallel(group: tuple[int, list[str]]) -> None:
    wrong = ranks.faults(ranks.run(*group, checks_tp.__name__))
    assert not wrong, wrong
