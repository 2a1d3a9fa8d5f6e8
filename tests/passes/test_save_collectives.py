"""passes/save_collectives.py: what is kept, and that a step under checkpointing repeats no collective."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import moe_compile
from moe_compile import lower
from moe_compile.passes.save_collectives import SaveCollectives
from tests.tiny import Block, D, Experts, Net, compiled

functional = torch.ops._c10d_functional
PREFER = CheckpointPolicy.PREFER_RECOMPUTE


def test_marks() -> None:
    """Results of collectives in a checkpointed region, nothing else."""
    graph = Graph()
    x = graph.placeholder("x")
    calls = (functional.all_to_all_single, functional.wait_tensor, torch.ops.aten.relu, functional.wait_tensor)
    for op, tag in zip(calls, (PREFER, PREFER, PREFER, None), strict=True):
        x = graph.call_function(op.default, (x,))
        if tag is not None:
            x.meta["recompute"] = tag
    graph.output(x)
    report = SaveCollectives()(GraphModule(torch.nn.Module(), graph))
    assert str(report) == "SaveCollectives: 1 applied, 0 refused\n  + wait_tensor_default"
    tags = [n.meta.get("recompute") for n in graph.nodes if n.op == "call_function"]
    assert tags == [PREFER, CheckpointPolicy.MUST_SAVE, PREFER, None]


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """Rank 0 of two; collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


class Checkpointed(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.usefixtures("fresh", "two_ranks")
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize(
    ("block", "skip", "again"),
    [(Block, [], False), (Checkpointed, [], False), (Checkpointed, ["save_collectives"], True)],
    ids=["not checkpointed", "checkpointed", "without the pass"],
)
def test_a_step_repeats_no_collective(
    block: type[Block], skip: list[str], again: bool, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts there, and those of all chunks but the first; rows there, rows back; then the gradients of both ways."""
    graphs: list[GraphModule] = []
    run_as_it_is = lower.boxed_nop
    monkeypatch.setattr(lower, "boxed_nop", lambda gm, inputs: graphs.append(gm) or run_as_it_is(gm, inputs))
    model = moe_compile.parallelize(Net(1, lambda: block(Experts(4), num_experts=4)), moe_compile.build_mesh(ep=2))
    call = compiled(model, "aot_eager", fullgraph=True, skip=skip, strategy="alltoall", numerics="fast", chunks=chunks)
    call(torch.randn(6, D, requires_grad=True)).sum().backward()
    calls = [sum("all_to_all_single" in str(n.target) for n in g.graph.nodes) for g in graphs]
    forward = min(chunks, 2) + 2 * chunks
    assert calls == [forward, 2 * chunks + again * forward]
