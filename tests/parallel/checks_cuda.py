"""What Inductor makes of several ranks' graphs for GPUs, run without them (tests/imitated_cuda.py)."""

from collections.abc import Callable

from tests import imitated_cuda
from tests.parallel import checks, checks_chunks, checks_edp, checks_fsdp, checks_tp, strategies
from tests.parallel.ranks import Ranks

Check = Callable[[Ranks], None]


def on_gpus(name: str, check: Check) -> Check:
    def run(ranks: Ranks) -> None:
        if not imitated_cuda.sources:  # the first of this process
            imitated_cuda.install()
        check(ranks)
        assert any("moe_ep" in source for source in imitated_cuda.sources)
        del imitated_cuda.sources[1:]

    run.__name__ = name
    return run


experts = on_gpus("experts", checks.inductor)
by_each_way = on_gpus("by_each_way", strategies.inductor_by_each_way)
in_chunks = on_gpus("in_chunks", checks_chunks.inductor)
copies_of_experts = on_gpus("copies_of_experts", checks_edp.inductor)
beside_fsdp = on_gpus("beside_fsdp", checks_fsdp.inductor)
beside_tp = on_gpus("beside_tp", checks_tp.inductor)

CHECKS = {2: [experts, by_each_way, in_chunks, copies_of_experts, beside_fsdp, beside_tp]}
