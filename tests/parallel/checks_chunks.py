"""What holds on several ranks where tokens travel to their experts in chunks."""

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import moe_compile
from tests.parallel import checks, checks_tp
from tests.parallel.checks import (
    FOUR_IDS,
    Batches,
    Biased,
    Fixed,
    Four,
    Switched,
    agree,
    listed,
    parity,
    stacked,
    tokens,
)
from tests.parallel.checks_edp import SPLIT
from tests.parallel.ranks import Ranks
from tests.parallel.strategies import AUTOGRAD, Every, traffic, without
from tests.tiny import Block, D, Experts, Net, compiled, graphs, regions

FAST: dict[str, Any] = {"numerics": "fast", "inner": "aot_eager"}
EAGER: dict[str, Any] = {"numerics": "fast"}


def steps(ranks: Ranks) -> None:
    """Two and three chunks of batches that they do not divide; a rank without tokens; fewer tokens than chunks."""
    parity(ranks, stacked(), tokens(ranks, [7, 5, 8, 11]), chunks=2, **FAST)
    if ranks.size == 2:
        parity(ranks, listed(), tokens(ranks, [5, 0]), steps=1, chunks=3, **EAGER)
    parity(ranks, stacked(), tokens(ranks, [2, 1, 0, 1]), steps=1, chunks=3, **EAGER)


def by_each_way(ranks: Ranks) -> None:
    for strategy in ("dedup", "allgather"):
        sizes = [7, 4, 1, 6] if strategy == "dedup" else [7]
        parity(ranks, stacked(), tokens(ranks, sizes), expect=strategy, steps=1, chunks=2, **FAST)


def bodies(ranks: Ranks) -> None:
    """Biases, what all experts share, routing weights before the last product."""
    model = Net(1, lambda: Block(Biased(), num_experts=checks.E))
    parity(ranks, model, tokens(ranks, [7, 5]), steps=1, chunks=2, **EAGER)


def inductor(ranks: Ranks) -> None:
    parity(ranks, stacked(), tokens(ranks, [7, 5]), steps=1, numerics="fast", inner="inductor", chunks=2)


def checkpointed(ranks: Ranks) -> None:
    model = Net(1, lambda: checks.Checkpointed(Experts(checks.E), num_experts=checks.E))
    parity(ranks, model, tokens(ranks, [7, 5]), steps=1, chunks=2, **FAST)


def skewed(ranks: Ranks) -> None:
    """Ids of no expert, in some chunks alone; all tokens of a chunk to one expert; an expert twice."""
    E = checks.E
    ids = [
        torch.tensor([[0, 99], [-3, 2], [E, -1], [E - 1, 1], [0, 0]]),
        torch.tensor([[E - 1, E - 1], [E - 1, 0], [0, 0], [-1, -1], [-1, E]]),
    ]
    model = Fixed()
    model.experts = Every(E)
    batches: Batches = [(torch.randn(5, D), ids[r % 2]) for r in range(ranks.size)]
    parity(ranks, model, batches, lambda m, x, i: m(x, i).square().sum(), steps=1, chunks=3, **EAGER)


def sizes_that_vary(ranks: Ranks) -> None:
    """One graph for batches of all sizes, but the smallest."""
    model = stacked()
    reference = copy.deepcopy(model)
    moe_compile.parallelize(model, moe_compile.build_mesh())
    call = compiled(model, fullgraph=True, strategy="alltoall", chunks=3, numerics="fast")
    before = graphs()
    for size in (8, 9, 31):
        assert agree(ranks, model, call, reference, tokens(ranks, [size, size + 3])), size
    assert graphs() - before == 2, graphs() - before  # for the first size, and for all others
    for size in (4, 0):
        assert agree(ranks, model, call, reference, tokens(ranks, [size, size + 1])), size


def exact(ranks: Ranks) -> None:
    """Without gradients of experts chunks do not show in any bit; with them they would, and are refused."""
    model = stacked()
    moe_compile.parallelize(model, moe_compile.build_mesh())
    x = torch.randn(9 - ranks.rank, D)
    with torch.no_grad(), regions() as found:
        whole = compiled(model, "aot_eager", fullgraph=True, strategy="alltoall")(x)
        for chunks in (2, 3):
            part = compiled(model, fullgraph=True, strategy="alltoall", chunks=chunks)(x)
            assert torch.equal(whole, part)
    assert [r.chunks for r in found] == [1, 2, 3]
    try:
        compiled(model, fullgraph=True, strategy="alltoall", chunks=2)(x)
    except RuntimeError as error:  # Dynamo's, around ours
        assert "MoeCompileError: option chunks is 2" in str(error) and "it needs numerics 'fast'" in str(error)
    else:
        raise AssertionError("not refused")
    for parameter in model.layers[0].experts.parameters():
        parameter.requires_grad_(False)
    results = []
    for chunks in (1, 2):
        leaf = x.clone().requires_grad_()
        call = compiled(model, "aot_eager", fullgraph=True, strategy="alltoall", chunks=chunks)
        call(leaf).square().sum().backward()
        results.append(leaf.grad)
    assert results[0] is not None and results[1] is not None and torch.equal(*results)


# -- beside other ways to split -------------------------------------------------------------


def chunked(model: nn.Module) -> Any:
    """Several graphs, as FSDP's hooks want it; the regions in two chunks."""
    return compiled(model, strategy="alltoall", chunks=2, **EAGER)


def of_shared_tokens(ranks: Ranks) -> None:
    """A rank's part of what it shares along "tp", in chunks: some are empty, and some of the part is nobody's."""
    net = functools.partial(checks_tp.split, ranks, steps=1, chunks=2, **EAGER)
    net(checks_tp.model(), tokens(ranks, [9, 1]))
    torch._dynamo.reset()
    net(checks_tp.model(1, lambda: Block(Biased(), num_experts=checks.E)), tokens(ranks, [5, 8]), expect="dedup")


def with_fsdp(ranks: Ranks) -> None:
    """Dense parameters under FSDP; experts beside them whole, then split over "edp", then with shared tokens."""
    batches = tokens(ranks, [5, 8, 3, 0])
    parity(ranks, stacked(), batches, dp_shard=ranks.size, run=chunked, chunks=2, steps=1)
    torch._dynamo.reset()
    parity(ranks, stacked(), batches, run=chunked, chunks=2, steps=1, **SPLIT)
    torch._dynamo.reset()
    shared = {"ep": 2, "dp_shard": 2, "tp": 2, "plan": checks_tp.PLAN}
    parity(ranks, checks_tp.model(), tokens(ranks, [5, 8]), run=chunked, chunks=2, steps=1, **shared)


# -- what is sent ---------------------------------------------------------------------------


def report_of(ranks: Ranks, call: Any, x: Tensor, ids: Tensor, strategy: str) -> tuple[int, int]:
    """(bytes, host reads) of a call, which have to be those of the report."""
    with torch.no_grad():
        with regions() as found:
            call(x, ids)
        seen = traffic(ranks, functools.partial(call, x, ids))
    estimate = next(e for e in found[0].estimates if e.strategy == strategy)
    assert seen == (estimate.bytes_sent, estimate.host_reads), (seen, estimate)
    return seen


def every_set() -> Tensor:
    """Each set of two experts once: routing as balanced as the estimates take it to be."""
    return torch.tensor(list(itertools.combinations(range(checks.E), 2)))


def sent(ranks: Ranks) -> None:
    """As many rows travel; there is a line for each chunk; the host reads once.  The report knows it."""
    ids = every_set()
    x = torch.randn(len(ids), D)
    ways = (("alltoall", "exact"), ("dedup", "fast"), ("allgather", "fast"))
    for strategy, numerics in ways if ranks.size == 2 else ways[:1]:
        found = []
        torch._dynamo.reset()
        for chunks in (1, 2, 3) if strategy == "alltoall" else (1, 2):
            model = moe_compile.parallelize(copy.deepcopy(Fixed()), moe_compile.build_mesh())
            call = compiled(model, fullgraph=True, strategy=strategy, numerics=numerics, chunks=chunks)
            found.append(report_of(ranks, call, x, ids, strategy))
        most = -(-checks.E // ranks.size)
        line = 4 * (ranks.size - 1) * (most + 2)
        assert [n - i * line for i, (n, _) in enumerate(found)] == [found[0][0]] * len(found), found
        assert {reads for _, reads in found} == {int(strategy != "allgather")}


def sent_beside_others(ranks: Ranks) -> None:
    """The gathering of weights over "edp", of results over "tp": what it sends is in the report."""
    ids = every_set()
    for degrees, experts in (({"ep": 2, "dp_shard": 4}, "sharded"), ({"ep": 2, "tp": 2}, "replicated")):
        mesh = moe_compile.build_mesh(**degrees)
        mine = ids.repeat(degrees.get("tp", 1), 1)  # so that each part of it is balanced
        torch.manual_seed(0)
        x = torch.randn(len(mine), D)
        for chunks in (1, 2):
            torch._dynamo.reset()
            model = moe_compile.parallelize(Fixed(), mesh, experts=experts)
            call = compiled(model, strategy="alltoall", chunks=chunks)
            group = Ranks(mesh["ep"].get_local_rank(), 2)
            report_of(group, call, x, mine, "alltoall")


# -- what is noticed ------------------------------------------------------------------------


def numbers_that_differ(ranks: Ranks) -> None:
    """Ranks that were given different numbers of chunks hear of it, all of them, and go on."""
    x = torch.randn(9, D)
    cases = (((1, 2), "alltoall"), ((2, 1), "allgather")) if ranks.size == 2 else (((3, 2, 2, 1), "dedup"),)
    for numbers, strategy in cases:
        torch._dynamo.reset()
        model = moe_compile.parallelize(stacked(), moe_compile.build_mesh())
        mine = [numbers[r % len(numbers)] for r in range(ranks.size)]
        settings: dict[str, Any] = {"fullgraph": True, "strategy": strategy, **EAGER}
        call = compiled(model, chunks=mine[ranks.rank], **settings)
        differ = [r for r, n in enumerate(mine) if n != mine[ranks.rank]]
        for _ in range(2):
            try:
                call(x)
            except RuntimeError as error:
                assert f"something else on ranks {differ} of" in str(error), error
                assert "numbers of chunks" in str(error), error
            else:
                raise AssertionError(f"{numbers} chunks were mixed")
    assert compiled(model, chunks=2, **settings)(x).shape == x.shape


def sabotage(ranks: Ranks) -> None:
    """Without any of the collectives of a chunk nothing is right: of ranks alone, and beside other ways to split."""
    meshes: list[tuple[dict[str, int], str]] = [({}, "replicated")]
    if ranks.size == 4:
        meshes = [({"ep": 2, "tp": 2}, "replicated"), ({"ep": 2, "dp_shard": 4}, "sharded")]
    loss: Callable[..., Tensor] = lambda m, x, ids: m(x, ids).square().sum()  # noqa: E731
    for degrees, experts in meshes:
        torch._dynamo.reset()
        tp = degrees.get("tp", 1)
        batches: Batches = [(torch.randn(6 * tp, D), FOUR_IDS.repeat(2 * tp, 1)) for _ in range(ranks.size // tp)]
        batches = [b for b in batches for _ in range(tp)]
        reference = Four()
        mesh = moe_compile.build_mesh(**degrees)
        model = moe_compile.parallelize(copy.deepcopy(reference), mesh, experts=experts)
        call = compiled(model, strategy="alltoall", numerics="fast", chunks=2)
        switched, rank = Switched(AUTOGRAD), mesh["ep"].get_local_rank()
        with switched.compiling():
            assert agree(ranks, model, call, reference, batches, loss=loss), degrees
        assert len(switched.found) == 6  # what is told, for the first chunk and the second; rows there; rows back
        for number in range(6):
            with without(switched, rank, number):
                wrong = f"{degrees} without collective {number}"
                assert not agree(ranks, model, call, reference, batches, loss=loss), wrong
        assert agree(ranks, model, call, reference, batches, loss=loss), degrees


CHECKS = {
    2: [
        steps, by_each_way, bodies, inductor, checkpointed, skewed, sizes_that_vary, exact, sent, numbers_that_differ,
        sabotage,
    ],
    4: [steps, sent, of_shared_tokens, with_fsdp, sent_beside_others, numbers_that_differ, sabotage],
}  # fmt: skip
