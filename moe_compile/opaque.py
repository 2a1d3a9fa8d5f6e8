"""Custom autograd functions as single calls of a captured graph, whose insides nobody reads.

    multiplier = MultiplierProcessor.apply(scores, ids)      # a node; the rewritten function calls `apply` again

So the gradient is the function's own: Dynamo traces forward and backward as it would for the original.  The trace only
needs to know what comes out, and that nothing else happens:
- arguments are plain tensors and constants, results plain tensors in memory of their own or of an argument;
- it changes no argument in place, and nothing that outlives the call but its own `ctx`;
- Python can name it, so that a guard says that it is this function and its forward this code (`kinds.py`).
A call is never a part of an expert: it has no rule (detect/), is not the same at every visit (visit_checks.py), and
has to happen in every world alike, like anything random (worlds.py).
"""

import contextlib
import dis
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree
from torch.utils._pytree import tree_map

from moe_compile.errors import Refusal
from moe_compile.python_state import check_effects, unchanged
from moe_compile.reads import SIMPLE

METHODS = ("forward", "setup_context", "backward", "vjp")


@functools.cache
def call_of(cls: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The function that stands for `cls.apply` in graphs, and in what Dynamo traces."""

    def autograd_function(*args: Any) -> Any:
        return cls.apply(*args)

    autograd_function.__name__ = autograd_function.__qualname__ = f"{cls.__name__}_apply"
    autograd_function.applies = cls  # type: ignore[attr-defined]
    torch.fx.node.has_side_effect(autograd_function)
    return autograd_function


def applied(node: Node) -> Any:
    """The custom autograd function that a node applies, or None."""
    return getattr(node.target, "applies", None) if isinstance(node.target, types.FunctionType) else None


def functions_in(graph: Graph) -> list[Any]:
    """The custom autograd functions that a graph applies."""
    return [cls for n in graph.nodes if (cls := applied(n)) is not None]


@contextlib.contextmanager
def as_calls(module: nn.Module, now: Callable[[], bool]) -> Iterator[None]:
    """While it lasts, `apply` of a custom autograd function becomes a node of the graph that is traced.

    `now`: whether it may be called at this point.  Raises `Refusal` where the function could do more than compute.
    """
    function = torch.autograd.Function
    apply = function.__dict__["apply"]

    def call(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__.startswith("torch."):  # the gradient of a library op, which the op itself keeps
            return apply.__get__(None, cls)(*args, **kwargs)
        if not now():
            raise _refusal(cls, "is applied among the experts")
        _check_class(cls)
        if kwargs or not all(type(a) in SIMPLE or _is_plain(a) for a in args):
            raise _refusal(cls, "gets something else than tensors and constants")
        with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing(), unchanged(_methods(cls), module):
            versions = [a._version for a in args if isinstance(a, Tensor)]
            result = apply.__get__(None, cls)(*args)
            if versions != [a._version for a in args if isinstance(a, Tensor)]:
                raise _refusal(cls, "changes an argument in place")
        if not all(map(_is_plain, result if isinstance(result, tuple) else [result])):
            raise _refusal(cls, "returns something else than tensors")
        mode = get_proxy_mode()
        assert mode is not None
        with torch._C.DisableTorchFunction():
            proxies = tree_map(mode.tracer.unwrap_proxy, args)  # type: ignore[union-attr]
            made = mode.tracer.create_proxy("call_function", call_of(cls), proxies, {})
            return track_tensor_tree(result, made, constant=None, tracer=mode.tracer)

    function.apply = classmethod(call)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        function.apply = apply  # type: ignore[method-assign]


def _refusal(cls: type, why: str) -> Refusal:
    return Refusal(f"it uses the custom autograd function {cls.__name__}, which {why}")


def _is_plain(value: Any) -> bool:
    return type(value) is FakeTensor


def _methods(cls: Any) -> tuple[types.FunctionType, ...]:
    found = (getattr(vars(cls).get(name), "__func__", None) for name in METHODS)
    return tuple(f for f in found if isinstance(f, types.FunctionType))


def _check_class(cls: Any) -> None:
    """Refuse what is not written in the usual way, or changes more than its `ctx`."""
    if cls.__bases__ != (torch.autograd.Function,):
        raise _refusal(cls, "is made from another one")
    if "forward" not in vars(cls) or not all(isinstance(vars(cls).get(n, _NONE), staticmethod) for n in METHODS):
        raise _refusal(cls, "is not made of static methods")
    check_effects(_methods(cls), _of_ctx)


_NONE = staticmethod(lambda: None)


def _of_ctx(code: types.CodeType, step: dis.Instruction) -> bool:
    """Whether an instruction sets an attribute of a method's first argument, its `ctx`, which it never sets."""
    steps = list(dis.get_instructions(code))
    at = next(i for i, s in enumerate(steps) if s.offset == step.offset)
    before, ctx = steps[at - 1], code.co_varnames[0]
    sets = any(s.opname.startswith(("STORE_FAST", "DELETE_FAST", "STORE_DEREF")) and s.argval == ctx for s in steps)
    return step.opname == "STORE_ATTR" and before.opname == "LOAD_FAST" and before.argval == ctx and not sets
