"""The parts of a module, listed once for a proof: it asks a dozen questions about each of perhaps thousands."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class Parts:
    """What `named_modules`, `named_parameters` and `named_buffers` say of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.memo: dict[Any, Any] = {}  # what follows from the parts
        self.everywhere = _below(module)  # by all their names
        once: dict[int, tuple[str, nn.Module]] = {}
        for name, child in self.everywhere:
            once.setdefault(id(child), (name, child))
        self.modules = list(once.values())  # each once, by its first name; a module before what is in it

    @functools.cached_property
    def places(self) -> list[tuple[str, dict[str, Any], str]]:
        """Where each of the tensors is: its name, the table that holds it, and the name there."""
        return [
            (f"{name}.{k}" if name else k, table, k)
            for name, child in self.everywhere
            for table in (child._parameters, child._buffers)
            for k, t in table.items()
            if t is not None
        ]

    @functools.cached_property
    def tensors(self) -> list[tuple[str, Tensor]]:
        """Parameters, then buffers, by all their names."""
        return self.parameters + [
            (f"{name}.{k}" if name else k, t)
            for name, child in self.everywhere
            for k, t in child._buffers.items()
            if t is not None
        ]

    @functools.cached_property
    def parameters(self) -> list[tuple[str, Tensor]]:
        """Parameters by all their names."""
        return [
            (f"{name}.{k}" if name else k, t)
            for name, child in self.everywhere
            for k, t in child._parameters.items()
            if t is not None
        ]


def _below(module: nn.Module) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    todo: list[tuple[str, nn.Module]] = [("", module)]
    while todo:
        name, child = todo.pop()
        found.append((name, child))
        if child._modules:
            before = f"{name}." if name else ""
            todo += [(before + k, m) for k, m in reversed(child._modules.items()) if m is not None]
    return found


_known: contextvars.ContextVar[Parts | None] = contextvars.ContextVar("moe_compile_parts", default=None)


def parts(module: nn.Module) -> Parts:
    """The parts of a module: those listed before, within `listed`."""
    known = _known.get()
    return known if known is not None and known.module is module else Parts(module)


@contextlib.contextmanager
def listed(module: nn.Module) -> Iterator[Parts]:
    """Within, nobody adds parts to a module or takes them away, so that they are listed once (`python_state.watch`)."""
    token = _known.set(Parts(module))
    try:
        found = _known.get()
        assert found is not None
        yield found
    finally:
        _known.reset(token)
