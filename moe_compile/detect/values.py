"""What a value of the graph can mean for routing.

A `plain` value can be computed outside of the region, whatever it means; the others exist only within it.
`ids` is always the node that holds the expert ids; its dimensions are named 0, 1, ... and the expert dimension "e".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from moe_compile.region import Expr

Dim = int | str


@dataclass(frozen=True)
class Value:
    plain = False


@dataclass(frozen=True)
class Plain(Value):
    """An ordinary value: computed outside the region, nothing known."""

    node: Node
    plain = True


@dataclass(frozen=True)
class Unknown(Value):
    """A value the region needs that nobody could interpret, and why."""

    reason: str


@dataclass(frozen=True, eq=False)
class Each:
    """One expert after the other, in the place of an expert's number: each of `numbers`, by the visit of a loop."""

    numbers: tuple[int, ...]


Expert = int | Each


@dataclass(frozen=True)
class Visit(Value):
    """The index of a visit, plus `offset`."""

    each: Each
    offset: int = 0


# -- who is chosen --------------------------------------------------------------------------


@dataclass(frozen=True)
class Member(Value):
    """Truth of id == e over `dims`: kind "mask" as it is; over missing dims "any", "none" or "count" of them."""

    ids: Node
    dims: tuple[Dim, ...]
    expert: Expert | None  # None: "e" is among dims, or was summed over
    classes: int | None  # ids outside [0, classes) raise an error (one_hot); None: they are ignored
    kind: str = "mask"
    plain = True


@dataclass(frozen=True)
class Constant(Value):
    """A number the loop made: an expert's index, or what follows from it."""

    number: Any
    plain = True


@dataclass(frozen=True)
class Selection:
    """The rows of one expert: pairs (t, k) with id == expert, or tokens ("any" k); or all pairs at once."""

    ids: Node | None  # None: any ids with `top_k` columns (`Repeated`)
    expert: Expert | None  # None: all experts together
    classes: int | None
    per: str = "pair"  # "pair" | "token"
    order: Any = None  # all experts together: "flat", or the node of the sorting permutation
    top_k: int = 0
    by_slot: bool = False  # pairs of one expert: those with k = 0 first, not those of the first token


@dataclass(frozen=True)
class Index(Value):
    """The index vector of a selection along dimension `dim` of its ids; a tuple: the [r, n] table of n vectors."""

    selection: Selection
    dim: int | str | tuple[int, ...]  # "flat": t * K + k


@dataclass(frozen=True)
class TokenGrid(Value):
    """The tokens of a selection as a column, or as many of them as a row is wide."""

    selection: Selection


@dataclass(frozen=True)
class Hits(Value):
    """The list of experts that somebody chose."""

    ids: Node
    classes: int | None


@dataclass(frozen=True)
class Emptiness(Value):
    """Whether ("any") or whether not ("none") anybody chose the expert; "count" is the number of its pairs, "tokens"
    that of its tokens, which differs where a token may choose it twice.
    """

    ids: Node
    expert: Expert
    kind: str  # "any", "none", "count", "tokens"
    num: int | None = None  # experts that were counted together
    closed: bool = False  # an id of none of them is an error
    plain = True


# -- what the expert computes on ------------------------------------------------------------


@dataclass(frozen=True)
class Slice(Value):
    """stack[index], or something computed from such slices alone: `expr` holds for expert `index`."""

    index: Expert
    expr: Expr
    plain = True


@dataclass(frozen=True)
class Column(Value):
    """table[:, expert] of a [T, E] table of routing weights."""

    table: Node
    expert: Expert
    plain = True


@dataclass(frozen=True)
class MaskedWeights(Value):
    """weights[t, k] where id[t, k] == expert, else 0; `summed`: added over k, one number a token."""

    weights: Node
    ids: Node
    expert: Expert
    classes: int | None
    summed: bool = False
    plain = True


@dataclass(frozen=True)
class Rows(Value):
    """One value a row: dimension `dim` runs over the rows of the selection, `expr` says what a row holds."""

    selection: Selection
    expr: Expr
    dim: int = 0


@dataclass(frozen=True)
class Repeated(Rows):
    """Rows of all pairs in flat order that depend on tokens alone: x.repeat_interleave(top_k, 0)."""

    plain = True


@dataclass(frozen=True)
class Sorted(Rows):
    """Rows of all pairs, sorted by expert, that no expert has computed on: ordinary values for somebody else."""

    plain = True


@dataclass(frozen=True)
class RowTuple(Value):
    """Several `Rows` or `Slice` values, from chunk, split or unbind."""

    items: tuple[Value, ...]


# -- rows in sorted order -------------------------------------------------------------------


@dataclass(frozen=True)
class FlatIds(Value):
    """ids.reshape(-1); sorted by `order` if that is not "flat"; then clamped to `limits`, lowest and highest."""

    ids: Node
    order: Any = "flat"
    limits: tuple[int | None, int | None] | None = None
    plain = True


@dataclass(frozen=True)
class Outside(Value):
    """Whether the id of each pair is `bound` or more: a pair that chose nobody."""

    ids: Node
    order: Any
    bound: int
    plain = True


@dataclass(frozen=True)
class Permutation(Value):
    """The permutation that sorts the flat ids (`inverse`: that undoes it)."""

    ids: Node
    order: Node
    inverse: bool = False
    plain = True


@dataclass(frozen=True)
class TokenOf(Value):
    """The token of each pair, in the layout `order`."""

    ids: Node
    order: Any
    plain = True


@dataclass(frozen=True)
class Listing(Value):
    """table.nonzero() of a table of gates [T, E], whose ids name a row each: the "pairs" [N, 2], their "tokens".

    Sorted by expert, by `order`: "columns" [N, 2] and their "orders", of experts the "order" and the "experts".
    """

    ids: Node
    what: str
    order: Any = None


@dataclass(frozen=True)
class Counts(Value):
    """Rows of each expert 0..num-1; `ends`: their running sum.

    `closed`: an id outside of [0, num) is an error.  `listed`: it makes the vector longer.
    """

    ids: Node
    num: int
    ends: bool = False
    closed: bool = False
    listed: bool = False
    plain = True


@dataclass(frozen=True)
class Starts(Value):
    """The running sum of `Counts` before each expert; with `length` num + 1 also after the last."""

    ids: Node
    num: int
    length: int
    closed: bool = False
    listed: bool = False
    plain = True


@dataclass(frozen=True)
class RowSum(Value):
    """A sum of the numbers of rows of some experts: how many times each."""

    ids: Node
    times: dict[int, int]
    num: int | None
    closed: bool
    plain = True


@dataclass(frozen=True)
class Ones(Value):
    """A table [T, E] of integers: 1 at (t, ids[t, k]), else 0."""

    ids: Node
    num: int
    plain = True


@dataclass(frozen=True)
class Places(Value):
    """Where the rows of one expert lie among rows that are sorted by expert."""

    ids: Node
    expert: int


@dataclass(frozen=True)
class Pieces(Value):
    """Rows of all experts 0..number-1, of which each computed its own: by expert, as if all rows were computed so."""

    parts: tuple[tuple[int, Value], ...]
    number: int
    classes: int | None = None  # as of a `Selection`


@dataclass(frozen=True)
class Filled(Value):
    """A buffer in which the rows of some experts were set; `join`: what it is as a whole."""

    rows: tuple[Rows, ...]
    join: Callable[[], Value] = field(compare=False, repr=False)


@dataclass(frozen=True)
class PairGrid(Value):
    """Rows of all pairs viewed as [T, K, ...]."""

    selection: Selection
    expr: Expr


# -- experts that run on every token --------------------------------------------------------


@dataclass(frozen=True)
class Dense(Value):
    """A value that means more in a dense sum, and elsewhere is what `otherwise` says."""

    plain = True
    of_experts = False  # it is what experts make, or says which slots are theirs

    def otherwise(self, node: Node) -> Value:
        return Plain(node)


@dataclass(frozen=True)
class Spread(Dense):
    """A table [T, E] (its dimensions in the order `dims`, "et" for both in one) that is zero but at (t, ids[t, k]).

    fill: what it is there, if not zero: minus infinity.
    """

    node: Node
    ids: Node
    dims: tuple[Dim, ...]
    fill: float = 0.0


@dataclass(frozen=True)
class Infinite(Dense):
    """A tensor of minus infinity."""


@dataclass(frozen=True)
class DenseWeight(Dense):
    """The weight of one expert for every token, zero for tokens that did not choose it; [T] or [T, 1, ...].

    role, node: the leaf that it is for the rows of that expert (`region.Leaf`); "one" or "any": it is 1, for every time
    that the token chose the expert or for all of them.
    """

    ids: Node
    expert: int
    classes: int | None
    role: str
    node: Node

    def otherwise(self, node: Node) -> Value:
        if node.meta["val"].dim() > 1:
            return Plain(node)
        if self.role == "column":
            return Column(self.node, self.expert)
        return MaskedWeights(self.node, self.ids, self.expert, self.classes, summed=True)


@dataclass(frozen=True)
class DenseTerm(Dense):
    """`value` (what an expert makes of all tokens) times its weight, computed by `node`."""

    node: Node
    value: Node
    weight: DenseWeight


@dataclass(frozen=True)
class Stacked(Dense):
    """The results of all experts along dimension `dim`, and `table` if they were multiplied by it, by `node`."""

    nodes: tuple[Node, ...]
    dim: int
    table: Spread | None = None
    node: Node | None = None


@dataclass(frozen=True)
class Every(Dense):
    """What every expert makes of every token, [num, T, ...], or [num * T, ...] if `flat`; `expr`: of a row.

    ids: it is zero for the experts that a token did not choose by them; None if that is not shown.
    slots: the table by which tokens were laid out in C slots an expert (`slots.Slots`); then T is C.
    groups: G and C, of tokens in groups that have C slots each at an expert, so that T is G * C.  apart: it is
    [num, G, C, ...].  crossed: it is [T, num, ...], of tokens without slots.
    """

    of_experts = True
    expr: Expr
    num: int
    flat: bool
    ids: Node | None = None
    slots: Any = None
    groups: tuple[Any, Any] | None = None
    apart: bool = False
    crossed: bool = False


@dataclass(frozen=True)
class Picked(Dense):
    """One value for each pair, [T, K, ...], of which some belong to the experts `ids` [T, K]; `expr`: of a row.

    With `ids` [T] it is one for each token, [T, ...].
    """

    of_experts = True
    expr: Expr
    ids: Node


@dataclass(frozen=True)
class Chosen(Dense):
    """Of the results `nodes` of all experts on all tokens those of `ids`, [T, K, D]; `node`: times `weights` [T, K]."""

    nodes: tuple[Node, ...]
    ids: Node
    weights: Node | None = None
    node: Node | None = None


@dataclass(frozen=True)
class Positions(Dense):
    """0, 1, ... ("all"), as a "column" [T, 1], as a "grid" [T, K] of like columns; "pairs": each number K times."""

    shape: str
    top_k: int = 1
    known: "Constant | None" = None

    def otherwise(self, node: Node) -> Value:
        return self.known or Plain(node)


@dataclass(frozen=True)
class DenseSum(Value):
    """`start`, or zero, plus the terms so far."""

    start: "Buffer | None"
    terms: tuple[DenseTerm, ...] = field(repr=False)


# -- where results go -----------------------------------------------------------------------


@dataclass(frozen=True)
class Buffer(Value):
    """A tensor that results may be added into; kind: "zero", "empty" (never set), "known", or "kept": a token whose
    expert sets it has the expert's result alone, and the others keep what is known.
    """

    node: Node
    kind: str
    plain = True


@dataclass(frozen=True)
class Sum(Value):
    """`start` plus the contributions so far."""

    start: Buffer
    terms: tuple[Rows, ...] = field(repr=False)


@dataclass(frozen=True)
class ListTerm:
    """Rows `value` [C, ...] that were added to the tokens `index` [C]; None: that are joined with those of others."""

    index: Node | None
    value: Node
    number: int | None = None  # index is row `number` of a table


@dataclass(frozen=True)
class ListSum(Value):
    """`start` plus, for each term, rows at places of its own: each expert's list of tokens."""

    start: Buffer
    terms: tuple[ListTerm, ...] = field(repr=False)


@dataclass(frozen=True)
class SumRead(Value):
    """total[index], and after `added`: with the selection's new rows on top."""

    total: Value  # Buffer or Sum
    selection: Selection
    added: Rows | None = None


@dataclass(frozen=True)
class Region(Value):
    """A finished sum over all experts, shown to be one: ready to be written as an `experts` node."""

    total: Sum
    ids: Node
    num_experts: int
    num_classes: int | None  # ids outside [0, num_classes) are an error; None: they choose nobody
    reads: Any  # how ids choose weights: "number"; "index", from the end if negative; limits (low, high)
    body: Expr
    families: Mapping[Expr, Sequence[Node] | Node] = field(repr=False)  # nodes of all experts, or a series (series.py)
    tail: tuple[int, Expr] | None = None  # ids in [num_experts, tail[0]) run tail[1], which holds nothing of an expert
    plain = True


@dataclass(frozen=True)
class ListRegion(Region):
    """A sum in which every expert has its own list of tokens, `lists` [C] by expert; its ids are the experts' numbers.

    No lists: the experts' results are not added but joined, each for rows of its own.
    """

    lists: tuple[Node, ...] = ()
