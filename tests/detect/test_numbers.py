"""One visit for many experts of a loop over numbers or modules: where it is taken, and that nothing is lost by it."""

import logging

import pytest
import torch

from moe_compile import numbers
from moe_compile.analysis import analyse
from moe_compile.arguments import Known
from moe_compile.capture import capture
from moe_compile.errors import Refusal
from moe_compile.python_state import reachable
from tests.detect import loops, test_refused, test_rewritten
from tests.detect.loops import arguments, forward_of
from tests.detect.mutants_numbers import BY_NUMBER, IDIOMS, MUTANTS
from tests.detect.test_refused import text
from tests.tiny import Separate, routed


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops over two experts are long enough."""
    monkeypatch.setattr(numbers, "FEW", 2)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", BY_NUMBER)
def test_visits(name: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    case, taken = IDIOMS.get(name) or MUTANTS[name], False
    module = case.make()
    with caplog.at_level(logging.DEBUG, "moe_compile.analysis"):
        try:
            found = analyse(forward_of(module), module, list(arguments(case)), {}, Known((1,)))
            taken = found.capture.by_number
            assert name in IDIOMS
        except Refusal as refusal:
            assert name in MUTANTS and text(str(refusal)) == MUTANTS[name].reason
    said = [text(r.getMessage().partition(": ")[2]) for r in caplog.records if "expert by expert" in r.getMessage()]
    why = BY_NUMBER[name]
    assert taken is (why is None)
    assert [reason[: len(why or "")] for reason in said] == ([why] if why else [])


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", [n for n in IDIOMS if BY_NUMBER[n] is None])
def test_numbers(name: str) -> None:
    test_rewritten.check(IDIOMS[name].make(), IDIOMS[name], cases=[(11, "even"), (11, "unchosen"), (1, "even")])


SAMPLE = """
    RangeWhere EnumerateWhere OldMixtral TokenMaskIfAny SkipIfNotAny IfRows SwitchAssign Columns Permuted
    ScaledByMean Shared SomeFrozen SharedExpertFirst LastPassesOn
""".split()


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", SAMPLE)
def test_idioms_of_few(name: str) -> None:
    """The idioms of all files: the whole corpus was compared when this was written."""
    test_rewritten.check(loops.IDIOMS[name].make(), loops.IDIOMS[name], cases=[(11, "even")])


WRONG = """
    IfAnyOfAnother NextExpertRuns OnlyLargeGroups RowsOfAnother HowManyAreActive EarlyReturn BreaksAtTheLast
    LeaksRows NextExpert KeepsInDefault TwoInTheMiddle RepeatedIdsByToken
""".split()


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", WRONG)
def test_mutants_of_few(name: str) -> None:
    test_refused.test_reason(name)


def test_the_graph_does_not_grow_with_modules() -> None:
    fn, sizes = Separate.forward, set()
    for num_experts in (8, 64):
        module = Separate(num_experts=num_experts)
        found = capture(fn, module, routed(num_experts=num_experts), {}, visit=reachable(fn, module))  # type: ignore[arg-type]
        assert [v.numbers for v in found.visits] == [list(range(num_experts))]
        assert [len(names) for names in found.state if isinstance(names, tuple)] == [num_experts] * 4
        sizes.add(len(found.gm.graph.nodes) - 200)
        sizes.add(len(found.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)))
        sizes.add(len([n for n in found.gm.graph.nodes if n.op == "call_function"]) - 100)
    assert len(sizes) == 3


def test_short_loops_are_traced_one_by_one() -> None:
    fn, module = Separate.forward, Separate(num_experts=4)
    found = capture(fn, module, routed(num_experts=4), {}, visit=reachable(fn, module))  # type: ignore[arg-type]
    assert not found.visits and not found.by_number
