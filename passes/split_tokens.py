"""Let each of the ranks that share their tokens run the experts on a part of them.

Before:
    experts = experts(ids, [x], [weights], [w13, w2], [], body, E)     # the same T tokens on P ranks

After:
    message  = moe_ep.token_message([detach(x), ...])
    every    = wait(_c10d_functional.all_gather_into_tensor(message, P, group))
    checked  = moe_ep.check_shared(ids, every, P)
    ids_SK   = moe_ep.own_rows(checked, rank, P, -1, group)            # S = ceil(T / P)
    x_SD     = moe_ep.own_rows(x, rank, P, 0, group)
    w_SK     = moe_ep.own_rows(weights, rank, P, 0, group)
    y_SD     = experts(ids_SK, [x_SD], [w_SK], [w13, w2], [], body, E)
    whole    = wait(_c10d_functional.all_gather_into_tensor(detach(y_SD), P, group))
    out      = moe_ep.joined(whole, y_SD, checked, rank, P, group)

Stage      place; before place_experts, which finds an `experts` node for the part.
Numerics   the same rows, each on one rank.  An expert's gradient is the sum over the ranks, each of which has its part.
Why        ranks of a tensor-parallel group have the same activations outside of its layers: left alone, each would send
           all of them through the all-to-all, and compute all results again.  A token crosses it once, and results
           come to the others over the links of the group.  DeepSpeed-TED calls it duplicate token dropping.
Refuses    nothing.  Experts that draw random numbers, after which ranks would no longer have the same tokens, are
           refused by detect_experts; tokens that differ are an error when it runs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_compile.parallel.shards import Placement
from moe_compile.parallel.shared_tokens import READ_BY_PARTS
from moe_compile.parallel.writer import sources, wait
from moe_compile.region import experts
from moe_compile.rewrite import RewritePass, emit, value

aten, moe_ep = torch.ops.aten, torch.ops.moe_ep
all_gather = torch.ops._c10d_functional.all_gather_into_tensor.default


class SplitTokens(RewritePass[Node]):
    """`sharded`: the placeholders of the experts' weights, of which each rank's gradient is that of its part."""

    def __init__(self, placement: Placement, sharded: set[Node]) -> None:
        self.placement, self.sharded = placement, sharded

    def find(self, graph: Graph) -> Iterator[tuple[Node, Node]]:
        for node in graph.find_nodes(op="call_function", target=experts):
            if any(sources(p) & self.sharded for p in node.args[3]):  # type: ignore[union-attr]
                yield node, node

    def rewrite(self, graph: Graph, node: Node) -> None:
        with graph.inserting_before(node):
            node.replace_all_uses_with(self._write(graph, node))

    def _write(self, graph: Graph, node: Node) -> Node:
        args: Any = node.args
        ids, tokens, pairs, params, shared, body, num_experts, num_classes = args

        def call(target: Any, *args: Any, val: Any = None) -> Node:
            return emit(graph, target, *args, like=node, val=val)

        if num_classes is not None:  # of all tokens, so that all ranks raise
            ids = call(moe_ep.check_ids.default, ids, num_classes)
        here = self.placement
        ids = call(moe_ep.check_shared.default, ids, self._messages(call, ids, tokens, pairs), here.tp)

        def own(rows: Node, fill: int = 0) -> Node:
            return call(moe_ep.own_rows.default, rows, here.tp_rank, here.tp, fill, here.tp_group)

        ours = own(ids, -1), [own(x) for x in tokens], [own(w) for w in pairs]
        params = [p if sources(p) & self.sharded else self._read(call, p) for p in params]
        shared = [self._read(call, s) for s in shared]
        val = value(node).new_empty((value(ours[0]).shape[0], *value(node).shape[1:]))
        part = call(experts, *ours, params, shared, body, num_experts, None, val=val)
        whole = self._gathered(call, call(aten.detach.default, part))
        return call(moe_ep.joined.default, whole, part, ids, here.tp_rank, here.tp, here.tp_group)

    def _messages(self, call: Any, ids: Node, tokens: list[Node], pairs: list[Node]) -> Node:
        """What tells whether tokens are shared; for a backward their routing, too: each rank gets a gradient of all."""
        told = list(tokens) or [ids]
        if torch.is_grad_enabled():
            told += [ids, *pairs]
        told = [call(aten.detach.default, x) for x in dict.fromkeys(told)]
        return self._gathered(call, call(moe_ep.token_message.default, told))

    def _gathered(self, call: Any, rows: Node) -> Node:
        ranks = self.placement.tp
        val = value(rows).new_empty((value(rows).shape[0] * ranks, *value(rows).shape[1:]))
        return call(wait, call(all_gather, rows, ranks, self.placement.tp_group, val=val), val=val)  # type: ignore[no-any-return]

    def _read(self, call: Any, param: Any) -> Any:
        """What is no expert's weight: ranks read it for their parts, and each has to get the whole gradient."""
        if not isinstance(param, Node):
            return [self._read(call, p) for p in param]
        if not value(param).is_floating_point():
            return param
        return call(READ_BY_PARTS, param, self.placement.tp_group)
