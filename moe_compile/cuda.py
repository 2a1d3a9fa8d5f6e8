"""The ops on CUDA where nobody compiles: our Triton kernels, or the definitions where a kernel's `why_not` objects.

Under Inductor `choose_kernels` decides instead, with a cost table; a node that it leaves comes here.  Separate weights
are read where they are, by a table of their addresses (kernels/weights.py), if they are alike in strides; else they are
stacked for the call.

`expert_mlp` is four kernels: sort, gather with the first product and the activation, last product, combine.  No row of
tokens is copied, and nothing between the products is written but what the backward or the last product reads.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch.library import custom_op

from moe_compile import expert_mlp, ops
from moe_compile import grouped_gemm_scaled as scaled


def dispatch(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return _run("dispatch", ops.dispatch_reference, x_TD, ids_TK, num_experts)  # type: ignore[no-any-return]


def grouped_gemm(x_RD: Tensor, weights: Sequence[Tensor], offsets_E: Tensor) -> Tensor:
    try:
        from moe_compile.kernels import grouped_gemm as kernel
    except ImportError:  # no Triton
        return ops.grouped_gemm_reference(x_RD, weights, offsets_E)
    if len({(w.dtype, w.shape) for w in weights}) > 1 or kernel.why_not(x_RD, _one_shape(weights), offsets_E):
        return ops.grouped_gemm_reference(x_RD, weights, offsets_E)
    with set_wrap_triton_enabled(False):
        return kernel.launch(x_RD, _weights(weights)[0], offsets_E)


def grouped_gemm_scaled(x_RD: Tensor, weights: Sequence[Tensor], scales: Tensor | None, offsets_E: Tensor) -> Tensor:
    w_EFD = weights[0] if weights[0].dim() == 3 else torch.stack(list(weights))  # a copy, of one byte a number
    return _run("grouped_gemm_scaled", _scaled_reference, x_RD, w_EFD, scales, offsets_E)  # type: ignore[no-any-return]


def _scaled_reference(x_RD: Tensor, w_EFD: Tensor, scales: Tensor | None, offsets_E: Tensor) -> Tensor:
    return scaled.reference(x_RD, [w_EFD], scales, offsets_E)


def why_not_scaled(x_RD: Tensor, w_EFD: Tensor, scales: Tensor | None, offsets_E: Tensor) -> str | None:
    """Return why the kernel cannot take this product with float8 weights, or None.  The tensors may be fakes."""
    try:
        from moe_compile.kernels import grouped_gemm_scaled as kernel
    except ImportError:
        return "triton is not installed"
    return kernel.why_not(x_RD, w_EFD, scales, offsets_E)


def grouped_gemm_dw(dy_RF: Tensor, x_RD: Tensor, offsets_E: Tensor) -> Tensor:
    return _run("grouped_gemm_dw", ops.grouped_gemm_dw_reference, dy_RF, x_RD, offsets_E)  # type: ignore[no-any-return]


def combine(y_RD: Tensor, weights_TK: Tensor | None, order_R: Tensor, offsets_E: Tensor, top_k: int) -> Tensor:
    args = (y_RD, weights_TK, order_R, offsets_E, top_k)
    return _run("combine", ops.combine_reference, *args)  # type: ignore[no-any-return]


def combine_backward(
    dout_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, order_R: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    args = (dout_TD, y_RD, weights_TK, order_R, offsets_E)
    return _run("combine_backward", ops.combine_backward_reference, *args)  # type: ignore[no-any-return]


def _run(op: str, reference: Callable[..., Any], *args: Any) -> Any:
    try:
        kernel = import_module(f"moe_compile.kernels.{op}")
    except ImportError:  # no Triton
        return reference(*args)
    return reference(*args) if kernel.why_not(*args) else getattr(kernel, op)(*args)


# -- an expert's two products ---------------------------------------------------------------


def why_not_mlp(
    x_TD: Tensor,
    weights_TK: Tensor | None,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    num_experts: int,
    top_k: int,
    activation: str,
    gated: bool,
    *biases: Tensor | None,
) -> str | None:
    """Return why the kernels cannot serve an `expert_mlp`, or None.  The tensors may be fakes.

    f16 takes routing weights of f16 alone: with wider ones the result's gradient is wider, and may not fit into f16
    before it is scaled by them.
    """
    try:
        from moe_compile.kernels import combine, gated_gemm
    except ImportError:
        return "triton is not installed"
    of_weights = None if weights_TK is None else weights_TK.dtype
    if of_weights not in (None, x_TD.dtype, None if x_TD.dtype == torch.float16 else torch.float32):
        return f"rows are {x_TD.dtype}, routing weights {of_weights}"
    for w in (gate, up, down):
        if any(v.dtype != x_TD.dtype or v.shape != w[0].shape for v in w):
            return f"rows are {x_TD.dtype}, weights {', '.join(f'{v.dtype} {tuple(v.shape)}' for v in w)}"
        if w and (w[0].shape[0] if w[0].dim() == 3 else len(w)) != num_experts:
            return f"weights of {w[0].shape[0] if w[0].dim() == 3 else len(w)} experts, expected {num_experts}"
    if any(b is not None and b.dtype != x_TD.dtype for b in biases):
        return f"rows are {x_TD.dtype}, a bias is of another type"
    if top_k > combine.MAX_TOP_K:
        return f"{top_k} experts a token, expected {combine.MAX_TOP_K} at most"
    if 0 in down[0].shape:
        return f"down is {tuple(down[0].shape)}"
    first, second = _one_shape(gate) if gate else None, _one_shape(up)
    return gated_gemm.why_not_weights(x_TD, first, second, top_k, activation, gated)


def why_not_routing(ids_TK: Tensor, num_experts: int) -> str | None:
    """Return why the kernels cannot sort these ids, or None."""
    try:
        from moe_compile.kernels import dispatch
    except ImportError:
        return "triton is not installed"
    return dispatch.why_not_sort(ids_TK, num_experts)


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
    *,
    keep_h: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `expert_mlp`; h is empty unless somebody keeps it."""
    expert_mlp.check(gate, up, down, activation, gated, bias_EG, bias_ED)
    how = (activation, gated, bias_EG, bias_ED)
    if why_not_routing(ids_TK, num_experts) or why_not_mlp(
        x_TD, weights_TK, gate, up, down, num_experts, ids_TK.shape[1], *how
    ):
        return expert_mlp.reference(x_TD, ids_TK, weights_TK, gate, up, down, num_experts, *how)
    from moe_compile.kernels import combine, counting_sort, gated_gemm, grouped_gemm
    from moe_compile.kernels.tiles import made_of

    K = ids_TK.shape[1]
    with set_wrap_triton_enabled(False):
        weights = _weights(gate, up)
        first = weights[0] if gate else None, weights[-1]
        rows = gated_gemm.tile_rows(x_TD, *first, ids_TK.numel(), gated)
        order_R, offsets_E, position_R, tiles = counting_sort.launch(ids_TK, num_experts, rows)
        made = made_of(tiles, rows)
        a_RF, h_RG = gated_gemm.launch(x_TD, *first, offsets_E, order_R, K, activation, gated, keep_h, bias_EG, made)
        y_RD = grouped_gemm.launch(a_RF, _weights(down)[0], offsets_E, bias_ED, made)
        out_TD = combine.launch(y_RD, weights_TK, position_R, offsets_E, K)
    return out_TD, h_RG, offsets_E, order_R


def mlp_result(
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
) -> Tensor:
    """The first output of `expert_mlp`, for whom nobody keeps the others: an inference."""
    how = (activation, gated, bias_EG, bias_ED)
    return mlp(x_TD, ids_TK, weights_TK, gate, up, down, num_experts, *how, keep_h=False)[0]


result_of_mlp = custom_op("moe_ep_triton::expert_mlp_result", mlp_result, mutates_args=())


@result_of_mlp.register_fake
def _(*args: Any) -> Tensor:
    return expert_mlp.expert_mlp(*args)[0]  # type: ignore[no-any-return]


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
    E, K = offsets_E.shape[0], max(order_R.shape[0] // max(x_TD.shape[0], 1), 1)
    K = K if weights_TK is None else weights_TK.shape[1]  # also where there are no tokens
    biases = (bias_EG, bias_ED)
    if why_not_mlp(x_TD, weights_TK, gate, up, down, E, K, activation, gated, *biases):
        args = (dout_TD, x_TD, h_RG, weights_TK, offsets_E, order_R, gate, up, down, activation, gated)
        return expert_mlp.backward_reference(*args, of_x, of_params, *biases)
    from moe_compile.kernels import combine, gated_gemm_backward, grouped_gemm, grouped_gemm_dw
    from moe_compile.kernels.bias_gradient import bias_gradient

    # a loses bits of f16 where a weight is small; there the gradient is scaled instead, as the definition does it
    scale_a = x_TD.dtype != torch.float16
    dout_TD, routing, first = dout_TD.to(x_TD.dtype), (offsets_E, order_R), [w for w in (gate, up) if w]
    dx_TD, dgate, dup, ddown, dbias_EG, dbias_ED = (x_TD.new_empty(0) for _ in range(6))
    with set_wrap_triton_enabled(False):
        made: Any = {}
        asked: Any = (K, activation, gated, len(gate) > 0, of_params, scale_a, made)
        dh, a_RF, dots_R = gated_gemm_backward.launch(dout_TD, _weights(down)[0], h_RG, weights_TK, *routing, *asked)
        if of_x:
            parts = [(d, _weights(expert_mlp.transposed(w))[0]) for d, w in zip(dh, first, strict=True)]
            dx_RD, *other = (grouped_gemm.launch(d, w, offsets_E, None, made) for d, w in parts)
            dx_TD = combine.combine(dx_RD.add_(other[0]) if other else dx_RD, None, order_R, offsets_E, K)
    if of_params:
        *before, dup = (grouped_gemm_dw.grouped_gemm_dw(d, x_TD, *routing, 0, K) for d in dh)
        dgate = before[0] if before else dgate
        if weights_TK is None or scale_a:
            ddown = grouped_gemm_dw.grouped_gemm_dw(dout_TD, a_RF, *routing, K, 0)
        else:
            token_R = order_R.div(K, rounding_mode="floor")
            dy_RD = dout_TD.index_select(0, token_R) * weights_TK.reshape(-1).index_select(0, order_R).unsqueeze(1)
            ddown = grouped_gemm_dw.grouped_gemm_dw(dy_RD, a_RF, offsets_E)
        if bias_EG is not None:
            dbias_EG = torch.cat([bias_gradient(d, None, None, *routing)[0] for d in dh], 1)
    dweights_TK = dout_TD.new_empty(0)
    if bias_ED is not None:
        with_dots = None if weights_TK is None else bias_ED
        found, bias_dots_R = bias_gradient(dout_TD, weights_TK, with_dots, *routing, K)
        dbias_ED = found if of_params else dbias_ED
        dots_R = dots_R + bias_dots_R
    if weights_TK is not None:
        dweights_TK = dots_R.view(weights_TK.shape).to(weights_TK.dtype)
    return dx_TD, dweights_TK, dgate, dup, ddown, dbias_EG, dbias_ED


def _one_shape(weights: Sequence[Tensor]) -> Tensor:
    """The stack, or one matrix as if it were that of all experts, for a kernel's `why_not`."""
    return weights[0] if weights[0].dim() == 3 else weights[0].expand(len(weights), -1, -1)


def takes_addresses(x_RD: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether a product of these rows reads these weights by their addresses.  The tensors may be fakes."""
    try:
        from moe_compile.kernels.dispatch import FLOATS, MAX_EXPERTS
        from moe_compile.kernels.weights import why_not_separate
    except ImportError:  # no Triton
        return False
    return (
        1 < len(weights) <= MAX_EXPERTS
        and x_RD.dtype in FLOATS
        and {x_RD.dtype} == {w.dtype for w in weights}
        and why_not_separate(weights) is None
    )


def _weights(*groups: Sequence[Tensor]) -> list[Any]:
    """What a kernel takes for each group that is not empty, all in one layout: stacks, or tables of addresses."""
    from moe_compile.kernels.weights import separate, stacked, why_not_separate

    groups = tuple(w for w in groups if w)
    if all(w[0].dim() == 3 for w in groups):
        return [stacked(w[0]) for w in groups]
    each = [ops.per_expert(w) for w in groups]
    if why_not_separate([m for matrices in each for m in matrices]):
        return [stacked(torch.stack(list(matrices))) for matrices in each]
    return [separate(matrices) for matrices in each]


def register() -> None:
    """Make these the CUDA kernels of the ops."""
    for name in ("dispatch", "grouped_gemm", "grouped_gemm_dw", "combine", "combine_backward"):
        getattr(ops, name).register_kernel("cuda")(globals()[name])
    scaled.grouped_gemm_scaled.register_kernel("cuda")(grouped_gemm_scaled)
    expert_mlp.expert_mlp.register_kernel("cuda")(mlp)
    expert_mlp.expert_mlp_backward.register_kernel("cuda")(mlp_backward)
