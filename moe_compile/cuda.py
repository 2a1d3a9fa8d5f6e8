"""The ops on CUDA where nobody compiles: our Triton kernels, or the definitions where a kernel's `why_not` objects.

Under Inductor `choose_kernels` decides instead, with a cost table; a node that it leaves comes here.  A list of
separate weights is stacked for each call.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moe_compile import ops


def dispatch(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return _run("dispatch", ops.dispatch_reference, x_TD, ids_TK, num_experts)  # type: ignore[no-any-return]


def grouped_gemm(x_RD: Tensor, weights: Sequence[Tensor], offsets_E: Tensor) -> Tensor:
    w_EFD = weights[0] if weights[0].dim() == 3 else torch.stack(list(weights))
    reference = lambda x, w, offsets: ops.grouped_gemm_reference(x, [w], offsets)  # noqa: E731
    return _run("grouped_gemm", reference, x_RD, w_EFD, offsets_E)  # type: ignore[no-any-return]


def grouped_gemm_dw(dy_RF: Tensor, x_RD: Tensor, offsets_E: Tensor) -> Tensor:
    return _run("grouped_gemm_dw", ops.grouped_gemm_dw_reference, dy_RF, x_RD, offsets_E)  # type: ignore[no-any-return]


def combine(y_RD: Tensor, weights_TK: Tensor | None, order_R: Tensor, offsets_E: Tensor, top_k: int) -> Tensor:
    args = (y_RD, weights_TK, order_R, offsets_E, top_k)
    return _run("combine", ops.combine_reference, *args)  # type: ignore[no-any-return]


def combine_backward(
    dout_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, order_R: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    args = (dout_TD, y_RD, weights_TK, order_R, offsets_E)
    return _run("combine_backward", ops.combine_backward_reference, *args)  # type: ignore[no-any-return]


def _run(op: str, reference: Callable[..., Any], *args: Any) -> Any:
    try:
        kernel = import_module(f"moe_compile.kernels.{op}")
    except ImportError:  # no Triton
        return reference(*args)
    return reference(*args) if kernel.why_not(*args) else getattr(kernel, op)(*args)


def register() -> None:
    """Make these the CUDA kernels of the ops."""
    for name in ("dispatch", "grouped_gemm", "grouped_gemm_dw", "combine", "combine_backward"):
        getattr(ops, name).register_kernel("cuda")(globals()[name])
