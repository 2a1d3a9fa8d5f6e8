"""What holds on several ranks where tokens travel to their experts in chunks."""

import copy
import functools
from typing import Any

import torch

import moe_compile
from tests.parallel import checks
from tests.parallel.checks import Batches, Biased, Fixed, agree, listed, parity, stacked, tokens
from tests.parallel.ranks import Ranks
from tests.parallel.strategies import Every, traffic
from tests.tiny import Block, D, Experts, Net, compiled, graphs, regions

FAST: dict[str, Any] = {"numerics": "fast", "inner": "aot_eager"}


def steps(ranks: Ranks) -> None:
    """Two and three chunks of batches that they do not divide; a rank without tokens; fewer tokens than chunks."""
    parity(ranks, stacked(2), tokens(ranks, [7, 5, 8, 11]), chunks=2, **FAST)
    parity(ranks, listed(), tokens(ranks, [5, 0, 8, 4]), chunks=3, **FAST)
    parity(ranks, stacked(), tokens(ranks, [2, 1, 0, 1]), chunks=3, **FAST)


def by_each_way(ranks: Ranks) -> None:
    for strategy in ("dedup", "allgather"):
        sizes = [7, 4, 1, 6] if strategy == "dedup" else [7]
        parity(ranks, stacked(), tokens(ranks, sizes), expect=strategy, chunks=2, **FAST)


def bodies(ranks: Ranks) -> None:
    """Biases, what all experts share, routing weights before the last product."""
    model = Net(1, lambda: Block(Biased(), num_experts=checks.E))
    parity(ranks, model, tokens(ranks, [7, 5]), steps=1, chunks=2, **FAST)


def inductor(ranks: Ranks) -> None:
    parity(ranks, stacked(), tokens(ranks, [6, 5]), steps=2, numerics="fast", inner="inductor", chunks=2)


def checkpointed(ranks: Ranks) -> None:
    model = Net(1, lambda: checks.Checkpointed(Experts(checks.E), num_experts=checks.E))
    parity(ranks, model, tokens(ranks, [6, 5]), steps=2, chunks=2, **FAST)


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
    for chunks in (2, 3):
        parity(ranks, copy.deepcopy(model), batches, lambda m, x, i: m(x, i).square().sum(), chunks=chunks, **FAST)


def sizes_that_vary(ranks: Ranks) -> None:
    """One graph for batches of all sizes, but the smallest."""
    model = stacked()
    reference = copy.deepcopy(model)
    moe_compile.parallelize(model, moe_compile.build_mesh())
    call = compiled(model, "aot_eager", fullgraph=True, strategy="alltoall", chunks=3, numerics="fast")
    before = graphs()
    for size in (8, 9, 12, 17, 31):
        assert agree(ranks, model, call, reference, tokens(ranks, [size, size + 3])), size
    assert graphs() - before == 2, graphs() - before  # for the first size, and for all others
    for size in (5, 4, 1, 0):
        assert agree(ranks, model, call, reference, tokens(ranks, [size, size + 1])), size


def exact(ranks: Ranks) -> None:
    """Without gradients of experts chunks do not show in any bit; with them they would, and are refused."""
    model = stacked()
    moe_compile.parallelize(model, moe_compile.build_mesh())
    x = torch.randn(9 - ranks.rank, D)
    with torch.no_grad(), regions() as found:
        whole = compiled(model, "aot_eager", fullgraph=True, strategy="alltoall")(x)
        for chunks in (2, 3):
            part = compiled(model, "aot_eager", fullgraph=True, strategy="alltoall", chunks=chunks)(x)
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


def sent(ranks: Ranks) -> None:
    """As many rows travel; the message has a line for each chunk; the host reads once."""
    x, ids = torch.randn(7, D), torch.randint(0, checks.E, (7, 2))
    for strategy, numerics in (("alltoall", "exact"), ("dedup", "fast")):
        found = []
        for chunks in (1, 2, 3):
            model = moe_compile.parallelize(copy.deepcopy(Fixed()), moe_compile.build_mesh())
            call = compiled(model, "aot_eager", fullgraph=True, strategy=strategy, numerics=numerics, chunks=chunks)
            with torch.no_grad():
                call(x, ids)
                found.append(traffic(ranks, functools.partial(call, x, ids)))
        most = -(-checks.E // ranks.size)
        line = 4 * (ranks.size - 1) * (most + 2)
        assert [n - i * line for i, (n, _) in enumerate(found)] == [found[0][0]] * 3, found
        assert [reads for _, reads in found] == [1, 1, 1]


CHECKS = {
    2: [steps, by_each_way, bodies, inductor, checkpointed, skewed, sizes_that_vary, exact, sent],
    4: [steps, sent],
}
