"""The activations of `moe_ep.expert_mlp` and their slopes, for the epilogues of Triton kernels.

Types      f32 in and out.  `HOW` is one of moe_compile.expert_mlp.ACTIVATIONS.
Numerics   As torch's, also on NaN and far from zero.
"""

import triton
import triton.language as tl


@triton.jit
def activated(g, HOW: tl.constexpr):
    """act(g)."""
    if HOW == "silu":
        return g / (1.0 + tl.exp(-g))
    elif HOW == "gelu":
        return g * (0.5 + 0.5 * tl.erf(g * 0.7071067811865476))
    elif HOW == "gelu_tanh":
        return 0.5 * g * (1.0 + _tanh(0.7978845608028654 * g * (1.0 + 0.044715 * g * g)))
    else:
        tl.static_assert((HOW == "relu") | (HOW == "relu_squared"))
        r = tl.where(g < 0.0, 0.0, g)  # NaN stays
        return r * r if HOW == "relu_squared" else r


@triton.jit
def slope(g, HOW: tl.constexpr):
    """The derivative of act at g."""
    if HOW == "silu":
        s = 1.0 / (1.0 + tl.exp(-g))
        return s * (1.0 + g * (1.0 - s))
    elif HOW == "gelu":
        return 0.5 + 0.5 * tl.erf(g * 0.7071067811865476) + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif HOW == "gelu_tanh":
        t = _tanh(0.7978845608028654 * g * (1.0 + 0.044715 * g * g))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * g * g)
        return 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * inner
    else:
        tl.static_assert((HOW == "relu") | (HOW == "relu_squared"))
        positive = tl.where(g <= 0.0, 0.0, 1.0)
        return 2.0 * tl.where(g < 0.0, 0.0, g) if HOW == "relu_squared" else positive


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
