"""What a node of an ATen graph is called, whose memory its value lies in, and whether it draws random numbers.

Told by the node alone, without what it means: the interpreter and the rules ask here, and so do passes that compare
graphs.
"""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from moe_compile.opaque import applied
from moe_compile.series import Series

LIBRARIES = ("aten", "moe_ep_capture")  # whose ops the rules know by name alone
ZEROS = ("aten.zeros.default", "aten.new_zeros.default", "aten.zeros_like.default")


def op_of(node: Node) -> str:
    """`index_add_` of `aten.index_add_.default`; `getitem` of operator.getitem; `lib::relu` of another library's op."""
    if node.target is operator.getitem:
        return "getitem"
    packet = getattr(node.target, "overloadpacket", None)
    library = getattr(node.target, "namespace", "python")
    name = packet.__name__ if packet is not None else getattr(node.target, "__name__", str(node.target))
    return name if library in LIBRARIES else f"{library}::{name}"


def name_of(node: Node) -> str:
    """How a refusal calls a node: `aten.index_add_`, and the user's line if the trace knows it."""
    line = source_line(node)
    target = str(node.target).removesuffix(".default")
    target = "getitem" if node.target is operator.getitem else target
    target = f"{cls.__name__}.apply" if (cls := applied(node)) is not None else target
    return target + (f" at {line}" if line else "")


def source_line(node: Node) -> str | None:
    """file:line of the user's code that made the node."""
    trace = node.stack_trace or node.meta.get("stack_trace")
    for entry in reversed((trace or "").split("File ")[1:]):
        path, _, rest = entry.partition('", line ')
        if "/torch/" not in path and "moe_compile" not in path:
            return f"{path.strip().lstrip(chr(34)).rsplit('/', 1)[-1]}:{rest.split(',')[0].split(chr(10))[0]}"
    return None


def out_of_place(target: Any) -> Any:
    """`pow.Tensor_Scalar` of `pow_.Scalar`: what takes the same and returns what an in-place op writes; or None.

    Told by the arguments: an overload of the same name may be another (`pow.Scalar` takes a number first).
    """
    schema = target._schema
    packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
    wanted = [(a.kwarg_only, str(a.type)) for a in schema.arguments]
    for name in () if packet is None else packet.overloads():
        found = getattr(packet, name)
        if [(a.kwarg_only, str(a.type)) for a in found._schema.arguments] == wanted and not found._schema.is_mutable:
            return found
    return None


def is_random(node: Node) -> bool:
    """Whether a node draws random numbers, or may: a custom autograd function is free to."""
    if applied(node) is not None:
        return True
    if op_of(node) == "dropout" and (node.args[1] == 0 or node.args[2] is False):
        return False
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def storages(node: Node) -> set[Any]:
    """The memory that a node's value lies in: nodes that share some are names of one another's numbers."""
    val = node.meta.get("val")
    if isinstance(val, Tensor):
        return {val.untyped_storage()._cdata}
    leaves = [val.example] if isinstance(val, Series) else tree_leaves(val)
    return {t.untyped_storage()._cdata for t in leaves if isinstance(t, Tensor)}
