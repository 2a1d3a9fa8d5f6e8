"""Mutants that must not be rewritten: each is refused for its reason, and compiled it gives its own numbers.

A refusal leaves a module as it is, whatever the reason: by default a sixth of the mutants are compiled, and those that
only compiling shows to be refused; `--all-mutants` compiles all of them.
"""

import copy
import random
import re

import pytest
import torch

from moe_compile.analysis import analyse
from moe_compile.errors import Refusal
from tests.detect import (  # noqa: F401
    mutants_bodies,
    mutants_capacity,
    mutants_choice,
    mutants_columns,
    mutants_conditions,
    mutants_counted,
    mutants_counts,
    mutants_crossed,
    mutants_decisions,
    mutants_dense,
    mutants_every,
    mutants_families,
    mutants_forms,
    mutants_grids,
    mutants_groups,
    mutants_gshard,
    mutants_helpers,
    mutants_index,
    mutants_layout,
    mutants_listings,
    mutants_lists,
    mutants_marks,
    mutants_masks,
    mutants_offsets,
    mutants_outside,
    mutants_pairs,
    mutants_picked,
    mutants_picked_columns,
    mutants_places,
    mutants_rows,
    mutants_slot_flat,
    mutants_slot_rows,
    mutants_slots,
    mutants_sorted,
    mutants_wrappers,
)
from tests.detect.loops import MUTANTS, arguments, differences, forward_of, known, outcome
from tests.detect.mutants_iterations import SEEN
from tests.tiny import compiled, regions


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_numbers_when_compiled:
        sixth = [n for i, n in enumerate(MUTANTS) if MUTANTS[n].late or i % 6 == 0]
        metafunc.parametrize("name", MUTANTS if metafunc.config.getoption("--all-mutants") else sixth)


@pytest.mark.parametrize("name", [n for n, case in MUTANTS.items() if not case.late])
def test_reason(name: str) -> None:
    case = MUTANTS[name]
    torch.manual_seed(0)
    module = case.make()
    with pytest.raises(Refusal) as refusal:
        analyse(forward_of(module), module, list(arguments(case)), {}, known(case.distinct))
    assert text(str(refusal.value)) == case.reason


@pytest.mark.usefixtures("fresh")
def test_numbers_when_compiled(name: str) -> None:
    case = MUTANTS[name]
    module = case.make()
    original, args = copy.deepcopy(module), arguments(case)
    if case.late:
        with regions() as found:
            outcome(compiled(module), module, args, backward=not case.forward_only)
        assert [text(r.reason) for r in found] == [case.reason]
    args = arguments(case, 1, routing="unchosen")
    results = []
    for run, owner in ((compiled(module), module), (original, original)):
        torch.manual_seed(0)
        random.seed(0)
        SEEN.clear()
        results.append(outcome(run, owner, args, backward=not case.forward_only))
    assert not differences(*results, 1e-5)


@pytest.mark.usefixtures("fresh")
def test_autocast_switched_off_for_the_experts() -> None:
    case = MUTANTS["NoAutocastInside"]
    module, args = case.make(), arguments(case)
    original = copy.deepcopy(module)
    with torch.autocast("cpu", torch.bfloat16):
        assert not differences(outcome(compiled(module), module, args), outcome(original, original, args), 1e-5)


def text(reason: str | None) -> str:
    """Without names of files, line numbers, random numbers and the names that sympy gave."""
    reason = re.sub(r"\d\.\d{6,}", "#", reason or "")
    return re.sub(r"\bs\d+\b", "r", re.sub(r"\w+\.py(:\d+)?", "file.py", reason))
