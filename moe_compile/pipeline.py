"""The passes, in order, with the reason for each place."""

from torch.fx import GraphModule

from moe_compile.detect.interpreter import Facts
from moe_compile.passes.choose_kernels import ChooseKernels
from moe_compile.passes.detect_experts import DetectExperts
from moe_compile.passes.dispatch_experts import DispatchExperts
from moe_compile.passes.fold_routing_weights import FoldRoutingWeights
from moe_compile.passes.fuse_experts import FuseExperts
from moe_compile.rewrite import PassReport, RewritePass

CANONICALISE: tuple[type[RewritePass], ...] = (
    DispatchExperts,  # first: the others work on the ops that it writes
    FoldRoutingWeights,  # after it: looks at what feeds `combine`
    FuseExperts,  # last: needs the weights in `combine`
)


LOWER: tuple[type[RewritePass], ...] = (
    ChooseKernels,  # last, inside Inductor: shapes and strides are final there
)

PASS_NAMES = tuple(cls.__module__.rsplit(".", 1)[-1] for cls in (DetectExperts, *CANONICALISE, *LOWER))


def detect(gm: GraphModule, facts: Facts | None = None) -> PassReport:
    """Find the experts of an ATen graph; one `experts` node each."""
    return DetectExperts(facts)(gm)


def canonicalise(gm: GraphModule, skip: frozenset[str] = frozenset()) -> list[PassReport]:
    """Turn `experts` nodes into dispatch, grouped GEMMs and combine."""
    return [cls()(gm) for cls, name in zip(CANONICALISE, PASS_NAMES[1:], strict=False) if name not in skip]
