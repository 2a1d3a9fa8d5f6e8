"""What each strategy of expert parallelism costs a forward, and which is estimated to be the fastest.

Bytes, FLOPs and times are sympy expressions of what a region is (`Sizes`); `Machine` has the numbers of the hardware.
Routing is taken to be balanced: every expert is chosen as often as every other, a token's experts are distinct.  Bytes
are those that one rank sends to others; a backward sends as many again.  Of the tokens of a tensor-parallel group a
rank runs a part, and T are those of the part.

    T tokens of this rank   K experts per token   E experts   P ranks   L experts of this rank   M the most of a rank
    t  bytes of what experts read of a token        q  of a pair (t, k)     r  of a pair, below the routing weights
    y  bytes of one result, below routing weights    z  with them     w  of one expert's weights
    f  FLOPs of one row                             n, a, b, g  tensors of tokens, of pairs, of those below, of weights
    s  ranks over which the same experts are split ("edp"), h  tensors that are gathered over these
    c  chunks of the tokens     p  ranks that share their tokens ("tp")
    o  bytes of a token's result, u  of what these ranks tell each other of their tokens

Experts that are an MLP with a gate, routed by one weight a pair, in numbers of s bytes:
t = y = z = s*D, q = s, r = 0, w = 3*s*D*F, f = 6*D*F.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch.fx import Node

from moe_compile import cost
from moe_compile.parallel.by_rows import split
from moe_compile.parallel.mesh import shard_sizes
from moe_compile.parallel.shards import Family, Placement
from moe_compile.rewrite import value

aten = torch.ops.aten

T, K, E, P, L, M = sympy.symbols("T K E P L M", positive=True)
t, q, r, y, z, w, f, n, a, b, g, h = sympy.symbols("t q r y z w f n a b g h", nonnegative=True)
s, c, p = sympy.symbols("s c p", positive=True)
o, u = sympy.symbols("o u", nonnegative=True)

ID = 4  # bytes of an id that travels (exchange.on_the_wire)
MESSAGE = 4 * c * (P - 1) * (M + 2)  # exchange.message, a line for each chunk
MESSAGES = sympy.Min(c, 2)  # writer.write


@dataclass(frozen=True)
class Machine:
    """Numbers of one device and of what joins them.  Times in microseconds, rates in 10^9 a second."""

    within: float  # GB/s that a rank sends to ranks of its node
    between: float  # GB/s that it sends to other nodes
    latency_us: float  # of one collective
    host_read_us: float  # until the host knows, and has launched what comes next
    gflops: float
    memory: float  # GB/s


MACHINES = {
    # NVLink 4: 900 GB/s both ways (NVIDIA, H100 data sheet).  One 400 Gbit/s port a GPU (DGX H100 user guide: eight
    # ConnectX-7).  Rate and memory as in cost.py.  Latencies: assumed.
    "cuda": Machine(450.0, 50.0, 20.0, 40.0, 1e3 * cost.RATE["triton"], cost.BANDWIDTH),
    # Processes of one machine that talk by gloo: all assumed.
    "cpu": Machine(2.0, 1.0, 200.0, 0.0, 50.0, 20.0),
}

# What is gathered for a forward is kept for the backward, in every layer: no more than this a region.  Assumed.
GATHERED_MOST = 256 * 2**20


@dataclass(frozen=True)
class Sizes:
    """A region, by the letters above."""

    T: int
    K: int
    E: int
    P: int
    L: int
    M: int
    t: int
    q: int
    r: int
    y: int
    z: int
    w: int
    f: int
    n: int
    a: int
    b: int
    g: int
    s: int = 1
    h: int = 0
    c: int = 1
    p: int = 1
    o: int = 0
    u: int = 0

    def put(self, expression: sympy.Expr) -> float:
        """The value of an expression."""
        names, function = _function(expression)
        return float(function(*(Fraction(getattr(self, name)) for name in names)))


@functools.cache
def _function(expression: sympy.Expr) -> tuple[list[str], Callable[..., Any]]:
    """An expression as a function of its symbols, by name: to put numbers in with sympy takes 20 ms."""
    symbols = sorted(expression.free_symbols, key=str)
    choices = {"binomial": lambda many, few: math.comb(int(many), int(few))}
    return [str(s) for s in symbols], sympy.lambdify(symbols, expression, [choices, "math"])


@dataclass(frozen=True)
class Traffic:
    """One strategy: bytes that a rank sends, collectives, host reads, and the bytes that its memory moves."""

    sent: sympy.Expr
    collectives: sympy.Expr
    host_reads: int
    moved: sympy.Expr


def _meets(experts: sympy.Expr) -> sympy.Expr:
    """The part of the tokens that chose at least one of so many experts."""
    return 1 - sympy.binomial(E - experts, K) / sympy.binomial(E, K)


_last = E - (P - 1) * M  # experts of the last rank; all others have M
_arrive = P * T * K * L / E  # rows that a rank's experts get
_met = P * T * _meets(L)  # tokens that they get
_reach = T * ((P - 1) * _meets(M) + _meets(_last))  # ranks that the tokens of one go to, itself among them
_rows = 4 * (t + y)  # read and write on the way into the order of the experts, and back

_weights = c * L * w  # each chunk reads those of all experts of the rank

TRAFFIC: dict[tuple[str, str], Traffic] = {
    ("alltoall", "exact"): Traffic(
        MESSAGE + T * K * (E - L) / E * (t + r) + (P - 1) * T * K * L / E * y,
        MESSAGES + c * (n + b + 1), 1, _weights + (T * K + _arrive) * _rows,
    ),
    ("dedup", "fast"): Traffic(
        MESSAGE + (_reach - T * _meets(L)) * (t + K * (q + ID)) + (P - 1) * T * _meets(L) * z,
        MESSAGES + c * (n + a + 2), 1, _weights + (T * K + _arrive) * _rows,
    ),
    ("allgather", "exact"): Traffic(
        MESSAGE + (P - 1) * T * K * (t + r + ID + y), MESSAGES + c * (n + b + 2), 0, _weights + (P + 1) * T * K * _rows
    ),
    ("allgather", "fast"): Traffic(
        MESSAGE + (P - 1) * T * (t + K * (q + ID) + z), MESSAGES + c * (n + a + 2), 0, _weights + P * T * K * _rows
    ),
    ("gather_weights", "exact"): Traffic((P - 1) * M * w, g, 0, 3 * E * w + T * K * _rows),
}  # fmt: skip
TRAFFIC["alltoall", "fast"] = TRAFFIC["alltoall", "exact"]
TRAFFIC["grouped", "exact"] = Traffic(sympy.Integer(0), sympy.Integer(0), 0, E * w + T * K * _rows)  # on one rank
TRAFFIC["gather_weights", "fast"] = TRAFFIC["gather_weights", "exact"]

# By every strategy: over "edp", if experts are split there, once for all chunks; over "tp", if tokens are shared there:
# what ranks tell each other, and the results (passes/split_tokens.py).
WHOLE = Traffic(L * w * (s - 1) / s, h, 0, 2 * L * w)
SHARED = Traffic((p - 1) * (T * o + u), sympy.Integer(2), 0, 2 * T * (t + K * q) + 3 * p * T * o)

FLOPS = {True: _arrive * f, False: T * K * f}  # of the experts that a rank has; of the tokens that it has


@dataclass(frozen=True)
class Estimate:
    """One strategy for one region.  why_not: what rules it out, "" if nothing does."""

    strategy: str
    bytes_sent: float
    host_reads: int
    time_us: float
    why_not: str = ""

    def __str__(self) -> str:
        reads = f"{self.host_reads} host read{'s' * (self.host_reads != 1)}"
        line = f"{self.strategy}: sends {cost.short(self.bytes_sent)}B, {reads}, {self.time_us:.0f} us"
        return f"{line}; not possible: {self.why_not}" if self.why_not else line


def estimate(strategy: str, numerics: str, sizes: Sizes, machine: Machine, ranks_a_node: int) -> Estimate:
    """What a forward costs this rank; of compute and communication nothing overlaps but chunks."""
    times = forward_times(strategy, numerics, sizes, machine, ranks_a_node)
    return Estimate(strategy, times.bytes_sent, times.host_reads, times.total_us)


@dataclass(frozen=True)
class Times:
    """What a forward's time is made of.  Waits: latencies of collectives and the host's reads.

    wire_us, run_us: of what is cut into `chunks`.  rest_us: of what stands before or behind all of them.
    """

    bytes_sent: float
    host_reads: int
    waits_us: float
    wire_us: float
    run_us: float
    rest_us: float = 0.0
    chunks: int = 1

    @property
    def total_us(self) -> float:
        """Rows of one chunk travel while another is computed; beside those of the first and the last runs nothing."""
        alone = (self.wire_us + self.run_us) / self.chunks
        return self.waits_us + self.rest_us + alone + (1 - 1 / self.chunks) * max(self.wire_us, self.run_us)


def forward_times(strategy: str, numerics: str, sizes: Sizes, machine: Machine, ranks_a_node: int) -> Times:
    """The parts of `estimate`: a backward sends as many bytes again, and computes twice as much."""
    if strategy == "gather_weights":
        sizes = replace(sizes, c=1)
    traffic = TRAFFIC.get((strategy, numerics)) or TRAFFIC[strategy, "fast"]
    sent = sizes.put(traffic.sent)
    near = max(1, min(ranks_a_node // sizes.p, sizes.P))  # "tp" is innermost
    if strategy == "gather_weights" or strategy == "allgather":  # rings: each byte passes every link
        wire = sent / (machine.within if near == sizes.P else machine.between)
    else:
        far = (sizes.P - near) / max(1, sizes.P - 1)
        wire = max((1 - far) * sent / machine.within, far * sent / machine.between)
    flops = sizes.put(FLOPS[strategy != "gather_weights"])
    run = max(flops / machine.gflops, sizes.put(traffic.moved) / machine.memory)
    waits = sizes.put(traffic.collectives) * machine.latency_us + traffic.host_reads * machine.host_read_us
    rest = 0.0
    for more, ranks, apart in ((WHOLE, sizes.s, sizes.P * sizes.p), (SHARED, sizes.p, 1)):
        if ranks > 1:
            travels = sizes.put(more.sent)
            sent += travels
            waits += sizes.put(more.collectives) * machine.latency_us
            rest += travels / (machine.within if ranks * apart <= ranks_a_node else machine.between)
            rest += sizes.put(more.moved) / machine.memory
    return Times(sent, traffic.host_reads, waits, 1e-3 * wire, 1e-3 * run, 1e-3 * rest, sizes.c)


def choose(estimates: Sequence[Estimate], sizes: Sizes) -> tuple[list[Estimate], str]:
    """(the estimates, with what else "auto" minds; its choice): the fastest, "" if nothing is possible."""
    judged = [replace(e, why_not=e.why_not or _unasked(e.strategy, sizes)) for e in estimates]
    possible = [e for e in judged if not e.why_not] or [
        e for e in estimates if not e.why_not and e.strategy == "gather_weights"
    ]
    return judged, min(possible, key=lambda e: e.time_us).strategy if possible else ""


def _unasked(strategy: str, sizes: Sizes) -> str:
    if strategy == "allgather":
        return "it is chosen only by name, for all ranks must have batches of one size"
    if strategy == "gather_weights" and sizes.E * sizes.w > GATHERED_MOST:
        return f"{cost.short(sizes.E * sizes.w)}B of weights, each kept for the backward, are gathered only by name"
    return ""


def sizes_of(node: Node, placement: Placement, families: Mapping[Family, torch.Tensor], chunks: int = 1) -> Sizes:
    """The sizes of an `experts` node.  `families`: those that it reads, with one member each.

    Sizes that vary count as they are in the call at hand.
    """
    args: Any = node.args
    ids, tokens, pairs, _, _, attribute, num_experts, _ = args
    body = getattr(node.graph.owning_module, str(attribute.target))
    inner, _, last = split(body)
    below = {p.name for p in inner.graph.find_nodes(op="placeholder")}
    number, top_k = (cost.hint(s) for s in value(ids).shape)
    shards = shard_sizes(num_experts, placement.ranks)
    carried = [x for i, x in enumerate(pairs) if f"pair_{i}" in below]
    weights = [n.args[1] for n in body.graph.nodes if n.target in (aten.linear.default, aten.matmul.default)]
    return Sizes(
        T=number, K=top_k, E=num_experts, P=placement.ranks, L=shards[placement.rank], M=shards[0],
        t=sum(_bytes(x, 1) for x in tokens), q=sum(_bytes(x, 2) for x in pairs), r=sum(_bytes(x, 2) for x in carried),
        y=_bytes(last, 1), z=_bytes(body.graph.output_node().args[0], 1),
        w=sum(_of_expert(f, x) for f, x in families.items()),
        f=sum(2 * value(x).numel() for x in weights), n=len(tokens), a=len(pairs), b=len(carried), g=len(families),
        s=placement.edp, h=len(families) if placement.edp > 1 else 0,
        c=chunks, p=placement.tp, o=_bytes(node, 1), u=_told(ids),
    )  # fmt: skip


def _bytes(node: Node, skipped: int) -> int:
    return cost.hint(value(node).shape[skipped:].numel()) * value(node).element_size()


def _told(ids: Node) -> int:
    """Bytes of what ranks that share their tokens tell each other of them; 0 unless these ids are one rank's part."""
    if ids.target is not torch.ops.moe_ep.own_rows.default:
        return 0
    checked: Any = ids.args[0]  # own_rows(check_shared(ids, messages of all, P), ..)
    _, messages, ranks = checked.args
    return int(value(messages).numel() * value(messages).element_size()) // int(ranks)


def _of_expert(family: Family, example: torch.Tensor) -> int:
    return math.prod(family.stacked(example.shape)[1:]) * example.element_size()


LETTERS = (T, K, E, P, L, M, t, q, r, y, z, w, f, n, a, b, g, s, h, c, p, o, u)
assert {x.name for x in fields(Sizes)} == {str(x) for x in LETTERS}
