"""Edits of expressions: another name, number, operator, order or dimension, a view, no gradient, in place or not."""

import ast
import copy
from random import Random
from typing import Any

from tests.fuzz.syntax import Function, blocks, expression, names, spots, statement, values, wrapped

COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)
WRAPS = (
    "{}.detach()", "{}.detach()", "{}.roll(1, 0)", "{}.flip(0)", "{}.flip(0)", "{}.flip(-1)", "{}.clone()", "{}.float()", "({} * 0.5)",
    "({} + 1)", "({} - 1)", "{}.cumsum(0)", "{}.sort(0).values", "{}.sort(-1).values", "{}.abs()", "{}.relu()", "({} - {}.mean(0))",
    "{}.t()", "{}.contiguous()", "({} % 3)", "{}.clamp(max=2)", "{}.clamp(max=0.5)", "{}[1:]", "{}[:1]", "{}.unique()", "{}.sum(0)",
    "{}.sum(0, keepdim=True)", "{}.long()", "{}.bool()", "{}.softmax(0)", "{}.softmax(-1)", "(-{})", "{}.expand_as({})", "{}.data", "{}.t().t()",
    "{}.roll(1, -1)", "{}.squeeze()", "{}.max(0, keepdim=True).values", "{}.unsqueeze(0)", "{}.view(-1)", "{}.tolist()", "len({})",
    "{}.triu()", "F.dropout({}, 0.5)", "torch.no_grad()(lambda: {})()",
)  # fmt: skip
INDICES = ("{} % 2", "{}.clamp(max=1)", "{}.flip(0)", "{}.roll(1, 0)", "{} - 1", "{}.sort().values", "-1 - {}")


def wrap(draw: Random, fn: Function) -> str | None:
    if not (found := values(fn)):
        return None
    spot, template = draw.choice(found), draw.choice(WRAPS)
    spot.put(wrapped(template, spot.node))
    return f"wrap {template}"


def index(draw: Random, fn: Function) -> str | None:
    found = [s for s in spots(fn, ast.Subscript) if not isinstance(s.node.slice, ast.Slice)]
    if not found:
        return None
    node, template = draw.choice(found).node, draw.choice(INDICES)
    if isinstance(node.slice, ast.Tuple):
        held = [i for i, e in enumerate(node.slice.elts) if not isinstance(e, ast.Slice)]
        if not held:
            return None
        at = draw.choice(held)
        node.slice.elts[at] = wrapped(template, node.slice.elts[at])
    else:
        node.slice = wrapped(template, node.slice)
    return f"index {template}"


def other_name(draw: Random, fn: Function) -> str | None:
    """Another variable, perhaps one that is set later: then it has its value of the iteration before."""
    known = names(fn)
    found = [s for s in spots(fn, ast.Name) if s.node.id in known]
    if not found or len(known) < 2:
        return None
    spot = draw.choice(found)
    other = draw.choice([n for n in known if n != spot.node.id])
    said = f"{spot.node.id} -> {other}"
    spot.put(ast.Name(other, ast.Load()))
    return said


def swap_names(draw: Random, fn: Function) -> str | None:
    """Two names of one statement."""
    known = set(names(fn))
    found = []
    for block in blocks(fn):
        for node in block:
            held = [s for s in spots(node, ast.Name) if s.node.id in known]
            if len({s.node.id for s in held}) > 1:
                found.append(held)
    if not found:
        return None
    first, second = draw.sample(draw.choice(found), 2)
    first.node.id, second.node.id = second.node.id, first.node.id
    return f"swap {first.node.id}, {second.node.id}" if first.node.id != second.node.id else None


def attribute(draw: Random, fn: Function) -> str | None:
    found = [
        s.node for s in spots(fn, ast.Attribute) if isinstance(s.node.value, ast.Name) and s.node.value.id == "self"
    ]
    if len({n.attr for n in found}) < 2:
        return None
    first, second = draw.sample(found, 2)
    said = f"self.{first.attr} -> self.{second.attr}"
    first.attr = second.attr
    return said


def constant(draw: Random, fn: Function) -> str | None:
    found = [s for s in spots(fn, ast.Constant) if not (isinstance(s.parent, ast.Expr))]
    if not found:
        return None
    spot = draw.choice(found)
    value = spot.node.value
    if isinstance(value, bool):
        other: Any = not value
    elif isinstance(value, int):
        other = draw.choice([n for n in (0, 1, -1, 2, value + 1, value - 1, -value) if n != value])
    elif isinstance(value, float):
        other = draw.choice([0.0, 2 * value, -value, value + 0.5])
    elif isinstance(value, str) and "->" in value:  # an einsum's letters
        letters = [i for i, c in enumerate(value) if c.isalpha()]
        i, j = draw.sample(letters, 2)
        text = list(value)
        text[i], text[j] = text[j], text[i]
        other = "".join(text)
    elif value is None:
        other = draw.choice([0, 1])
    else:
        return None
    spot.put(ast.Constant(other))
    return f"{value!r} -> {other!r}"


def comparison(draw: Random, fn: Function) -> str | None:
    if not (found := spots(fn, ast.Compare)):
        return None
    draw.choice(found).node.ops[0] = draw.choice(COMPARISONS)()
    return "comparison"


def operator(draw: Random, fn: Function) -> str | None:
    if not (found := spots(fn, ast.BinOp)):
        return None
    draw.choice(found).node.op = draw.choice(OPERATORS)()
    return "operator"


def arguments(draw: Random, fn: Function) -> str | None:
    """Without one of a call's arguments, or with two of them exchanged."""
    found = [s.node for s in spots(fn, ast.Call) if s.node.args or s.node.keywords]
    if not found:
        return None
    call = draw.choice(found)
    if len(call.args) > 1 and draw.random() < 0.5:
        i, j = draw.sample(range(len(call.args)), 2)
        call.args[i], call.args[j] = call.args[j], call.args[i]
        return "exchange arguments"
    held = [*((call.args, i) for i in range(len(call.args))), *((call.keywords, i) for i in range(len(call.keywords)))]
    where, i = draw.choice(held)
    del where[i]
    return "drop an argument"


def in_place(draw: Random, fn: Function) -> str | None:
    """A method in place for one that is not, `+=` for `=`, or the reverse."""
    calls = [s.node.func for s in spots(fn, ast.Call) if isinstance(s.node.func, ast.Attribute)]
    held = [
        (block, i) for block in blocks(fn) for i, n in enumerate(block) if isinstance(n, ast.Assign | ast.AugAssign)
    ]
    if held and draw.random() < 0.6:
        block, i = draw.choice(held)
        node = block[i]
        if isinstance(node, ast.AugAssign):
            target = ast.unparse(node.target)
            if draw.random() < 0.5:
                block[i] = statement(f"{target} = {ast.unparse(node.value)}")
                return "+= to ="
            text = copy.deepcopy(node)
            value = ast.BinOp(expression(target), text.op, text.value)
            block[i] = statement(f"{target} = {ast.unparse(ast.fix_missing_locations(value))}")
            return "+= to = +"
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            target, sign = node.targets[0].id, draw.choice(("+", "*", "-"))
            if (
                isinstance(node.value, ast.BinOp)
                and isinstance(node.value.left, ast.Name)
                and node.value.left.id == target
            ):
                block[i] = ast.AugAssign(ast.Name(target, ast.Store()), node.value.op, node.value.right)
                return "= + to +="
            block[i] = statement(f"{target} {sign}= {ast.unparse(node.value)}")
            return f"= to {sign}="
    if not calls:
        return None
    func = draw.choice(calls)
    func.attr = func.attr.removesuffix("_") if func.attr.endswith("_") else func.attr + "_"
    return f".{func.attr}"
