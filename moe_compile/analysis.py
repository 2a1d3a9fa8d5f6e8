"""From a function to a proven region graph: capture it, detect its experts, discharge the trace's obligations."""

import contextlib
import functools
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from moe_compile import worlds
from moe_compile.arguments import NOTHING_KNOWN, Known
from moe_compile.capture import capture
from moe_compile.captured import EXAMPLE, SYMBOLIC, Capture
from moe_compile.cost import computes
from moe_compile.detect.dense_values import Every
from moe_compile.detect.facts import Facts
from moe_compile.detect.ids import table_of
from moe_compile.detect.interpreter import Interpreter
from moe_compile.detect.nodes import name_of, op_of
from moe_compile.detect.sum_values import ListRegion, Region
from moe_compile.detect.values import Constant, Emptiness, Hits, Index, Plain, Slice
from moe_compile.errors import Refusal
from moe_compile.kept import kept_attributes
from moe_compile.loop_state import OneByOne
from moe_compile.passes.detect_experts import DetectExperts
from moe_compile.python_state import (
    Functions,
    check_effects,
    check_identity,
    check_loops,
    check_tensors,
    reachable,
    unchanged,
    watch,
)

log = logging.getLogger(__name__)


@dataclass
class Analysis:
    """A function whose experts are proven: its graph with `experts` nodes, and what the proof rests on."""

    gm: GraphModule
    capture: Capture
    functions: Functions  # everything Python the function can run: what it reads has to be guarded
    before: str
    launches: int  # calls that compute, in the graph before
    form: str  # "loop", "grouped", "batched" or "dense"


def analyse(
    fn: types.FunctionType,
    module: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    known: Known = NOTHING_KNOWN,
) -> Analysis:
    """Prove what `fn(module, *args, **kwargs)` computes, or raise `Refusal`.

    `known`: what the caller's graph shows of the tensor arguments.
    """
    functions = reachable(fn, module)
    kept = kept_attributes(fn, module, functions)
    check_effects(functions, lambda code, step: code is fn.__code__ and step.argval in kept)
    check_tensors(functions, module)
    with unchanged(functions, module), watch(module, kept):
        return _prove(fn, module, args, kwargs, known, functions)


def _prove(
    fn: types.FunctionType,
    module: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    known: Known,
    functions: Functions,
) -> Analysis:
    """At first with one visit of a loop for many experts, if it has one."""
    try:
        return _proven(fn, module, args, kwargs, known, functions, functions)
    except OneByOne as why:
        log.debug("%s is traced expert by expert: %s", fn.__qualname__, why)
    return _proven(fn, module, args, kwargs, known, functions, None)


def _proven(
    fn: types.FunctionType,
    module: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    known: Known,
    functions: Functions,
    visit: Functions | None,
) -> Analysis:
    from moe_compile.graph_text import graph_text

    trace = functools.partial(_trace, fn, module, args, kwargs, known)
    main, asked = trace(truth=True, visit=visit)
    if main.same_if_alone:
        check_identity(functions)
    with _for_many(main):
        before, launches = graph_text(main.gm.graph), _launches(main)
        detect, reason = _detect(main, known)
    nonempty = True
    if reason is not None and main.answered:
        nonempty = False  # "if count == 0: continue" asks the other way round
        main, asked = trace(truth=False, visit=visit)
        before, launches = graph_text(main.gm.graph), _launches(main)
        detect, second = _detect(main, known)
        reason = reason if second is not None and reason != NOTHING else second
    with _for_many(main):
        if reason is not None:
            raise Refusal(reason)
        region = _only_region(detect)
        if main.unbound is not None:
            raise Refusal(main.unbound)
        _check_answers(main, detect.run, region)
        if asked is not None:
            few = worlds.sample(main.visits, worlds.FEW if main.asks else 1) if main.visits else None
            apart, seen = (main, asked) if few is None else trace(truth=nonempty, visited=few, by_number=main.by_number)
            assert seen is not None
            if main.asks:
                check_loops(functions, apart.locals)
            if few is not None:
                worlds.check_sample(asked, seen, few)
            if main.asks:
                again = functools.partial(
                    capture, fn, module, args, kwargs, truth=nonempty, classes=apart.classes, visited=few,
                    rows=SYMBOLIC if apart.sees_rows else EXAMPLE, selections=apart.selections, known=known,
                    by_number=main.by_number, lines=False,
                )  # fmt: skip
                worlds.check(seen, apart, known.distinct, again, few)
        _nothing_left(main)
    assert detect.run is not None
    by_slots = any(isinstance(v, Every) and v.slots is not None for v in detect.run.values.values())
    on_tokens = not isinstance(region, ListRegion) and not by_slots
    form = "dense" if on_tokens and detect.run.inside else _form(region, before)
    return Analysis(main.gm, main, functions, before, launches, form)


@contextlib.contextmanager
def _for_many(main: Capture) -> Iterator[None]:
    """Where a visit stands for many experts, a refusal sends it back to be traced expert by expert."""
    try:
        yield
    except Refusal as refusal:
        if main.visits:
            raise OneByOne(str(refusal)) from refusal
        raise


def _launches(main: Capture) -> int:
    """How many operations the original runs: those of a visit once for each of its experts."""
    times, found = 1, 0
    starts = {visit.begin: len(visit.numbers) for visit in main.visits} | {visit.end: 1 for visit in main.visits}
    for node in main.gm.graph.nodes:
        times = starts.get(node, times)
        made_up = str(node.target).startswith(("moe_ep_capture.visit", "moe_ep_capture.pick", "aten.sym_size"))
        found += times * (computes(node) and not made_up)
    return found


def _nothing_left(main: Capture) -> None:
    """Refuse if something else than the region needs what the trace made up; drop it otherwise."""
    left = [n for n in main.gm.graph.nodes if "moe_ep_capture" in str(n.target)]
    if left:
        user = next((u for u in left[0].users), left[0])
        raise Refusal(f"what the loop selects is used outside of it too ({user.name})")
    inputs = main.gm.graph.find_nodes(op="placeholder")
    for length in inputs[len(inputs) - main.lengths :]:
        if length.users:
            raise Refusal("the number of an expert's rows is used outside of the loop too")
        main.gm.graph.erase_node(length)
    main.gm.recompile()


def _trace(
    fn: types.FunctionType,
    module: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    known: Known,
    truth: bool,
    visited: Sequence[int] | None = None,
    visit: Functions | None = None,
    by_number: bool = False,
) -> tuple[Capture, worlds.Survey | None]:
    """The function with some rows for every expert; with a symbol for their number if it looks at it.

    And a survey of its graph as it was, if it decides on data or was not traced whole.  `visited`, `visit`,
    `by_number`: as in `capture`.
    """
    trace = functools.partial(
        capture, fn, module, args, kwargs, truth=truth, visited=visited, visit=visit, known=known, by_number=by_number,
        lines=visited is None,
    )  # fmt: skip
    found = trace(may_fail=visited is None)
    bound, reason = _beyond_counts(found, trace) if found.open_counts is not None and visited is None else (None, None)
    last = found.fails_at  # `worlds.check` shows that it always fails there
    if last is not None:
        found = trace(classes=last)
    if found.sees_rows:
        found = trace(rows=SYMBOLIC, selections=found.selections, classes=last)
    found.bound, found.unbound = (last if bound is None else bound), reason
    needed = found.asks or found.visits or by_number
    return found, worlds.survey(found, known.distinct) if needed else None


def _beyond_counts(found: Capture, trace: Callable[..., Capture]) -> tuple[int | None, str | None]:
    """Where bincount(minlength=E) counts the ids, what becomes of an id that is E or more: (E, None) if it is an error,
    (None, None) if it is nobody's, since nobody sees that there are more numbers; else the reason to refuse it."""
    if found.visits:
        raise OneByOne("bincount has more numbers where an id is out of range")
    if (fails_at := trace(longer=True, visit=None, lines=False).fails_at) is not None:
        return fails_at, None
    try:
        trace(bounded=True, visit=None, lines=False)
    except Refusal:
        return None, (
            f"bincount(minlength={found.open_counts}) gives more numbers where an id is greater, and the function sees "
            "them: the ids are not shown to be less, as those of topk are"
        )
    return None, None


NOTHING = "nothing is summed over experts"


def _detect(found: Capture, known: Known) -> tuple[DetectExperts, str | None]:
    """Run detection on the captured graph; the reason if it proves no region, or not all."""
    inputs = found.gm.graph.find_nodes(op="placeholder")
    ids = frozenset(inputs[i] for i in known.distinct)
    facts = Facts(
        ids, found.constants, torch.is_grad_enabled(), may_guard=True, classes=found.bound, visits=found.each(),
        tables=found.tables, sizes=found.sizes,
    )  # fmt: skip
    detect = DetectExperts(facts)
    report = detect(found.gm)
    if report.refused:
        return detect, report.refused[0][1]
    if not report.applied:
        assert detect.run is not None
        run = detect.run
        reason = _first_unknown(run) or _other_mask(run) or next(iter(run.hints), None) or _one_batch(run)
        return detect, reason or NOTHING
    return detect, None


def _form(region: Region, before: str) -> str:
    if region.total.terms[0].selection.expert is not None:
        return "loop"
    if region.total.terms[0].selection.order == "dense":
        return "dense"
    return "grouped" if "grouped_mm" in before else "batched"


def _other_mask(run: Interpreter) -> str | None:
    """Why rows that a loop selects are not those of an expert."""
    for node, value in run.values.items():
        if "moe_ep_capture" in str(node.target) and isinstance(value, Plain | Slice):
            mask: Any = node.args[0]
            return f"rows are selected by {mask.name}, which is not shown to say which ids are those of an expert"
    return None


def _one_batch(run: Interpreter) -> str | None:
    """That there is nothing to gather: the rows of all experts are one batch, as where each has as many slots."""
    for node, value in run.values.items():
        operands, letters = node.args[:2], "ecd,edf->ecf"
        if op_of(node) == "einsum" and isinstance(node.args[1], (list, tuple)):
            letters, operands = str(node.args[0]).replace(" ", ""), tuple(node.args[1])
        elif op_of(node) not in ("bmm", "matmul"):
            continue
        if not isinstance(value, Plain | Every) or len(operands) != 2 or not all(isinstance(n, Node) for n in operands):
            continue
        inputs, _, result = letters.partition("->")
        first, _, second = inputs.partition(",")
        by_expert = bool(first) and first[0] == second[:1] == result[:1]
        sources = [_unturned(n) for n in operands]
        laid_out = {n.op if n.op == "placeholder" else op_of(n) for n in sources} & {"index", "einsum", "bmm", "matmul"}
        stacks = any(n.op == "placeholder" for n in sources)
        ranks = (3, 4) if op_of(node) == "einsum" else (3,)
        put = next((n for n in sources if n.op == "call_function" and op_of(n) in ("index_put", "index_put_")), None)
        if by_expert and stacks and put is not None:
            return (
                f"{name_of(put)} puts rows into slots by index: "
                "that each has one of its own and is read back from there is not shown"
            )
        if by_expert and stacks and laid_out and all(n.meta["val"].dim() in ranks for n in operands):  # type: ignore[union-attr]
            return f"{name_of(node)} multiplies the rows of all experts at once already"
    return None


def _unturned(node: Any) -> Node:
    views = ("transpose", "t", "mT", "to", "permute", "view", "reshape", "contiguous")
    while op_of(node) in views and isinstance(node.args[0], Node):
        node = node.args[0]
    return node  # type: ignore[no-any-return]


def _first_unknown(run: Interpreter) -> str | None:
    return next((v.reason for v in run.values.values() if hasattr(v, "reason")), None)


def _only_region(detect: DetectExperts) -> Region:
    assert detect.run is not None
    regions = list(detect.run.regions.values())
    if len(regions) != 1:
        raise Refusal(f"the function holds {len(regions)} sums over experts, which share their loops")
    return regions[0]


def _check_answers(found: Capture, run: Interpreter | None, region: Region) -> None:
    """What was answered about data must be about these experts: who was chosen, or whether anybody was."""
    assert run is not None
    table = table_of(run, region.ids)

    def of_table(ids: Node) -> bool:
        return table in (table_of(run, ids), run.by_column.get(ids))

    for node in found.iterated:
        value = run.values[node]
        if isinstance(value, Index) or not isinstance(value, Hits) or table_of(run, value.ids) is not table:
            raise Refusal(f"a Python loop runs over {node.name}, not shown to be the list of chosen experts")
        if value.classes is not None and value.classes < region.num_experts:
            raise Refusal(f"{value.classes} classes for {region.num_experts} experts")
    for node, answer in found.answered:
        value = run.values[node]
        if not isinstance(value, Emptiness) or not of_table(value.ids) or value.kind in ("count", "tokens"):
            raise Refusal(f"Python decides on {node.name}, not shown to say whether an expert was chosen")
        if (value.kind == "any") is not answer:
            raise Refusal(f"Python decides on {node.name} both ways")
    for node in found.decided:
        value = run.values[node]
        if not isinstance(value, Emptiness) or not of_table(value.ids):
            raise Refusal(f"Python compares {node.name} with zero, not shown to be the number of an expert's rows")
    for node in found.counted:
        value = run.values[node]
        if not isinstance(value, Emptiness | Constant) or (isinstance(value, Emptiness) and value.kind != "count"):
            raise Refusal(f"Python reads {node.name}, not shown to be the number of an expert's rows")
