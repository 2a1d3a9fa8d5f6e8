"""Triton kernels for `moe_ep.combine`: sum the rows of each token, weighted.

    out_TD[t] = sum over k of weights_TK[t, k] * y_RD[position[t*K + k]]
    position[order_R[r]] = r; a row r >= offsets_E[E-1] counts as zero

Letters    T tokens, K experts per token, R = T*K rows, E experts, D model width.
Types      y, weights: bf16 | f16 | f32; out: the dtype of y * weights.  order, offsets: i32.
           The sum runs in f32, in the order of k.
Layout     All row-major; other strides are copied first.
Cost       Memory bound: R*D elements read, T*D written, 12*R bytes for the positions, unless the sort gave them.
           No atomics, no host read.
Gradient   None here: `moe_ep.combine` has it (`moe_ep.combine_backward` where there are weights).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

import moe_compile.ops
from moe_compile.kernels.dispatch import FLOATS, compiled

MAX_TOP_K = 64  # the sum over k is unrolled
INVERT_BLOCK = 1024

# -- kernels --------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R"])
def _invert_kernel(order_ptr, position_ptr, R, BLOCK: tl.constexpr):
    """position[order[r]] = r."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(position_ptr + tl.load(order_ptr + r, mask=r < R, other=0), r, mask=r < R)


@triton.jit(do_not_specialize=["T"])
def _combine_kernel(
    y_ptr,
    weights_ptr,
    position_ptr,
    offsets_ptr,
    out_ptr,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program sums BLOCK_D elements of one token."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (d < D) & (t < T)
    stop = tl.load(offsets_ptr + E - 1)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(K):
        r = tl.load(position_ptr + t * K + k, mask=t < T, other=0).to(tl.int64)
        row = tl.load(y_ptr + r * D + d, mask=inside & (r < stop), other=0.0).to(tl.float32)
        if WEIGHTED:  # a pair that no expert took may have any weight, NaN too
            row *= tl.load(weights_ptr + t * K + k, mask=(t < T) & (r < stop), other=0.0).to(tl.float32)
        acc += row
    tl.store(out_ptr + t * D + d, acc.to(out_ptr.dtype.element_ty), mask=inside)


# -- launchers: grids are never empty, so that nothing is asked about T ------------------------


@triton_op("moe_ep_triton::combine", mutates_args=())
def combine(
    y_RD: Tensor,
    weights_TK: Tensor | None,
    order_R: Tensor,
    offsets_E: Tensor,
    top_k: int,
    position_R: Tensor | None = None,
) -> Tensor:
    """out_TD.  position_R: the inverse of `order_R`, if the sort gave it; else it is made, by one more launch."""
    if reason := why_not(y_RD, weights_TK, order_R, offsets_E, top_k, position_R):
        raise ValueError(f"moe_ep_triton.combine: {reason}")
    return launch(y_RD, weights_TK, positions(order_R) if position_R is None else position_R, offsets_E, top_k)


def launch(y_RD: Tensor, weights_TK: Tensor | None, position_R: Tensor, offsets_E: Tensor, top_k: int) -> Tensor:
    """out_TD, of arguments that `why_not` does not object to."""
    out_TD = _output(y_RD, weights_TK, position_R, top_k)
    y_RD, position_R, (T, D) = y_RD.contiguous(), position_R.contiguous(), out_TD.shape
    weights = y_RD if weights_TK is None else weights_TK.contiguous()
    block, warps = _launch_config(int(D))
    kernel: Any = wrap_triton(_combine_kernel) if compiled(_combine_kernel) else _combine_kernel
    kernel[(torch.sym_max(T, 1), max(triton.cdiv(int(D), block), 1))](
        y_RD,
        weights,
        position_R,
        offsets_E.contiguous(),
        out_TD,
        T,
        E=int(offsets_E.shape[0]),
        K=top_k,
        D=int(D),
        WEIGHTED=weights_TK is not None,
        BLOCK_D=block,
        num_warps=warps,
    )
    return out_TD


def positions(order_R: Tensor) -> Tensor:
    """i32[R]: the row of each pair, the inverse of the permutation `order_R`."""
    order_R, R = order_R.contiguous(), order_R.shape[0]
    position_R = torch.empty_like(order_R)
    kernel: Any = wrap_triton(_invert_kernel) if compiled(_invert_kernel) else _invert_kernel
    grid = (torch.sym_max((R + INVERT_BLOCK - 1) // INVERT_BLOCK, 1),)
    kernel[grid](order_R, position_R, R, BLOCK=INVERT_BLOCK, num_warps=4)
    return position_R


def _launch_config(D: int) -> tuple[int, int]:
    """(BLOCK_D, num_warps)."""
    return (1024, 4) if D > 512 else (max(16, triton.next_power_of_2(D)), 2)


@combine.register_fake
def _(
    y_RD: Tensor,
    weights_TK: Tensor | None,
    order_R: Tensor,
    offsets_E: Tensor,
    top_k: int,
    position_R: Tensor | None = None,
) -> Tensor:
    return _output(y_RD, weights_TK, order_R, top_k)


def _output(y_RD: Tensor, weights_TK: Tensor | None, pairs_R: Tensor, top_k: int) -> Tensor:
    if weights_TK is None:
        return y_RD.new_empty(pairs_R.shape[0] // top_k, y_RD.shape[1])
    dtype = torch.promote_types(y_RD.dtype, weights_TK.dtype)
    return y_RD.new_empty(weights_TK.shape[0], y_RD.shape[1], dtype=dtype)


def why_not(
    y_RD: Tensor,
    weights_TK: Tensor | None,
    order_R: Tensor,
    offsets_E: Tensor,
    top_k: int,
    position_R: Tensor | None = None,
) -> str | None:
    """Return why these kernels cannot take these arguments, or None if they can."""
    if y_RD.dtype not in FLOATS:
        return f"y is {y_RD.dtype}, expected bf16, f16 or f32"
    if weights_TK is not None and weights_TK.dtype not in FLOATS:
        return f"weights are {weights_TK.dtype}, expected bf16, f16 or f32"
    if order_R.dtype != torch.int32 or offsets_E.dtype != torch.int32:
        return f"order is {order_R.dtype} and offsets are {offsets_E.dtype}, expected int32"
    if not 1 <= top_k <= MAX_TOP_K:
        return f"top_k is {top_k}, expected 1 to {MAX_TOP_K}"
    if weights_TK is not None and weights_TK.shape[1] != top_k:
        return f"top_k is {top_k}, weights have {weights_TK.shape[1]} per token"
    if offsets_E.shape[0] < 1:
        return "offsets are for 0 experts"
    if position_R is not None and (position_R.dtype != torch.int32 or position_R.dim() != 1):
        return f"positions are {position_R.dtype} with {position_R.dim()} dimensions, expected int32 with 1"
    return None


def compile_cases(hip: bool = False) -> list[tuple]:
    """What can be launched: (setting, kernel, types, constants, num_warps, num_stages)."""
    args = {"order_ptr": "*i32", "position_ptr": "*i32", "R": "i32"}
    cases: list[tuple] = [("invert", _invert_kernel, args, {"BLOCK": INVERT_BLOCK}, 4, 3)]
    for D, weighted in ((256, True), (4096, True), (4096, False)):
        block, warps = _launch_config(D)
        args = {"y_ptr": "*bf16", "weights_ptr": "*bf16", "position_ptr": "*i32"}
        args |= {"offsets_ptr": "*i32", "out_ptr": "*bf16", "T": "i32"}
        constants = {"E": 128, "K": 8, "D": D, "WEIGHTED": weighted, "BLOCK_D": block}
        setting = f"D={D}{' weighted' if weighted else ''}"
        cases.append((setting, _combine_kernel, args, constants, warps, 3))
    return cases


# -- reference: the meaning of the op, and the oracle of its tests --------------------------

combine_reference = moe_compile.ops.combine_reference
