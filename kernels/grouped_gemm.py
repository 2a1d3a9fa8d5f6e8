"""Triton kernels for `moe_ep.grouped_gemm`, with one stacked weight or with separate ones (weights.py).

    y_RF[r, f] = sum over d of x_RD[r, d] * w_EFD[e, f, d]     plus bias_EF[e, f], if there is one,
    for the expert e with offsets_E[e-1] <= r < offsets_E[e]; zero for r >= offsets_E[E-1]

A tile is BLOCK_M rows of one expert by BLOCK_N columns (tiles.py); the rows behind the last offset are a
group of their own.

Letters    R routed rows, E experts, D inner width, F outer width.
Types      x, w, bias, y: bf16 | f16 | f32, all the same, summed in f32 (f32: no tf32) and rounded once.  offsets: i32.
Layout     x, bias and y row-major (x of other strides is copied first); w of any strides, fast where d
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
from moe_compile.kernels.tiles import (
    GROUP_M,
    Made,
    fills,
    made_of,
    num_programs,
    program_tile,
    row_tiles,
    rows_per_expert,
    store_columns,
    sum_described_products,
    sum_products,
)
from moe_compile.kernels.weights import Weights, by_descriptor, descriptor_type, stacked, weight_of

# -- kernel ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_row_tiles"])
def _grouped_gemm_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    tiles_ptr,
    y_ptr,
    num_row_tiles,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_F: tl.constexpr,
    STRIDE_D: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    MULTIPLE: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    if PERSISTENT:
        num_tiles = num_row_tiles * ((F + BLOCK_N - 1) // BLOCK_N)
        for program in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
            _tile(
                program,
                x_ptr, w_ptr, bias_ptr, tiles_ptr, y_ptr, num_row_tiles, E, D, F, STRIDE_E, STRIDE_F,
                STRIDE_D, BIASED, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, MULTIPLE, TMA,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0),
            x_ptr, w_ptr, bias_ptr, tiles_ptr, y_ptr, num_row_tiles, E, D, F, STRIDE_E, STRIDE_F,
            STRIDE_D, BIASED, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, MULTIPLE, TMA,
        )  # fmt: skip


@triton.jit
def _tile(
    program,
    x_ptr, w_ptr, bias_ptr, tiles_ptr, y_ptr, num_row_tiles, E: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    STRIDE_E: tl.constexpr, STRIDE_F: tl.constexpr, STRIDE_D: tl.constexpr, BIASED: tl.constexpr, BLOCK_M:
    tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, MULTIPLE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """The tile of a program; nothing where it has none."""
    num_col_tiles: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    e, r, r_in, column = program_tile(tiles_ptr, program, num_row_tiles, num_col_tiles, BLOCK_M, GROUP_M)
    f = column * BLOCK_N + tl.arange(0, BLOCK_N)
    f_in = f < F
    number = y_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if e == E:
        store_columns(y_ptr, acc.to(number), r, r_in, f, F, F)
    elif e < E:
        d = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + r[:, None] * D + d[None, :]
        if TMA:
            first = column * BLOCK_N
            acc = sum_described_products(acc, x_ptrs, w_ptr, e, first, r_in, D, STRIDE_D != 1, BLOCK_N, BLOCK_K)
        else:
            w_ptrs = weight_of(w_ptr, e, x_ptr, STRIDE_E, MULTIPLE) + f.to(tl.int64)[None, :] * STRIDE_F
            w_ptrs += d.to(tl.int64)[:, None] * STRIDE_D
            acc = sum_products(acc, x_ptrs, w_ptrs, r_in, f_in, D, STRIDE_D, BLOCK_K)
        if BIASED:
            acc += tl.load(bias_ptr + e * F + f, mask=f_in, other=0.0).to(tl.float32)[None, :]
        store_columns(y_ptr, acc.to(number), r, r_in, f, F, F)


# -- launcher: the grid is never empty, so that nothing is asked about R -----------------------


@triton_op("moe_ep_triton::grouped_gemm", mutates_args=())
def grouped_gemm(
    x_RD: Tensor,
    w_EFD: Tensor,
    offsets_E: Tensor,
    bias_EF: Tensor | None = None,
    tiles: Tensor | None = None,
    tile_rows: int = 0,
) -> Tensor:
    """y_RF.  tiles: row tiles of `tile_rows` rows of this routing, which are taken if the product wants such."""
    if reason := why_not(x_RD, w_EFD, offsets_E, bias_EF):
        raise ValueError(f"moe_ep_triton.grouped_gemm: {reason}")
    return launch(x_RD, stacked(w_EFD), offsets_E, bias_EF, made_of(tiles, tile_rows))


def launch(
    x_RD: Tensor, w: Weights, offsets_E: Tensor, bias_EF: Tensor | None = None, made: Made | None = None
) -> Tensor:
    """y_RF, of arguments that `why_not` does not object to."""
    x_RD, R, (E, F, D) = x_RD.contiguous(), x_RD.shape[0], w.shape
    y_RF, rows = x_RD.new_empty(R, F), rows_per_expert(R, E)
    seed = _seed(rows, x_RD.dtype, torch.version.hip is not None, fills(R, E, F, 64))
    setting = settings.choose("grouped_gemm", w.packed(), x_RD.device, x_RD.dtype, rows, D, F, seed=seed)
    block_m, block_n, block_k, warps, stages, tma, per_multiprocessor = (*setting, 0, 0)[:7]
    pointer = by_descriptor(w, 1, block_n, block_k) if tma else None
    tiles, num_row_tiles = row_tiles(offsets_E, R, block_m, made)
    run: Any = _grouped_gemm_kernel
    run = wrap_triton(_grouped_gemm_kernel) if compiled(run) else run
    run[(num_programs(num_row_tiles, triton.cdiv(F, block_n), per_multiprocessor, x_RD.device),)](
        *(x_RD, w.pointer if pointer is None else pointer, y_RF if bias_EF is None else bias_EF.contiguous(), tiles),
        *(y_RF, num_row_tiles, E, D, F, *w.stride, bias_EF is not None),
        *(block_m, block_n, block_k, GROUP_M, w.multiple, pointer is not None, per_multiprocessor > 0),
        num_warps=warps,
        num_stages=stages,
    )
    return y_RF


def _seed(rows: int, dtype: torch.dtype, hip: bool, filled: bool = True) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages); the LDS of gfx942 holds 64 KiB.

    filled: with few rows, whether 64 columns a program are programs enough; else each takes half of them, with as many
    bytes on their way.  A split along D would need a second pass, or atomics, for numbers that are the same twice.
    """
    if dtype == torch.float32:  # no tensor cores: small tiles, operands in registers
        return (64, 64, 16, 8, 2) if rows >= 32 else (16, 64 if filled else 32, 16, 4, 2)
    if rows >= 64:
        return (128, 128, 64, 8, 2 if hip else 3)
    if rows >= 16:
        return (64, 128, 64, 4, 2 if hip else 4)
    if filled:
        return (16, 64, 128, 4, 2 if hip else 4)
    return (16, 32, 256, 4, 2) if hip else (16, 32, 128, 4, 6)


@grouped_gemm.register_fake
def _(
    x_RD: Tensor,
    w_EFD: Tensor,
    offsets_E: Tensor,
    bias_EF: Tensor | None = None,
    tiles: Tensor | None = None,
    tile_rows: int = 0,
) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], w_EFD.shape[1])


def why_not(x_RD: Tensor, w_EFD: Tensor, offsets_E: Tensor, bias_EF: Tensor | None = None) -> str | None:
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
    return None if bias_EF is None else why_not_bias(bias_EF, x_RD, w_EFD.shape[0], w_EFD.shape[1])


def why_not_bias(bias_EF: Tensor, x_RD: Tensor, E: int, F: int) -> str | None:
    """Return why this is no bias of products of width F with rows x, or None."""
    if bias_EF.dtype == x_RD.dtype and bias_EF.shape == (E, F):
        return None
    return f"bias is {bias_EF.dtype} {tuple(bias_EF.shape)}, expected {x_RD.dtype} {(E, F)}"


def compile_cases(
    hip: bool = False, D: int = 2048, F: int = 1536, asked: settings.Setting | None = None
) -> list[tuple]:
    """What can be launched: (setting, kernel, types, constants, num_warps, num_stages).

    asked: by this setting, without what settings.ASKED names, instead of the kernel's own guesses.
    """
    E = 128
    cases: list[tuple] = []
    sizes = {"E": E, "D": D, "F": F, "GROUP_M": GROUP_M}
    strides = {"d": {"STRIDE_F": D, "STRIDE_D": 1}, "f": {"STRIDE_F": 1, "STRIDE_D": F}}
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"), (torch.float16, "fp16")):
        sizes_of_rows = ((256, True), (32, True), (1, True), (1, False))
        for rows, filled in sizes_of_rows[: 1 if short == "fp16" else None]:
            m, n, k, warps, stages = asked or _seed(rows, dtype, hip, filled)
            ways = [("d", 0, 0), ("f", 0, 0), ("d", 16, 0), ("f", 16, 0)]
            tma_ways = [("d", 0, 1), ("f", 0, 1)] * (short != "fp32" and not hip)
            forms = [*((*way, "") for way in ways + tma_ways), ("f", 0, 0, "bias")]
            forms += [(*way, "persistent") for way in (ways[:2] + tma_ways) * (filled and rows > 1)]
            for packed, multiple, tma, form in forms:
                args = dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "y_ptr"), f"*{short}")
                args |= {"tiles_ptr": "*i32", "num_row_tiles": "i32"} | ({"w_ptr": "*i64"} if multiple else {})
                args |= {"w_ptr": descriptor_type(short, 1, n, k, packed == "f")} if tma else {}
                setting = f"{short} {m}x{n}x{k} w{warps} s{stages}, {packed} packed"
                setting += ", separate" if multiple else ", TMA" if tma else ""
                setting += f", {form}" if form else ""
                constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k} | sizes | strides[packed]
                constants |= {"STRIDE_E": 0 if multiple else F * D, "MULTIPLE": multiple, "TMA": bool(tma)}
                constants |= {"BIASED": form == "bias", "PERSISTENT": form == "persistent"}
                cases.append((setting, _grouped_gemm_kernel, args, constants, warps, stages))
    return cases


# -- reference: the meaning of the op, and the oracle of its tests --------------------------


def grouped_gemm_reference(x_RD: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    return moe_compile.ops.grouped_gemm_reference(x_RD, [w_EFD], offsets_E)
