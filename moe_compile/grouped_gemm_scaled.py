"""`grouped_gemm_scaled`: the grouped product with float8 weights, scaled behind the sum.

    y_RF[r, f] = scale * sum over d of x_RD[r, d] * w_EFD[e, f, d]   for the expert e of row r
    scale      = scales[e], or scales[e, f], or 1;  rows behind the last offset are zero
    or, of blocks of F/A by D/B numbers, scales[e, f // (F/A), d // (D/B)] within the sum

Letters    as in ops.py.
Types      x, y: any wider float.  Weights: one stack [E, F, D] of any strides, or E matrices [F, D], in float8_e4m3fn
           or float8_e5m2.  scales: [E], [E, F] or [E, A, B], f32, bf16 or f16.
Numerics   A float8 number is exact in every type that x may have.  Products, their sum and the scale in f32 or wider;
           one rounding, to the type of x.  The scale of a block may meet its weights, or sums of its products.
Memory     No stack of wider weights: an expert's weight is widened where its product is computed, if it has rows.
Gradient   Of x alone, dx = (dy * scale) @ w, by this op: weights and scales are frozen, and where one asks for a
           gradient the backward raises.  A scale by feature is multiplied into dy, and rounded with it; in f16, where
           the product may be less than the type holds, that product runs in f32.  Scales of blocks stay with the
           weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

from moe_compile.ops import groups, per_expert

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (torch.float32, torch.bfloat16, torch.float16)


def reference(x_RD: Tensor, weights: Sequence[Tensor], scales: Tensor | None, offsets_E: Tensor) -> Tensor:
    """y_RF, as defined above.  Raises `TypeError` or `ValueError` on operands that are none."""
    check(x_RD, weights, scales, offsets_E)
    w_FD, wide = per_expert(weights), torch.promote_types(x_RD.dtype, torch.float32)
    y_RF = x_RD.new_empty(x_RD.shape[0], w_FD[0].shape[0])
    stop = 0
    with torch.autocast(x_RD.device.type, enabled=False):  # a backward may be called inside of it
        for e, rows in groups(offsets_E):
            stop = rows.stop
            w = w_FD[e].to(wide)
            if scales is not None and scales.dim() == 3:
                y_RF[rows] = torch.mm(x_RD[rows].to(wide), scale_blocks_(w, scales[e]).t())
                continue
            y = torch.mm(x_RD[rows].to(wide), w.t())
            y_RF[rows] = y if scales is None else y.mul_(scales[e].to(wide))
    y_RF[stop:].zero_()
    return y_RF


def scale_blocks_(w_FD: Tensor, scales_AB: Tensor) -> Tensor:
    """w_FD, of any strides, each of whose A x B blocks is multiplied by its scale in place."""
    A, B = scales_AB.shape
    blocks = w_FD.unflatten(0, (A, w_FD.shape[0] // A)).unflatten(2, (B, w_FD.shape[1] // B))
    blocks.mul_(scales_AB.to(w_FD.dtype)[:, None, :, None])
    return w_FD


grouped_gemm_scaled = custom_op("moe_ep::grouped_gemm_scaled", reference, mutates_args=())


def check(x_RD: Tensor, weights: Sequence[Tensor], scales: Tensor | None, offsets_E: Tensor) -> None:
    """Raise on operands that are none of the op's."""
    first = weights[0]
    E, F, D = (len(weights), *first.shape) if first.dim() == 2 else first.shape
    if any(w.dtype not in FLOAT8 or w.dtype != first.dtype for w in weights):
        raise TypeError(f"weights are {first.dtype}, expected one of float8_e4m3fn, float8_e5m2")
    if not x_RD.is_floating_point() or x_RD.element_size() == 1:
        raise TypeError(f"rows are {x_RD.dtype}, expected a wider float than the weights'")
    if any(w.shape != first.shape for w in weights) or offsets_E.shape[0] != E or x_RD.shape[1] != D:
        raise ValueError(
            f"weights of {E} experts {(F, D)}, offsets of {offsets_E.shape[0]}, rows of {x_RD.shape[1]} numbers"
        )
    if scales is not None and scales.dtype not in SCALES:
        raise TypeError(f"scales are {scales.dtype}, expected f32, bf16 or f16")
    if scales is not None and tuple(scales.shape) not in ((E,), (E, F)) and not _of_blocks(scales, E, F, D):
        raise ValueError(f"scales are {tuple(scales.shape)}, expected {(E,)} or {(E, F)}, or of blocks of {(E, F, D)}")


def _of_blocks(scales: Tensor, E: int, F: int, D: int) -> bool:
    if scales.dim() != 3 or scales.shape[0] != E or 0 in scales.shape:
        return False
    return F % scales.shape[1] == 0 and D % scales.shape[2] == 0


@grouped_gemm_scaled.register_fake
def _(x_RD: Tensor, weights: Sequence[Tensor], scales: Tensor | None, offsets_E: Tensor) -> Tensor:
    check(x_RD, weights, scales, offsets_E)
    return x_RD.new_empty(x_RD.shape[0], weights[0].shape[-2])


def _save(ctx, inputs, output) -> None:
    _, weights, scales, offsets_E = inputs
    if scales is None:
        ctx.save_for_backward(offsets_E, *weights)
    else:
        ctx.save_for_backward(offsets_E, *weights, scales)
    ctx.scaled = scales is not None


def _backward(ctx, dy_RF: Tensor):
    if any(ctx.needs_input_grad[1]) or ctx.needs_input_grad[2]:
        raise RuntimeError("grouped_gemm_scaled has a gradient for rows alone: weights and scales are frozen")
    offsets_E, *weights = ctx.saved_tensors
    scales = weights.pop() if ctx.scaled else None
    rows = dy_RF
    if scales is not None and scales.dim() == 2:
        rows, scales = _scaled_by_feature(dy_RF, scales, offsets_E), None
    if scales is not None and scales.dim() == 3:
        scales = scales.transpose(1, 2)
    dx_RD = grouped_gemm_scaled(rows, [w.transpose(-1, -2) for w in weights], scales, offsets_E)
    return dx_RD.to(dy_RF.dtype), [None] * len(weights), None, None


def _scaled_by_feature(dy_RF: Tensor, scales_EF: Tensor, offsets_E: Tensor) -> Tensor:
    """dy_RF[r, f] * scales_EF[e, f] for the expert e of row r; anything where no expert reads."""
    wide = torch.promote_types(dy_RF.dtype, torch.float32)
    rows_R = torch.arange(dy_RF.shape[0], device=dy_RF.device, dtype=offsets_E.dtype)
    expert_R = torch.searchsorted(offsets_E, rows_R, right=True).clamp(max=offsets_E.shape[0] - 1)
    rows = dy_RF.to(wide) * scales_EF.index_select(0, expert_R).to(wide)
    return rows if dy_RF.dtype == torch.float16 else rows.to(dy_RF.dtype)


register_autograd("moe_ep::grouped_gemm_scaled", _backward, setup_context=_save)
