"""Every check of checks_files.py, on the world sizes that it is listed for."""

import pytest

from tests.parallel import checks_files, ranks

pytest.importorskip("transformers")

CHECKS = {size: [check.__name__ for check in found] for size, found in checks_files.CHECKS.items()}


@pytest.mark.parametrize("group", ranks.groups(CHECKS), ids=ranks.name_of)
def test_files(group: tuple[int, list[str]]) -> None:
    wrong = ranks.faults(ranks.run(*group, checks_files.__name__))
    assert not wrong, wrong
