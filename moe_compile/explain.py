"""`explain` and `rewrite`: the compiler's two other front doors."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from moe_compile import dynamo_reports, pipeline
from moe_compile.backend import moe_ep
from moe_compile.graph_text import graph_text
from moe_compile.region import experts
from moe_compile.report import RegionReport, Report


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Which expert regions `torch.compile(model, backend="moe_ep")` rewrites for these inputs, and which not, and why.

    Runs the model once without Inductor, with or without gradients as the caller would (`torch.no_grad()` around this
    call explains inference).  A model that is compiled already is looked through.  Parameters, buffers and the random
    state are left as they were.
    """
    target = getattr(model, "_orig_mod", model)
    found: dynamo_reports.Collected = []
    token = dynamo_reports.collector.set(found)
    inplace = target.__dict__.pop("_compiled_call_impl", None) if isinstance(target, nn.Module) else None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            # A backend object of its own, so that nothing compiled before answers instead.
            backend = functools.partial(moe_ep)
            probe = torch.compile(_fresh(target), backend=backend, options={"inner": "eager"})
            with torch._dynamo.config.patch(recompile_limit=10_000):  # after graph breaks each look is a recompilation
                probe(*args, **kwargs)
        finally:
            dynamo_reports.collector.reset(token)
            if inplace is not None:
                target.__dict__["_compiled_call_impl"] = inplace
    names = {m: name for name, m in target.named_modules()} if isinstance(target, nn.Module) else {}
    places: dict[tuple[int, str], RegionReport] = {}
    for module, region in found:  # Dynamo translates a function again after a graph break: one line a place
        place = id(module), region.location
        if place not in places or region.matched:
            places[place] = dataclasses.replace(region, module=names.get(module, region.module))
    return Report(list(places.values()))


def _fresh(target: Callable[..., Any]) -> Callable[..., Any]:
    """A function around the target whose code, and so whatever Dynamo keeps with it, is new."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


DECOMPOSED = ("aten.addmm.default", "aten.mm.default", "aten._softmax.default")


def rewrite(gm: GraphModule) -> Report:
    """Find and rewrite the expert regions of an ATen graph, in place: `torch.export.export(...).module()`, its
    `graph_module`, or `make_fx(..., pre_dispatch=True)`.

    Every node needs its fake value in `meta["val"]`, as these tracers leave it.  Names of outputs stay, so that an
    `ExportedProgram` whose graph this is remains valid.  Most of the rules are about ops as programs write them; where
    nothing is found in a graph that routes and is decomposed, the report says so.
    """
    before = graph_text(gm.graph)
    outputs = [n.name if isinstance(n, Node) else None for n in tree_leaves(gm.graph.output_node().args)]
    report = pipeline.detect(gm)
    sites = [
        (n, n.args[6], n.args[0].meta["val"].shape) for n in gm.graph.find_nodes(op="call_function", target=experts)
    ]  # type: ignore[union-attr]
    regions = [RegionReport(False, "", "", "", 0, None, reason, before) for _, reason in report.refused]
    reports = [*pipeline.narrow(gm), *pipeline.canonicalise(gm)]
    declined = {site: reason for r in reports for site, reason in r.refused if r.name == "DispatchExperts"}
    _keep_names(gm, outputs)
    after = graph_text(gm.graph)
    for node, number, shape in sites:
        reason = declined.get(node.name)
        top_k = shape[1] if isinstance(shape[1], int) else None
        regions.append(RegionReport(reason is None, "", "", "", number, top_k, reason, before, after))  # type: ignore[arg-type]
    if not sites and (op := _decomposed(gm)) is not None:
        reason = (
            f"the graph is decomposed (it has {op}): rewrite what torch.export gives, before run_decompositions(), "
            "or what make_fx(..., pre_dispatch=True) gives"
        )
        regions.append(RegionReport(False, "", "", "", 0, None, reason, before))
    return Report(regions)


def _keep_names(gm: GraphModule, outputs: list[str | None]) -> None:
    """Give what is returned in the place of a node that is gone its name."""
    for name, node in zip(outputs, tree_leaves(gm.graph.output_node().args), strict=True):
        if name is not None and isinstance(node, Node) and node.name != name:
            if all(n.name != name for n in gm.graph.nodes) and node.name not in outputs:
                node.name = name  # free again, but a namespace gives no name twice
    gm.recompile()


def _decomposed(gm: GraphModule) -> str | None:
    """An op that programs do not write, in a graph that looks as if it chose experts."""
    ops = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
    routes = any(op.startswith(("aten.topk.", "aten.sort.", "aten.one_hot.")) for op in ops)
    return next((op.removesuffix(".default") for op in DECOMPOSED if op in ops), None) if routes else None
