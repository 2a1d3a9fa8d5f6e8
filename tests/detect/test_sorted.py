"""The grouped and batched forms: in float64, with ids that repeat, and with sizes that happen to be equal."""

import copy
from collections.abc import Iterator

import pytest
import torch

from tests.detect import idioms_sorted, mutants_sorted  # noqa: F401
from tests.detect.idioms_sorted import HAS_TRANSFORMERS
from tests.detect.loops import FF, IDIOMS, MUTANTS, D, E, K, Proof, T, arguments, differences, outcome
from tests.detect.test_rewritten import StaticProof, check
from tests.tiny import compiled, regions

NAMES = [name for name, case in IDIOMS.items() if case.make.__module__ == idioms_sorted.__name__]
FORMS = ["SortedByBmm", "AddedToTokens", "BatchedAsHuggingFace", "BatchedWithBias"]
FORMS += ["GroupedByProducts", "GroupedAsHuggingFace"] if HAS_TRANSFORMERS else []


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.mark.parametrize("name", NAMES)
def test_float64(name: str) -> None:
    case = IDIOMS[name]
    check(case.make(), case, torch.float64, 1e-12)


@pytest.mark.parametrize("name", FORMS)
def test_ids_that_repeat_in_a_row(name: str) -> None:
    module = IDIOMS[name].make().double()
    x, ids, weights = arguments(IDIOMS[name], dtype=torch.float64)
    run = Proof(module, (x, ids, weights), False)
    args = x, ids[:, :1].expand_as(ids).contiguous(), weights
    assert not differences(outcome(run, module, args), outcome(module, module, args), 1e-12)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("bad", [E, -E - 1])
def test_ids_out_of_range_raise(name: str, bad: int) -> None:
    """Where the original raises, and where it reads memory that no product has set."""
    module = IDIOMS[name].make()
    x, ids, weights = arguments(IDIOMS[name])
    run = Proof(module, (x, ids, weights), True)
    with pytest.raises(RuntimeError, match="expert ids run from"):
        run(x, torch.where(ids == 1, bad, ids), weights)


@pytest.mark.parametrize("name", ["BatchedClamped", "BatchedClampedToFewer", *(["SentinelsMasked"] * HAS_TRANSFORMERS)])
def test_ids_past_the_experts_do_what_they_did(name: str) -> None:
    module = IDIOMS[name].make().double()
    x, ids, weights = arguments(IDIOMS[name], dtype=torch.float64)
    run = Proof(module, (x, ids, weights), True)
    for bad in (E, E + 3, *([] if name == "SentinelsMasked" else [-1, -E - 5])):
        args = x, torch.where(ids == 1, bad, ids), weights
        assert not differences(outcome(run, module, args), outcome(module, module, args), 1e-12), bad


@pytest.mark.parametrize("name", ["BatchedAsHuggingFace", "BatchedWithBias", "SortedByBmm"])
def test_an_index_counts_from_the_end_if_it_is_negative(name: str) -> None:
    module = IDIOMS[name].make().double()
    x, ids, weights = arguments(IDIOMS[name], dtype=torch.float64)
    run = Proof(module, (x, ids, weights), True)
    args = x, torch.where(ids == 1, -2, ids), weights
    assert not differences(outcome(run, module, args), outcome(module, module, args), 1e-12)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("tokens", [K, D // K, E, FF // K, D, FF])
def test_sizes_that_happen_to_be_equal(name: str, tokens: int) -> None:
    """T is a constant of the trace here: T or R is K, E, D or FF."""
    module, args = IDIOMS[name].make().double(), arguments(IDIOMS[name], tokens=tokens, dtype=torch.float64)
    run = StaticProof(module, args)
    assert not differences(outcome(run, module, args), outcome(module, module, args), 1e-12)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", FORMS)
def test_any_number_of_tokens_when_compiled(name: str) -> None:
    """First with as many tokens as a token has experts; from the second length on, the length is a symbol."""
    case = IDIOMS[name]
    module = case.make().double()
    original, run = copy.deepcopy(module), compiled(module)
    with regions() as found:
        for tokens in (K, T, D, 1, 3):
            args = arguments(case, tokens, tokens, dtype=torch.float64)
            assert not differences(outcome(run, module, args), outcome(original, original, args), 1e-12), tokens
    assert found and all(region.matched for region in found), [region.reason for region in found]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", ["SumOverTokensAsManyAsExperts", "BatchedTiledAsManyTokens", "SumOfNeighbours"])
def test_mutants_with_other_numbers_of_tokens(name: str) -> None:
    case = MUTANTS[name]
    module = case.make().double()
    original, run = copy.deepcopy(module), compiled(module)
    for tokens in (K, 4 * K, case.tokens):
        args = arguments(case, tokens, tokens, dtype=torch.float64)
        assert not differences(outcome(run, module, args), outcome(original, original, args), 1e-12), tokens
