"""Triton kernel for `moe_ep.grouped_gemm_dw`: the weight gradient of a grouped GEMM.

    dw_EFD[e, f, d] = sum over offsets_E[e-1] <= r < offsets_E[e] of dy_RF[r, f] * x_RD[r, d]

A tile of one expert is written whatever its number of rows: zeros where it has none.  With `order_R`, rows
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
from triton.tools.ragged_tma import load_ragged

import moe_compile.ops
from moe_compile.kernels import settings
from moe_compile.kernels.dispatch import FLOATS, compiled
from moe_compile.kernels.tiles import GROUP_M, column_in_turn, num_programs, row_in_turn, rows_per_expert
from moe_compile.kernels.weights import packed_rows_type, rows_by_descriptor

# -- kernel ---------------------------------------------------------------------------------


@triton.jit
def _grouped_gemm_dw_kernel(
    dy_ptr,
    x_ptr,
    order_ptr,
    offsets_ptr,
    dw_ptr,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    DY_K: tl.constexpr,
    X_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """DY_K, X_K: K where rows are gathered, else 0.  TMA: rows that are not gathered come by a descriptor of them."""
    if PERSISTENT:
        num_tiles: tl.constexpr = E * ((F + BLOCK_M - 1) // BLOCK_M) * ((D + BLOCK_N - 1) // BLOCK_N)
        for program in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
            _tile(
                program, dy_ptr, x_ptr, order_ptr, offsets_ptr, dw_ptr, D, F, DY_K, X_K, BLOCK_M, BLOCK_N, BLOCK_K,
                GROUP_M, TMA,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), dy_ptr, x_ptr, order_ptr, offsets_ptr, dw_ptr, D, F, DY_K, X_K, BLOCK_M, BLOCK_N, BLOCK_K,
            GROUP_M, TMA,
        )  # fmt: skip


@triton.jit
def _tile(
    program, dy_ptr, x_ptr, order_ptr, offsets_ptr, dw_ptr, D: tl.constexpr, F: tl.constexpr, DY_K: tl.constexpr,
    X_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """The tile of a program.  Those of one expert run together: they share its rows."""
    num_f_tiles: tl.constexpr = (F + BLOCK_M - 1) // BLOCK_M
    num_d_tiles: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    e = program // (num_f_tiles * num_d_tiles)
    tile = program % (num_f_tiles * num_d_tiles)
    f_tile = row_in_turn(tile, num_f_tiles, num_d_tiles, GROUP_M)
    d_tile = column_in_turn(tile, num_f_tiles, num_d_tiles, GROUP_M)
    f = f_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = d_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    start = tl.load(offsets_ptr + e - 1, mask=e > 0, other=0)
    stop = tl.load(offsets_ptr + e)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(start, stop, BLOCK_K):
        rows = first + k
        r_in = rows < stop
        pair = tl.load(order_ptr + rows, mask=r_in, other=0) if DY_K > 0 or X_K > 0 else rows
        dy = _rows(dy_ptr, first, start, stop, rows, r_in, pair, f_tile * BLOCK_M, f, F, DY_K, BLOCK_M, TMA)
        x = _rows(x_ptr, first, start, stop, rows, r_in, pair, d_tile * BLOCK_N, d, D, X_K, BLOCK_N, TMA)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision="ieee")
    dw_ptrs = dw_ptr + e.to(tl.int64) * F * D + f.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=(f < F)[:, None] & (d < D)[None, :])


@triton.jit
def _rows(
    ptr, first, start, stop, rows, r_in, pair, first_column, columns, WIDTH: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A step's rows of one operand; zeros from the expert's last row on, and beyond WIDTH.  BLOCK columns."""
    if TMA and K == 0:
        return load_ragged(ptr, start, stop - start, [first - start, first_column])
    else:
        at = (pair // K if K > 0 else rows).to(tl.int64)
        ptrs = ptr + at[:, None] * WIDTH + columns[None, :]
        inside = r_in[:, None]
        if WIDTH % BLOCK != 0:  # else a mask that is always true takes registers
            inside = inside & (columns < WIDTH)[None, :]
        return tl.load(ptrs, mask=inside, other=0.0)


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
    block_m, block_n, block_k, warps, stages, tma, per_multiprocessor = (*setting, 0, 0)[:7]
    dy_RF, x_RD, pointers = dy_RF.contiguous(), x_RD.contiguous(), None
    if tma:
        pointers = described(dy_RF, x_RD, dy_top_k, x_top_k, (block_m, block_n, block_k))
    order = offsets_E if order_R is None else order_R.contiguous()
    run: Any = wrap_triton(_grouped_gemm_dw_kernel) if compiled(_grouped_gemm_dw_kernel) else _grouped_gemm_dw_kernel
    num_tiles = E * triton.cdiv(F, block_m) * triton.cdiv(D, block_n)
    run[(num_programs(num_tiles, 1, per_multiprocessor, x_RD.device),)](
        *(pointers or (dy_RF, x_RD)),
        *(order, offsets_E.contiguous(), dw_EFD, E, D, F),
        *(dy_top_k, x_top_k, block_m, block_n, block_k, GROUP_M, pointers is not None, per_multiprocessor > 0),
        num_warps=warps,
        num_stages=stages,
    )
    return dw_EFD


def described(dy_RF: Tensor, x_RD: Tensor, dy_top_k: int, x_top_k: int, block: tuple[int, int, int]) -> Any:
    """(dy, x), descriptors of those whose rows are not gathered; None if such a one has no descriptor."""
    block_m, block_n, block_k = block
    dy = dy_RF if dy_top_k else rows_by_descriptor(dy_RF, block_k, block_m)
    x = x_RD if x_top_k else rows_by_descriptor(x_RD, block_k, block_n)
    return None if dy is None or x is None or (dy_top_k and x_top_k) else (dy, x)


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


def compile_cases(
    hip: bool = False, D: int = 2048, F: int = 1536, asked: settings.Setting | None = None
) -> list[tuple]:
    """What can be launched: (setting, kernel, types, constants, num_warps, num_stages).

    asked: by this setting, without what settings.ASKED names, instead of the kernel's own guesses.
    """
    cases: list[tuple] = []
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"), (torch.float16, "fp16")):
        for rows in (256, 32) if short == "bf16" else (256,):
            for dy_k, x_k in ((0, 0), (8, 0), (0, 8)):
                m, n, k, warps, stages = asked or _seed(rows, dtype, hip, dy_k + x_k > 0)
                for tma, persistent in ((0, 0), (0, 1), *([(1, 0), (1, 1)] if short != "fp32" and not hip else [])):
                    args = dict.fromkeys(("dy_ptr", "x_ptr", "dw_ptr"), f"*{short}")
                    args |= {"offsets_ptr": "*i32", "order_ptr": "*i32"}
                    args |= {"dy_ptr": packed_rows_type(short, k, m)} if tma and not dy_k else {}
                    args |= {"x_ptr": packed_rows_type(short, k, n)} if tma and not x_k else {}
                    constants = {"E": 128, "D": D, "F": F, "DY_K": dy_k, "X_K": x_k, "GROUP_M": GROUP_M}
                    constants |= {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
                    constants |= {"TMA": bool(tma), "PERSISTENT": bool(persistent)}
                    gathered = " dy gathered" if dy_k else " x gathered" if x_k else ""
                    how = (" TMA" if tma else "") + (" persistent" if persistent else "")
                    setting = f"{short} {m}x{n}x{k} w{warps} s{stages}{gathered}{how}"
                    cases.append((setting, _grouped_gemm_dw_kernel, args, constants, warps, stages))
    return cases


# -- reference: the meaning of the op, and the oracle of its tests --------------------------

grouped_gemm_dw_reference = moe_compile.ops.grouped_gemm_dw_reference
