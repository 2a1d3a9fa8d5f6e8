"""Find sums over experts in an ATen graph and write each as one `experts` node.

Before (one of E iterations, or the sorted form, or the batched form):
    where   = aten.where(mask_e)                      # (t, k) with ids[t, k] == e
    rows    = aten.index(x, [where[1]])
    y       = <row-wise body of rows and the weights of e>
    total_e = aten.index_add_(total, 0, where[1], y)

After:
    experts = experts(ids, [x], [weights], [w13, w2], [], body, E)

Stage      detect; reads ATen graphs (pre-dispatch or not), needs nothing.
Numerics   the same sums; their order and the dtype they run in are those of `moe_ep.combine`.
Why        one node that says what is computed, whatever way it was written in.
Refuses    whatever the interpreter (moe_compile/detect) cannot prove, with the first unproven point.
"""

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from moe_compile.detect import (
    chosen_results,
    counts,
    crossed,
    dense,
    entries,
    every,
    joined_rows,
    listings,
    lists,
    marks,
    masks,
    one_hot_tables,
    pair_grids,
    pairs,
    picked,
    picked_columns,
    picked_products,
    routing_weights,
    rows,
    scattered_rows,
    selection,
    sliced_rows,
    slot_flat,
    slot_places,
    slot_results,
    slot_rows,
    slot_sums,
    slot_tables,
    slots,
    sorted_rows,
    sums,
    tables,
    visit_index,
)  # fmt: skip
from moe_compile.detect.dense_values import Every, Picked
from moe_compile.detect.facts import Facts
from moe_compile.detect.interpreter import Interpreter, Rule, goes_with_its_region
from moe_compile.detect.sum_values import ListRegion, Region
from moe_compile.region import Body, Expr, Leaf, experts
from moe_compile.rewrite import PassReport, RewritePass, drop_dead, emit
from moe_compile.series import series_of

aten = torch.ops.aten


def rules() -> dict[str, tuple[Rule, ...]]:
    """All rules of an op, the particular before the general."""
    every_table = (
        listings.RULES, slot_flat.RULES, slot_places.RULES, slot_rows.RULES, slot_results.RULES,
        chosen_results.RULES, crossed.RULES, one_hot_tables.RULES,
        pair_grids.RULES, counts.RULES, sliced_rows.RULES, joined_rows.RULES, scattered_rows.RULES, tables.RULES,
        masks.RULES, visit_index.RULES, entries.RULES, selection.RULES, routing_weights.RULES,
        sorted_rows.RULES, dense.RULES, every.RULES, pairs.RULES,
        picked_columns.RULES, picked_products.RULES, picked.RULES, sums.RULES,
        lists.RULES, marks.RULES, slots.RULES, slot_tables.RULES, slot_sums.RULES, rows.RULES,
    )  # fmt: skip
    ops = {op for table in every_table for op in table}
    found = {op: tuple(rule for table in every_table for rule in table.get(op, ())) for op in ops}
    return _WithSlices({op: (*found[op], rows.on_slices) for op in ops})


class _WithSlices(dict[str, tuple[Rule, ...]]):
    """Any op may be applied to an expert's weights alone."""

    def get(self, op: str, default=()):  # type: ignore[no-untyped-def, override]
        return super().get(op, (rows.on_slices,))


@dataclass(frozen=True)
class Found:
    """A sum over experts that ends at `site`, or why it could not be shown to be one."""

    site: Node
    region: Region | None
    reason: str | None


class DetectExperts(RewritePass[Found]):
    def __init__(self, facts: Facts | None = None) -> None:
        self.facts = facts or Facts()
        self.run: Interpreter | None = None

    def find(self, graph: Graph) -> Iterator[tuple[Node, Found]]:
        self.run = Interpreter(graph, rules(), self.facts)
        self.run.run(sums.finish)
        if not self.run.regions and not self.run.refused:
            picked_columns.ended(self.run)
        if not self.run.regions and not self.run.refused:
            lists.joined(self.run)
            self.run.refuse_lost_changes()
        for site, region in self.run.regions.items():
            yield site, Found(site, region, None)
        for site, reason in self.run.refused:
            yield site, Found(site, None, reason)

    def refuse(self, found: Found) -> str | None:
        if found.region is None:
            return found.reason
        assert self.run is not None
        if found.region.total.start.node is not found.site and self.run.read_elsewhere(found.region.total.start.node):
            return f"{found.region.total.start.node.name} is read through another name while results are added to it"
        return None

    def rewrite(self, graph: Graph, found: Found) -> None:
        region, site = found.region, found.site
        assert region is not None
        with graph.inserting_before(site):
            if isinstance(region, ListRegion):
                site.replace_all_uses_with(lists.write(graph, region, site))
                return
            ids, val, start = _ids(graph, region, site), site.meta["val"], region.total.start
            grid = val.dim() > region.body.val.dim()  # tokens lie in two dimensions
            flat = val.reshape(-1, *val.shape[2:]) if grid else val
            node = _experts(graph, region, site, ids, region.body, 0, region.num_experts, region.num_classes, flat)
            if region.tail is not None:
                last, body = region.tail
                rest = _experts(graph, region, site, ids, body, region.num_experts, last, None, flat)
                node = emit(graph, aten.add.Tensor, node, rest, like=site, val=flat)
            if start.kind == "kept":
                node = _kept(graph, region, ids, node, start.node, site)
            if grid:
                like = start.node if start.node is not site else _as_wide(region.ids)
                node = _in_grid(graph, node, like, site)
            if start.kind == "known":
                node = emit(graph, aten.add.Tensor, start.node, node, like=site, val=site.meta["val"])
        site.replace_all_uses_with(node)

    def __call__(self, gm: GraphModule) -> PassReport:
        report = super().__call__(gm)
        if report.applied:
            values = self.run.values if self.run else {}
            sites = set(self.run.regions) if self.run else set()
            local = {n for n, v in values.items() if goes_with_its_region(v)} | (self.run.inside if self.run else set())
            own = (Picked, Every, slot_results.OfPairs)
            local |= {n for n, v in values.items() if isinstance(v, own) and self.run and self.run.is_own(n)}
            drop_dead(gm.graph, lambda n: n in sites or n in local)
            _drop_idle_grad_modes(gm.graph)
            gm.recompile()
        if self.run is not None:
            self.run.erase_ids()
        return report


def _experts(
    graph: Graph,
    region: Region,
    site: Node,
    ids: Node,
    root: Expr,
    first: int,
    last: int,
    num_classes: int | None,
    val: torch.Tensor,
) -> Node:
    """The experts `first` to `last`, without the latter."""
    body = Body(region.families)
    module = body.build(root)
    owner = graph.owning_module
    name = next(n for i in range(len(graph.nodes)) if not hasattr(owner, n := f"experts_body_{i}"))
    setattr(owner, name, module)
    pairs = [_pairs(graph, leaf, ids, region, site) for leaf in body.inputs["pair"]]
    if first:
        ids = emit(graph, aten.sub.Tensor, emit(graph, aten.to.dtype, ids, torch.int64, like=site), first, like=site)
    args = (
        ids,
        [leaf.node for leaf in body.inputs["token"]],
        pairs,
        [_params(graph, leaf, region, site) for leaf in body.inputs["param"]],
        [leaf.node for leaf in body.inputs["shared"]],
        graph.get_attr(name),
        last - first,
        num_classes,
    )
    return emit(graph, experts, *args, like=site, val=val)


def _as_wide(ids: Node) -> Node:
    """[B, S, K] of which the ids are a table."""
    assert isinstance(ids.args[0], Node)
    return ids.args[0]


def _in_grid(graph: Graph, node: Node, like: Node, site: Node) -> Node:
    """Rows [B * S, ...] as [B, S, ...]."""
    val = site.meta["val"]
    if tuple(like.meta["val"].shape) == tuple(val.shape):
        return emit(graph, aten.view_as.default, node, like, like=site, val=val)
    sizes = [
        s if isinstance(s, int) else emit(graph, aten.sym_size.int, like, d, like=site, val=s)
        for d, s in enumerate(val.shape[:2])
    ]
    return emit(graph, aten.reshape.default, node, [*sizes, *val.shape[2:]], like=site, val=val)


def _kept(graph: Graph, region: Region, ids: Node, made: Node, start: Node, site: Node) -> Node:
    """What experts made of their tokens, and what there was before of the others; ids [T, 1]."""

    def call(target: Any, *args: Any) -> Node:
        return emit(graph, target, *args, like=site)

    last = region.num_experts if region.tail is None else region.tail[0]
    chosen = call(aten.bitwise_and.Tensor, call(aten.ge.Scalar, ids, 0), call(aten.lt.Scalar, ids, last))
    val = made.meta["val"]
    chosen = call(aten.reshape.default, chosen, [-1, *[1] * (val.dim() - 1)])
    if start.meta["val"].dim() > val.dim():
        start = call(aten.flatten.using_ints, start, 0, 1)
    return emit(graph, aten.where.self, chosen, made, start, like=site, val=val)


def _params(graph: Graph, leaf: Leaf, region: Region, site: Node) -> Any:
    """The leaf's value for every expert: a stack, a series, or as many nodes."""
    if leaf in region.families:
        own = region.families[leaf]
        series = series_of(own)
        if series is None or len(series) == region.num_experts:
            return own
        part = slice(0, region.num_experts)
        return emit(graph, operator.getitem, own, part, like=site, val=series[part])
    if leaf.node.meta["val"].shape[0] == region.num_experts:
        return leaf.node
    return emit(graph, aten.slice.Tensor, leaf.node, 0, 0, region.num_experts, like=site)


def _drop_idle_grad_modes(graph: Graph) -> None:
    """Erase changes of the grad mode with nothing between them."""
    switches = graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    for first, second in itertools.pairwise(switches):
        if first.next is second:
            graph.erase_node(first)
            graph.erase_node(second)
            return _drop_idle_grad_modes(graph)


def _ids(graph: Graph, region: Region, site: Node) -> Node:
    """The expert of every pair [T, K], as the original reads its weights."""
    ids = tables.written_out(graph, region.ids, site)
    if _rank(ids) == 1:
        ids = emit(graph, aten.unsqueeze.default, ids, 1, like=site)
    if isinstance(region.reads, tuple):
        return emit(graph, aten.clamp.default, ids, *region.reads, like=site)
    if region.reads == "index":  # a negative index counts from the end
        wrapped = emit(graph, aten.add.Tensor, ids, region.num_experts, like=site)
        return emit(graph, aten.where.self, emit(graph, aten.lt.Scalar, ids, 0, like=site), wrapped, ids, like=site)
    return ids


def _pairs(graph: Graph, leaf: Leaf, ids: Node, region: Region, site: Node) -> Node:
    """The node [T, K, ...] that holds the leaf's entry for every pair."""
    node, val = leaf.node, leaf.node.meta["val"]
    if leaf.role == "flat_pair":
        return emit(graph, aten.reshape.default, node, [-1, ids.meta["val"].shape[1], *val.shape[1:]], like=site)
    if leaf.role == "column":
        inside = emit(graph, aten.clamp.default, ids, 0, val.shape[1] - 1, like=site)
        inside = emit(graph, aten.to.dtype, inside, torch.int64, like=site)
        return emit(graph, aten.gather.default, node, 1, inside, like=site)
    return node


def _rank(node: Node) -> int:
    return node.meta["val"].dim()
