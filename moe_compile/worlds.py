"""Loops that ask who was chosen: shown to be right also where some experts have rows and others have none.

A capture shows a function in one world: every expert has rows, more than one, and no two equally many.  What Python
decides on data (`if mask.any()`, `if count == 0`, a loop over the chosen experts) could go another way in another
world.  So the function is captured again in a few of them, chosen such that for any two experts there is one in which
the first has rows and the second has none: each time exactly the experts that have rows must add what they added
before, to the same start, with the same computation around the sum.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from moe_compile.captured import NAME, SYMBOLIC, Capture
from moe_compile.detect import dense
from moe_compile.detect.by_column import column_of, table_of
from moe_compile.detect.dense_values import DenseSum
from moe_compile.detect.facts import Facts
from moe_compile.detect.ids import table_of as table_of_ids
from moe_compile.detect.interpreter import Interpreter
from moe_compile.detect.nodes import is_random
from moe_compile.detect.selection import choose
from moe_compile.detect.sorted_values import Counts, Filled, PairGrid, Pieces
from moe_compile.detect.sum_values import Buffer, ListSum, Sum, SumRead
from moe_compile.detect.values import (
    Constant,
    Each,
    Emptiness,
    Expert,
    Hits,
    Index,
    Plain,
    Rows,
    Selection,
    Unknown,
    Value,
)
from moe_compile.errors import Refusal
from moe_compile.loop_state import OneByOne
from moe_compile.passes.detect_experts import rules
from moe_compile.region import Expr, Leaf
from moe_compile.series import series_of
from moe_compile.visit_checks import check_visits
from moe_compile.visits import Visit

World = frozenset[int]
FEW = 3  # experts at either end that have rows in a world, where there are many


@dataclass
class Survey:
    """What a capture computes, spelled alike in all captures of one function."""

    sums: int = 0
    start: str = ""
    around: list[str] = field(default_factory=list)  # outputs, lasting changes, random numbers; one name for the sum
    without: list[str] = field(default_factory=list)  # the same with the start in the place of the sum
    terms: dict[int, str] = field(default_factory=dict)  # by expert
    ids: set[str] = field(default_factory=set)
    questions: dict[Hashable, tuple[str, Expert]] = field(default_factory=dict)  # kind and expert
    unclear: str | None = None  # a question that is not shown to be about experts
    num_classes: int = 0
    covered: bool = False  # some expert has rows: there are pairs, and ids of no expert are an error
    local: bool = True  # between two additions, Python asks about the expert of the second only


def check(
    expected: Survey,
    main: Capture,
    distinct: Iterable[int],
    again: Callable[..., Capture],
    experts: Sequence[int] | None = None,
) -> None:
    """Refuse a function that does anything else in another world.  `again(script=..., rows=...)` captures it there.

    `experts`: those that have rows in any of them, if not all.
    """
    if expected.sums != 1 or len(expected.ids) != 1:
        raise Refusal("what Python decides on is not shown to be about one sum over experts")
    if expected.unclear is not None:
        raise Refusal(f"Python asks about {expected.unclear}, not shown to say which experts were chosen")
    number = expected.num_classes if main.classes is None else main.classes
    few = FEW if expected.local else number
    experts = range(number) if experts is None else experts
    for world in worlds(experts, few):
        if expected.covered and not world:
            continue
        found = survey(again(script=_script(expected, world)), distinct, expected.ids)
        _compare(expected, found, world, "some experts have no rows")
    if main.classes is not None:
        _check_failure(expected, main, distinct, again, few)
    if main.sees_rows:
        found = survey(again(rows=1), distinct, expected.ids)
        _compare(expected, found, frozenset(experts), "an expert has one row")
    if not expected.local:
        raise Refusal("Python asks about an expert elsewhere than before its rows are added: others may see the answer")


def check_sample(together: Survey, apart: Survey, experts: Sequence[int]) -> None:
    """Refuse a function that does anything else when these experts alone are visited, one after the other."""
    if together.unclear is not None:
        raise Refusal(f"Python asks about {together.unclear}, not shown to say which experts were chosen")
    if (together.sums, together.ids) != (apart.sums, apart.ids):
        raise Refusal("the sum differs when its experts are visited one by one")
    _compare(together, apart, frozenset(experts), "its experts are visited one by one")


def sample(visits: Sequence[Visit], few: int = FEW) -> list[int]:
    """Experts to visit one by one: the first and the last ones, of all and of each class that was visited at once."""
    numbers = sorted(n for visit in visits for n in visit.numbers)
    ends = [n for visit in visits for n in (min(visit.numbers), max(visit.numbers))]
    return sorted({*numbers[:few], *numbers[-few:], *ends})


def _check_failure(
    expected: Survey, main: Capture, distinct: Iterable[int], again: Callable[..., Capture], few: int
) -> None:
    """Refuse a function whose visit to the last class is an error only in the world that was captured."""
    last = main.classes
    assert last is not None

    def fails(**where: Any) -> Capture:
        found = again(classes=None, selections=2 * main.selections, may_fail=True, **where)
        if found.fails_at != last or set(found.guards()) - set(main.guards()):
            raise Refusal(f"class {last} of {last + 1} is not shown to be an error in all cases")
        return found

    seen = survey(fails(rows=SYMBOLIC), distinct, expected.ids)  # with a symbol nothing rests on how many rows it has
    if seen.unclear is not None:
        raise Refusal(f"Python asks about {seen.unclear}, not shown to say which experts were chosen")
    fails(rows=1)
    for world in worlds(range(last), few):
        fails(rows=SYMBOLIC, script=_script(seen, world | {last}))


def worlds(experts: Sequence[int], few: int) -> Iterator[World]:
    """Sets of experts that have rows: none, and for any two experts one with the first and without the second.

    Only the `few` first and last experts have rows in any of them.  That is enough where every question stands beside
    the addition that it guards (`Survey.local`) and iterations tell each other nothing (`check_loops`): then this is
    the second look, and a world has to cost little.
    """
    if len(experts) > 2 * few:
        experts = [*experts[:few], *experts[-few:]]
    yield frozenset()
    width = next(w for w in itertools.count(1) if math.comb(w, w // 2) >= len(experts))
    codes = dict(zip(experts, itertools.combinations(range(width), width // 2), strict=False))
    for place in range(width):
        yield frozenset(e for e, code in codes.items() if place in code)


def _script(expected: Survey, world: World) -> dict[Hashable, Any]:
    answers: dict[Hashable, Any] = {}
    places = itertools.count()
    for question, (kind, expert) in expected.questions.items():
        chosen, place = expert in world, next(places) if kind in ("rows", "list") else None
        answers[question] = {
            "any": chosen, "none": not chosen, "rows": place if chosen else None, "each": sorted(world),
            "list": place if world else None, "length": max(world, default=-1) + 1,
        }[kind]  # fmt: skip
    return answers


def _compare(expected: Survey, found: Survey, world: World, when: str) -> None:
    for e, term in expected.terms.items():
        if e in world and found.terms.get(e) != term:
            what = "something else" if e in found.terms else "nothing"
            raise Refusal(f"expert {e} adds {what} when {when}")
    if found.sums > 1 or (found.sums and found.start != expected.start):
        raise Refusal(f"the sum starts from something else when {when}")
    if found.around != (expected.around if found.sums else expected.without):
        raise Refusal(f"what surrounds the sum differs when {when}")


# -- one capture ----------------------------------------------------------------------------


def survey(found: Capture, distinct: Iterable[int], ids: set[str] | None = None) -> Survey:
    """Read a captured graph without changing it.  Nothing is refused here.  `ids`: those it is about, if known."""
    inputs = found.gm.graph.find_nodes(op="placeholder")
    facts = Facts(
        frozenset(inputs[i] for i in distinct),
        found.constants,
        torch.is_grad_enabled(),
        may_guard=True,
        visits=found.each(),
        empty=found.empty,
        answered=dict(found.answered),
        tables=found.tables,
        sizes=found.sizes,
    )
    run = Interpreter(found.gm.graph, rules(), facts)
    totals: list[tuple[Node, Sum]] = []

    def record(run: Interpreter, node: Node, total: Sum | DenseSum | ListSum) -> Value:
        if isinstance(total, ListSum):  # who decides on data does not know its lists
            return Plain(node)
        if isinstance(total, DenseSum):
            gathered = dense.gather(run, node, total)
            if isinstance(gathered, Unknown):
                return gathered
            total = gathered
        totals.append((node, total))
        return Plain(node)

    run.run(record)
    check_visits(found.gm.graph, run.values | dict(totals), found.visits)
    result, spell = Survey(sums=len(totals), ids=set(ids or ())), _Speller(found)
    few = set(sample(found.visits)) if found.visits else None
    units = _Units(run, totals, spell, result.ids)
    for site, total in totals:
        own = total.start.node is site  # zeros that the sum itself starts from
        result.start = f"zeros like {site.meta['val']}" if own else spell.node(total.start.node)
        how_added = " set" if total.start.kind == "kept" else ""
        for term in total.terms:
            e, chosen = term.selection.expert, term.selection
            if e is None or chosen.ids is None:
                continue
            result.ids.add(units.ids(chosen.ids))
            said = {n: spell.expr(term.expr, n) for n in _numbers(e) if few is None or n in few}
            for n in _numbers(e):
                how = f"{chosen.classes} {chosen.per} {term.dim}{how_added} {said.get(n, 'not visited alone')}"
                unit = units.number(chosen.ids, n)
                result.terms[unit] = f"{result.terms.get(unit, '')} {how}"
    result.num_classes = max(result.terms, default=-1) + 1
    all_terms = [term.selection for _, total in totals for term in total.terms]
    result.covered = bool(all_terms) and all(
        s.order is not None and s.classes == result.num_classes and s.ids is not None
        and statically_known_true(s.ids.meta["val"].numel() > 0) for s in all_terms
    )  # fmt: skip
    about: dict[Node, set[Expert]] = {}
    for (kind, key), node in found.questions.items():
        meaning = _meaning(kind, run.values[node])
        if meaning is None or units.ids(meaning[2]) not in result.ids:
            result.unclear = result.unclear or node.name
            continue
        meaning = (meaning[0], units.number(meaning[2], meaning[1]), meaning[2])
        result.questions[kind, key] = meaning[:2]
        if meaning[0] not in ("each", "list", "length"):
            about.setdefault(node, set()).add(meaning[1])
        result.num_classes = max(result.num_classes, *(n + 1 for n in _numbers(meaning[1])))
    additions = {n: v for n, v in run.values.items() if isinstance(v, Sum)} | dict(totals)
    beside = {n: units.of(v.terms[-1].selection) for n, v in additions.items()}
    if len(beside) == 1 < len(result.terms):  # rows that were sliced, and joined before they were added
        beside = {n: s.expert for n, v in run.values.items() if (s := sliced(v)) is not None}
    result.local = _local(found.gm.graph, about, beside)
    ends = [n for n in found.gm.graph.output_node().all_input_nodes]
    inner = {
        n
        for n, v in run.values.items()
        if isinstance(v, Buffer | Constant | Rows | PairGrid | Pieces | Filled | Sum | SumRead)
    }
    inner |= {n for n, _ in totals}
    ends += [n for n in found.gm.graph.nodes if (n not in inner and _changes(n)) or is_random(n)]
    nothing = {n: spell.node(v.node) for n, v in run.values.items() if isinstance(v, Buffer)}
    for into, name in ((result.around, None), (result.without, result.start)):
        around = _Speller(found, nothing | {site: name or "the sum" for site, _ in totals})
        into += [around.node(n) for n in ends]
    run.erase_ids()
    return result


class _Units:
    """What may have rows: experts; where each column of the ids has terms of its own, each expert of each column."""

    def __init__(
        self, run: Interpreter, totals: list[tuple[Node, Sum]], spell: "_Speller", known: Iterable[str]
    ) -> None:
        """`known`: what `ids` gave for another capture of the function."""
        self.run, self.spell = run, spell
        tables = [table for _, total in totals if (table := table_of(run, total)) is not None]
        self.tables = {f"columns of {spell.node(table)}" for table in tables} | set(known)

    def _column(self, ids: Node) -> tuple[Node, int, int] | None:
        found = column_of(self.run, ids)
        return found if found is not None and f"columns of {self.spell.node(found[0])}" in self.tables else None

    def ids(self, ids: Node) -> str:
        column = self._column(ids)
        return f"columns of {self.spell.node(column[0])}" if column else self.spell.node(table_of_ids(self.run, ids))

    def number(self, ids: Node, expert: Any) -> Any:
        """The expert's own number, or one for it and its column."""
        column = self._column(ids)
        if column is None:
            return expert
        if not isinstance(expert, int):
            raise OneByOne("experts are visited together column by column of their ids")
        return expert * column[2] + column[1]

    def of(self, selection: Selection) -> Any:
        expert = selection.expert
        return expert if expert is None or selection.ids is None else self.number(selection.ids, expert)


def sliced(value: Value) -> Selection | None:
    """The selection, if it is that of one expert among sorted rows."""
    chosen = value.selection if isinstance(value, Rows | Index) else None
    return chosen if chosen is not None and chosen.expert is not None and chosen.order is not None else None


def _numbers(expert: Expert) -> tuple[int, ...]:
    return expert.numbers if isinstance(expert, Each) else (expert,)


def _local(graph: Graph, about: dict[Node, set[Expert]], additions: Mapping[Node, Expert | None]) -> bool:
    """Whether each question is about the expert whose rows are added next."""
    asked: set[Any] = set()
    for node in graph.nodes:
        asked |= about.get(node, set())
        if node in additions:
            if asked - {additions[node]}:
                return False
            asked = set()
    return not asked


def _changes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _meaning(kind: str, value: Value) -> tuple[str, Expert, Node] | None:
    """(what is asked, of which expert, of which ids); for a list of experts, its last possible member."""
    hits = choose(value) if kind == "each" else value
    if isinstance(hits, Hits):
        return ("each" if kind == "each" else "list"), (hits.classes or 0) - 1, hits.ids
    if kind == "length" and isinstance(value, Counts) and not value.ends:
        return "length", value.num - 1, value.ids
    if kind == "truth" and isinstance(value, Emptiness) and value.kind in ("any", "none"):
        return value.kind, value.expert, value.ids
    if kind == "count" and isinstance(value, Emptiness) and value.kind == "count":
        return "rows", value.expert, value.ids
    if kind == "rows" and isinstance(value, Index) and value.selection.ids is not None:
        expert = value.selection.expert
        return None if expert is None else ("rows", expert, value.selection.ids)
    return None


class _Speller:
    """How values are computed, as digests: equal in two captures if they compute the same."""

    def __init__(self, found: Capture, known: dict[Node, str] | None = None) -> None:
        self.constants = found.constants
        self.known: dict[Any, str] = dict(known or {})
        self.grad = _grad_modes(found.gm.graph)

    def node(self, node: Node) -> str:
        for n in _missing(node, self.known):
            if n.op == "get_attr":
                literal = self.constants.get(str(n.target))
                parts: Any = str(literal.tolist()) if literal is not None else n.target
            elif n.op == "placeholder":
                self.known[n] = _input(n.meta[NAME])
                continue
            else:
                parts = (self.grad[n], *map_arg((n.args, n.kwargs), lambda m: self.known[m]))
            self.known[n] = _digest(n.op, str(n.target) if n.op == "call_function" else "", parts)
        return self.known[node]

    def expr(self, expr: Expr, number: int) -> str:
        """The value as it is for an expert."""
        if (id(expr), number) not in self.known:
            if isinstance(expr, Leaf):
                series = series_of(expr.node.args[0]) if expr.role == "picked" else None
                spelled = self.node(expr.node) if series is None else _input(series.names[number])
                parts: Any = (expr.role if series is None else "outer", spelled)
            else:
                parts = (str(expr.target), self._parts(expr.args, number), self._parts(expr.kwargs, number))
            self.known[id(expr), number] = _digest("expr", parts)
        return self.known[id(expr), number]

    def _parts(self, arg: Any, number: int) -> Any:
        if isinstance(arg, (tuple, list)):
            return [self._parts(a, number) for a in arg]
        return self.expr(arg, number) if isinstance(arg, Expr) else (type(arg).__name__, arg)


def _missing(node: Node, known: dict[Any, str]) -> list[Node]:
    """The nodes that a value rests on, inputs first, without those that are known."""
    order: list[Node] = []
    todo = [(node, False)]
    seen: set[Node] = set()
    while todo:
        n, ready = todo.pop()
        if ready:
            order.append(n)
        elif n not in known and n not in seen:
            seen.add(n)
            todo.append((n, True))
            todo += [(m, False) for m in n.all_input_nodes]
    return order


def _grad_modes(graph: Graph) -> dict[Node, bool | None]:
    mode: Any = None
    found = {}
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            mode = node.args[0]
        found[node] = mode
    return found


def _input(name: str) -> str:
    return _digest("placeholder", name)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
