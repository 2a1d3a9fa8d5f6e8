"""Series: the tensors in one place of modules that are alike, as one input of a graph.

    experts_0_w1_series: 512 x f32[16, 8]                  # experts.0.w1, experts.1.w1, ...: a sequence
    pick = moe_ep_capture.pick(experts_0_w1_series, e, 0)

So a graph, and every pass over it, is as long for 512 experts as for 8.  The rewritten function takes a series as a
tuple of tensors; `expand` makes as many inputs of it, for passes that look at single parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from moe_compile.trained import TRAINED

State = list[str | tuple[str, ...]]  # names of parameters and buffers; for a series the names of all


@dataclass(frozen=True)
class Series:
    """The value of such an input: tensors of one shape, dtype and device.

    example: the fake of the first tensor, which stands for any of them, in its memory too: who changes it changes all.
    names: the qualified name of each.
    """

    example: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | slice) -> "Tensor | Series":
        names = self.names[index]
        return self.example if isinstance(names, str) else Series(self.example, names)


def series_of(node: Any) -> Series | None:
    """The series that a node is, if it is one."""
    val = node.meta.get("val") if isinstance(node, Node) else None
    return val if isinstance(val, Series) else None


def add_inputs(
    graph: Graph, columns: Sequence[Sequence[Tensor]], state: Mapping[str, Tensor], traced: Sequence[Node]
) -> list[tuple[str, ...]]:
    """An input, behind those that were `traced`, for each column that is picked from; returns the names in them.

    Before: pick([first], number, column).  After: pick(series, number, column).
    """
    names = {id(tensor): name for name, tensor in state.items()}  # the last of several, as in a trace
    made: dict[int, Node] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.moe_ep_capture.pick.default):
        (first,), _, column = node.args
        if column not in made:
            with graph.inserting_after([*traced, *made.values()][-1]):
                made[column] = graph.placeholder("series")
            made[column].meta["val"] = Series(first.meta["val"], tuple(names[id(t)] for t in columns[column]))
            made[column].meta[TRAINED] = first.meta[TRAINED]
        node.args = (made[column], *node.args[1:])
    return [node.meta["val"].names for node in made.values()]


def expand(graph: Graph, state: State) -> list[str]:
    """An input for each tensor of each series, where the last inputs are `state`; returns what it is then.

    Before: experts(ids, ..., [series], ...).  After: experts(ids, ..., [[w_0, w_1, ...]], ...).
    """
    inputs = dict(zip(state, graph.find_nodes(op="placeholder")[-len(state) :], strict=True)) if state else {}
    nodes = {name: node for name, node in inputs.items() if isinstance(name, str)}
    for names, series in inputs.items():
        if isinstance(names, str):
            continue
        for name in names:
            if name not in nodes:
                with graph.inserting_before(series):
                    nodes[name] = graph.placeholder(name.replace(".", "_"))
                nodes[name].meta["val"], nodes[name].meta[TRAINED] = series.meta["val"].example, series.meta[TRAINED]
        _replace(series, [nodes[name] for name in names])
        graph.erase_node(series)
    return list(nodes)


def _replace(series: Node, tensors: list[Node]) -> None:
    """Write a list of nodes in the place of a series, and of parts of it."""
    for user in list(series.users):
        if series_of(user) is not None:  # getitem(series, slice)
            _replace(user, tensors[user.args[1]])  # type: ignore[index, arg-type]
            user.graph.erase_node(user)
        else:
            put: Callable[[Node], Any] = lambda n: tensors if n is series else n  # noqa: E731
            user.args = map_arg(user.args, put)
