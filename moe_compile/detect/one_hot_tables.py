"""Rules for tables of weights [T, E] that a one-hot mask makes, and what einsum's letters say.

table = (one_hot(ids, E) * weights[..., None]).sum(1)          # zero but for the chosen experts, as of a scatter
table = einsum("tk,tke->te", weights, one_hot(ids, E))
"""

from typing import Any

from torch import Tensor
from torch.fx import Node

from moe_compile.detect.dense_values import Spread
from moe_compile.detect.every import elsewhere
from moe_compile.detect.interpreter import Call, Rule
from moe_compile.detect.slots import Slots, is_table
from moe_compile.detect.values import Member, Plain, Value


def as_table(call: Call, value: Any, node: Node) -> Spread | None:
    """A table [T, E], or [E, T], that is zero but for the chosen experts."""
    if isinstance(value, Spread):
        return value if value.fill == 0 and value.dims in ((0, "e"), ("e", 0)) else None
    if isinstance(value, Slots) and value.dims == (0, "e"):
        ids = _ids_of(call, value)
        return Spread(node, ids, (0, "e")) if ids is not None else None
    return None


def _ids_of(call: Call, table: Any) -> Node | None:
    """The ids of a table [T, E] or [T, K, E] that is zero but at each of them, if none of them may be nobody's."""
    if isinstance(table, Slots):
        term = table.terms[0]
        ids = term.ids if len(table.terms) == 1 and term.by_expert and term.place is None else None
    else:
        ids = table.ids if is_table(table) else None
    fits = ids is not None and ids not in call.run.written and ids.meta["val"].dim() == len(table.dims) - 1
    return ids if fits else None


def added_up(call: Call) -> Value | None:
    """(one_hot(ids, E) * weights[..., None]).sum(1): a table of the weights."""
    table, dims = call.arg(0), call.number(1, "dim")
    dims = dims if isinstance(dims, list) else [dims]
    if not isinstance(table, Slots) or table.dims != (0, 1, "e") or dims not in ([1], [-2]) or elsewhere(call):
        return None
    val, before = call.val(), call.val(call.node.args[0])
    if call.number(2, "keepdim", False) or val.dtype != before.dtype or not val.is_floating_point():
        return None
    ids = _ids_of(call, table)
    return Spread(call.node, ids, (0, "e")) if ids is not None else None


def added_by_einsum(call: Call) -> Value | None:
    """einsum("tk,tke->te", weights, one_hot(ids, E)): the same."""
    equation = equation_of(call, 2)
    if equation is None or elsewhere(call) or not call.val().is_floating_point():
        return None
    letters, result = equation
    for i in (0, 1):
        table, weights, mine = call.arg(1)[i], call.arg(1)[1 - i], letters[i]
        if not isinstance(table, Slots | Member) or table.dims != (0, 1, "e") or not isinstance(weights, Plain):
            continue
        if letters[1 - i] != mine[:2] or result != mine[0] + mine[2]:
            return None
        ids = _ids_of(call, table)
        return Spread(call.node, ids, (0, "e")) if ids is not None else None
    return None


def equation_of(call: Call, number: int) -> tuple[list[str], str] | None:
    """The letters of so many operands, none twice in one of them, and those of the result."""
    equation, operands = call.arg(0), call.arg(1)
    if not isinstance(equation, str) or not isinstance(operands, list) or len(operands) != number:
        return None
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if not arrow or "." in equation or len(letters) != number or (len(call.args) > 2 and call.arg(2) is not None):
        return None
    once = all(len(set(term)) == len(term) for term in (*letters, result))
    nodes: Any = call.node.args[1]
    vals = [call.val(n) for n in nodes if isinstance(n, Node)]
    ranks = len(vals) == number and all(isinstance(v, Tensor) for v in vals)
    fits = once and ranks and all(v.dim() == len(term) for v, term in zip(vals, letters, strict=True))
    return (letters, result) if fits else None


RULES: dict[str, tuple[Rule, ...]] = {"sum": (added_up,), "einsum": (added_by_einsum,)}
