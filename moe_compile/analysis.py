"""From a function to a proven region graph: capture it, detect its experts, discharge the trace's obligations."""

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from moe_compile.capture import ROWS, SYMBOLIC, Capture, capture
from moe_compile.detect.interpreter import Facts, Interpreter
from moe_compile.detect.values import Constant, Emptiness, Hits, Index, Region
from moe_compile.errors import Refusal
from moe_compile.passes.detect_experts import DetectExperts
from moe_compile.python_state import Functions, check_effects, check_loops, reachable


@dataclass
class Analysis:
    """A function whose experts are proven: its graph with `experts` nodes, and what the proof rests on."""

    gm: GraphModule
    capture: Capture
    functions: Functions  # everything Python the function can run: what it reads has to be guarded
    before: str
    form: str  # "loop", "grouped" or "batched"


def analyse(
    fn: types.FunctionType,
    module: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    distinct: Sequence[int] = (),
) -> Analysis:
    """Prove what `fn(module, *args, **kwargs)` computes, or raise `Refusal`.

    `distinct`: positions, among the tensor arguments, of ids that come from a topk.
    """
    from moe_compile.graph_text import graph_text

    functions = reachable(fn, module)
    check_effects(functions)
    main = _trace(fn, module, args, kwargs, truth=True)
    before = graph_text(main.gm.graph)
    detect, reason = _detect(main, distinct)
    nonempty = True
    if reason is not None and main.answered:
        nonempty = False  # "if count == 0: continue" asks the other way round
        main = _trace(fn, module, args, kwargs, truth=False)
        before = graph_text(main.gm.graph)
        detect, second = _detect(main, distinct)
        reason = reason if second is not None else None
    if reason is not None:
        raise Refusal(reason)
    region = _only_region(detect)
    _check_answers(main, detect.run, region, empty=False)
    if main.answered or main.sees_rows:
        check_loops(functions)
        empty = capture(fn, module, args, kwargs, rows=0, truth=not nonempty)
        _adds_nothing(empty, region, distinct)
    if main.sees_rows:
        single = capture(fn, module, args, kwargs, rows=1, truth=nonempty)
        other, reason = _detect(single, distinct)
        if reason or not _same_region(region, _only_region(other)):
            raise Refusal(f"one row is treated in another way than several: {reason or 'the body differs'}")
    left = [n for n in main.gm.graph.nodes if "moe_ep_capture" in str(n.target)]
    if left:
        user = next((u for u in left[0].users), left[0])
        raise Refusal(f"what the loop selects is used outside of it too ({user.name})")
    rows = main.gm.graph.find_nodes(op="placeholder")[-1]
    assert rows.name.startswith(ROWS) and not rows.users
    main.gm.graph.erase_node(rows)
    main.gm.recompile()
    return Analysis(main.gm, main, functions, before, _form(region, before))


def _trace(fn: types.FunctionType, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], truth: bool) -> Capture:
    """The function with some rows for every expert; with a symbol for their number if it looks at it."""
    found = capture(fn, module, args, kwargs, truth=truth)
    return capture(fn, module, args, kwargs, truth=truth, rows=SYMBOLIC) if found.sees_rows else found


def _detect(found: Capture, distinct: Sequence[int]) -> tuple[DetectExperts, str | None]:
    """Run detection on the captured graph; the reason if it proves no region, or not all."""
    inputs = found.gm.graph.find_nodes(op="placeholder")
    facts = Facts(frozenset(inputs[i] for i in distinct), found.constants, torch.is_grad_enabled())
    detect = DetectExperts(facts)
    report = detect(found.gm)
    if report.refused:
        return detect, report.refused[0][1]
    if not report.applied:
        assert detect.run is not None
        return detect, _first_unknown(detect.run) or "nothing is summed over experts"
    return detect, None


def _form(region: Region, before: str) -> str:
    if region.total.terms[0].selection.expert is not None:
        return "loop"
    return "grouped" if "grouped_mm" in before else "batched"


def _first_unknown(run: Interpreter) -> str | None:
    return next((v.reason for v in run.values.values() if hasattr(v, "reason")), None)


def _only_region(detect: DetectExperts) -> Region:
    assert detect.run is not None
    regions = list(detect.run.regions.values())
    if len(regions) != 1:
        raise Refusal(f"the function holds {len(regions)} sums over experts, which share their loops")
    return regions[0]


def _check_answers(found: Capture, run: Interpreter | None, region: Region, *, empty: bool) -> None:
    """What was answered about data must be about these experts: who was chosen, or whether anybody was."""
    assert run is not None
    for node in found.iterated:
        value = run.values[node]
        if isinstance(value, Index) or not isinstance(value, Hits) or value.ids is not region.ids:
            raise Refusal(f"a Python loop runs over {node.name}, not shown to be the list of chosen experts")
        if value.classes is not None and value.classes < region.num_experts:
            raise Refusal(f"{value.classes} classes for {region.num_experts} experts")
    for node, answer in found.answered:
        value = run.values[node]
        if not isinstance(value, Emptiness) or value.ids is not region.ids or value.kind == "count":
            raise Refusal(f"Python decides on {node.name}, not shown to say whether an expert was chosen")
        if (value.kind == "any") is not (answer is not empty):
            raise Refusal(f"Python decides on {node.name} both ways")
    for node in found.counted:
        value = run.values[node]
        if not isinstance(value, Emptiness | Constant) or (isinstance(value, Emptiness) and value.kind != "count"):
            raise Refusal(f"Python reads {node.name}, not shown to be the number of an expert's rows")


def _adds_nothing(empty: Capture, region: Region, distinct: Sequence[int]) -> None:
    """With no rows for anybody, the function must return what it started from: here, zero or known start values.

    It does if the only changes are sums over no rows: the trace has no result but the buffer that it started with, or
    the very region that the other trace has.
    """
    detect, reason = _detect(empty, distinct)
    assert detect.run is not None
    run = detect.run
    if reason is None:
        if _same_region(region, _only_region(detect)):
            _check_answers(empty, run, _only_region(detect), empty=True)
            return
        raise Refusal("an expert without rows is treated in another way")
    bad = [n for n, v in run.values.items() if type(v).__name__ in ("Sum", "Unknown", "SumRead", "Rows")]
    touched = next((n for n in bad if n.users), None)
    if touched is not None:
        raise Refusal(f"an expert without rows still has an effect ({touched.name})")
    for node, answer in empty.answered:
        value = run.values[node]
        if not isinstance(value, Emptiness) or (value.kind == "any") is answer:
            raise Refusal(f"Python decides on {node.name}, not shown to say whether an expert was chosen")
    start = region.total.start
    target = str(start.node.target)
    output: Any = empty.gm.graph.output_node()
    if not any(str(n.target) == target for n in _upstream(output)):
        raise Refusal("without rows the function returns something else")


def _upstream(node: Node) -> set[Node]:
    seen: set[Node] = set()
    todo = [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                todo.append(source)
    return seen


def _same_region(a: Region, b: Region) -> bool:
    """The same experts, from two traces of one function: bodies equal up to node identity."""
    from moe_compile.graph_text import graph_text
    from moe_compile.region import Body

    texts = []
    for region in (a, b):
        body = Body(region.families)
        module = body.build(region.body)
        leaves = [(leaf.role, leaf.node.name) for level in body.inputs.values() for leaf in level]
        texts.append((graph_text(module.graph, types=False), leaves, region.num_experts, region.ids.name))
    return texts[0] == texts[1]
