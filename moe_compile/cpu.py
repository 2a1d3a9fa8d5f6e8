"""The ops on a CPU, by kernels that PyTorch carries already: nothing to compile, threads used across experts.

Products (f32, f64) are one MKL batch over all experts (mkl.py), cut so that one crowded expert leaves no thread idle.

A `combine` is an embedding bag: the bag of token t holds the K rows of its pairs, in the order of k, with the routing
weights as per-sample weights.  Its gradients are bags too.  These kernels are vectorised, threaded over bags, sum in
f32 and in order, and need no compilation.  They take one dtype for rows and weights and leave no row out: other
arguments go to the definitions in ops.py, which these forms equal up to one fused multiply-add.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compile import mkl, ops
from moe_compile.mkl import Product

BLOCK_ROWS = 256  # rows of one product: enough to reach full speed, few enough to balance threads

# -- products -------------------------------------------------------------------------------


def grouped_gemm(x_RD: Tensor, weights: Sequence[Tensor], offsets_E: Tensor) -> Tensor:
    w_FD = ops.per_expert(weights)
    layouts = [mkl.layout(w) for w in w_FD]
    if mkl.why_not(x_RD.dtype) or None in layouts or any(w.dtype != x_RD.dtype for w in weights) or not x_RD.numel():
        return ops.grouped_gemm_reference(x_RD, weights, offsets_E)
    x_RD, (F, D) = x_RD.contiguous(), w_FD[0].shape
    y_RF = x_RD.new_empty(x_RD.shape[0], F)
    size, x, y, stop = x_RD.element_size(), x_RD.data_ptr(), y_RF.data_ptr(), 0
    products = []
    for e, rows in ops.groups(offsets_E):
        stored, ld = layouts[e]  # type: ignore[misc]
        w = w_FD[e].data_ptr()
        for r in range(rows.start, rows.stop, BLOCK_ROWS):
            m = min(BLOCK_ROWS, rows.stop - r)
            products.append(Product(m, F, D, x + r * D * size, False, D, w, not stored, ld, y + r * F * size, F))
        stop = rows.stop
    mkl.multiply(x_RD.dtype, products)
    y_RF[stop:].zero_()
    return y_RF


def grouped_gemm_dw(dy_RF: Tensor, x_RD: Tensor, offsets_E: Tensor) -> Tensor:
    if mkl.why_not(x_RD.dtype) or dy_RF.dtype != x_RD.dtype or not dy_RF.numel() or not x_RD.numel():
        return ops.grouped_gemm_dw_reference(dy_RF, x_RD, offsets_E)
    dy_RF, x_RD = dy_RF.contiguous(), x_RD.contiguous()
    E, F, D = offsets_E.shape[0], dy_RF.shape[1], x_RD.shape[1]
    dw_EFD = dy_RF.new_empty(E, F, D)
    size, dy, x, dw = dy_RF.element_size(), dy_RF.data_ptr(), x_RD.data_ptr(), dw_EFD.data_ptr()
    crowded = dy_RF.shape[0] / torch.get_num_threads()  # rows beyond which one expert holds up the others
    products, empty = [], set(range(E))
    for e, rows in ops.groups(offsets_E):
        k, block = rows.stop - rows.start, F
        if k > crowded / 2:
            block = max(64, F // (2 * torch.get_num_threads()))
        for f in range(0, F, block):
            a, c = dy + (rows.start * F + f) * size, dw + (e * F + f) * D * size
            products.append(Product(min(block, F - f), D, k, a, True, F, x + rows.start * D * size, False, D, c, D))
        empty.discard(e)
    mkl.multiply(x_RD.dtype, products)
    for e in empty:
        dw_EFD[e].zero_()
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
