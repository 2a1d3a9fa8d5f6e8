"""The activations of `moe_ep.expert_mlp` and their slopes, for the epilogues of Triton kernels.

Types      f32 in and out.  `HOW`, `ALPHA`, `LIMIT` and `SHIFT` are those of moe_compile/activations.py.
Numerics   As torch's, also on NaN and far from zero.
"""

import triton
import triton.language as tl

from moe_compile.activations import Activation

# -- kernels --------------------------------------------------------------------------------


@triton.jit
def activated(g, HOW: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """act(least(g, LIMIT))."""
    if LIMIT > 0:
        g = tl.where(g > LIMIT, LIMIT, g)  # NaN stays
    if HOW == "silu":
        return g / (1.0 + tl.exp(-ALPHA * g))
    elif HOW == "gelu":
        return g * (0.5 + 0.5 * tl.erf(g * 0.7071067811865476))
    elif HOW == "gelu_tanh":
        return 0.5 * g * (1.0 + _tanh(0.7978845608028654 * g * (1.0 + 0.044715 * g * g)))
    else:
        tl.static_assert((HOW == "relu") | (HOW == "relu_squared"))
        r = tl.where(g < 0.0, 0.0, g)  # NaN stays
        return r * r if HOW == "relu_squared" else r


@triton.jit
def slope(g, HOW: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """The derivative of that by g."""
    if LIMIT > 0:
        inside = g <= LIMIT
        return tl.where(inside, _slope(tl.where(inside, g, LIMIT), HOW, ALPHA), 0.0)
    else:
        return _slope(g, HOW, ALPHA)


@triton.jit
def _slope(g, HOW: tl.constexpr, ALPHA: tl.constexpr):
    if HOW == "silu":
        s = 1.0 / (1.0 + tl.exp(-ALPHA * g))
        return s * (1.0 + ALPHA * g * (1.0 - s))
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
def factor(u, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """What the activated gate is multiplied by."""
    if LIMIT > 0:
        u = tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))
    if SHIFT != 0:
        u += SHIFT
    return u


@triton.jit
def followed(du, u, LIMIT: tl.constexpr):
    """The gradient of u, if `du` is that of `factor(u)`."""
    if LIMIT > 0:
        du = tl.where((u >= -LIMIT) & (u <= LIMIT), du, 0.0)
    return du


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


# -- launching ------------------------------------------------------------------------------


def constants(how: Activation) -> tuple[str, float, float, float]:
    """ACTIVATION, ALPHA, LIMIT and SHIFT, as kernels take them."""
    return how.name, how.alpha, how.limit, how.shift
