"""What the strategies share that write one `experts` node for many ranks (by_rows.py, by_sums.py).

Letters    T tokens of this rank, K experts per token, E experts, P ranks, L experts of this rank, M the most that a
           rank has; R = T*K rows, S rows received.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from moe_compile.detect.nodes import is_random
from moe_compile.errors import Refusal
from moe_compile.graph_text import graph_text
from moe_compile.parallel.exchange import (
    fingerprint,
    host_read,
    host_reads,
    joined_messages,
    message_of,
    on_the_wire,
)
from moe_compile.parallel.mesh import shard_sizes
from moe_compile.parallel.shards import Placement
from moe_compile.parallel.shared_tokens import READ_BY_PARTS
from moe_compile.region import experts
from moe_compile.rewrite import emit, value

aten, moe_ep = torch.ops.aten, torch.ops.moe_ep
wait = torch.ops._c10d_functional.wait_tensor.default
all_to_all = torch.ops._c10d_functional_autograd.all_to_all_single.default
all_gather = torch.ops._c10d_functional_autograd.all_gather_into_tensor.default
reduce_scatter = torch.ops._c10d_functional_autograd.reduce_scatter_tensor.default


@dataclass(frozen=True)
class Message:
    """What a chunk tells the other ranks; answered by what they tell it."""

    sent: Node


@dataclass(frozen=True)
class Splits:
    """Asks how many rows go to each rank and come from each; all of `rows` travel, if given."""

    rows: Node | None


Wanted = Message | Splits | None
Steps = Generator[Wanted, Any, Node]
Tells = Generator[Wanted, Any, None]


class Writer(ABC):
    """Writes the experts of one node, each on the rank that holds it.

    `params`: those of this rank's experts.  `replicated`: inputs that are the same on all ranks.  The node may be one
    of several `chunks` of the tokens, which are written in turns (`write`).
    """

    name: str  # of the strategy, a part of the fingerprint

    def __init__(
        self, graph: Graph, node: Node, params: list[Any], placement: Placement, replicated: set[Node], chunks: int = 1
    ) -> None:
        self.chunks = chunks
        self.graph, self.node, self.placement, self.replicated = graph, node, placement, replicated
        args: Any = node.args
        self.ids, tokens, pairs, whole, shared, body, self.num_experts, self.num_classes = args
        self.body = getattr(graph.owning_module, str(body.target))
        self.top_k = value(self.ids).shape[1]
        self.ranks = placement.ranks
        self.sizes = shard_sizes(self.num_experts, self.ranks)
        inputs = iter(self.body.graph.find_nodes(op="placeholder"))
        groups: Any = (tokens, pairs, params, shared)
        self.tokens, self.pairs, self.params, self.shared = ({next(inputs): v for v in g} for g in groups)
        self.whole = dict(zip(self.params, whole, strict=True))

    @abstractmethod
    def steps(self) -> Steps:
        """Write the region; return the node that stands for the result.

        Where chunks have to wait for each other it yields: what it tells the other ranks, that it wants the splits, and
        None between what brings tokens, what runs and sends back, and the rest.
        """

    # -- what every strategy does ---------------------------------------------------------------

    def read_by(self, body: GraphModule) -> set[str]:
        """The names of the inputs of a body that runs away from the tokens; refuses what is another value there."""
        kept = {n.name for n in body.graph.find_nodes(op="placeholder")}
        if not kept & {n.name for n in (*self.tokens, *self.pairs)}:
            raise Refusal("the experts read nothing of their tokens")
        for inside, outside in self.shared.items():
            if inside.name in kept and not sources(outside) <= self.replicated:
                raise Refusal(f"experts read {outside.name}, of which every rank has its own")
        for inside, outside in (self.tokens | self.pairs).items():
            if inside.name in kept and value(outside).dtype == torch.bool:
                raise Refusal(f"experts read {outside.name}, bools, which no collective carries")
        return kept

    def check_ids(self) -> None:
        if self.num_classes is not None:
            self.ids = self.call(moe_ep.check_ids.default, self.ids, self.num_classes)

    def wire_ids(self) -> Node:
        return self.call(on_the_wire, self.ids, self.num_experts)

    def mark(self, inner: GraphModule, kept: set[str]) -> int:
        """What has to be the same on all ranks, as a number."""
        read = [spelled(v) for g in (self.whole, self.shared) for n, v in g.items() if n.name in kept]
        how = f"{self.name} in {self.chunks} chunks" if self.chunks > 1 else self.name
        return fingerprint(f"{how} {self.num_experts} {read}\n{graph_text(inner.graph)}")

    def run_here(self, ids: Node, tokens: Any, pairs: Any, kept: set[str], body: GraphModule, last: Node) -> Node:
        """The node again, for the experts of this rank."""
        params, shared = ([v for n, v in g.items() if n.name in kept] for g in (self.params, self.shared))
        val = value(last).new_empty((value(ids).shape[0], *value(last).shape[1:]))
        mine = self.sizes[self.placement.rank]
        return self.call(experts, ids, tokens, pairs, params, shared, self.attach(body), mine, None, val=val)

    def local_ids(self, ids: Node) -> Node:
        """Ids of this rank's experts, from 0; those of others are outside, which is nobody."""
        return self.call(aten.sub.Tensor, ids, sum(self.sizes[: self.placement.rank]))

    # -- collectives ----------------------------------------------------------------------------

    def travel(self, rows: Node, out: Node, into: Node, number: Any) -> Node:
        """`out`: rows from each rank, `into`: rows to each."""
        val = value(rows).new_empty((number, value(rows).shape[1]))
        moved = self.call(all_to_all, rows, out, into, self.placement.group, val=val)
        return self.call(wait, moved, val=val)

    def gather(self, rows: Node, sent: Node, received: Node) -> Node:
        """The rows of all ranks, once it is known that they have equally many: [P * rows, ...]."""
        rows = self.call(moe_ep.of_equal_sizes.default, rows, sent, received, self.ranks)
        val = value(rows).new_empty((value(rows).shape[0] * self.ranks, value(rows).shape[1]))
        return self.call(wait, self.call(all_gather, rows, self.ranks, self.placement.group, val=val), val=val)

    def reduce(self, rows: Node, number: Any) -> Node:
        """The sums over ranks of what each has for this one: [number, ...]."""
        val = value(rows).new_empty((number, value(rows).shape[1]))
        summed = self.call(reduce_scatter, rows, "sum", self.ranks, self.placement.group, val=val)
        return self.call(wait, summed, val=val)

    # -- help -----------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, val: Any = None) -> Node:
        return emit(self.graph, target, *args, like=self.node, val=val)

    def item(self, node: Node, index: int) -> Node:
        return self.call(operator.getitem, node, index)

    def flat(self, rows: Node, dims: int = 1) -> Node:
        """Rows, or for dims = 2 pairs, with their features in one dimension."""
        if value(rows).dim() == 2 and dims == 1:
            return rows
        return self.call(aten.reshape.default, rows, [-1, value(rows).shape[dims:].numel()])

    def shaped(self, rows: Node, shape: list[int]) -> Node:
        """Flat rows in their own shape again."""
        return rows if len(shape) == 1 else self.call(aten.reshape.default, rows, [-1, *shape])

    def cast(self, out: Node) -> Node:
        dtype = value(self.node).dtype
        return out if value(out).dtype == dtype else self.call(aten.to.dtype, out, dtype)

    def attach(self, body: GraphModule) -> Node:
        owner = self.graph.owning_module
        name = next(n for i in range(len(self.graph.nodes)) if not hasattr(owner, n := f"local_body_{i}"))
        setattr(owner, name, body)
        return self.graph.get_attr(name)


def write(writers: Sequence[Writer]) -> list[Node]:
    """The results of regions that are written side by side: one read of the splits for all, and two messages.

    What brings tokens stands before anything that runs, so a collective of one chunk may run under products of another.
    """
    for writer in writers:
        writer.check_ids()
    todo, results = [w.steps() for w in writers], list[Node]()
    answers: list[Any] = [None] * len(writers)
    while not results:
        wants: list[Wanted] = []
        for steps, answer in zip(todo, answers, strict=True):
            try:
                wants.append(steps.send(answer))
            except StopIteration as done:
                results.append(done.value)
        if isinstance(first := next(iter(wants), None), Message):
            sent = [w.sent for w in wants if isinstance(w, Message)]
            every, answers = _tell(writers[0], sent)
        elif isinstance(first, Splits):
            answers = _read(writers[0], *every, [w.rows for w in wants if isinstance(w, Splits)])
        else:
            answers = [None] * len(writers)
    return results


def _tell(writer: Writer, sent: list[Node]) -> tuple[tuple[list[Node], list[Node]], list[Any]]:
    """((what this rank tells the others, what they tell it), the latter), chunk by chunk.

    The first message has the shape that it has everywhere.  The others, whose number ranks might disagree on, are sent
    together, once it is known from the first that they do not.
    """
    ranks, rest = writer.ranks, sent[1:]
    theirs = [_exchanged(writer, sent[0], 1)]
    if rest:
        mine = rest[0] if len(rest) == 1 else writer.call(joined_messages, rest, ranks)
        mine = writer.call(moe_ep.of_same_experts.default, mine, theirs[0], sent[0], ranks)
        other = _exchanged(writer, mine, len(rest))
        single = len(rest) == 1
        theirs += [other] if single else [writer.call(message_of, other, i, len(rest), ranks) for i in range(len(rest))]
    return (sent, theirs), theirs


def _exchanged(writer: Writer, mine: Node, chunks: int) -> Node:
    """What the others tell this rank of so many chunks."""
    equal = [chunks * (writer.sizes[0] + 2)] * writer.ranks
    theirs = writer.call(all_to_all, mine, equal, equal, writer.placement.group, val=mine.meta["val"])
    return writer.call(wait, theirs, val=mine.meta["val"])


def _read(writer: Writer, sent: list[Node], received: list[Node], rows: list[Node | None]) -> list[Any]:
    """For each chunk (rows to each rank, rows from each), on the host; all of its `rows` travel, if given."""
    if len(rows) == 1:
        splits = writer.call(host_read, sent[0], received[0], rows[0], writer.ranks)
        return [(writer.item(splits, 0), writer.item(splits, 1))]
    splits = writer.call(host_reads, sent, received, rows, writer.ranks)
    found = [writer.item(splits, i) for i in range(2 * len(rows))]
    return list(zip(found[::2], found[1::2], strict=True))


def upstream(node: Node) -> set[Node]:
    """The node and all that it is computed from."""
    found, todo = {node}, [node]
    while todo:
        new = set(todo.pop().all_input_nodes) - found
        found |= new
        todo += new
    return found


def sources(param: Any) -> set[Node]:
    """The inputs that a value, or each of a list, is computed from, and what is drawn at random on the way."""
    nodes = [param] if isinstance(param, Node) else list(param)
    return {n for node in nodes for n in upstream(node) if n.op == "placeholder" or is_random(n)}


def spelled(value: Any) -> Any:
    """How a value, or each of a list, is computed from the inputs."""
    if isinstance(value, (list, tuple)):
        return [spelled(v) for v in value]
    if not isinstance(value, Node) or value.op in ("placeholder", "get_attr"):
        return str(value)
    if value.target is READ_BY_PARTS:  # of a group that has another name on other ranks
        return spelled(value.args[0])
    return [str(value.target), spelled(value.args), sorted((k, spelled(v)) for k, v in value.kwargs.items())]
