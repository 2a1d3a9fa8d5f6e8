"""Walks an ATen graph once and gives every node a meaning (values.py), by the rule tables.

A value that the region would need and no rule explains becomes `Unknown` with the reason; nothing is guessed.
Mutation: each storage has a version; reading a name of it that is older than its last change is `Unknown`.
Grad mode: values computed under an explicit `no_grad` may say who is chosen, not what is computed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from moe_compile.detect.copies import MAY_COPY, Copies
from moe_compile.detect.dense_values import Dense, DenseSum
from moe_compile.detect.facts import VISIT_OFFSET, Facts
from moe_compile.detect.nodes import name_of, op_of, storages
from moe_compile.detect.pieces import joined_parts, part_of, sorted_before, sum_of_pieces
from moe_compile.detect.sorted_values import Counts, Filled, FlatIds, Permutation, Pieces
from moe_compile.detect.sum_values import ListSum, Region, Sum, SumRead
from moe_compile.detect.values import (
    Column,
    Constant,
    Emptiness,
    Index,
    MaskedWeights,
    Plain,
    Rows,
    RowTuple,
    Slice,
    Sorted,
    Unknown,
    Value,
    Visit,
)
from moe_compile.opaque import applied
from moe_compile.region import Expr, Table

Rule = Callable[["Call"], Value | None]


ACCUMULATES = ("index_add", "index_add_", "index_put", "index_put_", "index_copy_")


SMALL = 4096  # elements of a constant that is still folded


@dataclass
class Call:
    """One node under interpretation, with its arguments' meanings."""

    node: Node
    op: str  # "index_add_": the op without namespace and overload
    args: list[Any]
    kwargs: dict[str, Any]
    run: "Interpreter"

    def arg(self, index: int, name: str = "", default: Any = None) -> Any:
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def val(self, of: Any = None) -> Any:
        return (of or self.node).meta.get("val")

    def number(self, index: int, name: str = "", default: Any = None) -> Any:
        """The argument as a Python number or list, if it is one; else None."""
        arg = self.arg(index, name, default)
        if isinstance(arg, Constant):
            return arg.number.item() if isinstance(arg.number, Tensor) and arg.number.numel() == 1 else None
        return None if isinstance(arg, Value) else arg


class Interpreter:
    """Interprets one graph.  `values` maps nodes to meanings; `regions` lists the finished sums."""

    def __init__(self, graph: Graph, rules: Mapping[str, tuple[Rule, ...]], facts: Facts) -> None:
        self.graph, self.rules, self.facts = graph, rules, facts
        self.values: dict[Node, Value] = {}
        self.table = Table()
        self.regions: dict[Node, Region] = {}
        self.refused: list[tuple[Node, str]] = []
        self.doubts: list[tuple[Node, str]] = []  # calls outside of all regions, and why they are in none
        self.hints: list[str] = []  # why an ordinary value is nothing of experts', if there is no region
        self.no_grad = False
        self.ungraded: set[Node] = set()  # computed under no_grad
        self.autocasts: list[str] = []  # autocast regions that the node is in, beside the one around the graph
        self.reads: dict[Node, set[Any]] = {}  # ids -> how rows of all experts choose weights by them (Region.reads)
        self.empty: set[tuple[Node, int]] = set()  # (ids, expert) of experts that have no rows here
        self.counted: dict[Node, int] = {}  # ids -> of how many experts Python read the numbers of rows
        self.written: dict[Node, Node | None] = {}  # ids that only we need -> those that they are a part of
        self.by_column: dict[Node, Node] = {}  # columns of ids, that had terms of their own -> those ids
        self.inside: set[Node] = set()  # plain nodes that belong to the experts of a dense sum
        self._version: dict[Any, int] = {}  # storage -> number of changes
        self._seen_at: dict[Node, int] = {}  # node -> version of its storage when it was made
        self._stale_reads: set[Any] = set()
        self._dropped: list[tuple[Node, set[Any]]] = []  # changes in place that a rewritten graph does not make
        self._copies = Copies()
        self._lost: list[str] = []  # why changes in place are not those that the graph shows
        self._first: dict[Any, Node] = {}  # what is computed -> the node that computed it first
        self.canonical: dict[Node, Node] = {}  # plain nodes -> an earlier node of equal value
        self._inputs = {s for n in graph.nodes if n.op in ("placeholder", "get_attr") for s in storages(n)}

    def run(self, finish: Callable[["Interpreter", Node, Sum | DenseSum | ListSum], Value]) -> None:
        self._finish = finish
        for node in self.graph.nodes:
            if node.op == "output":
                for source in node.all_input_nodes:
                    self._stale(source)
                    self.settle(source)
                break
            self.values[node] = self._meaning(node)
            if self.no_grad:
                self.ungraded.add(node)
        self.refuse_lost_changes()
        self._report_unknown_sums()

    def refuse_lost_changes(self) -> None:
        """A change in place goes with the region it belongs to; somebody else may see it: through another name, or
        after the call, if it changes an input.  Or it is not the one that the graph shows (copies.py)."""
        if self._lost and self.regions:
            self.refused += [(site, self._lost[0]) for site in self.regions]
            self.regions.clear()
        for node, written in self._dropped:
            lost = None
            if isinstance(self.values[node], Sum | SumRead | Region):
                continue
            if written & self._inputs:
                lost = f"{name_of(node)} changes an input of the region in place"
            elif written & self._stale_reads:
                lost = f"what {name_of(node)} changes is read elsewhere"
            if lost:
                self.refused += [(site, lost) for site in self.regions]
                self.regions.clear()

    def _report_unknown_sums(self) -> None:
        """An accumulation that could not be interpreted is a candidate too: its reason, once."""
        told = {reason for _, reason in self.refused}
        if not self.regions and not self.refused:
            self.refused += self.doubts[:1]
        for node, value in self.values.items():
            if isinstance(value, Unknown) and op_of(node) in ACCUMULATES and value.reason not in told:
                told.add(value.reason)
                self.refused.append((node, value.reason))

    def settle(self, node: Node) -> Value:
        """The meaning of a node for somebody outside of the sum: a finished region if it is a sum."""
        value = self.values[node]
        joined = value.join() if isinstance(value, Filled) else value
        if isinstance(joined, Pieces) and (total := sum_of_pieces(node, joined)) is not None:
            value = total
        if isinstance(value, Sum | DenseSum | ListSum):
            value = self.values[node] = self._finish(self, node, value)
            if isinstance(value, Region):
                self.regions[node] = value
            elif isinstance(value, Unknown):
                self.refused.append((node, value.reason))
        return value

    # -- one node ---------------------------------------------------------------------------

    def _meaning(self, node: Node) -> Value:
        if node.op == "placeholder":
            each = self.facts.visits.get(node)
            if node in self.facts.tables and (rule := self.rules.get("table")):
                return self._made(node, rule[0](Call(node, "table", [], {}, self)) or Plain(node))
            if node in self.facts.sizes:
                return self._made(node, Counts(node, node.meta["val"].shape[0]))
            return self._made(node, Plain(node) if each is None else Visit(each, VISIT_OFFSET))
        if node.op == "get_attr":
            literal = (self.facts.constants or {}).get(str(node.target))
            return self._made(node, Plain(node) if literal is None else Constant(literal))
        if node.op != "call_function":
            return Plain(node)
        if node.target is torch._C._set_grad_enabled:
            self.no_grad = self.facts.grad_enabled and not node.args[0]
            return Plain(node)
        if node.target is torch.amp.autocast_mode._enter_autocast:
            self.autocasts.append(repr(node.args))
            return Plain(node)
        if node.target is torch.amp.autocast_mode._exit_autocast:
            self.autocasts.pop()
            return Plain(node)
        for source in node.all_input_nodes:
            if stale := self._stale(source):
                if any(isinstance(self.values[n], Sum | DenseSum | ListSum) for n in node.all_input_nodes):
                    self.refused.append((node, stale))
                if changed := self._change(node):
                    self._dropped.append((node, changed))
                    self._lost += filter(None, [self._copies.changed(name_of(node), changed)])
                return self._made(node, Unknown(stale))
        changed = self._change(node)
        if doubt := self._copies.changed(name_of(node), changed):
            self._lost.append(doubt)
        value = self._apply(node)
        value = self._made(node, value)
        self._note_copy(node)
        if node in self.facts.answered and isinstance(value, Emptiness) and isinstance(value.expert, int):
            if self.facts.answered[node] is (value.kind == "none") and value.kind in ("any", "none"):
                self.empty.add((value.ids, value.expert))
        if changed and isinstance(value, _INPUTS_STAY) and changed & self._inputs:
            value = Unknown(f"{name_of(node)} changes an input of the region in place")
        if changed and goes_with_its_region(value):
            self._dropped.append((node, changed))
        return value

    def _apply(self, node: Node) -> Value:
        call = Call(node, op_of(node), [], {}, self)
        for meaning in (self.values.__getitem__, self.otherwise, self._settled):
            call.args = [self._arg(a, meaning) for a in node.args]
            call.kwargs = {k: self._arg(a, meaning) for k, a in node.kwargs.items()}
            values = [v for v in tree_leaves([call.args, call.kwargs]) if isinstance(v, Value)]
            for value in values:
                if isinstance(value, Unknown):
                    return value
            if any(isinstance(v, Filled) for v in values) and call.op not in ("index_put", "index_put_"):
                continue
            if call.op != "rows_between" and (pieces := [v for v in values if isinstance(v, Pieces)]):
                made = self._piecewise(call, pieces)
                if not isinstance(made, Unknown) or meaning == self._settled or not any(map(sorted_before, pieces)):
                    return made
                continue
            for rule in self.rules.get(call.op, ()):
                result = rule(call)
                if isinstance(result, Unknown) and self._stands_alone(node, values):
                    if not all(v.plain for v in values):
                        break  # and read again with what its sums are
                    self.doubts.append((node, result.reason))
                    return Plain(node)
                if result is not None:
                    return self._no_grad_check(node, result)
            if not any(isinstance(v, Sum | DenseSum | ListSum | Dense | Filled) for v in values):
                break
        if self.no_grad and any(isinstance(v, Dense) and v.of_experts for v in values):
            self.hints.append(f"{name_of(node)} runs under no_grad among the experts")
        if folded := self.fold(node, call):
            return folded
        if all(v.plain for v in values):
            return Plain(node)
        if (cls := applied(node)) is not None:
            return Unknown(f"it uses the custom autograd function {cls.__name__} on rows of experts, as no rule does")
        kinds = ", ".join(sorted({type(v).__name__.lower() for v in values if not v.plain}))
        return Unknown(f"{name_of(node)} is not known to be row-wise (it reads {kinds})")

    def _stands_alone(self, node: Node, values: list[Value]) -> bool:
        """Whether a call that no rule explains may be computed as it is: it changes nothing, and reads rows that no
        expert computed, or by their order, beside values that others can read."""
        schema = getattr(node.target, "_schema", None)
        if schema is None or schema.is_mutable or str(node.target).startswith("moe_ep_capture"):
            return False
        return any(isinstance(v, Sorted | Permutation) for v in values) and all(
            v.plain or isinstance(v, Sum) for v in values
        )

    def _piecewise(self, call: Call, pieces: list[Pieces]) -> Value:
        """A call on rows of which each expert computed its own: what it is for each expert."""
        experts = [e for e, _ in pieces[0].parts]
        if any([e for e, _ in p.parts] != experts or p.number != pieces[0].number for p in pieces):
            return Unknown(f"{name_of(call.node)} mixes rows of other experts")
        parts = []
        for i, e in enumerate(experts):
            one = Call(call.node, call.op, part_of(call.args, i), part_of(call.kwargs, i), self)
            results = (rule(one) for rule in self.rules.get(call.op, ()))
            value = next((r for r in results if r is not None), None)
            if value is None or isinstance(value, Unknown):
                return value or Unknown(f"{name_of(call.node)} is not known to be row-wise")
            parts.append((e, self._no_grad_check(call.node, value)))
        return joined_parts(call.node, parts, pieces[0])

    def _no_grad_check(self, node: Node, value: Value) -> Value:
        val = node.meta.get("val")
        vals = val if isinstance(val, (tuple, list)) else [val]
        differs = any(isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex()) for v in vals)
        if self.no_grad and differs:
            items = value.items if isinstance(value, RowTuple) else (value,)
            if any(isinstance(v, Rows | Sum | Pieces | Filled) for v in items):
                return Unknown(f"{name_of(node)} runs under no_grad inside the expert loop")
            if any(isinstance(v, _OF_OTHERS) and getattr(v, "node", None) is not node for v in items):
                if any(isinstance(v, Dense) and v.of_experts for v in items):
                    self.hints.append(f"{name_of(node)} runs under no_grad among the experts")
                return Plain(node)  # a view, too, has no gradient here, but what it is said to be may have one
        if (
            self.autocasts
            and isinstance(value, Rows | Sum | Slice | Pieces | Filled)
            and isinstance(val, Tensor)
            and val.is_floating_point()
        ):
            return Unknown(f"{name_of(node)} runs in an autocast region of its own")
        return value

    def fold(self, node: Node, call: Call) -> Constant | None:
        """A call on constants alone is a constant."""
        inputs = [v for v in tree_leaves([call.args, call.kwargs]) if isinstance(v, Value | torch.SymInt)]
        val = node.meta.get("val")
        known = all(isinstance(v, Constant) for v in inputs)
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            known = False
        small = isinstance(val, Tensor) and all(isinstance(s, int) for s in val.shape) and val.numel() <= SMALL
        if not (known and small and (inputs or call.op == "arange")):
            return None
        assert callable(node.target)
        cpu = {"device": torch.device("cpu")} if "device" in call.kwargs else {}
        args = [a.number if isinstance(a, Constant) else a for a in call.args]
        kwargs = {k: a.number if isinstance(a, Constant) else a for k, a in (call.kwargs | cpu).items()}
        result = node.target(*args, **kwargs)
        return Constant(result.clone()) if isinstance(result, Tensor) else None

    def _arg(self, arg: Any, meaning: Callable[[Node], Value]) -> Any:
        if isinstance(arg, Node):
            return meaning(arg)
        if isinstance(arg, (tuple, list)):
            return [self._arg(a, meaning) for a in arg]
        return arg

    def otherwise(self, node: Node) -> Value:
        """The meaning of a node outside of a dense sum."""
        value = self.values[node]
        if isinstance(value, Filled):
            return value.join()
        return value.otherwise(self.canonical[node]) if isinstance(value, Dense) else value

    def _settled(self, node: Node) -> Value:
        self.settle(node)
        return self.otherwise(node)

    # -- mutation ---------------------------------------------------------------------------

    def _change(self, node: Node) -> set[Any]:
        """Count one more change of every storage that the call writes to; return them."""
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            return set()
        written = set()
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                source = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                for n in tree_leaves(source):
                    if isinstance(n, Node):
                        written |= storages(n)
        for storage in written:
            self._version[storage] = self._version.get(storage, 0) + 1
        return written

    def _note_copy(self, node: Node) -> None:
        source = node.args[0] if op_of(node) in MAY_COPY and node.args else None
        if not isinstance(source, Node) or (self.values[source].plain and not isinstance(self.values[source], Sorted)):
            return
        if storages(source).isdisjoint(storages(node)):
            self._copies.note(name_of(node), storages(source), storages(node))

    def _made(self, node: Node, value: Value) -> Value:
        if value.plain:
            self.canonical[node] = self._first.setdefault(self._key(node), node)
            if isinstance(value, Plain):
                value = Plain(self.canonical[node])
        self._seen_at[node] = max((self._version.get(s, 0) for s in storages(node)), default=0)
        return value

    def _key(self, node: Node) -> Any:
        """Equal for nodes that compute the same: a pure call of the same inputs, unchanged in between."""
        tags = getattr(node.target, "tags", ())
        schema = getattr(node.target, "_schema", None)
        if schema is None or schema.is_mutable or torch.Tag.nondeterministic_seeded in tags:
            return node
        versions = [self._version.get(s, 0) for n in node.all_input_nodes for s in storages(n)]
        same = lambda n: self.canonical.get(n, n)  # noqa: E731
        args, kwargs = map_arg(node.args, same), map_arg(node.kwargs, same)
        return (node.target, repr(args), repr(kwargs), tuple(versions), self.no_grad, tuple(self.autocasts))

    def _stale(self, node: Node) -> str | None:
        now = max((self._version.get(s, 0) for s in storages(node)), default=0)
        if node in self._seen_at and self._seen_at[node] != now:
            self._stale_reads |= storages(node)
            return f"{node.name} is read after it was changed in place through another name"
        return None

    def unchanged(self, node: Node) -> bool:
        """Whether the node still has the value that was read from it."""
        now = max((self._version.get(s, 0) for s in storages(node)), default=0)
        return self._seen_at.get(node, now) == now

    def changed_by_others(self, node: Node) -> bool:
        """Whether somebody changed the node's memory in place since it was made, beside what goes with the region."""
        own = sum(bool(storages(node) & written) for _, written in self._dropped)
        now = max((self._version.get(s, 0) for s in storages(node)), default=0)
        return now - self._seen_at.get(node, now) > own

    def read_elsewhere(self, node: Node) -> bool:
        """Whether the node's memory is read through a name that is older than a change of it."""
        return bool(storages(node) & self._stale_reads)

    def is_fresh(self, node: Node) -> bool:
        """Whether the node's memory was made inside this graph."""
        return not (storages(node) & self._inputs)

    def is_own(self, node: Node) -> bool:
        """Whether the node's memory was made inside this graph, and who reads a change of it reads the node's."""
        return self.is_fresh(node) and not self.read_elsewhere(node)

    # -- help for rules ---------------------------------------------------------------------

    def write_ids(self, after: Node, target: Any, args: tuple[Any, ...], val: Tensor, of: Node | None) -> Node:
        """A node for ids that the program does not name, as early as they are known; `erase_ids` drops it.

        of: ids of which these are some, with -1 in the place of the others.
        """
        known = next((u for u in after.users if u.target is target and u.args == args), None)
        if known is None:
            inputs = after.op == "placeholder"
            place = next(n for n in self.graph.nodes if n.op != "placeholder") if inputs else after.next
            with self.graph.inserting_before(place):
                known = self.graph.call_function(target, args)
            known.meta = {k: v for k, v in after.meta.items() if k == "stack_trace"} | {"val": val}
            if storages(known) & storages(after) and after in self._seen_at:
                self._seen_at[known] = self._seen_at[after]
        self.written[known] = of
        return known

    def erase_ids(self) -> None:
        """Take out what `write_ids` put into the graph and nobody uses."""
        for node in reversed(self.written):
            if not node.users and not node._erased:
                self.graph.erase_node(node)

    def expr(self, call: Call, target: Any, args: Any, kwargs: dict[str, Any] | None = None, val: Any = None) -> Expr:
        """The call as an expression of the body; its value is this node's unless `val` says otherwise."""
        return self.table.call(target, tuple(args), kwargs or {}, call.val() if val is None else val)


_OF_OTHERS = Dense | Slice | Column | MaskedWeights  # that say from which values a value is taken
_INPUTS_STAY = Rows | Unknown | Permutation | FlatIds | Pieces | Filled | Index


def goes_with_its_region(value: Value) -> bool:
    """Whether a change in place that gave this value is for the region alone, and erased with it."""
    return not value.plain or isinstance(value, Permutation | Constant | FlatIds)
