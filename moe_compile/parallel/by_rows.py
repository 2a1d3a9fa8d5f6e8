"""Strategies that bring home each row's result, unsummed: the sum over a token's experts runs where the token is, in
the order of k, and so gives the same bits for any number of ranks.

alltoall     a row travels to the rank of its expert, and back
allgather    every rank gets all ranks' rows and runs its own experts on them; a reduce-scatter brings back each row's
             result, to which all ranks but one add zeros
"""

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from moe_compile.parallel.exchange import equal_message, expert_of_row, message
from moe_compile.parallel.writer import Message, Splits, Steps, Tells, Writer, aten, moe_ep, upstream
from moe_compile.ragged import Batched, Batcher
from moe_compile.rewrite import value


class AllToAll(Writer):
    name = "alltoall"

    def steps(self) -> Steps:
        inner, late, last = split(self.body)
        kept = self.read_by(inner)
        self._route()
        yield from self.tell_rows(self.mark(inner, kept))
        tokens = {n: self._token_rows(n) for n in self.tokens if n.name in kept}
        pairs = {n: self._pair_rows(v) for n, v in self.pairs.items() if n.name in kept}
        shapes = {n: [*value(self.tokens[n]).shape[1:]] for n in tokens}
        shapes |= {n: [1, *value(self.pairs[n]).shape[2:]] for n in pairs}
        there = {n: self.shaped(self.there(rows), shapes[n]) for n, rows in (tokens | pairs).items()}
        ids = self.ids_there(next(iter(there.values())))
        yield None
        y = self.run_here(ids, [there[n] for n in tokens], [there[n] for n in pairs], kept, inner, last)
        y = self.shaped(self.home(self.flat(y)), [*value(last).shape[1:]])
        yield None
        return self._combine(self._rest(late, last, y))

    # -- there and back -------------------------------------------------------------------------

    def tell_rows(self, mark: int) -> Tells:
        """How many rows come and go."""
        sent = self.call(message, self.offsets, self.x_RD, self.ranks, self.sizes[0], mark)
        self.received = yield Message(sent)
        self.send, self.receive = yield Splits(self.x_RD)

    def there(self, rows: Node) -> Node:
        return self.travel(rows, self.receive, self.send, sum(self.receive.meta["val"]))

    def ids_there(self, rows: Node) -> Node:
        """[S, 1]: of the rows that arrived."""
        return self.call(expert_of_row, self.received, rows, self.ranks)

    def home(self, rows: Node) -> Node:
        return self.travel(rows, self.send, self.receive, value(self.x_RD).shape[0])

    # -- rows -----------------------------------------------------------------------------------

    def _route(self) -> None:
        """Rows by expert: `x_RD`, `offsets`, `order`."""
        if self.tokens:
            first = self.flat(next(iter(self.tokens.values())))
        else:  # nothing to carry but the order
            first = self.call(aten.to.dtype, self.call(aten.slice.Tensor, self.ids, 1, 0, 1), torch.float32)
        routed = self.call(moe_ep.dispatch.default, first, self.ids, self.num_experts)
        self.x_RD, self.offsets, self.order = (self.item(routed, i) for i in range(3))

    def _token_rows(self, inside: Node) -> Node:
        if inside is next(iter(self.tokens)):
            return self.x_RD
        token_R = self.call(aten.floor_divide.default, self.order, self.top_k)
        return self.call(aten.index.Tensor, self.flat(self.tokens[inside]), [token_R])

    def _pair_rows(self, pairs: Node) -> Node:
        return self.call(aten.index.Tensor, self.flat(pairs, 2), [self.order])

    def _rest(self, late: set[Node], last: Node, y_RD: Node) -> Node:
        """What the body does behind `last`, on the rows of this rank."""
        batcher = Batcher(self.graph, self.node, self.offsets, lambda: self.order)
        batcher.env[last] = Batched("row", y_RD)
        for n in self.body.graph.nodes:
            if n not in late:
                continue
            if n in self.shared:
                batcher.env[n] = Batched("shared", self.shared[n])
            elif n in self.pairs:
                flat = self.call(aten.reshape.default, self.pairs[n], [-1, *value(self.pairs[n]).shape[2:]])
                batcher.env[n] = Batched("row", self.call(aten.index.Tensor, flat, [self.order]))
            else:
                batcher.env[n] = batcher.apply(n)
        result = batcher.env[self.body.graph.output_node().args[0]].node
        assert isinstance(result, Node)
        return result

    def _combine(self, y_RD: Node) -> Node:
        shape = [*value(y_RD).shape[1:]]
        out = self.call(moe_ep.combine.default, self.flat(y_RD), None, self.order, self.offsets, self.top_k)
        return self.cast(self.shaped(out, shape))


class AllGatherRows(AllToAll):
    """As all ranks have equally many rows, nothing has to be known of them on the host."""

    name = "allgather of rows"

    def tell_rows(self, mark: int) -> Tells:
        self.sent = self.call(equal_message, self.ids, self.ranks, self.sizes[0], mark)
        self.received = yield Message(self.sent)

    def there(self, rows: Node) -> Node:
        return self.gather(rows, self.sent, self.received)

    def ids_there(self, rows: Node) -> Node:
        """[P * R, 1]: of all rows; those of others' experts are nobody's."""
        mine = self.call(aten.index.Tensor, self.flat(self.wire_ids(), 2), [self.order])
        return self.local_ids(self.gather(mine, self.sent, self.received))

    def home(self, rows: Node) -> Node:
        return self.reduce(rows, value(self.x_RD).shape[0])


def split(body: GraphModule) -> tuple[GraphModule, set[Node], Node]:
    """(the body up to `last`, the nodes behind it, last).

    Behind are products, and casts between them, with values that the rank of the token has: the routing weights.
    """
    at_home = {n for n in body.graph.find_nodes(op="placeholder") if n.name.startswith(("pair", "shared"))}  # type: ignore[operator]
    for n in body.graph.nodes:
        if n.op == "call_function" and n.all_input_nodes and set(n.all_input_nodes) <= at_home:
            at_home.add(n)
    here: Any = body.graph.output_node().args[0]
    last, late, behind = here, set[Node](), set[Node]()
    while True:
        if here.target is aten.mul.Tensor and len(here.all_input_nodes) == 2 and not here.kwargs:
            (factor, rest) = sorted(here.all_input_nodes, key=lambda n: n not in at_home)
            if factor not in at_home or rest in at_home or value(rest).shape[1:] != value(here).shape[1:]:
                break
            behind |= {here, *upstream(factor)}
            late, last = set(behind), rest
            here = rest
        elif here.target is aten.to.dtype and len(here.args) == 2 and not here.kwargs:
            behind.add(here)
            here = here.args[0]
        else:
            break
    inner, made = Graph(), dict[Node, Node]()
    needed = upstream(last)
    for n in body.graph.nodes:
        if n in needed:
            made[n] = inner.node_copy(n, lambda x: made[x])
    inner.output(made[last])
    return GraphModule(torch.nn.Module(), inner, "Body"), late, last
