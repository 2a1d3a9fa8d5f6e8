"""The cost model: arithmetic that can be done by hand.  That bytes are those that are sent: strategies.py."""

import dataclasses
from itertools import combinations

import pytest

from moe_compile.parallel.costs import MACHINES, TRAFFIC, Estimate, Sizes, choose, estimate, forward_times
from moe_compile.report import RegionReport, Report


def mlp(T: int, K: int, E: int, P: int, D: int, F: int, size: int = 2) -> Sizes:
    """Experts with a gate, in numbers of `size` bytes, on the first rank."""
    M = -(-E // P)
    return Sizes(
        T=T, K=K, E=E, P=P, L=M, M=M, t=size * D, q=size, r=0, y=size * D, z=size * D, w=3 * size * D * F, f=6 * D * F,
        n=1, a=1, b=0, g=2,
    )  # fmt: skip


QWEN = {"K": 8, "E": 128, "P": 8, "D": 2048, "F": 768}


def all_of(sizes: Sizes, numerics: str = "fast", device: str = "cuda") -> dict[str, Estimate]:
    names = ("alltoall", "dedup", "allgather", "gather_weights")
    return {s: estimate(s, numerics, sizes, MACHINES[device], 8) for s in names}


def test_bytes_by_hand() -> None:
    sizes = mlp(T=4096, **QWEN)
    found, message, row = all_of(sizes), 4 * 7 * 18, 2 * 2048
    assert found["alltoall"].bytes_sent == message + 4096 * 8 * 7 / 8 * 2 * row
    assert found["allgather"].bytes_sent == message + 7 * 4096 * (2 * row + 8 * (2 + 4))
    assert found["gather_weights"].bytes_sent == 7 * 16 * 3 * row * 768
    exact = all_of(sizes, "exact")
    assert exact["allgather"].bytes_sent == message + 7 * 4096 * 8 * (2 * row + 4)
    assert [e.host_reads for e in found.values()] == [1, 1, 0, 0]


@pytest.mark.parametrize(("E", "K", "P"), [(4, 2, 2), (5, 2, 2), (7, 3, 4), (6, 4, 3)])
def test_a_token_is_sent_to_as_many_ranks_as_sets_of_experts_touch(E: int, K: int, P: int) -> None:
    M = -(-E // P)
    sets = list(combinations(range(E), K))
    for rank in range(P):
        L = min(M, E - rank * M)
        sizes = dataclasses.replace(mlp(len(sets), K, E, P, D=8, F=4), L=L, t=1, q=0, z=1000)
        there = sum(len({e // M for e in chosen} - {rank}) for chosen in sets)
        back = (P - 1) * sum(rank in {e // M for e in chosen} for chosen in sets)
        expected = 4 * (P - 1) * (M + 2) + there * (1 + 4 * K) + 1000 * back
        assert sizes.put(TRAFFIC["dedup", "fast"].sent) == pytest.approx(expected)


def test_what_is_fastest() -> None:
    """Few tokens, where the host waits long: what it need not read.  Many experts a token: a row a rank.  Small weights
    and many tokens: weights."""
    slow, few = dataclasses.replace(MACHINES["cuda"], host_read_us=100.0), mlp(T=8, **QWEN)
    many = all_of(mlp(T=4096, **QWEN))
    waits = [estimate(s, "fast", few, slow, 8) for s in all_of(few)]
    assert min(waits, key=lambda e: e.time_us).strategy == "allgather"
    assert min(many.values(), key=lambda e: e.time_us).strategy == "dedup"
    assert many["dedup"].bytes_sent < 0.8 * many["alltoall"].bytes_sent
    assert min(all_of(mlp(65536, 2, 8, 8, 2048, 64)).values(), key=lambda e: e.time_us).strategy == "gather_weights"
    one_node, two_nodes = mlp(T=4096, **QWEN), mlp(T=4096, **QWEN | {"P": 16})
    assert all_of(two_nodes)["alltoall"].time_us > 2 * all_of(one_node)["alltoall"].time_us


def test_what_auto_does_not_choose_by_itself() -> None:
    sizes = mlp(T=8, **QWEN)
    judged, choice = choose(list(all_of(sizes).values()), sizes)
    reasons = {e.strategy: e.why_not for e in judged}
    assert choice != "allgather" and "only by name" in reasons["allgather"] and not reasons[choice]
    assert reasons["gather_weights"].startswith("1.21 GB of weights")
    refused = [dataclasses.replace(e, why_not="no" * (e.strategy != "gather_weights")) for e in judged]
    refused[-1] = dataclasses.replace(refused[-1], why_not="")
    assert choose(refused, sizes)[1] == "gather_weights"  # where tokens must not travel
    assert choose([dataclasses.replace(e, why_not="no") for e in judged], sizes)[1] == ""


def test_chunks() -> None:
    """A line for each in what is told, a latency for each launch, weights read for each; rows under products."""
    whole = mlp(T=4096, **QWEN)
    cut, gpu = dataclasses.replace(whole, c=4), dataclasses.replace(MACHINES["cuda"], memory=1e9)
    one, four = (forward_times("alltoall", "fast", x, gpu, 8) for x in (whole, cut))
    assert four.bytes_sent - one.bytes_sent == 3 * 4 * 7 * 18 and four.host_reads == 1
    assert one.waits_us == 3 * 20 + 40 and four.waits_us == (2 + 4 * 2) * 20 + 40
    assert four.run_us == one.run_us and one.total_us == one.waits_us + one.wire_us + one.run_us
    beside = max(four.wire_us, four.run_us)
    assert four.total_us == pytest.approx(four.waits_us + (four.wire_us + four.run_us) / 4 + 3 / 4 * beside)
    slow = dataclasses.replace(MACHINES["cuda"], gflops=1e12, memory=1.0)
    one, four = (forward_times("alltoall", "fast", x, slow, 8) for x in (whole, cut))
    assert four.run_us - one.run_us == pytest.approx(1e-3 * 3 * 16 * 3 * 2 * 2048 * 768)
    for strategy, launches in (("dedup", 5), ("allgather", 5)):  # tokens, pairs, ids, results of each; what is told
        waits = [forward_times(strategy, "fast", x, gpu, 8).waits_us for x in (whole, cut)]
        assert waits[1] - waits[0] == 20 * (2 + 4 * (launches - 1) - launches)
    assert all_of(cut)["gather_weights"] == all_of(whole)["gather_weights"]  # there is nothing to cut


def test_tokens_that_are_shared() -> None:
    """Over "tp": what ranks tell each other and the results, on the way home; fewer ranks of "ep" are in a node."""
    alone = mlp(T=4096, **QWEN)
    shared = dataclasses.replace(alone, p=2, o=4096, u=224)
    one, two = (forward_times("alltoall", "fast", x, MACHINES["cuda"], 16) for x in (alone, shared))
    assert two.bytes_sent - one.bytes_sent == 4096 * 4096 + 224
    assert two.waits_us - one.waits_us == 40 and (two.wire_us, two.run_us) == (one.wire_us, one.run_us)
    moved = 2 * 4096 * (4096 + 8 * 2) + 3 * 2 * 4096 * 4096
    rest = 1e-3 * ((4096 * 4096 + 224) / MACHINES["cuda"].within + moved / MACHINES["cuda"].memory)
    assert two.rest_us == pytest.approx(rest) and two.total_us == pytest.approx(one.total_us + 40 + rest)
    near, far = (forward_times("alltoall", "fast", shared, MACHINES["cuda"], ranks) for ranks in (16, 8))
    assert far.wire_us > near.wire_us


def test_the_report_has_a_line_for_each() -> None:
    estimates = (Estimate("alltoall", 1234.0, 1, 640.0), Estimate("allgather", 5e6, 0, 2000.4, "it is not"))
    region = RegionReport(True, "mlp", "a.py:1", "loop", 4, 2, strategy="alltoall", estimates=estimates)
    assert str(Report([region])).splitlines()[3:] == [
        "mlp:",
        "    * alltoall: sends 1.23 kB, 1 host read, 640 us",
        "      allgather: sends 5 MB, 0 host reads, 2000 us; not possible: it is not",
        "1 of 1 regions rewritten",
    ]
