"""Every check of checks_fsdp.py, on the world sizes that it is listed for."""

import functools

import pytest

from tests.parallel import checks_fsdp, ranks

CASES = [(size, check.__name__) for size, found in checks_fsdp.CHECKS.items() for check in found]


@functools.cache
def results(size: int) -> dict[str, str]:
    return ranks.run(size, [check.__name__ for check in checks_fsdp.CHECKS[size]], checks_fsdp.__name__)


@pytest.mark.parametrize(("size", "name"), CASES)
def test_fsdp(size: int, name: str) -> None:
    error = results(size)[name]
    assert not error, error
