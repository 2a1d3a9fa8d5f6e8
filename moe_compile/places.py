"""Where a function finds the module that owns its weights: as its first argument, as another, around it, or nowhere."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


class Place:
    """Stands among the arguments of a call: `HERE` for the module, `NOT_PASSED`, first, for none."""


HERE, NOT_PASSED = Place(), Place()


class Nothing(nn.Module):
    """In the place of a module, for a function whose weights are arguments."""


NOTHING = Nothing()


def call(fn: Callable[..., Any], module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`fn(module, *args, **kwargs)`, with the module where it belongs."""
    if args and args[0] is NOT_PASSED:
        return fn(*args[1:], **kwargs)
    if any(a is HERE for a in (*args, *kwargs.values())):
        put = lambda a: module if a is HERE else a  # noqa: E731
        return fn(*map(put, args), **{k: put(a) for k, a in kwargs.items()})
    return fn(module, *args, **kwargs)


def parameters_of(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    """The names of a function's parameters, as the positional arguments stand."""
    if args and args[0] is NOT_PASSED:
        return ["", *names]
    return list(names) if any(a is HERE for a in (*args, *kwargs.values())) else list(names)[1:]
