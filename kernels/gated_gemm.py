"""Triton kernel for the first half of `moe_ep.expert_mlp`: gather, grouped GEMM and gated activation.

    h_RG[r]    = w_EGD[e] @ x_TD[order_R[r] // K]      where offsets_E[e-1] <= r < offsets_E[e]; plus bias_EG[e], if any
    a_RF[r, f] = act(h_RG[r, f]) * h_RG[r, F + f]      gated: G = 2F, the gate's numbers first
    a_RF[r, f] = act(h_RG[r, 2f]) * h_RG[r, 2f + 1]    gated, in pairs
    a_RF[r, f] = act(h_RG[r, f])                       not gated: G = F
    and with the limits and the shift of moe_compile/activations.py, if the activation has any
    both zero where r >= offsets_E[E-1]

Rows of tokens are gathered as they are loaded; no copy of them exists.  A program computes the same columns of gate
and up, in one tile of 2*BLOCK_F columns, so that the activation needs no other program's numbers; pairs are
such a tile as they lie.

Letters    T tokens, K experts per token, R = T*K routed rows, E experts, D model width, F expert width.
Types      x, w, bias, a, h: bf16 | f16 | f32, all the same, summed in f32 (f32: no tf32).  order, offsets: i32.
Numerics   h is rounded once, a is computed in f32 from the rounded h and rounded once: the same bits with or without
           h, and the same as what the backward computes from h.
Layout     x row-major (other strides are copied first).  One stack w_EGD, or two stacks [E, F, D] for gate and up, of
           any strides, fast where d or f is contiguous; two stacks of different strides are copied to those of gate.
           Separate weights (weights.py) of the same strides as well.
Cost       2*R*D*G FLOP; R*D elements gathered for each column tile, mostly from L2; E*G*D elements of w read;
           R*F + R*G written, R*F where nobody wants h.  No host read.
Gradient   None here: `moe_ep.expert_mlp` has it (gated_gemm_backward.py).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from moe_compile.activations import ACTIVATIONS, between, described
from moe_compile.activations import why_not as why_not_activation
from moe_compile.expert_mlp import add_bias
from moe_compile.kernels import settings
from moe_compile.kernels.activation import activated, constants, factor
from moe_compile.kernels.dispatch import FLOATS, MAX_EXPERTS, compiled
from moe_compile.kernels.grouped_gemm import _seed as first_product_seed
from moe_compile.kernels.grouped_gemm import grouped_gemm_reference, why_not_bias
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
from moe_compile.kernels.weights import Weights, by_descriptor, descriptor_type, restrided, stacked, weight_of

GPT_OSS = "silu alpha=1.702 limit=7.0 shift=1.0 pairs"  # a form with everything, for `compile_cases`

# -- kernel ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_row_tiles"])
def _gated_gemm_kernel(
    x_ptr,
    gate_ptr,
    up_ptr,
    bias_ptr,
    order_ptr,
    tiles_ptr,
    a_ptr,
    h_ptr,
    num_row_tiles,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    UP_START: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_F: tl.constexpr,
    STRIDE_D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    GATED: tl.constexpr,
    PAIRS: tl.constexpr,
    BIASED: tl.constexpr,
    KEEP_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    MULTIPLE: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """UP_START: where the rows of up begin behind up_ptr, in elements.  TMA: gate_ptr is a descriptor of both.
    PAIRS: up_ptr holds both."""
    if PERSISTENT:
        num_tiles = num_row_tiles * ((F + BLOCK_F - 1) // BLOCK_F)
        for program in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
            _tile(
                program,
                x_ptr, gate_ptr, up_ptr, bias_ptr, order_ptr, tiles_ptr, a_ptr, h_ptr, num_row_tiles, E, K,
                D, F, UP_START, STRIDE_E, STRIDE_F, STRIDE_D, ACTIVATION, ALPHA, LIMIT, SHIFT, GATED, PAIRS,
                BIASED, KEEP_H, BLOCK_M, BLOCK_F, BLOCK_K, GROUP_M, MULTIPLE, TMA,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0),
            x_ptr, gate_ptr, up_ptr, bias_ptr, order_ptr, tiles_ptr, a_ptr, h_ptr, num_row_tiles, E, K,
            D, F, UP_START, STRIDE_E, STRIDE_F, STRIDE_D, ACTIVATION, ALPHA, LIMIT, SHIFT, GATED, PAIRS,
            BIASED, KEEP_H, BLOCK_M, BLOCK_F, BLOCK_K, GROUP_M, MULTIPLE, TMA,
        )  # fmt: skip


@triton.jit
def _tile(
    program,
    x_ptr, gate_ptr, up_ptr, bias_ptr, order_ptr, tiles_ptr, a_ptr, h_ptr, num_row_tiles, E: tl.constexpr, K:
    tl.constexpr, D: tl.constexpr, F: tl.constexpr, UP_START: tl.constexpr, STRIDE_E: tl.constexpr, STRIDE_F:
    tl.constexpr, STRIDE_D: tl.constexpr, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    SHIFT: tl.constexpr, GATED: tl.constexpr, PAIRS: tl.constexpr, BIASED: tl.constexpr, KEEP_H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, MULTIPLE:
    tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The tile of a program; nothing where it has none."""
    num_col_tiles: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    e, r, r_in, column = program_tile(tiles_ptr, program, num_row_tiles, num_col_tiles, BLOCK_M, GROUP_M)
    G: tl.constexpr = 2 * F if GATED else F
    BLOCK_N: tl.constexpr = 2 * BLOCK_F if GATED else BLOCK_F
    number = a_ptr.dtype.element_ty
    f_out = column * BLOCK_F + tl.arange(0, BLOCK_F)
    n = tl.arange(0, BLOCK_N)
    if PAIRS:
        g = column * BLOCK_N + n  # where a column of the tile lies in h
        g_in = g < G
    else:
        g = column * BLOCK_F + n % BLOCK_F
        g_in = g < F
    if e == E:
        zero = tl.zeros([BLOCK_M, BLOCK_F], number)
        store_columns(a_ptr, zero, r, r_in, f_out, F, F)
        if KEEP_H:
            if PAIRS:
                store_columns(h_ptr, tl.zeros([BLOCK_M, BLOCK_N], number), r, r_in, g, G, G)
            else:
                store_columns(h_ptr, zero, r, r_in, f_out, F, G)
                if GATED:
                    store_columns(h_ptr + F, zero, r, r_in, f_out, F, G)
    elif e < E:
        t = (tl.load(order_ptr + r, mask=r_in, other=0) // K).to(tl.int64)
        d = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + t[:, None] * D + d[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if TMA:
            first = column * (BLOCK_N if PAIRS else BLOCK_F)
            acc = sum_described_products(acc, x_ptrs, gate_ptr, e, first, r_in, D, STRIDE_D != 1, BLOCK_N, BLOCK_K)
        else:
            offset = g.to(tl.int64)[None, :] * STRIDE_F + d.to(tl.int64)[:, None] * STRIDE_D
            w_ptrs = weight_of(gate_ptr, e, x_ptr, STRIDE_E, MULTIPLE) + offset
            if GATED and not PAIRS:
                up_ptrs = weight_of(up_ptr, e, x_ptr, STRIDE_E, MULTIPLE) + UP_START + offset
                w_ptrs = tl.where((n < BLOCK_F)[None, :], w_ptrs, up_ptrs)
            acc = sum_products(acc, x_ptrs, w_ptrs, r_in, g_in, D, STRIDE_D, BLOCK_K)
        if BIASED:
            place = g
            if GATED and not PAIRS:
                place += tl.where(n < BLOCK_F, 0, F)
            acc += tl.load(bias_ptr + e * G + place, mask=g_in, other=0.0).to(tl.float32)[None, :]
        h = acc.to(number)
        if KEEP_H and (PAIRS or not GATED):
            store_columns(h_ptr, h, r, r_in, g, G, G)
        if GATED:
            if PAIRS:
                gate, up = tl.split(tl.reshape(h, [BLOCK_M, BLOCK_F, 2]))
            else:
                # A row of the accumulator lies in one group of threads: the halves part without a move.
                gate, up = tl.split(tl.permute(tl.reshape(h, [BLOCK_M, 2, BLOCK_F]), [0, 2, 1]))
            a = activated(gate.to(tl.float32), ACTIVATION, ALPHA, LIMIT) * factor(up.to(tl.float32), LIMIT, SHIFT)
            if KEEP_H and not PAIRS:
                store_columns(h_ptr, gate, r, r_in, f_out, F, G)
                store_columns(h_ptr + F, up, r, r_in, f_out, F, G)
        else:
            a = activated(h.to(tl.float32), ACTIVATION, ALPHA, LIMIT)
        store_columns(a_ptr, a.to(number), r, r_in, f_out, F, F)


# -- launcher: the grid is never empty, so that nothing is asked about R -----------------------


@triton_op("moe_ep_triton::gated_gemm", mutates_args=())
def gated_gemm(
    x_TD: Tensor,
    gate_EFD: Tensor | None,
    up_EGD: Tensor,
    offsets_E: Tensor,
    order_R: Tensor,
    top_k: int,
    activation: str,
    gated: bool,
    keep_h: bool,
    bias_EG: Tensor | None = None,
    tiles: Tensor | None = None,
    tile_rows: int = 0,
) -> tuple[Tensor, Tensor]:
    """(a_RF, h_RG); h is empty if nobody keeps it.  Without `gate_EFD`, `up_EGD` holds both if `gated`.

    tiles: row tiles of `tile_rows` rows of this routing, which are taken if the product wants such.
    """
    if reason := why_not(x_TD, gate_EFD, up_EGD, offsets_E, order_R, top_k, activation, gated, bias_EG):
        raise ValueError(f"moe_ep_triton.gated_gemm: {reason}")
    gate = None if gate_EFD is None else stacked(gate_EFD)
    made = made_of(tiles, tile_rows)
    return launch(x_TD, gate, stacked(up_EGD), offsets_E, order_R, top_k, activation, gated, keep_h, bias_EG, made)


def launch(
    x_TD: Tensor,
    gate: Weights | None,
    up: Weights,
    offsets_E: Tensor,
    order_R: Tensor,
    top_k: int,
    activation: str,
    gated: bool,
    keep_h: bool,
    bias_EG: Tensor | None = None,
    made: Made | None = None,
) -> tuple[Tensor, Tensor]:
    """(a_RF, h_RG), of arguments that `why_not` does not object to; gate and up are both stacked, or both separate."""
    x_TD, order_R, R = x_TD.contiguous(), order_R.contiguous(), order_R.shape[0]
    (E, G, D), first = up.shape, up if gate is None else gate
    if up.stride != first.stride:
        up = restrided(up, first.stride)
    F = G // 2 if gated and gate is None else G
    a_RF, h_RG = _outputs(x_TD, F, order_R, gated, keep_h)
    how = described(activation)
    up_start = F * up.stride[1] if gated and gate is None and not how.pairs else 0
    setting = _setting(x_TD, E, F, R, gated)
    block_m, block_f, block_k, warps, stages, tma, per_multiprocessor = (*setting, 0, 0)[:7]
    wanted = tma and gate is None
    columns, num_halves = (2 * block_f, 1) if how.pairs else (block_f, 2 if gated else 1)
    pointer = by_descriptor(up, num_halves, columns, block_k) if wanted else None
    tiles, num_row_tiles = row_tiles(offsets_E, R, block_m, made)
    run: Any = wrap_triton(_gated_gemm_kernel) if compiled(_gated_gemm_kernel) else _gated_gemm_kernel
    first_pointer = first.pointer if pointer is None else pointer
    bias = a_RF if bias_EG is None else bias_EG.contiguous()
    arguments = (x_TD, first_pointer, up.pointer, bias, order_R, tiles, a_RF, h_RG if keep_h else a_RF, num_row_tiles)
    run[(num_programs(num_row_tiles, triton.cdiv(F, block_f), per_multiprocessor, x_TD.device),)](
        *arguments,
        *(E, top_k, D, F, up_start, *up.stride, *constants(how), gated, how.pairs, bias_EG is not None, keep_h),
        *(block_m, block_f, block_k, GROUP_M, min(first.multiple, up.multiple), pointer is not None),
        per_multiprocessor > 0,
        num_warps=warps,
        num_stages=stages,
    )
    return a_RF, h_RG


def _setting(x_TD: Tensor, E: int, F: int, R: int | torch.SymInt, gated: bool) -> tuple[int, ...]:
    rows, form = rows_per_expert(R, E), "gated" if gated else "plain"
    filled = fills(R, E, F, 32 if gated else 64)
    seed = _seed(rows, x_TD.dtype, gated, torch.version.hip is not None, filled)
    return settings.choose("gated_gemm", form, x_TD.device, x_TD.dtype, rows, int(x_TD.shape[1]), F, seed=seed)


def tile_rows(
    x_TD: Tensor, gate: Tensor | Weights | None, up: Tensor | Weights, R: int | torch.SymInt, gated: bool
) -> int:
    """How many rows the tiles of this product have, with R rows.  The tensors may be fakes."""
    return _setting(x_TD, int(up.shape[0]), _width(gate, up, gated), R, gated)[0]


def _width(gate: Tensor | Weights | None, up: Tensor | Weights, gated: bool) -> int:
    """F."""
    return int(up.shape[1]) // (2 if gated and gate is None else 1)


def _outputs(x_TD: Tensor, F: int, order_R: Tensor, gated: bool, keep_h: bool) -> tuple[Tensor, Tensor]:
    R = order_R.shape[0]
    return x_TD.new_empty(R, F), x_TD.new_empty(R, 2 * F if gated else F) if keep_h else x_TD.new_empty(0)


def _seed(rows: int, dtype: torch.dtype, gated: bool, hip: bool, filled: bool = True) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_F, BLOCK_K, num_warps, num_stages), as those of grouped_gemm; gate and up share the columns."""
    m, n, *rest = first_product_seed(rows, dtype, hip, filled)
    return m, n // (2 if gated else 1), *rest  # type: ignore[return-value]


@gated_gemm.register_fake
def _(x_TD, gate_EFD, up_EGD, offsets_E, order_R, top_k, activation, gated, keep_h, bias_EG=None, tiles=None,
      tile_rows=0):  # type: ignore[no-untyped-def]  # fmt: skip
    return _outputs(x_TD, _width(gate_EFD, up_EGD, gated), order_R, gated, keep_h)


def why_not(
    x_TD: Tensor,
    gate_EFD: Tensor | None,
    up_EGD: Tensor,
    offsets_E: Tensor,
    order_R: Tensor,
    top_k: int,
    activation: str,
    gated: bool,
    bias_EG: Tensor | None = None,
) -> str | None:
    """Return why this kernel cannot take these arguments, or None if it can."""
    if offsets_E.dtype != torch.int32 or order_R.dtype != torch.int32:
        return f"order is {order_R.dtype} and offsets are {offsets_E.dtype}, expected int32"
    if offsets_E.shape[0] != up_EGD.shape[0]:
        return f"offsets are for {offsets_E.shape[0]} experts, up for {up_EGD.shape[0]}"
    return why_not_weights(x_TD, gate_EFD, up_EGD, top_k, activation, gated, bias_EG)


def why_not_weights(
    x_TD: Tensor,
    gate_EFD: Tensor | None,
    up_EGD: Tensor,
    top_k: int,
    activation: str,
    gated: bool,
    bias_EG: Tensor | None = None,
) -> str | None:
    """The same, before there is a routing."""
    if x_TD.dim() != 2 or up_EGD.dim() != 3:
        return f"x has {x_TD.dim()} dimensions and up {up_EGD.dim()}, expected 2 and 3"
    if x_TD.dtype not in FLOATS or any(w is not None and w.dtype != x_TD.dtype for w in (gate_EFD, up_EGD)):
        return f"x is {x_TD.dtype} and up is {up_EGD.dtype}, expected one of bf16, f16, f32"
    if gate_EFD is not None and (not gated or gate_EFD.shape != up_EGD.shape or gate_EFD.dtype != up_EGD.dtype):
        return f"gate is {tuple(gate_EFD.shape)}, up is {tuple(up_EGD.shape)}, expected the same, and `gated`"
    if not 1 <= up_EGD.shape[0] <= MAX_EXPERTS or top_k < 1:
        return f"{top_k} of {up_EGD.shape[0]} experts, expected at least one of 1 to {MAX_EXPERTS}"
    if x_TD.shape[1] != up_EGD.shape[2] or x_TD.shape[1] == 0:
        return f"rows of x have {x_TD.shape[1]} elements, those of up {up_EGD.shape[2]}"
    if up_EGD.shape[1] == 0 or (gated and gate_EFD is None and up_EGD.shape[1] % 2):
        return f"up has {up_EGD.shape[1]} rows"
    if reason := why_not_activation(activation, gated):
        return reason
    if gate_EFD is not None and described(activation).pairs:
        return f"activation {activation} of two stacks"
    width = _width(gate_EFD, up_EGD, gated) * (2 if gated else 1)
    return None if bias_EG is None else why_not_bias(bias_EG, x_TD, up_EGD.shape[0], width)


def compile_cases(hip: bool = False, D: int = 2048, F: int = 768, asked: settings.Setting | None = None) -> list[tuple]:
    """What can be launched: (setting, kernel, types, constants, num_warps, num_stages).

    asked: by this setting, without what settings.ASKED names, instead of the kernel's own guesses.
    """
    E, K = 128, 8
    cases: list[tuple] = []

    def case(
        dtype: torch.dtype,
        rows: int,
        gated: bool,
        keep: bool,
        packed: str = "d",
        form: str = "one",
        how: str = "silu",
        multiple: int = 0,
        filled: bool = True,
        tma: bool = False,
        biased: bool = False,
        persistent: bool = False,
    ) -> None:
        m, f, k, warps, stages = asked or _seed(rows, dtype, gated, hip, filled)
        short, act = settings.DTYPES[dtype], described(how)
        args = dict.fromkeys(("x_ptr", "gate_ptr", "up_ptr", "bias_ptr", "a_ptr", "h_ptr"), f"*{short}")
        args |= {"order_ptr": "*i32", "tiles_ptr": "*i32", "num_row_tiles": "i32"}
        args |= dict.fromkeys(("gate_ptr", "up_ptr"), "*i64") if multiple else {}
        columns = (2 * f, 1) if act.pairs else (f, 1 + gated)
        args |= {"gate_ptr": descriptor_type(short, columns[1], columns[0], k, packed == "f")} if tma else {}
        G = 2 * F if gated and form == "one" else F
        strides = {"d": (G * D, D, 1), "f": (G * D, 1, G)}[packed]
        values: dict[str, object] = dict(zip(("STRIDE_E", "STRIDE_F", "STRIDE_D"), strides, strict=True))
        values |= {"E": E, "K": K, "D": D, "F": F, "UP_START": F * strides[1] if G > F and not act.pairs else 0}
        values |= dict(zip(("ACTIVATION", "ALPHA", "LIMIT", "SHIFT"), constants(act), strict=True))
        values |= {"GATED": gated, "PAIRS": act.pairs, "BIASED": biased, "KEEP_H": keep, "GROUP_M": GROUP_M}
        values |= {"BLOCK_M": m, "BLOCK_F": f, "BLOCK_K": k, "MULTIPLE": multiple, "TMA": tma}
        values |= {"PERSISTENT": persistent}
        values |= {"STRIDE_E": 0} if multiple else {}
        tile = f"{m}x{'2x' if gated else ''}{f}x{k} w{warps} s{stages}"
        rest = f"{' h' if keep else ''}{', f packed' if packed == 'f' else ''}{', two' if form == 'two' else ''}"
        rest += f"{', separate' if multiple else ''}{', TMA' if tma else ''}{'' if how == 'silu' else f', {how}'}"
        rest = rest.replace(GPT_OSS, "gpt-oss") + (", bias" if biased else "")
        rest += ", persistent" if persistent else ""
        cases.append((f"{short} {tile}{rest}", _gated_gemm_kernel, args, values, warps, stages))

    for rows in (256, 32, 1):
        for keep in (True, False):
            case(torch.bfloat16, rows, True, keep)
        case(torch.bfloat16, rows, False, True)
        case(torch.bfloat16, rows, True, True, form="two")
        case(torch.bfloat16, rows, True, True, form="two", multiple=16)
        case(torch.float32, rows, True, True)
    for dtype, gated, multiple in ((torch.bfloat16, True, 0), (torch.bfloat16, False, 16), (torch.float32, True, 0)):
        case(dtype, 1, gated, False, multiple=multiple, filled=False)
    case(torch.bfloat16, 256, True, True, packed="f")
    case(torch.bfloat16, 256, True, True, packed="f", form="two", multiple=16)
    case(torch.bfloat16, 256, True, False, multiple=16)
    for rows in () if hip else (256, 32, 1):
        case(torch.bfloat16, rows, True, True, tma=True)
        case(torch.bfloat16, rows, True, False, packed="f", tma=True)
        case(torch.bfloat16, rows, False, True, tma=True)
    for tma in (False,) if hip else (False, True):
        case(torch.float16, 256, True, True, tma=tma)
        case(torch.float16, 256, False, True, tma=tma)
    case(torch.float32, 256, False, True)
    for how in ACTIVATIONS[1:]:
        case(torch.bfloat16, 256, True, True, how=how)
    for rows in (256, 32, 1):
        for keep in (True, False):
            case(torch.bfloat16, rows, True, keep, packed="f", how=GPT_OSS, biased=True)
    case(torch.bfloat16, 256, True, True, biased=True)
    case(torch.bfloat16, 256, False, True, biased=True)
    case(torch.float32, 256, True, True, packed="f", how=GPT_OSS, biased=True)
    for rows in (256, 32, 1):
        case(torch.bfloat16, rows, True, True, persistent=True)
        case(torch.bfloat16, rows, False, False, persistent=True)
    case(torch.float32, 256, True, True, persistent=True)
    for packed in "" if hip else "df":
        case(torch.bfloat16, 256, True, True, packed=packed, tma=True, persistent=True)
        case(torch.bfloat16, 256, True, True, packed=packed, how=GPT_OSS, biased=True, tma=True)
    return cases


# -- reference: the meaning of the op, and the oracle of its tests --------------------------


def gated_gemm_reference(
    x_TD: Tensor,
    gate_EFD: Tensor | None,
    up_EGD: Tensor,
    offsets_E: Tensor,
    order_R: Tensor,
    top_k: int,
    activation: str,
    gated: bool,
    bias_EG: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(a_RF, h_RG)."""
    x_RD = x_TD.index_select(0, order_R.div(top_k, rounding_mode="floor"))
    h_RG = torch.cat([grouped_gemm_reference(x_RD, w, offsets_E) for w in (gate_EFD, up_EGD) if w is not None], 1)
    h_RG = add_bias(h_RG, bias_EG, offsets_E)
    return between(h_RG, activation, gated), h_RG
