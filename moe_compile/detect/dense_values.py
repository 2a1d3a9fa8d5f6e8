"""What a value can mean where experts run on every token, or on weights that were gathered for each pair.

Each is an ordinary value for whoever is no part of such a sum: `otherwise` says which.  Their sum over the experts, if
it is one, is a `DenseSum`, which dense.py reads again with rows of tokens in the place of all.
"""

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from moe_compile.detect.sum_values import Buffer
from moe_compile.detect.values import Column, Constant, Dim, MaskedWeights, Plain, Value
from moe_compile.region import Expr


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
