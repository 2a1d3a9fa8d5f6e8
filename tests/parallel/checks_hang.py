"""A rank whose peer does not come: run by test_hang.py, apart from the checks that have to end well."""

import datetime
import time

import torch
import torch.distributed as dist

import moe_compile
from tests.parallel.checks import stacked
from tests.parallel.ranks import Ranks
from tests.tiny import D, compiled

LIMIT_S = 3


def one_rank_is_missing(ranks: Ranks) -> None:
    """The first call is of both ranks, the second of one alone."""
    mesh = moe_compile.build_mesh()
    call = compiled(moe_compile.parallelize(stacked(), mesh), "eager", fullgraph=True, strategy="alltoall")
    call(torch.randn(6, D))
    for group in (mesh["ep"].get_group(), dist.group.WORLD):
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=LIMIT_S), group)
    if ranks.rank:
        time.sleep(10 * LIMIT_S)
    else:
        call(torch.randn(6, D))
