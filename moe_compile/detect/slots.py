"""Rules for tables [T, E, C] that say the slot of each token at its expert, as GShard writes them.

    mask    = one_hot(ids, E)                                # [T, E]
    places  = cumsum(mask, 0) - 1                            # [T, E]: how many tokens before this one chose e
    mask    = mask * (places < C)                            # those who came too late chose nobody
    at      = (places * mask).sum(1)                         # [T]
    combine = gates[:, None, None] * mask[:, :, None] * one_hot(at, C)[:, None, :]

For a second choice of each token the places begin where those of the first end: places2 + mask.sum(0).

Tokens may lie in groups, of which each has slots of its own: ids [G, S], cumsum(mask, 1), tables [G, S, E, C].  Or all
choices are in one mask [T, K, E], which is counted as a whole and summed over the choices:

    places  = cumsum(mask.view(T * K, E), 0).view(T, K, E) - 1    # or of [K * T, E], or cumsum(mask.sum(1), 0)
    combine = einsum("tke,tkc->tec", weights * mask, one_hot((places * mask).sum(2), C))

A token's place is a count of those before it at the same expert, so no two tokens have one slot: `disjoint`.  What is
not zero in such a table is one number for each choice of a token, which is written again as a vector: `number_of`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moe_compile.detect.dense_values import Dense, Positions
from moe_compile.detect.ids import some_of
from moe_compile.detect.interpreter import Call, Interpreter, Rule
from moe_compile.detect.marks import Marks
from moe_compile.detect.nodes import op_of
from moe_compile.detect.shapes import same_size
from moe_compile.detect.values import Dim, Member, Value
from moe_compile.region import ids_kept

EXACT = (torch.int64, torch.int32, torch.float32, torch.float64)  # that count to more than any capacity
FAR = 2**20  # numbers up to here are exact in all of them, and their sums


# -- values ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """How many of `ids` chose an expert, up to an entry and with it, plus `shift`, plus all in each of `base`.

    along: the dimension of the ids [T] or [T, K] that is counted along, for each entry of the other one alone; both, in
    the order in which they were counted, (0, 1) or (1, 0); or "any": tokens that chose it by any k.
    """

    ids: Node
    shift: int = 0
    base: tuple[Node, ...] = ()
    along: Any = 0


@dataclass(frozen=True)
class FlatMask(Dense):
    """A mask [T, K, E] as [T * K, E], or [K, T, E] as [K * T, E]; `order`: of the ids' dimensions."""

    ids: Node
    order: tuple[Dim, ...]


@dataclass(frozen=True)
class Places(Dense):
    """A count for each token and expert, or for each token that of its own; it holds for the tokens of `valid`.

    masked: it is zero for the experts that a token did not choose by `valid`, and for others' tokens.
    below: it was clamped to less than that; positive: and not to less than zero.  classes: of experts, in the mask.
    """

    count: Count
    dims: tuple[Dim, ...]
    valid: Node
    masked: bool = False
    below: Any = None
    positive: bool = False
    classes: Any = None


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
    summed: over dimension 1 of the ids, the choices of a token.
    """

    of_experts = True
    dims: tuple[Dim, ...]
    terms: tuple[Term, ...]
    wide: tuple[Node, tuple[Dim, ...]] | None = None
    summed: bool = False


# -- places ---------------------------------------------------------------------------------


def running(call: Call) -> Value | None:
    """cumsum(mask, 0), cumsum(mask.sum(1), 0), and of masks [T * K, E]."""
    mask, dim, before = call.arg(0), call.number(1, "dim"), call.val(call.node.args[0])
    if call.val().dtype not in EXACT or type(dim) is not int:
        return None
    dim %= call.val().dim()
    if isinstance(mask, FlatMask):
        return Places(Count(mask.ids, along=mask.order), (flat(mask.order), "e"), mask.ids) if dim == 0 else None
    if not isinstance(mask, Member) or mask.expert is not None:
        return None
    rank = mask.ids.meta["val"].dim()
    if is_table(mask):
        classes = call.val().shape[-1]
        return Places(Count(mask.ids, along=dim), mask.dims, mask.ids, classes=classes) if dim < rank else None
    small = before.dtype in EXACT or before.dtype == torch.bool
    if mask.kind in ("count", "any") and mask.dims == (0, "e") and rank == 2 and dim == 0 and small:
        return Places(Count(mask.ids, along="any"), mask.dims, mask.ids)
    return None


def flattened_mask(call: Call) -> Value | None:
    """mask.view(T * K, E), and back: places.view(T, K, E)."""
    value, val = call.arg(0), call.val()
    before = call.val(call.node.args[0]).shape
    if isinstance(value, Member) and value.kind == "mask" and value.expert is None and val.dim() == 2:
        order = value.dims[:-1]
        if value.dims not in ((0, 1, "e"), (1, 0, "e")) or not same_size(val.shape[1], before[2]):
            return None
        return FlatMask(value.ids, order) if val.dtype == call.val(call.node.args[0]).dtype else None
    if not isinstance(value, Places | Early) or isinstance(value.dims[0], int) or val.dim() != 3:
        return None
    sizes, order = value.count.ids.meta["val"].shape, value.count.along
    fits = value.dims == (flat(order), "e") and same_size(val.shape[2], before[1])
    if not fits or not all(same_size(val.shape[i], sizes[d]) for i, d in enumerate(order)):
        return None
    return replace(value, dims=(*order, "e"))


def flat(order: tuple[Dim, ...]) -> str:
    """The name of two dimensions in one."""
    return "".join(map(str, order))


def moved(call: Call) -> Value | None:
    """places - 1, places + mask.sum(0)."""
    places, other = call.arg(0), call.number(1, "other")
    if not isinstance(places, Places) or places.masked or places.below is not None or places.dims[-1] != "e":
        return None
    if call.number(2, "alpha", 1) != 1 or call.val().dtype not in EXACT or call.val().dim() != len(places.dims):
        return None
    count, more = places.count, call.arg(1)
    if type(other) in (int, float) and math.isfinite(other) and other == int(other):
        shift = count.shift + (int(other) if call.op.startswith("add") else -int(other))
        return replace(places, count=replace(count, shift=shift)) if max(abs(other), abs(shift)) < FAR else None
    if not isinstance(more, Member) or more.kind != "count" or more.expert is not None:
        return None
    if not _counts_exactly(call.node.args[1]) or not same_size(_last(call, 1), _last(call, 0)):
        return None
    rank = more.ids.meta["val"].dim()
    if rank == 1:
        fits = more.dims in (("e",), ("one", "e")) and places.dims == (0, "e")
    else:  # the totals of each group
        fits = type(count.along) is int and places.dims == (0, 1, "e") and len(more.dims) == 3
        fits = fits and more.dims == tuple("one" if d == count.along else d for d in places.dims)
    if call.op.startswith("add") and fits and rank == count.ids.meta["val"].dim():
        return replace(places, count=replace(count, base=(*count.base, more.ids)))
    return None


def _last(call: Call, i: int) -> Any:
    return call.val(call.node.args[i]).shape[-1]


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
        if not isinstance(places, Places) or not is_table(mask, any_order=True):
            continue
        if not fits_mask(places.count, places.dims, mask.dims):
            continue
        if call.val().dtype not in EXACT or (i and in_place(call)) or not some_of(call.run, mask.ids, places.valid):
            continue
        if not same_size(_last(call, 0), _last(call, 1)):
            continue  # a mask of one class alone, for all experts
        if call.val().dim() != len(mask.dims):
            continue
        return replace(places, valid=mask.ids, masked=True, dims=mask.dims)
    return None


def fits_mask(count: Count, places: tuple[Dim, ...], mask: tuple[Dim, ...]) -> bool:
    """Whether places stand beside the entries of a mask that they count; those of tokens are the same for each k."""
    return places == mask or (count.along == "any" and places == tuple("one" if d == 1 else d for d in mask))


def clamped(call: Call) -> Value | None:
    """places.clamp(0, C - 1): those that are early have theirs."""
    places = call.arg(0)
    low, high = call.number(1, "min"), call.number(2, "max")
    if call.op.startswith("clamp_m"):
        low, high = (call.number(1), None) if "min" in call.op else (None, call.number(1))
    if not isinstance(places, Places) or places.count.shift < -1:
        return None
    if call.val().dim() != len(places.dims):
        return None
    if not (low is None or (type(low) in (int, float) and low <= 0)) or not (high is None or type(high) is int):
        return None
    inside = high is None or high >= 0
    positive = inside and (places.positive or (low is not None and low == 0))
    bounds = [b for b in (places.below, None if high is None else high + 1) if b is not None]
    return replace(places, masked=places.masked and inside, below=min(bounds, default=None), positive=positive)


def early(call: Call) -> Value | None:
    """places < C, places <= C - 1."""
    places, bound = call.arg(0), bound_of(call)
    if not isinstance(places, Places) or bound is None or places.below is not None:
        return None
    if call.val().dim() != len(places.dims) or (isinstance(bound, float) and not _far_from_others(bound)):
        return None
    if call.op in ("le", "less_equal"):
        bound = bound + 1 if isinstance(bound, int | torch.SymInt) else math.floor(bound) + 1
    elif isinstance(bound, float):
        bound = math.ceil(bound)
    return Early(places.count, places.valid, bound, places.dims)


def _far_from_others(bound: float) -> bool:
    """Whether a number stays on its side of each integer where it is rounded to float32."""
    apart = abs(bound - round(bound))
    return abs(bound) < FAR and (apart == 0 or apart > 1e-6 * max(1.0, abs(bound)))


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
    if not isinstance(at, Places) or "one" in at.dims[-1:] or not isinstance(slots, Tensor):
        return None
    if call.val(call.node.args[0]).dtype != torch.int64:  # type: ignore[arg-type]
        return None  # an error
    capacity, bound = slots.shape[-1], below(call.run, at.valid, at.count)
    inside = at.masked and bound is not None and at_most(bound, capacity) and at.count.shift >= -1
    if not inside and not (at.positive and at.below is not None and at_most(at.below, capacity)):
        return None
    return Slots((*at.dims, "c"), (Term(None, Number("one", slots.dtype), place=at),))


def is_place(call: Call) -> Value | None:
    """at[:, None] == arange(C)."""
    for at, slots in ((call.arg(0), call.arg(1)), (call.arg(1), call.arg(0))):
        if isinstance(at, Places) and isinstance(slots, Positions) and slots.shape == "all":
            if at.dims[-1] != "one" or at.dims[-2:] == ("one", "one") or call.val().dim() != len(at.dims):
                return None
            at = replace(at, dims=at.dims[:-1])
            return Slots((*at.dims, "c"), (Term(None, Number("one", torch.bool), place=at),))
    return None


# -- help -----------------------------------------------------------------------------------


def is_table(value: Any, *more: str, any_order: bool = False) -> bool:
    """A mask of zeros and ones [T, E] or [T, K, E]."""
    if not isinstance(value, Member) or value.expert is not None or value.kind != "mask":
        return False
    dims = tuple(d for d in value.dims if d not in more)
    tokens = tuple(range(value.ids.meta["val"].dim()))
    return dims == (*tokens, "e") or (any_order and dims == (*tokens[::-1], "e"))


def in_place(call: Call) -> bool:
    return call.op.endswith("_") and not call.op.endswith("__")


def at_most(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a <= b
    return statically_known_true(a <= b)


def cut_of(run: Interpreter, ids: Node | None, count: Count) -> Any:
    """The place from which on entries of `ids` are nobody's, or None."""
    while ids is not None and ids.target is ids_kept:
        table, before = ids.args[1], run.written.get(ids)
        rank = ids.meta["val"].dim()
        dims: tuple[Dim, ...] = (*range(rank), "e")
        if isinstance(table, Node) and table in run.written:  # turned, so that its dimensions are those of the ids
            table, dims = table.args[0], (1, 0, "e")
        for factor in table.all_input_nodes if isinstance(table, Node) else []:
            value = run.values.get(factor)
            if isinstance(value, Early) and value.count == count and fits_mask(count, value.dims, dims):
                if some_of(run, before, value.valid) and factor.meta["val"].dim() == len(dims):
                    return value.bound
        ids = before
    return None


def below(run: Interpreter, ids: Node | None, count: Count) -> Any:
    """What no place of entries of `ids` reaches: late ones were dropped, or so few were counted; or None."""
    cut = cut_of(run, ids, count)
    return cut if cut is not None else _few(run, count)


def _few(run: Interpreter, count: Count) -> Any:
    """What no place reaches since the mask was multiplied, before it was counted, by a table of few marks."""
    if count.base or count.ids.meta["val"].dim() != 1:
        return None
    ids: Node | None = count.ids
    while ids is not None and ids.target is ids_kept:
        table = ids.args[1]
        for factor in table.all_input_nodes if isinstance(table, Node) else []:
            value, val = run.values.get(factor), factor.meta["val"]
            if isinstance(value, Marks) and all(map(same_size, val.shape, table.meta["val"].shape)):  # type: ignore[union-attr]
                return value.most + count.shift + 1
        ids = run.written.get(ids)
    return None


RULES: dict[str, tuple[Rule, ...]] = {
    "cumsum": (running,),
    **{op: (moved,) for op in ("add", "add_", "sub", "sub_")},
    **{op: (own,) for op in ("mul", "multiply", "mul_")},
    **{op: (clamped,) for op in ("clamp", "clamp_min", "clamp_max")},
    **{op: (early,) for op in ("lt", "less", "le", "less_equal")},
    "one_hot": (one_hot,),
    "eq": (is_place,),
    **{op: (flattened_mask,) for op in ("view", "reshape")},
}
