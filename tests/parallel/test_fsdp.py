"""Every check of checks_fsdp.py, on the world sizes that it is listed for."""

import pytest

from tests.parallel import checks_fsdp, ranks

CHECKS = {size: [check.__name__ for check in found] for size, found in checks_fsdp.CHECKS.items()}


@pytest.mark.parametrize("group", ranks.groups(CHECKS, most=12), ids=ranks.name_of)
def test_fsdp(group: tuple[int, list[str]]) -> None:
    wrong = ranks.faults(ranks.run(*group, checks_fsdp.__name__))
    assert not wrong, wrong
