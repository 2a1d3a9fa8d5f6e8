"""passes/regather_weights.py: what is computed again, and what a step with split experts gathers and keeps."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import moe_compile
from moe_compile import lower
from moe_compile.parallel.expert_shards import JOIN_SHARDS, join_shards, padded, part, split_dim
from moe_compile.passes.regather_weights import RegatherWeights
from tests.tiny import FF, Block, D, E, Experts, Net

functional = torch.ops._c10d_functional
AGAIN, KEPT = CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.MUST_SAVE


@pytest.mark.parametrize(("again", "tags"), [(True, [AGAIN] * 5), (False, [None] * 3 + [KEPT, None])])
def test_marks(again: bool, tags: list[Any]) -> None:
    """All that a joined weight is made of, views of it, and nothing else."""
    graph = Graph()
    shard = graph.placeholder("shard")
    flat = graph.call_function(torch.ops.aten.relu.default, (shard,))
    flat = graph.call_function(functional.all_gather_into_tensor.default, (flat, 2, "group"))
    flat = graph.call_function(functional.wait_tensor.default, (flat,))
    weight = graph.call_function(JOIN_SHARDS, (flat, shard, 1, 4, 2, torch.float32, again, "group"))
    other = graph.call_function(functional.all_gather_into_tensor.default, (shard, 2, "group"))
    turned = graph.call_function(torch.ops.aten.transpose.int, (weight, 1, 2))
    graph.output((graph.call_function(torch.ops.aten.relu.default, (turned,)), other))
    report = RegatherWeights()(GraphModule(torch.nn.Module(), graph))
    assert str(report) == "RegatherWeights: 1 applied, 0 refused\n  + join_shards_default"
    assert [n.meta.get("recompute") for n in graph.nodes if n.op == "call_function"] == [*tags[:4], None, tags[4], None]


@pytest.mark.parametrize("shape", [(3, 4, 6), (2, 5, 7), (1, 1, 3), (4, 9)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_parts_make_the_whole(shape: tuple[int, ...], ranks: int) -> None:
    """As DTensor splits them; what is joined is what was split, whatever stands in the padding."""
    whole = torch.randn(shape)
    dim = split_dim(shape, ranks)
    assert dim is not None
    parts = [whole.narrow(dim, p.start, p.stop - p.start) for p in (part(shape[dim], ranks, r) for r in range(ranks))]
    chunks = whole.chunk(ranks, dim)
    assert all(torch.equal(a, b) for a, b in zip(parts, chunks, strict=False))
    assert all(p.shape[dim] == 0 for p in parts[len(chunks) :])
    most = parts[0].shape[dim]
    flat = torch.cat([padded(p, dim, most) for p in parts])
    assert torch.equal(join_shards(flat, parts[0], dim, shape[dim], ranks, torch.float32, True, ""), whole)


def test_which_dimension() -> None:
    assert split_dim((8, 6, 4), 2) == 1  # the first that is divided
    assert split_dim((8, 5, 4), 2) == 2
    assert split_dim((8, 5, 7), 2) == 2  # else the longest
    assert split_dim((8,), 2) is None  # a number an expert


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """Rank 0 of two; collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


class Turned(Experts):
    """Weights [E, in, out], transposed and cast for use."""

    def __init__(self) -> None:
        super().__init__()
        self.w13 = torch.nn.Parameter(torch.randn(E, D, 2 * FF))
        self.w2 = torch.nn.Parameter(torch.randn(E, FF, D))

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        up, down = self.w13.to(torch.bfloat16).transpose(1, 2), self.w2.to(torch.bfloat16).transpose(1, 2)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            gate, h = torch.nn.functional.linear(x[t].bfloat16(), up[e]).chunk(2, -1)
            y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * h, down[e])
            out.index_add_(0, t, (y * weights[t, k, None]).float())
        return out


class TurnedBlock(Block):
    def __init__(self, experts: torch.nn.Module) -> None:
        super().__init__(Turned())


class Checkpointed(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.usefixtures("fresh", "two_ranks")
@pytest.mark.parametrize(
    ("block", "skip", "reshard", "gathers"),
    [
        (Block, [], None, [2, 2]),
        (TurnedBlock, [], None, [2, 2]),
        (Block, [], False, [2, 0]),
        (Block, ["regather_weights"], None, [2, 0]),
        (Checkpointed, [], None, [2, 2]),
        (Checkpointed, [], False, [2, 0]),
    ],
)
def test_a_step_keeps_shards(
    block: type[Block], skip: list[str], reshard: bool | None, gathers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each weight is gathered for the forward, and again for the backward, which gets none whole from the forward."""
    graphs: list[GraphModule] = []
    nop = lower.boxed_nop

    def record(gm: GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return nop(gm, inputs)

    monkeypatch.setattr(lower, "boxed_nop", record)
    net = Net(1, lambda: block(Experts()))
    mesh = moe_compile.build_mesh(ep=1, dp_shard=2)
    moe_compile.parallelize(net, mesh, experts="sharded", reshard_after_forward=reshard)
    layer = net.layers[0]
    assert layer.experts.w13.to_local().numel() == E * FF * D  # a half
    layer.compile(backend="moe_ep", fullgraph=True, options={"inner": "aot_eager", "skip": skip})
    net(torch.randn(6, D, requires_grad=True)).sum().backward()
    found = [
        [n for n in gm.graph.find_nodes(op="call_function", target=functional.all_gather_into_tensor.default)]
        for gm in graphs
    ]
    assert [len(f) for f in found] == gathers
    outputs: Any = graphs[0].graph.output_node().args[0]
    sizes = [n.meta["val"].numel() for n in outputs if isinstance(getattr(n, "meta", {}).get("val"), torch.Tensor)]
    assert (2 * E * FF * D in sizes) == (gathers[1] == 0), sizes  # the larger weight, whole
    scattered = graphs[1].graph.find_nodes(op="call_function", target=functional.reduce_scatter_tensor.default)
    assert len(scattered) == 2
