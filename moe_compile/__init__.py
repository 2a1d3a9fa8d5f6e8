"""moe_compile: compiler passes that make unmodified mixture-of-experts models fast.

    model = torch.compile(model, backend="moe_ep")
    print(moe_compile.explain(model, **batch))

Public: `explain`, `rewrite`, `build_mesh`, `parallelize`, `clip_grad_norm_`, `tile_optimizer`, `save_checkpoint`,
`load_checkpoint`, `save_safetensors`, `load_safetensors`, `Report`, `RegionReport`, `MoeCompileError`; the backend
"moe_ep".
"""

from moe_compile import hf_experts
from moe_compile.errors import MoeCompileError
from moe_compile.explain import explain, rewrite
from moe_compile.parallel.api import parallelize
from moe_compile.parallel.checkpoint import load_checkpoint, save_checkpoint
from moe_compile.parallel.clip import clip_grad_norm_
from moe_compile.parallel.hf_save import save_safetensors
from moe_compile.parallel.hf_weights import load_safetensors
from moe_compile.parallel.mesh import build_mesh
from moe_compile.parallel.tiled import tile_optimizer
from moe_compile.report import RegionReport, Report

__all__ = [
    "MoeCompileError",
    "RegionReport",
    "Report",
    "build_mesh",
    "clip_grad_norm_",
    "explain",
    "load_checkpoint",
    "load_safetensors",
    "parallelize",
    "rewrite",
    "save_checkpoint",
    "save_safetensors",
    "tile_optimizer",
]
__version__ = "0.1.0"

hf_experts.register()
