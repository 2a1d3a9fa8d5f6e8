"""What surrounds a function that runs out of band, on fake tensors in the place of its module's state.

Each context puts back what it found, whatever happens inside.  What would be lost by running so is a refusal: hooks,
parameters that are replaced, and any error, for the function runs here on other data than it will.
"""

import builtins
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from moe_compile.answers import Answers
from moe_compile.errors import Refusal
from moe_compile.parallel import gather
from moe_compile.parts import parts
from moe_compile.visits import OneByOne


@contextlib.contextmanager
def unset(module: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Without these attributes, which `watch` puts back: what is found after a run was set by it."""
    for name in names:
        vars(module).pop(name, None)
    yield


@contextlib.contextmanager
def state_replaced(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """With other tensors in the place of parameters and buffers; refuse if one of them is replaced meanwhile."""
    held = {(id(table), key): (table, table[key], values[name]) for name, table, key in parts(module).places}
    for (_, key), (table, _, value) in held.items():
        table[key] = value
    try:
        yield
        for (_, key), (table, _, value) in held.items():
            if table.get(key) is not value:
                raise Refusal(f"it replaces {key}, a parameter or buffer, when it runs")
    finally:
        for (_, key), (table, before, _) in held.items():
            table[key] = before


@contextlib.contextmanager
def lengths_hidden(answers: Answers, symbols: bool) -> Iterator[None]:
    """`len(rows)` is `rows.shape[0]`, where that is a symbol: the built-in takes no other result than a plain number.
    And `counts.tolist()`, which fake tensors have as a loop of their own, hides its length where that is not known."""
    length_of, as_list = builtins.len, FakeTensor.tolist

    def length(obj: Any, /) -> Any:
        if isinstance(obj, FakeTensor) and obj.dim() and not isinstance(size := obj.shape[0], int):
            return size
        return length_of(obj)

    def tolist(tensor: Any) -> Any:
        if answers.unsized.counts(tensor) is None:
            return as_list(tensor)
        with torch._C.DisableTorchFunction():
            return answers.entries(torch.Tensor.tolist, tensor)

    FakeTensor.tolist = tolist  # type: ignore[method-assign, assignment]
    builtins.len = length if symbols else length_of
    try:
        yield
    finally:
        FakeTensor.tolist, builtins.len = as_list, length_of  # type: ignore[method-assign]


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """`torch.compiler.is_compiling()` says what it says to a program that Dynamo traces: yes."""
    compiler = torch.compiler
    saved = compiler._is_compiling_flag, compiler.is_dynamo_compiling
    compiler._is_compiling_flag, compiler.is_dynamo_compiling = True, lambda: True
    try:
        yield
    finally:
        compiler._is_compiling_flag, compiler.is_dynamo_compiling = saved


@contextlib.contextmanager
def refusals(answers: Answers) -> Iterator[None]:
    """What can go wrong in a run on fake tensors, as reasons.  What went wrong in a visit need not be wrong in all."""
    with one_by_one(answers), _reasons():
        yield


@contextlib.contextmanager
def one_by_one(answers: Answers) -> Iterator[None]:
    """A refusal is `OneByOne` where a visit stands for many experts: what went wrong may be the visit's doing."""
    try:
        yield
    except Refusal as refusal:
        visits = answers.visits
        if visits is not None and (visits.done or (visits.lists is not None and visits.lists.absent)):
            raise OneByOne(str(refusal)) from refusal
        raise


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    try:
        yield
    except Refusal:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode) as error:
        raise Refusal(f"Python decides on data: {str(error).splitlines()[0]}") from error
    except Exception as error:  # the function's own, too: it runs here on other data than it will
        line = (str(error).splitlines() or [""])[0]
        raise Refusal(f"it does not run on fake tensors: {type(error).__name__}: {line}") from error


def check_module(module: nn.Module) -> None:
    """Refuse modules that a trace would not show whole."""
    for name, child in parts(module).modules:
        own = vars(child)
        hooks = own["_forward_hooks"], own["_forward_pre_hooks"], own["_backward_hooks"], own["_backward_pre_hooks"]
        if any(hooks) and child is not module and any(h not in gather.HOOKS for held in hooks for h in held.values()):
            raise Refusal(f"module {name or type(module).__name__} has hooks")
        if own.get("_compiled_call_impl") is not None and child is not module:
            raise Refusal(f"module {name or type(module).__name__} is compiled on its own")
    for name, tensor in parts(module).tensors:
        if tensor.dtype.is_complex:
            raise Refusal(f"{name} is {tensor.dtype}")
        if type(tensor) not in PLAIN and torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor):
            raise Refusal(f"{name} is a {type(tensor).__name__}")


PLAIN = (nn.Parameter, Tensor, nn.Buffer)
