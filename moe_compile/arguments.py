"""What Dynamo's graph shows of a call's arguments: ids of a topk, masks of one_hot."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.shapes import same_size


@dataclass(frozen=True)
class Known:
    """Positions among the tensor arguments.

    distinct: of ids that come from a topk, so that no row holds one twice.  widths: of ids that come from a topk, in
    any shape, each with the number of scores that it took them from.  tables: of masks [..., E] of zeros and ones,
    with one at most in a row.  sizes: of vectors of numbers none of which is negative, as histc and bincount give.
    """

    distinct: tuple[int, ...] = ()
    widths: tuple[tuple[int, int], ...] = ()
    tables: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """In the place of an argument that is a list of `number` integers, none of them negative."""

    number: int


NOTHING_KNOWN = Known()

_COPIES = ("to", "long", "int", "detach", "clone", "contiguous")
_VIEWS = ("view", "reshape", "flatten", "squeeze", "unsqueeze")


def from_topk(node: Node) -> bool:
    """Whether a value of Dynamo's graph is the indices of a topk, which are distinct in a row."""
    topk, ids = _topk(node, _COPIES)
    if topk is None or not isinstance(ids, Tensor):
        return False
    dim = topk.kwargs.get("dim", topk.args[2] if len(topk.args) > 2 else -1)
    return dim in (-1, ids.dim() - 1)


def number_of_scores(node: Node) -> int | None:
    """Of how many scores a topk took the ids, if they are a topk's in any shape and that is a constant."""
    topk, ids = _topk(node, _COPIES + _VIEWS)
    if topk is None or not isinstance(ids, Tensor):
        return None
    scores: Any = topk.args[0].meta.get("example_value")  # type: ignore[union-attr]
    dim: Any = topk.kwargs.get("dim", topk.args[2] if len(topk.args) > 2 else -1)
    width = scores.shape[dim] if isinstance(scores, Tensor) and isinstance(dim, int) else None
    return width if isinstance(width, int) else None


def _topk(node: Node, same: tuple[str, ...]) -> tuple[Node | None, Any]:
    """(the topk of whose result a value is the indices, those indices), if nothing wrote to them."""
    while node.op == "call_method" and node.target in same and isinstance(node.args[0], Node):
        if _changed_in_place(node) or node.meta["example_value"].dtype not in (torch.int32, torch.int64):
            return None, None
        node = node.args[0]
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or node.target is not operator.getitem or _changed_in_place(node):
        return None, None
    is_topk = source.target is torch.topk or (source.op == "call_method" and source.target == "topk")
    return (source, node.meta.get("example_value")) if node.args[1] == 1 and is_topk else (None, None)


def from_counting(node: Node) -> bool:
    """Whether a value of Dynamo's graph is a vector of integers that count, none of them negative."""
    while node.op == "call_method" and node.target in (*_COPIES, "cpu") and isinstance(node.args[0], Node):
        if _changed_in_place(node):
            return False
        node = node.args[0]
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    weighted = len(node.args) > 1 and isinstance(node.args[1], Node)
    if _changed_in_place(node) or node.kwargs.get("weights", node.kwargs.get("weight")) is not None or weighted:
        return False
    return name in ("histc", "bincount") and (node.op == "call_method" or node.target in (torch.histc, torch.bincount))


def from_one_hot(node: Node) -> bool:
    """Whether a value of Dynamo's graph holds zeros and ones, with one at most in a row of its last dimension.

    That is one_hot, reshaped with whole rows, cast, and multiplied by truths, as of those who are not too late.
    """
    if _changed_in_place(node):
        return False
    before = node.args[0] if node.args else None
    if not isinstance(before, Node) or not _tensor(before):
        return False
    here, there = node.meta["example_value"], before.meta["example_value"]
    if node.op == "call_function" and node.target in (torch.nn.functional.one_hot, torch._C._nn.one_hot):
        return True
    if node.op == "call_method" and node.target in ("view", "reshape"):
        whole = type(here.shape[-1]) is int and here.shape[-1:] == there.shape[-1:] and here.dtype == there.dtype
        return whole and from_one_hot(before)
    if node.op == "call_method" and node.target in _CASTS:
        return from_one_hot(before)
    if (node.target in _PRODUCTS or (node.op == "call_method" and node.target in _NAMES)) and not node.kwargs:
        for table, truths in (node.args, node.args[::-1]):
            if isinstance(table, Node) and isinstance(truths, Node) and _tensor(table) and _tensor(truths):
                sizes = table.meta["example_value"].shape
                alike = len(sizes) == here.dim() and all(map(same_size, sizes, here.shape))
                if alike and truths.meta["example_value"].dtype == torch.bool and from_one_hot(table):
                    return True
    return False


_CASTS = ("to", "long", "int", "float", "bool", "detach", "clone", "contiguous")
_PRODUCTS: tuple[Any, ...] = (operator.mul, torch.mul, operator.and_, torch.logical_and, torch.bitwise_and)
_NAMES = ("mul", "logical_and", "bitwise_and")


def _tensor(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), Tensor)


def _changed_in_place(node: Node) -> bool:
    """Whether anything before this call wrote to the value's memory, under whatever name."""
    fake = node.meta.get("example_value")
    if not isinstance(fake, Tensor):
        return True
    return fake._version != 0 if not fake.is_inference() else _written(node, fake)


def _written(node: Node, fake: Tensor) -> bool:
    """The same of a tensor of inference mode, which counts no versions: by what the graph does."""
    storage = fake.untyped_storage()._cdata
    for n in node.graph.nodes:
        name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
        inplace = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE or "out" in n.kwargs
        for a in (*n.args[:1], n.kwargs.get("out")):
            other = a.meta.get("example_value") if inplace and isinstance(a, Node) else None
            if isinstance(other, Tensor) and other.untyped_storage()._cdata == storage:
                return True
    return False


_IN_PLACE = frozenset(name for name in dir(operator) if name.startswith("i")) | {"setitem", "__setitem__"}
