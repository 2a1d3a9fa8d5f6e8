"""Rules that put sliced rows together again: joined, set into a buffer, or brought back into the order of the pairs.

Each expert's rows have to be there once, in the order in which they were sliced (sliced_rows.py); the whole is
`Pieces`, rows of all of which each expert computed its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.nodes import name_of
from moe_compile.detect.selection import everyone
from moe_compile.detect.shapes import same_size
from moe_compile.detect.sliced_rows import ANY, one_expert, sizes_of
from moe_compile.detect.sorted_values import Filled, Permutation, Pieces, Places
from moe_compile.detect.sum_values import Buffer
from moe_compile.detect.values import Rows, Selection, Unknown, Value
from moe_compile.region import ids_above


def join(call: Call) -> Value | None:
    """The rows of all experts, one expert's below the other's: each is what its own computed."""
    parts: list[Any] = call.arg(0)
    if not all(isinstance(p, Rows) and p.dim == 0 and p.expr.level == "row" for p in parts):
        return Unknown(f"{name_of(call.node)} joins something that is not rows")
    ids = parts[0].selection.ids
    if ids is not sizes_of(ids) and not ids.args[2]:
        return Unknown(f"{name_of(call.node)} joins rows that are not shown to be all")
    pieces = joined(call, parts)
    if isinstance(pieces, Pieces) and pieces.classes == ANY:  # without nobody's rows these would be too few
        return replace(pieces, classes=pieces.number)
    return pieces


def joined(call: Call, parts: Sequence[Rows]) -> Value:
    first, experts = parts[0].selection, [e for p in parts if isinstance(e := p.selection.expert, int)]
    if first.ids is None or first.order in (None, "flat") or len(experts) < len(parts):
        return Unknown(f"{name_of(call.node)} joins rows that were not sliced from sorted ones")
    alike = one_expert(first.ids, 0, first.classes, first.order)
    if any(replace(p.selection, expert=0) != alike for p in parts):
        return Unknown(f"{name_of(call.node)} joins rows that were sorted or counted in different ways")
    nobody = {e for ids, e in call.run.empty if ids is first.ids}
    number = call.run.counted.get(first.ids, max((*experts, *nobody)) + 1) if first.classes == ANY else first.classes
    listed = first.ids.target is ids_above  # as many rows as there are gates
    if listed:
        number = first.ids.args[0].meta["val"].shape[1]  # type: ignore[union-attr]
    if number is None or experts != [e for e in range(number) if e not in nobody or e in experts]:
        return Unknown(f"{name_of(call.node)} joins the rows of experts {experts}, of {number}")
    if not listed and not same_size(call.val().shape[0], call.val(first.ids).numel()):
        return Unknown(f"{name_of(call.node)} joins rows that are not those of all pairs")
    everybody = everyone(first.ids, first.order)
    rows = ((e, Rows(everybody, p.expr)) for e, p in zip(experts, parts, strict=True))
    return Pieces(tuple(rows), number, first.classes)  # type: ignore[arg-type]


def fill(call: Call) -> Value | None:
    """out[start:end] = rows, expert by expert."""
    total, indices, new = call.arg(0), call.arg(1), call.arg(2)
    if len(indices) != 1 or not isinstance(indices[0], Places):
        return None
    at = indices[0]
    done = total.rows if isinstance(total, Filled) else ()
    if call.number(3, "accumulate", False) or not isinstance(total, Filled | Buffer):
        return Unknown(f"{name_of(call.node)} sets rows of something that was not made for them")
    if not (isinstance(new, Rows) and new.dim == 0 and new.expr.level == "row" and call.run.is_fresh(call.node)):
        return Unknown(f"{name_of(call.node)} sets something that is not one value a row")
    if (
        sizes_of(new.selection.ids) is not at.ids
        or new.selection.expert != at.expert
        or new.selection.order in (None, "flat")
    ):
        return Unknown(f"{name_of(call.node)} sets the rows of one expert where another's lie")
    if call.val().dtype != new.expr.val.dtype or tuple(call.val().shape[1:]) != tuple(new.expr.val.shape[1:]):
        return Unknown(f"{name_of(call.node)} changes the dtype or width of the rows that it sets")
    rows = tuple(sorted((*done, new), key=lambda r: _number(r.selection)))
    return Filled(rows, lambda: joined(call, rows))


def _number(chosen: Selection) -> int:
    return chosen.expert if isinstance(chosen.expert, int) else 0  # which `joined` refuses


def unsort(call: Call) -> Value | None:
    """out[order] = rows: a row for every pair, in flat order."""
    total, indices, new = call.arg(0), call.arg(1), call.arg(2)
    if len(indices) != 1 or not isinstance(at := indices[0], Permutation) or not isinstance(new, Rows):
        return None
    if not isinstance(total, Buffer) or call.number(3, "accumulate", False) or at.inverse:
        return None
    if new.selection != everyone(at.ids, at.order) or new.dim or new.expr.level != "row":
        return Unknown(f"{name_of(call.node)} sets other rows than were sorted")
    if not call.run.is_fresh(total.node) or not same_size(call.val().shape[0], call.val(at.ids).numel()):
        return Unknown(f"{name_of(call.node)} sets some rows of something")
    if call.val().dtype != new.expr.val.dtype or tuple(call.val().shape[1:]) != tuple(new.expr.val.shape[1:]):
        return Unknown(f"{name_of(call.node)} changes the dtype or width of the rows that it sets")
    return Rows(everyone(at.ids, "flat"), new.expr)


RULES: dict[str, tuple[Rule, ...]] = {
    "cat_rows": (join,),
    **{op: (fill, unsort) for op in ("index_put", "index_put_")},
}
