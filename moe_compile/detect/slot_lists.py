"""Rules for experts that run one by one on the slots of a table (slots.py), joined before they are added up.

    rows = einsum("tec,tm->ecm", dispatch, x)
    made = stack([expert_e(rows[e]) for e in range(E)])
    out  = einsum("tec,ecm->tm", combine, made)

While they are read, the experts' values are ordinary ones.  At the sum each expert's part is read again, as in
lists.py, with rows that are those of its slots.
"""

import collections
from typing import Any

from torch import Tensor
from torch.fx import Node

from moe_compile.detect.dense import ancestors, not_pure
from moe_compile.detect.interpreter import Interpreter, op_of
from moe_compile.detect.lists import RowsOfList
from moe_compile.detect.selection import same_size
from moe_compile.detect.unify import leaves_of
from moe_compile.detect.values import Every, ListTerm, Unknown
from moe_compile.region import Expr, Leaf

VIEWS = ("view", "reshape", "_unsafe_view", "contiguous")


def bodies(
    run: Interpreter, site: Node, made: Node, num: int, capacity: Any
) -> tuple[list[Expr], Every] | Unknown | None:
    """What each expert makes of its slots, and how these were filled; None if `made` is not joined of that."""
    parts = joined(made, num, capacity)
    if parts is None:
        return None
    needed = [ancestors(part) for part in parts]
    times = collections.Counter(n for mine in needed for n in mine)
    inside = [{n for n in mine if times[n] == 1} for mine in needed]
    span = {n for own in inside for n in own}
    found: list[Expr] = []
    sources: set[Every] = set()
    for e, (part, own) in enumerate(zip(parts, inside, strict=True)):
        expr = RowsOfList(run, e, ListTerm(None, part), own).result()
        if isinstance(expr, Unknown):
            return expr
        table: dict[Leaf, Expr] = {}
        for leaf in leaves_of(expr):
            if leaf.role == "listed":
                rows = slots_of(run, leaf.node)
                if rows is None or rows[1] != e:
                    return Unknown(f"expert {e} runs on other rows than those of its slots")
                sources.add(rows[0])
                table[leaf] = rows[0].expr
        if not same_size(expr.val.shape[0], capacity):
            return None
        found.append(replaced(run, expr, table))
    if len(sources) != 1:
        return None
    if why := not_pure(run, site, span):
        return Unknown(why)
    run.inside |= span
    return found, sources.pop()


def joined(made: Node, num: int, capacity: Any) -> list[Node] | None:
    """Parts [C, ...] that are joined as [E, C, ...], or [E * C, ...]."""
    flipped = False
    while True:
        op = op_of(made)
        if op in VIEWS and isinstance(made.args[0], Node) and made.meta["val"].dtype == made.args[0].meta["val"].dtype:
            if flipped:
                return None
        elif op == "transpose" and made.args[1:] in ((0, 1), (1, 0)):
            flipped = not flipped
        else:
            break
        made = made.args[0]  # type: ignore[assignment]
    parts: Any = made.args[0] if op_of(made) in ("stack", "cat") and made.op == "call_function" else None
    if not isinstance(parts, (list, tuple)) or len(parts) != num or not all(isinstance(n, Node) for n in parts):
        return None
    first = parts[0].meta["val"]
    for part in parts:
        val = part.meta["val"]
        if not isinstance(val, Tensor) or val.dim() < 2 or val.dtype != first.dtype or val.dim() != first.dim():
            return None
        if not all(map(same_size, val.shape, first.shape)) or not same_size(val.shape[0], capacity):
            return None
    dim = made.args[1] if len(made.args) > 1 else 0
    along = 1 if flipped else 0
    return list(parts) if dim == along and (op_of(made) == "stack" or not flipped) else None


def slots_of(run: Interpreter, node: Node) -> tuple[Every, int] | None:
    """(all slots, e) of the slots of expert e: rows[e], rows.unbind(0)[e], rows.chunk(E)[e].squeeze(0)."""
    val = node.meta["val"]
    while op_of(node) in ("squeeze", *VIEWS) or (op_of(node) == "select" and node.args[1:] == (0, 0)):
        before: Any = node.args[0]
        if op_of(node) == "select" and isinstance(run.values.get(before), Every):
            break
        if not same_size(before.meta["val"].shape[0], 1) or before.meta["val"].dim() != val.dim() + 1:
            return None
        if not all(map(same_size, before.meta["val"].shape[1:], val.shape)):
            return None
        node = before
    single = node.meta["val"].dim() == val.dim() + 1
    source: Any = node.args[0]
    if op_of(node) == "select" and not single:
        at, e = node.args[1:3]
    elif op_of(node) == "getitem" and op_of(source) in ("unbind", "chunk", "split"):
        e, split = node.args[1], source
        if op_of(split) == "split" and split.args[1] != 1:
            return None
        if (op_of(split) == "unbind") == single:
            return None
        where = 1 if op_of(split) == "unbind" else 2
        at = split.args[where] if len(split.args) > where else 0
        source = split.args[0]
    else:
        return None
    rows = run.values.get(source)
    if not isinstance(rows, Every) or rows.slots is None or rows.flat or at not in (0, -source.meta["val"].dim()):
        return None
    if single and op_of(split) == "chunk" and split.args[1] != rows.num:
        return None
    return (rows, e % rows.num) if type(e) is int and e >= -rows.num else None


def replaced(run: Interpreter, root: Expr, table: dict[Leaf, Expr]) -> Expr:
    """An expression with others in the place of some leaves."""
    made: dict[int, Any] = {id(leaf): expr for leaf, expr in table.items()}

    def rebuilt(arg: Any) -> Any:
        if isinstance(arg, (tuple, list)):
            return type(arg)(map(rebuilt, arg))
        if not isinstance(arg, Expr) or (isinstance(arg, Leaf) and id(arg) not in made):
            return arg
        if id(arg) not in made:
            made[id(arg)] = run.table.call(arg.target, rebuilt(arg.args), dict(rebuilt(arg.kwargs)), arg.val)
        return made[id(arg)]

    return rebuilt(root)  # type: ignore[no-any-return]
