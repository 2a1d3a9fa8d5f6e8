"""The stages that run inside the inner compiler: `schedule` on joint graphs, `lower` on forward and backward graphs.

For Inductor each is one object, since torch 2.11 takes no list of passes; what the user had set runs first.  Its `uuid`
covers our source, so that Inductor's caches are right; nothing is reported from inside, because a cache hit skips it.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, GraphModule

from moe_compile import pipeline
from moe_compile.kernels.settings import table_texts
from moe_compile.passes.choose_kernels import ChooseKernels
from moe_compile.passes.overlap_collectives import OverlapCollectives
from moe_compile.pipeline import name_of

log = logging.getLogger(__name__)

JOINT = {name_of(cls): cls for cls in pipeline.JOINT}

HERE = Path(__file__).parent
SOURCES = (
    HERE / "autotune.py", HERE / "lower.py", HERE / "cost.py", HERE / "cuda.py", HERE / "ops.py",
    HERE / "grouped_gemm_scaled.py", HERE / "expert_mlp.py", HERE / "activations.py", HERE / "rewrite.py",
    HERE / "passes" / "choose_kernels.py", HERE / "passes" / "save_collectives.py",
    HERE / "passes" / "regather_weights.py", HERE / "passes" / "overlap_collectives.py", HERE / "parallel" / "costs.py",
    *sorted((HERE / "kernels").glob("*.py")),
)  # fmt: skip


class _Stage(CustomGraphPass):
    """A stage of ours behind a pass, or passes, of the user's."""

    def __init__(self, before: Any = None) -> None:
        self.before = [] if before is None else [*before] if isinstance(before, (list, tuple)) else [before]

    def __call__(self, graph: Graph) -> None:
        for other in self.before:
            other(graph)
        self.run(graph)

    def run(self, graph: Graph) -> None:
        raise NotImplementedError

    def uuid(self) -> Any:
        mine = get_hash_for_files(tuple(str(p) for p in SOURCES)), table_texts()
        theirs = [other.uuid() if hasattr(other, "uuid") else None for other in self.before]
        return None if None in theirs else (mine, *theirs)


class Schedule(_Stage):
    def __init__(self, before: Any = None, skip: frozenset[str] = frozenset()) -> None:
        super().__init__(before)
        self.skip = skip & JOINT.keys()

    def uuid(self) -> Any:
        known = super().uuid()
        return None if known is None else (known, *sorted(self.skip))

    def run(self, graph: Graph) -> None:
        assert graph.owning_module is not None
        for name, cls in JOINT.items():
            if name not in self.skip:
                log.debug("%s", cls()(graph.owning_module))


class Overlap(_Stage):
    def run(self, graph: Graph) -> None:
        assert graph.owning_module is not None
        log.debug("%s", OverlapCollectives()(graph.owning_module))


class Lower(_Stage):
    def run(self, graph: Graph) -> None:
        choose = ChooseKernels()
        assert graph.owning_module is not None
        report = choose(graph.owning_module)
        for name, kernel, why in choose.chosen:
            log.debug("%s: %s%s", name, kernel, f" ({why})" if why else "")
        torch._logging.trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": "moe_compile_choose_kernels", "encoding": "string"},
            payload_fn=lambda: f"{report}\n" + "\n".join(map(str, choose.chosen)),
        )


# torch 2.11 has no class for it, and no such pass in the key of its caches: the uuids of the stages stand for it
_SchedulerPass: Any = getattr(custom_graph_pass, "CustomSchedulerPass", object)


class _Late(_SchedulerPass):  # type: ignore[misc]
    """Inductor's kernels in their order, each fused one where its last part stood: a wait is no earlier than it was."""

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(self, nodes: list[Any]) -> list[Any]:
        nodes = self.before(nodes) if self.before is not None else nodes
        if not nodes:
            return nodes
        return list(nodes[0].scheduler.topological_sort_schedule(sorted(nodes, key=lambda n: n.max_order)))

    def uuid(self) -> Any:
        theirs = self.before.uuid() if hasattr(self.before, "uuid") else None
        return None if self.before is not None and theirs is None else ("moe_ep late", theirs)


def inductor_settings(skip: frozenset[str], collectives: bool = False) -> dict[str, Any]:
    """Settings for `compile_fx` that put the stages into Inductor, beside what the user has set.

    collectives: whether there are some whose order was chosen, which Inductor then keeps.  It would otherwise order
    kernels for the least memory, rank by rank.
    """
    settings: dict[str, Any] = {}
    if not skip >= JOINT.keys():
        settings["joint_custom_pre_pass"] = Schedule(inductor_config.joint_custom_pre_pass, skip)
    if "choose_kernels" not in skip:
        settings["post_grad_custom_pre_pass"] = Lower(inductor_config.post_grad_custom_pre_pass)
    if collectives and "overlap_collectives" not in skip:
        settings["post_grad_custom_post_pass"] = Overlap(inductor_config.post_grad_custom_post_pass)
        settings["_post_fusion_custom_pass"] = _Late(inductor_config._post_fusion_custom_pass)
        settings["reorder_for_peak_memory"] = False
    return settings


def aot_eager(gm: GraphModule, inputs: Sequence[Any], skip: frozenset[str]) -> Callable[..., Any]:
    """torch's backend of this name, with the schedule stage."""

    def partition(joint: GraphModule, *args: Any, **kwargs: Any) -> Any:
        Schedule(skip=skip)(joint.graph)
        return min_cut_rematerialization_partition(joint, *args, **kwargs)

    def run(gm: GraphModule, inputs: Any) -> Any:
        if "overlap_collectives" not in skip:
            Overlap()(gm.graph)
        return boxed_nop(gm, inputs)

    compile_aot = aot_autograd(
        fw_compiler=run, bw_compiler=run, partition_fn=partition, keep_inference_input_mutations=True
    )
    return compile_aot(gm, list(inputs))  # type: ignore[no-any-return]
