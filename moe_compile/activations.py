"""What stands between the two products of `moe_ep.expert_mlp`: its description, its meaning and its gradient.

    a[f] = act(least(g[f], limit)) * (clamp(u[f], -limit, limit) + shift)    with a gate
    a[f] = act(least(h[f], limit))                                           without

A description is a text, since ops take texts: a name, and what differs from the plain form of it,

    "silu"      "gelu_tanh"      "silu alpha=1.702 limit=7.0 shift=1.0 pairs"

alpha      of silu alone: x * sigmoid(alpha * x).
limit      above zero; none where it is left out.
pairs      g and u take turns in h; else g are the first half of it.
Gradient   as `clamp` has it: none beyond the limit, and none from a NaN, all of it at the limit.
"""

import functools
from dataclasses import dataclass, fields

import torch
from torch import Tensor

aten = torch.ops.aten

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")


@dataclass(frozen=True)
class Activation:
    """A description, read.  limit: 0 means none."""

    name: str
    alpha: float = 1.0
    limit: float = 0.0
    shift: float = 0.0
    pairs: bool = False

    def __str__(self) -> str:
        numbers = [(f.name, getattr(self, f.name)) for f in fields(self)[1:4] if getattr(self, f.name) != f.default]
        return " ".join([self.name, *(f"{name}={number!r}" for name, number in numbers), *["pairs"] * self.pairs])

    def why_not(self, gated: bool) -> str | None:
        """Return why this is no activation, or None."""
        if self.name not in ACTIVATIONS:
            return f"activation {self.name}, expected one of {', '.join(ACTIVATIONS)}"
        numbers = (self.alpha, self.limit, self.shift)  # kernels have them in f32
        fit = all(n == 0 or 1e-30 < abs(n) < 1e30 for n in numbers)
        if not fit or self.limit < 0 or (self.alpha != 1 and self.name != "silu"):
            return f"activation {self}"
        return f"activation {self} without a gate" if not gated and (self.shift or self.pairs) else None


@functools.cache
def described(text: str) -> Activation:
    """The activation of this description.  Raises ValueError on a text that is none; see also `why_not`."""
    name, *parts = text.split()
    numbers: dict[str, float] = {}
    for part in parts:
        key, _, number = part.partition("=")
        if part != "pairs" and (key not in ("alpha", "limit", "shift") or key in numbers):
            raise ValueError(f"activation {text!r}: {part!r} is no alpha, limit or shift")
        if part != "pairs":
            numbers[key] = float(number)
    return Activation(name, pairs="pairs" in parts, **numbers)


def why_not(text: str, gated: bool) -> str | None:
    """Return why this is no description of an activation, or None."""
    try:
        return described(text).why_not(gated)
    except ValueError as error:
        return str(error)


def activate(text: str, x: Tensor) -> Tensor:
    """act(least(x, limit))."""
    how = described(text)
    x = x.clamp(max=how.limit) if how.limit else x
    if how.name == "gelu_tanh":
        return torch.nn.functional.gelu(x, approximate="tanh")
    if how.name == "relu_squared":
        return torch.relu(x).square()
    return x * torch.sigmoid(how.alpha * x) if how.alpha != 1 else getattr(torch.nn.functional, how.name)(x)


def activate_backward(text: str, dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, if `dy` is that of activate(text, x)."""
    how = described(text)
    if how.limit:
        inside, plain = x <= how.limit, Activation(how.name, how.alpha)
        return torch.where(inside, activate_backward(str(plain), dy, x.clamp(max=how.limit)), 0)
    if how.name == "relu_squared":
        return dy * 2 * torch.relu(x)
    if how.name == "relu":
        return aten.threshold_backward(dy, x, 0)
    if how.name == "silu" and how.alpha != 1:
        s = torch.sigmoid(how.alpha * x)
        return dy * s * (1 + how.alpha * x * (1 - s))
    if how.name == "silu":
        return aten.silu_backward(dy, x)
    return aten.gelu_backward(dy, x, approximate="tanh" if how.name == "gelu_tanh" else "none")


def halves(text: str, h_RG: Tensor) -> tuple[Tensor, Tensor]:
    """(gate_RF, up_RF), as they lie in h."""
    if described(text).pairs:
        return h_RG[:, ::2], h_RG[:, 1::2]
    gate_RF, up_RF = h_RG.chunk(2, 1)
    return gate_RF, up_RF


def between(h_RG: Tensor, text: str, gated: bool) -> Tensor:
    """a_RF, as defined above."""
    if not gated:
        return activate(text, h_RG)
    gate_RF, up_RF = halves(text, h_RG)
    return activate(text, gate_RF) * _factor(text, up_RF)


def between_backward(da_RF: Tensor, h_RG: Tensor, text: str, gated: bool) -> Tensor:
    """The gradient of h_RG, if `da_RF` is that of between(h_RG, text, gated)."""
    if not gated:
        return activate_backward(text, da_RF, h_RG)
    how, (gate_RF, up_RF) = described(text), halves(text, h_RG)
    dgate_RF = activate_backward(text, da_RF * _factor(text, up_RF), gate_RF)
    dup_RF = da_RF * activate(text, gate_RF)
    if how.limit:
        dup_RF = torch.where((up_RF >= -how.limit) & (up_RF <= how.limit), dup_RF, 0)
    return torch.stack([dgate_RF, dup_RF], 2).flatten(1) if how.pairs else torch.cat([dgate_RF, dup_RF], 1)


def _factor(text: str, up_RF: Tensor) -> Tensor:
    """What the activated gate is multiplied by."""
    how = described(text)
    up_RF = up_RF.clamp(-how.limit, how.limit) if how.limit else up_RF
    return up_RF + how.shift if how.shift else up_RF
