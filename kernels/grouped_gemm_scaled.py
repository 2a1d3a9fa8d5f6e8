"""Triton kernel for `moe_ep.grouped_gemm_scaled`: one stack of float8 weights, widened in registers.

    y_RF[r, f] = scale * sum over d of x_RD[r, d] * w_EFD[e, f, d]
    for the expert e with offsets_E[e-1] <= r < offsets_E[e]; zero for r >= offsets_E[E-1]
    scale is scales[e] or scales[e, f], or 1, or, within the sum, scales[e, f // (F/A), d // (D/B)] of A x B blocks

Letters    R routed rows, E experts, D inner width, F outer width.
Types      x, y: bf16 | f16 | f32, the same.  w: e4m3fn (NVIDIA: from 8.9 on) | e5m2.  scales: f32 | bf16 | f16.
           w is exact in the type of x; sums and the scale in f32 (no tf32), rounded once.  offsets: i32.
           The scale of a block multiplies the sum of its products, BLOCK_K at a time, which divides the block's width.
Layout     x, y and scales row-major (copied first, if they are not); w of any strides, fast where d (forward) or f (a
           transposed view, for the gradient of x) is contiguous.
Cost       2*R*D*F FLOP; R*(D + F) elements of x's type and E*D*F bytes of weights, half of what bf16 weights are.
           Decoding is bound by these.  No host read.
Gradient   None here: `moe_ep.grouped_gemm_scaled` has it (this op with w transposed).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from moe_compile import grouped_gemm_scaled as definition
from moe_compile.kernels import settings
from moe_compile.kernels.dispatch import FLOATS, MAX_EXPERTS, compiled
from moe_compile.kernels.grouped_gemm import _seed as product_seed
from moe_compile.kernels.tiles import GROUP_M, fills, program_tile, row_tiles, rows_per_expert, sum_products
from moe_compile.kernels.weights import stacked

NO_SCALE, BY_EXPERT, BY_FEATURE, BY_BLOCK = 0, 1, 2, 3  # but for the first, dimensions of the scales

# -- kernel ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_row_tiles"])
def _grouped_gemm_scaled_kernel(
    x_ptr,
    w_ptr,
    scales_ptr,
    tiles_ptr,
    y_ptr,
    num_row_tiles,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_F: tl.constexpr,
    STRIDE_D: tl.constexpr,
    SCALED: tl.constexpr,
    OF_F: tl.constexpr,
    OF_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """OF_F, OF_D: the sizes of a block, if there are scales of blocks."""
    num_col_tiles: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    e, r, r_in, column = program_tile(tiles_ptr, tl.program_id(0), num_row_tiles, num_col_tiles, BLOCK_M, GROUP_M)
    f = column * BLOCK_N + tl.arange(0, BLOCK_N)
    f_in = f < F
    y_ptrs = y_ptr + r[:, None] * F + f[None, :]
    y_in = r_in[:, None] & f_in[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if e == E:
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=y_in)
    elif e < E:
        d = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + r[:, None] * D + d[None, :]
        w_ptrs = w_ptr + e * STRIDE_E + f.to(tl.int64)[None, :] * STRIDE_F + d.to(tl.int64)[:, None] * STRIDE_D
        if SCALED == 3:
            of_f = scales_ptr + (e * (F // OF_F) + f // OF_F) * (D // OF_D)
            acc = sum_products(acc, x_ptrs, w_ptrs, r_in, f_in, D, STRIDE_D, BLOCK_K, of_f, OF_D)
        else:
            acc = sum_products(acc, x_ptrs, w_ptrs, r_in, f_in, D, STRIDE_D, BLOCK_K)
        if SCALED == 1:
            acc *= tl.load(scales_ptr + e).to(tl.float32)
        elif SCALED == 2:
            acc *= tl.load(scales_ptr + e * F + f, mask=f_in, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=y_in)


# -- launcher: the grid is never empty, so that nothing is asked about R -----------------------


@triton_op("moe_ep_triton::grouped_gemm_scaled", mutates_args=())
def grouped_gemm_scaled(x_RD: Tensor, w_EFD: Tensor, scales: Tensor | None, offsets_E: Tensor) -> Tensor:
    """y_RF."""
    if reason := why_not(x_RD, w_EFD, scales, offsets_E):
        raise ValueError(f"moe_ep_triton.grouped_gemm_scaled: {reason}")
    x_RD, R, w = x_RD.contiguous(), x_RD.shape[0], stacked(w_EFD)
    E, F, D = w.shape
    y_RF, rows = x_RD.new_empty(R, F), rows_per_expert(R, E)
    seed = _seed(rows, x_RD.dtype, torch.version.hip is not None, fills(R, E, F, 64))
    setting = settings.choose("grouped_gemm_scaled", w.packed(), x_RD.device, x_RD.dtype, rows, D, F, seed=seed)
    block_m, block_n, block_k, warps, stages = setting
    of_f, of_d = (F // scales.shape[1], D // scales.shape[2]) if scales is not None and scales.dim() == 3 else (0, 0)
    block_k = min(block_k, of_d & -of_d) if of_d else block_k
    tiles, num_row_tiles = row_tiles(offsets_E, R, block_m)
    run: Any = _grouped_gemm_scaled_kernel
    run = wrap_triton(_grouped_gemm_scaled_kernel) if compiled(run) else run
    run[(num_row_tiles * triton.cdiv(F, block_n),)](
        *(x_RD, w.pointer, y_RF if scales is None else scales.contiguous(), tiles, y_RF, num_row_tiles, E, D, F),
        *(*w.stride, NO_SCALE if scales is None else scales.dim(), of_f, of_d, block_m, block_n, block_k, GROUP_M),
        num_warps=warps,
        num_stages=stages,
    )
    return y_RF


def _seed(rows: int, dtype: torch.dtype, hip: bool, filled: bool = True) -> tuple[int, int, int, int, int]:
    """As grouped_gemm's, but for f32: tiles of 64 x 64 leave no register for the widening, and spill."""
    return (32, 64, 16, 4, 2) if dtype == torch.float32 and rows >= 32 else product_seed(rows, dtype, hip, filled)


@grouped_gemm_scaled.register_fake
def _(x_RD: Tensor, w_EFD: Tensor, scales: Tensor | None, offsets_E: Tensor) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], w_EFD.shape[1])


def why_not(x_RD: Tensor, w_EFD: Tensor, scales: Tensor | None, offsets_E: Tensor) -> str | None:
    """Return why this kernel cannot take these arguments, or None if it can."""
    if x_RD.dim() != 2 or w_EFD.dim() != 3:
        return f"x has {x_RD.dim()} dimensions and w {w_EFD.dim()}, expected 2 and 3"
    if x_RD.dtype not in FLOATS:
        return f"x is {x_RD.dtype}, expected one of bf16, f16, f32"
    if offsets_E.dtype != torch.int32:
        return f"offsets are {offsets_E.dtype}, expected int32"
    if not 1 <= w_EFD.shape[0] <= MAX_EXPERTS:
        return f"{w_EFD.shape[0]} experts, expected 1 to {MAX_EXPERTS}"
    try:
        definition.check(x_RD, [w_EFD], scales, offsets_E)
    except (TypeError, ValueError) as error:
        return str(error)
    if scales is not None and scales.dim() == 3 and (width := w_EFD.shape[2] // scales.shape[2]) & -width < 16:
        return f"scales of blocks {width} wide, expected a multiple of 16"
    return why_not_widened(w_EFD.dtype, x_RD.device)


def why_not_widened(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why Triton cannot widen these numbers there, or None.  On NVIDIA, e4m3fn is Ada's, Hopper's and later."""
    if dtype != torch.float8_e4m3fn or device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"{dtype} on sm_{major}{minor}, which widens no such numbers" if (major, minor) < (8, 9) else None


def compile_cases(
    hip: bool = False, D: int = 2048, F: int = 1536, asked: settings.Setting | None = None
) -> list[tuple]:
    """What can be launched: (setting, kernel, types, constants, num_warps, num_stages).

    asked: by this setting, without what settings.ASKED names, instead of the kernel's own guesses.
    """
    E = 128
    sizes = {"E": E, "D": D, "F": F, "GROUP_M": GROUP_M, "STRIDE_E": F * D}
    strides = {"d": {"STRIDE_F": D, "STRIDE_D": 1}, "f": {"STRIDE_F": 1, "STRIDE_D": F}}
    cases: list[tuple] = []
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"), (torch.float16, "fp16")):
        sizes_of_rows = ((256, True), (32, True), (1, True), (1, False))
        for rows, filled in sizes_of_rows[: 1 if short == "fp16" else None]:
            m, n, k, warps, stages = asked or _seed(rows, dtype, hip, filled)
            ways = [("e4m3", "d", 2), ("e4m3", "f", 1), ("e5m2", "d", 2), ("e5m2", "f", 0)]
            ways += [("e4m3", "d", 3), ("e4m3", "f", 3), ("e5m2", "d", 3)]
            for kind, packed, scaled in ways:
                args = {"x_ptr": f"*{short}", "w_ptr": "*fp8e4nv" if kind == "e4m3" else "*fp8e5", "y_ptr": f"*{short}"}
                args |= {"scales_ptr": "*fp32", "tiles_ptr": "*i32", "num_row_tiles": "i32"}
                in_blocks = scaled == BY_BLOCK
                step, size = min(k, 128) if in_blocks else k, 128 if in_blocks else 0
                constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": step, "SCALED": scaled} | sizes | strides[packed]
                constants |= {"OF_F": size, "OF_D": size}
                setting = f"{short} {m}x{n}x{step} w{warps} s{stages}, {kind}, {packed} packed"
                setting += ", blocks" if in_blocks else ""
                cases.append((setting, _grouped_gemm_scaled_kernel, args, constants, warps, stages))
    return cases


# -- reference: the meaning of the op, and the oracle of its tests --------------------------


def grouped_gemm_scaled_reference(x_RD: Tensor, w_EFD: Tensor, scales: Tensor | None, offsets_E: Tensor) -> Tensor:
    return definition.reference(x_RD, [w_EFD], scales, offsets_E)
