"""The ops on a CPU.

Products in f32 are one call over all experts (kernels/grouped_gemm.cpp); in other dtypes one product after another.

A `combine` is an embedding bag: the bag of token t holds the K rows of its pairs, in the order of k, with the routing
weights as per-sample weights.  Its gradients are bags too.  These kernels are vectorised, threaded over bags, sum in
f32 and in order, and need no compilation.  They take one dtype for rows and weights and leave no row out: other
arguments go to the definitions in ops.py, which these forms equal up to one fused multiply-add.
"""

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_compile import native, ops

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
        advise(
            ctypes.c_void_p(start), ctypes.c_size_t(stop - start), 14
        )  # MADV_HUGEPAGE; a wish, its answer is ignored
    return block


@functools.cache
def _madvise() -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


# -- products -------------------------------------------------------------------------------


def grouped_gemm(x_RD: Tensor, weights: Sequence[Tensor], offsets_E: Tensor) -> Tensor:
    stored = native.layout(weights)
    if native.why_not(x_RD, *weights) or stored is None:
        return ops.grouped_gemm_reference(x_RD, weights, offsets_E)
    x_RD, offsets_E, (transposed, ld) = x_RD.contiguous(), offsets_E.contiguous(), stored
    (R, D), F, E = x_RD.shape, weights[0].shape[-2], offsets_E.shape[0]
    y_RF = unset(x_RD, R, F)
    addresses = (ctypes.c_void_p * E)(*native.addresses(weights))
    native.library().grouped_gemm(  # type: ignore[union-attr]
        x_RD.data_ptr(), addresses, ld, transposed, offsets_E.data_ptr(), E, y_RF.data_ptr(), R, F, D,
        torch.get_num_threads(),
    )  # fmt: skip
    return y_RF


def grouped_gemm_dw(dy_RF: Tensor, x_RD: Tensor, offsets_E: Tensor) -> Tensor:
    if native.why_not(dy_RF, x_RD):
        return ops.grouped_gemm_dw_reference(dy_RF, x_RD, offsets_E)
    dy_RF, x_RD, offsets_E = dy_RF.contiguous(), x_RD.contiguous(), offsets_E.contiguous()
    E, F, D = offsets_E.shape[0], dy_RF.shape[1], x_RD.shape[1]
    dw_EFD = unset(dy_RF, E, F, D)
    native.library().grouped_gemm_dw(  # type: ignore[union-attr]
        dy_RF.data_ptr(), x_RD.data_ptr(), offsets_E.data_ptr(), E, dw_EFD.data_ptr(), F, D, torch.get_num_threads()
    )
    return dw_EFD


# -- memory-bound ops -----------------------------------------------------------------------

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def why_not(y_RD: Tensor, weights_TK: Tensor | None, offsets_E: Tensor) -> str | None:
    """Return why the bags cannot serve, or None.  Reads one number of `offsets_E`."""
    if y_RD.dtype not in FLOATS:
        return f"rows are {y_RD.dtype}"
    if weights_TK is not None and weights_TK.dtype != y_RD.dtype:
        return f"rows are {y_RD.dtype}, weights {weights_TK.dtype}"
    if y_RD.numel() == 0 or int(offsets_E[-1]) != y_RD.shape[0]:
        return f"{int(offsets_E[-1])} of {y_RD.shape[0]} rows belong to experts"
    return None


def combine(y_RD: Tensor, weights_TK: Tensor | None, order_R: Tensor, offsets_E: Tensor, top_k: int) -> Tensor:
    if why_not(y_RD, weights_TK, offsets_E):
        return ops.combine_reference(y_RD, weights_TK, order_R, offsets_E, top_k)
    position_TK = _positions(order_R).view(-1, top_k)
    weights = None if weights_TK is None else weights_TK.contiguous()
    return torch.nn.functional.embedding_bag(position_TK, y_RD.contiguous(), mode="sum", per_sample_weights=weights)


def combine_backward(
    dout_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, order_R: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    if why_not(y_RD, weights_TK, offsets_E) or dout_TD.dtype != y_RD.dtype:
        return ops.combine_backward_reference(dout_TD, y_RD, weights_TK, order_R, offsets_E)
    dout_TD, y_RD = dout_TD.contiguous(), y_RD.contiguous()
    T, K = weights_TK.shape
    weight_R1 = weights_TK.reshape(-1).index_select(0, order_R).unsqueeze(1)
    dy_RD = dout_TD.index_select(0, order_R.div(K, rounding_mode="floor")).mul_(weight_R1)
    position_R = _positions(order_R)
    starts_T = torch.arange(0, T * K, K, dtype=torch.int32)
    token_of_pair = torch.arange(T, dtype=torch.int32).repeat_interleave(K)
    dweights = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        dout_TD, y_RD, position_R, starts_T, token_of_pair, 0
    )
    return dy_RD, dweights.view(T, K)


def _positions(order_R: Tensor) -> Tensor:
    """Where the row of each pair lies: the inverse of the order."""
    rows_R = torch.arange(order_R.shape[0], dtype=torch.int32)
    return torch.empty_like(rows_R).index_copy_(0, order_R.long(), rows_R)


def register() -> None:
    """Make these the CPU kernels of the ops."""
    ops.grouped_gemm.register_kernel("cpu")(grouped_gemm)
    ops.grouped_gemm_dw.register_kernel("cpu")(grouped_gemm_dw)
    ops.combine.register_kernel("cpu")(combine)
    ops.combine_backward.register_kernel("cpu")(combine_backward)
