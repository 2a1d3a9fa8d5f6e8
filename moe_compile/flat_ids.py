"""Ids that come in flat, [T * K]: as those of a table, where the program says how wide it is.

Before:  order = flat.argsort();                                              token = order // K
After:   flat_1 = flat.reshape(-1, K).reshape(-1);  order = flat_1.argsort(); token = order // K

The same numbers; detection reads what is made of a table of ids.  Only where the length is shown to be a multiple of K.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moe_compile.ranges import is_written

aten = torch.ops.aten
SORTS = ("aten.argsort", "aten.sort")
KEEPS = ("aten.slice.Tensor", "moe_ep_capture.rows_between.default", "aten.to.dtype", "aten.clone.default")
DIVIDES = ("aten.floor_divide.default", "aten.div.Tensor_mode")


def as_tables(gm: GraphModule, inputs: int) -> None:
    """Make tables of those of the first `inputs` placeholders that are sorted, and whose order is divided by K."""
    for node in gm.graph.find_nodes(op="placeholder")[:inputs]:
        val = node.meta.get("val")
        if not (isinstance(val, Tensor) and val.dim() == 1 and val.dtype in (torch.int64, torch.int32)):
            continue
        if is_written(node):
            continue
        divisors = {k for order in _orders(node) for k in _divisors(order)}
        if len(divisors) == 1 and _wide(k := divisors.pop()) and statically_known_true(val.shape[0] % k == 0):
            _insert(gm, node, val, k)


def _wide(k: Any) -> bool:
    return type(k) is int and k > 1


def _orders(node: Node) -> Iterator[Node]:
    for user in node.users:
        if str(user.target).startswith(SORTS):
            yield from (n for n in user.users if n.args[1] == 1) if "argsort" not in str(user.target) else (user,)


def _divisors(order: Node) -> Iterator[Any]:
    for user in order.users:
        if user.args[0] is not order:
            continue
        if str(user.target) in DIVIDES:
            yield user.args[1]
        elif str(user.target) in KEEPS:
            yield from _divisors(user)


def _insert(gm: GraphModule, node: Node, val: Tensor, k: int) -> None:
    users = list(node.users)
    after = gm.graph.find_nodes(op="placeholder")[-1]
    with gm.graph.inserting_after(after):
        table = gm.graph.call_function(aten.reshape.default, (node, [-1, k]))
    with gm.graph.inserting_after(table):
        flat = gm.graph.call_function(aten.reshape.default, (table, [-1]))
    table.meta["val"] = val.reshape(-1, k)
    flat.meta["val"] = table.meta["val"].reshape(-1)
    for user in users:
        user.replace_input_with(node, flat)
