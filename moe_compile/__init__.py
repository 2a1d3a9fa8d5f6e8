"""moe_compile: compiler passes that make unmodified mixture-of-experts models fast.

    model = torch.compile(model, backend="moe_ep")
    print(moe_compile.explain(model, **batch))

Public: `explain`, `rewrite`, `Report`, `RegionReport`, `MoeCompileError`; the backend "moe_ep".
"""

from moe_compile.errors import MoeCompileError
from moe_compile.explain import explain, rewrite
from moe_compile.report import RegionReport, Report

__all__ = ["MoeCompileError", "RegionReport", "Report", "explain", "rewrite"]
__version__ = "0.1.0"
