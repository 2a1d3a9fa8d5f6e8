"""How many experts a weight that is viewed has: by the sizes of the view, as the function's source names them.

    self.w1.view(self.num_experts, self.ffn, self.hidden)[e]        of a parameter [E * F, D], or [E, F * D]
    shape = (-1, self.ffn, self.hidden)
    self.mlp.w1.view(shape)[e]
    self.pick(self.w1, e)                                           with the view in a method of the module

Sizes are numbers, attributes of the module and of what it holds, and sums, products and quotients of these.  A view
that is turned, or indexed along another dimension first, has its experts elsewhere.  What is found may be wrong, and a
weight that is not found is no error: the proof decides what an expert reads.
"""

import ast
import builtins
import inspect
import math
import operator
import textwrap
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from moe_compile.candidates import VIEWS

DEPTH = 3  # of methods that call each other

OPS: dict[type, Any] = {
    ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Add: operator.add, ast.Sub: operator.sub,
}  # fmt: skip


TURNS = frozenset(("permute", "transpose", "movedim", "swapaxes", "T", "mT", "t"))


class _Unknown(Exception):
    """A value that the source alone does not say."""


def experts_of_views(fn: types.FunctionType, module: nn.Module) -> dict[int, int]:
    """{id of a parameter: the first size that `fn(module, ..)` views it with}, where all of its views agree on it."""
    found: dict[int, set[int]] = {}
    for parameter, number in _views(fn, {0: module}, DEPTH):
        if 1 < number <= parameter.shape[0] and parameter.shape[0] % number == 0:
            found.setdefault(id(parameter), set()).add(number)
    return {key: sizes.pop() for key, sizes in found.items() if len(sizes) == 1}


def _views(fn: types.FunctionType, given: dict[int, Any], depth: int) -> Iterator[tuple[nn.Parameter, int]]:
    """The parameters that a function views, with the first sizes.  given: those of its arguments that are known."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(fn.__code__)))
    except (OSError, TypeError, SyntaxError):
        return
    names = fn.__code__.co_varnames
    known = {name: value for name, value in fn.__globals__.items() if type(value) is int}
    known |= {names[i]: value for i, value in given.items() if i < fn.__code__.co_argcount}
    source = _Source(tree, known)
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        try:
            target = source.value(call.func.value)
        except _Unknown:
            continue
        if call.func.attr in VIEWS and isinstance(target, nn.Parameter) and not call.keywords:
            if _is_turned(tree, call):
                continue
            try:
                yield target, _first(call.func.attr, target, [source.known(a) for a in call.args])
            except _Unknown:
                continue
        elif depth and target is given.get(0) and isinstance(target, nn.Module):
            method = inspect.getattr_static(type(target), call.func.attr, None)
            if isinstance(method, types.FunctionType):
                args = {i + 1: found for i, a in enumerate(call.args) if (found := source.known(a)) is not None}
                yield from _views(inspect.unwrap(method), {0: target, **args}, depth - 1)


def _is_turned(tree: ast.AST, view: ast.expr) -> bool:
    """Whether the first dimension of a view, or of the name that it gets, is not the one that is indexed."""
    users = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = [users[id(view)]]
    if isinstance(found[0], ast.Assign) and isinstance(name := found[0].targets[0], ast.Name):
        found = [users[id(n)] for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == name.id]
    for user in found:
        match user:
            case ast.Attribute(attr=attr) if attr in TURNS:
                return True
            case ast.Subscript(slice=ast.Tuple(elts=[ast.Slice() | ast.Constant(value=builtins.Ellipsis), *_])):
                return True
    return False


def _first(op: str, parameter: nn.Parameter, args: list[Any]) -> int:
    """The first of the sizes of a view, of the arguments that it gets, None for what is not known."""
    number = parameter.numel()
    if op == "unflatten":
        if len(args) != 2 or args[0] not in (0, -parameter.dim()):
            raise _Unknown
        number, args = parameter.shape[0], args[1:]
    sizes = list(args[0]) if len(args) == 1 and isinstance(args[0], tuple) else args
    if len(sizes) < 2:
        raise _Unknown
    first, *rest = sizes
    if first != -1:
        return _number(first)
    return number // max(1, math.prod(_number(n) for n in rest))


class _Source:
    """The values of expressions: numbers, tuples, and what a module and its parts hold, reached by attributes."""

    def __init__(self, tree: ast.AST, known: dict[str, Any]) -> None:
        stored = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        self.names = {name: value for name, value in known.items() if name not in stored}
        self.assigned: dict[str, ast.expr] = {}
        for n in ast.walk(tree):
            if isinstance(n, ast.Assign) and len(n.targets) == 1 and isinstance(n.targets[0], ast.Name):
                if stored.count(n.targets[0].id) == 1:
                    self.assigned[n.targets[0].id] = n.value

    def known(self, node: ast.expr) -> Any:
        try:
            return self.value(node)
        except _Unknown:
            return None

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int()):
                return node.value
            case ast.Tuple(elts=elts) | ast.List(elts=elts):
                return tuple(self.known(e) for e in elts)
            case ast.UnaryOp(op=ast.USub()):
                return -_number(self.value(node.operand))
            case ast.BinOp() if type(node.op) in OPS:
                return self._computed(node)
            case ast.Name(id=name) if name in self.names:
                return self.names[name]
            case ast.Name(id=name) if name in self.assigned:
                self.names[name] = self.value(self.assigned.pop(name))  # popped: it may be assigned from itself
                return self.names[name]
            case ast.Attribute():
                return self._attribute(node)
            case ast.Subscript():
                held, at = self.value(node.value), self.value(node.slice)
                if isinstance(held, tuple) and type(at) is int and -len(held) <= at < len(held):
                    return held[at]
        raise _Unknown

    def _computed(self, node: ast.BinOp) -> int:
        left, right = _number(self.value(node.left)), _number(self.value(node.right))
        if isinstance(node.op, ast.FloorDiv) and not right:
            raise _Unknown
        return int(OPS[type(node.op)](left, right))

    def _attribute(self, node: ast.Attribute) -> Any:
        held = self.value(node.value)
        if isinstance(held, nn.Parameter):
            if node.attr == "shape":
                return tuple(held.shape)
            raise _Unknown
        if isinstance(held, nn.Module):
            for table in (held._parameters, held._modules):
                if node.attr in table:
                    return table[node.attr]
        found = inspect.getattr_static(held, node.attr, None)  # runs no property
        if found is None:
            raise _Unknown
        return found


def _number(value: Any) -> int:
    if type(value) is not int:
        raise _Unknown
    return value
