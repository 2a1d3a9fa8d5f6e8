"""The passes, in order, with the reason for each place."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from moe_compile.detect.facts import Facts
from moe_compile.errors import MoeCompileError, Refusal
from moe_compile.options import MOVES
from moe_compile.parallel.costs import MACHINES, Estimate, choose, estimate, sizes_of
from moe_compile.parallel.shards import Placement
from moe_compile.parallel.writer import sources
from moe_compile.passes.choose_kernels import ChooseKernels
from moe_compile.passes.chunk_tokens import ChunkTokens
from moe_compile.passes.detect_experts import DetectExperts
from moe_compile.passes.dispatch_experts import DispatchExperts
from moe_compile.passes.fold_routing_weights import FoldRoutingWeights
from moe_compile.passes.fold_weight_scales import FoldWeightScales
from moe_compile.passes.fuse_experts import FuseExperts
from moe_compile.passes.narrow_tokens import NarrowTokens
from moe_compile.passes.overlap_collectives import OverlapCollectives
from moe_compile.passes.place_experts import PlaceExperts
from moe_compile.passes.regather_weights import RegatherWeights
from moe_compile.passes.save_collectives import SaveCollectives
from moe_compile.passes.split_tokens import SplitTokens
from moe_compile.rewrite import PassReport, RewritePass

NARROW: tuple[type[RewritePass], ...] = (
    NarrowTokens,  # before anything is done with the rows
)

PLACE: tuple[type[RewritePass], ...] = (
    SplitTokens,  # first: what is placed is the part of the tokens that a rank runs
    ChunkTokens,  # then: of that part
    PlaceExperts,  # before the others: what runs on a rank is an `experts` node again, for them to work on
)

CANONICALISE: tuple[type[RewritePass], ...] = (
    DispatchExperts,  # first: the others work on the ops that it writes
    FoldRoutingWeights,  # after it: looks at what feeds `combine`
    FoldWeightScales,  # before the next, which would take the widened weights
    FuseExperts,  # last: needs the weights in `combine`
)

JOINT: tuple[type[RewritePass], ...] = (
    SaveCollectives,  # on the joint graph: before the partitioner decides what is computed again
    RegatherWeights,  # after it: these collectives are to run again
)

SCHEDULE: tuple[type[RewritePass], ...] = (
    *JOINT,
    OverlapCollectives,  # on its forward and backward: last, as nothing may change the order behind it
)

LOWER: tuple[type[RewritePass], ...] = (
    ChooseKernels,  # last, inside Inductor: shapes and strides are final there
)


def name_of(cls: type[RewritePass]) -> str:
    """The name of a pass: that of its file."""
    return cls.__module__.rsplit(".", 1)[-1]


ALL: tuple[type[RewritePass], ...] = (DetectExperts, *NARROW, *PLACE, *CANONICALISE, *SCHEDULE, *LOWER)
PASS_NAMES = tuple(map(name_of, ALL))


def detect(gm: GraphModule, facts: Facts | None = None) -> PassReport:
    """Find the experts of an ATen graph; one `experts` node each."""
    return DetectExperts(facts)(gm)


def narrow(gm: GraphModule, skip: frozenset[str] = frozenset()) -> list[PassReport]:
    """Let `experts` nodes take what their bodies work with."""
    return [cls()(gm) for cls in NARROW if name_of(cls) not in skip]


@dataclass(frozen=True)
class Placed:
    """What became of experts that are sharded.  strategy: "" if they are left as they were.

    local: inputs for the shards, by family.  estimates: of all strategies, for this rank's batch; none on one rank.
    chunks: of the tokens that travel.
    """

    report: PassReport
    strategy: str
    local: dict[str, Node]
    estimates: tuple[Estimate, ...] = ()
    chunks: int = 1


def place(
    gm: GraphModule,
    placement: Placement,
    state: Mapping[str, Node],
    strategy: str,
    numerics: str = "exact",
    agree: Callable[[str, str], str] = lambda topic, mine: mine,
    chunks: int = 1,
    trained: frozenset[Node] = frozenset(),
) -> Placed:
    """Give experts that are sharded their collectives.

    `state`: the inputs that are parameters, by name.  Strategy "auto" is the fastest of those that are possible here,
    by the cost model; `agree(topic, mine)` makes it the same on all ranks.  `chunks`: of the tokens, if they travel.
    `trained`: the inputs for which gradients are recorded.
    """
    passes = {s: PlaceExperts(placement, state, s, numerics) for s in MOVES}
    if placement.tp > 1:
        SplitTokens(placement, set(passes["alltoall"].families))(gm)
    sites = [node for node, _ in passes["alltoall"].find(gm.graph)]
    if placement.ranks == 1 or not sites:
        return Placed(passes["alltoall"](gm), "grouped", passes["alltoall"].local)
    families = passes["alltoall"].read_by(sites[0])
    sizes = sizes_of(sites[0], placement, families, chunks)
    machine = MACHINES["cuda" if sites[0].meta["val"].device.type == "cuda" else "cpu"]
    reasons = {s: next(filter(None, (pass_.refuse((n,)) for n in sites)), None) for s, pass_ in passes.items()}
    near = int(os.environ.get("LOCAL_WORLD_SIZE", placement.ranks))
    estimates = [
        replace(estimate(s, numerics, sizes, machine, near), why_not=reason or "") for s, reason in reasons.items()
    ]
    if strategy == "auto":
        estimates, mine = choose(estimates, sizes)
        strategy = agree(f"{[(f.name, f.num_experts, *x.shape) for f, x in families.items()]}, {numerics}", mine)
        if not strategy and mine:
            raise Refusal("the first rank of the group cannot place these experts")
        if strategy and reasons[strategy]:
            raise MoeCompileError(
                f"rank {placement.rank} cannot place experts by {strategy!r}, as the first rank of the group chose: "
                f"{reasons[strategy]}"
            )
    chosen = passes[strategy or "gather_weights"]
    if chunks == 1 or not chosen.travels or reasons[chosen.strategy]:
        return Placed(chosen(gm), strategy, chosen.local, tuple(estimates))
    if numerics == "exact" and any(trained & _weights(n) for n in sites):
        raise MoeCompileError(
            f"option chunks is {chunks}: the gradient of an expert's weights is then a sum over chunks, so that their "
            f"number shows in the last bits: it needs numerics 'fast'"
        )
    ChunkTokens(chunks, set(chosen.families))(gm)
    return Placed(chosen(gm), strategy, chosen.local, tuple(estimates), chunks)


def _weights(node: Node) -> set[Node]:
    """The inputs that an `experts` node reads for all tokens alike."""
    return {n for p in (*node.args[3], *node.args[4]) for n in sources(p)}  # type: ignore[misc]


def canonicalise(gm: GraphModule, skip: frozenset[str] = frozenset()) -> list[PassReport]:
    """Turn `experts` nodes into dispatch, grouped GEMMs and combine."""
    return [cls()(gm) for cls in CANONICALISE if name_of(cls) not in skip]
