"""Rules for experts that run on every token, and are then multiplied by zero for most of them.

    table = zeros(T, E).scatter(1, ids, weights)        # or, by expert: (weights * (ids == e)).sum(-1)
    out   = sum over e of expert_e(x) * table[:, e, None]

is the sum over a token's experts alone, written with more work.  While it is read, `expert_e(x)` is an ordinary value
of the graph.  Only when all terms of a sum are known it shows what is an expert's: what no other expert's term needs.
That part is read again with rows of tokens in the place of all tokens, by the rules of rows.py: it must be row-wise.

What is multiplied by zero is not computed any more: an infinity or NaN there does not reach the result.
"""

import collections
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.dense_values import DenseSum, DenseTerm, DenseWeight, Infinite, Spread, Stacked
from moe_compile.detect.ids import INTEGERS, not_distinct
from moe_compile.detect.interpreter import Call, Interpreter, Rule
from moe_compile.detect.nodes import name_of, op_of, storages
from moe_compile.detect.rows import whole_slice
from moe_compile.detect.shapes import equal_sizes, same_size
from moe_compile.detect.slot_tables import above_zero
from moe_compile.detect.sum_values import Buffer, Sum
from moe_compile.detect.values import MaskedWeights, Member, Plain, Rows, RowTuple, Selection, Unknown, Value
from moe_compile.region import Expr

aten = torch.ops.aten


# -- tables of weights ----------------------------------------------------------------------


def scatter(call: Call) -> Value | None:
    """zeros(T, E).scatter(1, ids, weights): zero, or minus infinity, but for the chosen experts."""
    start, dim, ids, source = (call.arg(i) for i in range(4))
    zero, fill = isinstance(start, Buffer) and start.kind == "zero", -math.inf if isinstance(start, Infinite) else 0.0
    if not (zero or (fill and "add" not in call.op)) or not isinstance(ids, Plain) or len(call.args) != 4:
        return None
    val, index = call.val(), call.val(ids.node)
    if call.kwargs or index.dim() != 2 or val.dim() != 2 or dim not in (1, -1) or index.dtype not in INTEGERS:
        return None
    if isinstance(source, Value) and not (isinstance(source, Plain) and call.val(source.node).shape == index.shape):
        return None
    if not isinstance(val.shape[1], int) or not equal_sizes(call.run, val.shape[:1], index.shape[:1]):
        return None
    return Spread(call.node, ids.node, (0, "e"), fill)


def keeps_zeros(call: Call) -> Value | None:
    """A table times something, over something, or in another dtype: still zero where it was."""
    found = [(i, v) for i, v in enumerate(call.args[:2]) if isinstance(v, Spread) and v.fill == 0]
    if len(found) != 1 or not isinstance(call.val(), Tensor) or call.op.endswith("_"):
        return None
    (i, table), other = found[0], call.arg(1 - found[0][0])
    if table.dims != (0, "e") or (call.op in ("div", "true_divide") and i != 0):
        return None
    if isinstance(other, Value) and not isinstance(other, Plain):
        return None
    if call.op in ("div", "true_divide") and not _never_zero_alone(call, other):
        return None
    if call.val().shape != call.val(table.node).shape or not call.val().is_floating_point():
        return None
    return Spread(call.node, table.ids, table.dims)


def _never_zero_alone(call: Call, other: Any) -> bool:
    """Whether what a table is divided by is not zero, or is so for all experts of a token: then nothing is finite.

    One that belongs to an expert may be zero for those that the token did not choose, where 0 / 0 is not zero.
    """
    if not isinstance(other, Plain):
        return type(other) in (int, float) and other != 0
    val = call.val(call.node.args[1])
    return not val.dim() or same_size(val.shape[-1], 1) or above_zero(call, call.node.args[1])


def shape(call: Call) -> Value | None:
    """table.t(), table.unsqueeze(-1), table[:, e], table[:, e, None]."""
    value = call.arg(0)
    if isinstance(value, MaskedWeights) and value.summed and call.op in ("unsqueeze", "view", "reshape"):
        if not isinstance(value.expert, int):
            return None  # all experts would be one node
        if all(s == 1 for s in call.val().shape[1:]) and same_size(call.val().shape[0], call.val(value.ids).shape[0]):
            return DenseWeight(value.ids, value.expert, value.classes, "pair", value.weights)
        return None
    if isinstance(value, DenseWeight) and call.op in ("unsqueeze", "view", "reshape"):
        kept = same_size(call.val().shape[0], call.val(value.ids).shape[0])
        return value if kept and all(s == 1 for s in call.val().shape[1:]) else None
    if not isinstance(value, Spread):
        return None
    rank, dims = len(value.dims), value.dims
    if call.op == "unsqueeze" and isinstance(dim := call.number(1), int):
        dim %= rank + 1
        return Spread(value.node, value.ids, (*dims[:dim], "one", *dims[dim:]), value.fill)
    if call.op in ("t", "transpose", "permute") and rank == 2:
        swapped = call.op != "permute" or list(call.arg(1)) == [1, 0]
        return Spread(value.node, value.ids, dims[::-1] if swapped else dims, value.fill)
    if value.fill != 0:
        return None
    if call.op == "select" and isinstance(dim := call.number(1), int) and dims[dim] == "e":
        e = call.number(2)
        return weight_of(call, value, e) if isinstance(e, int) and dims in ((0, "e"), ("e", 0)) else None
    if call.op == "slice" and call.number(1, "dim", 0) % rank == 0:  # [:]
        return value if whole_slice(call) else None
    if call.op == "slice" and dims == (0, "e") and call.number(1) in (1, -1):
        e, stop = call.number(2), call.number(3)
        one = type(e) is int and e >= 0 and stop == e + 1 and call.number(4, "step", 1) == 1
        return weight_of(call, value, e) if one else None
    return None


def weight_of(call: Call, table: Spread, expert: int) -> DenseWeight:
    columns = call.val(table.node).shape[1]
    return DenseWeight(table.ids, expert % columns, columns, "column", table.node)


def split(call: Call) -> Value | None:
    """table.unbind(1)."""
    value = call.arg(0)
    if not isinstance(value, Spread) or value.fill != 0 or value.dims not in ((0, "e"), ("e", 0)):
        return None
    if value.dims[call.number(1, "dim", 0)] != "e":
        return None
    return RowTuple(tuple(weight_of(call, value, e) for e in range(call.val(value.node).shape[1])))


# -- terms and their sum --------------------------------------------------------------------


def term(call: Call) -> Value | None:
    """expert_e(x) * table[:, e, None]."""
    for i in (0, 1):
        weight, value, node = call.arg(1 - i), call.arg(i), call.node.args[i]
        if not (isinstance(weight, DenseWeight) and isinstance(value, Plain) and isinstance(node, Node)):
            continue
        val, factor = call.val(node), call.val(call.node.args[1 - i])
        if not isinstance(val, Tensor) or val.dim() < 2 or factor.dim() != val.dim():
            return None
        if not equal_sizes(call.run, val.shape[:1], call.val(weight.ids).shape[:1]):
            return None
        return DenseTerm(call.node, node, weight)
    return None


def unweighed(call: Call) -> Value | None:
    """expert_e(x) * (ids == e)[:, None]."""
    for i in (0, 1):
        mask, value, node = call.arg(1 - i), call.arg(i), call.node.args[i]
        if not (isinstance(mask, Member) and isinstance(value, Plain) and isinstance(node, Node)):
            continue
        val, rank = call.val(node), call.val(mask.ids).dim()
        if not isinstance(val, Tensor) or val.dim() < 2 or not val.is_floating_point() or len(mask.dims) != val.dim():
            return None
        single = mask.dims[1:2] == (1,) and same_size(call.val(mask.ids).shape[1], 1)
        by_pair = mask.kind == "mask" and (rank == 1 or single)
        if not isinstance(mask.expert, int) or not (by_pair or (rank == 2 and mask.kind in ("count", "any"))):
            return None
        if mask.dims[0] != 0 or any(d != "one" for d in mask.dims[1 + single :]):
            return None
        if not equal_sizes(call.run, val.shape[:1], call.val(mask.ids).shape[:1]):
            return None
        role = "any" if mask.kind == "any" else "one"
        return DenseTerm(call.node, node, DenseWeight(mask.ids, mask.expert, mask.classes, role, mask.ids))
    return None


def add(call: Call) -> Value | None:
    """total + term, term + term, 0 + term."""
    left, right = call.arg(0), call.arg(1)
    if not any(isinstance(v, DenseTerm | DenseSum) for v in (left, right)) or call.number(2, "alpha", 1) != 1:
        return None
    start: Buffer | None = None
    terms: list[DenseTerm] = []
    for value, node in zip((left, right), call.node.args, strict=False):
        if isinstance(value, DenseTerm):
            terms.append(value)
        elif isinstance(value, DenseSum) and (start is None or value.start is None):
            start, terms = start or value.start, [*terms, *value.terms]
        elif isinstance(value, Buffer) and start is None:
            start = value
        elif isinstance(value, Plain) and start is None and isinstance(node, Node):
            start = Buffer(node, "known")
        elif not (type(value) in (int, float) and value == 0):
            return None
    if start is not None and start.kind == "empty":
        return Unknown(f"{name_of(call.node)} adds into memory that was never set")
    if call.op == "add_" and not (start is not None and call.run.is_fresh(start.node)):
        return Unknown(f"{name_of(call.node)} adds experts into a value that others may read")
    if any(call.val(t.node).shape != call.val().shape or call.val(t.node).dtype != call.val().dtype for t in terms):
        return Unknown(f"{name_of(call.node)} adds experts of other shapes or dtypes")
    return DenseSum(start, tuple(terms))


def stack(call: Call) -> Value | None:
    """torch.stack of all experts' results, [T, E, D] or [E, T, D]."""
    values, dim = call.arg(0), call.number(1, "dim", 0)
    nodes = call.node.args[0]
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(v, Plain) for v in values):
        return None
    rank = call.val().dim()
    if rank != 3 or dim % rank not in (0, 1) or not call.val().is_floating_point():
        return None
    return Stacked(tuple(nodes), dim % rank)  # type: ignore[arg-type]


def weigh_stack(call: Call) -> Value | None:
    """stack * table, before it is summed over the experts."""
    for i in (0, 1):
        many, table = call.arg(i), call.arg(1 - i)
        if isinstance(many, Stacked) and isinstance(table, Spread) and many.table is None:
            wanted = (0, "e", "one") if many.dim == 1 else ("e", 0, "one")
            fits = table.dims == wanted and table.fill == 0 and len(many.nodes) == call.val(table.node).shape[1]
            return Stacked(many.nodes, many.dim, table, call.node) if fits else None
    return None


def sum_stack(call: Call) -> Value | None:
    many, dims = call.arg(0), call.number(1, "dim")
    dims = dims if isinstance(dims, list) else [dims]
    if not isinstance(many, Stacked) or many.table is None or len(dims) != 1 or call.number(2, "keepdim", False):
        return None
    if dims[0] is None or dims[0] % 3 != many.dim or call.val().dtype != call.val(many.node).dtype:
        return None
    return DenseSum(None, terms_of(call, many, many.table))


def einsum(call: Call) -> Value | None:
    """einsum("te,ted->td", table, stack), with any letters and in any order."""
    equation, operands = call.arg(0), call.arg(1)
    if not isinstance(equation, str) or not isinstance(operands, list) or len(operands) != 2:
        return None
    inputs, _, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or "." in equation:
        return None
    for i in (0, 1):
        table, many = operands[i], operands[1 - i]
        if not (
            isinstance(table, Spread)
            and isinstance(many, Stacked)
            and many.table is None
            and len(table.dims) == 2
            and table.fill == 0
        ):
            continue
        a, b = terms[i], terms[1 - i]
        t, e = (a[table.dims.index(0)], a[table.dims.index("e")]) if len(set(a)) == 2 else ("", "")
        wanted = [t, e] if many.dim == 1 else [e, t]
        if len(b) == 3 and len(set(b)) == 3 and list(b[:2]) == wanted and result == t + b[2]:
            return DenseSum(None, terms_of(call, many, table))
    return None


def terms_of(call: Call, many: Stacked, table: Spread) -> tuple[DenseTerm, ...]:
    return tuple(DenseTerm(call.node, y, weight_of(call, table, e)) for e, y in enumerate(many.nodes))


# -- from tokens to rows --------------------------------------------------------------------


def gather(run: Interpreter, node: Node, total: DenseSum) -> Sum | Unknown:
    """The sum with rows of chosen tokens in place of all tokens, for `sums.finish` to judge."""
    if len(total.terms) < 2:
        return Unknown("a single expert runs on all tokens")
    ids = total.terms[0].weight.ids
    if any(t.weight.ids is not ids for t in total.terms):
        return Unknown("the experts of a dense sum are weighed by different ids")
    roles = {t.weight.role for t in total.terms}
    if roles & {"column", "any"} and (repeated := not_distinct(run, ids)):
        what = "has one entry in the table of weights" if "column" in roles else "counts once"
        return Unknown(f"a token that chose an expert twice {what}: {repeated}")
    needed = [ancestors(t.value) for t in total.terms]
    times = collections.Counter(n for mine in needed for n in mine)
    inside = [{n for n in mine if times[n] == 1} for mine in needed]
    span = {n for own in inside for n in own}
    if why := not_pure(run, node, span):
        return Unknown(why)
    rows = []
    for t, own in zip(total.terms, inside, strict=True):
        found = _Rows(run, t, own).result()
        if isinstance(found, Unknown):
            return found
        rows.append(found)
    run.inside |= span
    start = total.start or Buffer(node, "zero")
    return Sum(start, tuple(rows))


class _Rows:
    """One expert's part of the graph, read again with rows of tokens."""

    def __init__(self, run: Interpreter, term: DenseTerm, own: set[Node]) -> None:
        self.run, self.term, self.own = run, term, own
        w = term.weight
        self.selection = Selection(w.ids, w.expert, w.classes, "pair")
        self.made: dict[Node, Value] = {}

    def result(self) -> Rows | Unknown:
        for node in self.run.graph.nodes:
            if node in self.own and node.op == "call_function":
                self.made[node] = value = self._value(node)
                if isinstance(value, Unknown):
                    return value
        y = self.made.get(self.term.value)
        if not isinstance(y, Rows) or y.dim != 0 or y.expr.level != "row":
            return Unknown(f"{self.term.value.name} is not one value a token")
        dtype = self.term.node.meta["val"].dtype
        val = self.term.value.meta["val"].to(dtype)
        if self.term.weight.role in ("one", "any"):
            same = y.expr.val.dtype == dtype
            return y if same else Rows(self.selection, self.run.table.call(aten.to.dtype, (y.expr, dtype), {}, val))
        return Rows(self.selection, self.run.table.call(aten.mul.Tensor, (y.expr, self._weight(val)), {}, val))

    def _weight(self, like: Tensor) -> Expr:
        weight, table = self.term.weight, self.run.table
        leaf = table.leaf(weight.role, weight.node, weight.node.meta["val"].select(1, 0))
        for dim in range(1, like.dim()):
            leaf = table.call(aten.unsqueeze.default, (leaf, dim), {}, leaf.val.unsqueeze(dim))
        return leaf

    def _value(self, node: Node) -> Value:
        known = self.run.values[node]
        if not isinstance(known, Plain):
            return known
        call = Call(node, op_of(node), [], {}, self.run)
        call.args, call.kwargs = [self._arg(a) for a in node.args], {k: self._arg(a) for k, a in node.kwargs.items()}
        if not any(isinstance(v, Rows | RowTuple) for v in _flat([call.args, list(call.kwargs.values())])):
            return known
        for rule in self.run.rules.get(call.op, ()):
            if (value := rule(call)) is not None:
                return value
        return Unknown(f"{name_of(node)} is not known to be row-wise")

    def _arg(self, arg: Any) -> Any:
        if isinstance(arg, (tuple, list)):
            return [self._arg(a) for a in arg]
        if not isinstance(arg, Node):
            return arg
        if arg in self.made:
            return self.made[arg]
        value, val = self.run.values[arg], arg.meta.get("val")
        tokens = self.selection.ids.meta["val"].shape[:1]  # type: ignore[union-attr]
        if isinstance(value, Plain) and isinstance(val, Tensor) and val.dim() > 1:
            if same_size(val.shape[0], tokens[0]):
                return Rows(self.selection, self.run.table.leaf("token", self.run.canonical[arg], val))
        return value


def ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    stack = [node]
    while stack:
        at = stack.pop()
        if at not in found:
            found.add(at)
            stack += at.all_input_nodes
    return found


def not_pure(run: Interpreter, site: Node, span: set[Node]) -> str | None:
    """Why the experts' part of the graph cannot be read again, or None."""
    first = next((n for n in run.graph.nodes if n in span and n.op == "call_function"), None)
    outer = {s for n in run.graph.nodes if n not in span for s in storages(n)}
    between = False
    for node in run.graph.nodes:
        between |= node is first
        if node is site:
            break
        if between and node.target is torch._C._set_grad_enabled:
            return "the grad mode changes among the experts of a dense sum"
        if node.target is torch.amp.autocast_mode._enter_autocast:
            return "a dense sum is near an autocast region"
        schema = getattr(node.target, "_schema", None)
        if node in span and schema is not None and schema.is_mutable:
            if storages(node) & outer:
                return f"{name_of(node)} changes a value outside of the expert"
    return None


def _flat(tree: Any) -> Iterable[Any]:
    return [x for a in tree for x in _flat(a)] if isinstance(tree, (list, tuple)) else [tree]


RULES: dict[str, tuple[Rule, ...]] = {
    **{op: (scatter,) for op in ("scatter", "scatter_", "scatter_add", "scatter_add_")},
    **{op: (keeps_zeros,) for op in ("to", "_to_copy", "div", "true_divide")},
    "mul": (weigh_stack, term, unweighed, keeps_zeros),
    **{op: (shape,) for op in ("unsqueeze", "view", "reshape", "t", "transpose", "permute", "select", "slice")},
    "unbind": (split,),
    **{op: (add,) for op in ("add", "add_")},
    "stack": (stack,),
    "sum": (sum_stack,),
    "einsum": (einsum,),
}
