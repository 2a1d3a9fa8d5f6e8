"""The expert region: `experts`, the one node that detection writes and canonicalisation reads.

    out_TD[t] = sum over k of body(tokens[t], pairs[t, k], params[id[t, k]], shared)

`body` is a graph for the rows of ONE expert, as a loop over experts would run it:

    placeholders   token_i [r, ...]   row t of tokens[i], for each routed pair (t, k) of this expert
                   pair_i  [r, ...]   entry (t, k) of pairs[i]
                   param_i [...]      what belongs to this expert alone: params[i][e]
                   shared_i [...]     the same for all experts
    output         [r, D], row-wise: no row depends on another row

Letters: T tokens, K experts per token, E experts, D model width, r rows of one expert.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

Params = Tensor | Sequence[Tensor]
EXAMPLE_ROWS = 7919  # r in a trace: a prime that no other size is likely to be, so that reading it shows
LEVELS = ("token", "pair", "param", "shared")


def experts(
    ids_TK: Tensor,
    tokens: Sequence[Tensor],
    pairs: Sequence[Tensor],
    params: Sequence[Params],
    shared: Sequence[Tensor],
    body: GraphModule,
    num_experts: int,
    num_classes: int | None = None,
) -> Tensor:
    """out_TD, as defined above.  A pair whose id is outside [0, num_experts) adds nothing; one whose id is outside
    [0, num_classes) raises, if num_classes is given.

    `params[i]` is stacked, [E, ...], or a sequence of E tensors of one shape.  The meaning of the node, and the
    oracle of the passes' tests; `dispatch_experts` replaces it before anything runs in earnest.
    """
    if num_classes is not None:
        ids_TK = torch.ops.moe_ep.check_ids(ids_TK, num_classes)
    out = None
    for e in range(num_experts):
        t, k = torch.where(ids_TK == e)
        rows = [x[t] for x in tokens] + [w[t, k] for w in pairs]
        y = body(*rows, *(p[e] for p in params), *shared)
        if out is None:
            out = y.new_zeros(ids_TK.shape[0], *y.shape[1:])
        out = out.index_add(0, t, y)
    assert out is not None
    return out


def outside_is_zero(rows: Tensor, bound: int) -> Tensor:
    """A mark in a body, gone before it is built: rows whose id is `bound` or more were set to zero here."""
    return rows


# Ids that no node of the program holds, until detection writes them out (detect/tables.py).


def ids_in(table: Tensor) -> Tensor:
    """The position of the one entry that is not zero in each row of `table` [..., E]; -1 where there is none."""
    numbers = torch.arange(1, table.shape[-1] + 1, device=table.device)
    return ((table != 0) * numbers).sum(-1) - 1


def ids_kept(ids: Tensor, table: Tensor) -> Tensor:
    """`ids`, without those whose entry in `table` is zero: [T, K, E], or [T, E] for all k alike; -1 in their place."""
    inside = ids.clamp(min=0).long()
    kept = table.gather(-1, inside if table.dim() == ids.dim() else inside.unsqueeze(-1)).view_as(ids)
    return torch.where((ids >= 0) & (kept != 0), ids, -1)


def ids_where(ids: Tensor, truths: Tensor) -> Tensor:
    """`ids` where `truths`, [T], [T, 1] or [T, K], is not zero; -1 in the place of the others."""
    truths = truths if truths.dim() == ids.dim() else truths.unsqueeze(-1)
    return torch.where(truths != 0, ids, -1)


def ids_stacked(ids: Sequence[Tensor]) -> Tensor:
    """The choices of each token [T], one after the other, as [T, K]; those of groups [G, S] as [G, S, K]."""
    return torch.stack([i.long() for i in ids], -1)


def ids_above(table: Tensor, bound: float | None, top_k: int) -> Tensor:
    """The positions, in their order, of entries above `bound` (None: not zero) in each row of `table` [T, E], which
    has `top_k` of them at most; then -1.
    """
    num_experts = table.shape[1]
    found = table != 0 if bound is None else table > bound
    backwards = torch.arange(num_experts, 0, -1, device=table.device)
    found = torch.where(found, backwards, 0).topk(top_k).values
    return torch.where(found > 0, num_experts - found, -1)


def ids_by_sizes(sizes: Tensor, like: Tensor, whole: bool) -> Tensor:
    """The expert of each row of `like`, which lie expert by expert, `sizes[e]` of each; behind the last one nobody's.

    whole: -1 for all if the sizes are not those of all rows.
    """
    sizes = sizes.to(like.device, torch.int64)
    rows = torch.arange(like.shape[0], device=like.device)
    ids = torch.searchsorted(sizes.cumsum(0), rows, right=True)
    fits = (sizes.sum() == like.shape[0]) & (sizes >= 0).all()
    return torch.where(fits, ids, -1) if whole else ids


class Expr:
    """One value of a body: an ATen call on other values, or a leaf.  Equal values are one object (`Table`)."""

    __slots__ = ("args", "kwargs", "level", "target", "val")

    def __init__(self, target: Any, args: tuple, kwargs: tuple, level: str, val: Any) -> None:
        self.target, self.args, self.kwargs = target, args, kwargs
        self.level = level  # "row", "param" or "shared": what the value depends on
        self.val = val  # a fake tensor (rows first), for shapes and dtypes

    def __repr__(self) -> str:
        return f"{self.target}{self.args}"


class Leaf(Expr):
    """A value the body receives.  `node` is where it comes from in the outer graph.

    role: "token" (a row of node), "pair" (an entry of node [T, K, ...]), "flat_pair" (of node [T*K, ...]),
    "column" (node[t, id], node is [T, E]), "slice" (node[e]), "picked" (entry e of the series that node picks from),
    "outer" (node itself); where experts have lists of tokens
    "rows" (node[list of the expert]), "listed" (node itself, by row, another one for each expert).
    """

    __slots__ = ("node", "role")

    def __init__(self, role: str, node: Node, val: Any) -> None:
        level = {"slice": "param", "picked": "param", "outer": "shared"}.get(role, "row")
        super().__init__("leaf", (role, node.name), (), level, val)
        self.role, self.node = role, node


class Table:
    """Makes equal expressions one object, so that comparing bodies is comparing identities."""

    def __init__(self) -> None:
        self._known: dict[Any, Expr] = {}

    def leaf(self, role: str, node: Any, val: Any) -> Expr:
        return self._known.setdefault((role, node), Leaf(role, node, val))

    def call(self, target: Any, args: tuple, kwargs: dict[str, Any], val: Any) -> Expr:
        inputs = [a for a in flat([args, tuple(kwargs.items())]) if isinstance(a, Expr)]
        level = max((a.level for a in inputs), key=("shared", "param", "row").index, default="shared")
        named = tuple(sorted(kwargs.items()))
        key = (target, _freeze(args), _freeze(named))
        return self._known.setdefault(key, Expr(target, args, named, level, val))


def flat(arg: Any) -> list[Any]:
    """All leaves of nested tuples and lists."""
    return [x for a in arg for x in flat(a)] if isinstance(arg, (tuple, list)) else [arg]


def _freeze(arg: Any) -> Any:
    """A hashable key; numbers carry their type, so that 1, 1.0 and True differ."""
    if isinstance(arg, (tuple, list)):
        return tuple(map(_freeze, arg))
    if isinstance(arg, Expr):
        return id(arg)
    return (type(arg), str(arg) if isinstance(arg, (float, torch.SymInt)) else arg)


class Body:
    """Turns an expression into the body graph, collecting the outer nodes that its leaves stand for."""

    def __init__(self, params: Mapping[Expr, Any]) -> None:
        self.families = params  # leaves that differ from expert to expert
        self.inputs: dict[str, list[Leaf]] = {level: [] for level in LEVELS}

    def build(self, root: Expr) -> GraphModule:
        leaves: list[Leaf] = []
        order: list[Expr] = []
        seen: set[int] = set()

        def visit(expr: Expr) -> None:
            if id(expr) in seen:
                return
            seen.add(id(expr))
            for arg in flat([expr.args, expr.kwargs]):
                if isinstance(arg, Expr):
                    visit(arg)
            (leaves if isinstance(expr, Leaf) else order).append(expr)  # type: ignore[arg-type]

        visit(root)
        for leaf in leaves:
            self.inputs[self._level(leaf)].append(leaf)
        graph, made = Graph(), {}
        for level in LEVELS:
            for i, leaf in enumerate(self.inputs[level]):
                made[id(leaf)] = graph.placeholder(f"{level}_{i}")
                made[id(leaf)].meta["val"] = leaf.val
        for expr in order:
            node = graph.call_function(expr.target, _map(expr.args, made), dict(_map(expr.kwargs, made)))
            node.meta["val"] = expr.val
            made[id(expr)] = node
        graph.output(made[id(root)])
        return GraphModule(torch.nn.Module(), graph, "Body")

    def _level(self, leaf: Leaf) -> str:
        if leaf.role == "slice" or (leaf in self.families and leaf.role != "listed"):
            return "param"
        return {"token": "token", "rows": "token", "listed": "token", "outer": "shared"}.get(leaf.role, "pair")


def _map(arg: Any, made: dict[int, Node]) -> Any:
    if isinstance(arg, (tuple, list)):
        return tuple(_map(a, made) for a in arg)
    return made[id(arg)] if isinstance(arg, Expr) else arg
