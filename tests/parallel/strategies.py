"""Checks of the strategies by which experts meet tokens; most of those of "alltoall" are in checks.py."""

import copy
import functools
import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import moe_compile
from moe_compile.cost import short
from moe_compile.parallel import costs
from moe_compile.report import Report
from tests.parallel import checks
from tests.parallel.checks import Batches, Biased, Fixed, Four, Switched, agree, listed, parity, stacked, tokens
from tests.parallel.ranks import Ranks
from tests.tiny import Block, D, Experts, Net, compiled, regions

WAYS = (("dedup", "fast"), ("allgather", "fast"), ("allgather", "exact"))
ALL = (*WAYS, ("alltoall", "exact"), ("gather_weights", "exact"))


def way(strategy: str, numerics: str) -> dict[str, str]:
    return {"strategy": strategy, "numerics": numerics, "expect": strategy}


def steps_of_each_way(ranks: Ranks) -> None:
    for one in WAYS:
        torch.manual_seed(0)
        parity(ranks, stacked(), tokens(ranks, [6, 4] if one[0] == "dedup" else None), **way(*one))


def lists_by_each_way(ranks: Ranks) -> None:
    for one in WAYS if ranks.size == 2 else WAYS[:2]:
        parity(ranks, listed(), tokens(ranks, [3, 0, 8, 5] if one[0] == "dedup" else None), steps=1, **way(*one))


def mixtral_by_each_way(ranks: Ranks) -> None:
    batches: Batches = [(torch.randint(0, 32, (2, 5)),) for _ in range(ranks.size)]
    for one in WAYS[:2]:
        model = checks.mixtral("eager", num_hidden_layers=1)
        parity(ranks, model, batches, checks.language, steps=1, **way(*one))


def bodies_by_each_way(ranks: Ranks) -> None:
    """Biases, what all experts share, routing weights before the last product, and without gradients."""
    for one in WAYS:
        torch.manual_seed(0)
        model = parity(
            ranks, Net(1, lambda: Block(Biased(), num_experts=checks.E)), tokens(ranks), steps=1, **way(*one)
        )
        with torch.no_grad():
            assert compiled(model, **{k: v for k, v in way(*one).items() if k != "expect"})(tokens(ranks)[0][0]).shape


def inductor_by_each_way(ranks: Ranks) -> None:
    for one in WAYS[:2]:
        parity(ranks, stacked(), tokens(ranks), steps=1, inner="inductor", **way(*one))


def few_experts_a_rank(ranks: Ranks) -> None:
    """Many ranks of one or two experts each, more ranks than a token has experts; by "alltoall" in checks_together.py."""
    for one in WAYS[:2]:
        ids = [torch.tensor([[r, (3 * r + 1) % checks.E], [0, checks.E - 1]]) for r in range(ranks.size)]
        batches: Batches = [(torch.randn(2, D), i) for i in ids]
        parity(ranks, Fixed(), batches, lambda m, x, ids: m(x, ids).square().sum(), steps=1, **way(*one))


def sizes_by_each_way(ranks: Ranks) -> None:
    """One compiled function, batches of other sizes in every call; a checkpointed layer runs its forward twice."""
    for one in WAYS[:2]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Net(1, lambda: checks.Checkpointed(Experts(checks.E), num_experts=checks.E))
        reference = copy.deepcopy(model)
        moe_compile.parallelize(model, moe_compile.build_mesh())
        settings = {k: v for k, v in way(*one).items() if k != "expect"}
        call = compiled(model, "aot_eager", fullgraph=True, **settings)
        for size in (6, 9, 4):
            sizes = [size, size + 3] if one[0] == "dedup" else [size]
            batches: Batches = [(torch.randn(sizes[r % len(sizes)], D),) for r in range(ranks.size)]
            assert agree(ranks, model, call, reference, batches), (one, size)


class Every(Experts):
    """A loop over all experts, which leaves out ids that none has."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            gate, up = nn.functional.linear(x[t], self.w13[e]).chunk(2, -1)
            y = nn.functional.linear(nn.functional.silu(gate) * up, self.w2[e])
            out.index_add_(0, t, y * weights[t, k, None])
        return out


def ids_by_each_way(ranks: Ranks) -> None:
    """One compiled function: ids of no expert, also those that 32 bits cannot tell from one; an expert twice; all
    tokens to one expert of another rank; a batch without tokens; transposed tokens."""
    E = checks.E
    cases = [
        torch.tensor([[0, 99], [-3, 2], [E, -1], [E - 1, 1], [2**32 + 1, -(2**32)]]),
        torch.full((5, 2), E - 1 if ranks.rank == 0 else 0),
        torch.tensor([[r % E, (r + 1) % E] for r in range(5)]),
        torch.tensor([[1, 1], [0, 0], [E - 1, E - 1], [-1, -1], [0, 1]]),
        torch.empty(0, 2, dtype=torch.int64),
    ]
    if ranks.rank:
        cases[0] = cases[0].flip(0)

    def loss(model: Any, x: Tensor, ids: Tensor) -> Tensor:
        return (model(x.t(), ids).square() * torch.arange(1.0, 1 + len(ids)).view(-1, 1)).sum()

    for one in WAYS:
        torch.manual_seed(0)
        model = Fixed()
        model.experts = Every(E)
        reference = copy.deepcopy(model)
        moe_compile.parallelize(model, moe_compile.build_mesh())
        settings = {k: v for k, v in way(*one).items() if k != "expect"}
        call = compiled(model, fullgraph=True, **settings)
        with regions() as found:
            for case in cases:
                every: list[Any] = [None] * ranks.size
                dist.all_gather_object(every, case)
                batches = [(torch.randn(D, len(case)), ids) for ids in every]
                assert agree(ranks, model, call, reference, batches, loss=loss), (one, case)
        assert {r.strategy for r in found} == {one[0]}


# -- what is sent ---------------------------------------------------------------------------


SIZES = {"float": 4, "double": 8, "int": 4, "long int": 8}


def traffic(ranks: Ranks, run: Callable[[], Any]) -> tuple[int, int]:
    """(bytes that this rank sends to others, reads of splits by the host), as the profiler saw it.

    `ranks`: of the group of the all-to-alls; other collectives name the number of theirs.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        run()
    sent, reads, calls, below = 0, 0, 0, 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        space, _, name = event.name().partition("::")
        reads += name == "check_messages"
        below += space == "c10d"  # what a process group is asked for
        if space.startswith("_c10d_functional") and name != "wait_tensor":
            shape = event.shapes()[0]
            match name:
                case "all_to_all_single":
                    others = shape[0] - event.concrete_inputs()[2][ranks.rank]
                case "all_gather_into_tensor":
                    others = shape[0] * (event.concrete_inputs()[1] - 1)
                case "reduce_scatter_tensor":
                    size = event.concrete_inputs()[2]
                    others = shape[0] // size * (size - 1)
                case _:
                    raise AssertionError(name)
            sent += others * math.prod(shape[1:]) * SIZES[event.dtypes()[0]]
            calls += 1
    assert calls == below, "a collective was counted twice, or not at all"
    return sent, reads


def counted(ranks: Ranks) -> None:
    """What runs sends as many bytes as the report says, where every set of experts is chosen equally often."""
    ids = torch.tensor(list(itertools.combinations(range(checks.E), 2)))
    x = torch.randn(len(ids), D)
    for one in ALL if ranks.size == 2 else ALL[:2]:
        model = moe_compile.parallelize(Fixed(), moe_compile.build_mesh())
        settings = {k: v for k, v in way(*one).items() if k != "expect"}
        call = compiled(model, fullgraph=True, **settings)
        with regions() as found, torch.no_grad():
            call(x, ids)
        estimate = next(e for e in found[0].estimates if e.strategy == one[0])
        with torch.no_grad():
            sent, reads = traffic(ranks, functools.partial(call, x, ids))
        assert sent > 0 and (estimate.bytes_sent, estimate.host_reads) == (sent, reads), (one, estimate, sent, reads)
        text = str(Report(found))
        assert f"    * {one[0]}: sends {short(sent)}B, {reads} host read" in text, text


# -- one decision ---------------------------------------------------------------------------


def chosen_alike(ranks: Ranks) -> None:
    """Ranks whose batches would have them choose differently do as the first; every choice is right."""
    wide = costs.Machine(within=1.0, between=1.0, latency_us=0.0, host_read_us=0.0, gflops=1e9, memory=1e9)
    number = checks.E + 3  # of experts, as nothing before: the decision is kept as long as the job lives
    for make, first, other, expect in (
        (lambda: Net(1, lambda: Block(Experts(number), num_experts=number)), 2, 900, "alltoall"),
        (listed, 900, 2, "gather_weights"),
    ):
        sizes = [first, *[other] * (ranks.size - 1)]
        with mock.patch.dict(costs.MACHINES, cpu=wide):
            mine = parity(ranks, make(), tokens(ranks, sizes), steps=1, expect=expect, strategy="auto")
            torch._dynamo.reset()
            with regions() as found:
                compiled(mine, strategy="auto")(tokens(ranks, sizes)[ranks.rank][0])
        own = min((e for e in found[0].estimates if not e.why_not), key=lambda e: e.time_us).strategy
        assert (own == expect) == (ranks.rank == 0), (own, expect)
        assert found[0].strategy == expect


def fast_sums(ranks: Ranks) -> None:
    """With numerics "fast" and many experts per token, "auto" sends a token once to a rank."""
    wide = costs.Machine(within=1.0, between=1.0, latency_us=0.0, host_read_us=0.0, gflops=1e9, memory=1e9)
    model = Net(1, lambda: Block(Experts(checks.E + 5), top_k=checks.E, num_experts=checks.E + 5))
    with mock.patch.dict(costs.MACHINES, cpu=wide):
        parity(ranks, model, tokens(ranks), steps=1, expect="dedup", strategy="auto", numerics="fast")


def batches_of_two_sizes(ranks: Ranks) -> None:
    """Every rank hears of it, before a collective that would not end, and goes on with others."""
    for numerics in ("exact", "fast"):
        torch.manual_seed(0)
        model = stacked()
        reference = copy.deepcopy(model)
        moe_compile.parallelize(model, moe_compile.build_mesh())
        call = compiled(model, fullgraph=True, strategy="allgather", numerics=numerics)
        for size in (4 + ranks.rank, 4 * ranks.rank):
            try:
                call(torch.randn(size, D))
            except RuntimeError as error:
                assert "tokens: strategy 'allgather' needs batches of one size" in str(error), error
            else:
                raise AssertionError("ranks gathered batches of two sizes")
        torch.manual_seed(1)
        assert agree(ranks, model, call, reference, tokens(ranks))


def strategies_that_differ(ranks: Ranks) -> None:
    """Ranks that were told different strategies hear of it."""
    names = ["dedup", "alltoall", "allgather", "dedup"]
    for first in range(3):
        model = moe_compile.parallelize(stacked(), moe_compile.build_mesh())
        call = compiled(model, fullgraph=True, strategy=names[first + ranks.rank % 2], numerics="fast")
        try:
            call(torch.randn(5, D))
        except RuntimeError as error:
            assert f"something else on ranks [{1 - ranks.rank}]" in str(error), error
        else:
            raise AssertionError("strategies were mixed")


def bits_of_rows(ranks: Ranks) -> None:
    """Where rows come home unsummed, results have the bits that one process gives, and the tokens' gradients do not
    depend on how rows travelled."""
    model, (x,) = stacked(), tokens(Ranks(0, 1), [24])[0]
    results = []
    for strategy in ("grouped", "alltoall", "allgather"):
        mine = copy.deepcopy(model)
        if strategy != "grouped":
            moe_compile.parallelize(mine, moe_compile.build_mesh())
        leaf = x.clone().requires_grad_()
        out = compiled(mine, "aot_eager", fullgraph=True, strategy=strategy)(leaf)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    (alone, _), (tokens_travel, its_grad), (gathered, grad) = results
    assert torch.equal(tokens_travel, alone) and torch.equal(gathered, alone)
    assert grad is not None and its_grad is not None and torch.equal(grad, its_grad)


# -- sabotage -------------------------------------------------------------------------------


def _kept(rank: int, name: str) -> Any:
    """What a rank has if a collective does nothing."""
    if name.startswith("all_to_all"):
        return lambda rows, out, into, group: rows.clone()
    if name.startswith("all_gather"):
        return lambda rows, size, group: torch.cat([rows] * size)
    return lambda rows, op, size, group: rows.chunk(size)[rank].clone()


AUTOGRAD = "_c10d_functional_autograd"


def without(switched: Switched, rank: int, number: int) -> AbstractContextManager[None]:
    """One of the collectives that number does nothing."""
    return switched.without(number, other=_kept(rank, switched.found[number].split(".")[1]))


# Of two ranks: as many rows each way.
BALANCED = torch.tensor([[[0, 2], [0, 3], [1, 3], [2, 3], [0, 1]], [[1, 3], [1, 2], [0, 2], [2, 3], [0, 1]]])


def sabotage_of_each_way(ranks: Ranks) -> None:
    """Without any collective but the message, which comes first and says the same to both here, nothing is right."""
    batches: Batches = [(torch.randn(5, D), BALANCED[r]) for r in range(ranks.size)]
    for one in (*WAYS, ("gather_weights", "exact")):
        torch._dynamo.reset()
        reference = Four()
        model = moe_compile.parallelize(copy.deepcopy(reference), moe_compile.build_mesh())
        settings = {k: v for k, v in way(*one).items() if k != "expect"}
        call, switched = compiled(model, fullgraph=True, **settings), Switched(AUTOGRAD)
        right = functools.partial(
            agree, ranks, model, call, reference, batches, loss=lambda m, x, ids: m(x, ids).square().sum()
        )
        with switched.compiling():
            assert right(), one
        assert len(switched.found) == {("allgather", "exact"): 4, ("gather_weights", "exact"): 2}.get(one, 5), one
        for i in range(one[0] != "gather_weights", len(switched.found)):
            with without(switched, ranks.rank, i):
                assert not right(), f"{one} without collective {i}"
        checks.exchange(ranks, model.experts)
        assert not right(), f"{one} with exchanged experts"
        checks.exchange(ranks, model.experts)
        assert right(), one


class Scaled(Experts):
    """Experts that are multiplied by a number of Python's."""

    factor = 1.0

    def gate(self, x: Tensor) -> Tensor:
        return self.act(x) * self.factor


def sabotage_of_messages(ranks: Ranks) -> None:
    """Ranks that compute something else hear of it; without the message they do not, and what they get is wrong."""
    for one in WAYS:
        torch._dynamo.reset()
        model = Four()
        model.experts = Scaled(4)
        reference = copy.deepcopy(model)
        moe_compile.parallelize(model, moe_compile.build_mesh())
        model.experts.factor = 1.0 + ranks.rank
        settings = {k: v for k, v in way(*one).items() if k != "expect"}
        call, switched = compiled(model, fullgraph=True, **settings), Switched(AUTOGRAD)
        x, ids = torch.randn(5, D), BALANCED[ranks.rank]
        with switched.compiling():
            try:
                call(x, ids)
            except RuntimeError as error:
                assert f"something else on ranks [{1 - ranks.rank}]" in str(error), error
            else:
                raise AssertionError(f"{one}: nobody said that experts differ")
        with without(switched, ranks.rank, 0):
            got = call(x, ids)
        assert not torch.allclose(got, reference(x, ids)), one


CHECKS = {
    2: [
        steps_of_each_way, lists_by_each_way, mixtral_by_each_way, bodies_by_each_way, inductor_by_each_way, ids_by_each_way,
        sizes_by_each_way, counted,
        chosen_alike, fast_sums, batches_of_two_sizes, strategies_that_differ, bits_of_rows, sabotage_of_each_way,
        sabotage_of_messages,
    ],
    4: [lists_by_each_way, counted],
    8: [few_experts_a_rank],
}  # fmt: skip
