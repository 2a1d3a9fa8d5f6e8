"""What a trace has to show of visits that stand for many experts: that each would do the same."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from moe_compile.detect.nodes import is_random, storages
from moe_compile.detect.sum_values import Sum, SumRead
from moe_compile.detect.values import Value
from moe_compile.loop_state import OneByOne
from moe_compile.visits import OFFSET, Visit


def check_guards(visits: Sequence[Visit], sizes: Sequence[Any], guards: Sequence[Any], replaced: Any) -> None:
    """Every decision on the size that stands for an index is right for all experts of its visit."""
    for visit, size in zip(visits, sizes, strict=False):
        symbol = size.node._expr
        if symbol in replaced:
            raise OneByOne(f"an index became a number ({symbol} is {replaced[symbol]})")
        for guard in {g for g in guards if symbol in g.free_symbols}:
            if guard.free_symbols != {symbol}:
                raise OneByOne(f"{guard} compares an index with a size")
            holds = sympy.lambdify(symbol, guard, "math")
            if not all(holds(n + OFFSET) for n in visit.numbers):
                raise OneByOne(f"{guard} does not hold for all experts of a visit")


def check_visits(graph: Graph, values: Mapping[Node, Value], visits: Sequence[Visit]) -> None:
    """Refuse a body that could compute something else at another visit: at random, or by what an earlier one left."""
    order = list(graph.nodes)
    for visit in visits:
        begin, end = order.index(visit.begin), order.index(visit.end)
        old = {s for n in order[:begin] for s in storages(n)}
        body = [n for n in order[begin:end] if n.op == "call_function"]
        for node in body:
            if not _plain_op(node):
                raise OneByOne(f"{node.name} is not known to be the same at every visit")
        written = {s for n in body for s in _written(n)}
        if written & {s for n in body if n.target is torch.ops.moe_ep_capture.pick.default for s in storages(n)}:
            raise OneByOne("a visit changes a parameter or buffer of its module")
        changed = written & old
        for node in body:
            touches = {s for n in (node, *node.all_input_nodes) for s in storages(n)} & changed
            if touches and not isinstance(values.get(node), Sum | SumRead):
                raise OneByOne(f"{node.name} reads or changes what visits change")


def _plain_op(node: Node) -> bool:
    if getattr(node.target, "__module__", "") == "_operator" or node.target in _MODES:
        return True
    known = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in ("aten", "moe_ep_capture")
    return known and not is_random(node)


_MODES: tuple[Callable[..., Any], ...] = (
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
)


def _written(node: Node) -> Iterator[Any]:
    schema = getattr(node.target, "_schema", None)
    for position, argument in enumerate(schema.arguments if schema is not None and schema.is_mutable else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            source = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            for n in source if isinstance(source, (list, tuple)) else [source]:
                if isinstance(n, Node):
                    yield from storages(n)
