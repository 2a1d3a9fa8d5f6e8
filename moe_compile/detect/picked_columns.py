"""Rules for weights that are gathered by one expert of each token: by a vector of ids, or column by column of a table.

    out = zeros_like(x)
    for k in range(K):
        w1, w2 = self.w1[ids[:, k]], self.w2[ids[:, k]]        # [T, F, D], [T, D, F]
        out = out + weights[:, k, None] * einsum("tf,tdf->td", act(einsum("td,tfd->tf", x, w1)), w2)

A value by a vector of ids is that of rows in the order of the tokens.  Where values by several columns of one table are
added, that is a sum over the pairs, of which `by_column.merged` shows that all columns are there and alike.  By one
vector no sum follows: a token has one row, so the region ends wherever no other rule takes the row on.  There a single
product is none of experts': one matrix a row may be that of a cache.
"""

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.by_column import column_of
from moe_compile.detect.dense_values import Picked
from moe_compile.detect.interpreter import Call, Interpreter, Rule
from moe_compile.detect.nodes import name_of
from moe_compile.detect.picked import elsewhere, num_dims, products
from moe_compile.detect.selection import everyone
from moe_compile.detect.shapes import same_size
from moe_compile.detect.sum_values import Buffer, Region, Sum
from moe_compile.detect.sums import finish
from moe_compile.detect.values import Rows, RowTuple, Unknown, Value
from moe_compile.region import Expr, Leaf

aten = torch.ops.aten


def add(call: Call) -> Value | None:
    """total + y, y + total, and in place; y + y of another column; 0 + y, as `sum(...)` begins."""
    left, right = call.arg(0), call.arg(1)
    in_place, val = call.op.endswith("_"), call.val()
    if call.number(2, "alpha", 1) != 1 or elsewhere(call) or not isinstance(val, Tensor):
        return None
    if isinstance(left, Picked) and type(right) is int and right == 0 and not in_place:
        return left if left.expr.val.dtype == val.dtype else None
    for total, term in ((left, right), (right, left)):
        if not isinstance(term, Picked) or num_dims(call, term) != 1 or not products(term):
            continue
        if (in_place and term is left) or any(_differs(call.val(n), val) for n in call.node.all_input_nodes):
            continue
        if column_of(call.run, term.ids) is None and len(products(term)) < 2:
            continue
        found = _so_far(call, total, call.node.args[0 if total is left else 1], term, in_place)  # type: ignore[arg-type]
        if found is None or (in_place and not call.run.is_fresh(found.start.node)):
            continue
        for rows in (*found.terms, _rows(term)):
            call.run.reads.setdefault(rows.selection.ids, set()).add("index")  # type: ignore[arg-type]
        return Sum(found.start, (*found.terms, _rows(term)))
    return None


def _so_far(call: Call, total: Value, node: Node, term: Picked, in_place: bool) -> Sum | None:
    """What the term is added to, if it is a sum of rows by other columns."""
    if isinstance(total, Buffer):
        return Sum(total, ()) if total.kind == "zero" else None
    if isinstance(total, Sum):
        chosen = [t.selection for t in total.terms]
        alike = all(c.ids is not None and c == everyone(c.ids, "flat") for c in chosen)
        return total if alike and all(_other_column(call.run, c.ids, term.ids) for c in chosen) else None  # type: ignore[arg-type]
    if isinstance(total, Picked):
        if not products(total) or not _other_column(call.run, total.ids, term.ids):
            return None
        start, rows = _started(total, term)
        first = Rows(everyone(total.ids, "flat"), rows)
        if in_place:
            return Sum(Buffer(node, "zero"), (first,)) if start is None else None
        return Sum(Buffer(call.node, "zero") if start is None else Buffer(start, "known"), (first,))
    return Sum(Buffer(node, "known"), ()) if in_place and total.plain else None


def _started(first: Picked, second: Picked | None = None) -> tuple[Node | None, Expr]:
    """What rows were added to, if they were: x of `x + y`, and not of `(x + y) + (x + z)`."""
    expr = first.expr
    if expr.target is not aten.add.Tensor or expr.kwargs or len(expr.args) != 2:
        return None, expr
    again = second.expr.args if second is not None and second.expr.target is expr.target else ()
    for start, rows in (expr.args, expr.args[::-1]):
        if not isinstance(start, Leaf) or start.role != "token" or start in again:
            continue
        if isinstance(rows, Expr) and rows.level == "row" and not _differs(start.val, rows.val):
            return start.node, rows
    return None, expr


def _other_column(run: Interpreter, ids: Node, other: Node) -> bool:
    """Whether two vectors of ids are different columns of one table."""
    mine, theirs = column_of(run, ids), column_of(run, other)
    return mine is not None and theirs is not None and mine[0] is theirs[0] and mine[1] != theirs[1]


def _rows(value: Picked) -> Rows:
    return Rows(everyone(value.ids, "flat"), value.expr)


def _differs(a: Tensor, b: Tensor) -> bool:
    return a.dtype != b.dtype or a.dim() != b.dim() or not all(map(same_size, a.shape, b.shape))


# -- where no sum follows -------------------------------------------------------------------


def ended(run: Interpreter) -> None:
    """Where nothing is summed over experts: what the one expert of each token makes of it, as a region."""
    for node, value in list(run.values.items()):
        if not isinstance(value, Picked) or value.ids.meta["val"].dim() != 1 or not products(value):
            continue
        if not node.users or any(_goes_on(run.values.get(user), value.ids) for user in node.users):
            continue
        if len(products(value)) < 2:
            run.hints.append(f"{name_of(node)} ends a single product with matrices gathered by {value.ids.name}")
            continue
        if not run.is_own(node):
            run.hints.append(f"{node.name} is read through another name after it was changed in place")
            continue
        run.reads.setdefault(value.ids, set()).add("index")
        start, expr = _started(value)
        into = Buffer(node, "zero") if start is None else Buffer(start, "known")
        region = finish(run, node, Sum(into, (Rows(everyone(value.ids, "flat"), expr),)))
        if isinstance(region, Region):
            run.regions[node] = region
        elif isinstance(region, Unknown):
            run.hints.append(region.reason)


def _goes_on(value: Value | None, ids: Node) -> bool:
    """Whether a value is made of rows by these ids."""
    items = value.items if isinstance(value, RowTuple) else (value,)
    return isinstance(value, Sum) or any(isinstance(v, Picked) and v.ids is ids for v in items)


RULES: dict[str, tuple[Rule, ...]] = {op: (add,) for op in ("add", "add_")}
