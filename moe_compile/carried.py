"""What a loop that skips experts may carry in Python: where rows begin, and a list of results to be joined.

Neither can tell an iteration how many were skipped before it.  An offset (`start += n`) is only added to, and only
says where slices lie, which a capture shows.  A list is only appended to, joined after the loop, and asked whether it
is empty.
"""

import ast
from collections.abc import Callable, Iterator

JOINS = {"cat", "concat", "concatenate"}


def offsets(loop: ast.For, carried: set[str], held: Callable[[str], bool]) -> set[str]:
    """Those of the carried names that are offsets: all that they flow into is used as an offset too.

    `held`: whether a variable held nothing else when the function was captured; a plain number could count iterations.
    """
    flow = {name: _flows_into(loop, name) for name in _stored(loop) | carried}
    found = set()
    for name in carried:
        reached, todo = {name}, [name]
        while todo:
            new = flow.get(todo.pop(), set()) - reached
            reached |= new
            todo += new
        if all(_is_offset(loop, n, reached) and held(n) for n in reached):
            found.add(name)
    return found


def _stored(loop: ast.For) -> set[str]:
    return {n.id for n in ast.walk(loop) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _flows_into(loop: ast.For, name: str) -> set[str]:
    """The names that are set from an expression with the name in it."""
    return {target.id for target, value in _assignments(loop) if name in _sum_of_names(value)}


def _assignments(loop: ast.For) -> Iterator[tuple[ast.Name, ast.expr]]:
    for n in ast.walk(loop):
        if isinstance(n, ast.Assign) and len(n.targets) == 1 and isinstance(n.targets[0], ast.Name):
            yield n.targets[0], n.value
        elif isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name) and isinstance(n.op, ast.Add):
            yield n.target, ast.BinOp(ast.Name(n.target.id, ast.Load()), n.op, n.value)


def _sum_of_names(value: ast.expr) -> set[str]:
    """The names that a sum adds; none for any other expression."""
    if isinstance(value, ast.Name):
        return {value.id}
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        return _sum_of_names(value.left) | _sum_of_names(value.right)
    return set()


def _is_offset(loop: ast.For, name: str, others: set[str]) -> bool:
    """Whether the loop uses the name only in bounds of slices, in sums that become offsets, and in `start == end`."""
    allowed: set[int] = set()
    for n in ast.walk(loop):
        if isinstance(n, ast.Slice):
            allowed |= {id(x) for bound in (n.lower, n.upper) if bound is not None for x in _names(bound)}
        if isinstance(n, ast.Compare) and _tells_own_rows(loop, n):
            allowed |= {id(n.left), id(n.comparators[0])}
    for n in ast.walk(loop):
        if isinstance(n, ast.Assign) and len(n.targets) == 1 and isinstance(n.targets[0], ast.Name):
            if n.targets[0].id in others:
                allowed |= {id(x) for x in _names(n.value)}
        elif isinstance(n, ast.AugAssign) and isinstance(n.op, ast.Add) and isinstance(n.target, ast.Name):
            if n.target.id in others:
                allowed |= {id(n.target), *(id(x) for x in _names(n.value))}
    uses = (n for n in ast.walk(loop) if isinstance(n, ast.Name) and n.id == name)
    return all(id(n) in allowed or (isinstance(n.ctx, ast.Store) and _is_set_alone(loop, n)) for n in uses)


def _names(value: ast.expr) -> Iterator[ast.Name]:
    """The names that are added in an expression of names, numbers and entries of lists."""
    if isinstance(value, ast.Name):
        yield value
    elif isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        yield from _names(value.left)
        yield from _names(value.right)


def _is_set_alone(loop: ast.For, target: ast.Name) -> bool:
    return any(target is t for t, _ in _assignments(loop))


def _tells_own_rows(loop: ast.For, test: ast.Compare) -> bool:
    """start == end, where end = start + n: it says whether n is zero, whatever start is."""
    names = [test.left, *test.comparators]
    if len(names) != 2 or not all(isinstance(n, ast.Name) for n in names):
        return False
    a, b = (n.id for n in names if isinstance(n, ast.Name))
    for one, other in ((a, b), (b, a)):
        values = [value for target, value in _assignments(loop) if target.id == other]
        if len(values) == 1 and isinstance(values[0], ast.BinOp) and one in _sum_of_names(values[0]):
            return True
    return False


def lists(tree: ast.AST, loop: ast.For) -> set[str]:
    """Names of lists that the loop appends to, that are joined after it, and that nobody looks into."""
    appended = {_appends_to(n) for n in ast.walk(loop)} - {None}
    return {name for name in appended if name is not None and _is_list_of_pieces(tree, loop, name)}


def _appends_to(n: ast.AST) -> str | None:
    """The name in `name.append(one thing)` as a statement."""
    if not (isinstance(n, ast.Expr) and isinstance(call := n.value, ast.Call) and len(call.args) == 1):
        return None
    method = call.func
    if isinstance(method, ast.Attribute) and method.attr == "append" and isinstance(method.value, ast.Name):
        return method.value.id
    return None


def _is_list_of_pieces(tree: ast.AST, loop: ast.For, name: str) -> bool:
    allowed: set[int] = set()
    made = 0
    for n in ast.walk(tree):
        for target, value in _set_together(n):
            if isinstance(target, ast.Name) and target.id == name and isinstance(value, ast.List) and not value.elts:
                made += 1
                allowed.add(id(target))
        if _appends_to(n) == name:
            allowed.add(id(n.value.func.value))  # type: ignore[attr-defined]
        if isinstance(n, ast.Call) and n.args and isinstance(n.args[0], ast.Name):
            joins = getattr(n.func, "attr", getattr(n.func, "id", None)) in JOINS
            if joins and n.lineno > (loop.end_lineno or 0):
                allowed.add(id(n.args[0]))
        if isinstance(n, (ast.If, ast.IfExp)) and (asked := _asked_if_empty(n.test)) is not None:
            if n.lineno > (loop.end_lineno or 0):
                allowed.add(id(asked))
    inside = {id(n) for n in ast.walk(loop)}
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == name]
    starts = [n for n in uses if isinstance(n.ctx, ast.Store)]
    return made == 1 == len(starts) and id(starts[0]) not in inside and all(id(n) in allowed for n in uses)


def _set_together(n: ast.AST) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """What an assignment sets to what: `a = x`, `a: T = x`, `a, b = x, y`."""
    if isinstance(n, ast.AnnAssign):
        yield n.target, n.value
    if isinstance(n, ast.Assign) and len(n.targets) == 1:
        target = n.targets[0]
        if isinstance(target, ast.Tuple) and isinstance(n.value, ast.Tuple) and len(target.elts) == len(n.value.elts):
            yield from zip(target.elts, n.value.elts, strict=True)
        else:
            yield target, n.value


def _asked_if_empty(test: ast.expr) -> ast.Name | None:
    """The name in `name`, `not name`, `len(name)`, `len(name) > 0` and the like."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _asked_if_empty(test.operand)
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], (ast.Eq, ast.NotEq, ast.Gt)):
        bound = test.comparators[0]
        is_zero = isinstance(bound, ast.Constant) and type(bound.value) is int and bound.value == 0
        return _asked_if_empty(test.left) if is_zero and isinstance(test.left, ast.Call) else None
    if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "len" and len(test.args) == 1:
        return test.args[0] if isinstance(test.args[0], ast.Name) else None
    return test if isinstance(test, ast.Name) else None
