"""The ops behind transformers' own switch: `from_pretrained(..., experts_implementation="moe_ep")`.

For those who do not compile: the experts classes of transformers 5 that can change their implementation run as
dispatch -> grouped GEMM -> combine, in eager mode, or as ops that any compiler and `torch.export` leave in the graph.
Under `backend="moe_ep"` the class's own loop is proven and rewritten, as with any other implementation.

What an expert computes is what transformers' decorator says of a class, as its `grouped_mm` takes it:

    a = self._apply_gate(x @ gate_up_proj[e].T + gate_up_proj_bias[e])   or act_fn(x @ up_proj[e].T + up_proj_bias[e])
    y = self.post_expert_norm(a @ down_proj[e].T + down_proj_bias[e])    biases and norm where a class has them
    out[t] = sum over k of weights[t, k] * y

Ids outside the experts add nothing: with expert parallelism transformers marks other ranks' pairs so.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from moe_compile import cuda, expert_mlp, ops

NAME = "moe_ep"
HOME = "transformers.integrations.moe"
ACTIVATIONS = {"SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "ReLUSquaredActivation": "relu_squared"}

# What transformers has of its own, known once it is loaded: the gate of classes without one, modules of activations.
_theirs: dict[str, Any] = {"gate": None, "activations": [(nn.SiLU, "silu"), (nn.ReLU, "relu")]}


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [T, D], top_k_index and top_k_weights [T, K] -> [T, D], in the dtype of hidden_states."""
    x_TD, ids_TK = _cast(hidden_states), top_k_index.reshape(hidden_states.shape[0], -1)
    weights_TK, E = top_k_weights.reshape(ids_TK.shape), self.num_experts
    if (activation := _fused(self, x_TD, weights_TK)) is not None:
        up, down = ([_weight(self, name)] for name in (_first(self), "down_proj"))
        args: Any = (ids_TK, weights_TK, [], up, down, E, activation, self.has_gate)
        out_TD = expert_mlp.expert_mlp(x_TD, *args)[0]
        return out_TD.to(hidden_states.dtype)  # type: ignore[no-any-return]
    x_RD, offsets_E, order_R = ops.dispatch(x_TD, ids_TK, E)
    expert_R = ids_TK.reshape(-1)[order_R].clamp(0, E - 1) if self.has_bias else None
    h = _linear(self, _first(self), x_RD, offsets_E, expert_R)
    h = _linear(self, "down_proj", _cast(self._apply_gate(h) if self.has_gate else self.act_fn(h)), offsets_E, expert_R)
    if getattr(self, "has_post_expert_norm", False):
        h = self.post_expert_norm(h)
    out_TD = ops.combine(h, weights_TK, order_R, offsets_E, ids_TK.shape[1])
    return out_TD.to(hidden_states.dtype)  # type: ignore[no-any-return]


def own_forward(cls: type) -> Any:
    """The forward that a class was written with, below transformers' decorator: what is proven under "moe_ep"."""
    return cls.forward.__wrapped__  # type: ignore[attr-defined]


def _first(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _weight(experts: Any, name: str) -> Tensor:
    """[E, out, in], in the dtype that products run in."""
    weight: Tensor = getattr(experts, name)
    return _cast(weight.transpose(-1, -2) if experts.is_transposed else weight)


def _linear(experts: Any, name: str, x_R: Tensor, offsets_E: Tensor, expert_R: Tensor | None) -> Tensor:
    y_R: Tensor = ops.grouped_gemm(x_R, [_weight(experts, name)], offsets_E)
    return y_R if expert_R is None else y_R + _cast(getattr(experts, f"{name}_bias"))[expert_R]


def _cast(x: Tensor) -> Tensor:
    """As `linear` casts under autocast."""
    device = x.device.type
    wanted = torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if wanted else x


# -- the fused form -------------------------------------------------------------------------


def _fused(experts: Any, x_TD: Tensor, weights_TK: Tensor) -> str | None:
    """The activation between the two products, if the whole is one op that this device has a kernel for."""
    device = x_TD.device.type
    if device not in ("cpu", "cuda") or torch.is_autocast_enabled(device) or experts.has_bias:
        return None
    if getattr(experts, "has_post_expert_norm", False) or (experts.has_gate and not _gates_by_default(experts)):
        return None
    dtypes = (x_TD.dtype, getattr(experts, _first(experts)).dtype, experts.down_proj.dtype)
    if dtypes != (x_TD.dtype,) * 3 or (activation := _activation(experts.act_fn)) is None:
        return None
    if device == "cpu":
        return activation if expert_mlp.has_kernel(x_TD.dtype, weights_TK.dtype) else None
    up, down = (_weight(experts, name) for name in (_first(experts), "down_proj"))
    sizes = (experts.num_experts, weights_TK.shape[1], activation, experts.has_gate)
    return activation if cuda.why_not_mlp(x_TD, weights_TK, [], [up], [down], *sizes) is None else None


def _gates_by_default(experts: Any) -> bool:
    return "_apply_gate" not in vars(experts) and type(experts)._apply_gate is _theirs.get("gate")


def _activation(act: Any) -> str | None:
    """The name that `expert_mlp` has for an activation module, None if it has none or somebody listens to it."""
    if not isinstance(act, nn.Module) or act._forward_hooks or act._forward_pre_hooks or act._backward_hooks:
        return None
    if type(act) is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    for cls, name in _theirs["activations"]:
        if type(act) is cls:
            return name  # type: ignore[no-any-return]
    return None


# -- registration ---------------------------------------------------------------------------


def register() -> None:
    """Give transformers the name, now if its registry is loaded, else as soon as it is."""
    if HOME in sys.modules:
        _enter(sys.modules[HOME])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _enter(home: ModuleType) -> None:
    interface = getattr(home, "ALL_EXPERTS_FUNCTIONS", None)
    if interface is None:  # before transformers 5
        return
    from transformers import activations

    _theirs["gate"] = getattr(home, "_default_apply_gate", None)
    _theirs["activations"] += [(cls, name) for n, name in ACTIVATIONS.items() if (cls := getattr(activations, n, None))]
    interface.register(NAME, experts_forward)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds transformers' module as ever, and enters the name once it has run.  Then it is gone."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != HOME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _enter(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
