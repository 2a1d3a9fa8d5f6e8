"""The engine every pass runs on: find -> refuse? -> rewrite, and a report of all three."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from moe_compile.series import Series

M = TypeVar("M")


@dataclass
class PassReport:
    """What one pass did to one graph: sites it rewrote, sites it declined and why."""

    name: str
    applied: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.applied)} applied, {len(self.refused)} refused"]
        lines += [f"  + {site}" for site in self.applied]
        lines += [f"  - {site}: {reason}" for site, reason in self.refused]
        return "\n".join(lines)


class RewritePass(ABC, Generic[M]):
    """A local rewrite.  Subclasses say what to find, when to decline, and what to write."""

    @abstractmethod
    def find(self, graph: Graph) -> Iterator[tuple[Node, M]]:
        """Yield (site, match) by structure alone; never change the graph here."""

    def refuse(self, match: M, /) -> str | None:
        """Return why this match must be left alone, or None to go ahead."""
        return None

    @abstractmethod
    def rewrite(self, graph: Graph, match: M, /) -> None:
        """Replace the match.  It cannot fail: every doubt was settled in `refuse`."""

    def __call__(self, gm: GraphModule) -> PassReport:
        """Run over the whole graph once, clean up, verify, report."""
        report = PassReport(type(self).__name__)
        for site, match in list(self.find(gm.graph)):
            if reason := self.refuse(match):
                report.refused.append((site.name, reason))
            else:
                name = site.name
                self.rewrite(gm.graph, match)
                report.applied.append(name)
        if report.applied:
            drop_dead(gm.graph)
            gm.graph.lint()
            gm.recompile()
        return report


def drop_dead(graph: Graph, also: Callable[[Node], bool] = lambda node: False) -> None:
    """Erase nodes without users that have no effect, or of which `also` says that it is not wanted."""
    for node in reversed(graph.nodes):
        if (node.op != "call_function" and node.op != "get_attr") or node.users:
            continue
        if not node.is_impure() or also(node):
            graph.erase_node(node)


def operands(node: Node) -> tuple[Node, ...]:
    """Return the arguments of a call whose arguments are all nodes."""
    nodes = tuple(arg for arg in node.args if isinstance(arg, Node))
    assert len(nodes) == len(node.args), f"{node.format_node()} has a non-node argument"
    return nodes


def value(node: Node) -> Tensor:
    """Return the fake tensor a node stands for: its shape, dtype and device."""
    fake = node.meta["val"]
    assert isinstance(fake, Tensor), f"{node.name} is not a tensor"
    return fake


def _val(node: Node) -> Any:
    val = node.meta["val"]
    return [val.example] * len(val) if isinstance(val, Series) else val


def emit(graph: Graph, target: Callable[..., Any], *args: Any, like: Node, val: Any = None) -> Node:
    """Insert a call that stands for what `like` stood for in the user's source.

    Its fake value, which later passes rely on, is computed unless it is given.
    """
    node = graph.call_function(target, args)
    node.meta = {k: v for k, v in like.meta.items() if k in ("stack_trace", "nn_module_stack", "source_fn_stack")}
    node.meta["val"] = target(*map_arg(args, _val)) if val is None else val
    return node
