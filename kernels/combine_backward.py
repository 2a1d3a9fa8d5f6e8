"""Triton kernel for `moe_ep.combine_backward`: the gradients of a weighted `combine`.

    dy_RD[r]          = weights_TK[t, k] * dout_TD[t]
    dweights_TK[t, k] = sum over d of dout_TD[t, d] * y_RD[r, d]
    for the row r = position[t*K + k]; both zero where r >= offsets_E[E-1]

Letters    T tokens, K experts per token, R = T*K rows, E experts, D model width.
Types      dout, y, weights: bf16 | f16 | f32; dy as y, dweights as weights.  order, offsets: i32.
           Products and sums in f32.
Layout     All row-major; other strides are copied first.
Cost       Memory bound: R*D elements read, R*D written, T*D read, 12*R bytes for the positions.
           One program does all K rows of a token, so dout is read once.  No atomics, no host read.
Gradient   None: nothing differentiates it a second time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

import moe_compile.ops
from moe_compile.kernels.combine import MAX_TOP_K, positions
from moe_compile.kernels.dispatch import FLOATS, compiled

# -- kernel ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T"])
def _combine_backward_kernel(
    dout_ptr,
    y_ptr,
    weights_ptr,
    position_ptr,
    offsets_ptr,
    dy_ptr,
    dweights_ptr,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program does the K rows of one token, BLOCK_D columns at a time."""
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    real = (k < K) & (t < T)
    r = tl.load(position_ptr + t * K + k, mask=real, other=0).to(tl.int64)
    kept = real & (r < tl.load(offsets_ptr + E - 1))
    weights = tl.load(weights_ptr + t * K + k, mask=kept, other=0.0).to(tl.float32)
    dot = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        dout = tl.load(dout_ptr + t * D + d, mask=(d < D) & (t < T), other=0.0).to(tl.float32)
        cell = r[:, None] * D + d[None, :]
        inside = kept[:, None] & (d < D)[None, :]
        dot += tl.sum(dout[None, :] * tl.load(y_ptr + cell, mask=inside, other=0.0), axis=1)
        dy = tl.where(kept[:, None], weights[:, None] * dout[None, :], 0.0)
        inside = real[:, None] & (d < D)[None, :]
        tl.store(dy_ptr + cell, dy.to(dy_ptr.dtype.element_ty), mask=inside)
    dot = tl.where(kept, dot, 0.0).to(dweights_ptr.dtype.element_ty)
    tl.store(dweights_ptr + t * K + k, dot, mask=real)


# -- launcher: the grid is never empty, so that nothing is asked about T -----------------------


@triton_op("moe_ep_triton::combine_backward", mutates_args=())
def combine_backward(
    dout_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, order_R: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    """(dy_RD, dweights_TK)."""
    if reason := why_not(dout_TD, y_RD, weights_TK, order_R, offsets_E):
        raise ValueError(f"moe_ep_triton.combine_backward: {reason}")
    T, K, D = weights_TK.shape[0], int(weights_TK.shape[1]), int(y_RD.shape[1])
    dy_RD, dweights_TK = y_RD.new_empty(y_RD.shape), weights_TK.new_empty(weights_TK.shape)
    block_k, block_d, warps = _launch_config(K, D)
    run: Any = wrap_triton(_combine_backward_kernel) if compiled(_combine_backward_kernel) else _combine_backward_kernel
    run[(torch.sym_max(T, 1),)](
        dout_TD.contiguous(),
        y_RD.contiguous(),
        weights_TK.contiguous(),
        positions(order_R),
        offsets_E.contiguous(),
        dy_RD,
        dweights_TK,
        T,
        E=int(offsets_E.shape[0]),
        K=K,
        D=D,
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return dy_RD, dweights_TK


def _launch_config(K: int, D: int) -> tuple[int, int, int]:
    """(BLOCK_K, BLOCK_D, num_warps): about 4096 elements at a time."""
    block_k = triton.next_power_of_2(K)
    return block_k, max(16, min(4096 // block_k, 1024, triton.next_power_of_2(D))), 4


@combine_backward.register_fake
def _(dout_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, order_R: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor]:
    return y_RD.new_empty(y_RD.shape), weights_TK.new_empty(weights_TK.shape)


def why_not(dout_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, order_R: Tensor, offsets_E: Tensor) -> str | None:
    """Return why this kernel cannot take these arguments, or None if it can."""
    for name, tensor in (("dout", dout_TD), ("y", y_RD), ("weights", weights_TK)):
        if tensor.dtype not in FLOATS or tensor.dim() != 2:
            return f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected bf16, f16 or f32 in 2-D"
    if order_R.dtype != torch.int32 or offsets_E.dtype != torch.int32:
        return f"order is {order_R.dtype} and offsets are {offsets_E.dtype}, expected int32"
    if not 1 <= weights_TK.shape[1] <= MAX_TOP_K:
        return f"top_k is {weights_TK.shape[1]}, expected 1 to {MAX_TOP_K}"
    if offsets_E.shape[0] < 1:
        return "offsets are for 0 experts"
    return None


def compile_cases(hip: bool = False) -> list[tuple]:
    """What can be launched: (setting, kernel, types, constants, num_warps, num_stages)."""
    cases: list[tuple] = []
    for K, D in ((2, 256), (8, 4096), (16, 4096)):
        block_k, block_d, warps = _launch_config(K, D)
        args = {"dout_ptr": "*bf16", "y_ptr": "*bf16", "weights_ptr": "*bf16"}
        args |= {"position_ptr": "*i32", "offsets_ptr": "*i32", "dy_ptr": "*bf16"}
        args |= {"dweights_ptr": "*bf16", "T": "i32"}
        constants = {"E": 128, "K": K, "D": D, "BLOCK_K": block_k, "BLOCK_D": block_d}
        cases.append((f"K={K} D={D}", _combine_backward_kernel, args, constants, warps, 3))
    return cases


# -- reference: the meaning of the op, and the oracle of its tests --------------------------

combine_backward_reference = moe_compile.ops.combine_backward_reference
