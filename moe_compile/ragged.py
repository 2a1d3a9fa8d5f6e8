"""Batching rules over ragged groups: an expert's body, for all experts at once.

Like vmap's rules, but the batch is ragged.  Each value of the body has a level:

    row      one entry per row of one expert [r, ...]   -> all rows, sorted by expert [R, ...]
    param    one value per expert [...]                 -> stacked [E, ...], or E separate tensors
    shared   one value for all [...]                    -> itself

`apply` turns one call of the body into calls on the batched values.  `RULES` has a line for each op that mixes rows
with what belongs to an expert, or that changes a stack; ops on rows alone and on shared values stay as they are.
To add an op: write `rule(b, node) -> Batched`, give it its line, and test it in tests/test_ragged.py.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_compile.errors import Refusal
from moe_compile.rewrite import emit, value
from moe_compile.series import series_of

aten, moe_ep = torch.ops.aten, torch.ops.moe_ep


@dataclass(frozen=True)
class Batched:
    """A value for all experts: one node; for separate parameters a series (series.py), or one node an expert."""

    level: str
    node: Node | tuple[Node, ...]


class Batcher:
    """Writes the batched form of one body into `graph`, node by node."""

    def __init__(self, graph: Graph, like: Node, offsets: Node, expert_R: Callable[[], Node]) -> None:
        self.graph, self.like, self.offsets, self.expert_R = graph, like, offsets, expert_R
        self.env: dict[Any, Batched] = {}  # nodes of the body; `Any`, as arguments of a node may be anything

    def run(self, body: Graph) -> Node:
        """The batched output; `env` holds the placeholders already."""
        for node in body.nodes:
            if node.op == "call_function":
                self.env[node] = self.apply(node)
            elif node.op == "output":
                result = self.env[node.args[0]]
                assert isinstance(result.node, Node)
                return result.node
        raise AssertionError("a body has an output")

    def apply(self, node: Node) -> Batched:
        levels = {self.env[n].level for n in node.all_input_nodes}
        level = max(levels, key=("shared", "param", "row").index, default="shared")
        if "param" in levels:
            rule = RULES.get(_op(node))
            if rule is None:
                what = "rows and expert weights" if level == "row" else "expert weights"
                raise Refusal(f"no rule for {str(node.target).removesuffix('.default')} on {what}")
            return rule(self, node)
        return Batched(level, self.emit(node.target, *self.map(node.args), **self.map(node.kwargs)))

    # -- help for rules ---------------------------------------------------------------------

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = emit(self.graph, target, *args, like=self.like, val=_NONE if kwargs else None)
        if kwargs:
            node.kwargs = kwargs
            fakes = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta["val"] = target(*fakes[0], **fakes[1])
        return node

    def map(self, args: Any) -> Any:
        """Arguments of the body as the batched nodes."""
        return torch.fx.node.map_arg(args, lambda n: self.env[n].node)

    def stack(self, node: Any) -> Node:
        """A param value as one [E, ...] node."""
        batched = self.env[node].node
        if (series := series_of(batched)) is not None:
            stacked = series.example.new_empty((len(series), *series.example.shape))
            return emit(self.graph, aten.stack.default, batched, 0, like=self.like, val=stacked)
        return batched if isinstance(batched, Node) else self.emit(aten.stack.default, list(batched), 0)

    def separate(self, node: Any) -> Sequence[Node]:
        """A param value as it is: one stack, or one node an expert."""
        batched = self.env[node].node
        if (series := series_of(batched)) is not None:
            return [self.emit(operator.getitem, batched, e) for e in range(len(series))]
        return [batched] if isinstance(batched, Node) else batched

    def transposed(self, matrix: Node) -> Node:
        """The transpose of each matrix; that of a transpose is what it was."""
        if matrix.target is aten.transpose.int and set(matrix.args[1:]) == {-2, -1}:
            return matrix.args[0]  # type: ignore[return-value]
        return self.emit(aten.transpose.int, matrix, -2, -1)

    def product(self, rows: Node, node: Any, offsets: Node, dtype: torch.dtype, transposed: bool) -> Node:
        """rows @ w.T, or rows @ w if `transposed`, for a param value w of rank 2, in `dtype`."""
        weights, target = self.env[node].node, moe_ep.grouped_gemm.default
        series = series_of(weights)
        if series is not None and series.example.dtype == dtype and not transposed:
            val = target(value(rows), [series.example], value(offsets))  # of one as of all
            return emit(self.graph, target, rows, weights, offsets, like=self.like, val=val)
        first = weights if isinstance(weights, Node) else weights[0]
        cast = (value(first) if series is None else series.example).dtype != dtype
        stacks = [self.emit(aten.to.dtype, self.stack(node), dtype)] if cast else list(self.separate(node))
        return self.emit(target, rows, [self.transposed(s) for s in stacks] if transposed else stacks, offsets)

    def rows(self, node: Any, rank: int, dtype: torch.dtype | None = None) -> Node:
        """A value as an operand of a row-wise op of `rank` dimensions, in `dtype` if given; a param by row."""
        batched = self.env[node]
        source = self.stack(node) if batched.level == "param" else batched.node
        assert isinstance(source, Node)
        if dtype is not None and value(source).dtype != dtype:
            source = self.emit(aten.to.dtype, source, dtype)
        if batched.level != "param":
            return source
        gathered = self.emit(aten.index.Tensor, source, [self.expert_R()])
        shape = value(gathered).shape[1:]
        missing = rank - 1 - len(shape)
        if missing == 0:
            return gathered
        if missing < 0:  # a leading 1 of the param stood in the place of the rows
            if missing < -1 or shape[0] != 1:
                raise Refusal(f"an expert weight of shape {tuple(shape)} meets rows of rank {rank}")
            return self.emit(aten.reshape.default, gathered, [-1, *shape[1:]])
        return self.emit(aten.reshape.default, gathered, [-1, *[1] * missing, *shape])


_NONE = object()


def _op(node: Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    return node.target.overloadpacket.__name__  # type: ignore[union-attr]


# -- products -------------------------------------------------------------------------------


def linear(b: Batcher, node: Node) -> Batched:
    """x @ w.T + bias with the weight of the row's expert."""
    x, w, *bias = node.args
    if b.env[x].level != "row":
        raise Refusal("a product of two expert weights")
    product = _grouped(b, node, x, w, transposed=False) if b.env[w].level == "param" else None
    if product is None:
        product = b.emit(aten.linear.default, b.env[x].node, b.env[w].node)
    return _plus_bias(b, node, product, bias)


def matmul(b: Batcher, node: Node) -> Batched:
    x, w = node.args
    if b.env[x].level != "row":
        raise Refusal("a product of two expert weights")
    return Batched("row", _grouped(b, node, x, w, transposed=True))


def _grouped(b: Batcher, node: Node, x: Any, w: Any, transposed: bool) -> Node:
    """A grouped GEMM, in the dtype that the product had in the body (autocast may have chosen it)."""
    dtype = value(node).dtype
    if b.env[x].level != "row":
        raise Refusal("a product of two expert weights")
    rows = b.env[x].node
    assert isinstance(rows, Node)
    rank, many = value(rows).dim(), value(rows).shape[1:-1].numel()
    if rank < 2 or not isinstance(many, int):
        raise Refusal(f"a product of rows of rank {rank} with expert weights")
    offsets = b.offsets
    if rank > 2:  # each row is a matrix: as many rows of the product
        rows = b.emit(aten.reshape.default, rows, [-1, value(rows).shape[-1]])
        offsets = b.emit(aten.mul.Tensor, offsets, many)
    if value(rows).dtype != dtype:
        rows = b.emit(aten.to.dtype, rows, dtype)
    product = b.product(rows, w, offsets, dtype, transposed)
    return product if rank == 2 else b.emit(aten.reshape.default, product, [-1, *value(node).shape[1:]])


def _plus_bias(b: Batcher, node: Node, product: Node, bias: list[Any]) -> Batched:
    if bias and isinstance(bias[0], Node):
        rows = b.rows(bias[0], value(product).dim(), value(product).dtype)
        product = b.emit(aten.add.Tensor, product, rows)
    return Batched("row", product)


# -- row-wise ops with an expert's own values -----------------------------------------------


def pointwise(b: Batcher, node: Node) -> Batched:
    nodes = node.all_input_nodes
    rank = value(node).dim()
    if any(b.env[n].level == "row" for n in nodes):
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: b.rows(n, rank))
        return Batched("row", b.emit(node.target, *args, **kwargs))
    return _on_stacks(b, node, node.args, node.kwargs, rank)


def norm(b: Batcher, node: Node) -> Batched:
    """A norm over features with the expert's own scale and shift: the norm alone, then scale and shift by row."""
    name = _op(node)
    x, shape, *rest = node.args
    if name == "layer_norm":
        weight, bias, *more = [*rest, None, None][: max(2, len(rest))]
        result = b.emit(aten.layer_norm.default, b.env[x].node, shape, None, None, *more[:1])
    else:
        weight, bias, more = (rest[0] if rest else None), None, rest[1:]
        result = b.emit(aten.rms_norm.default, b.env[x].node, shape, None, *more)
    rank = value(node).dim()
    if isinstance(weight, Node):
        result = b.emit(aten.mul.Tensor, result, b.rows(weight, rank))
    if isinstance(bias, Node):
        result = b.emit(aten.add.Tensor, result, b.rows(bias, rank))
    if value(result).dtype != value(node).dtype:
        result = b.emit(aten.to.dtype, result, value(node).dtype)
    return Batched("row", result)


# -- an expert's own values alone -----------------------------------------------------------


def _on_stacks(b: Batcher, node: Node, args: Any, kwargs: Any, rank: int) -> Batched:
    """A pointwise call on stacks: all brought to [E, ...] of one rank."""

    def aligned(n: Node) -> Node:
        if b.env[n].level == "shared":
            return b.env[n].node  # type: ignore[return-value]
        stack = b.stack(n)
        shape = value(stack).shape
        missing = rank + 1 - len(shape)
        return stack if missing <= 0 else b.emit(aten.reshape.default, stack, [shape[0], *[1] * missing, *shape[1:]])

    args, kwargs = torch.fx.node.map_arg((args, kwargs), aligned)
    return Batched("param", b.emit(node.target, *args, **kwargs))


def shifted(*positions: int) -> Callable[[Batcher, Node], Batched]:
    """An op on one stack whose arguments at `positions` are dimensions: each moves behind E."""

    def rule(b: Batcher, node: Node) -> Batched:
        source = node.args[0][0] if isinstance(node.args[0], (list, tuple)) else node.args[0]
        if b.env[source].level != "param" or any(b.env[n].level == "row" for n in node.all_input_nodes):
            raise Refusal(f"no rule for {_op(node)} on rows and expert weights")
        rank = source.meta["val"].dim() + (_op(node) == "unsqueeze")  # type: ignore[union-attr]
        args = list(node.args)
        for p in positions:
            if len(args) <= p and _op(node) in ("sum", "mean", "softmax", "squeeze"):
                raise Refusal(f"no rule for {_op(node)} over all dimensions on expert weights")
            d: Any = args[p] if len(args) > p else 0
            dims = [x % rank + 1 for x in d] if isinstance(d, (list, tuple)) else d % rank + 1
            args = [*args, *[0] * (p + 1 - len(args))]
            args[p] = dims
        first = [b.stack(n) for n in args[0]] if isinstance(args[0], (list, tuple)) else b.stack(args[0])
        return Batched("param", b.emit(node.target, first, *args[1:], **node.kwargs))

    return rule


def reduced(b: Batcher, node: Node) -> Batched:
    """w.sum(), w.mean() of a whole weight, or along dimensions of it."""
    if len(node.args) > 1 and node.args[1] not in (None, []):
        return shifted(1)(b, node)
    source = node.args[0]
    assert isinstance(source, Node)
    target = aten.sum.dim_IntList if _op(node) == "sum" else aten.mean.dim
    if len(node.args) > 2 or value(source).dim() == 0:
        raise Refusal(f"no rule for {_op(node)} over all dimensions with these arguments")
    dims = list(range(1, value(source).dim() + 1))
    return Batched("param", b.emit(target, b.stack(source), dims, **node.kwargs))


def transpose(b: Batcher, node: Node) -> Batched:
    """w.t(), w.transpose(a, b): of each expert's weight; separate weights stay separate."""
    source = node.args[0]
    assert isinstance(source, Node)
    a, c = (node.args[1], node.args[2]) if _op(node) == "transpose" else (-2, -1)
    rank = value(source).dim()
    if rank > 2 and _op(node) == "numpy_T":
        raise Refusal(f"no rule for .T of {rank} dimensions on expert weights")
    if rank < 2:
        return b.env[source]
    a, c = int(a) % rank - rank, int(c) % rank - rank  # type: ignore[arg-type]
    batched = b.env[source].node
    if isinstance(batched, Node) and series_of(batched) is None:
        return Batched("param", b.emit(aten.transpose.int, batched, a, c))
    return Batched("param", tuple(b.emit(aten.transpose.int, w, a, c) for w in b.separate(source)))


def permute(b: Batcher, node: Node) -> Batched:
    source, dims = node.args
    dims = [d % len(dims) + 1 for d in dims]  # type: ignore[operator, arg-type, union-attr]
    return Batched("param", b.emit(aten.permute.default, b.stack(source), [0, *dims]))


def reshape(b: Batcher, node: Node) -> Batched:
    stack = b.stack(node.args[0])
    return Batched("param", b.emit(aten.reshape.default, stack, [value(stack).shape[0], *value(node).shape]))


def expanded(b: Batcher, node: Node) -> Batched:
    source, sizes = node.args[:2]
    stack, missing = b.stack(source), len(sizes) - value(source).dim()  # type: ignore[arg-type]
    if missing:
        shape = value(stack).shape
        stack = b.emit(aten.reshape.default, stack, [shape[0], *[1] * missing, *shape[1:]])
    return Batched("param", b.emit(aten.expand.default, stack, [value(stack).shape[0], *sizes]))  # type: ignore[misc]


def repeated(b: Batcher, node: Node) -> Batched:
    """w.repeat_interleave(n, dim), as scales of blocks are brought to the size of a weight."""
    source, times, dim = [*node.args, None, None][:3]
    if not isinstance(times, int) or not isinstance(dim, int) or any(v is not None for v in node.kwargs.values()):
        raise Refusal(f"no rule for repeat_interleave by {times} along {dim} on expert weights")
    dim = dim % value(node).dim() + 1
    return Batched("param", b.emit(aten.repeat_interleave.self_int, b.stack(source), times, dim))


def getitem(b: Batcher, node: Node) -> Batched:
    source = b.env[node.args[0]]
    assert isinstance(source.node, Node)
    return Batched(source.level, b.emit(operator.getitem, source.node, node.args[1]))


_POINTWISE = """
    abs add addcmul clamp clamp_max clamp_min clone contiguous cos detach div exp ge gelu gt le log lt
    masked_fill maximum minimum mul multiply neg pow reciprocal relu rsqrt rsub sigmoid silu sin softplus sqrt
    square sub tanh to _to_copy true_divide type_as where
""".split()

RULES: dict[str, Callable[[Batcher, Node], Batched]] = {
    "linear": linear,
    "matmul": matmul,
    **dict.fromkeys(_POINTWISE, pointwise),
    "layer_norm": norm,
    "rms_norm": norm,
    **dict.fromkeys(("t", "transpose", "numpy_T", "mT"), transpose),
    "permute": permute,
    **dict.fromkeys(("view", "reshape", "flatten", "squeeze"), reshape),
    "getitem": getitem,
    "expand": expanded,
    "repeat_interleave": repeated,
    **dict.fromkeys(("select", "slice", "unsqueeze", "softmax", "cat", "unbind"), shifted(1)),
    **dict.fromkeys(("sum", "mean"), reduced),
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), shifted(2)),
}
