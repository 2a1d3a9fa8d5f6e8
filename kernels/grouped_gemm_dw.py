"""Triton kernel for `moe_ep.grouped_gemm_dw`: the weight gradient of a grouped GEMM.

    dw_EFD[e, f, d] = sum over offsets_E[e-1] <= r < offsets_E[e] of dy_RF[r, f] * x_RD[r, d]

One program writes one tile of one expert, whatever its number of rows: zeros where it has none.  With `order_R`, rows
of dy, of x or of both are those of tokens, gathered as they are loaded: row r is row order_R[r] // K of what is given.

Letters    K experts per token, R routed rows, E experts, D inner width, F outer width.
Types      dy, x, dw: bf16 | f16 | f32, all the same, summed in f32 (f32: no tf32).  order, offsets: i32.
Layout     All row-major; other strides are copied first.
Cost       2*R*D*F FLOP, R*(D + F) elements read for each tile row and column, E*D*F written.
           Compute bound from about 125 rows per expert on (H100, bf16), else by writing dw.
           No atomics, no split over rows, no host read.
Gradient   None: nothing differentiates it a second time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

import moe_compile.ops
from moe_compile.kernels import settings
from moe_compile.kernels.dispatch import FLOATS, compiled
from moe_compile.kernels.tiles import rows_per_expert

# -- kernel ---------------------------------------------------------------------------------


@triton.jit
def _grouped_gemm_dw_kernel(
    dy_ptr,
    x_ptr,
    order_ptr,
    offsets_ptr,
    dw_ptr,
    D: tl.constexpr,
    F: tl.constexpr,
    DY_K: tl.constexpr,
    X_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The tiles of one expert run together: they share its rows.  DY_K, X_K: K where rows are gathered, else 0.
    num_f_tiles: tl.constexpr = (F + BLOCK_M - 1) // BLOCK_M
    num_tiles: tl.constexpr = num_f_tiles * ((D + BLOCK_N - 1) // BLOCK_N)
    e = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    f = tile % num_f_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tile // num_f_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    start = tl.load(offsets_ptr + e - 1, mask=e > 0, other=0)
    stop = tl.load(offsets_ptr + e)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(start, stop, BLOCK_K):
        rows = first + k
        r_in = rows < stop
        dy_rows = rows.to(tl.int64)
        x_rows = dy_rows
        if DY_K > 0 or X_K > 0:
            pair = tl.load(order_ptr + rows, mask=r_in, other=0)
            if DY_K > 0:
                dy_rows = (pair // DY_K).to(tl.int64)
            if X_K > 0:
                x_rows = (pair // X_K).to(tl.int64)
        dy_ptrs = dy_ptr + dy_rows[:, None] * F + f[None, :]
        x_ptrs = x_ptr + x_rows[:, None] * D + d[None, :]
        dy = tl.load(dy_ptrs, mask=r_in[:, None] & (f < F)[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=r_in[:, None] & (d < D)[None, :], other=0.0)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision="ieee")
    dw_ptrs = dw_ptr + e.to(tl.int64) * F * D + f.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=(f < F)[:, None] & (d < D)[None, :])


# -- launcher -------------------------------------------------------------------------------


@triton_op("moe_ep_triton::grouped_gemm_dw", mutates_args=())
def grouped_gemm_dw(
    dy_RF: Tensor,
    x_RD: Tensor,
    offsets_E: Tensor,
    order_R: Tensor | None = None,
    dy_top_k: int = 0,
    x_top_k: int = 0,
) -> Tensor:
    """dw_EFD.  dy_top_k, x_top_k: K if that operand has a row for each token, else 0."""
    if reason := why_not(dy_RF, x_RD, offsets_E, order_R, dy_top_k, x_top_k):
        raise ValueError(f"moe_ep_triton.grouped_gemm_dw: {reason}")
    E, F, D = int(offsets_E.shape[0]), int(dy_RF.shape[1]), int(x_RD.shape[1])
    dw_EFD, R = dy_RF.new_empty(E, F, D), dy_RF.shape[0] if order_R is None else order_R.shape[0]
    rows, form = rows_per_expert(R, E), "rows" if order_R is None else "gathered"
    seed = _seed(rows, dy_RF.dtype, torch.version.hip is not None, order_R is not None)
    setting = settings.choose("grouped_gemm_dw", form, x_RD.device, x_RD.dtype, rows, D, F, seed=seed)
    block_m, block_n, block_k, warps, stages = setting
    order = offsets_E if order_R is None else order_R.contiguous()
    run: Any = wrap_triton(_grouped_gemm_dw_kernel) if compiled(_grouped_gemm_dw_kernel) else _grouped_gemm_dw_kernel
    run[(E * triton.cdiv(F, block_m) * triton.cdiv(D, block_n),)](
        *(dy_RF.contiguous(), x_RD.contiguous(), order, offsets_E.contiguous(), dw_EFD, D, F),
        *(dy_top_k, x_top_k, block_m, block_n, block_k),
        num_warps=warps,
        num_stages=stages,
    )
    return dw_EFD


def _seed(rows: int, dtype: torch.dtype, hip: bool, gathered: bool = False) -> tuple[int, int, int, int, int]:
    """(BLOCK_M over F, BLOCK_N over D, BLOCK_K rows, num_warps, num_stages).

    Two stages more where rows are gathered: Triton 3.6 and 3.7 spend them on the load of the indices.
    """
    if dtype == torch.float32:  # no tensor cores: small tiles, operands in registers
        return (64, 64, 16, 8, 2)
    stages = 2 if hip else 5 if gathered else 3
    return (128, 128, 64, 8, stages) if rows >= 64 else (128, 128, 32, 8, stages)


@grouped_gemm_dw.register_fake
def _(
    dy_RF: Tensor,
    x_RD: Tensor,
    offsets_E: Tensor,
    order_R: Tensor | None = None,
    dy_top_k: int = 0,
    x_top_k: int = 0,
) -> Tensor:
    return dy_RF.new_empty(offsets_E.shape[0], dy_RF.shape[1], x_RD.shape[1])


def why_not(
    dy_RF: Tensor,
    x_RD: Tensor,
    offsets_E: Tensor,
    order_R: Tensor | None = None,
    dy_top_k: int = 0,
    x_top_k: int = 0,
) -> str | None:
    """Return why this kernel cannot take these arguments, or None if it can."""
    if dy_RF.dim() != 2 or x_RD.dim() != 2:
        return f"dy has {dy_RF.dim()} dimensions and x {x_RD.dim()}, expected 2"
    if dy_RF.dtype not in FLOATS or x_RD.dtype != dy_RF.dtype:
        return f"dy is {dy_RF.dtype} and x is {x_RD.dtype}, expected one of bf16, f16, f32"
    if offsets_E.dtype != torch.int32:
        return f"offsets are {offsets_E.dtype}, expected int32"
    if offsets_E.shape[0] < 1:
        return "offsets are for 0 experts"
    if order_R is not None and order_R.dtype != torch.int32:
        return f"order is {order_R.dtype}, expected int32"
    if (order_R is None) != (dy_top_k == 0 and x_top_k == 0) or min(dy_top_k, x_top_k) < 0:
        return f"rows of {dy_top_k} and {x_top_k} experts a token, {'no' if order_R is None else 'an'} order"
    return None


def compile_cases(hip: bool = False) -> list[tuple]:
    """What can be launched: (setting, kernel, types, constants, num_warps, num_stages)."""
    cases: list[tuple] = []
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for rows in (256, 32) if short == "bf16" else (256,):
            for dy_k, x_k in ((0, 0), (8, 0), (0, 8)):
                m, n, k, warps, stages = _seed(rows, dtype, hip, dy_k + x_k > 0)
                args = dict.fromkeys(("dy_ptr", "x_ptr", "dw_ptr"), f"*{short}")
                args |= {"offsets_ptr": "*i32", "order_ptr": "*i32"}
                constants = {"D": 2048, "F": 1536, "DY_K": dy_k, "X_K": x_k, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
                gathered = " dy gathered" if dy_k else " x gathered" if x_k else ""
                setting = f"{short} {m}x{n}x{k} w{warps} s{stages}{gathered}"
                cases.append((setting, _grouped_gemm_dw_kernel, args, constants, warps, stages))
    return cases


# -- reference: the meaning of the op, and the oracle of its tests --------------------------

grouped_gemm_dw_reference = moe_compile.ops.grouped_gemm_dw_reference
