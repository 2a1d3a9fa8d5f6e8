"""A function's syntax tree as places where other nodes can be put."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

Function = ast.FunctionDef
KEPT = {"annotation", "returns", "decorator_list", "type_comment", "defaults", "kw_defaults"}  # not edited


@dataclass(frozen=True)
class Spot:
    """A place in a tree where another node can be put."""

    parent: ast.AST
    field: str
    index: int | None = None

    @property
    def node(self) -> Any:
        held = getattr(self.parent, self.field)
        return held if self.index is None else held[self.index]

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def spots(node: ast.AST, *kinds: type[ast.AST]) -> list[Spot]:
    """All places of a tree with nodes of these kinds, of expressions those that are read."""
    found = [s for s in _spots(node) if isinstance(s.node, kinds)]
    return [s for s in found if isinstance(getattr(s.node, "ctx", ast.Load()), ast.Load)]


def _spots(node: ast.AST) -> Iterator[Spot]:
    for name, value in ast.iter_fields(node):
        if name in KEPT:
            continue
        held = value if isinstance(value, list) else [value]
        for i, child in enumerate(held):
            if isinstance(child, ast.AST):
                yield Spot(node, name, i if isinstance(value, list) else None)
                yield from _spots(child)


def blocks(fn: Function) -> list[list[ast.stmt]]:
    """All lists of statements."""
    return [
        getattr(n, name)
        for n in ast.walk(fn)
        for name in ("body", "orelse")
        if isinstance(getattr(n, name, None), list) and getattr(n, name)
    ]


def names(fn: Function) -> list[str]:
    """What the function can call by name: its arguments and what it sets."""
    own = [a.arg for a in (*fn.args.args, *fn.args.kwonlyargs) if a.arg != "self"]
    stored = [n.id for n in ast.walk(fn) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return list(dict.fromkeys(own + stored))


def values(fn: Function) -> list[Spot]:
    """Places of expressions that may be tensors: no names of modules, no functions that are called."""
    own = {*names(fn), "self"}
    found = spots(fn, ast.Name, ast.Subscript, ast.Call, ast.BinOp, ast.Attribute, ast.Compare)
    named = [s for s in found if own & {n.id for n in ast.walk(s.node) if isinstance(n, ast.Name)}]
    called = [s for s in named if s.field != "func" and not (isinstance(s.node, ast.Name) and s.node.id == "self")]
    return [s for s in called if not (isinstance(s.parent, ast.Attribute) and isinstance(s.parent.ctx, ast.Store))]


def expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def statement(text: str) -> ast.stmt:
    return ast.parse(text).body[0]


def filled(draw: Random, template: str, fn: Function) -> str:
    """A template about one of the function's names."""
    return template.replace("{}", draw.choice(names(fn) or ["self"]))


def wrapped(template: str, node: ast.expr) -> ast.expr:
    """A template about an expression."""
    return expression(template.replace("{}", f"({ast.unparse(node)})"))
