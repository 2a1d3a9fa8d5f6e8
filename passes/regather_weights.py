"""Gather experts' weights again in the backward, where they are split over the ranks that hold the same experts.

Before (a joint graph; what is marked ~ is computed again in the backward):
      flat = wait(_c10d_functional.all_gather_into_tensor(shard_LCD, ...))
      w_LAD = moe_ep.join_shards(flat, shard_LCD, ..., again=True, ...)

After:
    ~ flat = wait(_c10d_functional.all_gather_into_tensor(shard_LCD, ...))
    ~ w_LAD = moe_ep.join_shards(flat, shard_LCD, ..., again=True, ...)

Stage      schedule; runs on AOTAutograd's joint graphs, before the partitioner, and after save_collectives.
Numerics   the same bits: what is gathered twice is the same.
Why        kept for the backward, the whole weights of all layers would be in memory at once, which is what splitting
           them avoids.  FSDP's `reshard_after_forward`: with False they are kept, checkpointed or not.
Refuses    nothing.
"""

import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from moe_compile.parallel.expert_shards import JOIN_SHARDS
from moe_compile.parallel.writer import upstream
from moe_compile.rewrite import RewritePass

aten = torch.ops.aten

# What has one input and the same numbers as it, but for rounding.
SAME = {
    aten.alias.default, aten.clone.default, aten.detach.default, aten.permute.default, aten.reshape.default,
    aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.t.default,
    aten.transpose.int, aten.unbind.int, aten.unsqueeze.default, aten.view.default, aten._to_copy.default,
    operator.getitem,
}  # fmt: skip


class RegatherWeights(RewritePass[Node]):
    def find(self, graph: Graph) -> Iterator[tuple[Node, Node]]:
        for node in graph.find_nodes(op="call_function", target=JOIN_SHARDS):
            yield node, node

    def rewrite(self, graph: Graph, node: Node) -> None:
        if not node.args[6]:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            return
        made = upstream(node)  # of the shard, a parameter, alone
        todo = [node]
        while todo:  # and views and casts of it, which would be kept in its place
            new = {user for user in todo.pop().users if user.target in SAME} - made
            made |= new
            todo += new
        for n in made:
            if n.op == "call_function":
                n.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
