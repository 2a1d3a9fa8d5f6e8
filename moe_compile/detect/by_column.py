"""Sums over the columns of the ids, one after the other, as one sum over pairs.

    for k in range(K):
        for e in range(E):
            mask = ids[:, k] == e
            out[mask] += expert_e(x[mask]) * weights[mask, k, None]

Each column is a vector of ids of its own.  If every expert has one term for every column, and these are one function of
the row, but that where one reads column k of a table [T, K, ...] the others read theirs, they are the terms of `ids`.
So are terms of all experts at once, one for each column, as of weights that are gathered by `ids[:, k]`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_compile.detect.interpreter import Interpreter
from moe_compile.detect.nodes import op_of
from moe_compile.detect.sum_values import Sum
from moe_compile.detect.unify import leaves_of
from moe_compile.detect.values import Rows, Selection, Unknown
from moe_compile.region import Expr, Leaf

aten = torch.ops.aten


def column_of(run: Interpreter, node: Node) -> tuple[Node, int, int] | None:
    """(table, k, K) of a value that is column k of a table [T, K, ...]: table[:, k], or of unbind(1).

    Taken under no_grad a column of weights has no gradient, and is a value of its own.
    """
    taken = {node}
    if op_of(node) == "select" and node.args[1] in (1, 1 - _rank(node.args[0])):
        table, k = node.args[0], node.args[2]
    elif op_of(node) == "getitem" and isinstance(node.args[0], Node) and op_of(node.args[0]) == "unbind":
        unbound, k = node.args
        table, dim = unbound.args[0], unbound.args[1] if len(unbound.args) > 1 else 0  # type: ignore[union-attr]
        if dim not in (1, 1 - _rank(table)):
            return None
        taken.add(unbound)  # type: ignore[arg-type]
    else:
        return None
    val = table.meta.get("val") if isinstance(table, Node) else None
    if not isinstance(val, Tensor) or type(k) is not int or type(val.shape[1]) is not int:
        return None
    assert isinstance(table, Node)
    if taken & run.ungraded and table not in run.ungraded and val.is_floating_point():
        return None
    return run.canonical.get(table, table), k % val.shape[1], val.shape[1]


def _rank(node: Any) -> int:
    val = node.meta.get("val") if isinstance(node, Node) else None
    return val.dim() if isinstance(val, Tensor) else 0


def table_of(run: Interpreter, total: Sum) -> Node | None:
    """The table of ids of which the terms choose by several columns; None if they do not."""
    chosen = {term.selection.ids for term in total.terms}
    if len(chosen) < 2 or None in chosen:
        return None
    columns = [column_of(run, ids) for ids in chosen]  # type: ignore[arg-type]
    tables = {found[0] for found in columns if found is not None}
    return tables.pop() if len(tables) == 1 and None not in columns else None


def merged(run: Interpreter, total: Sum) -> Sum | Unknown:
    """The sum with a term for each expert, if it has one for each expert and column; else the sum as it is."""
    first = total.terms[0]
    if len(total.terms) == 1 and first.selection == Selection(first.selection.ids, None, None, "pair", "flat", 1):
        return Sum(total.start, (replace(first, expr=_with_leaves(run, first.expr, _alone)),))
    table = table_of(run, total)
    if table is None or _rank(table) != 2:
        return total
    if all(term.selection.expert is None for term in total.terms):
        return _of_all_experts(run, total, table)
    terms: dict[int, dict[int, Rows]] = {}
    width = 0
    for term in total.terms:
        chosen = term.selection
        assert chosen.ids is not None
        _, k, width = column_of(run, chosen.ids)  # type: ignore[misc]
        alike = chosen == Selection(chosen.ids, chosen.expert, None)
        if not alike or not isinstance(chosen.expert, int) or term.dim != 0:
            return Unknown("the columns of the expert ids choose rows in different ways")
        if k in terms.setdefault(chosen.expert, {}):
            return Unknown(f"the loop visits expert {chosen.expert} of column {k} twice")
        terms[chosen.expert][k] = term
    found = []
    for e, by_column in terms.items():
        if len(by_column) < width:
            return Unknown(f"the loop visits columns {sorted(by_column)} of expert {e}, of {width}")
        bodies = {k: _of_pair(run, term.expr, k, width) for k, term in by_column.items()}
        other = next((k for k, body in bodies.items() if body is not bodies[0]), None)
        if other is not None:
            return Unknown(f"expert {e} adds something else for column {other} of its ids than for column 0")
        found.append(Rows(replace(by_column[0].selection, ids=table), bodies[0]))
    run.by_column |= {term.selection.ids: table for term in total.terms if term.selection.ids is not None}
    return Sum(total.start, tuple(found))


def _of_all_experts(run: Interpreter, total: Sum, table: Node) -> Sum | Unknown:
    """The sum with one term, if it has one of all experts at once for each column."""
    by_column: dict[int, Expr] = {}
    width = 0
    for term in total.terms:
        chosen = term.selection
        assert chosen.ids is not None
        _, k, width = column_of(run, chosen.ids)  # type: ignore[misc]
        if chosen != Selection(chosen.ids, None, None, "pair", "flat", 1) or term.dim != 0:
            return Unknown("the columns of the expert ids choose rows in different ways")
        if k in by_column:
            return Unknown(f"column {k} of the expert ids has two terms")
        by_column[k] = _of_pair(run, term.expr, k, width)
    if len(by_column) < width:
        return Unknown(f"experts of columns {sorted(by_column)} of the ids are added, of {width}")
    other = next((k for k, body in by_column.items() if body is not by_column[0]), None)
    if other is not None:
        return Unknown(f"something else is added for column {other} of the expert ids than for column 0")
    columns = [term.selection.ids for term in total.terms if term.selection.ids is not None]
    run.by_column |= dict.fromkeys(columns, table)
    run.reads.setdefault(table, set()).update(*(run.reads.get(ids, set()) for ids in columns))
    chosen = Selection(table, None, None, "pair", "flat", width)
    return Sum(total.start, (Rows(chosen, by_column[0]),))


def _of_pair(run: Interpreter, root: Expr, k: int, width: int) -> Expr:
    """The expression with entry (t, k) of a table where it reads its column k."""
    return _with_leaves(run, root, lambda run, leaf: _leaf(run, leaf, k, width))


def _alone(run: Interpreter, leaf: Leaf) -> Expr:
    """One number a token is one of a pair, where a token has one expert."""
    if leaf.role != "token" or _rank(leaf.node) != 2 or leaf.node.meta["val"].shape[1] != 1:
        return leaf
    pair = run.table.leaf("pair", leaf.node, leaf.val.select(1, 0))
    return run.table.call(aten.unsqueeze.default, (pair, 1), {}, leaf.val)


def _with_leaves(run: Interpreter, root: Expr, of: Callable[[Interpreter, Leaf], Expr]) -> Expr:
    made: dict[int, Any] = {id(leaf): of(run, leaf) for leaf in leaves_of(root)}

    def rebuilt(arg: Any) -> Any:
        if isinstance(arg, (tuple, list)):
            return type(arg)(map(rebuilt, arg))
        if not isinstance(arg, Expr):
            return arg
        if id(arg) not in made:
            made[id(arg)] = run.table.call(arg.target, rebuilt(arg.args), dict(rebuilt(arg.kwargs)), arg.val)
        return made[id(arg)]

    return rebuilt(root)  # type: ignore[no-any-return]


def _leaf(run: Interpreter, leaf: Leaf, k: int, width: int) -> Expr:
    node: Any = leaf.node
    if leaf.role != "token" or (node in run.ungraded and not run.ungraded.issuperset(node.all_input_nodes)):
        return leaf
    if column := column_of(run, node):
        own = column[1:] == (k, width)
        return run.table.leaf("pair", column[0], leaf.val) if own else leaf
    wide = op_of(node) == "unsqueeze" and node.args[1] in (1, -1) and _rank(node) == 2
    if wide and (column := column_of(run, node.args[0])):
        source, own = column[0], column[1:] == (k, width)
    elif op_of(node) == "slice" and node.args[1:] == (1, k, k + 1) and _rank(node) == 2:
        source, own = run.canonical.get(node.args[0], node.args[0]), node.args[0].meta["val"].shape[1] == width
    else:
        return leaf
    if not own:
        return leaf
    pair = run.table.leaf("pair", source, leaf.val.select(1, 0))
    return run.table.call(aten.unsqueeze.default, (pair, 1), {}, leaf.val)
