"""`expert_mlp`: dispatch, two products with an activation between them, and combine, as one differentiable op.

    out_TD[t] = sum over k of weights_TK[t, k] * (down[e] @ a + bias_ED[e]),   e = ids_TK[t, k]
    a         = act(g) * u     with g = gate[e] @ x_TD[t] and u = up[e] @ x_TD[t], or act(u) without a gate,
                or what else the activation says (activations.py)

Both with their part of bias_EG[e] added first.  Either bias may be left out.

The general ops (ops.py) say the same in a dozen nodes.  One op is a dozen times less work for the compiler, and keeps
less for the backward: the input, both products before the activation, and the routing; none of the gathered rows.
That needs the gradient of the routing weights from a dot product in F, not in D:

    dot(dout[t], down[e] @ a + bias[e]) = dot(down[e].T @ dout[t], a) + dot(dout[t], bias[e])

Types      One for tokens and experts.  The routing weights may be wider, and then the result is, as that of `combine`.
Numerics   The definition rounds to that type each product, its sum with the bias, each op of the activation, and the
           sum over k.  A kernel may leave roundings out; what it keeps for the backward is rounded, biases added.
           Gradients of biases are sums over an expert's rows in f32 or wider.
Letters    as in ops.py; G = 2F numbers before a gated activation, the gate's first, or in pairs, or F.
Weights    each of `gate`, `up`, `down` is one stack or E matrices, as for `grouped_gemm`.  With a gate, an empty `gate`
           means that `up` holds both: [G, D], the gate's rows first, or in pairs.  Biases are stacks, as long as a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

from moe_compile import activations
from moe_compile.activations import between, between_backward, described
from moe_compile.ops import (
    combine_backward_reference,
    combine_reference,
    dispatch,
    grouped_gemm_dw_reference,
    grouped_gemm_reference,
    groups,
)


def has_kernel(dtype: torch.dtype, of_weights: torch.dtype | None) -> bool:
    """Whether a CPU has a kernel for these types of tokens and experts, and of routing weights.

    None in f16: there the gradient behind the last product must be scaled by the routing weight before that product,
    as the definition does, lest it overflow; the kernel scales it after.
    """
    return dtype in (torch.float32, torch.bfloat16) and of_weights in (None, dtype, torch.float32)


def reference(
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
    """(out_TD, h_RG, offsets_E, order_R), as defined above; h_RG is what the activation takes, biases added.

    No weights mean ones.  A pair whose id is outside [0, num_experts) adds nothing.
    """
    check(gate, up, down, activation, gated, bias_EG, bias_ED)
    x_RD, offsets_E, order_R = dispatch(x_TD, ids_TK, num_experts)
    h_RG = torch.cat([grouped_gemm_reference(x_RD, w, offsets_E) for w in (gate, up) if w], 1)
    a_RF = between(add_bias(h_RG, bias_EG, offsets_E), activation, gated)
    y_RD = add_bias(grouped_gemm_reference(a_RF, down, offsets_E), bias_ED, offsets_E)
    return combine_reference(y_RD, weights_TK, order_R, offsets_E, ids_TK.shape[1]), h_RG, offsets_E, order_R


def check(
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    activation: str,
    gated: bool,
    bias_EG: Tensor | None,
    bias_ED: Tensor | None,
) -> None:
    """Raise if the activation is none, if what it takes is not as wide as the last weight is deep, or on biases that do
    not fit."""
    if reason := activations.why_not(activation, gated):
        raise ValueError(reason)
    widths = [w[0].shape[-2] for w in (gate, up) if w]
    wanted = down[0].shape[-1] * (2 if gated and not gate else 1)
    if (gate and (not gated or described(activation).pairs)) or any(w != wanted for w in widths):
        raise ValueError(f"products of widths {widths} before an activation, the last weight takes {down[0].shape[-1]}")
    for bias, width in ((bias_EG, sum(widths)), (bias_ED, down[0].shape[-2])):
        if bias is not None and (bias.dim() != 2 or bias.shape[1] != width):
            raise ValueError(f"a bias of shape {tuple(bias.shape)} for products of width {width}")


def add_bias(y_R: Tensor, bias_E: Tensor | None, offsets_E: Tensor) -> Tensor:
    """y, to whose rows their expert's bias was added."""
    if bias_E is not None:
        for e, rows in groups(offsets_E):
            y_R[rows] += bias_E[e]
    return y_R


def bias_gradient(dy_R: Tensor, offsets_E: Tensor) -> Tensor:
    """The sum over each expert's rows, in f32 or wider; zeros for an empty expert."""
    db_E = dy_R.new_zeros(offsets_E.shape[0], dy_R.shape[1])
    wide = torch.promote_types(dy_R.dtype, torch.float32)
    for e, rows in groups(offsets_E):
        db_E[e] = dy_R[rows].sum(0, dtype=wide)
    return db_E


def transposed(weights: Sequence[Tensor]) -> list[Tensor]:
    """The transpose of each matrix."""
    return [w.transpose(-1, -2) for w in weights]


def backward_reference(
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
    """(dx_TD, dweights_TK, dgate, dup, ddown, dbias_EG, dbias_ED), all of weights stacked; what is not asked for, or
    not there, is empty."""
    K = order_R.shape[0] // x_TD.shape[0] if x_TD.shape[0] else 1
    ones_TK = dout_TD.new_ones(x_TD.shape[0], K) if weights_TK is None else weights_TK
    a_RF = between(h_RG, activation, gated)
    y_RD = add_bias(grouped_gemm_reference(a_RF, down, offsets_E), bias_ED, offsets_E)
    dy_RD, dweights_TK = combine_backward_reference(dout_TD, y_RD, ones_TK, order_R, offsets_E)
    da_RF = grouped_gemm_reference(dy_RD, transposed(down), offsets_E)
    dh_RG = between_backward(da_RF, h_RG, activation, gated)
    groups = [w for w in (gate, up) if w]
    parts = list(zip(groups, dh_RG.chunk(len(groups), 1), strict=True))
    dx_TD, dgate, dup, ddown, dbias_EG, dbias_ED = (x_TD.new_empty(0) for _ in range(6))
    if of_x:
        dx_RD = torch.stack([grouped_gemm_reference(dh, transposed(w), offsets_E) for w, dh in parts]).sum(0)
        dx_TD = combine_reference(dx_RD, None, order_R, offsets_E, K)
    if of_params:
        x_RD = x_TD.index_select(0, order_R.div(K, rounding_mode="floor"))
        *first, dup = (grouped_gemm_dw_reference(dh, x_RD, offsets_E) for _, dh in parts)
        dgate = first[0] if first else dgate
        ddown = grouped_gemm_dw_reference(dy_RD, a_RF, offsets_E)
        dbias_EG = dbias_EG if bias_EG is None else bias_gradient(dh_RG, offsets_E)
        dbias_ED = dbias_ED if bias_ED is None else bias_gradient(dy_RD, offsets_E)
    dweights_TK = dweights_TK if weights_TK is not None else dout_TD.new_empty(0)
    return dx_TD, dweights_TK, dgate, dup, ddown, dbias_EG, dbias_ED


expert_mlp = custom_op("moe_ep::expert_mlp", reference, mutates_args=())
expert_mlp_backward = custom_op("moe_ep::expert_mlp_backward", backward_reference, mutates_args=())


@expert_mlp.register_fake
def _(x_TD, ids_TK, weights_TK, gate, up, down, num_experts, activation, gated, bias_EG=None, bias_ED=None):  # type: ignore[no-untyped-def]
    check(gate, up, down, activation, gated, bias_EG, bias_ED)
    R = ids_TK.shape[0] * ids_TK.shape[1]
    T = ids_TK.shape[0] if weights_TK is None else weights_TK.shape[0]
    G = up[0].shape[-2] * (2 if gate else 1)
    dtype = x_TD.dtype if weights_TK is None else torch.promote_types(x_TD.dtype, weights_TK.dtype)
    out_TD = x_TD.new_empty(T, down[0].shape[-2], dtype=dtype)
    routing = (ids_TK.new_empty(n, dtype=torch.int32) for n in (num_experts, R))
    return out_TD, x_TD.new_empty(R, G), *routing


@expert_mlp_backward.register_fake
def _(dout_TD, x_TD, h_RG, weights_TK, offsets_E, order_R, gate, up, down, activation, gated, of_x, of_params,
      bias_EG=None, bias_ED=None):  # type: ignore[no-untyped-def]  # fmt: skip
    def of(shape: Sequence[int], wanted: bool) -> Tensor:
        return x_TD.new_empty(shape) if wanted else x_TD.new_empty(0)

    E = offsets_E.shape[0]
    stacks = [of((E, *w[0].shape[-2:]) if w else (), of_params and len(w) > 0) for w in (gate, up, down)]
    biases = [of(() if b is None else b.shape, of_params and b is not None) for b in (bias_EG, bias_ED)]
    dweights_TK = dout_TD.new_empty(0) if weights_TK is None else weights_TK.new_empty(weights_TK.shape)
    return of(x_TD.shape, of_x), dweights_TK, *stacks, *biases


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x_TD, _, weights_TK, gate, up, down, _, ctx.activation, ctx.gated, bias_EG, bias_ED = inputs
    _, h_RG, offsets_E, order_R = output
    ctx.mark_non_differentiable(h_RG, offsets_E, order_R)
    ctx.set_materialize_grads(False)
    maybe = weights_TK, bias_EG, bias_ED
    ctx.counts = [v is not None for v in maybe], (len(gate), len(up), len(down))
    kept = [v for v in maybe if v is not None]
    ctx.save_for_backward(x_TD, h_RG, offsets_E, order_R, *kept, *gate, *up, *down)


def _backward(ctx, dout_TD, _h, _offsets, _order):  # type: ignore[no-untyped-def]
    x_TD, h_RG, offsets_E, order_R, *rest = ctx.saved_tensors
    there, counts = ctx.counts
    weights_TK, bias_EG, bias_ED = (rest.pop(0) if is_there else None for is_there in there)
    groups = [[rest.pop(0) for _ in range(count)] for count in counts]
    if dout_TD is None:
        return (None,) * len(ctx.needs_input_grad)
    asked = [*ctx.needs_input_grad, False, False][:11]  # of what was given: arguments may be left out
    of_params = any(any(a) for a in asked[3:6]) or any(asked[9:])
    dx_TD, dweights_TK, *stacks, dbias_EG, dbias_ED = expert_mlp_backward(
        dout_TD.contiguous(), x_TD, h_RG, weights_TK, offsets_E, order_R, *groups,
        ctx.activation, ctx.gated, asked[0], of_params, bias_EG, bias_ED,
    )  # fmt: skip
    dparams = [_like(w, dw, of_params) for w, dw in zip(groups, stacks, strict=True)]
    of_routing = None, dweights_TK if there[0] else None
    biases = (db if asked[i] else None for i, db in ((9, dbias_EG), (10, dbias_ED)))
    grads = dx_TD if asked[0] else None, *of_routing, *dparams, None, None, None, *biases
    return grads[: len(ctx.needs_input_grad)]


def _like(weights: list[Tensor], stack: Tensor, wanted: bool) -> list[Tensor | None]:
    """The gradient of each tensor of `weights`, from that of all experts."""
    if not wanted:
        return [None] * len(weights)
    return [stack] if weights and weights[0].dim() == 3 else list(stack.unbind(0)) if weights else []


register_autograd("moe_ep::expert_mlp", _backward, setup_context=_save)
