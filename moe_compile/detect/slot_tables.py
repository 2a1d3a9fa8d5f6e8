"""Rules for tables of slots (slots.py): products of masks, gates and places, their sums, casts and shapes."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.ids import some_of
from moe_compile.detect.interpreter import Call, Interpreter, Rule
from moe_compile.detect.nodes import op_of
from moe_compile.detect.shapes import same_size
from moe_compile.detect.slots import EXACT, Early, Number, Places, Slots, Term, in_place, is_table
from moe_compile.detect.values import Column, Dim, Member, Plain, Value

aten = torch.ops.aten


def as_slots(dtype: torch.dtype, value: Any) -> Slots | None:
    """A table as a sum of terms; a mask of `dtype` as one."""
    if isinstance(value, Slots):
        return value
    if not is_table(value, "one", any_order=True):
        return None
    return Slots(value.dims, (Term(value.ids, Number("one", dtype), by_expert=True),))


def product(call: Call) -> Value | None:
    """table * table, table * plain: zero where one of them is."""
    values, nodes = call.args[:2], call.node.args[:2]
    if in_place(call) or call.kwargs or not any(isinstance(v, Slots | Member) for v in values) or _no_grad(call):
        return None
    if not all(isinstance(n, Node) for n in nodes):
        return _scaled(call)
    left, right = (_factor(call, v, n) for v, n in zip(values, nodes, strict=True))
    if isinstance(left, Slots) and isinstance(right, Slots):
        if len(left.terms) != 1 or len(right.terms) != 1 or left.summed or right.summed:
            return None
        dims, one = _joined(left.dims, right.dims), _both(call.run, left.terms[0], right.terms[0], call.val().dtype)
        fits = dims is not None and all(_spans(call, v.dims, n) for v, n in ((left, nodes[0]), (right, nodes[1])))
        return Slots(dims, (one,)) if fits and dims is not None and one is not None else None
    table, other = (left, right) if isinstance(left, Slots) else (right, left)
    if not isinstance(table, Slots) or not isinstance(other, Plain):
        return None
    entry = _entry(call, table, other.node)
    dtype = call.val().dtype
    if entry is None or not _spans(call, table.dims, nodes[0 if table is left else 1]):
        return None
    if not call.val().is_floating_point():
        return None
    dims = _joined(table.dims, ("one",) * (len(table.dims) - len(entry.dims)) + entry.dims)
    if dims is None:
        return None
    return Slots(
        dims, tuple(replace(t, number=_times(t.number, entry, dtype)) for t in table.terms), None, table.summed
    )


def quotient(call: Call) -> Value | None:
    """table / plain, which is not zero: 0 / 0 would not be zero."""
    table, other = call.arg(0), call.arg(1)
    if not isinstance(table, Slots) or call.kwargs or in_place(call) or _no_grad(call):
        return None
    if type(other) in (int, float) and other != 0:
        return _scaled(call)
    if not isinstance(other, Plain) or (entry := _entry(call, table, other.node)) is None:
        return None
    if not above_zero(call, call.node.args[1]) or not _spans(call, table.dims, call.node.args[0]):
        return None
    if len(table.dims) != call.val().dim() or not call.val().is_floating_point():
        return None
    if _joined(table.dims, ("one",) * (len(table.dims) - len(entry.dims)) + entry.dims) != table.dims:
        return None
    div = lambda n: Number(aten.div.Tensor, call.val().dtype, (n, entry))  # noqa: E731
    return Slots(table.dims, tuple(replace(t, number=div(t.number)) for t in table.terms), None, table.summed)


def _scaled(call: Call) -> Value | None:
    table, number = call.arg(0), call.arg(1)
    if not isinstance(table, Slots) or type(number) not in (int, float) or not math.isfinite(number):
        return None
    if call.val().dim() != len(table.dims):
        return None
    if not call.val().is_floating_point():
        return None
    scaled = lambda n: Number(call.node.target, call.val().dtype, (n, number))  # noqa: E731
    return Slots(table.dims, tuple(replace(t, number=scaled(t.number)) for t in table.terms), None, table.summed)


def added(call: Call) -> Value | None:
    """table + table: those of the first choices and of the second."""
    values, nodes = call.args[:2], call.node.args[:2]
    if in_place(call) or call.number(2, "alpha", 1) != 1 or not all(isinstance(v, Slots) for v in values):
        return None
    dtypes = {call.val(n).dtype for n in nodes} | {call.val().dtype}
    if values[0].dims != values[1].dims or "c" not in values[0].dims or len(dtypes) != 1 or _no_grad(call):
        return None
    if values[0].summed or values[1].summed:
        return None  # each choice may have the place of another
    return Slots(values[0].dims, (*values[0].terms, *values[1].terms))


def outer(call: Call) -> Value | None:
    """bmm of [T, E, 1] with [T, 1, C]."""
    values, nodes = call.args[:2], call.node.args[:2]
    if len(call.args) != 2 or call.kwargs or _no_grad(call):
        return None
    left, right = (_factor(call, v, n) for v, n in zip(values, nodes, strict=True))
    if not (isinstance(left, Slots) and isinstance(right, Slots)) or len(left.terms) != 1 or len(right.terms) != 1:
        return None
    if (
        left.summed
        or right.summed
        or left.dims[2:] != ("one",)
        or right.dims[1:2] != ("one",)
        or left.dims[0] != 0
        or len(right.dims) != 3
    ):
        return None
    dims, one = _joined(left.dims, right.dims), _both(call.run, left.terms[0], right.terms[0], call.val().dtype)
    fits = dims is not None and same_size(call.val(nodes[0]).shape[0], call.val(nodes[1]).shape[0])
    return Slots(dims, (one,)) if fits and dims is not None and one is not None else None


def einsum(call: Call) -> Value | None:
    """einsum("se,sc->sec", ...), einsum("s,se->se", ...), einsum("se,se->s", ...), with any letters."""
    equation, operands, nodes = call.arg(0), call.arg(1), call.node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, list) or _no_grad(call):
        return None
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if not arrow or "." in equation or any(len(set(term)) < len(term) for term in (*letters, result)):
        return None
    if len(letters) != len(operands) or len(operands) not in (2, 3):
        return None
    values = [_factor(call, v, n) for v, n in zip(operands, nodes, strict=True)]  # type: ignore[arg-type]
    names: dict[str, Dim] = {}
    sizes: dict[str, Any] = {}
    for value, mine, node in zip(values, letters, nodes, strict=True):  # type: ignore[arg-type]
        if isinstance(value, Slots):
            if (
                len(value.terms) != 1
                or value.summed
                or any(names.setdefault(n, d) != d for n, d in zip(mine, value.dims, strict=True))
            ):
                return None
            sizes |= dict(zip(mine, call.val(node).shape, strict=True))
    if not names or len(set(names.values())) < len(names) or set(names.values()) - {0, 1, "e", "c"}:
        return None
    dtype, terms, numbers = call.val().dtype, list[Term](), list[Number]()
    for value, mine, node in zip(values, letters, nodes, strict=True):  # type: ignore[arg-type]
        if any(n not in names or not same_size(sizes[n], s) for n, s in zip(mine, call.val(node).shape, strict=True)):
            return None
        if isinstance(value, Slots):
            terms.append(value.terms[0])
        elif isinstance(value, Plain) and dtype.is_floating_point and all(names[n] != "c" for n in mine):
            numbers.append(Number("entry", call.val(node).dtype, (value.node,), tuple(names[n] for n in mine)))
        else:
            return None
    first: Term | None = terms[0]
    for term in terms[1:]:
        first = first and _both(call.run, first, term, dtype)
    if first is None or not set(result) <= set(names):
        return None
    for number in numbers:
        first = replace(first, number=_times(first.number, number, dtype))
    gone = {names[n] for n in names if n not in result}
    if gone == {1}:
        return _summed(tuple(names[n] for n in result), first)
    if gone - {"e"} or (gone and not first.by_expert):
        return None
    return Slots(tuple(names[n] for n in result), (replace(first, by_expert=first.by_expert and not gone),))


# -- casts and shapes -----------------------------------------------------------------------


def of_token(call: Call) -> Value | None:
    """(places * mask).sum(-1), mask.sum(-1): of each token; table.sum(1): of all choices of a token."""
    value, dims = call.arg(0), call.number(1, "dim")
    dims = dims if isinstance(dims, list) else [dims]
    if not (isinstance(value, Places | Slots) or is_table(value, any_order=True)) or _no_grad(call):
        return None
    if len(dims) != 1 or type(dims[0]) is not int or (isinstance(value, Slots) and value.summed):
        return None
    at, keep = dims[0] % len(value.dims), bool(call.number(2, "keepdim", False))
    rest = (*value.dims[:at], *value.dims[at + 1 :])
    left: tuple[Dim, ...] = (*rest, "one") if keep else rest
    if isinstance(value, Slots) and value.dims[at] == 1 and not keep:
        same = call.val().dtype == call.val(call.node.args[0]).dtype
        return _summed(left, value.terms[0]) if same and len(value.terms) == 1 else None
    if value.dims[at] != "e" or at != len(value.dims) - 1:
        return None
    if isinstance(value, Places):
        return replace(value, dims=left) if value.masked and call.val().dtype in EXACT else None
    table = as_slots(call.val(call.node.args[0]).dtype, value)
    if table is None or not all(t.by_expert for t in table.terms) or len(table.terms) != 1:
        return None
    only = table.terms[0]
    return Slots(left, (replace(only, by_expert=False, number=_cast(only.number, call.val().dtype)),))


def _summed(dims: tuple[Dim, ...], term: Term) -> Slots | None:
    """A sum over the choices of a token: a table if each choice has its expert and its place."""
    whole = sorted(map(str, dims)) == ["0", "c", "e"] and term.by_expert and term.place is not None
    if not whole or term.ids is None or term.ids.meta["val"].dim() != 2:
        return None
    return Slots(dims, (term,), summed=True)


def converted(call: Call) -> Value | None:
    """A change of dtype, or a copy."""
    table, val = call.arg(0), call.val()
    if isinstance(table, Places):
        return table if val.dtype in EXACT else None
    if isinstance(table, Early):
        return table
    if not isinstance(table, Slots) or _no_grad(call):
        return None
    return replace(table, terms=tuple(replace(t, number=_cast(t.number, val.dtype)) for t in table.terms))


def truths(call: Call) -> Value | None:
    """table > 0, table != 0."""
    table, number = call.arg(0), call.number(1, "other")
    if not isinstance(table, Slots) or type(number) not in (int, float) or number != 0:
        return None
    if call.val().dim() != len(table.dims):
        return None
    made = lambda n: n if n.op == "one" and n.dtype == torch.bool else Number(call.node.target, torch.bool, (n, 0))  # noqa: E731
    return replace(table, terms=tuple(replace(t, number=made(t.number)) for t in table.terms))


def reshaped(call: Call) -> Value | None:
    """table[:, :, None], table[:], places[:, None].expand(T, K, E)."""
    table = call.arg(0)
    if not isinstance(table, Slots | Places | Early):
        return None
    if call.op in ("expand", "expand_as"):
        if isinstance(table, Slots) or table.count.along != "any" or table.dims != (0, "one", "e"):
            return None
        before, after = call.val(call.node.args[0]).shape, call.val().shape
        sizes = (before[0], table.count.ids.meta["val"].shape[1], before[2])
        fits = len(after) == 3 and all(map(same_size, after, sizes))
        return replace(table, dims=(0, 1, "e")) if fits else None
    if call.op == "slice":
        before, after = call.val(call.node.args[0]).shape, call.val().shape
        begins = call.number(2, "start", None) in (0, None) and call.number(4, "step", 1) == 1
        return table if begins and all(map(same_size, before, after)) else None
    if call.op == "unsqueeze":
        at = call.number(1) % call.val().dim()
        return replace(table, dims=(*table.dims[:at], "one", *table.dims[at:]))
    if call.op == "squeeze" and len(call.args) == 2 and isinstance(dim := call.number(1), int):
        at = dim % len(table.dims)
        return replace(table, dims=(*table.dims[:at], *table.dims[at + 1 :])) if table.dims[at] == "one" else None
    return None


def turned(call: Call) -> Value | None:
    """table.permute(1, 2, 0), table.t()."""
    table = call.arg(0)
    if not isinstance(table, Slots | Places | Early):
        return None
    order = list(range(len(table.dims)))
    if call.op == "permute":
        order = [d % len(order) for d in call.arg(1)]
    else:
        a, b = (0, 1) if call.op == "t" else (call.number(1) % len(order), call.number(2) % len(order))
        if len(order) == 2 or call.op != "t":
            order[a], order[b] = order[b], order[a]
    return replace(table, dims=tuple(table.dims[d] for d in order))


def flattened(call: Call) -> Value | None:
    """table.view(T, E * C), table.view(T, E, 1)."""
    table, val = call.arg(0), call.val()
    if not isinstance(table, Slots) or val.dtype != call.val(call.node.args[0]).dtype:
        return None
    before = call.val(call.node.args[0]).shape
    if val.dim() == len(before) + 1 and all(map(same_size, val.shape, (*before, 1))):
        return replace(table, dims=(*table.dims, "one"))
    for dims, after in (((0, "e", "c"), (0, "ec")), (("e", "c", 0), ("ec", 0))):
        if table.dims == dims and val.dim() == 2 and same_size(val.shape[after.index(0)], before[dims.index(0)]):
            return replace(table, dims=after, wide=(call.node.all_input_nodes[0], dims))
    return None


# -- help -----------------------------------------------------------------------------------


def _no_grad(call: Call) -> bool:
    """Whether numbers are computed here in another grad mode or autocast than where they are written again."""
    val = call.val()
    floats = isinstance(val, Tensor) and val.is_floating_point()
    return floats and bool(call.run.autocasts or call.run.no_grad)


def _spans(call: Call, dims: tuple[Dim, ...], node: Any) -> bool:
    """Whether a product has the tokens, experts and slots of a factor: one of them alone is not that of all."""
    mine, whole = call.val(node).shape, call.val().shape
    return len(dims) == len(mine) == len(whole) and all(
        d == "one" or same_size(a, b) for d, a, b in zip(dims, mine, whole, strict=True)
    )


def above_zero(call: Call, node: Any) -> bool:
    """Whether it was clamped to a number above zero."""
    while op_of(node) in ("unsqueeze", "view", "reshape", "slice", "select", "expand") and call.run.unchanged(node):
        if node.meta["val"].dtype != node.args[0].meta["val"].dtype:
            return False
        node = node.args[0]
    low = node.args[1] if op_of(node) in ("clamp", "clamp_min") and len(node.args) > 1 else node.kwargs.get("min")
    tiny = torch.finfo(call.val(node).dtype).tiny if call.val(node).is_floating_point() else 1
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    return type(low) in (int, float) and low >= tiny and high is None and call.run.unchanged(node)


def _factor(call: Call, value: Any, node: Any) -> Any:
    if isinstance(value, Column):  # weights[:, 1]: a number for each token, as any
        return Plain(call.run.canonical[node])
    return as_slots(call.val(node).dtype, value) or value


def _joined(left: tuple[Dim, ...], right: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    """The dimensions of a product: of one length, each of one kind or single in one of them."""
    if len(left) != len(right):
        return None
    pairs = list(zip(left, right, strict=True))
    if any(a != b and "one" not in (a, b) for a, b in pairs):
        return None
    dims = tuple(b if a == "one" else a for a, b in pairs)
    return dims if all(dims.count(d) == 1 for d in dims if d != "one") else None


def _both(run: Interpreter, a: Term, b: Term, dtype: torch.dtype) -> Term | None:
    """The product of two terms: of tokens that are somebody's by both."""
    if a.place is not None and b.place is not None:
        return None
    if a.ids is None or (b.ids is not None and some_of(run, b.ids, a.ids)):
        ids = b.ids
    elif b.ids is None or some_of(run, a.ids, b.ids):
        ids = a.ids
    else:
        return None
    return Term(ids, _times(a.number, b.number, dtype), a.by_expert or b.by_expert, a.place or b.place)


def _times(a: Number, b: Number, dtype: torch.dtype) -> Number:
    if a.op == "one" or b.op == "one":
        return _cast(b if a.op == "one" else a, dtype)
    return Number(aten.mul.Tensor, dtype, (a, b))


def _cast(number: Number, dtype: torch.dtype) -> Number:
    if number.dtype == dtype:
        return number
    return Number("one", dtype) if number.op == "one" else Number(aten.to.dtype, dtype, (number,))


def _entry(call: Call, table: Slots, node: Node) -> Number | None:
    """A plain factor of a table, by the table's dimensions; one that the table has not yet can only be the experts'."""
    val, out = call.val(node), call.val()
    if not isinstance(val, Tensor) or val.dim() > out.dim() or val.dtype == torch.bool:
        return None
    dims = table.dims[len(table.dims) - val.dim() :] if val.dim() else ()
    sizes = out.shape[out.dim() - val.dim() :]
    found: list[Dim] = []
    for dim, mine, whole in zip(dims, val.shape, sizes, strict=True):
        single = isinstance(mine, int) and mine == 1
        if dim == "one" and "e" not in table.dims and "e" not in found and "ec" not in table.dims:
            dim = "e"
        if not single and (dim in ("one", "c", "ec") or not same_size(mine, whole)):
            return None
        found.append("one" if single else dim)
    return Number("entry", val.dtype, (node,), tuple(found))


RULES: dict[str, tuple[Rule, ...]] = {
    "add": (added,),
    **{op: (product,) for op in ("mul", "multiply")},
    **{op: (quotient,) for op in ("div", "true_divide")},
    **{op: (outer,) for op in ("bmm", "matmul")},
    "einsum": (einsum,),
    "sum": (of_token,),
    **{op: (converted,) for op in "to _to_copy bool long int float type_as contiguous clone".split()},
    **{op: (truths,) for op in ("gt", "greater", "ne", "not_equal")},
    **{op: (reshaped,) for op in ("unsqueeze", "slice", "squeeze", "expand", "expand_as")},
    **{op: (turned,) for op in ("permute", "transpose", "t")},
    **{op: (flattened,) for op in ("view", "reshape")},
}
