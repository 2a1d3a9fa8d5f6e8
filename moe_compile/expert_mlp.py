"""`expert_mlp`: dispatch, two products with an activation between them, and combine, as one differentiable op.

    out_TD[t] = sum over k of weights_TK[t, k] * down[e] @ a,   e = ids_TK[t, k]
    a         = act(gate[e] @ x_TD[t]) * (up[e] @ x_TD[t])      or act(up[e] @ x_TD[t]) without a gate

The general ops (ops.py) say the same in a dozen nodes.  One op is a dozen times less work for the compiler, and keeps
less for the backward: the input, both products before the activation, and the routing; none of the gathered rows.
That needs the gradient of the routing weights from a dot product in F, not in D:

    dot(dout[t], down[e] @ a) = dot(down[e].T @ dout[t], a)

Types      One for tokens and experts.  The routing weights may be wider, and then the result is, as that of `combine`.
Numerics   The definition rounds to that type each product, the activation, its product with `up`, and the sum over k.
           A kernel may leave roundings out between two products; what it keeps for the backward are rounded products.
Letters    as in ops.py; G = 2F numbers before a gated activation, the gate's first, or F.
Weights    each of `gate`, `up`, `down` is one stack or E matrices, as for `grouped_gemm`.  With a gate, an empty `gate`
           means that `up` holds both: [G, D], the gate's rows first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

from moe_compile.ops import (
    combine_backward_reference,
    combine_reference,
    dispatch,
    grouped_gemm_dw_reference,
    grouped_gemm_reference,
)

aten = torch.ops.aten

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")


def has_kernel(dtype: torch.dtype, of_weights: torch.dtype | None) -> bool:
    """Whether a CPU has a kernel for these types of tokens and experts, and of routing weights.

    None in f16: there the gradient behind the last product must be scaled by the routing weight before that product,
    as the definition does, lest it overflow; the kernel scales it after.
    """
    return dtype in (torch.float32, torch.bfloat16) and of_weights in (None, dtype, torch.float32)


def activate(name: str, x: Tensor) -> Tensor:
    """The activation of this name."""
    if name == "gelu_tanh":
        return torch.nn.functional.gelu(x, approximate="tanh")
    if name == "relu_squared":
        return torch.relu(x).square()
    return getattr(torch.nn.functional, name)(x)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out_TD, h_RG, offsets_E, order_R), as defined above; h_RG are the products before the activation.

    No weights mean ones.  A pair whose id is outside [0, num_experts) adds nothing.
    """
    check_widths(gate, up, down, gated)
    x_RD, offsets_E, order_R = dispatch(x_TD, ids_TK, num_experts)
    h_RG = torch.cat([grouped_gemm_reference(x_RD, w, offsets_E) for w in (gate, up) if w], 1)
    y_RD = grouped_gemm_reference(_between(h_RG, activation, gated), down, offsets_E)
    return combine_reference(y_RD, weights_TK, order_R, offsets_E, ids_TK.shape[1]), h_RG, offsets_E, order_R


def check_widths(gate: Sequence[Tensor], up: Sequence[Tensor], down: Sequence[Tensor], gated: bool) -> None:
    """Raise if the products before the activation are not as wide as the last weight is deep."""
    widths = [w[0].shape[-2] for w in (gate, up) if w]
    wanted = down[0].shape[-1] * (2 if gated and not gate else 1)
    if (gate and not gated) or any(w != wanted for w in widths):
        raise ValueError(f"products of widths {widths} before an activation, the last weight takes {down[0].shape[-1]}")


def activate_backward(name: str, dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, if `dy` is that of activate(name, x)."""
    if name == "relu_squared":
        return dy * 2 * torch.relu(x)
    if name == "relu":
        return aten.threshold_backward(dy, x, 0)
    if name == "silu":
        return aten.silu_backward(dy, x)
    return aten.gelu_backward(dy, x, approximate="tanh" if name == "gelu_tanh" else "none")


def _between(h_RG: Tensor, activation: str, gated: bool) -> Tensor:
    if not gated:
        return activate(activation, h_RG)
    gate_RF, up_RF = h_RG.chunk(2, 1)
    return activate(activation, gate_RF) * up_RF


def transposed(weights: Sequence[Tensor]) -> list[Tensor]:
    """The transpose of each matrix."""
    return [w.transpose(-1, -2) for w in weights]


def _between_backward(da_RF: Tensor, h_RG: Tensor, activation: str, gated: bool) -> Tensor:
    if not gated:
        return activate_backward(activation, da_RF, h_RG)
    gate_RF, up_RF = h_RG.chunk(2, 1)
    return torch.cat([activate_backward(activation, da_RF * up_RF, gate_RF), da_RF * activate(activation, gate_RF)], 1)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx_TD, dweights_TK, dgate, dup, ddown), the last three stacked; what is not asked for is empty."""
    K = order_R.shape[0] // x_TD.shape[0] if x_TD.shape[0] else 1
    ones_TK = dout_TD.new_ones(x_TD.shape[0], K) if weights_TK is None else weights_TK
    a_RF = _between(h_RG, activation, gated)
    y_RD = grouped_gemm_reference(a_RF, down, offsets_E)
    dy_RD, dweights_TK = combine_backward_reference(dout_TD, y_RD, ones_TK, order_R, offsets_E)
    da_RF = grouped_gemm_reference(dy_RD, transposed(down), offsets_E)
    dh_RG = _between_backward(da_RF, h_RG, activation, gated)
    groups = [w for w in (gate, up) if w]
    parts = list(zip(groups, dh_RG.chunk(len(groups), 1), strict=True))
    dx_TD, dgate, dup, ddown = (x_TD.new_empty(0) for _ in range(4))
    if of_x:
        dx_RD = torch.stack([grouped_gemm_reference(dh, transposed(w), offsets_E) for w, dh in parts]).sum(0)
        dx_TD = combine_reference(dx_RD, None, order_R, offsets_E, K)
    if of_params:
        x_RD = x_TD.index_select(0, order_R.div(K, rounding_mode="floor"))
        *first, dup = (grouped_gemm_dw_reference(dh, x_RD, offsets_E) for _, dh in parts)
        dgate = first[0] if first else dgate
        ddown = grouped_gemm_dw_reference(dy_RD, a_RF, offsets_E)
    return dx_TD, dweights_TK if weights_TK is not None else dout_TD.new_empty(0), dgate, dup, ddown


expert_mlp = custom_op("moe_ep::expert_mlp", reference, mutates_args=())
expert_mlp_backward = custom_op("moe_ep::expert_mlp_backward", backward_reference, mutates_args=())


@expert_mlp.register_fake
def _(x_TD, ids_TK, weights_TK, gate, up, down, num_experts, activation, gated):  # type: ignore[no-untyped-def]
    check_widths(gate, up, down, gated)
    R = ids_TK.shape[0] * ids_TK.shape[1]
    T = ids_TK.shape[0] if weights_TK is None else weights_TK.shape[0]
    G = up[0].shape[-2] * (2 if gate else 1)
    dtype = x_TD.dtype if weights_TK is None else torch.promote_types(x_TD.dtype, weights_TK.dtype)
    out_TD = x_TD.new_empty(T, down[0].shape[-2], dtype=dtype)
    routing = (ids_TK.new_empty(n, dtype=torch.int32) for n in (num_experts, R))
    return out_TD, x_TD.new_empty(R, G), *routing


@expert_mlp_backward.register_fake
def _(dout_TD, x_TD, h_RG, weights_TK, offsets_E, order_R, gate, up, down, activation, gated, of_x, of_params):  # type: ignore[no-untyped-def]
    def stack(w: Sequence[Tensor]) -> Tensor:
        wanted = of_params and len(w)
        return x_TD.new_empty(offsets_E.shape[0], *w[0].shape[-2:]) if wanted else x_TD.new_empty(0)

    dx_TD = x_TD.new_empty(x_TD.shape) if of_x else x_TD.new_empty(0)
    dweights_TK = dout_TD.new_empty(0) if weights_TK is None else weights_TK.new_empty(weights_TK.shape)
    return dx_TD, dweights_TK, stack(gate), stack(up), stack(down)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x_TD, _, weights_TK, gate, up, down, _, ctx.activation, ctx.gated = inputs
    _, h_RG, offsets_E, order_R = output
    ctx.mark_non_differentiable(h_RG, offsets_E, order_R)
    ctx.set_materialize_grads(False)
    ctx.counts = len(gate), len(up), len(down)
    ctx.weighted = weights_TK is not None
    ctx.save_for_backward(x_TD, h_RG, offsets_E, order_R, *([weights_TK] if ctx.weighted else []), *gate, *up, *down)


def _backward(ctx, dout_TD, _h, _offsets, _order):  # type: ignore[no-untyped-def]
    x_TD, h_RG, offsets_E, order_R, *rest = ctx.saved_tensors
    weights_TK = rest.pop(0) if ctx.weighted else None
    groups = [[rest.pop(0) for _ in range(count)] for count in ctx.counts]
    if dout_TD is None:
        return (None,) * 9
    asked = ctx.needs_input_grad
    of_params = any(any(a) for a in asked[3:6])
    dx_TD, dweights_TK, *stacks = expert_mlp_backward(
        dout_TD.contiguous(), x_TD, h_RG, weights_TK, offsets_E, order_R, *groups,
        ctx.activation, ctx.gated, asked[0], of_params,
    )  # fmt: skip
    dparams = [_like(w, dw, of_params) for w, dw in zip(groups, stacks, strict=True)]
    return dx_TD if asked[0] else None, None, dweights_TK if ctx.weighted else None, *dparams, None, None, None


def _like(weights: list[Tensor], stack: Tensor, wanted: bool) -> list[Tensor | None]:
    """The gradient of each tensor of `weights`, from that of all experts."""
    if not wanted:
        return [None] * len(weights)
    return [stack] if weights and weights[0].dim() == 3 else list(stack.unbind(0)) if weights else []


register_autograd("moe_ep::expert_mlp", _backward, setup_context=_save)
