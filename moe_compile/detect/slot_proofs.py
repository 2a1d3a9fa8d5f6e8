"""What is shown of whole tables of slots (slots.py): that a slot holds one token, and what each choice has in them."""

from typing import Any

import torch
from torch.fx import Node

from moe_compile.detect.ids import not_distinct, some_of
from moe_compile.detect.interpreter import Interpreter
from moe_compile.detect.slots import Number, Slots, Term, at_most, below, cut_of
from moe_compile.rewrite import emit

aten = torch.ops.aten


def whole(table: Slots) -> bool:
    """Whether every term says its token, expert and place."""
    if not all(t.ids is not None and t.by_expert and t.place is not None for t in table.terms):
        return False
    ranks = {1 if table.summed else t.ids.meta["val"].dim() for t in table.terms}  # type: ignore[union-attr]
    names = sorted(map(str, table.dims))
    if table.wide is not None:
        return ranks == {1} and names == ["0", "ec"]
    if ranks == {1}:
        return names == ["0", "c", "e"]
    along = {t.place.count.along for t in table.terms}  # type: ignore[union-attr]
    return names == ["0", "1", "c", "e"] and along in ({0}, {1})


def sizes_of(table: Slots, node: Node) -> tuple[Any, Any, Any]:
    """T, E and C of a whole table; of groups of tokens the size of a group for T."""
    wide, dims = table.wide or (node, table.dims)
    sizes = wide.meta["val"].shape
    return tuple(sizes[dims.index(d)] for d in (0, "e", "c"))  # type: ignore[return-value]


def counted_along(table: Slots) -> int | None:
    """Of a table of groups, [0, 1, "e", "c"], the dimension of the tokens of a group; None if it has no groups."""
    if 1 not in table.dims:
        return None
    return table.terms[0].place.count.along  # type: ignore[union-attr, no-any-return]


def not_disjoint(run: Interpreter, table: Slots, capacity: Any) -> str | None:
    """Why two tokens might have one slot, or a token none where the program has an error; None if neither can be.

    Choice j of a token has the places behind all those of the choices before it, whether these count the late ones or
    not: if some are late, the others fill all places.
    """
    if why := _not_counted_so(run, table):
        return why
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
        bound = below(run, term.ids, count)
        if bound is None:
            return "tokens whose place is behind the last slot are not shown to be dropped"
        for slots in (capacity, term.place.below):
            if slots is not None and not at_most(bound, slots):
                return f"tokens are dropped from place {bound} on, there are {slots} slots"
    return None


def _not_counted_so(run: Interpreter, table: Slots) -> str | None:
    """Why places of several choices of a token, or of tokens of several groups, might be the same."""
    for term in table.terms:
        count = term.place.count  # type: ignore[union-attr]
        if count.ids.meta["val"].dim() == 1:
            continue
        if not table.summed:
            continue  # of groups, which remain in the table
        if count.along == "any":
            if repeated := not_distinct(run, count.ids):
                return f"an expert that a token chose twice has one place for both: {repeated}"
        elif type(count.along) is int or count.base:
            return "several choices of a token are not counted together"
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
        if n.op is aten.div.Tensor and isinstance(args[1], Node):  # nobody's is zero: x / tiny has no finite slope
            args[0] = call(aten.where.ScalarOther, call(aten.ge.Scalar, ids, 0), args[0], 0)
        return call(n.op, *args)

    return written(number)


def _read(call: Any, run: Interpreter, ids: Node, entry: Number) -> Node | None:
    """Entry (t, ids[t]) of a factor; of ids [T, K] entry (t, k, ids[t, k])."""
    node = entry.args[0]
    if not run.unchanged(node):
        return None
    left: list[Any] = [d for d in entry.dims if d != "one"]
    for at in reversed(range(len(entry.dims))):
        if entry.dims[at] == "one":
            node = call(aten.select.int, node, at, 0)
    order = sorted(range(len(left)), key=lambda i: str(left[i]))
    if order != list(range(len(left))):
        node, left = call(aten.permute.default, node, order), [left[i] for i in order]
    rank = ids.meta["val"].dim()
    if left in ([], [0]) and rank == 1:
        return node if left else call(aten.mul.Tensor, call(aten.ones_like.default, ids), node)
    if left in ([], [0], [1], [0, 1]):
        if left in ([0], [1]):
            node = call(aten.unsqueeze.default, node, 1 - left[0])
        return node if len(left) == 2 else call(aten.mul.Tensor, call(aten.ones_like.default, ids), node)
    index = call(aten.to.dtype, call(aten.clamp.default, ids, 0), torch.int64)
    if left == ["e"]:
        return call(aten.index_select.default, node, 0, index) if rank == 1 else call(aten.index.Tensor, node, [index])
    if left == [0, "e"] and rank == 2:
        return call(aten.gather.default, node, 1, index)
    if left == [*range(rank), "e"]:
        return call(
            aten.squeeze.dim, call(aten.gather.default, node, rank, call(aten.unsqueeze.default, index, -1)), -1
        )
    return None
