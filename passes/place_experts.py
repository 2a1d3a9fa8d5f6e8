"""Bring tokens to the ranks that hold their experts, and the results back.

Before:
    experts = experts(ids, [x], [weights], [w13, w2], [], body, E)     # w13, w2: sharded over P ranks by expert

After:
    x_RD, offsets, order = moe_ep.dispatch(x, ids, E)
    sent     = message(offsets, x_RD, P, M, fingerprint)               # how many rows, expert by expert
    received = wait(_c10d_functional_autograd.all_to_all_single(sent, ..., group))
    splits   = host_read(sent, received, x_RD, P)                      # the one host read
    x_SD     = wait(_c10d_functional_autograd.all_to_all_single(x_RD, splits[1], splits[0], group))
    y_SD     = experts(expert_of_row(received, x_SD, P), [x_SD], [], [w13_local, w2_local], [], body, L)
    y_RD     = wait(_c10d_functional_autograd.all_to_all_single(y_SD, splits[0], splits[1], group))
    out      = moe_ep.combine(y_RD * weights, None, order, offsets, K)

Stage      place; needs the `experts` nodes of detect_experts.
Numerics   the same products; weighing and the sum over a token's experts run where the token is, in the order of k:
           the number of ranks does not show.
Why        tokens are smaller than experts.  What an expert's result is multiplied with at last, values of the pair
           alone, stays at home.  This is strategy "alltoall"; with "gather_weights" the shards are gathered from all
           ranks instead, and the node stays as it is.
Refuses    experts that are not sharded in their order; params that are not views, expert by expert, of a sharded stack
           or of replicated parameters; experts that read what another rank may not have, or bools.
"""

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from moe_compile.errors import Refusal
from moe_compile.graph_text import graph_text
from moe_compile.parallel.exchange import expert_of_row, fingerprint, host_read, message
from moe_compile.parallel.mesh import shard_sizes
from moe_compile.parallel.shards import Family, Placement
from moe_compile.ragged import Batched, Batcher
from moe_compile.region import experts
from moe_compile.rewrite import RewritePass, emit, value

aten, moe_ep = torch.ops.aten, torch.ops.moe_ep
wait = torch.ops._c10d_functional.wait_tensor.default
all_to_all = torch.ops._c10d_functional_autograd.all_to_all_single.default
all_gather = torch.ops._c10d_functional_autograd.all_gather_into_tensor.default


class PlaceExperts(RewritePass[Node]):
    """`state`: the placeholders of the module's parameters, by name; the placement's families are among them.

    `local`, after the pass: the new placeholders, of this rank's shards, by the names of their families.
    """

    def __init__(self, placement: Placement, state: Mapping[str, Node], strategy: str = "alltoall") -> None:
        self.placement, self.state, self.strategy = placement, state, strategy
        self.families = {state[m]: f for f in placement.families for m in f.members if m in state}
        self.replicated = set(state.values()) - self.families.keys()
        self.local: dict[str, Node] = {}

    def find(self, graph: Graph) -> Iterator[tuple[Node, Node]]:
        for node in graph.find_nodes(op="call_function", target=experts):
            if any(_sources(p) & self.families.keys() for p in node.args[3]):  # type: ignore[union-attr]
                yield node, node

    def refuse(self, node: Node) -> str | None:
        scratch = Graph()
        copies: dict[Node, Node] = {}
        scratch.graph_copy(node.graph, copies)  # a rehearsal, as in dispatch_experts
        owner = torch.nn.Module()
        body = str(node.args[5].target)  # type: ignore[union-attr]
        setattr(owner, body, getattr(node.graph.owning_module, body))
        scratch.owning_module = owner  # type: ignore[assignment]
        state = {name: copies[n] for name, n in self.state.items()}
        try:
            PlaceExperts(self.placement, state, self.strategy)._write(scratch, copies[node])
        except Refusal as reason:
            return str(reason)
        return None

    def rewrite(self, graph: Graph, node: Node) -> None:
        node.replace_all_uses_with(self._write(graph, node))

    def _write(self, graph: Graph, node: Node) -> Node:
        params: Any = node.args[3]
        num_experts: Any = node.args[6]
        sharded = {f.num_experts for p in params for n in _sources(p) if (f := self.families.get(n))}
        if sharded != {num_experts}:
            raise Refusal(f"{num_experts} experts run, {' and '.join(map(str, sorted(sharded)))} are sharded")
        with graph.inserting_before(node):
            ours = [self._param(graph, node, p) for p in params]
            if self.travels:
                return _Exchange(graph, node, ours, self.placement, self.replicated).write()
            args = (*node.args[:3], ours, *node.args[4:])
            return emit(graph, experts, *args, like=node, val=node.meta["val"])

    @property
    def travels(self) -> bool:
        """Whether rows do, and so whether a rank runs only its own experts."""
        return self.placement.ranks > 1 and self.strategy == "alltoall"

    # -- params of the experts that run here -------------------------------------------------

    def _param(self, graph: Graph, node: Node, param: Any) -> Any:
        sources = _sources(param)
        if not sources & self.families.keys():
            if not self.travels:
                return param
            if not sources <= self.replicated:
                raise Refusal("what belongs to an expert is computed from the tokens of a rank")
            own = self._own(node)
            if isinstance(param, Node):
                return emit(graph, aten.slice.Tensor, param, 0, own.start, own.stop, like=node)
            return list(param)[own]
        if isinstance(param, Node):
            return self._view(graph, node, param)
        family = self.families.get(param[0])
        if family is None or [self.state.get(m) for m in family.members] != list(param):
            raise Refusal("the experts' weights are not sharded in the order of the experts")
        return self._shard(graph, node, family)

    def _own(self, node: Node) -> slice:
        sizes = shard_sizes(node.args[6], self.placement.ranks)  # type: ignore[arg-type]
        start = sum(sizes[: self.placement.rank])
        return slice(start, start + sizes[self.placement.rank])

    def _view(self, graph: Graph, node: Node, param: Node) -> Node:
        """The ops between a sharded stack and a param, on what runs here: each works on every expert alike."""
        if (family := self.families.get(param)) is not None:
            if family.members != (family.members[0],):
                raise Refusal(f"{param.name} is the weight of one expert, and stands for all")
            return self._shard(graph, node, family)
        if not _each_alike(param):
            raise Refusal(f"{param.name} ({param.target}) is not shown to work on every expert's weight alike")
        source, *rest = param.args
        return emit(graph, param.target, self._view(graph, node, source), *rest, like=node)  # type: ignore[arg-type]

    def _shard(self, graph: Graph, node: Node, family: Family) -> Node:
        """The shard of a family, a new input; gathered, if tokens do not travel."""
        if family.name not in self.local:
            example = value(self.state[family.members[0]])
            matrix = example.shape[1:] if len(family.members) == 1 else example.shape
            with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
                made = graph.placeholder(family.name.replace(".", "_") + "_local")
            mine = shard_sizes(family.num_experts, self.placement.ranks)[self.placement.rank]
            made.meta["val"] = example.new_empty((mine, *matrix)).requires_grad_(example.requires_grad)
            self.local[family.name] = made
        shard = self.local[family.name]
        gathers = self.placement.ranks > 1 and not self.travels
        return _gathered(graph, node, shard, family.num_experts, self.placement) if gathers else shard


def _gathered(graph: Graph, node: Node, shard: Node, num_experts: int, placement: Placement) -> Node:
    most = shard_sizes(num_experts, placement.ranks)[0]
    flat = emit(graph, aten.reshape.default, shard, [value(shard).shape[0], -1], like=node)
    if missing := most - value(flat).shape[0]:
        flat = emit(graph, aten.constant_pad_nd.default, flat, [0, 0, 0, missing], like=node)
    val = value(flat).new_empty((most * placement.ranks, value(flat).shape[1]))
    flat = emit(graph, all_gather, flat, placement.ranks, placement.group, like=node, val=val)
    flat = emit(graph, wait, flat, like=node, val=val)
    flat = emit(graph, aten.slice.Tensor, flat, 0, 0, num_experts, like=node)  # what was added is at the end
    return emit(graph, aten.reshape.default, flat, [num_experts, *value(shard).shape[1:]], like=node)


class _Exchange:
    """Writes the experts of one node, each on the rank that holds it."""

    def __init__(
        self, graph: Graph, node: Node, params: list[Any], placement: Placement, replicated: set[Node]
    ) -> None:
        self.graph, self.node, self.placement, self.replicated = graph, node, placement, replicated
        args: Any = node.args
        self.ids, tokens, pairs, whole, shared, body, self.num_experts, self.num_classes = args
        self.body = getattr(graph.owning_module, str(body.target))
        self.top_k = value(self.ids).shape[1]
        self.sizes = shard_sizes(self.num_experts, placement.ranks)
        inputs = iter(self.body.graph.find_nodes(op="placeholder"))
        groups: Any = (tokens, pairs, params, shared)
        self.tokens, self.pairs, self.params, self.shared = ({next(inputs): v for v in g} for g in groups)
        self.whole = dict(zip(self.params, whole, strict=True))

    def write(self) -> Node:
        inner, late, last = _split(self.body)
        kept = {n.name for n in inner.graph.find_nodes(op="placeholder")}
        for inside, outside in self.shared.items():
            if inside.name in kept and not _sources(outside) <= self.replicated:
                raise Refusal(f"experts read {outside.name}, of which every rank has its own")
        self._route()
        self._tell(inner, kept)
        tokens = {n: self._there(self._token_rows(n), v, 1) for n, v in self.tokens.items() if n.name in kept}
        pairs = {n: self._there(self._pair_rows(v), v, 2) for n, v in self.pairs.items() if n.name in kept}
        params, shared = ([v for n, v in g.items() if n.name in kept] for g in (self.params, self.shared))
        rows = [*tokens.values(), *pairs.values()]
        if not rows:
            raise Refusal("the experts read nothing of their tokens")
        ids = self._call(expert_of_row, self.received, rows[0], self.placement.ranks)
        shape = value(last).shape[1:]
        val = value(last).new_empty((value(ids).shape[0], *shape))
        y = self._call(
            experts, ids, [*tokens.values()], [*pairs.values()], params, shared, self._attach(inner),
            self.sizes[self.placement.rank], None, val=val,
        )  # fmt: skip
        y = self._travel(self._flat(y), self.send, self.receive, value(self.x_RD).shape[0])
        if len(shape) != 1:
            y = self._call(aten.reshape.default, y, [-1, *shape])
        return self._combine(self._rest(late, last, y))

    # -- there --------------------------------------------------------------------------------

    def _route(self) -> None:
        """Rows by expert: `x_RD`, `offsets`, `order`."""
        if self.num_classes is not None:
            self.ids = self._call(moe_ep.check_ids.default, self.ids, self.num_classes)
        if self.tokens:
            first = self._flat(next(iter(self.tokens.values())))
        else:  # nothing to carry but the order
            first = self._call(aten.to.dtype, self._call(aten.slice.Tensor, self.ids, 1, 0, 1), torch.float32)
        routed = self._call(moe_ep.dispatch.default, first, self.ids, self.num_experts)
        self.x_RD, self.offsets, self.order = (self._call(operator.getitem, routed, i) for i in range(3))

    def _tell(self, inner: GraphModule, kept: set[str]) -> None:
        """How many rows come and go: `received`, `send`, `receive`."""
        read = [_spelled(v) for g in (self.whole, self.shared) for n, v in g.items() if n.name in kept]
        ranks, most = self.placement.ranks, self.sizes[0]
        mark = fingerprint(f"{self.num_experts} {read}\n{graph_text(inner.graph)}")
        sent = self._call(message, self.offsets, self.x_RD, ranks, most, mark)
        equal = [most + 2] * ranks
        val = sent.meta["val"]
        self.received = self._call(all_to_all, sent, equal, equal, self.placement.group, val=val)
        self.received = self._call(wait, self.received, val=val)
        splits = self._call(host_read, sent, self.received, self.x_RD, ranks)
        self.send, self.receive = (self._call(operator.getitem, splits, i) for i in range(2))

    def _token_rows(self, inside: Node) -> Node:
        if inside is next(iter(self.tokens)):
            return self.x_RD
        token_R = self._call(aten.floor_divide.default, self.order, self.top_k)
        return self._call(aten.index.Tensor, self._flat(self.tokens[inside]), [token_R])

    def _pair_rows(self, pairs: Node) -> Node:
        flat = self._call(aten.reshape.default, pairs, [-1, value(pairs).shape[2:].numel()])
        return self._call(aten.index.Tensor, flat, [self.order])

    def _there(self, rows: Node, source: Node, skipped: int) -> Node:
        """Flat rows on the ranks of their experts, in the shape of a token or, [S, 1, ...], of a pair."""
        if value(rows).dtype == torch.bool:
            raise Refusal(f"experts read {source.name}, bools, which no collective carries")
        moved = self._travel(rows, self.receive, self.send, sum(self.receive.meta["val"]))
        shape = [-1, *[1] * (skipped - 1), *value(source).shape[skipped:]]
        return moved if len(shape) == 2 and skipped == 1 else self._call(aten.reshape.default, moved, shape)

    def _travel(self, rows: Node, out: Node, into: Node, number: Any) -> Node:
        """`out`: rows from each rank, `into`: rows to each."""
        val = value(rows).new_empty((number, value(rows).shape[1]))
        moved = self._call(all_to_all, rows, out, into, self.placement.group, val=val)
        return self._call(wait, moved, val=val)

    # -- and back -----------------------------------------------------------------------------

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
                flat = self._call(aten.reshape.default, self.pairs[n], [-1, *value(self.pairs[n]).shape[2:]])
                batcher.env[n] = Batched("row", self._call(aten.index.Tensor, flat, [self.order]))
            else:
                batcher.env[n] = batcher.apply(n)
        result = batcher.env[self.body.graph.output_node().args[0]].node
        assert isinstance(result, Node)
        return result

    def _combine(self, y_RD: Node) -> Node:
        shape, dtype = value(y_RD).shape[1:], value(self.node).dtype
        out = self._call(moe_ep.combine.default, self._flat(y_RD), None, self.order, self.offsets, self.top_k)
        if len(shape) != 1:
            out = self._call(aten.reshape.default, out, [-1, *shape])
        return out if value(out).dtype == dtype else self._call(aten.to.dtype, out, dtype)

    # -- help -----------------------------------------------------------------------------------

    def _call(self, target: Any, *args: Any, val: Any = None) -> Node:
        return emit(self.graph, target, *args, like=self.node, val=val)

    def _flat(self, rows: Node) -> Node:
        """Rows with their features in one dimension."""
        if value(rows).dim() == 2:
            return rows
        return self._call(aten.reshape.default, rows, [-1, value(rows).shape[1:].numel()])

    def _attach(self, body: GraphModule) -> Node:
        owner = self.graph.owning_module
        name = next(n for i in range(len(self.graph.nodes)) if not hasattr(owner, n := f"local_body_{i}"))
        setattr(owner, name, body)
        return self.graph.get_attr(name)


# -- what stays at home ---------------------------------------------------------------------


def _split(body: GraphModule) -> tuple[GraphModule, set[Node], Node]:
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
            behind |= {here, *_upstream(factor)}
            late, last = set(behind), rest
            here = rest
        elif here.target is aten.to.dtype and len(here.args) == 2 and not here.kwargs:
            behind.add(here)
            here = here.args[0]
        else:
            break
    inner, made = Graph(), dict[Node, Node]()
    needed = _upstream(last)
    for n in body.graph.nodes:
        if n in needed:
            made[n] = inner.node_copy(n, lambda x: made[x])
    inner.output(made[last])
    return GraphModule(torch.nn.Module(), inner, "Body"), late, last


def _upstream(node: Node) -> set[Node]:
    """The node and all that it is computed from."""
    found, todo = {node}, [node]
    while todo:
        new = set(todo.pop().all_input_nodes) - found
        found |= new
        todo += new
    return found


# -- params ---------------------------------------------------------------------------------


def _sources(param: Any) -> set[Node]:
    """The inputs that a value, or each of a list, is computed from."""
    nodes = [param] if isinstance(param, Node) else list(param)
    return {n for node in nodes for n in _upstream(node) if n.op == "placeholder"}


def _spelled(value: Any) -> Any:
    """How a value, or each of a list, is computed from the inputs."""
    if isinstance(value, (list, tuple)):
        return [_spelled(v) for v in value]
    if not isinstance(value, Node) or value.op in ("placeholder", "get_attr"):
        return str(value)
    return [str(value.target), _spelled(value.args), sorted((k, _spelled(v)) for k, v in value.kwargs.items())]


def _each_alike(node: Node) -> bool:
    """Whether an op on a stack does the same to the weight of each expert, and leaves the experts first."""
    source, *rest = node.args
    arguments: Any = rest
    if node.kwargs or not isinstance(source, Node) or len(node.all_input_nodes) != 1:
        return False
    if node.target in (aten.to.dtype, aten.detach.default, aten.contiguous.default, operator.getitem):
        return True
    rank = value(source).dim() if isinstance(source.meta["val"], torch.Tensor) else 0
    if node.target is aten.transpose.int:
        return rank >= 3 and 0 not in (arguments[0] % rank, arguments[1] % rank)
    if node.target is aten.permute.default:
        return bool(arguments[0][0] == 0)
    if node.target in (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default):
        return len(arguments) == 2 and arguments[1] % rank != 0
    return node.target is aten.slice.Tensor and bool(arguments) and arguments[0] % rank != 0
