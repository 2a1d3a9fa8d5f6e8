"""A hang cannot happen silently: where a rank does not come, the others end with an error when their time is out."""

import time

from tests.parallel import ranks


def test_a_rank_that_does_not_come_is_an_error() -> None:
    start = time.monotonic()
    found = ranks.run(2, ["one_rank_is_missing"], "tests.parallel.checks_hang")["one_rank_is_missing"]
    assert found.startswith("rank 0:") and "imed out" in found and "wait_tensor" in found, found
    assert time.monotonic() - start < ranks.LIMIT_S
