"""Under Inductor's `max_autotune` the grouped product is timed where it is compiled, not estimated.

`choose_kernels` writes `moe_ep_timed.grouped_gemm` where two implementations could serve: our Triton kernel and
`torch._grouped_mm`.  Inductor times each on random rows, the experts having as many each, and writes the faster one
into the graph; its caches keep the choice.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_compile import cuda

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.library.custom_op("moe_ep_timed::grouped_gemm", mutates_args=())
def grouped_gemm(x_RD: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    """`moe_ep.grouped_gemm` of one stack, for Inductor to choose who computes it."""
    return cuda.grouped_gemm(x_RD, [w_EFD], offsets_E)


def _like(x_RD: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], w_EFD.shape[1])


def by_triton(x_RD: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    return torch.ops.moe_ep_triton.grouped_gemm(x_RD, w_EFD, offsets_E)  # type: ignore[no-any-return]


@torch.library.custom_op("moe_ep_timed::torch_grouped_mm", mutates_args=())
def by_torch(x_RD: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    """`torch._grouped_mm`, with the rows behind the last offset, which it leaves unset, as zeros.

    One op: torch 2.11 cannot trace a candidate that makes a tensor of its own.
    """
    y_RF = torch._grouped_mm(x_RD, w_EFD.permute(0, 2, 1), offsets_E)  # type: ignore[attr-defined]
    taken = torch.arange(x_RD.shape[0], dtype=torch.int32, device=x_RD.device) < offsets_E[-1]
    return torch.where(taken.unsqueeze(1), y_RF, 0.0)


def grouped_mm(x_RD: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    return torch.ops.moe_ep_timed.torch_grouped_mm(x_RD, w_EFD, offsets_E)  # type: ignore[no-any-return]


grouped_gemm.register_fake(_like)
by_torch.register_fake(_like)


class _Operands:
    """What Inductor times with: `x` is asked for before `offsets`, which have to count its rows."""

    def x(self, like: Tensor) -> Tensor:
        self.rows = like.shape[0]
        return torch.randn(like.shape, dtype=like.dtype, device=like.device)

    def offsets(self, like: Tensor) -> Tensor:
        num_experts = like.shape[0]
        ends = torch.arange(1, num_experts + 1, dtype=torch.int64) * self.rows // max(num_experts, 1)
        return ends.to(like.dtype).to(like.device)


@functools.cache
def register() -> None:
    """Tell Inductor of the op, once, when it is first used: its lowerings take seconds to import."""
    lower_to(by_triton, grouped_mm)


def lower_to(*candidates: Product) -> None:
    """Have Inductor choose among these functions of (x, w, offsets)."""
    from torch._inductor import lowering
    from torch._inductor.ir import ExternKernel, TensorBox
    from torch._inductor.kernel.custom_op import CustomOpConfig, register_custom_op_autotuning

    operands = _Operands()
    register_custom_op_autotuning(
        grouped_gemm,
        configs=[CustomOpConfig(product) for product in candidates],
        name="moe_ep_grouped_gemm",
        input_gen_fns={"x_RD": operands.x, "offsets_E": operands.offsets},
    )
    target = torch.ops.moe_ep_timed.grouped_gemm.default
    lowerings: dict[Any, Any] = getattr(lowering, "user_lowerings", lowering.lowerings)  # torch 2.11 has one table
    choose = lowerings[target]

    def realised(*args: Any) -> Any:  # torch 2.11 times inputs that are in memory, and no others
        return choose(*(TensorBox(ExternKernel.realize_input(v)) for v in args))

    lowerings[target] = realised
