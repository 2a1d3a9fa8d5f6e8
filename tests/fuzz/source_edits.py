"""Random edits of a function's syntax tree: as a typing error would change it, or somebody with another model in mind.

Each edit takes what is drawn and a function, and changes it in place; it says what it did, or None where there is nothing
of its kind.  Whether the program still runs nobody needs to know: one that does not is invalid, and costs little.
"""

import ast
import copy
from collections.abc import Callable
from random import Random
from typing import Any

from tests.fuzz.edit_expressions import (
    arguments,
    attribute,
    comparison,
    constant,
    in_place,
    index,
    operator,
    other_name,
    swap_names,
    wrap,
)
from tests.fuzz.syntax import Function, blocks, filled, names, spots, statement, wrapped

Edit = Callable[[Random, Function], str | None]

LOOPS = (
    "{}[1:]", "{}[:-1]", "list({})[::-1]", "{}[::2]", "[*{}, *{}]", "list({})", "sorted({})", "[*{}][:3]", "{}.flip(0)", "iter({})",
    "list({}) + list({})[:1]", "range(len({}))", "{}.tolist()", "zip({}, {})",
)  # fmt: skip
CONDITIONS = (
    "{} == 1", "{} % 2", "{} > 1", "{}.numel() == 0", "{}.shape[0] > 2", "{}.sum() > 0", "{}.any()", "len({}) == 1", "{} is None", "{}",
    "not {}", "{}.requires_grad", "{}.is_cuda", "{}.shape[0] % 2", "{}.max() > 2", "{}[0] == 1", "self.training",
)  # fmt: skip
EFFECTS = (
    "self.count.add_(1)", "self.count[{}] += 1", "self.count += {}.sum().detach()", "self.last = {}", "self.seen += 1", "self.seen = len({})",
    "CALLS.append(1)", "CALLS.append({})", "self.last = self.seen", "{} = {} + self.count[0]", "{} *= 1 + self.seen", "{}.zero_()", "{}.add_(1)",
    "{}.mul_(0.5)", "{}[0] = 0", "{} = {} * len(CALLS)", "{}.requires_grad_(False)", "{}.detach_()", "{}.resize_(0)", "del {}",
    "{}.register_hook(lambda g: g * 2)", "{} = torch.rand_like({})", "{} = {} + torch.randn(1)", "{}.fill_diagonal_(0)",
)  # fmt: skip


def _any(draw: Random, fn: Function, returns: bool = False) -> tuple[list[ast.stmt], int] | None:
    held = [(b, i) for b in blocks(fn) for i, n in enumerate(b) if returns or not isinstance(n, ast.Return)]
    return draw.choice(held) if held else None


def drop(draw: Random, fn: Function) -> str | None:
    if (found := _any(draw, fn)) is None:
        return None
    block, i = found
    said = ast.unparse(block[i]).splitlines()[0]
    block[i] = ast.Pass()
    return f"drop {said}"


def repeat(draw: Random, fn: Function) -> str | None:
    if (found := _any(draw, fn)) is None:
        return None
    block, i = found
    block.insert(draw.randint(i, len(block)), copy.deepcopy(block[i]))
    return f"again {ast.unparse(block[i]).splitlines()[0]}"


def exchange(draw: Random, fn: Function) -> str | None:
    held = [b for b in blocks(fn) if len(b) > 1]
    if not held:
        return None
    block = draw.choice(held)
    i = draw.randrange(len(block) - 1)
    block[i], block[i + 1] = block[i + 1], block[i]
    return "exchange statements"


def move(draw: Random, fn: Function) -> str | None:
    """A statement out of its block, to before or behind the one that holds it."""
    held = [(b, i, name) for b in blocks(fn) for i, n in enumerate(b) for name in ("body",) if getattr(n, name, None)]
    if not held:
        return None
    block, i, name = draw.choice(held)
    inner = getattr(block[i], name)
    at = draw.randrange(len(inner))
    moved, inner[at] = inner[at], ast.Pass()
    block.insert(i + draw.randint(0, 1), moved)
    return f"move {ast.unparse(moved).splitlines()[0]}"


def guard(draw: Random, fn: Function) -> str | None:
    """A statement only on some condition, or without gradients."""
    if (found := _any(draw, fn)) is None:
        return None
    block, i = found
    head = "with torch.no_grad():" if draw.random() < 0.2 else f"if {filled(draw, draw.choice(CONDITIONS), fn)}:"
    node: Any = statement(f"{head}\n    pass")
    node.body, block[i] = [block[i]], node
    return head


def leave(draw: Random, fn: Function) -> str | None:
    """`continue` or `break` on some condition."""
    loops = [n for n in ast.walk(fn) if isinstance(n, ast.For)]
    if not loops:
        return None
    body = draw.choice(loops).body
    condition, way = filled(draw, draw.choice(CONDITIONS), fn), draw.choice(("continue", "continue", "break"))
    body.insert(draw.randint(0, len(body)), statement(f"if {condition}:\n    {way}"))
    return f"{way} if {condition}"


def condition(draw: Random, fn: Function) -> str | None:
    found = spots(fn, ast.If, ast.IfExp)
    if not found:
        return None
    node = draw.choice(found).node
    other = draw.choice(("not {}", "True", "False", filled(draw, draw.choice(CONDITIONS), fn)))
    node.test = wrapped(other, node.test)
    return f"if {other}"


def loop(draw: Random, fn: Function) -> str | None:
    found = [n for n in ast.walk(fn) if isinstance(n, ast.For | ast.comprehension)]
    if not found:
        return None
    node, template = draw.choice(found), draw.choice(LOOPS)
    node.iter = wrapped(template, node.iter)
    return f"loop over {template}"


def carried(draw: Random, fn: Function) -> str | None:
    """A value of the iteration before in the place of this one's."""
    loops = [(b, i) for b in blocks(fn) for i, n in enumerate(b) if isinstance(n, ast.For)]
    if not loops:
        return None
    block, i = draw.choice(loops)
    node = block[i]
    assert isinstance(node, ast.For)
    known = names(fn)
    read = [s for n in node.body for s in spots(n, ast.Name) if s.node.id in known]
    sets = [n.id for b in node.body for n in ast.walk(b) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    if not read or not sets:
        return None
    spot, kept = draw.choice(read), draw.choice(sets)
    said = f"{spot.node.id} -> {kept} of before"
    spot.put(ast.Name("before", ast.Load()))
    node.body.append(statement(f"before = {kept}"))
    block.insert(i, statement(f"before = {draw.choice(known)}"))
    return said


def effect(draw: Random, fn: Function) -> str | None:
    block = draw.choice(blocks(fn))
    line = filled(draw, draw.choice(EFFECTS), fn)
    block.insert(draw.randint(0, len(block)), statement(line))
    return f"+ {line}"


def result(draw: Random, fn: Function) -> str | None:
    found = [s.node for s in spots(fn, ast.Return) if s.node.value is not None]
    if not found:
        return None
    node = draw.choice(found)
    template = draw.choice(("{}, {other}", "{other}", "{} + {other}", "({}, {} * 2)", "{}.relu()", "[{}, {other}]"))
    said = template.replace("{other}", draw.choice(names(fn) or ["self"]))
    node.value = wrapped(said, node.value)
    return f"return {said}"


EDITS: tuple[Edit, ...] = (
    wrap, wrap, wrap, wrap, index, index, other_name, other_name, other_name, swap_names, attribute, constant, constant, constant,
    comparison, operator, arguments, arguments, in_place, in_place, drop, repeat, exchange, move, guard, guard, leave, leave,
    condition, loop, carried, carried, effect, effect, result,
)  # fmt: skip


def edited(draw: Random, source: str, times: int) -> tuple[str, list[str]]:
    """The source with so many edits, and what they were.  Functions that make a module are left as they are."""
    tree = ast.parse(source)
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name not in ("__init__", "extra_repr")]
    weights = [len(list(ast.walk(f))) ** 0.5 for f in found]
    said: list[str] = []
    for _ in range(20 * times):  # an edit may find nothing of its kind
        what = draw.choice(EDITS)(draw, draw.choices(found, weights)[0])
        said += [what] if what is not None else []
        if len(said) == times:
            break
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n", said
