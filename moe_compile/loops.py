"""The memory-bound ops as plain loops: what Inductor fuses with their neighbours on a CPU.

Each function means what the op of its name means (moe_compile/ops.py), for the same arguments; sums over a token's
experts are unrolled, so they keep the order of k.  Letters as there.
"""

import torch
from torch import Tensor


def dispatch(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order_R, offsets_E = torch.ops.moe_ep.sort_by_expert(ids_TK, num_experts)
    return x_TD[order_R // ids_TK.shape[1]], offsets_E, order_R


def combine(y_RD: Tensor, weights_TK: Tensor | None, order_R: Tensor, offsets_E: Tensor, top_k: int) -> Tensor:
    dtype = y_RD.dtype if weights_TK is None else torch.promote_types(y_RD.dtype, weights_TK.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    position_TK = _positions(order_R).view(-1, top_k)
    kept_TK = position_TK < offsets_E[-1]
    out_TD = None
    for k in range(top_k):
        rows = y_RD[position_TK[:, k]].to(wide)
        if weights_TK is not None:
            rows = rows * weights_TK[:, k].to(wide).unsqueeze(1)
        rows = torch.where(kept_TK[:, k].unsqueeze(1), rows, 0)
        out_TD = rows if out_TD is None else out_TD + rows
    assert out_TD is not None
    return out_TD.to(dtype)


def combine_backward(
    dout_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, order_R: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(dout_TD.dtype, torch.float32)
    top_k = weights_TK.shape[1]
    rows_R = torch.arange(order_R.shape[0], device=order_R.device)
    kept_R = rows_R < offsets_E[-1]
    dy_RD = dout_TD[order_R // top_k].to(wide) * weights_TK.reshape(-1)[order_R].to(wide).unsqueeze(1)
    dy_RD = torch.where(kept_R.unsqueeze(1), dy_RD, 0).to(y_RD.dtype)
    position_TK = _positions(order_R).view(-1, top_k)
    dots = [(dout_TD.to(wide) * y_RD[position_TK[:, k]].to(wide)).sum(1) for k in range(top_k)]
    dweights_TK = torch.where(position_TK < offsets_E[-1], torch.stack(dots, 1), 0)
    return dy_RD, dweights_TK.to(weights_TK.dtype)


def _positions(order_R: Tensor) -> Tensor:
    """Where the row of each pair lies."""
    rows_R = torch.arange(order_R.shape[0], device=order_R.device)
    return torch.empty_like(rows_R).index_put((order_R,), rows_R)
