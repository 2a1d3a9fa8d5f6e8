"""The `moe_ep` ops: what each one means, written in plain PyTorch.

A definition here is the specification.  Kernels may replace its body, never its meaning.

Letters    T tokens, K experts per token, R = T*K routed rows, E experts, D model width, F expert width.
Routing    Pair (t, k) has the flat index t*K + k.  `order_R` (i32) lists all pairs sorted by expert, stable;
           `offsets_E` (i32) are inclusive ends: rows offsets[e-1] <= r < offsets[e] belong to expert e.
           A pair whose id is outside [0, E) goes to nobody: it sorts behind offsets[E-1], in pair order
           (negative ids too), its rows are computed as zeros by the GEMMs and left out by `combine`.
Types      Values in any float dtype, all on one device; ids integer.
Numerics   The sort is stable, `combine` adds the K rows of a token in the order of k, in f32 or wider.
           No atomics: the same inputs give the same bits.
Gradient   Every op that carries values has one, and a second backward gives the same again.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

# -- checking ids ---------------------------------------------------------------------------


@custom_op("moe_ep::check_ids", mutates_args=())
def check_ids(ids_TK: Tensor, num_classes: int) -> Tensor:
    """ids_TK, if all are in [0, num_classes); else an error, as `one_hot` and indexing give.

    On an accelerator the check runs there and fails as theirs do, at the next synchronisation.
    """
    if ids_TK.device.type != "cpu":
        torch._assert_async(((ids_TK >= 0) & (ids_TK < num_classes)).all())
    elif ids_TK.numel():
        low, high = (int(end) for end in ids_TK.aminmax())
        if low < 0 or high >= num_classes:
            raise RuntimeError(
                f"Class values must be smaller than num_classes and not negative: "
                f"expert ids run from {low} to {high}, num_classes is {num_classes}"
            )
    return ids_TK.clone()


@check_ids.register_fake
def _(ids_TK: Tensor, num_classes: int) -> Tensor:
    return torch.empty_like(ids_TK)


# -- dispatch -------------------------------------------------------------------------------


def dispatch_reference(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x_RD, offsets_E, order_R): the rows x_TD[t] of all pairs (t, k), laid out expert by expert.

    x_RD[r] = x_TD[order_R[r] // K], also behind the last offset, where nobody may read them: no gradient comes back
    from there.  Raises on ids that are not an integer [T, K], and on K = 0 or num_experts = 0.
    """
    check_pairs(ids_TK, num_experts)
    order_R, offsets_E = sort_by_expert(ids_TK, num_experts)
    return x_TD.index_select(0, order_R.div(ids_TK.shape[1], rounding_mode="floor")), offsets_E, order_R


def check_pairs(ids_TK: Tensor, num_experts: int) -> None:
    """Raise as `dispatch` does."""
    if ids_TK.dim() != 2 or ids_TK.is_floating_point() or ids_TK.dtype == torch.bool:
        raise TypeError(f"expert ids are {ids_TK.dtype} {tuple(ids_TK.shape)}, expected an integer [T, K]")
    if ids_TK.shape[1] == 0 or num_experts == 0:
        raise ValueError(f"{ids_TK.shape[1]} experts a token of {num_experts}, expected at least one")


dispatch = custom_op("moe_ep::dispatch", dispatch_reference, mutates_args=())


@custom_op("moe_ep::sort_by_expert", mutates_args=())
def sort_by_expert(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order_R, offsets_E) of `dispatch`: a stable sort of the pairs and the ends of the groups."""
    ids = ids_TK.reshape(-1).long()
    key = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)
    order = torch.argsort(key, stable=True)
    counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts]
    return order.to(torch.int32), counts.cumsum(0).to(torch.int32)


@sort_by_expert.register_fake
def _(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    order_R = ids_TK.new_empty(ids_TK.shape[0] * ids_TK.shape[1], dtype=torch.int32)
    return order_R, ids_TK.new_empty(num_experts, dtype=torch.int32)


@dispatch.register_fake
def _(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order_R = ids_TK.new_empty(ids_TK.shape[0] * ids_TK.shape[1], dtype=torch.int32)
    offsets_E = ids_TK.new_empty(num_experts, dtype=torch.int32)
    return x_TD.new_empty(order_R.shape[0], x_TD.shape[1]), offsets_E, order_R


def _dispatch_save(ctx, inputs, output) -> None:
    _, offsets_E, order_R = output
    ctx.save_for_backward(offsets_E, order_R)
    ctx.mark_non_differentiable(offsets_E, order_R)
    ctx.top_k = inputs[1].shape[1]


def _dispatch_backward(ctx, dx_RD: Tensor, _offsets, _order):
    offsets_E, order_R = ctx.saved_tensors
    return combine(dx_RD, None, order_R, offsets_E, ctx.top_k), None, None


# -- grouped GEMM ---------------------------------------------------------------------------


def grouped_gemm_reference(x_RD: Tensor, weights: Sequence[Tensor], offsets_E: Tensor) -> Tensor:
    """y_RF[r] = x_RD[r] @ w_EFD[e].T for the expert e of row r; zeros behind the last offset.

    `weights` is one stacked [E, F, D] tensor, of any strides, or E tensors [F, D].
    """
    w_FD = per_expert(weights)
    y_RF = x_RD.new_empty(x_RD.shape[0], w_FD[0].shape[0])
    stop = 0
    with torch.autocast(x_RD.device.type, enabled=False):  # a backward may be called inside of it
        for e, rows in groups(offsets_E):
            torch.mm(x_RD[rows], w_FD[e].t(), out=y_RF[rows])
            stop = rows.stop
    y_RF[stop:].zero_()
    return y_RF


grouped_gemm = custom_op("moe_ep::grouped_gemm", grouped_gemm_reference, mutates_args=())


@grouped_gemm.register_fake
def _(x_RD: Tensor, weights: Sequence[Tensor], offsets_E: Tensor) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], weights[0].shape[-2])


def grouped_gemm_dw_reference(dy_RF: Tensor, x_RD: Tensor, offsets_E: Tensor) -> Tensor:
    """dw_EFD[e] = sum over the rows r of expert e of outer(dy_RF[r], x_RD[r]); zeros for an empty expert."""
    dw_EFD = dy_RF.new_empty(offsets_E.shape[0], dy_RF.shape[1], x_RD.shape[1])
    seen = set()
    with torch.autocast(x_RD.device.type, enabled=False):
        for e, rows in groups(offsets_E):
            torch.mm(dy_RF[rows].t(), x_RD[rows], out=dw_EFD[e])
            seen.add(e)
    for e in set(range(offsets_E.shape[0])) - seen:
        dw_EFD[e].zero_()
    return dw_EFD


grouped_gemm_dw = custom_op("moe_ep::grouped_gemm_dw", grouped_gemm_dw_reference, mutates_args=())


@grouped_gemm_dw.register_fake
def _(dy_RF: Tensor, x_RD: Tensor, offsets_E: Tensor) -> Tensor:
    return dy_RF.new_empty(offsets_E.shape[0], dy_RF.shape[1], x_RD.shape[1])


def per_expert(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The weight [F, D] of each expert."""
    return weights[0].unbind(0) if weights[0].dim() == 3 else weights


def groups(offsets_E: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield (expert, rows) for every expert that has rows."""
    start = 0
    for e, stop in enumerate(offsets_E.tolist()):
        if stop > start:
            yield e, slice(start, stop)
        start = stop


def _gemm_save(ctx, inputs, output) -> None:
    x_RD, weights, offsets_E = inputs
    ctx.save_for_backward(x_RD, offsets_E, *weights)


def _gemm_backward(ctx, dy_RF: Tensor):
    x_RD, offsets_E, *weights = ctx.saved_tensors
    stacked = weights[0].dim() == 3
    dx_RD, dws = None, [None] * len(weights)
    if ctx.needs_input_grad[0]:
        transposed = [w.transpose(-1, -2) for w in weights]
        dx_RD = grouped_gemm(dy_RF, transposed, offsets_E)
    if any(ctx.needs_input_grad[1]):
        dw_EFD = grouped_gemm_dw(dy_RF, x_RD, offsets_E)
        dws = [dw_EFD] if stacked else list(dw_EFD.unbind(0))
    return dx_RD, dws, None


# -- combine --------------------------------------------------------------------------------


def combine_reference(
    y_RD: Tensor, weights_TK: Tensor | None, order_R: Tensor, offsets_E: Tensor, top_k: int
) -> Tensor:
    """out_TD[t] = sum over k of weights_TK[t, k] * (the row of y_RD of pair (t, k)).

    No weights mean ones.  The result has the dtype that y * weights has; sums run in f32 or wider.
    """
    position_R, kept_R = _positions(order_R, offsets_E)
    dtype = y_RD.dtype if weights_TK is None else torch.promote_types(y_RD.dtype, weights_TK.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    num_tokens, D = order_R.shape[0] // top_k, y_RD.shape[1]
    rows = y_RD.index_select(0, position_R).to(wide)
    if weights_TK is not None:
        rows = rows * weights_TK.to(wide).reshape(-1, 1)
    rows = rows.masked_fill(~kept_R.unsqueeze(1), 0).view(num_tokens, top_k, D)
    out_TD = rows.new_zeros(num_tokens, D)
    for k in range(top_k):
        out_TD += rows[:, k]
    return out_TD.to(dtype)


def _positions(order_R: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor]:
    """Where the row of each pair lies, and whether an expert took it."""
    rows_R = torch.arange(order_R.shape[0], device=order_R.device)
    position_R = torch.empty_like(rows_R).index_copy_(0, order_R.long(), rows_R)
    return position_R, position_R < offsets_E[-1]


combine = custom_op("moe_ep::combine", combine_reference, mutates_args=())


@combine.register_fake
def _(y_RD: Tensor, weights_TK: Tensor | None, order_R: Tensor, offsets_E: Tensor, top_k: int) -> Tensor:
    dtype = y_RD.dtype if weights_TK is None else torch.promote_types(y_RD.dtype, weights_TK.dtype)
    T = weights_TK.shape[0] if weights_TK is not None else order_R.shape[0] // top_k
    return y_RD.new_empty(T, y_RD.shape[1], dtype=dtype)


def combine_backward_reference(
    dout_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, order_R: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    """(dy_RD, dweights_TK) of a weighted `combine`:

    dy_RD[r] = weights[t, k] * dout_TD[t] and dweights_TK[t, k] = dot(dout_TD[t], y_RD[r]) for the pair
    (t, k) of row r, both zero for a pair that nobody took.  Products and sums in f32 or wider.
    """
    wide = torch.promote_types(dout_TD.dtype, torch.float32)
    token_R = order_R.div(weights_TK.shape[1], rounding_mode="floor")
    _, kept_R = _positions(order_R, offsets_E)
    kept_R = kept_R.index_select(0, order_R)
    dout_RD = dout_TD.index_select(0, token_R).to(wide)
    dy_RD = dout_RD * weights_TK.reshape(-1).index_select(0, order_R).to(wide).unsqueeze(1)
    dy_RD = dy_RD.masked_fill(~kept_R.unsqueeze(1), 0).to(y_RD.dtype)
    dw_R = (dout_RD * y_RD.to(wide)).sum(1).masked_fill(~kept_R, 0).to(weights_TK.dtype)
    dweights_TK = torch.empty_like(dw_R).index_copy_(0, order_R.long(), dw_R)
    return dy_RD, dweights_TK.view(weights_TK.shape)


combine_backward = custom_op("moe_ep::combine_backward", combine_backward_reference, mutates_args=())


@combine_backward.register_fake
def _(dout_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, order_R: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor]:
    return y_RD.new_empty(y_RD.shape), weights_TK.new_empty(weights_TK.shape)


def _combine_save(ctx, inputs, output) -> None:
    y_RD, weights_TK, order_R, offsets_E, ctx.top_k = inputs
    ctx.weighted = weights_TK is not None
    ctx.save_for_backward(order_R, offsets_E, *([y_RD, weights_TK] if ctx.weighted else []))


def _combine_backward(ctx, dout_TD: Tensor):
    order_R, offsets_E, *saved = ctx.saved_tensors
    if ctx.weighted:
        dy_RD, dweights_TK = combine_backward(dout_TD, *saved, order_R, offsets_E)
        return dy_RD, dweights_TK, None, None, None
    token_R = order_R.div(ctx.top_k, rounding_mode="floor")
    _, kept_R = _positions(order_R, offsets_E)
    kept_R = kept_R.index_select(0, order_R).unsqueeze(1)
    return torch.where(kept_R, dout_TD.index_select(0, token_R), 0), None, None, None, None


register_autograd("moe_ep::dispatch", _dispatch_backward, setup_context=_dispatch_save)
register_autograd("moe_ep::grouped_gemm", _gemm_backward, setup_context=_gemm_save)
register_autograd("moe_ep::combine", _combine_backward, setup_context=_combine_save)
