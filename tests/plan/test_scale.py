"""benchmarks/scale.py: small models for many ranks, without any others."""

from typing import Any

import pytest
import torch

from benchmarks import scale
from moe_compile.parallel.costs import MESSAGE
from moe_compile.plan import hardware
from moe_compile.plan.layouts import Layout
from moe_compile.plan.memory import Setup, held
from moe_compile.plan.shapes import from_config
from moe_compile.plan.step import Cluster, experts, step

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "num_hidden_layers": 4, "num_experts_per_tok": 2,
}  # fmt: skip
MIXTRAL = SMALL | {"model_type": "mixtral", "num_local_experts": 8}
QWEN = SMALL | {"model_type": "qwen3_moe", "num_experts": 16, "moe_intermediate_size": 16, "head_dim": 8}
CLUSTER, TOKENS = Cluster(hardware.find("h100"), 8), 16


@pytest.mark.usefixtures("fresh")
def test_the_compiled_graphs_send_what_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of 3072 ranks.  With a collective in one of the two layers that the other has not, nothing is counted."""
    shape, layout = from_config(MIXTRAL), Layout(8, 1, 8, 384)
    graphs: list[Any] = []
    count = scale.count
    monkeypatch.setattr(scale, "count", lambda found, *rest: graphs.extend(found) or count(found, *rest))
    with scale.ranks(3072):
        found = scale.compile_step(MIXTRAL, shape, layout, TOKENS)
        planned = step(shape, layout, CLUSTER, Setup(TOKENS, TOKENS))
        message = experts(shape, layout, TOKENS).put(MESSAGE)  # there is none in a backward
        assert found.bytes_sent == planned.exchange_sent - 4 * message
        assert found.collectives == 4 * 5 and found.host_reads == planned.host_reads == 4
        node = next(n for n in graphs[0].graph.nodes if "all_to_all_single" in str(n.target))
        node.target = torch.ops.aten.alias.default
        with pytest.raises(RuntimeError, match="not alike"):
            count(graphs, shape, layout, TOKENS, 0.0)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("ep", [4, 1])
def test_weights_are_gathered_as_the_plan_says(ep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts split over "edp": two weights a layer, gathered forward and backward; their gradients are scattered."""
    shape, layout = from_config(MIXTRAL), Layout(ep, 1, 16, 192, True)
    whole = Layout(ep, 1, 16, 192)
    with scale.ranks(3072):
        found = scale.compile_step(MIXTRAL, shape, layout, TOKENS)
        planned, copied = (step(shape, x, CLUSTER, Setup(TOKENS, TOKENS)) for x in (layout, whole))
    assert found.weights_sent == scale.weights(shape, layout) == planned.fsdp_sent - copied.fsdp_sent > 0
    assert found.gathers == 4 * 2 * 3 and found.host_reads == planned.host_reads == (4 if ep > 1 else 0)
    message = experts(shape, layout, TOKENS).put(MESSAGE)
    assert found.bytes_sent == planned.exchange_sent - 4 * message
    with scale.ranks(3072), pytest.raises(RuntimeError, match="not counted"):
        monkeypatch.setattr(scale, "GATHERS", ())
        scale.compile_step(MIXTRAL, shape, layout, TOKENS)


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize(("ep", "dp_shard", "replicas"), [(8, 16, 192), (4, 64, 1), (2, 8, 1), (3, 6, 2)])
def test_every_rank_holds_what_the_plan_says(ep: int, dp_shard: int, replicas: int, splits: bool) -> None:
    shape, layout = from_config(MIXTRAL), Layout(ep, 1, dp_shard, replicas, splits)
    with scale.ranks(layout.ranks):
        mesh = scale.mesh_of(layout, True)
        model = scale.split(scale.build(MIXTRAL, torch.float32), layout, mesh)
        every = scale.held_by_ranks(model, mesh)
    assert len(every) == dp_shard
    dense, mine = held(shape, layout)
    norms = 9 * 32  # FSDP rounds each parameter up to whole rows
    assert dense + mine <= every[0] <= dense + mine + norms + 64 * 32
    assert min(every) <= dense + mine
    if 8 % ep == 0:
        assert sum(every) == shape.dense_parameters + dp_shard * mine


@pytest.mark.usefixtures("fresh")
def test_what_is_recommended_is_compiled() -> None:
    """A model so small that experts stay whole."""
    found = scale.measure("small", QWEN, 16, CLUSTER, Setup(TOKENS, TOKENS))
    assert found.fits and found.held_most >= found.held_planned
    assert (found.ranks, found.layout) == (16, "ep=1, dp_shard=1, dp_replicate=16") and found.graphs.bytes_sent == 0
