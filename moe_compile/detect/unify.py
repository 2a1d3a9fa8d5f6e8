"""Whether expressions are one function of other leaves."""

from typing import Any

from torch.fx import Node

from moe_compile.detect.values import Unknown
from moe_compile.region import Expr, Leaf, flat

Families = dict[Expr, list[Node] | Node]  # leaves that differ from expert to expert: the nodes of all, or a series


def unify(bodies: list[Expr]) -> "dict[Expr, list[Node]] | Unknown":
    """Show that all experts compute the same function of their own weights.

    Returns, for each leaf of the first body that is another node for another expert, the node of every expert.
    """
    seen: dict[Leaf, list[Node]] = {}
    for e, body in enumerate(bodies):
        met: dict[Leaf, Leaf] = {}
        reason = _match(bodies[0], body, met, set())
        if reason:
            return Unknown(f"expert {e} differs from expert 0: {reason}")
        for leaf, other in met.items():
            seen.setdefault(leaf, []).append(other.node)
    return {
        leaf: nodes for leaf, nodes in seen.items() if leaf.role == "picked" or any(n is not leaf.node for n in nodes)
    }


def by_expert(merged: "dict[Expr, list[Node]]", numbers: list[tuple[int, ...]]) -> Families | Unknown:
    """What every expert has in the place of a leaf, of the node of every body; `numbers`: the experts of each body."""
    found: Families = {}
    for leaf, nodes in merged.items():
        assert isinstance(leaf, Leaf)
        if leaf.role == "picked":  # by the expert's own number
            first, *others = {node.args[0] for node in nodes}
            if others or not isinstance(first, Node):
                return Unknown("experts that are visited apart have their weights from other places")
            found[leaf] = first
            continue
        if any(len(n) > 1 for n in numbers):
            return Unknown("experts that are visited together share a weight that others do not")
        own = {n: node for node, mine in zip(nodes, numbers, strict=True) for n in mine}
        found[leaf] = [own[n] for n in sorted(own)]
    return found


def _match(a: Any, b: Any, met: dict[Leaf, Leaf], done: set[tuple[int, int]]) -> str | None:
    """Why b is not a with other leaves; fills `met` with the leaf of b for each leaf of a."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        if len(a) != len(b):
            return f"{len(b)} arguments for {len(a)}"
        return next((r for x, y in zip(a, b, strict=True) if (r := _match(x, y, met, done))), None)
    if not (isinstance(a, Expr) and isinstance(b, Expr)):
        same = type(a) is type(b) and (repr(a) == repr(b) if isinstance(a, float) else a == b)  # 0.0 is not -0.0
        return None if same else f"{b!r} where that has {a!r}"
    if (id(a), id(b)) in done:
        return None
    done.add((id(a), id(b)))
    if isinstance(a, Leaf) and isinstance(b, Leaf):
        if a.role != b.role or (a.role not in ("outer", "listed", "picked") and a.node is not b.node):
            return f"it reads {b.role} {b.node.name}, that one {a.role} {a.node.name}"
        if a.val.shape != b.val.shape or a.val.dtype != b.val.dtype:
            said = [f"{x.node.name} is {x.val.dtype} {tuple(x.val.shape)}" for x in (b, a)]
            return ", ".join(said)
        if met.setdefault(a, b) is not b:
            return f"{a.node.name} is used twice there, {b.node.name} and {met[a].node.name} here"
        return None
    if isinstance(a, Leaf) or isinstance(b, Leaf) or a.target is not b.target:
        return f"{_called(b)} where that has {_called(a)}"
    return _match((a.args, a.kwargs), (b.args, b.kwargs), met, done)


def _called(expr: Expr) -> str:
    return f"{expr.role} {expr.node.name}" if isinstance(expr, Leaf) else str(expr.target).removesuffix(".default")


def leaves_of(root: Expr) -> list[Leaf]:
    return [part for part in parts_of(root) if isinstance(part, Leaf)]


def parts_of(root: Expr) -> list[Expr]:
    """All expressions inside of one, each once."""
    found: dict[int, Expr] = {}
    stack: list[Any] = [root]
    while stack:
        expr = stack.pop()
        if isinstance(expr, Expr) and id(expr) not in found:
            found[id(expr)] = expr
            if not isinstance(expr, Leaf):
                stack += flat([expr.args, expr.kwargs])
    return list(found.values())
