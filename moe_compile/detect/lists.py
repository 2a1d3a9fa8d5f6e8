"""Rules for experts that have lists of tokens, as where each expert chooses its tokens.

    for e in range(E):
        out.index_add_(0, lists[e], expert_e(x[lists[e]]) * weights[e, :, None])

While it is read, the experts' values are ordinary ones.  When all terms of the sum are known, what an expert adds is
read again with rows that are its own: those of `x` at its list, or of a value that only it has.  So the rows of all
experts, one list after the other, are a batch in which the expert of each row is known.

Where the rows were laid out by expert before, and nothing is added here, the results are joined:

    dispatched = einsum("tec,td->ecd", mask, x)
    made       = stack([expert_e(dispatched[e]) for e in range(E)])
"""

import collections
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from moe_compile.detect.dense import ancestors, not_pure
from moe_compile.detect.ids import INTEGERS
from moe_compile.detect.interpreter import Call, Interpreter, Rule
from moe_compile.detect.nodes import name_of, op_of
from moe_compile.detect.rows import POINTWISE
from moe_compile.detect.shapes import same_size
from moe_compile.detect.sum_values import Buffer, ListRegion, ListSum, ListTerm, Region, Sum
from moe_compile.detect.unify import leaves_of, unify
from moe_compile.detect.values import Plain, Rows, RowTuple, Selection, Slice, Unknown, Value
from moe_compile.region import Body, Expr, experts
from moe_compile.rewrite import emit

aten = torch.ops.aten

PRODUCTS = ("linear", "matmul", "mm")  # whose first argument is rows


def add(call: Call) -> Value | None:
    """total.index_add(0, list, rows)."""
    if len(call.args) != 4 or call.kwargs or call.number(1) != 0:
        return None
    at, what = call.node.args[2:4]
    return _term(call, at, what) if isinstance(at, Node) and isinstance(what, Node) else None


def scatter(call: Call) -> Value | None:
    """total.scatter_add(0, list[:, None].expand(-1, D), rows): whole rows."""
    if len(call.args) != 4 or call.kwargs or call.number(1) not in (0, -2):
        return None
    wide, what = call.node.args[2:4]
    if not isinstance(wide, Node) or not isinstance(what, Node) or op_of(wide) not in ("expand", "expand_as", "repeat"):
        return None
    column: Any = wide.args[0]
    sizes, rows, whole = (call.val(n).shape for n in (wide, what, call.node))
    if len(sizes) != 2 or not all(map(same_size, sizes, rows)) or not same_size(rows[1], whole[1]):
        return None
    if op_of(column) != "unsqueeze" or column.args[1] not in (1, -1):
        return None
    at: Any = column.args[0]
    fits = call.val(at).dim() == 1 and same_size(call.val(column).shape[0], sizes[0])
    return _term(call, at, what) if fits else None


def _term(call: Call, at: Node, what: Node) -> Value | None:
    """One term more: rows that are added at the places of a list."""
    total, into = call.arg(0), call.node.args[0]
    index, rows = call.run.values[at], call.run.otherwise(what)
    if not isinstance(index, Plain | Slice) or not isinstance(rows, Plain) or not isinstance(into, Node):
        return None
    ids, val = call.val(at), call.val(what)
    if ids.dim() != 1 or ids.dtype not in INTEGERS or val.dim() < 2:
        return None
    if isinstance(total, Plain | Region):
        schema = getattr(into.target, "_schema", None)
        if call.op.endswith("_") and schema is not None and schema.is_mutable:
            return None  # what was added before is no list's
        total = Buffer(into, "known")
    if any("moe_ep_capture" in str(n.target) for n in ancestors(at)):
        return None  # rows of a mask: as many as the data says
    if not isinstance(total, Buffer | ListSum) or not same_size(ids.shape[0], val.shape[0]):
        return None
    start, terms = (total.start, total.terms) if isinstance(total, ListSum) else (total, ())
    if start.kind == "empty" or (call.op.endswith("_") and not call.run.is_fresh(start.node)):
        return None
    number = index.index if isinstance(index, Slice) and isinstance(index.index, int) else None
    return ListSum(start, (*terms, ListTerm(call.run.canonical[at], what, number)))


# -- the whole region -----------------------------------------------------------------------


def finish(run: Interpreter, node: Node, total: ListSum) -> Value:
    """The region; an ordinary value if it is no sum over experts."""
    if len(total.terms) < 2:
        return Plain(node)
    return _region(run, node, total)


def _region(run: Interpreter, node: Node, total: ListSum) -> ListRegion | Unknown:
    numbers = [t.number for t in total.terms]
    if sorted(n for n in numbers if n is not None) != list(range(len(numbers))):
        numbers = list(range(len(numbers)))
    terms = sorted(zip(numbers, total.terms, strict=True), key=lambda pair: pair[0])  # type: ignore[arg-type, return-value]
    needed = [ancestors(t.value) for _, t in terms]
    times = collections.Counter(n for mine in needed for n in mine)
    inside = [{n for n in mine if times[n] == 1} for mine in needed]
    span = {n for own in inside for n in own}
    if why := not_pure(run, node, span):
        return Unknown(why)
    bodies = []
    for (number, term), own in zip(terms, inside, strict=True):
        found = RowsOfList(run, number, term, own).result()  # type: ignore[arg-type]
        if isinstance(found, Unknown):
            return found
        bodies.append(found)
    families = unify(bodies)
    if isinstance(families, Unknown):
        return families
    body, indices = bodies[0], tuple(t.index for _, t in terms if t.index is not None)
    if why := _refused(run, terms[0][1], total, body, families, indices):
        return Unknown(why)
    run.inside |= span
    ids = indices[0] if indices else node
    whole = Sum(total.start, (Rows(Selection(ids, 0, None), body),))
    return ListRegion(whole, ids, len(bodies), None, "number", body, families, None, indices)


def _refused(
    run: Interpreter, first: ListTerm, total: ListSum, body: Expr, families: dict[Expr, list[Node]],
    indices: tuple[Node, ...],
) -> str | None:  # fmt: skip
    leaves, here = leaves_of(body), first.value.meta["val"]
    if not any(leaf.role == "slice" or (leaf in families and leaf.role == "outer") for leaf in leaves):
        return "no weight belongs to an expert"
    for leaf in leaves:
        if leaf.role == "slice" and leaf.node.meta["val"].shape[0] != len(total.terms):
            return f"{len(total.terms)} experts are used, {leaf.node.name} holds {leaf.node.meta['val'].shape[0]}"
    if not indices and not any(_laid_out(families[leaf]) for leaf in leaves if leaf in families):
        return "the rows of the experts are not parts of one value"
    lengths = [i.meta["val"].shape[0] for i in indices]
    if not all(same_size(n, lengths[0]) for n in lengths):
        return f"the lists of tokens are not of one length: {lengths}"
    if len({i.meta["val"].dtype for i in indices}) > 1:
        return "the lists of tokens are of several dtypes"
    if body.val.dtype != here.dtype or tuple(body.val.shape[1:]) != tuple(here.shape[1:]):
        shapes = tuple(here.shape), tuple(body.val.shape)
        return f"{first.value.name} is {here.dtype} {shapes[0]}, read again it is {body.val.dtype} {shapes[1]}"
    sources = [*indices, *(leaf.node for leaf in leaves), *(n for nodes in families.values() for n in nodes)]
    for source in sources:
        if not run.unchanged(source):
            return f"{source.name} is changed in place while the experts run"
    if total.start.kind == "known" and run.changed_by_others(total.start.node):
        return f"{total.start.node.name} is changed in place while results are added to it"
    return None


class RowsOfList:
    """What one expert adds, read again with rows of its list."""

    def __init__(self, run: Interpreter, number: int, term: ListTerm, own: set[Node], lead: int = 0) -> None:
        """lead: how many dimensions stand before that of the rows (slot_lists.py)."""
        self.run, self.term, self.own, self.lead = run, term, own, lead
        self.selection = Selection(term.index, number, None, "list")
        self.length = term.value.meta["val"].shape[lead]
        self.made: dict[Node, Value] = {}

    def result(self) -> Expr | Unknown:
        for node in self.run.graph.nodes:
            if node in self.own and node.op == "call_function":
                self.made[node] = value = self._value(node)
                if isinstance(value, Unknown):
                    return value
        y = self.made.get(self.term.value)
        if not isinstance(y, Rows) or y.dim != 0 or y.expr.level != "row":
            return Unknown(f"{self.term.value.name} is not shown to be one value for each token of an expert's list")
        return y.expr

    def call(self, node: Node) -> Call:
        return Call(node, op_of(node), [], {}, self.run)

    def _value(self, node: Node) -> Value:
        known = self.run.values[node]
        rows_too = isinstance(known, Slice) and op_of(node) in (*PRODUCTS, *POINTWISE)
        if not isinstance(known, Plain) and not (rows_too and self._reads_rows(node)):
            return known
        if rows := self._gathered(node):
            return rows
        call = self.call(node)
        call.args = [self._arg(a) for a in node.args]
        call.kwargs = {k: self._arg(a) for k, a in node.kwargs.items()}
        if call.op in PRODUCTS and not any(isinstance(a, Rows) for a in call.args):
            call.args[0] = self._listed(node.args[0], None) or call.args[0]
        if not any(isinstance(v, Rows | RowTuple) for v in _flat([call.args, list(call.kwargs.values())])):
            return known
        if call.op.rstrip("_") in POINTWISE:
            rank = call.val().dim()
            call.args = [
                (self._listed(n, rank) or a) if isinstance(a, Plain | Slice) else a
                for a, n in zip(call.args, node.args, strict=True)
            ]
        for rule in self.run.rules.get(call.op, ()):
            if (value := rule(call)) is not None:
                return value
        return Unknown(f"{name_of(node)} is not known to be row-wise")

    def _reads_rows(self, node: Node) -> bool:
        """Whether a call on an expert's own values alone is on rows of its own."""
        if op_of(node) in PRODUCTS and self._listed(node.args[0], None):
            return True
        return any(isinstance(self.made.get(n), Rows) for n in node.all_input_nodes)

    def _gathered(self, node: Node) -> Rows | None:
        """x[list], x.index_select(0, list)."""
        args: Any = node.args
        if op_of(node) == "index" and len(args[1]) == 1:
            source, index = args[0], args[1][0]
        elif op_of(node) == "index_select" and args[1] == 0:
            source, index = args[0], args[2]
        else:
            return None
        if not isinstance(index, Node) or self.run.canonical.get(index, index) is not self.term.index:
            return None
        if not isinstance(self.run.values[source], Plain) or node.meta["val"].dim() < 2:
            return None
        return Rows(self.selection, self.run.table.leaf("rows", self.run.canonical[source], node.meta["val"]))

    def _listed(self, node: Any, rank: int | None) -> Rows | None:
        """A value of the expert's own with a row for each of its tokens."""
        val = node.meta.get("val") if isinstance(node, Node) else None
        if not isinstance(val, Tensor) or val.dim() < 2 or rank not in (None, val.dim()):
            return None
        if node in self.made and not isinstance(self.made[node], Plain | Slice):
            return None
        if not same_size(val.shape[0], self.length) or not isinstance(self.run.otherwise(node), Plain | Slice):
            return None
        return Rows(self.selection, self.run.table.leaf("listed", self.run.canonical[node], val))

    def _arg(self, arg: Any) -> Any:
        if isinstance(arg, (tuple, list)):
            return [self._arg(a) for a in arg]
        if not isinstance(arg, Node):
            return arg
        return self.made.get(arg, self.run.values[arg])


def _flat(tree: Any) -> list[Any]:
    return [x for a in tree for x in _flat(a)] if isinstance(tree, (list, tuple)) else [tree]


# -- results that are joined ----------------------------------------------------------------


def joined(run: Interpreter) -> None:
    """Where nothing is summed over experts: results of experts on parts of one value, joined, as a region."""
    for node in list(run.graph.nodes):
        parts = node.args[0] if op_of(node) in ("stack", "cat") and node.op == "call_function" else None
        if not isinstance(parts, (list, tuple)) or len(parts) < 2 or node in run.regions or node not in run.values:
            continue
        if not all(isinstance(n, Node) and _is_matrix(n, parts[0]) for n in parts):
            continue
        if not run.values[node].plain or not all(run.values[n].plain for n in parts):
            continue
        terms = tuple(ListTerm(None, n) for n in parts)
        region = _region(run, node, ListSum(Buffer(node, "zero"), terms))
        if isinstance(region, ListRegion):
            run.regions[node] = region


def _is_matrix(node: Node, like: Node) -> bool:
    val, other = node.meta.get("val"), like.meta.get("val")
    if not isinstance(val, Tensor) or not isinstance(other, Tensor) or val.dim() < 2 or not val.is_floating_point():
        return False
    return val.dtype == other.dtype and val.dim() == other.dim() and all(map(same_size, val.shape, other.shape))


def _laid_out(nodes: list[Node]) -> bool:
    """Whether nodes are the parts of one value in order: value[e], or from chunk, split or unbind."""
    sources = {n.args[0] for n in nodes if n.op == "call_function" and op_of(n) in ("select", "getitem")}
    if len(sources) != 1 or not isinstance(source := sources.pop(), Node):
        return False
    if all(op_of(n) == "select" for n in nodes):
        whole: Any = source
        return whole.meta["val"].dim() >= 3 and all(n.args[1:] == (nodes[0].args[1], e) for e, n in enumerate(nodes))
    whole, at = source.args[0], 1 if op_of(source) == "unbind" else 2
    dim = source.args[at] if len(source.args) > at else 0
    parts = op_of(source) in ("chunk", "split", "unbind", "split_with_sizes") and whole.meta["val"].dim() >= 3
    return parts and dim in (0, 1) and all(op_of(n) == "getitem" and n.args[1] == e for e, n in enumerate(nodes))


# -- writing it -----------------------------------------------------------------------------


def write(graph: Graph, region: ListRegion, site: Node) -> Node:
    """The sum with one `experts` node: the rows of all lists, each with its expert's number as its id."""

    def call(target: Any, *args: Any) -> Node:
        return emit(graph, target, *args, like=site)

    lists, number = list(region.lists), region.num_experts
    listed: Any = next(n for leaf, n in region.families.items() if leaf.role == "listed") if not lists else []  # type: ignore[attr-defined]
    counted = lists or [call(aten.to.dtype, _first_column(call, n), torch.int64) for n in listed]
    numbers = [call(aten.full_like.default, i, e) for e, i in enumerate(counted)]
    tokens = call(aten.cat.default, lists) if lists else None
    ids = call(aten.unsqueeze.default, call(aten.cat.default, numbers), 1)
    if ids.meta["val"].dtype not in (torch.int32, torch.int64):
        ids = call(aten.to.dtype, ids, torch.int64)
    body = Body(region.families)
    module = body.build(region.body)
    owner = graph.owning_module
    name = next(n for i in range(len(graph.nodes)) if not hasattr(owner, n := f"experts_body_{i}"))
    setattr(owner, name, module)
    rows = []
    for leaf in body.inputs["token"]:
        if leaf.role == "rows":
            rows.append(call(aten.index.Tensor, leaf.node, [tokens]))
        else:
            rows.append(call(aten.cat.default, region.families.get(leaf, [leaf.node] * number)))
    params = [region.families.get(leaf, leaf.node) for leaf in body.inputs["param"]]
    shared = [leaf.node for leaf in body.inputs["shared"]]
    here = site.meta["val"]
    val = here.new_empty((ids.meta["val"].shape[0], *region.body.val.shape[1:]))
    made = emit(graph, experts, ids, rows, [], params, shared, graph.get_attr(name), number, None, like=site, val=val)
    if tokens is None:
        return _joined_again(call, region, site, made)
    start = region.total.start.node
    return emit(graph, aten.index_add.default, start, 0, tokens, made, like=site, val=here)


def _first_column(call: Any, value: Node) -> Node:
    """As many numbers as rows."""
    while value.meta["val"].dim() > 1:
        value = call(aten.select.int, value, 1, 0)
    return value


def _joined_again(call: Any, region: ListRegion, site: Node, made: Node) -> Node:
    """The experts' rows, one after the other, joined as they were."""
    dim, along = site.args[1] if len(site.args) > 1 else 0, op_of(site)
    if dim == 0 and along == "cat":
        return made
    shape = [-1, *region.body.val.shape[1:]]
    by_expert = call(aten.reshape.default, made, [region.num_experts, *shape])
    if dim == 0:
        return by_expert
    parts = [call(aten.select.int, by_expert, 0, e) for e in range(region.num_experts)]
    return call(site.target, parts, dim)


RULES: dict[str, tuple[Rule, ...]] = {
    **{op: (add,) for op in ("index_add", "index_add_")},
    **{op: (scatter,) for op in ("scatter_add", "scatter_add_")},
}
