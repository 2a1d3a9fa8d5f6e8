"""What a function is called with, as Dynamo has it: whose weights it uses, and its arguments as fakes and numbers.

What the caller's graph shows of a tensor (arguments.py) is noted here; an argument that is neither tensor nor number is
a reason to refuse.
"""

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.source import AttrSource, TypeSource
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.functions import UserFunctionVariable, UserMethodVariable
from torch._dynamo.variables.lists import BaseListVariable
from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable

from moe_compile import hf_experts
from moe_compile.arguments import Known, Sizes, from_counting, from_one_hot, from_topk, number_of_scores
from moe_compile.candidates import is_candidate, is_stack
from moe_compile.dynamo_members import NOBODY, source_of
from moe_compile.places import HERE, NOT_PASSED, Place
from moe_compile.reads import SIMPLE


def owner_of(var: Any, args: list[Any]) -> tuple[Any, list[Any]]:
    """(the module the function is called on, the other arguments), however the call was written."""
    if isinstance(var, UserMethodVariable):
        first, rest = var.obj, args
    elif args:
        first, rest = args[0], args[1:]
    else:
        return None, args
    first = first.realize() if hasattr(first, "realize") else first
    return (first, rest) if isinstance(first, UnspecializedNNModuleVariable) else (None, args)


def own_forward(owner: Any) -> tuple[types.FunctionType, Any]:
    """The loop of an experts class whose forward transformers' switch sends to our ops."""
    fn = hf_experts.own_forward(type(owner.value))
    source = AttrSource(AttrSource(TypeSource(owner.source), "forward"), "__wrapped__")
    return fn, UserFunctionVariable(fn, source=source)


def owner_elsewhere(tx: Any, var: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The same of a function that belongs to no module: (the module among its arguments or around it, or nobody if
    stacked weights are arguments; the arguments, with a mark for where the module stands)."""
    given = [a.realize() if hasattr(a, "realize") else a for a in (*args, *kwargs.values())]
    modules = [a for a in given if isinstance(a, UnspecializedNNModuleVariable)]
    if len(modules) == 1 and _is_never_called(modules[0].value):
        for name, arg in kwargs.items():
            kwargs[name] = _Mark(HERE) if arg.realize() is modules[0] else arg
        return modules[0], [_Mark(HERE) if a is modules[0] else a for a in given[: len(args)]]
    if modules:
        return None, args
    for i, cell in enumerate(var.fn.__closure__ or ()):
        if (module := _content(cell)) is not None and var.source is not None and _is_never_called(module):
            if not is_candidate(var.fn, module):
                continue
            source = source_of(tx, var, None, (("fn", ""), ("cell", i)), {})
            owner = VariableTracker.build(tx, module, source).realize()
            if isinstance(owner, UnspecializedNNModuleVariable):
                return owner, [_Mark(NOT_PASSED), *args]
    fakes = [a.as_proxy().node.meta.get("example_value") for a in given if isinstance(a, TensorVariable)]
    if any(isinstance(f, Tensor) and is_stack(f) for f in fakes):
        return NOBODY, [_Mark(NOT_PASSED), *args]
    return None, args


def _is_never_called(module: Any) -> bool:
    """Whether a module only holds others, or weights: code that has it cannot call it, and so no hooks of its own."""
    cls = type(module)
    return cls.forward is nn.Module.forward and cls.__call__ is nn.Module.__call__ and "forward" not in vars(module)


def _content(cell: types.CellType) -> nn.Module | None:
    try:
        return cell.cell_contents if isinstance(cell.cell_contents, nn.Module) else None
    except ValueError:
        return None


class _Mark:
    """A mark among the arguments, for `argument_values`."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def realize(self) -> "_Mark":
        return self


def argument_values(tx: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any], Known] | str:
    """The arguments as fake tensors and constants, and what the graph shows of them; the reason, if it cannot be."""
    for i, arg in enumerate(args):
        args[i] = arg.realize()
    for name, arg in kwargs.items():
        kwargs[name] = arg.realize()
    values: list[Any] = []
    distinct: list[int] = []
    widths: list[tuple[int, int]] = []
    tables: list[int] = []
    sizes: list[int] = []
    tensors = 0
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, _Mark):
            values.append(arg.place)
        elif isinstance(arg, TensorVariable):
            node = arg.as_proxy().node
            fake = node.meta.get("example_value")
            if not isinstance(fake, Tensor) or torch.utils._python_dispatch.is_traceable_wrapper_subclass(fake):
                return f"an argument is a {type(fake).__name__}"
            if from_topk(node):
                distinct.append(tensors)
            if (width := number_of_scores(node)) is not None:
                widths.append((tensors, width))
            if from_one_hot(node):
                tables.append(tensors)
            if from_counting(node):
                sizes.append(tensors)
            tensors += 1
            values.append(fake)
        elif isinstance(arg, BaseListVariable) and (number := _number_of_sizes(tx, arg)):
            tensors += 1
            values.append(Sizes(number))
        elif isinstance(arg, SymNodeVariable) and arg.python_type() is float:
            values.append(arg.evaluate_expr())  # and a guard on it
        elif arg.is_python_constant() and isinstance(arg.as_python_constant(), SIMPLE):
            values.append(arg.as_python_constant())
        else:
            return f"an argument is neither a tensor nor a number ({arg.python_type_name()})"
    named = dict(zip(kwargs, values[len(args) :], strict=True))
    return values[: len(args)], named, Known(tuple(distinct), tuple(widths), tuple(tables), tuple(sizes))


def _number_of_sizes(tx: Any, arg: Any) -> int | None:
    """Of how many numbers a list is, if they are integers and none is negative; of symbols that becomes a guard."""
    items = [item.realize() for item in arg.items]
    for item in items:
        if isinstance(item, SymNodeVariable) and item.python_type() is int:
            expr = item.as_proxy().node.meta["example_value"].node.expr
            sizes = getattr(tx.output.shape_env, "backed_var_to_val", None) or tx.output.shape_env.var_to_val
            if not expr.free_symbols <= sizes.keys() or not tx.output.shape_env.evaluate_expr(expr >= 0):
                return None
        else:
            number = item.as_python_constant() if item.is_python_constant() else None
            if type(number) is not int or number < 0:
                return None
    return len(items) if len(items) > 1 and arg.python_type() in (list, tuple) else None


def as_tensor(tx: Any, arg: Any) -> Any:
    """A tensor argument as it is; a list of numbers as a tensor of its own."""
    if isinstance(arg, TensorVariable):
        return arg
    dtype = VariableTracker.build(tx, torch.int64)
    return VariableTracker.build(tx, torch.tensor).call_function(tx, [arg], {"dtype": dtype})
