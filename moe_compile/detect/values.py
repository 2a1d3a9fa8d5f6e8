"""What a value of the graph can mean for routing: who is chosen, and what an expert computes on.

A `plain` value can be computed outside of the region, whatever it means; the others exist only within it.
`ids` is always the node that holds the expert ids; its dimensions are named 0, 1, ... and the expert dimension "e".
Rows in sorted order, experts that run on every token, and sums have files of their own (sorted_values.py,
dense_values.py, sum_values.py), which build on this one.
"""

from dataclasses import dataclass
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
