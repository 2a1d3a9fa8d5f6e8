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
           the number of ranks does not show.  With numerics "fast", "dedup" and "allgather" add them rank by rank.
Why        tokens are smaller than experts.  What an expert's result is multiplied with at last, values of the pair
           alone, stays at home.  This is strategy "alltoall".  "dedup" sends a token once to a rank and brings back one
           sum; "allgather" gathers rows or tokens and ends in a reduce-scatter, without a host read; with
           "gather_weights" the shards are gathered from all ranks, and the node stays as it is.
Refuses    sums by rank where numerics is "exact"; experts that are not sharded in their order; params that are not
           views, expert by expert, of a sharded stack or of replicated parameters; experts that read what another rank
           may not have, or bools.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from moe_compile.errors import Refusal
from moe_compile.parallel.by_rows import AllGatherRows, AllToAll
from moe_compile.parallel.by_sums import AllGather, Dedup
from moe_compile.parallel.expert_shards import JOIN_SHARDS, padded, part, split_dim
from moe_compile.parallel.mesh import shard_sizes
from moe_compile.parallel.shards import Family, Placement
from moe_compile.parallel.weight_views import RESHAPES, cut_of, each_alike, place_of, without_gradients
from moe_compile.parallel.writer import Writer, all_gather, sources, wait, write
from moe_compile.passes.chunk_tokens import CHUNKS
from moe_compile.region import experts
from moe_compile.rewrite import RewritePass, emit, value
from moe_compile.trained import TRAINED

aten = torch.ops.aten
gather_shards = torch.ops._c10d_functional.all_gather_into_tensor.default

# By strategy and numerics: "exact" needs rows that come home unsummed.
WRITERS: dict[tuple[str, str], type[Writer]] = {
    ("alltoall", "exact"): AllToAll,
    ("alltoall", "fast"): AllToAll,
    ("dedup", "fast"): Dedup,
    ("allgather", "exact"): AllGatherRows,
    ("allgather", "fast"): AllGather,
}


Chunks = tuple[Node, ...]  # of one region (passes/chunk_tokens.py), which are placed together; or the one node


class PlaceExperts(RewritePass[Chunks]):
    """`state`: the placeholders of the module's parameters, by name; the placement's families are among them.

    `local`, after the pass: the new placeholders, of this rank's shards, by the names of their families.
    """

    def __init__(
        self, placement: Placement, state: Mapping[str, Node], strategy: str = "alltoall", numerics: str = "exact"
    ) -> None:
        self.placement, self.state, self.strategy, self.numerics = placement, state, strategy, numerics
        self.families = {state[m]: f for f in placement.families for m in f.members if m in state}
        self.replicated = set(state.values()) - self.families.keys()
        self.local: dict[str, Node] = {}
        self.ungraded: set[Node] = set()

    def find(self, graph: Graph) -> Iterator[tuple[Node, Chunks]]:
        regions: dict[Any, list[Node]] = {}
        for node in graph.find_nodes(op="call_function", target=experts):
            if any(sources(p) & self.families.keys() for p in node.args[3]):  # type: ignore[union-attr]
                regions.setdefault(node.meta.get(CHUNKS, node), []).append(node)
        for nodes in regions.values():
            yield nodes[0], tuple(nodes)

    def read_by(self, node: Node) -> dict[Family, Tensor]:
        """The families that experts read, each with the value of a member."""
        read = {n for p in node.args[3] for n in sources(p)}  # type: ignore[union-attr]
        return {f: value(n) for n, f in self.families.items() if n in read and self.state[f.members[0]] is n}

    def refuse(self, nodes: Chunks) -> str | None:
        node = nodes[0]
        scratch = Graph()
        copies: dict[Node, Node] = {}
        scratch.graph_copy(node.graph, copies)  # a rehearsal, as in dispatch_experts
        owner = torch.nn.Module()
        body = str(node.args[5].target)  # type: ignore[union-attr]
        setattr(owner, body, getattr(node.graph.owning_module, body))
        scratch.owning_module = owner  # type: ignore[assignment]
        state = {name: copies[n] for name, n in self.state.items()}
        try:
            PlaceExperts(self.placement, state, self.strategy, self.numerics)._write(
                scratch, tuple(copies[n] for n in nodes)
            )
        except Refusal as reason:
            return str(reason)
        return None

    def rewrite(self, graph: Graph, nodes: Chunks) -> None:
        for node, result in zip(nodes, self._write(graph, nodes), strict=True):
            node.replace_all_uses_with(result)

    def _write(self, graph: Graph, nodes: Chunks) -> list[Node]:
        node = nodes[0]
        params: Any = node.args[3]
        num_experts: Any = node.args[6]
        sharded = {f.num_experts for p in params for n in sources(p) if (f := self.families.get(n))}
        if sharded != {num_experts}:
            raise Refusal(f"{num_experts} experts run, {' and '.join(map(str, sorted(sharded)))} are sharded")
        self.ungraded = without_gradients(graph)
        with graph.inserting_before(nodes[-1]):
            before = set(graph.nodes)
            ours = [self._param(graph, node, p) for p in params]
            late = _joins([n for n in graph.nodes if n not in before])
            if self.travels:
                if (self.strategy, self.numerics) not in WRITERS:
                    raise Refusal(f"{self.strategy} adds a token's results rank by rank: numerics is {self.numerics!r}")
                writer, chunks = WRITERS[self.strategy, self.numerics], len(nodes)
                outs = write([writer(graph, n, ours, self.placement, self.replicated, chunks) for n in nodes])
                first = next((n for n in graph.nodes if n.target is experts and {*late} & {*n.all_input_nodes}), None)
                if first is not None:
                    for n in late:  # tokens travel meanwhile
                        first.prepend(n)
                return outs
            args = [(*n.args[:3], ours, *n.args[4:]) for n in nodes]
            return [emit(graph, experts, *a, like=node, val=n.meta["val"]) for n, a in zip(nodes, args, strict=True)]

    @property
    def travels(self) -> bool:
        """Whether rows do, and so whether a rank runs only its own experts."""
        return self.placement.ranks > 1 and self.strategy != "gather_weights"

    # -- params of the experts that run here -------------------------------------------------

    def _param(self, graph: Graph, node: Node, param: Any) -> Any:
        inputs = sources(param)
        if not inputs & self.families.keys():
            if not self.travels:
                return param
            if not inputs <= self.replicated:
                raise Refusal("what belongs to an expert is computed from the tokens of a rank")
            own = self._own(node)
            if isinstance(param, Node):
                return emit(graph, aten.slice.Tensor, param, 0, own.start, own.stop, like=node)
            return list(param)[own]
        if isinstance(param, Node):
            if value(param).shape[0] != node.args[6]:
                raise Refusal(f"{param.name} has {value(param).shape[0]} rows for {node.args[6]} experts")
            return self._view(graph, node, param)
        family = self.families.get(param[0])
        if family is not None and [self.state.get(m) for m in family.members] == list(param):
            return self._shard(graph, node, family)
        return self._pieces(graph, node, list(param))

    def _own(self, node: Node) -> slice:
        sizes = shard_sizes(node.args[6], self.placement.ranks)  # type: ignore[arg-type]
        start = sum(sizes[: self.placement.rank])
        return slice(start, start + sizes[self.placement.rank])

    def _view(self, graph: Graph, node: Node, param: Node) -> Node:
        """The ops between a sharded stack and a param, on what runs here: each works on every expert alike."""
        if (family := self.families.get(param)) is not None:
            if family.listed:
                raise Refusal(f"{param.name} is the weight of one expert, and stands for all")
            shard = self._shard(graph, node, family)
            if not family.rows:
                return shard
            return emit(graph, aten.reshape.default, shard, [-1, *value(shard).shape[2:]], like=node)
        if param.target in RESHAPES:
            return self._reshaped(graph, node, param)
        if not each_alike(param):
            raise Refusal(f"{param.name} ({param.target}) is not shown to work on every expert's weight alike")
        return self._again(graph, node, param, self._view(graph, node, param.args[0]))  # type: ignore[arg-type]

    def _reshaped(self, graph: Graph, node: Node, param: Node) -> Node:
        """Another shape of the same numbers, in their order: the experts stay one behind the other.

        So they do in all values between a sharded parameter and a param: each has a multiple of E in front.
        """
        number: Any = node.args[6]
        shape = list(value(param).shape)
        if param.kwargs or len(param.all_input_nodes) != 1 or not shape or shape[0] % number:
            raise Refusal(f"{param.name} ({param.target}) is not shown to keep the experts' weights apart")
        source = self._view(graph, node, param.args[0])  # type: ignore[arg-type]
        shape[0] = shape[0] // number * self._number(node)
        made = emit(graph, aten.reshape.default, source, shape, like=node)
        return emit(graph, aten.detach.default, made, like=node) if param in self.ungraded else made

    def _number(self, node: Node) -> int:
        """How many experts run here."""
        number: Any = node.args[6]
        own = self._own(node)
        return own.stop - own.start if self.travels else number

    def _pieces(self, graph: Graph, node: Node, params: list[Node]) -> list[Node]:
        """Params that are computed one by one, each from the piece of a sharded value that is its expert's."""
        cuts = [cut_of(param) for param in params]
        if any(c is None or place_of(c) != (e, len(params)) for e, c in enumerate(cuts)):
            raise Refusal("the experts' weights are not sharded in the order of the experts")
        own = self._own(node) if self.travels else slice(0, len(params))
        return [self._piece(graph, node, p, c, i) for i, (p, c) in enumerate(zip(params[own], cuts[own], strict=True))]

    def _piece(self, graph: Graph, node: Node, param: Node, cut: Node | None, i: int) -> Node:
        """The same of the i-th expert that runs here."""
        source: Any = param.args[0]
        if param is not cut:
            return self._again(graph, node, param, self._piece(graph, node, source, cut, i))
        whole: Any = source if cut.target is aten.select.int else source.args[0]
        number: Any = node.args[6]
        shape = [self._number(node), value(whole).shape[0] // number, *value(whole).shape[1:]]
        rows = emit(graph, aten.reshape.default, self._view(graph, node, whole), shape, like=node)
        mine = emit(graph, aten.select.int, rows, 0, i, like=node)
        mine = emit(graph, aten.reshape.default, mine, list(value(cut).shape), like=node)
        return emit(graph, aten.detach.default, mine, like=node) if cut in self.ungraded else mine

    def _again(self, graph: Graph, node: Node, param: Node, source: Node) -> Node:
        """The same op on another source, in the grad mode that it had."""
        again = emit(graph, param.target, source, *param.args[1:], like=node)  # type: ignore[arg-type]
        if param not in self.ungraded or not isinstance(again.meta["val"], Tensor):
            return again
        return emit(graph, aten.detach.default, again, like=node)

    def _shard(self, graph: Graph, node: Node, family: Family) -> Node:
        """The shard of a family, a new input; gathered, if tokens do not travel or copies are split."""
        here, example = self.placement, value(self.state[family.members[0]])
        shape = [shard_sizes(family.num_experts, here.ranks)[here.rank], *family.stacked(example.shape)[1:]]
        dim = split_dim(shape, here.edp, family.behind) if here.edp > 1 else None
        if family.name not in self.local:
            with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
                made = graph.placeholder(family.name.replace(".", "_") + "_local")
            held = list(shape)
            if dim is not None:
                own = part(shape[dim], here.edp, here.edp_rank)
                held[dim] = own.stop - own.start
            made.meta["val"] = example.new_empty(held).requires_grad_(example.requires_grad)
            made.meta[TRAINED] = self.state[family.members[0]].meta.get(TRAINED, True)
            self.local[family.name] = made
        shard = self.local[family.name]
        if here.edp > 1:
            shard = _joined(graph, node, shard, dim, shape, example.dtype, here)
        gathers = self.placement.ranks > 1 and not self.travels
        return _gathered(graph, node, shard, family.num_experts, self.placement) if gathers else shard


def _joined(
    graph: Graph, node: Node, shard: Node, dim: int | None, shape: list[int], dtype: torch.dtype, here: Placement
) -> Node:
    """[L, ...]: this rank's experts, of whose weights it holds a part along `dim`, in the dtype of the forward."""
    if dim is None:
        return emit(graph, aten.to.dtype, shard, dtype, like=node)
    flat = emit(graph, aten.to.dtype, emit(graph, aten.detach.default, shard, like=node), dtype, like=node)
    flat = emit(graph, padded, flat, dim, -(-shape[dim] // here.edp), like=node)
    val = value(flat).new_empty((shape[0] * here.edp, *value(flat).shape[1:]))
    flat = emit(graph, gather_shards, flat, here.edp, here.edp_group, like=node, val=val)
    flat = emit(graph, wait, flat, like=node, val=val)
    reduced = here.reduce_dtype or dtype
    return emit(
        graph, JOIN_SHARDS, flat, shard, dim, shape[dim], here.edp, reduced, here.regather, here.edp_group, like=node
    )


def _joins(nodes: list[Node]) -> list[Node]:
    """Those that wait for what is gathered over "edp", and what is made of it, in their order."""
    found: dict[Node, None] = {}
    for n in nodes:
        if n.target is JOIN_SHARDS:
            found |= dict.fromkeys((*n.args[:1], n))  # type: ignore[arg-type]
        elif found.keys() & set(n.all_input_nodes):
            found[n] = None
    return list(found)


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
