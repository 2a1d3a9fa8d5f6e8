"""Keep what collectives brought, where activation checkpointing would run them again in the backward.

Before (a joint graph; what is marked ~ is computed again in the backward):
    ~ x_SD = wait(_c10d_functional.all_to_all_single(x_RD, ...))
    ~ y_RD = wait(_c10d_functional.all_to_all_single(y_SD, ...))

After:
      x_SD = wait(_c10d_functional.all_to_all_single(x_RD, ...))
      y_RD = wait(_c10d_functional.all_to_all_single(y_SD, ...))

Stage      schedule; runs on AOTAutograd's joint graphs, before the partitioner.
Numerics   the same bits: what would have been received again is kept.
Why        recomputation trades arithmetic for memory; a collective is waited for by all ranks, and what it brought is a
           part of the activations only.  DeepSpeed-TED calls it communication-aware checkpointing.
Refuses    nothing.  Collectives outside of checkpointed regions are never computed again; torch sees to that.
"""

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from moe_compile.rewrite import RewritePass

AGAIN = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
wait = torch.ops._c10d_functional.wait_tensor.default


class SaveCollectives(RewritePass[Node]):
    def find(self, graph: Graph) -> Iterator[tuple[Node, Node]]:
        for node in graph.find_nodes(op="call_function", target=wait):
            if node.meta.get("recompute") in AGAIN:
                yield node, node

    def rewrite(self, graph: Graph, node: Node) -> None:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
