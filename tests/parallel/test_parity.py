"""Every check of checks.py and strategies.py, on the world sizes that it is listed for."""

import functools

import pytest

from tests.parallel import checks, ranks, strategies

CHECKS = {
    size: [check.__name__ for module in (checks, strategies) for check in module.CHECKS.get(size, [])]
    for size in sorted(checks.CHECKS | strategies.CHECKS)
}
CASES = [(size, name) for size, names in CHECKS.items() for name in names]


@functools.cache
def results(size: int) -> dict[str, str]:
    return ranks.run(size, CHECKS[size])


@pytest.mark.parametrize(("size", "name"), CASES)
def test_parity(size: int, name: str) -> None:
    error = results(size)[name]
    assert not error, error
