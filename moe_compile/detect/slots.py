"""Rules for tables [T, E, C] that say the slot of each token at its expert, as GShard writes them.

    mask    = one_hot(ids, E)                                # [T, E]
    places  = cumsum(mask, 0) - 1                            # [T, E]: how many tokens before this one chose e
    mask    = mask * (places < C)                            # those who came too late chose nobody
    at      = (places * mask).sum(1)                         # [T]
    combine = gates[:, None, None] * mask[:, :, None] * one_hot(at, C)[:, None, :]

For a second choice of each token the places begin where those of the first end: places2 + mask.sum(0).

A token's place is a count of those before it at the same expert, so no two tokens have one slot: `disjoint`.  What is
not zero in such a table is one number for each choice of a token, which is written again as a vector: `number_of`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.interpreter import Call, Interpreter, Rule, op_of
from moe_compile.detect.selection import same_size, some_of
from moe_compile.detect.values import Dense, Dim, Member, Plain, Positions, Value
from moe_compile.region import ids_kept
from moe_compile.rewrite import emit

aten = torch.ops.aten
EXACT = (torch.int64, torch.int32, torch.float32, torch.float64)  # that count to more than any capacity


# -- values ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """How many of `ids` [T] chose an expert, up to a token and with it, plus `shift`, plus all in each of `base`."""

    ids: Node
    shift: int = 0
    base: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Places(Dense):
    """A count for each token and expert, or for each token that of its own; it holds for the tokens of `valid`.

    masked: it is zero for the experts that a token did not choose by `valid`, and for others' tokens.
    below: it was clamped to less than that; positive: and not to less than zero.
    """

    count: Count
    dims: tuple[Dim, ...]
    valid: Node
    masked: bool = False
    below: Any = None
    positive: bool = False


@dataclass(frozen=True)
class Early(Dense):
    """Whether a count is less than `bound`, for the tokens of `valid`."""

    count: Count
    valid: Node
    bound: Any
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Number:
    """What one choice of a token has in a table: op of `args`, in `dtype`.

    op: "one"; "entry" of a node, whose dimensions are `dims`; or an ATen op of numbers.
    """

    op: Any
    dtype: torch.dtype
    args: tuple[Any, ...] = ()
    dims: tuple[Dim, ...] = ()


@dataclass(frozen=True)
class Term:
    """One choice of each token: zero for tokens that are nobody's by `ids`.

    by_expert: zero for other experts than the token's.  place: zero for other places than its own.
    """

    ids: Node | None
    number: Number
    by_expert: bool = False
    place: Places | None = None


@dataclass(frozen=True)
class Slots(Dense):
    """A table that is the sum of its terms; dims: of 0, "e", "c" and "one", "ec" for two in one.

    wide: of a table with "ec", the node of one with its dimensions apart, and these.
    """

    dims: tuple[Dim, ...]
    terms: tuple[Term, ...]
    wide: tuple[Node, tuple[Dim, ...]] | None = None


# -- places ---------------------------------------------------------------------------------


def running(call: Call) -> Value | None:
    """cumsum(mask, 0)."""
    mask = call.arg(0)
    if not _is_table(mask) or mask.ids.meta["val"].dim() != 1 or mask.dims != (0, "e"):
        return None
    if call.number(1, "dim") not in (0, -2) or call.val().dtype not in EXACT:
        return None
    return Places(Count(mask.ids), mask.dims, mask.ids)


def moved(call: Call) -> Value | None:
    """places - 1, places + mask.sum(0)."""
    places, other = call.arg(0), call.number(1, "other")
    if not isinstance(places, Places) or places.masked or places.below is not None or places.dims != (0, "e"):
        return None
    if call.number(2, "alpha", 1) != 1 or call.val().dtype not in EXACT or call.val().dim() != 2:
        return None
    count, more = places.count, call.arg(1)
    if type(other) in (int, float) and math.isfinite(other) and other == int(other):
        step = int(other) if call.op.startswith("add") else -int(other)
        return replace(places, count=replace(count, shift=count.shift + step))
    total = isinstance(more, Member) and more.kind == "count" and more.dims in (("e",), ("one", "e"))
    if not total or not _counts_exactly(call.node.args[1]):
        return None
    if call.op.startswith("add") and more.expert is None and more.ids.meta["val"].dim() == 1:
        return replace(places, count=replace(count, base=(*count.base, more.ids)))
    return None


def _counts_exactly(node: Any) -> bool:
    """Whether a sum of a mask was of a dtype that counts that far, and stayed one."""
    while op_of(node) != "sum":
        if (
            op_of(node) not in ("to", "_to_copy", "long", "int", "float", "unsqueeze")
            or node.meta["val"].dtype not in EXACT
        ):
            return False
        node = node.args[0]
    return node.meta["val"].dtype in EXACT


def own(call: Call) -> Value | None:
    """places * mask: zero for the experts that the token did not choose."""
    for i in (0, 1):
        places, mask = call.arg(i), call.arg(1 - i)
        if not isinstance(places, Places) or not _is_table(mask) or places.dims != (0, "e") or mask.dims != (0, "e"):
            continue
        if call.val().dtype not in EXACT or (i and _in_place(call)) or not some_of(call.run, mask.ids, places.valid):
            continue
        return replace(places, valid=mask.ids, masked=True)
    return None


def of_token(call: Call) -> Value | None:
    """(places * mask).sum(1), mask.sum(1)."""
    value, dims = call.arg(0), call.number(1, "dim")
    dims = dims if isinstance(dims, list) else [dims]
    of_expert = isinstance(value, Places | Slots) or _is_table(value)
    if not of_expert or value.dims != (0, "e") or dims not in ([1], [-1]) or _no_grad(call):
        return None
    keep = bool(call.number(2, "keepdim", False))
    left: tuple[Dim, ...] = (0, "one") if keep else (0,)
    if isinstance(value, Places):
        return replace(value, dims=left) if value.masked and call.val().dtype in EXACT else None
    table = as_slots(call.val(call.node.args[0]).dtype, value)
    if table is None or not all(t.by_expert for t in table.terms) or len(table.terms) != 1:
        return None
    only = table.terms[0]
    return Slots(left, (replace(only, by_expert=False, number=_cast(only.number, call.val().dtype)),))


def clamped(call: Call) -> Value | None:
    """places.clamp(0, C - 1): those that are early have theirs."""
    places = call.arg(0)
    low, high = call.number(1, "min"), call.number(2, "max")
    if call.op.startswith("clamp_m"):
        low, high = (call.number(1), None) if "min" in call.op else (None, call.number(1))
    if not isinstance(places, Places) or places.below is not None or places.count.shift < -1:
        return None
    if not (low is None or (type(low) in (int, float) and low <= 0)) or not (high is None or type(high) is int):
        return None
    positive = type(low) in (int, float) and low == 0 and (high is None or high >= 0)
    return replace(
        places, masked=places.masked and positive, below=None if high is None else high + 1, positive=positive
    )


def early(call: Call) -> Value | None:
    """places < C, places <= C - 1."""
    places, bound = call.arg(0), bound_of(call)
    if not isinstance(places, Places) or bound is None or places.below is not None:
        return None
    if call.op in ("le", "less_equal"):
        bound = bound + 1 if isinstance(bound, int | torch.SymInt) else math.floor(bound) + 1
    elif isinstance(bound, float):
        bound = math.ceil(bound)
    return Early(places.count, places.valid, bound, places.dims)


def bound_of(call: Call) -> Any:
    """The number that is compared with: of Python, or a size."""
    number = call.number(1, "other")
    if type(number) in (int, float) and math.isfinite(number):
        return number
    node = call.node.args[1] if len(call.node.args) > 1 else None
    val = node.meta.get("val") if isinstance(node, Node) else None
    return val if isinstance(val, torch.SymInt) else None


def one_hot(call: Call) -> Value | None:
    """one_hot(at, C): the place of each token, none of which is outside of [0, C)."""
    at, slots = call.arg(0), call.val()
    if not isinstance(at, Places) or at.dims not in ((0,), (0, "e")) or not isinstance(slots, Tensor):
        return None
    capacity, bound = slots.shape[-1], cut_of(call.run, at.valid, at.count)
    inside = at.masked and bound is not None and at_most(bound, capacity) and at.count.shift >= -1
    if not inside and not (at.positive and at.below is not None and at_most(at.below, capacity)):
        return None
    return Slots((*at.dims, "c"), (Term(None, Number("one", slots.dtype), place=at),))


def is_place(call: Call) -> Value | None:
    """at[:, None] == arange(C)."""
    for at, slots in ((call.arg(0), call.arg(1)), (call.arg(1), call.arg(0))):
        if isinstance(at, Places) and isinstance(slots, Positions) and slots.shape == "all":
            if at.dims not in ((0, "one"), (0, "e", "one")) or call.val().dim() != len(at.dims):
                return None
            at = replace(at, dims=at.dims[:-1])
            return Slots((*at.dims, "c"), (Term(None, Number("one", torch.bool), place=at),))
    return None


# -- tables ---------------------------------------------------------------------------------


def as_slots(dtype: torch.dtype, value: Any) -> Slots | None:
    """A table as a sum of terms; a mask of `dtype` as one."""
    if isinstance(value, Slots):
        return value
    if not _is_table(value, "one") or value.ids.meta["val"].dim() != 1:
        return None
    return Slots(value.dims, (Term(value.ids, Number("one", dtype), by_expert=True),))


def product(call: Call) -> Value | None:
    """table * table, table * plain: zero where one of them is."""
    values, nodes = call.args[:2], call.node.args[:2]
    if _in_place(call) or call.kwargs or not any(isinstance(v, Slots | Member) for v in values) or _no_grad(call):
        return None
    if not all(isinstance(n, Node) for n in nodes):
        return _scaled(call)
    left, right = (_factor(call, v, n) for v, n in zip(values, nodes, strict=True))
    if isinstance(left, Slots) and isinstance(right, Slots):
        if len(left.terms) != 1 or len(right.terms) != 1:
            return None
        dims, one = _joined(left.dims, right.dims), _both(call.run, left.terms[0], right.terms[0], call.val().dtype)
        return Slots(dims, (one,)) if dims is not None and one is not None else None
    table, other = (left, right) if isinstance(left, Slots) else (right, left)
    if not isinstance(table, Slots) or not isinstance(other, Plain):
        return None
    entry = _entry(call, table, other.node)
    dtype = call.val().dtype
    if entry is None or len(table.dims) != call.val().dim() or not call.val().is_floating_point():
        return None
    dims = _joined(table.dims, ("one",) * (len(table.dims) - len(entry.dims)) + entry.dims)
    if dims is None:
        return None
    return Slots(dims, tuple(replace(t, number=_times(t.number, entry, dtype)) for t in table.terms))


def quotient(call: Call) -> Value | None:
    """table / plain."""
    table, other = call.arg(0), call.arg(1)
    if not isinstance(table, Slots) or call.kwargs or _in_place(call) or _no_grad(call):
        return None
    if type(other) in (int, float) and other != 0:
        return _scaled(call)
    if not isinstance(other, Plain) or (entry := _entry(call, table, other.node)) is None:
        return None
    if len(table.dims) != call.val().dim() or not call.val().is_floating_point():
        return None
    if _joined(table.dims, ("one",) * (len(table.dims) - len(entry.dims)) + entry.dims) != table.dims:
        return None
    div = lambda n: Number(aten.div.Tensor, call.val().dtype, (n, entry))  # noqa: E731
    return Slots(table.dims, tuple(replace(t, number=div(t.number)) for t in table.terms))


def _scaled(call: Call) -> Value | None:
    table, number = call.arg(0), call.arg(1)
    if not isinstance(table, Slots) or type(number) not in (int, float) or not math.isfinite(number):
        return None
    if not call.val().is_floating_point():
        return None
    scaled = lambda n: Number(call.node.target, call.val().dtype, (n, number))  # noqa: E731
    return Slots(table.dims, tuple(replace(t, number=scaled(t.number)) for t in table.terms))


def added(call: Call) -> Value | None:
    """table + table: those of the first choices and of the second."""
    values, nodes = call.args[:2], call.node.args[:2]
    if _in_place(call) or call.number(2, "alpha", 1) != 1 or not all(isinstance(v, Slots) for v in values):
        return None
    dtypes = {call.val(n).dtype for n in nodes} | {call.val().dtype}
    if values[0].dims != values[1].dims or "c" not in values[0].dims or len(dtypes) != 1 or _no_grad(call):
        return None
    return Slots(values[0].dims, (*values[0].terms, *values[1].terms))


def converted(call: Call) -> Value | None:
    """A change of dtype, or a copy."""
    table, val = call.arg(0), call.val()
    if isinstance(table, Places):
        return table if val.dtype in EXACT else None
    if isinstance(table, Early):
        return table
    if not isinstance(table, Slots) or _no_grad(call):
        return None
    return Slots(table.dims, tuple(replace(t, number=_cast(t.number, val.dtype)) for t in table.terms))


def truths(call: Call) -> Value | None:
    """table > 0, table != 0."""
    table, number = call.arg(0), call.number(1, "other")
    if not isinstance(table, Slots) or type(number) not in (int, float) or number != 0:
        return None
    made = lambda n: n if n.op == "one" and n.dtype == torch.bool else Number(call.node.target, torch.bool, (n, 0))  # noqa: E731
    return Slots(table.dims, tuple(replace(t, number=made(t.number)) for t in table.terms))


def reshaped(call: Call) -> Value | None:
    """table[:, :, None], table[:]."""
    table = call.arg(0)
    if not isinstance(table, Slots | Places | Early):
        return None
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
    if not isinstance(table, Slots):
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


def outer(call: Call) -> Value | None:
    """bmm of [T, E, 1] with [T, 1, C]."""
    values, nodes = call.args[:2], call.node.args[:2]
    if len(call.args) != 2 or call.kwargs or _no_grad(call):
        return None
    left, right = (_factor(call, v, n) for v, n in zip(values, nodes, strict=True))
    if not (isinstance(left, Slots) and isinstance(right, Slots)) or len(left.terms) != 1 or len(right.terms) != 1:
        return None
    if left.dims[2:] != ("one",) or right.dims[1:2] != ("one",) or left.dims[0] != 0 or len(right.dims) != 3:
        return None
    dims, one = _joined(left.dims, right.dims), _both(call.run, left.terms[0], right.terms[0], call.val().dtype)
    return Slots(dims, (one,)) if dims is not None and one is not None else None


def einsum(call: Call) -> Value | None:
    """einsum("se,sc->sec", ...), einsum("s,se->se", ...), einsum("se,se->s", ...), with any letters."""
    equation, operands, nodes = call.arg(0), call.arg(1), call.node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, list) or len(operands) != 2 or _no_grad(call):
        return None
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if not arrow or "." in equation or any(len(set(term)) < len(term) for term in (*letters, result)):
        return None
    values = [_factor(call, v, n) for v, n in zip(operands, nodes, strict=True)]  # type: ignore[arg-type]
    names: dict[str, Dim] = {}
    sizes: dict[str, Any] = {}
    for value, mine, node in zip(values, letters, nodes, strict=True):  # type: ignore[arg-type]
        if isinstance(value, Slots):
            if len(value.terms) != 1 or any(names.setdefault(n, d) != d for n, d in zip(mine, value.dims, strict=True)):
                return None
            sizes |= dict(zip(mine, call.val(node).shape, strict=True))
    if not names or len(set(names.values())) < len(names) or set(names.values()) - {0, "e", "c"}:
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
    first = terms[0] if len(terms) == 1 else _both(call.run, terms[0], terms[1], dtype)
    if first is None or not set(result) <= set(names):
        return None
    for number in numbers:
        first = replace(first, number=_times(first.number, number, dtype))
    gone = {names[n] for n in names if n not in result}
    if gone - {"e"} or (gone and not first.by_expert):
        return None
    return Slots(tuple(names[n] for n in result), (replace(first, by_expert=first.by_expert and not gone),))


# -- help -----------------------------------------------------------------------------------


def _is_table(value: Any, *more: str) -> bool:
    """A mask of zeros and ones [T, E]."""
    if not isinstance(value, Member) or value.expert is not None or value.kind != "mask":
        return False
    return tuple(d for d in value.dims if d not in more) == (0, "e")


def _in_place(call: Call) -> bool:
    return call.op.endswith("_") and not call.op.endswith("__")


def _no_grad(call: Call) -> bool:
    """Whether numbers are computed here in another grad mode or autocast than where they are written again."""
    val = call.val()
    floats = isinstance(val, Tensor) and val.is_floating_point()
    return floats and bool(call.run.autocasts or call.run.no_grad)


def _factor(call: Call, value: Any, node: Any) -> Any:
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


# -- what is shown of whole tables ----------------------------------------------------------


def whole(table: Slots) -> bool:
    """Whether every term says its token, expert and place."""
    fits = sorted(map(str, table.dims)) in (["0", "c", "e"], ["0", "ec"])
    return fits and all(t.ids is not None and t.by_expert and t.place is not None for t in table.terms)


def sizes_of(table: Slots, node: Node) -> tuple[Any, Any, Any]:
    """T, E and C of a whole table."""
    wide, dims = table.wide or (node, table.dims)
    sizes = wide.meta["val"].shape
    return tuple(sizes[dims.index(d)] for d in (0, "e", "c"))  # type: ignore[return-value]


def not_disjoint(run: Interpreter, table: Slots, capacity: Any) -> str | None:
    """Why two tokens might have one slot, or a token none where the program has an error; None if neither can be.

    Choice j of a token has the places behind all those of the choices before it, whether these count the late ones or
    not: if some are late, the others fill all places.
    """
    before: tuple[Node, ...] = ()
    terms = sorted(table.terms, key=lambda t: len(t.place.count.base))  # type: ignore[union-attr]
    for earlier, term in zip([None, *terms], terms, strict=False):
        assert term.place is not None and term.ids is not None
        count = term.place.count
        if earlier is not None:
            first = earlier.place.count  # type: ignore[union-attr]
            last = count.base[-1:]
            counted = bool(last) and (last[0] is first.ids or _all_kept(run, last[0], earlier))  # type: ignore[arg-type]
            if count.base[:-1] != before or not counted or count.shift != first.shift:
                return "the places of a later choice are not behind those of the choices before it"
        elif count.base:
            return "the places of the first choice begin behind others"
        before = count.base
        if count.shift < -1:
            return "places begin below zero"
        if not some_of(run, term.ids, term.place.valid):
            return "tokens have a slot whose place is not theirs"
        bound = cut_of(run, term.ids, count)
        if bound is None:
            return "tokens whose place is behind the last slot are not shown to be dropped"
        if not at_most(bound, capacity) or not (term.place.below is None or at_most(bound, term.place.below)):
            return f"tokens are dropped from place {bound} on, there are {capacity} slots"
    return None


def at_most(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a <= b
    return same_size(a, b)


def cut_of(run: Interpreter, ids: Node | None, count: Count) -> Any:
    """The place from which on tokens of `ids` are nobody's, or None."""
    while ids is not None and ids.target is ids_kept:
        table, before = ids.args[1], run.written.get(ids)
        for factor in table.all_input_nodes if isinstance(table, Node) else []:
            value = run.values.get(factor)
            if isinstance(value, Early) and value.count == count and value.dims == (0, "e"):
                if some_of(run, before, value.valid):
                    return value.bound
        ids = before
    return None


def _all_kept(run: Interpreter, ids: Node, term: Term) -> bool:
    """Whether `ids` are those that a term counted, without those from some place on, but with all that it keeps."""
    count = term.place.count  # type: ignore[union-attr]
    mine, theirs = cut_of(run, term.ids, count), cut_of(run, ids, count)
    return run.written.get(ids) is count.ids and None not in (mine, theirs) and at_most(mine, theirs)


# -- numbers, written again -----------------------------------------------------------------


def number_of(run: Interpreter, site: Node, ids: Node, number: Number) -> Node | None:
    """The number of each token [T] as a node before `site`; None if what it reads has changed since."""

    def call(target: Any, *args: Any) -> Node:
        with run.graph.inserting_before(site):
            made = emit(run.graph, target, *args, like=site)
        run.written[made] = None
        return made

    def cast(node: Node, dtype: torch.dtype) -> Node:
        return node if node.meta["val"].dtype == dtype else call(aten.to.dtype, node, dtype)

    def written(n: Number) -> Node | None:
        if n.op == "one":
            return call(aten.ones_like.default, cast(ids, n.dtype))
        if n.op == "entry":
            return _read(call, run, ids, n)
        args = [written(a) if isinstance(a, Number) else a for a in n.args]
        if any(a is None for a in args):
            return None
        if n.op is aten.to.dtype:
            return cast(args[0], n.dtype)  # type: ignore[arg-type]
        if n.op in (aten.mul.Tensor, aten.div.Tensor):
            args = [cast(a, n.dtype) if isinstance(a, Node) else a for a in args]
        return call(n.op, *args)

    return written(number)


def _read(call: Any, run: Interpreter, ids: Node, entry: Number) -> Node | None:
    """Entry (t, ids[t]) of a factor."""
    node = entry.args[0]
    if not run.unchanged(node):
        return None
    left = [d for d in entry.dims if d != "one"]
    for at in reversed(range(len(entry.dims))):
        if entry.dims[at] == "one":
            node = call(aten.select.int, node, at, 0)
    if left in ([], [0]):
        return node if left else call(aten.mul.Tensor, call(aten.ones_like.default, ids), node)
    index = call(aten.to.dtype, call(aten.clamp.default, ids, 0), torch.int64)
    if left == ["e"]:
        return call(aten.index_select.default, node, 0, index)
    if left == ["e", 0]:
        node = call(aten.t.default, node)
    return call(aten.squeeze.dim, call(aten.gather.default, node, 1, call(aten.unsqueeze.default, index, 1)), 1)


RULES: dict[str, tuple[Rule, ...]] = {
    "cumsum": (running,),
    **{op: (moved, added) for op in ("add", "add_")},
    **{op: (moved,) for op in ("sub", "sub_")},
    **{op: (own, product) for op in ("mul", "multiply")},
    "mul_": (own,),
    "sum": (of_token,),
    **{op: (clamped,) for op in ("clamp", "clamp_min", "clamp_max")},
    **{op: (early,) for op in ("lt", "less", "le", "less_equal")},
    "one_hot": (one_hot,),
    "eq": (is_place,),
    **{op: (quotient,) for op in ("div", "true_divide")},
    **{op: (converted,) for op in "to _to_copy bool long int float type_as contiguous clone".split()},
    **{op: (truths,) for op in ("gt", "greater", "ne", "not_equal")},
    **{op: (reshaped,) for op in ("unsqueeze", "slice", "squeeze")},
    **{op: (turned,) for op in ("permute", "transpose", "t")},
    **{op: (flattened,) for op in ("view", "reshape")},
    **{op: (outer,) for op in ("bmm", "matmul")},
    "einsum": (einsum,),
}
