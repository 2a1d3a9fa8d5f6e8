"""Triton kernel for the gradients of biases: sums of an expert's rows, and the routing weights' part of a bias.

    db_EF[e, f] = sum over offsets_E[e-1] <= r < offsets_E[e] of w[p] * dy[row(r), f]      p = order_R[r]
    dots[p]     = dot(dy[row(r)], bias_EF[e])                                              if a bias is given
    row(r)      = p // K if rows of dy are those of tokens, gathered as they are loaded, else r

One program adds up a part of the columns of one expert, whatever its number of rows: zeros where it has none.

Letters    T tokens, K experts per token, R = T*K rows, E experts, F numbers of a row.
Types      dy, bias, db: bf16 | f16 | f32, all the same; w: bf16 | f16 | f32 or none, which means ones.  dots: f32.
           order, offsets: i32.
Numerics   Sums in f32, in the order of the rows; rounded once.  Each part of the columns writes its part of the dots;
           they are added in a fixed order.  No atomics.
Layout     dy and bias row-major; other strides are copied first.
Cost       R*F elements read, E*F written: bound by memory, or with few experts and columns by the longest expert.
Gradient   None: nothing differentiates it a second time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from moe_compile.expert_mlp import bias_gradient as bias_gradient_reference
from moe_compile.kernels.dispatch import FLOATS, compiled
from moe_compile.ops import groups

BLOCK_M, BLOCK_F = 64, 64

# -- kernel ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R"])
def _bias_gradient_kernel(
    dy_ptr,
    weights_ptr,
    bias_ptr,
    order_ptr,
    offsets_ptr,
    db_ptr,
    dots_ptr,
    R,
    F: tl.constexpr,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """K: 0 where row r of dy is that of pair order[r]."""
    num_parts: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    e = tl.program_id(0) // num_parts
    part = tl.program_id(0) % num_parts
    f = part * BLOCK_F + tl.arange(0, BLOCK_F)
    f_in = f < F
    start = tl.load(offsets_ptr + e - 1, mask=e > 0, other=0)
    stop = tl.load(offsets_ptr + e)
    acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    if DOTS:
        bias = tl.load(bias_ptr + e.to(tl.int64) * F + f, mask=f_in, other=0.0).to(tl.float32)
    for first in range(start, stop, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        r_in = rows < stop
        at = rows.to(tl.int64)
        if K > 0 or WEIGHTED or DOTS:
            pair = tl.load(order_ptr + rows, mask=r_in, other=0)
        if K > 0:
            at = (pair // K).to(tl.int64)
        dy = tl.load(dy_ptr + at[:, None] * F + f[None, :], mask=r_in[:, None] & f_in[None, :], other=0.0)
        dy = dy.to(tl.float32)
        if DOTS:
            dots_ptrs = dots_ptr + part.to(tl.int64) * R + pair
            tl.store(dots_ptrs, tl.sum(dy * bias[None, :], 1), mask=r_in)
        if WEIGHTED:
            dy *= tl.load(weights_ptr + pair, mask=r_in, other=0.0).to(tl.float32)[:, None]
        acc += dy
    db = tl.sum(acc, 0)
    tl.store(db_ptr + e.to(tl.int64) * F + f, db.to(db_ptr.dtype.element_ty), mask=f_in)


# -- launcher -------------------------------------------------------------------------------


@triton_op("moe_ep_triton::bias_gradient", mutates_args=())
def bias_gradient(
    dy: Tensor,
    weights_TK: Tensor | None,
    bias_EF: Tensor | None,
    offsets_E: Tensor,
    order_R: Tensor,
    top_k: int = 0,
) -> tuple[Tensor, Tensor]:
    """(db_EF, dots_R).  top_k: K if dy has a row for each token, else 0.  dots are by pair; empty without bias."""
    if reason := why_not(dy, weights_TK, bias_EF, offsets_E, order_R, top_k):
        raise ValueError(f"moe_ep_triton.bias_gradient: {reason}")
    (E,), R, F = offsets_E.shape, order_R.shape[0], int(dy.shape[1])
    db_EF, num_parts = dy.new_empty(E, F), triton.cdiv(F, BLOCK_F)
    dots = dy.new_zeros(num_parts, 0 if bias_EF is None else R, dtype=torch.float32)  # zeros: nobody's pairs
    weights = dots if weights_TK is None else weights_TK.contiguous()
    bias = db_EF if bias_EF is None else bias_EF.contiguous()
    run: Any = wrap_triton(_bias_gradient_kernel) if compiled(_bias_gradient_kernel) else _bias_gradient_kernel
    run[(E * num_parts,)](
        *(dy.contiguous(), weights, bias, order_R.contiguous(), offsets_E.contiguous(), db_EF, dots, R),
        *(F, top_k, weights_TK is not None, bias_EF is not None, BLOCK_M, BLOCK_F),
        num_warps=4,
        num_stages=3,
    )
    return db_EF, dots.sum(0)


@bias_gradient.register_fake
def _(
    dy: Tensor,
    weights_TK: Tensor | None,
    bias_EF: Tensor | None,
    offsets_E: Tensor,
    order_R: Tensor,
    top_k: int = 0,
) -> tuple[Tensor, Tensor]:
    num_dots = 0 if bias_EF is None else order_R.shape[0]
    return dy.new_empty(offsets_E.shape[0], dy.shape[1]), dy.new_empty(num_dots, dtype=torch.float32)


def why_not(
    dy: Tensor, weights_TK: Tensor | None, bias_EF: Tensor | None, offsets_E: Tensor, order_R: Tensor, top_k: int = 0
) -> str | None:
    """Return why this kernel cannot take these arguments, or None if it can."""
    if dy.dim() != 2 or dy.dtype not in FLOATS or dy.shape[1] == 0 or top_k < 0:
        return f"dy is {dy.dtype} {tuple(dy.shape)} of {top_k} experts a token, expected bf16, f16 or f32 in rows"
    if offsets_E.dtype != torch.int32 or order_R.dtype != torch.int32 or offsets_E.shape[0] < 1:
        return f"order is {order_R.dtype} and offsets are {offsets_E.dtype} of {offsets_E.shape[0]}, expected int32"
    if weights_TK is not None and weights_TK.dtype not in FLOATS:
        return f"weights are {weights_TK.dtype}, expected bf16, f16 or f32"
    if bias_EF is not None and (bias_EF.dtype != dy.dtype or bias_EF.shape != (offsets_E.shape[0], dy.shape[1])):
        return f"bias is {bias_EF.dtype} {tuple(bias_EF.shape)}, dy is {dy.dtype} {tuple(dy.shape)}"
    return None


def compile_cases(hip: bool = False) -> list[tuple]:
    """What can be launched: (setting, kernel, types, constants, num_warps, num_stages)."""
    cases: list[tuple] = []
    for short in ("bf16", "fp32"):
        for name, top_k, weighted in (("rows", 0, False), ("gathered", 4, True)):
            args = dict.fromkeys(("dy_ptr", "weights_ptr", "bias_ptr", "db_ptr"), f"*{short}")
            args |= {"dots_ptr": "*fp32", "order_ptr": "*i32", "offsets_ptr": "*i32", "R": "i32"}
            constants = {"F": 2880, "K": top_k, "WEIGHTED": weighted, "DOTS": weighted}
            constants |= {"BLOCK_M": BLOCK_M, "BLOCK_F": BLOCK_F}
            cases.append((f"{short} {BLOCK_M}x{BLOCK_F} {name}", _bias_gradient_kernel, args, constants, 4, 3))
    return cases


# -- reference: the meaning of the op, and the oracle of its tests --------------------------


def reference(
    dy: Tensor,
    weights_TK: Tensor | None,
    bias_EF: Tensor | None,
    offsets_E: Tensor,
    order_R: Tensor,
    top_k: int = 0,
) -> tuple[Tensor, Tensor]:
    """(db_EF, dots_R)."""
    dy_RF = dy.index_select(0, order_R.div(top_k, rounding_mode="floor")) if top_k else dy
    dots_R = dy.new_zeros(0 if bias_EF is None else order_R.shape[0])
    for e, rows in groups(offsets_E) if bias_EF is not None else ():
        dots_R[order_R[rows].long()] = dy_RF[rows] @ bias_EF[e]  # type: ignore[index]
    if weights_TK is not None:
        dy_RF = dy_RF * weights_TK.reshape(-1).index_select(0, order_R)[:, None]
    return bias_gradient_reference(dy_RF, offsets_E), dots_R
