"""Idioms that are proven and rewritten: outputs, buffers and all gradients are those of the unmodified function."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from moe_compile.errors import Refusal
from tests.detect import (  # noqa: F401  their idioms
    idioms_capacity,
    idioms_choice,
    idioms_columns,
    idioms_conditions,
    idioms_counts,
    idioms_crossed,
    idioms_dense,
    idioms_every,
    idioms_forms,
    idioms_grids,
    idioms_groups,
    idioms_gshard,
    idioms_helpers,
    idioms_listings,
    idioms_lists,
    idioms_marks,
    idioms_masks,
    idioms_pairs,
    idioms_picked,
    idioms_picked_columns,
    idioms_places,
    idioms_slot_flat,
    idioms_slot_rows,
    idioms_slots,
    idioms_sorted,
    mutants_families,
    mutants_index,
    mutants_layout,
    mutants_wrappers,
)
from tests.detect.idioms import EXPERTS
from tests.detect.loops import (
    IDIOMS,
    D,
    E,
    Idiom,
    Listed,
    Proof,
    Stacked,
    T,
    arguments,
    differences,
    outcome,
    routed,
)

CASES = [(1, "even"), (2, "even"), (T, "even"), (T, "skewed"), (T, "unchosen"), (3 * T, "even"), (D, "even")]


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def check(
    module: nn.Module, case: Idiom, dtype: torch.dtype = torch.float32, rtol: float = 1e-5, cases: Any = CASES
) -> Proof:
    module.to(dtype)
    run = Proof(module, arguments(case, dtype=dtype), case.distinct)
    for tokens, routing in cases:
        args = arguments(case, tokens, tokens, routing, dtype)
        got, want = (outcome(call, module, args, not case.forward_only) for call in (run, module))
        assert not differences(got, want, rtol), (tokens, routing)
    return run


@pytest.mark.parametrize("name", IDIOMS)
def test_idiom(name: str) -> None:
    case = IDIOMS[name]
    check(case.make(), case)


@pytest.mark.parametrize("name", IDIOMS)
def test_idiom_without_tokens(name: str) -> None:
    case = IDIOMS[name]
    module, args = case.make(), arguments(case, tokens=0)
    if not case.empty:
        with pytest.raises(Refusal):
            StaticProof(module, args)
        return
    got = outcome(Proof(module, args, case.distinct), module, args, not case.forward_only)
    try:
        want = outcome(module, module, args, not case.forward_only)
    except RuntimeError:  # the program itself takes no empty batch: it joins no pieces
        assert got["output 0"] is not None and not got["output 0"].numel()
        return
    assert not differences(got, want, 1e-5)


@pytest.mark.parametrize("name", [n for n in IDIOMS if n.startswith("GShard")])
def test_slots_are_gone(name: str) -> None:
    """Experts read tokens, not slots."""
    case = IDIOMS[name]
    run = Proof(case.make(), arguments(case), case.distinct)
    (rows,) = run.gm.graph.find_nodes(op="call_function", target=torch.ops.moe_ep.dispatch.default)
    assert rows.args[0].name == "x"


@pytest.mark.parametrize("name", EXPERTS)
def test_expert(name: str) -> None:
    check(Listed(EXPERTS[name]), IDIOMS["RangeWhere"])


@pytest.mark.parametrize(
    "name", ["RangeWhere", "ChosenOnly", "TokenMaskIfAny", "Transposed", "Columns", "SharedExpertFirst"]
)
def test_float64(name: str) -> None:
    case = IDIOMS[name]
    check(case.make(), case, torch.float64, 1e-13)


@pytest.mark.parametrize("name", ["RangeWhere", "ChosenOnly", "TokenMaskIfAny", "Transposed", "SharedExpertFirst"])
def test_bfloat16(name: str) -> None:
    """Against the same function in float64: no further away than the original is, but for one rounding."""
    case = IDIOMS[name]
    module = case.make().bfloat16()
    args = arguments(case, 5, dtype=torch.bfloat16)
    got = outcome(Proof(module, args, case.distinct), module, args)
    rough = outcome(module, module, args)
    exact = outcome(module.double(), module, tuple(a.double() if a.is_floating_point() else a for a in args))
    for key, value in exact.items():
        if value is None:
            continue
        mine, theirs = got[key], rough[key]
        assert mine is not None and theirs is not None and mine.dtype == torch.bfloat16
        error, allowed = ((v.double() - value).norm() / value.norm() for v in (mine, theirs))
        assert error <= 1.5 * allowed + 2**-8, (key, error, allowed)


@pytest.mark.parametrize("name", ["RangeWhere", "Transposed", "TokenMask"])
def test_autocast(name: str) -> None:
    case = IDIOMS[name]
    module, args = case.make(), arguments(case)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            want = outcome(module, module, args)
        except RuntimeError:
            pytest.skip("the original does not run under autocast")
        got = outcome(Proof(module, args, case.distinct), module, args)
    assert {k: v.dtype for k, v in got.items() if v is not None} == {
        k: v.dtype for k, v in want.items() if v is not None
    }
    assert not differences(got, want, 2e-2)


@pytest.mark.parametrize("name", [n for n, case in IDIOMS.items() if case.any_ids])
def test_ids_out_of_range_add_nothing(name: str) -> None:
    case = IDIOMS[name]
    if name == "OtherIds":
        pytest.skip("no id is out of range")
    module = case.make()
    x, ids, weights = arguments(case)
    run = Proof(module, (x, ids, weights), case.distinct)
    for bad in (-1, E, 10**6):
        wrong = torch.where(ids == 1, bad, ids)
        assert not differences(
            outcome(run, module, (x, wrong, weights)), outcome(module, module, (x, wrong, weights)), 1e-5
        )


@pytest.mark.parametrize(
    "name",
    ["PickedWeights", "PickedWithBias", "PickedTransposed", "PickedByColumn", "PickedByVector", "PickedMatmulRows"],
)
def test_ids_from_the_end(name: str) -> None:
    """w[ids] counts negative ids from the end, and raises for others."""
    case = IDIOMS[name]
    module = case.make()
    x, ids, weights = arguments(case)
    run = Proof(module, (x, ids, weights), case.distinct)
    for wrong in (ids - E, torch.where(ids == 1, -1, ids), torch.where(ids > 1, ids - E, ids)):
        args = (x, wrong, weights)
        assert not differences(outcome(run, module, args), outcome(module, module, args), 1e-5)
    for bad in (E, -E - 1):
        wrong = torch.where(ids == 2, bad, ids)
        for call in (module, run):
            with pytest.raises((RuntimeError, IndexError)):
                call(x, wrong, weights)


@pytest.mark.parametrize("name", ["ChosenOnly", "OldMixtral"])
@pytest.mark.parametrize("bad", [-1, E])
def test_ids_out_of_range_raise(name: str, bad: int) -> None:
    case = IDIOMS[name]
    module = case.make()
    x, ids, weights = arguments(case)
    run = Proof(module, (x, ids, weights), case.distinct)
    wrong = torch.where(ids == 1, bad, ids)
    with pytest.raises(RuntimeError):
        module(x, wrong, weights)
    with pytest.raises(RuntimeError):
        run(x, wrong, weights)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_dtypes_of_ids(dtype: torch.dtype) -> None:
    module = Listed()
    x, ids, weights = routed()
    run = Proof(module, (x, ids.to(dtype), weights), False)
    assert not differences(
        outcome(run, module, (x, ids.to(dtype), weights)), outcome(module, module, (x, ids, weights)), 1e-5
    )


def test_ids_that_repeat_in_a_row() -> None:
    """index_add_ adds for every pair: no topk is needed."""
    module = Listed()
    x, ids, weights = routed()
    ids[:, 1] = ids[:, 0]
    run = Proof(module, (x, ids, weights), False)
    assert not differences(outcome(run, module, (x, ids, weights)), outcome(module, module, (x, ids, weights)), 1e-5)


def test_more_experts_than_rows() -> None:
    module = Listed(num_experts=40)
    args = routed(num_experts=40)
    run = Proof(module, args, False)
    args = routed(tokens=3, num_experts=40)
    assert not differences(outcome(run, module, args), outcome(module, module, args), 1e-5)


@pytest.mark.parametrize("tokens", [D, 2 * Listed().experts[0].up.out_features, E, 2])
def test_sizes_that_happen_to_be_equal(tokens: int) -> None:
    """T is a constant of the trace here, equal to D, K * F, E or K."""
    for make in (Listed, IDIOMS["TokenMask"].make, IDIOMS["Transposed"].make):
        module, args = make(), routed(tokens=tokens)
        found = StaticProof(module, args)
        assert not differences(outcome(found, module, args), outcome(module, module, args), 1e-5)


class StaticProof(Proof):
    """With the number of tokens as a constant."""

    def __init__(self, module: nn.Module, args: Any) -> None:
        import tests.detect.loops as loops

        kept: Callable[..., Any] = loops.any_length
        loops.any_length = list  # type: ignore[assignment]
        try:
            super().__init__(module, args, True)
        finally:
            loops.any_length = kept  # type: ignore[assignment]


def test_second_backward() -> None:
    module, args = Stacked.__subclasses__()[0](), routed()
    run = Proof(module, args, True)
    x = args[0].clone().requires_grad_()
    out = run(x, *args[1:]).sum()
    first = torch.autograd.grad(out, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, x)[0])


def test_a_refused_or_proven_module_keeps_its_parameters() -> None:
    """A module with two names is put back whole after the trace."""
    module = IDIOMS["Shared"].make()
    before = {n: id(p) for n, p in module.named_parameters(remove_duplicate=False)}
    Proof(module, arguments(IDIOMS["Shared"]), True)
    assert {n: id(p) for n, p in module.named_parameters(remove_duplicate=False)} == before
    assert all(type(p) is nn.Parameter for p in module.parameters())
