"""Rows of which each expert computed its own (`Pieces`): a call on one of them, and what the results are together.

The interpreter runs the rules once for each piece; a sum has one more term for each.
"""

from dataclasses import replace
from typing import Any

from torch.fx import Node

from moe_compile.detect.nodes import name_of
from moe_compile.detect.sorted_values import Pieces
from moe_compile.detect.sum_values import Buffer, Sum
from moe_compile.detect.values import Rows, Unknown, Value
from moe_compile.region import ids_above


def part_of(arg: Any, i: int) -> Any:
    """An argument with part i in the place of `Pieces`."""
    if isinstance(arg, dict):
        return {k: part_of(a, i) for k, a in arg.items()}
    if isinstance(arg, list):
        return [part_of(a, i) for a in arg]
    return arg.parts[i][1] if isinstance(arg, Pieces) else arg


def joined_parts(node: Node, parts: list[tuple[int, Value]], like: Pieces) -> Value:
    """What the results for each expert are together: a sum has one more term for each."""
    values = [v for _, v in parts]
    if isinstance(wrong := next((v for v in values if isinstance(v, Unknown)), None), Unknown):
        return wrong
    first = values[0]
    if isinstance(first, Buffer) and all(v == first for v in values):
        return first
    if not isinstance(first, Sum):
        plain = any(v.plain for v in values)
        return Unknown(f"{name_of(node)} is not known to be row-wise") if plain else replace(like, parts=tuple(parts))
    sums = [v for v in values if isinstance(v, Sum) and (v.start, v.terms[:-1]) == (first.start, first.terms[:-1])]
    if len(sums) != len(values):
        return Unknown(f"{name_of(node)} adds the rows of experts to different sums")
    terms = [
        replace(
            s.terms[-1], selection=replace(s.terms[-1].selection, expert=e, classes=_classes(s.terms[-1], like.number))
        )
        for s, (e, _) in zip(sums, parts, strict=True)
    ]
    return Sum(first.start, (*first.terms[:-1], *terms))


def _classes(term: Rows, number: int) -> int | None:
    """Joined rows are those of all pairs, so each id has to be an expert's, but where those of nobody were left out."""
    ids = term.selection.ids
    dropped = term.selection.order == "slots" or (ids is not None and ids.target is ids_above)
    return None if dropped else number


def sorted_before(value: Pieces) -> bool:
    """Whether rows were sorted by expert when they came, so that they are results as they are."""
    first = value.parts[0][1]
    return (
        isinstance(first, Rows) and first.selection.order is not None and first.selection.order is first.selection.ids
    )


def sum_of_pieces(node: Node, value: Pieces) -> Sum | None:
    """Rows that were sorted before: a token each, to which its expert adds once."""
    if not sorted_before(value) or not all(isinstance(v, Rows) and v.dim == 0 for _, v in value.parts):
        return None
    terms = [
        Rows(replace(v.selection, expert=e, classes=value.classes), v.expr)
        for e, v in value.parts
        if isinstance(v, Rows)
    ]
    return Sum(Buffer(node, "zero"), tuple(terms))
