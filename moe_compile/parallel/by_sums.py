"""Strategies that weigh and add a token's results where its experts are: fewer rows come home, and the order of the sum
depends on which experts share a rank.  For numerics="fast".

dedup        a token travels once to each rank that has one of its experts, and one sum comes back from each
allgather    every rank gets all ranks' tokens and runs its own experts on them; a reduce-scatter adds the ranks' sums
"""

from typing import Any

from torch.fx import Node

from moe_compile.parallel.exchange import distinct_ranks, equal_message, padded, prefix, rank_message
from moe_compile.parallel.writer import Message, Splits, Steps, Tells, Writer, aten, moe_ep
from moe_compile.rewrite import value


class _Sums(Writer):
    """The whole body runs there, routing weights and all."""

    def steps(self) -> Steps:
        kept = self.read_by(self.body)
        self.wired = self.wire_ids()
        yield from self.meet(self.mark(self.body, kept))
        ids = self.local_ids(self.there(self.wired))
        tokens = [self.there(x) for n, x in self.tokens.items() if n.name in kept]
        pairs = [self.there(w) for n, w in self.pairs.items() if n.name in kept]
        last: Any = self.body.graph.output_node().args[0]
        yield None
        y = self.run_here(ids, tokens, pairs, kept, self.body, last)
        back = self.back(self.flat(y))
        yield None
        return self.cast(self.shaped(self.home(back), [*value(last).shape[1:]]))

    def meet(self, mark: int) -> Tells:
        """Tell the other ranks what they have to know."""
        raise NotImplementedError

    def there(self, rows: Node) -> Node:
        """What belongs to tokens [T, ...], where it is needed: [S, ...]."""
        return self.shaped(self.move(rows), [*value(rows).shape[1:]])

    def move(self, rows: Node) -> Node:
        """The same, with features in one dimension there."""
        raise NotImplementedError

    def back(self, rows: Node) -> Node:
        """The sums [S, D] of this rank, on their way home."""
        raise NotImplementedError

    def home(self, rows: Node) -> Node:
        """What came back, added: [T, D]."""
        return rows


class AllGather(_Sums):
    name = "allgather"

    def meet(self, mark: int) -> Tells:
        self.sent = self.call(equal_message, self.ids, self.ranks, self.sizes[0], mark)
        self.received = yield Message(self.sent)

    def move(self, rows: Node) -> Node:
        return self.gather(self.flat(rows), self.sent, self.received)

    def back(self, rows: Node) -> Node:
        return self.reduce(rows, value(self.ids).shape[0])


class Dedup(_Sums):
    """A token's slots name the ranks of its experts; a slot whose rank another names before it is nobody's."""

    name = "dedup"

    def meet(self, mark: int) -> Tells:
        rank_TK = self.call(distinct_ranks, self.wired, self.sizes[0])
        self.first = next(iter(self.tokens.values()), self.ids)
        routed = self.call(moe_ep.dispatch.default, self.flat(self.first), rank_TK, self.ranks)
        self.x_RD, self.offsets, self.order = (self.item(routed, i) for i in range(3))
        yield Message(self.call(rank_message, self.offsets, self.sizes[0], mark))
        self.send, self.receive = yield Splits(None)

    def move(self, rows: Node) -> Node:
        if rows is self.first:
            moved = self.x_RD
        else:
            token_R = self.call(aten.floor_divide.default, self.order, self.top_k)
            moved = self.call(aten.index.Tensor, self.flat(rows), [token_R])
        rows = self.call(prefix, moved, self.send)
        return self.travel(rows, self.receive, self.send, sum(self.receive.meta["val"]))

    def back(self, rows: Node) -> Node:
        return self.travel(rows, self.send, self.receive, sum(self.send.meta["val"]))

    def home(self, rows: Node) -> Node:
        y = self.call(padded, rows, self.order)
        return self.call(moe_ep.combine.default, y, None, self.order, self.offsets, self.top_k)
