"""Write an `experts` node as dispatch, grouped GEMMs, row-wise ops and combine.

Before:
    experts = experts(ids, [x], [weights], [w13, w2], [], body, E)     # body: linear, silu, mul, linear, mul

After:
    dispatch = moe_ep.dispatch(x, ids, E)                              # rows by expert, offsets, order
    y        = moe_ep.grouped_gemm(dispatch[0], [w13], dispatch[1])
    ...
    out      = moe_ep.combine(y, None, dispatch[2], dispatch[1], K)

Stage      canonicalise; needs `experts` nodes, which detect_experts makes.
Numerics   the same products; the sum over a token's experts runs in the order of k, in f32 or wider, and is rounded
           once to the dtype of its terms, where a loop may round after every expert.
Why        E small products and gathers become a few large ones; nothing in the graph depends on the data's sizes.
Refuses    a body with an op that has no batching rule (moe_compile/ragged.py).
"""

import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, GraphModule, Node

from moe_compile.errors import Refusal
from moe_compile.ragged import Batched, Batcher
from moe_compile.region import experts
from moe_compile.rewrite import RewritePass, emit, value

aten, moe_ep = torch.ops.aten, torch.ops.moe_ep


class DispatchExperts(RewritePass[Node]):
    def find(self, graph: Graph) -> Iterator[tuple[Node, Node]]:
        for node in graph.find_nodes(op="call_function", target=experts):
            yield node, node

    def refuse(self, node: Node) -> str | None:
        _, tokens, pairs, *_ = node.args
        if not tokens and not pairs:
            return "the experts read nothing of their tokens"
        scratch = Graph()
        copies: dict[Node, Node] = {}
        scratch.graph_copy(node.graph, copies)  # a rehearsal: the rules say whether they can
        scratch.owning_module = node.graph.owning_module
        try:
            _write(scratch, copies[node])
        except Refusal as reason:
            return str(reason)
        return None

    def rewrite(self, graph: Graph, node: Node) -> None:
        node.replace_all_uses_with(_write(graph, node))


def _write(graph: Graph, node: Node) -> Node:
    ids, tokens, pairs, params, shared, body_attr, num_experts, num_classes = node.args
    assert isinstance(ids, Node) and isinstance(body_attr, Node) and isinstance(num_experts, int)
    assert isinstance(tokens, (list, tuple)) and isinstance(pairs, (list, tuple))
    assert isinstance(params, (list, tuple)) and isinstance(shared, (list, tuple))
    body = getattr(graph.owning_module, str(body_attr.target))
    assert isinstance(body, GraphModule)
    top_k = value(ids).shape[1]
    with graph.inserting_before(node):

        def call(target, *args):  # type: ignore[no-untyped-def]
            return emit(graph, target, *args, like=node)

        if num_classes is not None:
            ids = call(moe_ep.check_ids.default, ids, num_classes)
        if not params:
            return _without_weights(graph, node, ids)
        first = tokens[0] if tokens else pairs[0]
        assert isinstance(first, Node)
        flat_first = _flat(call, first, 2)
        if not tokens:  # nothing to carry but the order: rows of the pairs are gathered below
            flat_first = call(aten.slice.Tensor, _flat(call, ids, 2), 1, 0, 1)
            flat_first = call(aten.to.dtype, flat_first, torch.float32)
        routed = call(moe_ep.dispatch.default, flat_first, ids, num_experts)
        x_RD, offsets, order = (call(operator.getitem, routed, i) for i in range(3))
        made: list[Node] = []

        def expert_R() -> Node:
            if not made:
                flat_ids = call(aten.reshape.default, ids, [-1])
                if value(flat_ids).dtype not in (torch.int64, torch.int32):  # a vector of bytes would be a mask
                    flat_ids = call(aten.to.dtype, flat_ids, torch.int64)
                rows = call(aten.index.Tensor, flat_ids, [order])
                made.append(call(aten.clamp.default, rows, 0, num_experts - 1))
            return made[0]

        batcher = Batcher(graph, node, offsets, expert_R)
        inputs = iter(body.graph.find_nodes(op="placeholder"))
        for i, x in enumerate(tokens):
            assert isinstance(x, Node)
            if i == 0:
                rows = x_RD if value(x).dim() == 2 else call(aten.reshape.default, x_RD, [-1, *value(x).shape[1:]])
            else:
                token_R = call(aten.floor_divide.default, order, top_k)
                rows = call(aten.index.Tensor, x, [token_R])
            batcher.env[next(inputs)] = Batched("row", rows)
        for w in pairs:
            flat = call(aten.reshape.default, w, [-1, *value(w).shape[2:]])  # type: ignore[arg-type]
            batcher.env[next(inputs)] = Batched("row", call(aten.index.Tensor, flat, [order]))
        for p in params:
            batcher.env[next(inputs)] = Batched("param", p if isinstance(p, Node) else tuple(p))  # type: ignore[arg-type]
        for s in shared:
            batcher.env[next(inputs)] = Batched("shared", s)  # type: ignore[arg-type]
        y = batcher.run(body.graph)
        shape = value(y).shape[1:]
        out = call(moe_ep.combine.default, _flat(call, y, 2), None, order, offsets, top_k)
        if len(shape) != 1:
            out = call(aten.reshape.default, out, [-1, *shape])
        dtype = value(node).dtype
        return out if value(out).dtype == dtype else call(aten.to.dtype, out, dtype)


def _without_weights(graph: Graph, node: Node, ids: Node) -> Node:
    """Experts that hold nothing, as those that pass tokens on: the body on every pair, zero where it is not chosen.

    There are no groups to gather rows for; row-wise ops and a sum are one pass over the tokens when compiled.
    """
    _, tokens, pairs, _, shared, body_attr, num_experts, _ = node.args
    body = getattr(graph.owning_module, str(body_attr.target))  # type: ignore[union-attr]
    top_k = value(ids).shape[1]

    def call(target, *args):  # type: ignore[no-untyped-def]
        return emit(graph, target, *args, like=node)

    env = Batcher(graph, node, ids, lambda: ids)
    inputs = iter(body.graph.find_nodes(op="placeholder"))
    for x in tokens:  # type: ignore[union-attr]
        sizes = value(x).shape[1:]  # type: ignore[arg-type]
        grid = call(aten.expand.default, call(aten.unsqueeze.default, x, 1), [-1, top_k, *[-1] * len(sizes)])
        env.env[next(inputs)] = Batched("row", call(aten.reshape.default, grid, [-1, *sizes]))
    for w in pairs:  # type: ignore[union-attr]
        env.env[next(inputs)] = Batched("row", call(aten.reshape.default, w, [-1, *value(w).shape[2:]]))  # type: ignore[arg-type]
    for s in shared:  # type: ignore[union-attr]
        env.env[next(inputs)] = Batched("shared", s)  # type: ignore[arg-type]
    y = env.run(body.graph)
    y = call(aten.reshape.default, y, [-1, top_k, *value(y).shape[1:]])
    dtype = value(node).dtype
    chosen = call(aten.logical_and.default, call(aten.ge.Scalar, ids, 0), call(aten.lt.Scalar, ids, num_experts))
    chosen = call(aten.reshape.default, chosen, [-1, top_k, *[1] * (value(y).dim() - 2)])
    y = call(aten.where.ScalarOther, chosen, y, 0)
    wide = torch.promote_types(dtype, torch.float32)
    total = call(aten.sum.dim_IntList, y if value(y).dtype == wide else call(aten.to.dtype, y, wide), [1])
    return total if wide == dtype else call(aten.to.dtype, total, dtype)


def _flat(call, node: Node, rank: int) -> Node:  # type: ignore[no-untyped-def]
    """The node with its features in one dimension."""
    if value(node).dim() == rank:
        return node
    width = value(node).shape[1:].numel()
    if width == 0:
        raise Refusal(f"a row of the experts has no numbers, its shape is {tuple(value(node).shape[1:])}")
    return call(aten.reshape.default, node, [-1, width])
