"""One visit for many experts: where it is taken, why not elsewhere, and what it costs."""

import logging

import pytest
import torch

from moe_compile.analysis import analyse
from moe_compile.arguments import Known
from moe_compile.capture import capture
from moe_compile.errors import Refusal
from moe_compile.loop_state import dead_locals
from moe_compile.python_state import reachable
from tests.detect import loops, mutants_index, mutants_wrappers  # noqa: F401
from tests.detect.loops import IDIOMS, MUTANTS, arguments, forward_of
from tests.detect.mutants_index import ONE_BY_ONE
from tests.detect.test_refused import text
from tests.tiny import Experts, routed


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_visits(name: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    case = IDIOMS.get(name) or MUTANTS[name]
    module = case.make()
    with caplog.at_level(logging.DEBUG, "moe_compile.analysis"):
        try:
            analyse(forward_of(module), module, list(arguments(case)), {}, Known((1,)))
        except Refusal:
            assert name in MUTANTS
    said = [text(r.getMessage().partition(": ")[2]) for r in caplog.records if "expert by expert" in r.getMessage()]
    why = ONE_BY_ONE[name]
    assert [reason[: len(why or "")] for reason in said] == ([] if why is None else [why])


def test_the_graph_does_not_grow_with_experts() -> None:
    fn, sizes = Experts.forward, set()
    for num_experts in (8, 64):
        module = Experts(num_experts)
        found = capture(fn, module, routed(num_experts=num_experts), {}, visit=reachable(fn, module))  # type: ignore[arg-type]
        assert [v.numbers for v in found.visits] == [list(range(num_experts))]
        sizes.add(len(found.gm.graph.nodes))
    assert len(sizes) == 1


def test_experts_that_answer_otherwise_have_a_visit_of_their_own() -> None:
    module = mutants_index.AsksWithoutEffect()
    fn = mutants_index.Simple.forward
    found = capture(fn, module, loops.routed(), {}, visit=reachable(fn, module))  # type: ignore[arg-type]
    assert [v.numbers for v in found.visits] == [[0, 3], [1], [2]]


def carried(n: int) -> int:
    total = last = 0
    for i in range(n):
        square = i * i
        early = square if i > 1 else 0
        for j in range(2):
            total = total + j
        with torch.no_grad():
            inside = early
        late = last + inside
        last = late
    return total


def test_locals_that_no_iteration_leaves_to_another() -> None:
    import dis

    head = next(s.offset for s in dis.get_instructions(carried) if s.opname == "FOR_ITER")
    assert dead_locals(carried.__code__, head) == {"n", "i", "square", "early", "j", "late"}  # a `with` may end early
