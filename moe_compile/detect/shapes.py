"""Sizes that have to be equal: shown from what is known of them, or guarded where the caller allows it.

Nothing here knows an op; the rules ask, and refuse where the answer is no.
"""

from collections.abc import Sequence
from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moe_compile.detect.interpreter import Interpreter
from moe_compile.detect.values import Selection, Unknown


def same_size(a: Any, b: Any) -> bool:
    """Equal sizes, shown without a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return statically_known_true(a == b)


def equal_sizes(run: Interpreter, mine: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Equal sizes, shown or guarded."""
    if all(map(same_size, mine, theirs)):
        return True
    return run.facts.may_guard and all(a == b for a, b in zip(mine, theirs, strict=True))  # now guards of the trace


def misfit(run: Interpreter, selection: Selection, node: Node, dims: int) -> Unknown | None:
    """A tensor that is read or written by tokens (and k) must have the ids' first `dims` dimensions."""
    assert selection.ids is not None
    mine, theirs = node.meta["val"].shape, selection.ids.meta["val"].shape
    if len(mine) >= dims and equal_sizes(run, mine[:dims], theirs[:dims]):
        return None
    return Unknown(f"{node.name} is {tuple(mine)}, the expert ids are {tuple(theirs)}")
