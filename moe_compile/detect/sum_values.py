"""Where results go: buffers, sums so far, and the sums that are shown to be regions.

A `Region` is all that is needed to write an `experts` node; sums.py and lists.py make them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from moe_compile.detect.values import Rows, Selection, Value
from moe_compile.region import Expr


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
