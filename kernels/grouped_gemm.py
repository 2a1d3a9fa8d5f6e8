"""Triton kernels for `moe_ep.grouped_gemm` with one stacked weight.

    y_RF[r, f] = sum over d of x_RD[r, d] * w_EFD[e, f, d]
    for the expert e with offsets_E[e-1] <= r < offsets_E[e]; zero for r >= offsets_E[E-1]

A tile is BLOCK_M rows of one expert by BLOCK_N columns.  A first small kernel writes the expert
and the rows of each row tile, ceil(R/BLOCK_M) + E of them at most; tiles left over do nothing, and
the rows behind the last offset are a group of their own.

Letters    R routed rows, E experts, D inner width, F outer width.
Types      x, w, y: bf16 | f16 | f32, all the same, summed in f32 (f32: no tf32).  offsets: i32.
Layout     x and y row-major (x of other strides is copied first); w of any strides, fast where d
           (forward) or f (a transposed view, for the input gradient) is contiguous.
Cost       2*R*D*F FLOP, R*(D + F) + E*D*F elements.  Compute bound from about 125 rows per expert
           on (H100, bf16), else by reading w.  Consecutive tiles share w.  No host read.
Gradient   None here: `moe_ep.grouped_gemm` has it (this op with w transposed, `grouped_gemm_dw`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

import moe_compile.ops
from moe_compile.kernels import settings
from moe_compile.kernels.dispatch import FLOATS, MAX_EXPERTS, compiled

GROUP_M = 8  # row tiles that take turns before the next column tile

# -- kernels --------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R"])
def _row_tiles_kernel(offsets_ptr, tiles_ptr, R, E: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """tiles[i] = (expert, first row, end of its rows) of row tile i; expert > E: no such tile."""
    i = tl.program_id(0)
    e = tl.arange(0, GROUPS)  # group E: the rows behind the last offset
    end = tl.load(offsets_ptr + e, mask=e < E, other=0)
    end = tl.where(e < E, end, R)
    start = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e <= E), other=0)
    start = tl.where(e <= E, start, R)
    num_tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(num_tiles, 0)
    mine = (i < last) & (i >= last - num_tiles)
    first_row = start + (i - last + num_tiles) * BLOCK_M
    found = tl.sum(mine.to(tl.int32), 0)
    tl.store(tiles_ptr + 3 * i, tl.where(found > 0, tl.sum(tl.where(mine, e, 0), 0), E + 1))
    tl.store(tiles_ptr + 3 * i + 1, tl.sum(tl.where(mine, first_row, 0), 0))
    tl.store(tiles_ptr + 3 * i + 2, tl.sum(tl.where(mine, end, 0), 0))


@triton.jit
def program_tile(tiles_ptr, num_row_tiles, NUM_COL_TILES: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """(expert, rows, which of them are its own, column tile) of this program; expert > E: nothing to do.

    Row tiles run fastest, within groups of GROUP_M, so that neighbours read the same weights.
    """
    group = tl.program_id(0) // (GROUP_M * NUM_COL_TILES)
    within = tl.program_id(0) % (GROUP_M * NUM_COL_TILES)
    group_size = tl.minimum(num_row_tiles - group * GROUP_M, GROUP_M)
    tile = group * GROUP_M + within % group_size
    e = tl.load(tiles_ptr + 3 * tile).to(tl.int64)
    r = tl.load(tiles_ptr + 3 * tile + 1).to(tl.int64) + tl.arange(0, BLOCK_M)
    return e, r, r < tl.load(tiles_ptr + 3 * tile + 2), within // group_size


@triton.jit
def store_columns(out_ptr, tile, r, r_in, f, F: tl.constexpr, ROW: tl.constexpr):
    """out[r, f] = tile, rows of ROW numbers, of which the first F are meant."""
    tl.store(out_ptr + r[:, None] * ROW + f[None, :], tile, mask=r_in[:, None] & (f < F)[None, :])


@triton.jit(do_not_specialize=["num_row_tiles"])
def _grouped_gemm_kernel(
    x_ptr,
    w_ptr,
    tiles_ptr,
    y_ptr,
    num_row_tiles,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_F: tl.constexpr,
    STRIDE_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_col_tiles: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    e, r, r_in, column = program_tile(tiles_ptr, num_row_tiles, num_col_tiles, BLOCK_M, GROUP_M)
    if e > E:
        return
    f = column * BLOCK_N + tl.arange(0, BLOCK_N)
    f_in = f < F
    y_ptrs = y_ptr + r[:, None] * F + f[None, :]
    y_in = r_in[:, None] & f_in[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if e == E:
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=y_in)
        return
    d = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + r[:, None] * D + d[None, :]
    w_ptrs = w_ptr + e * STRIDE_E + f.to(tl.int64)[None, :] * STRIDE_F
    w_ptrs += d.to(tl.int64)[:, None] * STRIDE_D
    for first in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            x = tl.load(x_ptrs, mask=r_in[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=f_in[None, :], other=0.0)
        else:
            d_in = first + d < D
            x = tl.load(x_ptrs, mask=r_in[:, None] & d_in[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=f_in[None, :] & d_in[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * STRIDE_D
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=y_in)


# -- launcher: the grid is never empty, so that nothing is asked about R -----------------------


@triton_op("moe_ep_triton::grouped_gemm", mutates_args=())
def grouped_gemm(x_RD: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    if reason := why_not(x_RD, w_EFD, offsets_E):
        raise ValueError(f"moe_ep_triton.grouped_gemm: {reason}")
    x_RD, R, (E, F, D) = x_RD.contiguous(), x_RD.shape[0], map(int, w_EFD.shape)
    y_RF = x_RD.new_empty(R, F)
    rows, form = rows_per_expert(R, E), "d packed" if w_EFD.stride(2) == 1 else "f packed"
    seed = _seed(rows, x_RD.dtype, torch.version.hip is not None)
    setting = settings.choose("grouped_gemm", form, x_RD.device, x_RD.dtype, rows, D, F, seed=seed)
    block_m, block_n, block_k, warps, stages = setting
    tiles, num_row_tiles = row_tiles(offsets_E, R, block_m)
    run: Any = _grouped_gemm_kernel
    run = wrap_triton(_grouped_gemm_kernel) if compiled(run) else run
    arguments = (x_RD, w_EFD, tiles, y_RF, num_row_tiles, E, D, F, *map(int, w_EFD.stride()))
    run[(num_row_tiles * triton.cdiv(F, block_n),)](
        *arguments, block_m, block_n, block_k, GROUP_M, num_warps=warps, num_stages=stages
    )
    return y_RF


def row_tiles(offsets_E: Tensor, R: int | torch.SymInt, block_m: int) -> tuple[Tensor, int | torch.SymInt]:
    """(i32[tiles, 3], number of tiles): expert, first row and end of its rows of each tile of `block_m` rows."""
    E = int(offsets_E.shape[0])
    num_row_tiles = (R + block_m - 1) // block_m + E
    tiles = offsets_E.new_empty(num_row_tiles, 3)
    make: Any = wrap_triton(_row_tiles_kernel) if compiled(_row_tiles_kernel) else _row_tiles_kernel
    groups = triton.next_power_of_2(E + 1)
    make[(num_row_tiles,)](offsets_E.contiguous(), tiles, R, E, groups, block_m, num_warps=4)
    return tiles, num_row_tiles


def rows_per_expert(R: int | torch.SymInt, E: int) -> int:
    """About how many rows an expert has; a guess that adds no guard where R is symbolic."""
    if isinstance(R, torch.SymInt):
        R = R.node.hint if R.node.has_hint() else 256 * E
    return int(R) // E


def _seed(rows: int, dtype: torch.dtype, hip: bool) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages); the LDS of gfx942 holds 64 KiB."""
    if dtype == torch.float32:  # no tensor cores: small tiles, operands in registers
        return (64, 64, 16, 8, 2) if rows >= 32 else (16, 64, 16, 4, 2)
    if rows >= 64:
        return (128, 128, 64, 8, 2 if hip else 3)
    return (64, 128, 64, 4, 2 if hip else 4) if rows >= 16 else (16, 64, 128, 4, 2 if hip else 4)


@grouped_gemm.register_fake
def _(x_RD: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], w_EFD.shape[1])


def why_not(x_RD: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> str | None:
    """Return why these kernels cannot take these arguments, or None if they can."""
    if x_RD.dim() != 2 or w_EFD.dim() != 3:
        return f"x has {x_RD.dim()} dimensions and w {w_EFD.dim()}, expected 2 and 3"
    if x_RD.dtype not in FLOATS or w_EFD.dtype != x_RD.dtype:
        return f"x is {x_RD.dtype} and w is {w_EFD.dtype}, expected one of bf16, f16, f32"
    if offsets_E.dtype != torch.int32:
        return f"offsets are {offsets_E.dtype}, expected int32"
    if not 1 <= w_EFD.shape[0] <= MAX_EXPERTS:
        return f"{w_EFD.shape[0]} experts, expected 1 to {MAX_EXPERTS}"
    if offsets_E.shape[0] != w_EFD.shape[0]:
        return f"offsets are for {offsets_E.shape[0]} experts, w for {w_EFD.shape[0]}"
    if x_RD.shape[1] != w_EFD.shape[2]:
        return f"rows of x have {x_RD.shape[1]} elements, those of w {w_EFD.shape[2]}"
    return None


def compile_cases(hip: bool = False) -> list[tuple]:
    """What can be launched: (setting, kernel, types, constants, num_warps, num_stages)."""
    E, F, D = 128, 1536, 2048
    args = {"offsets_ptr": "*i32", "tiles_ptr": "*i32", "R": "i32"}
    constants = {"E": E, "GROUPS": triton.next_power_of_2(E + 1), "BLOCK_M": 128}
    cases: list[tuple] = [("row tiles", _row_tiles_kernel, args, constants, 4, 3)]
    sizes = {"E": E, "D": D, "F": F, "STRIDE_E": F * D, "GROUP_M": GROUP_M}
    strides = {"d": {"STRIDE_F": D, "STRIDE_D": 1}, "f": {"STRIDE_F": 1, "STRIDE_D": F}}
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for rows in (256, 32, 1):
            m, n, k, warps, stages = _seed(rows, dtype, hip)
            for packed in "df":
                args = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), f"*{short}")
                args |= {"tiles_ptr": "*i32", "num_row_tiles": "i32"}
                setting = f"{short} {m}x{n}x{k} w{warps} s{stages}, {packed} packed"
                constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k} | sizes | strides[packed]
                cases.append((setting, _grouped_gemm_kernel, args, constants, warps, stages))
    return cases


# -- reference: the meaning of the op, and the oracle of its tests --------------------------


def grouped_gemm_reference(x_RD: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    return moe_compile.ops.grouped_gemm_reference(x_RD, [w_EFD], offsets_E)
