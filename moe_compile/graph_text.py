"""One way to print a graph, shared by docstrings, golden tests, reports and debug dumps."""

import operator

import torch
from torch.fx import Graph, GraphModule, Node

from moe_compile.region import EXAMPLE_ROWS
from moe_compile.series import Series

_DTYPE = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b8",
}


def graph_text(graph: Graph, types: bool = True) -> str:
    """`name: dtype[shape] = namespace.op(args)`, one line per node, no addresses, no paths; r: rows of one expert.

    The body of an `experts` node follows the line that reads it, indented.  `types=False` leaves types out.
    """
    lines = []
    for node in graph.nodes:
        lines.append(_line(node, types))
        inner = getattr(graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(inner, GraphModule):
            lines += ["    " + line for line in graph_text(inner.graph, types).splitlines()]
    return "\n".join(lines)


def _line(node: Node, types: bool) -> str:
    if node.op == "output":
        return f"return {_arg(node.args[0])}"
    left = f"{node.name}: {_type(node)}" if types else node.name
    if node.op in ("placeholder", "get_attr"):
        return left
    args = ", ".join([*map(_arg, node.args), *(f"{k}={_arg(v)}" for k, v in node.kwargs.items())])
    if node.target is operator.getitem:
        source, index = node.args
        return f"{left} = {source}[{index}]"
    return f"{left} = {_target(node)}({args})"


def _target(node: Node) -> str:
    name = getattr(node.target, "__name__", "") if not isinstance(node.target, torch._ops.OpOverload) else ""
    return name or str(node.target).removesuffix(".default").removesuffix(".Tensor")


def _type(node: Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return _type_of(value)
    if isinstance(value, Series):
        return f"{len(value)} x {_type_of(value.example)}"
    if value is None:
        return "body" if node.op == "get_attr" else "none"
    return "tuple" if isinstance(value, (tuple, list)) else type(value).__name__


def _type_of(tensor: torch.Tensor) -> str:
    return f"{_DTYPE.get(tensor.dtype, str(tensor.dtype))}[{', '.join(map(_size, tensor.shape))}]"


def _size(size: object) -> str:
    number = size.node.hint if isinstance(size, torch.SymInt) else size  # to compare a symbol would be a guard
    return "r" if number == EXAMPLE_ROWS else str(size)


def _arg(arg: object) -> str:
    if isinstance(arg, (tuple, list)):
        return "[" + ", ".join(map(_arg, arg)) + "]"
    return _size(arg)
