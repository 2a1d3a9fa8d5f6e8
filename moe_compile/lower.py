"""The lower stage inside Inductor: `choose_kernels`, run on its forward and backward graphs.

One object, since torch 2.11 takes no list of passes; a pass that the user had set runs first.  Its `uuid` covers our
source, so that Inductor's caches are right; nothing is reported from inside, because a cache hit skips the pass.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from moe_compile.passes.choose_kernels import ChooseKernels

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
SOURCES = (
    HERE / "lower.py", HERE / "cost.py", HERE / "ops.py", HERE / "expert_mlp.py", HERE / "rewrite.py",
    HERE / "passes" / "choose_kernels.py", *sorted((HERE / "kernels").glob("*.py")),
)  # fmt: skip


class Lower(CustomGraphPass):
    def __init__(self, before: Any = None) -> None:
        self.before = before

    def __call__(self, graph: Graph) -> None:
        if self.before is not None:
            self.before(graph)
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

    def uuid(self) -> Any:
        mine = get_hash_for_files(tuple(str(p) for p in SOURCES))
        if self.before is None:
            return mine
        theirs = self.before.uuid() if hasattr(self.before, "uuid") else None
        return (mine, theirs) if theirs is not None else None


def inductor_settings() -> dict[str, Any]:
    """Settings for `compile_fx` that put the lower stage into Inductor, beside what the user has set."""
    return {"post_grad_custom_pre_pass": Lower(inductor_config.post_grad_custom_pre_pass)}
