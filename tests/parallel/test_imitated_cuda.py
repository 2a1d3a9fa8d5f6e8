"""Every check of checks_cuda.py: graphs of several ranks for GPUs, run without them."""

import pytest

from tests.parallel import ranks

pytest.importorskip("triton", reason="triton has no build for this platform")


def test_graphs_for_gpus() -> None:
    from tests.parallel import checks_cuda

    names = [check.__name__ for check in checks_cuda.CHECKS[2]]
    wrong = ranks.faults(ranks.run(2, names, "tests.parallel.checks_cuda"))
    assert not wrong, wrong
