"""Triton kernel for the backward of `moe_ep.expert_mlp`, from its result to its products before the activation.

    p, t            = order_R[r], order_R[r] // K            where offsets_E[e-1] <= r < offsets_E[e]
    da_RF[r]        = dout_TD[t] @ down_EDF[e]
    dots_R[p]       = dot(da_RF[r], a_RF[r])                 the gradient of the routing weight w[p]
    dh_RG[r, f]     = w[p] * da_RF[r, f] * act'(h[r, f])     times h[r, F + f] if gated
    dh_RG[r, F + f] = w[p] * da_RF[r, f] * act(h[r, f])      if gated; in pairs at 2f and 2f + 1
                      with the limits and the shift of moe_compile/activations.py, if the activation has any
    a_RF[r]         = a of `gated_gemm`, from h again, times w[p] if asked for: for the gradient of down
    all zero where r >= offsets_E[E-1]

Rows of dout are gathered as they are loaded.  da stays in registers, in f32, and meets the routing weight there.

Letters    T tokens, K experts per token, R = T*K routed rows, E experts, D model width, F expert width, G = 2F or F.
Types      dout, down, h, dh, a: bf16 | f16 | f32, all the same; w: bf16 | f16 | f32 or none, which means ones.
           dots: f32.  order, offsets: i32.
Numerics   Products, activation and dots in f32; what is written is rounded once.  Each column tile writes its part of
           the dots; they are added in a fixed order.  No atomics.
Layout     dout and h row-major (other strides are copied first); down of any strides, fast where d or f is contiguous,
           one stack or separate (weights.py).
           dh is [1, R, G], or [2, R, F] with gate's and up's apart, as two stacks of weights want them; no pairs then.
Cost       2*R*D*F FLOP; R*D elements gathered for each column tile; E*D*F of down, R*G of h read; R*G + R*F written.
           The epilogue works on a part of the columns at a time: on the whole tile it would spill.  No host read.
Gradient   None: nothing differentiates it a second time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from moe_compile.activations import ACTIVATIONS, between, between_backward, described
from moe_compile.activations import why_not as why_not_activation
from moe_compile.kernels import settings
from moe_compile.kernels.activation import activated, constants, factor, followed, slope
from moe_compile.kernels.dispatch import FLOATS, MAX_EXPERTS, compiled
from moe_compile.kernels.gated_gemm import GPT_OSS
from moe_compile.kernels.grouped_gemm import grouped_gemm_reference
from moe_compile.kernels.tiles import (
    GROUP_M,
    Made,
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


@triton.jit(do_not_specialize=["R", "num_row_tiles"])
def _gated_gemm_backward_kernel(
    dout_ptr,
    down_ptr,
    h_ptr,
    weights_ptr,
    order_ptr,
    tiles_ptr,
    dh_ptr,
    a_ptr,
    dots_ptr,
    R,
    num_row_tiles,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    GATED: tl.constexpr,
    PAIRS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    APART: tl.constexpr,
    KEEP_A: tl.constexpr,
    SCALE_A: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_M: tl.constexpr,
    MULTIPLE: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """TMA: down_ptr is a descriptor.  A program of one tile returns early, which takes fewer registers."""
    num_col_tiles: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    if PERSISTENT:
        for program in range(tl.program_id(0), num_row_tiles * num_col_tiles, tl.num_programs(0)):
            e, r, r_in, column = program_tile(tiles_ptr, program, num_row_tiles, num_col_tiles, BLOCK_M, GROUP_M)
            pair, f, dots_ptrs, dup_ptr = _places(
                column, r, r_in, order_ptr, dh_ptr, dots_ptr, R, F, APART, BLOCK_F
            )  # fmt: skip
            if e == E:
                _zeros(
                    column, r, r_in, f, dh_ptr, dup_ptr, a_ptr, dots_ptrs, F, GATED, PAIRS, WEIGHTED, APART, KEEP_A,
                    BLOCK_M, BLOCK_F,
                )  # fmt: skip
            elif e < E:
                _tile(
                    e, column, r, r_in, f, pair, dout_ptr, down_ptr, h_ptr, weights_ptr, dh_ptr, dup_ptr, a_ptr,
                    dots_ptrs, K, D, F, STRIDE_E, STRIDE_D, STRIDE_F, ACTIVATION, ALPHA, LIMIT, SHIFT, GATED, PAIRS,
                    WEIGHTED, APART, KEEP_A, SCALE_A, BLOCK_M, BLOCK_F, BLOCK_K, PARTS, MULTIPLE, TMA,
                )  # fmt: skip
    else:
        e, r, r_in, column = program_tile(tiles_ptr, tl.program_id(0), num_row_tiles, num_col_tiles, BLOCK_M, GROUP_M)
        if e > E:
            return
        pair, f, dots_ptrs, dup_ptr = _places(
            column, r, r_in, order_ptr, dh_ptr, dots_ptr, R, F, APART, BLOCK_F
        )  # fmt: skip
        if e == E:
            _zeros(
                column, r, r_in, f, dh_ptr, dup_ptr, a_ptr, dots_ptrs, F, GATED, PAIRS, WEIGHTED, APART, KEEP_A,
                BLOCK_M, BLOCK_F,
            )  # fmt: skip
            return
        _tile(
            e, column, r, r_in, f, pair, dout_ptr, down_ptr, h_ptr, weights_ptr, dh_ptr, dup_ptr, a_ptr, dots_ptrs,
            K, D, F, STRIDE_E, STRIDE_D, STRIDE_F, ACTIVATION, ALPHA, LIMIT, SHIFT, GATED, PAIRS, WEIGHTED,
            APART, KEEP_A, SCALE_A, BLOCK_M, BLOCK_F, BLOCK_K, PARTS, MULTIPLE, TMA,
        )  # fmt: skip


@triton.jit
def _places(
    column, r, r_in, order_ptr, dh_ptr, dots_ptr, R, F: tl.constexpr, APART: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """(pairs of the rows, columns, where the dots go, where the gradient of up goes).

    Both kinds of tiles take them from here, before they part: with each its own, the kernel took 134 registers on sm_90
    instead of 128, which is one block of a multiprocessor instead of two.
    """
    pair = tl.load(order_ptr + r, mask=r_in, other=0)
    f = column * BLOCK_F + tl.arange(0, BLOCK_F)
    dots_ptrs = dots_ptr + column.to(tl.int64) * R + pair
    return pair, f, dots_ptrs, dh_ptr + (R.to(tl.int64) * F if APART else F)


@triton.jit
def _zeros(
    column, r, r_in, f, dh_ptr, dup_ptr, a_ptr, dots_ptrs, F: tl.constexpr, GATED: tl.constexpr, PAIRS: tl.constexpr,
    WEIGHTED: tl.constexpr, APART: tl.constexpr, KEEP_A: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Write a tile of nobody's rows."""
    row: tl.constexpr = 2 * F if GATED and not APART else F
    zero = tl.zeros([BLOCK_M, BLOCK_F], dh_ptr.dtype.element_ty)
    if PAIRS:
        both = tl.zeros([BLOCK_M, 2 * BLOCK_F], dh_ptr.dtype.element_ty)
        store_columns(dh_ptr, both, r, r_in, column * 2 * BLOCK_F + tl.arange(0, 2 * BLOCK_F), row, row)
    else:
        store_columns(dh_ptr, zero, r, r_in, f, F, row)
        if GATED:
            store_columns(dup_ptr, zero, r, r_in, f, F, row)
    if KEEP_A:
        store_columns(a_ptr, zero, r, r_in, f, F, F)
    if WEIGHTED:
        tl.store(dots_ptrs, tl.zeros([BLOCK_M], tl.float32), mask=r_in)


@triton.jit
def _tile(
    e, column, r, r_in, f, pair, dout_ptr, down_ptr, h_ptr, weights_ptr, dh_ptr, dup_ptr, a_ptr, dots_ptrs,
    K: tl.constexpr, D: tl.constexpr, F: tl.constexpr, STRIDE_E: tl.constexpr, STRIDE_D: tl.constexpr,
    STRIDE_F: tl.constexpr, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    GATED: tl.constexpr, PAIRS: tl.constexpr, WEIGHTED: tl.constexpr, APART: tl.constexpr, KEEP_A: tl.constexpr,
    SCALE_A: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    MULTIPLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Write a tile of an expert's rows."""
    row: tl.constexpr = 2 * F if GATED and not APART else F
    acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    t = (pair // K).to(tl.int64)
    f_in = f < F
    d = tl.arange(0, BLOCK_K)
    dout_ptrs = dout_ptr + t[:, None] * D + d[None, :]
    if TMA:
        first = column * BLOCK_F
        acc = sum_described_products(acc, dout_ptrs, down_ptr, e, first, r_in, D, STRIDE_D != 1, BLOCK_F, BLOCK_K)
    else:
        w_ptrs = weight_of(down_ptr, e, dout_ptr, STRIDE_E, MULTIPLE) + f.to(tl.int64)[None, :] * STRIDE_F
        w_ptrs += d.to(tl.int64)[:, None] * STRIDE_D
        acc = sum_products(acc, dout_ptrs, w_ptrs, r_in, f_in, D, STRIDE_D, BLOCK_K)
    weight = tl.full([BLOCK_M], 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(weights_ptr + pair, mask=r_in, other=0.0).to(tl.float32)
    dots = tl.zeros([BLOCK_M], tl.float32)
    # Halves of halves, each a part of the columns of every row, in their order.
    width: tl.constexpr = BLOCK_F // PARTS
    for part in tl.static_range(PARTS):
        if PARTS == 1:
            da = acc
        elif PARTS == 2:
            da = _half(acc, part)
        else:
            da = _half(_half(acc, part // 2), part % 2)
        dots += _between(
            *(da, weight, h_ptr, dh_ptr, dup_ptr, a_ptr, r, r_in, column * BLOCK_F + part * width),
            *(F, row, ACTIVATION, ALPHA, LIMIT, SHIFT, GATED, PAIRS, KEEP_A, SCALE_A, width),
        )
    if WEIGHTED:
        tl.store(dots_ptrs, dots, mask=r_in)


@triton.jit
def _half(tile, WHICH: tl.constexpr):
    """The left or right half of the columns; a row lies in one group of threads, so nothing moves."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    left, right = tl.split(tl.permute(tl.reshape(tile, [M, 2, N // 2]), [0, 2, 1]))
    return left if WHICH == 0 else right


@triton.jit
def _between(
    da, weight, h_ptr, dh_ptr, dup_ptr, a_ptr, r, r_in, first,
    F: tl.constexpr, ROW: tl.constexpr, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    SHIFT: tl.constexpr, GATED: tl.constexpr, PAIRS: tl.constexpr, KEEP_A: tl.constexpr, SCALE_A: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Write dh and a of WIDTH columns from `first` on; the part of the dots that they give."""
    number = dh_ptr.dtype.element_ty
    f = first + tl.arange(0, WIDTH)
    inside = r_in[:, None] & (f < F)[None, :]
    G: tl.constexpr = 2 * F if GATED else F
    h_ptrs = h_ptr + r[:, None] * G + f[None, :]
    if PAIRS:
        g_both = 2 * first + tl.arange(0, 2 * WIDTH)
        both_in = r_in[:, None] & (g_both < G)[None, :]
        both = tl.load(h_ptr + r[:, None] * G + g_both[None, :], mask=both_in, other=0.0).to(tl.float32)
        g, u = tl.split(tl.reshape(both, [both.shape[0], WIDTH, 2]))
    else:
        g = tl.load(h_ptrs, mask=inside, other=0.0).to(tl.float32)
    a = activated(g, ACTIVATION, ALPHA, LIMIT)
    wda = weight[:, None] * da
    if GATED:
        if not PAIRS:
            u = tl.load(h_ptrs + F, mask=inside, other=0.0).to(tl.float32)
        by = factor(u, LIMIT, SHIFT)
        dup = followed(wda * a, u, LIMIT).to(number)
        dgate = (wda * by * slope(g, ACTIVATION, ALPHA, LIMIT)).to(number)
        if PAIRS:
            dboth = tl.reshape(tl.join(dgate, dup), [dgate.shape[0], 2 * WIDTH])
            store_columns(dh_ptr, dboth, r, r_in, g_both, G, G)
        else:
            store_columns(dup_ptr, dup, r, r_in, f, F, ROW)
            store_columns(dh_ptr, dgate, r, r_in, f, F, ROW)
        a *= by
    else:
        store_columns(dh_ptr, (wda * slope(g, ACTIVATION, ALPHA, LIMIT)).to(number), r, r_in, f, F, ROW)
    if KEEP_A:
        kept = weight[:, None] * a if SCALE_A else a
        store_columns(a_ptr, kept.to(number), r, r_in, f, F, F)
    return tl.sum(da * a, 1)


# -- launcher: the grid is never empty, so that nothing is asked about R -----------------------


@triton_op("moe_ep_triton::gated_gemm_backward", mutates_args=())
def gated_gemm_backward(
    dout_TD: Tensor,
    down_EDF: Tensor,
    h_RG: Tensor,
    weights_TK: Tensor | None,
    offsets_E: Tensor,
    order_R: Tensor,
    top_k: int,
    activation: str,
    gated: bool,
    apart: bool,
    keep_a: bool,
    scale_a: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, a_RF, dots_R).

    dh is [1, R, G], or [2, R, F] if `apart`.  a is empty unless `keep_a`, and times the weights if `scale_a`.  dots are
    by pair, in f32, and empty without weights.
    """
    if reason := why_not(dout_TD, down_EDF, h_RG, weights_TK, offsets_E, order_R, top_k, activation, gated, apart):
        raise ValueError(f"moe_ep_triton.gated_gemm_backward: {reason}")
    down = stacked(down_EDF)
    return launch(dout_TD, down, h_RG, weights_TK, offsets_E, order_R, top_k, activation, gated, apart, keep_a, scale_a)


def launch(
    dout_TD: Tensor,
    down: Weights,
    h_RG: Tensor,
    weights_TK: Tensor | None,
    offsets_E: Tensor,
    order_R: Tensor,
    top_k: int,
    activation: str,
    gated: bool,
    apart: bool,
    keep_a: bool,
    scale_a: bool,
    made: Made | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, a_RF, dots_R), of arguments that `why_not` does not object to."""
    order_R, R, (E, D, F) = order_R.contiguous(), order_R.shape[0], down.shape
    dh, a_RF, dots_R = _outputs(h_RG, F, weights_TK, gated and apart, keep_a)
    how = described(activation)
    rows, form = rows_per_expert(R, E), "gated" if gated else "plain"
    seed = _seed(rows, h_RG.dtype, torch.version.hip is not None)
    setting = settings.choose("gated_gemm_backward", form, h_RG.device, h_RG.dtype, rows, D, F, seed=seed)
    block_m, block_f, block_k, parts, warps, stages, tma, per_multiprocessor = (*setting, 0, 0)[:8]
    pointer = by_descriptor(down.transposed(), 1, block_f, block_k) if tma else None
    num_col_tiles = triton.cdiv(F, block_f)
    dots = dots_R if weights_TK is None else h_RG.new_empty(num_col_tiles, R, dtype=torch.float32)
    weights = dots if weights_TK is None else weights_TK.contiguous()
    tiles, num_row_tiles = row_tiles(offsets_E, R, block_m, made)
    run: Any = _gated_gemm_backward_kernel
    run = wrap_triton(_gated_gemm_backward_kernel) if compiled(run) else run
    run[(num_programs(num_row_tiles, num_col_tiles, per_multiprocessor, h_RG.device),)](
        *(dout_TD.contiguous(), down.pointer if pointer is None else pointer, h_RG.contiguous(), weights, order_R),
        *(tiles, dh, a_RF if keep_a else dh, dots, R, num_row_tiles),
        *(E, top_k, D, F, *down.stride),
        *(*constants(how), gated, how.pairs, weights_TK is not None, gated and apart),
        *(keep_a, scale_a and weights_TK is not None),
        *(block_m, block_f, block_k, parts, GROUP_M, down.multiple, pointer is not None, per_multiprocessor > 0),
        num_warps=warps,
        num_stages=stages,
    )
    return dh, a_RF, dots_R if weights_TK is None else dots.sum(0)


def _outputs(
    h_RG: Tensor, F: int, weights_TK: Tensor | None, apart: bool, keep_a: bool
) -> tuple[Tensor, Tensor, Tensor]:
    R, G = h_RG.shape[0], int(h_RG.shape[1])
    dh = h_RG.new_empty(2, R, F) if apart else h_RG.new_empty(1, R, G)
    num_dots = 0 if weights_TK is None else R
    return dh, h_RG.new_empty(R, F) if keep_a else h_RG.new_empty(0), h_RG.new_empty(num_dots, dtype=torch.float32)


def _seed(rows: int, dtype: torch.dtype, hip: bool) -> tuple[int, int, int, int, int, int]:
    """(BLOCK_M, BLOCK_F, BLOCK_K, PARTS, num_warps, num_stages); the LDS of gfx942 holds 64 KiB."""
    if dtype == torch.float32:  # no tensor cores: small tiles, operands in registers
        return (64, 64, 16, 1, 8, 2) if rows >= 32 else (16, 64, 16, 1, 4, 2)
    if rows >= 64:
        return (128, 128, 64, 4, 8, 2 if hip else 3)
    return (64, 128, 64, 4, 8, 2 if hip else 4) if rows >= 16 else (16, 64, 128, 1, 4, 2 if hip else 4)


@gated_gemm_backward.register_fake
def _(dout_TD, down_EDF, h_RG, weights_TK, offsets_E, order_R, top_k, activation, gated, apart, keep_a, scale_a):  # type: ignore[no-untyped-def]
    return _outputs(h_RG, int(down_EDF.shape[2]), weights_TK, gated and apart, keep_a)


def why_not(
    dout_TD: Tensor,
    down_EDF: Tensor,
    h_RG: Tensor,
    weights_TK: Tensor | None,
    offsets_E: Tensor,
    order_R: Tensor,
    top_k: int,
    activation: str,
    gated: bool,
    apart: bool = False,
) -> str | None:
    """Return why this kernel cannot take these arguments, or None if it can."""
    if (dout_TD.dim(), down_EDF.dim(), h_RG.dim()) != (2, 3, 2):
        return f"dout has {dout_TD.dim()} dimensions, down {down_EDF.dim()} and h {h_RG.dim()}, expected 2, 3 and 2"
    if h_RG.dtype not in FLOATS or {dout_TD.dtype, down_EDF.dtype} != {h_RG.dtype}:
        return f"dout is {dout_TD.dtype}, down {down_EDF.dtype}, h {h_RG.dtype}, expected one of bf16, f16, f32"
    if weights_TK is not None and (weights_TK.dtype not in FLOATS or weights_TK.shape[1] != top_k):
        return f"weights are {weights_TK.dtype} {tuple(weights_TK.shape)}, expected bf16, f16 or f32 [T, {top_k}]"
    if offsets_E.dtype != torch.int32 or order_R.dtype != torch.int32:
        return f"order is {order_R.dtype} and offsets are {offsets_E.dtype}, expected int32"
    if not 1 <= down_EDF.shape[0] <= MAX_EXPERTS or offsets_E.shape[0] != down_EDF.shape[0] or top_k < 1:
        return f"{top_k} of {down_EDF.shape[0]} experts, offsets for {offsets_E.shape[0]}, expected 1 to {MAX_EXPERTS}"
    if dout_TD.shape[1] != down_EDF.shape[1] or min(down_EDF.shape[1:]) == 0:
        return f"rows of dout have {dout_TD.shape[1]} elements, down is {tuple(down_EDF.shape)}"
    if h_RG.shape[1] != down_EDF.shape[2] * (2 if gated else 1):
        return f"rows of h have {h_RG.shape[1]} elements, down is {tuple(down_EDF.shape)}"
    if reason := why_not_activation(activation, gated):
        return reason
    return f"activation {activation} apart" if apart and described(activation).pairs else None


def compile_cases(hip: bool = False, D: int = 2048, F: int = 768, asked: settings.Setting | None = None) -> list[tuple]:
    """What can be launched: (setting, kernel, types, constants, num_warps, num_stages).

    asked: by this setting, without what settings.ASKED names, instead of the kernel's own guesses.
    """
    E, K = 128, 8
    cases: list[tuple] = []

    def case(
        dtype: torch.dtype,
        rows: int,
        gated: bool = True,
        apart: bool = False,
        packed: str = "f",
        how: str = "silu",
        multiple: int = 0,
        tma: bool = False,
        persistent: bool = False,
    ) -> None:
        m, f, k, parts, warps, stages = asked or _seed(rows, dtype, hip)
        short, act = settings.DTYPES[dtype], described(how)
        args = dict.fromkeys(("dout_ptr", "down_ptr", "h_ptr", "weights_ptr", "dh_ptr", "a_ptr"), f"*{short}")
        args |= {"order_ptr": "*i32", "tiles_ptr": "*i32", "dots_ptr": "*fp32", "R": "i32", "num_row_tiles": "i32"}
        args |= {"down_ptr": "*i64"} if multiple else {}
        args |= {"down_ptr": descriptor_type(short, 1, f, k, packed == "f")} if tma else {}
        strides = (F * D, F, 1) if packed == "f" else (F * D, 1, D)
        values: dict[str, object] = dict(zip(("STRIDE_E", "STRIDE_D", "STRIDE_F"), strides, strict=True))
        values |= {"E": E, "K": K, "D": D, "F": F, "GROUP_M": GROUP_M}
        values |= dict(zip(("ACTIVATION", "ALPHA", "LIMIT", "SHIFT"), constants(act), strict=True))
        values |= {"GATED": gated, "PAIRS": act.pairs, "WEIGHTED": True, "APART": apart}
        values |= {"KEEP_A": True, "SCALE_A": True}
        values |= {"BLOCK_M": m, "BLOCK_F": f, "BLOCK_K": k, "PARTS": parts, "MULTIPLE": multiple}
        values |= {"STRIDE_E": 0} if multiple else {}
        values |= {"TMA": tma, "PERSISTENT": persistent}
        rest = f"{' separate' if multiple else ''}{'' if gated else ' plain'}{' apart' if apart else ''}"
        rest += (" d packed" if packed == "d" else "") + (" TMA" if tma else "")
        rest += " persistent" if persistent else ""
        setting = f"{short} {m}x{f}x{k}/{parts} w{warps} s{stages}{rest}{'' if how == 'silu' else f' {how}'}"
        setting = setting.replace(GPT_OSS, "gpt-oss")
        cases.append((setting, _gated_gemm_backward_kernel, args, values, warps, stages))

    for rows in (256, 32, 1):
        case(torch.bfloat16, rows)
        case(torch.bfloat16, rows, gated=False)
        case(torch.float32, rows)
        case(torch.bfloat16, rows, apart=True, multiple=16)
    case(torch.bfloat16, 256, apart=True)
    case(torch.bfloat16, 256, packed="d")
    for tma in (False,) if hip else (False, True):
        case(torch.float16, 256, tma=tma)
        case(torch.float16, 256, gated=False, tma=tma)
    case(torch.float32, 256, gated=False)
    if not hip:
        case(torch.bfloat16, 256, gated=False, tma=True)
    for how in ACTIVATIONS[1:]:
        case(torch.bfloat16, 256, how=how)
    for rows in (256, 32, 1):
        case(torch.bfloat16, rows, packed="d", how=GPT_OSS)
    case(torch.float32, 256, packed="d", how=GPT_OSS)
    for rows in (256, 32):
        case(torch.bfloat16, rows, persistent=True)
    case(torch.bfloat16, 256, gated=False, persistent=True)
    case(torch.float32, 256, persistent=True)
    for packed in "" if hip else "fd":
        for rows in (256, 32, 1):
            case(torch.bfloat16, rows, packed=packed, tma=True)
        case(torch.bfloat16, 256, packed=packed, how=GPT_OSS, tma=True)
        case(torch.bfloat16, 256, packed=packed, tma=True, persistent=True)
    return cases


# -- reference: the meaning of the op, and the oracle of its tests --------------------------


def gated_gemm_backward_reference(
    dout_TD: Tensor,
    down_EDF: Tensor,
    h_RG: Tensor,
    weights_TK: Tensor | None,
    offsets_E: Tensor,
    order_R: Tensor,
    top_k: int,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh_RG, a_RF without weights, dots_R)."""
    dout_RD = dout_TD.index_select(0, order_R.div(top_k, rounding_mode="floor"))
    da_RF = grouped_gemm_reference(dout_RD, down_EDF.mT, offsets_E)
    weight_R1 = 1.0 if weights_TK is None else weights_TK.reshape(-1).index_select(0, order_R)[:, None]
    a_RF, dh_RG = between(h_RG, activation, gated), between_backward(da_RF, h_RG, activation, gated)
    dots = (da_RF * a_RF).sum(1)
    return weight_R1 * dh_RG, a_RF, torch.empty_like(dots).index_copy_(0, order_R.long(), dots)
