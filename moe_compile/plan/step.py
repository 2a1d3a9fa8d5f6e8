"""What a training step takes, in microseconds: FLOPs at a stated efficiency, bytes over links, latencies.

    layer     dense products, then experts as `parallel.costs` has them; forward, backward (twice the products, as many
              bytes), and once more the products if layers are checkpointed: their collectives are not repeated
    FSDP      gathers a layer for the forward and for the backward and scatters its gradients, beside the compute of
              another layer: a layer takes the longer of the two.  Experts that are split over edp are gathered as
              often, and nothing runs beside it
    tp        two all-reduces of the tokens a pass, nothing beside them; its ranks dispatch a share each, gathered after
    end       gradients of what has copies are averaged; AdamW moves its numbers once

What is not in it: launches (small batches are slower than this), uneven routing, stragglers, the host.
"""

from dataclasses import dataclass, replace

from moe_compile.parallel.costs import Machine, Sizes, Times, forward_times
from moe_compile.parallel.mesh import shard_sizes
from moe_compile.plan import hardware
from moe_compile.plan.hardware import Gpu
from moe_compile.plan.layouts import Layout
from moe_compile.plan.memory import Setup, held, of_a_rank
from moe_compile.plan.shapes import Shape


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, so many a node."""

    gpu: Gpu
    ranks_a_node: int = 8

    @property
    def machine(self) -> Machine:
        return hardware.machine(self.gpu)


@dataclass(frozen=True)
class Ways:
    """What a system does: by default what this one does.

    strategy: how experts meet tokens.  drop_duplicates: tensor-parallel ranks dispatch each their share of the tokens,
    not all of them.  repeat_collectives: checkpointed layers send again what they had sent.  fsdp_alone: with ep=1,
    experts that are split over edp are gathered with the dense weights, beside the compute of another layer.
    """

    strategy: str = "alltoall"
    drop_duplicates: bool = True
    repeat_collectives: bool = False
    fsdp_alone: bool = False


@dataclass(frozen=True)
class Step:
    """One step of one rank.  Times in microseconds, by what is waited for; sent: bytes, by whom they are for."""

    compute_us: float
    experts_us: float
    exchange_us: float
    fsdp_us: float  # what compute does not hide
    tp_us: float
    end_us: float
    exchange_sent: float
    fsdp_sent: float
    tp_sent: float
    end_sent: float
    host_reads: int

    @property
    def total_us(self) -> float:
        return self.compute_us + self.experts_us + self.exchange_us + self.fsdp_us + self.tp_us + self.end_us

    @property
    def sent(self) -> float:
        return self.exchange_sent + self.fsdp_sent + self.tp_sent + self.end_sent


@dataclass(frozen=True)
class Group:
    """Ranks of a collective, and how many of them share a node."""

    ranks: int
    near: int

    def ring_us(self, whole: float, machine: Machine) -> float:
        """Each rank ends with, or has given, its part of so many bytes: an all-gather or a reduce-scatter."""
        if self.ranks == 1:
            return 0.0
        nodes = -(-self.ranks // self.near)
        within = whole * (self.ranks - 1) / self.ranks / machine.within
        between = whole * (nodes - 1) / nodes / (self.near * machine.between)
        return machine.latency_us + (nodes - 1) * hardware.HOP_US + 1e-3 * max(within, between)

    def sent(self, whole: float) -> float:
        return whole * (self.ranks - 1) / self.ranks


def groups(layout: Layout, cluster: Cluster) -> dict[str, Group]:
    """The groups of a layout, by the parameters or tokens that they are for."""
    node = min(cluster.ranks_a_node, layout.ranks)

    def along(ranks: int, apart: int) -> Group:
        return Group(ranks, max(1, min(ranks, node // apart)))

    return {
        "tp": along(layout.tp, 1),
        "ep": along(layout.ep, layout.tp),
        "dp_shard": along(layout.dp_shard, layout.tp),
        "dp_replicate": along(layout.dp_replicate, layout.tp * layout.dp_shard),
        "edp": along(layout.edp, layout.tp * layout.ep),
        "copies": along(layout.expert_copies // layout.tp, layout.tp * layout.ep * layout.edp),
    }


def experts(shape: Shape, layout: Layout, tokens: int) -> Sizes:
    """The experts of one layer, as the cost model wants them, in numbers of two bytes: by the first rank."""
    most = shard_sizes(shape.E, layout.ep)[0]
    return Sizes(
        T=tokens, K=shape.K, E=shape.E, P=layout.ep, L=most, M=most, t=2 * shape.D, q=2, r=0, y=2 * shape.D,
        z=2 * shape.D, w=2 * shape.expert, f=2 * shape.expert, n=1, a=1, b=0, g=2,
    )  # fmt: skip


def step(shape: Shape, layout: Layout, cluster: Cluster, setup: Setup, ways: Ways | None = None) -> Step:
    ways = ways or Ways()
    machine, group = cluster.machine, groups(layout, cluster)
    passes = 4 if setup.checkpoint else 3  # of products: forward, twice in the backward, and again
    T = setup.tokens * layout.tp
    times = _experts(shape, layout, group, setup, machine, ways)
    compute = fsdp = fsdp_sent = 0.0
    mine = 2 * of_a_rank(shape, layout) if layout.edp > 1 else 0
    for number, unit in _units(shape):
        flops = 2 * T * unit.products / layout.tp + _scores(shape, T, setup.length, layout.tp) * unit.attends
        forward = flops / machine.gflops * 1e-3
        whole = 2 * unit.parameters / layout.tp
        if unit.experts and mine and ways.fsdp_alone:
            whole += mine
        elif unit.experts and mine:
            fsdp += number * 3 * group["edp"].ring_us(mine, machine)
            fsdp_sent += number * 3 * group["edp"].sent(mine)
        wire = group["dp_shard"].ring_us(whole, machine)
        busy = (forward + (times.run_us if unit.experts else 0.0)) if unit.overlaps else 0.0
        compute += number * passes * forward
        fsdp += number * (max(0.0, wire - busy) + max(0.0, 2 * wire - (passes - 1) * busy))
        fsdp_sent += number * 3 * group["dp_shard"].sent(whole)
    trips = 3 if ways.repeat_collectives and setup.checkpoint else 2
    tp_layer, tp_sent = _tensor_parallel(shape, layout, T, group["tp"], machine, ways)
    end, end_sent = _end(shape, layout, group, setup, machine)
    return Step(
        compute_us=compute,
        experts_us=shape.moe_layers * passes * times.run_us,
        exchange_us=shape.moe_layers * (trips * (times.waits_us + times.wire_us)),
        fsdp_us=fsdp,
        tp_us=shape.num_layers * trips * tp_layer,
        end_us=end,
        exchange_sent=shape.moe_layers * trips * times.bytes_sent,
        fsdp_sent=fsdp_sent,
        tp_sent=shape.num_layers * trips * tp_sent,
        end_sent=end_sent,
        host_reads=shape.moe_layers * times.host_reads * (2 if trips == 3 else 1),
    )


@dataclass(frozen=True)
class _Unit:
    products: int  # parameters that tokens are multiplied with
    parameters: int  # that FSDP gathers
    attends: bool = True
    experts: bool = False
    overlaps: bool = True


def _units(shape: Shape) -> list[tuple[int, _Unit]]:
    """What FSDP gathers at once, and how often a step has such a unit."""
    moe, dense = shape.unit(True), shape.unit(False)
    head = shape.vocab * shape.D
    return [
        (shape.moe_layers, _Unit(moe, moe, experts=True)),
        (shape.num_layers - shape.moe_layers, _Unit(dense, dense)),
        (1, _Unit(head, shape.embeddings, attends=False, overlaps=False)),
    ]


def _scores(shape: Shape, tokens: int, length: int, tp: int) -> float:
    """FLOPs of causal attention's two products, one layer: a token sees half of the sequence."""
    return tokens * length * (shape.qk + shape.v) / tp


def _experts(
    shape: Shape, layout: Layout, group: dict[str, Group], setup: Setup, machine: Machine, ways: Ways
) -> Times:
    """A forward of one layer's experts."""
    strategy = "grouped" if layout.ep == 1 else ways.strategy
    numerics = "fast" if strategy == "dedup" else "exact"
    found = forward_times(strategy, numerics, experts(shape, layout, setup.tokens), machine, group["ep"].near)
    if ways.drop_duplicates:
        return found
    more = layout.tp  # duplicates meet experts split by tp: the products are as many
    return replace(found, wire_us=more * found.wire_us, bytes_sent=more * found.bytes_sent)


def _tensor_parallel(
    shape: Shape, layout: Layout, T: int, group: Group, machine: Machine, ways: Ways
) -> tuple[float, float]:
    """(microseconds, bytes) of one pass of one layer: an all-reduce behind attention, and one behind the MLP, which
    with experts and duplicates dropped is the gathering of the shares."""
    whole = 2.0 * T * shape.D
    halves = 2 + (1 if ways.drop_duplicates else 2)
    return halves * group.ring_us(whole, machine), halves * group.sent(whole)


def _end(shape: Shape, layout: Layout, group: dict[str, Group], setup: Setup, machine: Machine) -> tuple[float, float]:
    """(microseconds, bytes) of averaging what has copies, and of the optimizer."""
    dense, mine = held(shape, layout)
    us = sent = 0.0
    for number, ranks in ((dense, group["dp_replicate"]), (mine, group["copies"]), (mine, group["tp"])):
        us += 2 * ranks.ring_us(setup.kept * number, machine)
        sent += 2 * ranks.sent(setup.kept * number)
    moved = (dense + mine) * (2 * setup.kept + setup.kept + 2 * setup.states)  # p twice, g once, states twice
    return us + moved / machine.memory * 1e-3, sent
