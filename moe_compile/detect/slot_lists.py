"""Rules for experts that run one by one on the slots of a table (slots.py), joined before they are added up.

    rows = einsum("tec,tm->ecm", dispatch, x)
    made = stack([expert_e(rows[e]) for e in range(E)])
    out  = einsum("tec,ecm->tm", combine, made)

An expert's part may have dimensions of one in front, as in `rows.reshape(1, E, C, M).chunk(E, dim=1)`.

While they are read, the experts' values are ordinary ones.  At the sum each expert's part is read again, as in
lists.py, with rows that are those of its slots.
"""

import collections
from typing import Any

from torch import Tensor
from torch.fx import Node

from moe_compile.detect.dense import ancestors, not_pure
from moe_compile.detect.dense_values import Every
from moe_compile.detect.interpreter import Call, Interpreter
from moe_compile.detect.lists import PRODUCTS, RowsOfList, _flat
from moe_compile.detect.nodes import name_of, op_of
from moe_compile.detect.rows import POINTWISE
from moe_compile.detect.shapes import same_size
from moe_compile.detect.sum_values import ListTerm
from moe_compile.detect.unify import leaves_of
from moe_compile.detect.values import Plain, Rows, RowTuple, Slice, Unknown, Value
from moe_compile.region import Expr, Leaf

VIEWS = ("view", "reshape", "_unsafe_view", "contiguous")


def bodies(
    run: Interpreter, site: Node, made: Node, num: int, capacity: Any, rank: int
) -> tuple[list[Expr], Every] | Unknown | None:
    """What each expert makes of its slots, and how these were filled; None if `made` is not joined of that.

    rank: of what one expert makes, [C, ...]; its part may have dimensions of one more in front.
    """
    found = joined(made, num, capacity, rank)
    if found is None:
        return None
    parts, lead = found
    needed = [ancestors(part) for part in parts]
    times = collections.Counter(n for mine in needed for n in mine)
    inside = [{n for n in mine if times[n] == 1} for mine in needed]
    span = {n for own in inside for n in own}
    exprs: list[Expr] = []
    sources: set[Every] = set()
    for e, (part, own) in enumerate(zip(parts, inside, strict=True)):
        expr = RowsOfSlots(run, e, ListTerm(None, part), own, lead).result()
        if isinstance(expr, Unknown):
            return expr
        table: dict[Leaf, Expr] = {}
        for leaf in leaves_of(expr):
            if leaf.role == "listed":
                rows = slots_of(run, leaf.node)
                if rows is None or rows[1] != e or not _same_shape(leaf.val, rows[0].expr.val):
                    return Unknown(f"expert {e} runs on other rows than those of its slots")
                sources.add(rows[0])
                table[leaf] = rows[0].expr
        if not same_size(expr.val.shape[0], capacity):
            return None
        exprs.append(replaced(run, expr, table))
    if len(sources) != 1:
        return None
    if why := not_pure(run, site, span):
        return Unknown(why)
    run.inside |= span
    return exprs, sources.pop()


class RowsOfSlots(RowsOfList):
    """What one expert makes of its slots; of [1, ..., C, M], with `lead` ones in front, by ops that let those be."""

    def call(self, node: Node) -> Call:
        return _Behind(node, op_of(node), [], {}, self.run, self)

    def _arg(self, arg: Any) -> Any:
        value = super()._arg(arg)
        if isinstance(arg, Node) and isinstance(value, Plain) and slots_of(self.run, arg) is not None:
            return self._listed(arg, None) or value
        return value

    def _value(self, node: Node) -> Value:
        if slots_of(self.run, node) is not None:
            return self.run.values[node]
        value = super()._value(node)
        if not self.lead or not isinstance(value, Rows | RowTuple):
            return value
        if not _lets_ones_be(node, self.lead) or not all(map(self.fits, leaves(node.meta["val"]))):
            return Unknown(f"{name_of(node)} is not known to leave the dimensions before the rows alone")
        return value

    def fits(self, val: Any) -> bool:
        """Whether a value is one of rows behind as many ones."""
        if not isinstance(val, Tensor) or val.dim() <= self.lead:
            return False
        return all(type(s) is int and s == 1 for s in val.shape[: self.lead])

    def _listed(self, node: Any, rank: int | None) -> Rows | None:
        val = node.meta.get("val") if isinstance(node, Node) else None
        if not self.fits(val) or (node in self.made and not isinstance(self.made[node], Plain | Slice)):
            return None
        val = self.behind(val)
        if val.dim() < 2 or rank not in (None, val.dim()) or not same_size(val.shape[0], self.length):
            return None
        if not isinstance(self.run.otherwise(node), Plain | Slice):
            return None
        return Rows(self.selection, self.run.table.leaf("listed", self.run.canonical[node], val))

    def behind(self, val: Any) -> Any:
        """A value without the dimensions before the rows."""
        if isinstance(val, (tuple, list)):
            return type(val)(map(self.behind, val))
        return val.reshape(val.shape[self.lead :]) if self.fits(val) else val


class _Behind(Call):
    """A call on rows behind ones, as if these were not there."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args[:-1])
        self.reader: RowsOfSlots = args[-1]

    def val(self, of: Any = None) -> Any:
        val = super().val(of)
        if of is None or of is self.node:
            return self.reader.behind(val)
        values = _flat([self.args, list(self.kwargs.values())])
        nodes = _flat([self.node.args, list(self.node.kwargs.values())])
        rows = [isinstance(v, Rows | RowTuple) for v, n in zip(values, nodes, strict=True) if n is of]
        return self.reader.behind(val) if rows and all(rows) else val


def leaves(val: Any) -> list[Any]:
    return list(val) if isinstance(val, (tuple, list)) else [val]


def _lets_ones_be(node: Node, lead: int) -> bool:
    """Whether an op keeps the `lead` dimensions before its rows, and names those behind by numbers from the end."""
    op = op_of(node)
    if op in (*PRODUCTS, "layer_norm", "rms_norm", "getitem", "dropout") or op.rstrip("_") in POINTWISE:
        return True
    if op not in ("chunk", "split", "split_with_sizes", "slice", "select", "softmax", "glu"):
        return False
    at = 2 if op in ("chunk", "split", "split_with_sizes") else 1
    dim = node.args[at] if len(node.args) > at else node.kwargs.get("dim", -1 if op == "glu" else None)
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    return type(dim) is int and lead - rank <= dim < 0


def joined(made: Node, num: int, capacity: Any, rank: int) -> tuple[list[Node], int] | None:
    """Parts [C, ...] that are joined as [E, C, ...], or [E * C, ...]; or [1, ..., C, ...], and how many ones."""
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
    lead = first.dim() - rank if isinstance(first, Tensor) else -1
    if lead < 0 or first.dim() < lead + 2 or any(type(s) is not int or s != 1 for s in first.shape[:lead]):
        return None
    for part in parts:
        val = part.meta["val"]
        if not isinstance(val, Tensor) or val.dtype != first.dtype or val.dim() != first.dim():
            return None
        if not all(map(same_size, val.shape, first.shape)) or not same_size(val.shape[lead], capacity):
            return None
    dim = made.args[1] if len(made.args) > 1 else made.kwargs.get("dim", 0)
    if lead:  # one after the other, whichever of these dimensions they are joined along
        return (list(parts), lead) if type(dim) is int and 0 <= dim < lead and not flipped else None
    along = 1 if flipped else 0
    return (list(parts), 0) if dim == along and (op_of(made) == "stack" or not flipped) else None


def slots_of(run: Interpreter, node: Node) -> tuple[Every, int] | None:
    """The slots of all experts, and the expert whose part [C, ...], or [1, ..., C, ...], a node is."""
    if not isinstance(node.meta.get("val"), Tensor):
        return None
    node = _without_ones(run, node)
    source: Any = node.args[0] if node.args else None
    if op_of(node) == "select":
        at, e = node.args[1:3]
    elif op_of(node) == "getitem" and op_of(source) in ("unbind", "chunk", "split"):
        e, split = node.args[1], source
        if op_of(split) == "split" and split.args[1] != 1:
            return None
        where = 1 if op_of(split) == "unbind" else 2
        at = split.args[where] if len(split.args) > where else split.kwargs.get("dim", 0)
        source = split.args[0]
    else:
        return None
    rank = source.meta["val"].dim()
    laid = _without_ones(run, source)
    if {node, source, *(node.all_input_nodes)} & run.ungraded:
        return None
    rows = run.values.get(laid)
    if not isinstance(rows, Every) or rows.slots is None or rows.flat or type(at) is not int:
        return None
    if at % rank != rank - laid.meta["val"].dim():
        return None
    if op_of(node) == "getitem" and op_of(split) == "chunk" and split.args[1] != rows.num:
        return None
    return (rows, e % rows.num) if type(e) is int and -rows.num <= e < rows.num else None


def _without_ones(run: Interpreter, node: Node) -> Node:
    """The value of which a node is a view, with its gradient, with more or fewer dimensions of one in front."""
    while isinstance(before := node.args[0] if node.args else None, Node):
        val, source = node.meta["val"], before.meta["val"]
        first = op_of(node) == "select" and node.args[1:] == (0, 0)
        if (op_of(node) not in ("squeeze", "unsqueeze", *VIEWS) and not first) or node in run.ungraded:
            break
        if not isinstance(source, Tensor) or val.dtype != source.dtype or not _same_but_ones(val.shape, source.shape):
            break
        node = before
    return node


def _same_shape(a: Tensor, b: Tensor) -> bool:
    return a.dim() == b.dim() and all(map(same_size, a.shape, b.shape))


def _same_but_ones(a: Any, b: Any) -> bool:
    """Whether sizes are the same behind ones in front."""
    n = min(len(a), len(b))
    more = [*a[: len(a) - n], *b[: len(b) - n]]
    return all(type(s) is int and s == 1 for s in more) and all(map(same_size, a[len(a) - n :], b[len(b) - n :]))


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
