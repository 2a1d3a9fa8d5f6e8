"""What a value can mean where rows lie sorted by expert: the order, how many rows each expert has, rows cut and joined.

`order` is the node of the sorting permutation, or "flat", the order t * K + k in which pairs come; `ids` and `plain` as
in values.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from moe_compile.detect.values import Rows, Selection, Value
from moe_compile.region import Expr


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
