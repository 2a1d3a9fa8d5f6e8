"""The ops on a CPU.

Products in f32, bf16 and f16 are one call over all experts (kernels/grouped_gemm.cpp), what stands between two of them
another (kernels/gate.cpp); in other dtypes one product after another.  Sums are f32, rounded once.

The sort of the pairs, the rows it gathers, their weighted sum and its gradient are one call each (kernels/routing.cpp),
for routing weights of the rows' dtype or f32; other dtypes go to the definitions in ops.py.  All these forms equal
those up to one fused multiply-add.
"""

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_compile import expert_mlp, native, ops
from moe_compile import grouped_gemm_scaled as scaled
from moe_compile.activations import ACTIVATIONS, described
from moe_compile.float8 import widened

HUGE_PAGE, MADV_HUGEPAGE = 2 << 20, 14

# -- memory ---------------------------------------------------------------------------------


def unset(like: Tensor, *shape: int) -> Tensor:
    """New memory, on huge pages where the system grants them on request.

    Weight gradients are new memory in every step.  To touch it first by pages of 4 KiB takes longer than the products.
    """
    block = like.new_empty(shape)
    size = block.numel() * block.element_size()
    if size >= 2 * HUGE_PAGE and (advise := _madvise()) is not None:
        start = -(-block.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        stop = (block.data_ptr() + size) // HUGE_PAGE * HUGE_PAGE
        advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_HUGEPAGE)  # a wish: its answer is ignored
    return block


@functools.cache
def _madvise() -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


# -- products -------------------------------------------------------------------------------


def grouped_gemm(x_RD: Tensor, weights: Sequence[Tensor], offsets_E: Tensor) -> Tensor:
    if native.why_not(x_RD, *weights) or native.layout(weights) is None:
        return ops.grouped_gemm_reference(x_RD, weights, offsets_E)
    y_RF = unset(x_RD, x_RD.shape[0], weights[0].shape[-2])
    _product(x_RD.contiguous(), weights, offsets_E.contiguous(), y_RF)
    return y_RF


def _product(x_RD: Tensor, weights: Sequence[Tensor], offsets_E: Tensor, y_RF: Tensor, add: bool = False) -> None:
    """y = grouped_gemm(x, weights, offsets), or y +=; both may be some columns of a wider tensor."""
    transposed, ld = native.layout(weights)  # type: ignore[misc]
    (R, F), D, E = y_RF.shape, x_RD.shape[1], offsets_E.shape[0]
    addresses = (ctypes.c_void_p * E)(*native.addresses(weights))
    native.library(x_RD.dtype).grouped_gemm(  # type: ignore[union-attr]
        x_RD.data_ptr(), x_RD.stride(0), addresses, ld, transposed, offsets_E.data_ptr(), E,
        y_RF.data_ptr(), y_RF.stride(0), R, F, D, add, torch.get_num_threads(),
    )  # fmt: skip


def grouped_gemm_scaled(x_RD: Tensor, weights: Sequence[Tensor], scales: Tensor | None, offsets_E: Tensor) -> Tensor:
    """One expert after the other, in f32: each that has rows widens its weight in the place of the last one's."""
    scaled.check(x_RD, weights, scales, offsets_E)
    if x_RD.dtype not in native.NUMBERS:
        return scaled.reference(x_RD, weights, scales, offsets_E)
    w_FD = ops.per_expert(weights)
    wide_FD = torch.empty_like(w_FD[0], dtype=torch.float32)
    y_RF = unset(x_RD, x_RD.shape[0], wide_FD.shape[0])
    stop = 0
    for e, rows in ops.groups(offsets_E):
        stop = rows.stop
        end = offsets_E.new_tensor([stop - rows.start])
        w, in_blocks = widened(w_FD[e], wide_FD), scales is not None and scales.dim() == 3
        w = scaled.scale_blocks_(w, scales[e]) if in_blocks else w  # type: ignore[index]
        y = grouped_gemm(x_RD[rows].float(), [w], end)
        y_RF[rows] = y if scales is None or in_blocks else y.mul_(scales[e].float())
    y_RF[stop:].zero_()
    return y_RF


def grouped_gemm_dw(dy_RF: Tensor, x_RD: Tensor, offsets_E: Tensor) -> Tensor:
    if native.why_not(dy_RF, x_RD):
        return ops.grouped_gemm_dw_reference(dy_RF, x_RD, offsets_E)
    return _weight_gradient(dy_RF.contiguous(), x_RD.contiguous(), offsets_E.contiguous())


def _weight_gradient(dy_RF: Tensor, x_RD: Tensor, offsets_E: Tensor) -> Tensor:
    """As grouped_gemm_dw; both may be some columns of a wider tensor."""
    E, F, D = offsets_E.shape[0], dy_RF.shape[1], x_RD.shape[1]
    dw_EFD = unset(dy_RF, E, F, D)
    native.library(x_RD.dtype).grouped_gemm_dw(  # type: ignore[union-attr]
        dy_RF.data_ptr(), dy_RF.stride(0), x_RD.data_ptr(), x_RD.stride(0), offsets_E.data_ptr(), E,
        dw_EFD.data_ptr(), F, D, torch.get_num_threads(),
    )  # fmt: skip
    return dw_EFD


# -- to the experts and back ----------------------------------------------------------------


def dispatch(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    if native.why_not(x_TD):
        return ops.dispatch_reference(x_TD, ids_TK, num_experts)
    offsets_E, order_R, _ = _sorted(x_TD, ids_TK, num_experts)
    return _gather(x_TD, order_R, ids_TK.shape[1]), offsets_E, order_R


def _sorted(like: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(offsets_E, order_R, position_R) of `dispatch`; position_R, the inverse of the order, says where a pair lies."""
    ops.check_pairs(ids_TK, num_experts)
    ids_R = ids_TK.long().contiguous()
    order_R, position_R, offsets_E = (
        ids_R.new_empty(size, dtype=torch.int32) for size in (ids_R.numel(), ids_R.numel(), num_experts)
    )
    native.library(like.dtype).sort_by_expert(  # type: ignore[union-attr]
        ids_R.data_ptr(), ids_R.numel(), num_experts, order_R.data_ptr(), position_R.data_ptr(), offsets_E.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return offsets_E, order_R, position_R


def _gather(x_TD: Tensor, order_R: Tensor, top_k: int) -> Tensor:
    """The row of each pair's token, in the order of the pairs."""
    x_TD, R = x_TD.contiguous(), order_R.shape[0]
    x_RD = unset(x_TD, R, x_TD.shape[1])
    native.library(x_TD.dtype).gather(  # type: ignore[union-attr]
        x_TD.data_ptr(), x_TD.shape[1], order_R.data_ptr(), top_k, x_RD.data_ptr(), R, torch.get_num_threads()
    )
    return x_RD


def _positions(like: Tensor, order_R: Tensor) -> Tensor:
    """The inverse of the order."""
    position_R = torch.empty_like(order_R)
    native.library(like.dtype).invert(order_R.data_ptr(), order_R.shape[0], position_R.data_ptr())  # type: ignore[union-attr]
    return position_R


def why_not_combine(y_RD: Tensor, weights_TK: Tensor | None) -> str | None:
    """Return why the kernel cannot serve a `combine`, or None."""
    if weights_TK is not None and weights_TK.dtype not in (y_RD.dtype, torch.float32):
        return f"rows are {y_RD.dtype}, weights {weights_TK.dtype}"
    return native.why_not(y_RD)


def combine(y_RD: Tensor, weights_TK: Tensor | None, order_R: Tensor, offsets_E: Tensor, top_k: int) -> Tensor:
    if why_not_combine(y_RD, weights_TK):
        return ops.combine_reference(y_RD, weights_TK, order_R, offsets_E, top_k)
    return _combine(y_RD, weights_TK, _positions(y_RD, order_R.contiguous()), offsets_E, top_k)


def _combine(y_RD: Tensor, weights_TK: Tensor | None, position_R: Tensor, offsets_E: Tensor, top_k: int) -> Tensor:
    y_RD, offsets_E, (R,), D = y_RD.contiguous(), offsets_E.contiguous(), position_R.shape, y_RD.shape[1]
    weights_TK = None if weights_TK is None else weights_TK.contiguous()
    out_TD = unset(y_RD if weights_TK is None else weights_TK, R // top_k, D)
    native.library(y_RD.dtype).combine(  # type: ignore[union-attr]
        y_RD.data_ptr(), D, None if weights_TK is None else weights_TK.data_ptr(), out_TD.dtype == torch.float32,
        position_R.data_ptr(), offsets_E.data_ptr(), offsets_E.shape[0], out_TD.data_ptr(), R // top_k, top_k,
        torch.get_num_threads(),
    )  # fmt: skip
    return out_TD


def combine_backward(
    dout_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, order_R: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    if why_not_combine(y_RD, weights_TK) or dout_TD.dtype != weights_TK.dtype:
        return ops.combine_backward_reference(dout_TD, y_RD, weights_TK, order_R, offsets_E)
    dout_TD, y_RD, weights_TK = dout_TD.contiguous(), y_RD.contiguous(), weights_TK.contiguous()
    order_R, offsets_E = order_R.contiguous(), offsets_E.contiguous()
    dy_RD, dweights_TK = unset(y_RD, *y_RD.shape), torch.empty_like(weights_TK)
    native.library(y_RD.dtype).combine_backward(  # type: ignore[union-attr]
        dout_TD.data_ptr(), y_RD.data_ptr(), y_RD.shape[1], weights_TK.data_ptr(), weights_TK.dtype == torch.float32,
        order_R.data_ptr(), offsets_E.data_ptr(), offsets_E.shape[0], dy_RD.data_ptr(), dweights_TK.data_ptr(),
        order_R.shape[0], weights_TK.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return dy_RD, dweights_TK


# -- an expert's two products ---------------------------------------------------------------


def why_not_mlp(
    x_TD: Tensor,
    weights_TK: Tensor | None,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    *biases: Tensor | None,
) -> str | None:
    """Return why the kernels cannot serve an `expert_mlp`, or None."""
    dtypes = (x_TD.dtype, None if weights_TK is None else weights_TK.dtype)
    if not expert_mlp.has_kernel(*dtypes):
        return f"no fused kernel for {dtypes[0]} with routing weights {dtypes[1]}"
    if any(native.layout(w) is None for w in (gate, up, down) if w):
        return "weights that are contiguous neither as they are nor transposed"
    return native.why_not(x_TD, *gate, *up, *down, *(b for b in biases if b is not None))


def _form(activation: str, G: int, gated: bool) -> tuple[tuple[int, float, float, float], tuple[int, int]]:
    """(what the activation is, how gate and up lie in rows of G numbers), as the kernels are told."""
    how = described(activation)
    lie = (G // 2 if gated and not how.pairs else 0, how.pairs)
    return (ACTIVATIONS.index(how.name), how.alpha, how.limit, how.shift), lie


def _rows(like: Tensor, R: int, width: int, over: Tensor | None) -> Tensor:
    """Rows, in the memory of others that are needed no more if they are as many: new memory is touched first."""
    return over if over is not None and over.shape == (R, width) and over.is_contiguous() else unset(like, R, width)


def _start(x_RD: Tensor, bias_EG: Tensor | None, offsets_E: Tensor, width: int, over: Tensor | None = None) -> Tensor:
    """Rows, of each expert's bias if there is one: what a product is added to."""
    y_RG = _rows(x_RD, x_RD.shape[0], width, over)
    if bias_EG is not None:
        bias_EG, offsets_E = bias_EG.contiguous(), offsets_E.contiguous()
        native.library(x_RD.dtype).spread(  # type: ignore[union-attr]
            bias_EG.data_ptr(), offsets_E.data_ptr(), bias_EG.shape[0], y_RG.data_ptr(), *y_RG.shape,
            torch.get_num_threads(),
        )  # fmt: skip
    return y_RG


def _bias_gradient(dy_RF: Tensor, weight_R: Tensor, offsets_E: Tensor) -> Tensor:
    """As `expert_mlp.bias_gradient`, of rows times weights in f32, if there are any."""
    db_EF = dy_RF.new_empty(offsets_E.shape[0], dy_RF.shape[1])
    native.library(dy_RF.dtype).bias_gradient(  # type: ignore[union-attr]
        dy_RF.data_ptr(), _address(weight_R), offsets_E.data_ptr(), offsets_E.shape[0], db_EF.data_ptr(),
        dy_RF.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return db_EF


def mlp(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor | None,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    num_experts: int,
    activation: str,
    gated: bool,
    bias_EG: Tensor | None = None,
    bias_ED: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups, biases = [w for w in (gate, up) if w], (bias_EG, bias_ED)
    if why_not_mlp(x_TD, weights_TK, gate, up, down, *biases):
        args = (x_TD, ids_TK, weights_TK, gate, up, down, num_experts, activation, gated)
        return expert_mlp.reference(*args, *biases)
    expert_mlp.check(gate, up, down, activation, gated, *biases)
    offsets_E, order_R, position_R = _sorted(x_TD, ids_TK, num_experts)
    x_RD = _gather(x_TD, order_R, ids_TK.shape[1])
    R, G = x_RD.shape[0], sum(w[0].shape[-2] for w in groups)
    h_RG = _start(x_RD, bias_EG, offsets_E, G)
    for w, h in zip(groups, h_RG.chunk(len(groups), 1), strict=True):
        _product(x_RD, w, offsets_E, h, add=bias_EG is not None)
    F = G // 2 if gated else G
    a_RF, (form, lie) = unset(h_RG, R, F), _form(activation, G, gated)
    native.library(x_TD.dtype).gate(  # type: ignore[union-attr]
        *form, h_RG.data_ptr(), G, *lie, a_RF.data_ptr(), R, F, torch.get_num_threads()
    )
    y_RD = _start(x_RD, bias_ED, offsets_E, down[0].shape[-2], over=x_RD)
    _product(a_RF, down, offsets_E, y_RD, add=bias_ED is not None)
    return _combine(y_RD, weights_TK, position_R, offsets_E, ids_TK.shape[1]), h_RG, offsets_E, order_R


def mlp_backward(
    dout_TD: Tensor,
    x_TD: Tensor,
    h_RG: Tensor,
    weights_TK: Tensor | None,
    offsets_E: Tensor,
    order_R: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    activation: str,
    gated: bool,
    of_x: bool,
    of_params: bool,
    bias_EG: Tensor | None = None,
    bias_ED: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    groups, biases = [w for w in (gate, up) if w], (bias_EG, bias_ED)
    if why_not_mlp(x_TD, weights_TK, gate, up, down, *biases):
        args = (dout_TD, x_TD, h_RG, weights_TK, offsets_E, order_R, gate, up, down, activation, gated)
        return expert_mlp.backward_reference(*args, of_x, of_params, *biases)
    offsets_E, order_R = offsets_E.contiguous(), order_R.contiguous()
    (R, G), K = h_RG.shape, order_R.shape[0] // max(x_TD.shape[0], 1)
    F = G // 2 if gated else G
    dout_RD = _gather(dout_TD.to(x_TD.dtype), order_R, K)
    da_RF, dh_RG = unset(h_RG, R, F), unset(h_RG, R, G)
    _product(dout_RD, expert_mlp.transposed(down), offsets_E, da_RF)
    dx_TD, dgate, dup, ddown, dbias_EG, dbias_ED = (x_TD.new_empty(0) for _ in range(6))
    weight_R = dweight_R = dout_TD.new_empty(0)
    if weights_TK is not None:
        weight_R = weights_TK.reshape(-1).index_select(0, order_R).float()
        dweight_R = torch.empty_like(weight_R)
    form, lie = _form(activation, G, gated)
    a_RF = da_RF  # each number is read before the other is written
    native.library(x_TD.dtype).gate_backward(  # type: ignore[union-attr]
        *form, h_RG.contiguous().data_ptr(), G, *lie, da_RF.data_ptr(), _address(weight_R), dh_RG.data_ptr(),
        a_RF.data_ptr(), _address(dweight_R), R, F, torch.get_num_threads(),
    )  # fmt: skip
    if bias_ED is not None and weights_TK is not None:
        bias_ED = bias_ED.contiguous()
        native.library(x_TD.dtype).add_bias_dots(  # type: ignore[union-attr]
            dout_RD.data_ptr(), bias_ED.data_ptr(), offsets_E.data_ptr(), offsets_E.shape[0], dweight_R.data_ptr(),
            dout_RD.shape[1], torch.get_num_threads(),
        )  # fmt: skip
    del da_RF  # rows are the peak of a step: each tensor of them goes when its last reader is done
    if of_params:
        ddown = _weight_gradient(dout_RD, a_RF, offsets_E)
        dbias_ED = dbias_ED if bias_ED is None else _bias_gradient(dout_RD, weight_R, offsets_E)
    del a_RF
    parts = dh_RG.chunk(len(groups), 1)
    if of_x:
        dx_RD = _rows(x_TD, R, x_TD.shape[1], over=dout_RD)
        for i, (w, dh) in enumerate(zip(groups, parts, strict=True)):
            _product(dh, expert_mlp.transposed(w), offsets_E, dx_RD, add=i > 0)
        dx_TD = combine(dx_RD, None, order_R, offsets_E, K) if R else torch.zeros_like(x_TD)
        del dx_RD
    del dout_RD
    if of_params:
        x_RD = _gather(x_TD, order_R, K)
        *first, dup = (_weight_gradient(dh, x_RD, offsets_E) for dh in parts)
        dgate = first[0] if first else dgate
        dbias_EG = dbias_EG if bias_EG is None else _bias_gradient(dh_RG, weight_R[:0], offsets_E)
    dweights_TK = dweight_R
    if weights_TK is not None:
        dweights_TK = torch.empty_like(dweight_R).index_copy_(0, order_R.long(), dweight_R)
        dweights_TK = dweights_TK.view(weights_TK.shape).to(weights_TK.dtype)
    return dx_TD, dweights_TK, dgate, dup, ddown, dbias_EG, dbias_ED


def _address(values: Tensor) -> int | None:
    return values.data_ptr() if values.numel() else None


def register() -> None:
    """Make these the CPU kernels of the ops."""
    ops.grouped_gemm.register_kernel("cpu")(grouped_gemm)
    scaled.grouped_gemm_scaled.register_kernel("cpu")(grouped_gemm_scaled)
    ops.grouped_gemm_dw.register_kernel("cpu")(grouped_gemm_dw)
    ops.dispatch.register_kernel("cpu")(dispatch)
    ops.combine.register_kernel("cpu")(combine)
    ops.combine_backward.register_kernel("cpu")(combine_backward)
    expert_mlp.expert_mlp.register_kernel("cpu")(mlp)
    expert_mlp.expert_mlp_backward.register_kernel("cpu")(mlp_backward)
