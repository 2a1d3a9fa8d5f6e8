"""Run experts on their tokens in chunks, so that what one chunk sends travels while another is computed.

Before:
    experts = experts(ids, [x], [weights], [w13, w2], [], body, E)

After:
    ids_C   = token_chunks(ids, 2)      # here 2
    x_C     = token_chunks(x, 2)
    w_C     = token_chunks(weights, 2)
    y_0     = experts(ids_C[0], [x_C[0]], [w_C[0]], [w13, w2], [], body, E)
    y_1     = experts(ids_C[1], [x_C[1]], [w_C[1]], [w13, w2], [], body, E)
    out     = aten.cat([y_0, y_1])

Stage      place; before place_experts, which places the chunks of a region together: one host read for all, and what
           brings the tokens of every chunk before the products of the first.
Numerics   the same rows and sums of a token's results.  What belongs to experts gets its gradient as a sum over chunks.
Why        a rank waits for its rows only until the first chunk is there; overlap_collectives then has products to put
           under the collectives of the others.  As many rows travel.  What ranks tell each other has a line for each
           chunk, those of all but the first in a second message: ranks might have been given other numbers of chunks.
Refuses    nothing.  Where numerics is "exact" and such gradients are recorded, it is an error (pipeline.py).
"""

from collections.abc import Iterator
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_compile.parallel.exchange import token_chunks
from moe_compile.parallel.writer import sources
from moe_compile.region import experts
from moe_compile.rewrite import RewritePass, emit, value

aten, moe_ep = torch.ops.aten, torch.ops.moe_ep
CHUNKS = "moe_ep_chunks"  # in the meta of a chunk: the number of its region, and of chunks


class ChunkTokens(RewritePass[Node]):
    """`sharded`: the placeholders of the experts' weights."""

    def __init__(self, chunks: int, sharded: set[Node]) -> None:
        self.chunks, self.sharded = chunks, sharded
        self.regions = 0

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
        if num_classes is not None:  # of all tokens, so that an error comes before anything is sent
            ids = emit(graph, moe_ep.check_ids.default, ids, num_classes, like=node)

        def parts(rows: Node) -> Node:
            return emit(graph, token_chunks, rows, self.chunks, like=node)

        def part(of: Node, i: int) -> Node:
            return emit(graph, getitem, of, i, like=node)

        every = parts(ids), [parts(x) for x in tokens], [parts(w) for w in pairs]
        results = []
        for i in range(self.chunks):
            mine = part(every[0], i), [part(x, i) for x in every[1]], [part(w, i) for w in every[2]]
            val = value(node).new_empty((value(mine[0]).shape[0], *value(node).shape[1:]))
            new = emit(graph, experts, *mine, params, shared, body, num_experts, None, like=node, val=val)
            new.meta[CHUNKS] = (self.regions, self.chunks)
            results.append(new)
        self.regions += 1
        return emit(graph, aten.cat.default, results, like=node)
