"""The passes, in order, with the reason for each place."""

from collections.abc import Mapping

from torch.fx import GraphModule, Node

from moe_compile.detect.interpreter import Facts
from moe_compile.parallel.shards import Placement
from moe_compile.passes.choose_kernels import ChooseKernels
from moe_compile.passes.detect_experts import DetectExperts
from moe_compile.passes.dispatch_experts import DispatchExperts
from moe_compile.passes.fold_routing_weights import FoldRoutingWeights
from moe_compile.passes.fuse_experts import FuseExperts
from moe_compile.passes.place_experts import PlaceExperts
from moe_compile.passes.save_collectives import SaveCollectives
from moe_compile.rewrite import PassReport, RewritePass

PLACE: tuple[type[RewritePass], ...] = (
    PlaceExperts,  # before the others: what runs on a rank is an `experts` node again, for them to work on
)

CANONICALISE: tuple[type[RewritePass], ...] = (
    DispatchExperts,  # first: the others work on the ops that it writes
    FoldRoutingWeights,  # after it: looks at what feeds `combine`
    FuseExperts,  # last: needs the weights in `combine`
)

SCHEDULE: tuple[type[RewritePass], ...] = (
    SaveCollectives,  # on the joint graph: before the partitioner decides what is computed again
)

LOWER: tuple[type[RewritePass], ...] = (
    ChooseKernels,  # last, inside Inductor: shapes and strides are final there
)


def name_of(cls: type[RewritePass]) -> str:
    """The name of a pass: that of its file."""
    return cls.__module__.rsplit(".", 1)[-1]


ALL: tuple[type[RewritePass], ...] = (DetectExperts, *PLACE, *CANONICALISE, *SCHEDULE, *LOWER)
PASS_NAMES = tuple(map(name_of, ALL))


def detect(gm: GraphModule, facts: Facts | None = None) -> PassReport:
    """Find the experts of an ATen graph; one `experts` node each."""
    return DetectExperts(facts)(gm)


def place(
    gm: GraphModule, placement: Placement, state: Mapping[str, Node], strategy: str
) -> tuple[PassReport, str, dict[str, Node]]:
    """Give experts that are sharded their collectives: (report, strategy, inputs for the shards by family).

    `state`: the inputs that are parameters, by name.  Strategy "auto" moves tokens; weights, if tokens must not.
    """
    for choice in ("alltoall", "gather_weights") if strategy == "auto" else (strategy,):
        pass_ = PlaceExperts(placement, state, choice)
        if (report := pass_(gm)).applied:
            break
    return report, choice, pass_.local


def canonicalise(gm: GraphModule, skip: frozenset[str] = frozenset()) -> list[PassReport]:
    """Turn `experts` nodes into dispatch, grouped GEMMs and combine."""
    return [cls()(gm) for cls in CANONICALISE if name_of(cls) not in skip]
