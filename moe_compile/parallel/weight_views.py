"""What stands between a parameter and the weights that experts read: views of it, expert by expert.

stack     [a * E, ...]: the experts one behind the other in the first dimension, as in the parameter
piece     what is one expert's: of `w.unbind(0)`, `w.chunk(E)`, `w.select(0, e)`
"""

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_compile.rewrite import value

aten = torch.ops.aten

RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int, aten.flatten.using_ints,
)  # fmt: skip


# What may stand between a parameter and the weight of one expert: the same numbers, in another shape or dtype.
VIEWS = {
    *RESHAPES, aten.unbind.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, operator.getitem,
    aten.select.int, aten.slice.Tensor, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.t.default, aten.numpy_T.default, aten.mT.default, aten.transpose.int, aten.permute.default,
    aten.detach.default, aten.contiguous.default, aten.to.dtype,
}  # fmt: skip


def without_gradients(graph: Graph) -> set[Node]:
    """The nodes under an explicit `no_grad`."""
    found, enabled = set(), True
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif not enabled:
            found.add(node)
    return found


def is_cut(node: Node) -> bool:
    """Whether a node is a piece, along the first dimension, of a value that has others."""
    source: Any = node.args[0]
    if node.target is operator.getitem:
        at = {aten.unbind.int: 1, aten.chunk.default: 2, aten.split.Tensor: 2, aten.split_with_sizes.default: 2}
        dim = at.get(source.target)
        return dim is not None and not source.kwargs and source.args[dim : dim + 1] in ((), (0,))
    return bool(node.target is aten.select.int and node.args[1] == 0)


def cut_of(node: Node) -> Node | None:
    """The piece of a value that a param is computed from, if from this alone: of those on the way the first."""
    found = None
    while node.op == "call_function" and not node.kwargs and len(node.all_input_nodes) == 1:
        if node.target not in VIEWS or node.all_input_nodes != [a for a in node.args if isinstance(a, Node)]:
            return None
        if is_cut(node):
            found = node
        node = node.args[0]  # type: ignore[assignment]
    return found if node.op == "placeholder" else None


def place_of(cut: Node) -> tuple[Any, int]:
    """(which, of how many) pieces of like size it is."""
    source: Any = cut.args[0]
    if cut.target is aten.select.int:
        return cut.args[2], value(source).shape[0]
    pieces = source.meta["val"]
    return cut.args[1], len(pieces) if len({piece.shape for piece in pieces}) == 1 else 0


def each_alike(node: Node) -> bool:
    """Whether an op on a stack does the same to the weight of each expert, and leaves the experts first."""
    source, *rest = node.args
    arguments: Any = rest
    if node.kwargs or not isinstance(source, Node) or len(node.all_input_nodes) != 1:
        return False
    if node.target in (aten.to.dtype, aten.detach.default, aten.contiguous.default, operator.getitem):
        return True
    rank = value(source).dim() if isinstance(source.meta["val"], torch.Tensor) else 0
    if node.target is aten.transpose.int:
        return rank >= 3 and 0 not in (arguments[0] % rank, arguments[1] % rank)
    if node.target is aten.permute.default:
        return bool(arguments[0][0] == 0)
    if node.target in (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default):
        return len(arguments) == 2 and arguments[1] % rank != 0
    return node.target is aten.slice.Tensor and bool(arguments) and arguments[0] % rank != 0
