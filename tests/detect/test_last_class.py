"""A class past the experts: an id of it is an error in the rewritten function as in the original."""

import pytest
import torch
from torch import Tensor

from moe_compile.analysis import analyse
from moe_compile.errors import Refusal
from tests.detect.idioms_gshard import GShard
from tests.detect.loops import IDIOMS, E, Proof, any_length, arguments, differences, known, outcome
from tests.detect.mutants_families import Visits
from tests.detect.mutants_gshard import Parts

PAST = ["ClassPastTheExperts", "ModulePastTheExperts", "FactorsPastTheExperts"]


@pytest.mark.parametrize("bad", [-1, E, E + 1])
@pytest.mark.parametrize("name", PAST)
def test_ids_out_of_range_raise(name: str, bad: int) -> None:
    module = IDIOMS[name].make()
    x, ids, weights = arguments(IDIOMS[name])
    run = Proof(module, (x, ids, weights), False)
    wrong = torch.where(ids == 1, bad, ids)
    with pytest.raises((IndexError, RuntimeError)):
        module(x, wrong, weights)
    with pytest.raises(RuntimeError, match="expert ids run from"):
        run(x, wrong, weights)


class NoTrouble(Visits):
    """A class past the experts that is left out."""

    def before(self, e: int, x: Tensor, ids: Tensor, weights: Tensor, t: Tensor) -> bool:
        return e == E


class Caught(Visits):
    """The error of the last class ends the loop, and all experts were visited before."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = torch.nn.functional.one_hot(ids, E + 1).permute(2, 1, 0)
        for e in torch.greater(mask.sum((-1, -2)), 0).nonzero().squeeze(-1).tolist():
            k, t = torch.where(mask[e])
            try:
                out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
            except IndexError:
                continue
        return out


@pytest.mark.parametrize("cls", [NoTrouble, Caught])
def test_ids_of_the_last_class_that_add_nothing(cls: type[Visits]) -> None:
    torch.manual_seed(0)
    module = cls()
    x, ids, weights = arguments(IDIOMS["ClassPastTheExperts"])
    try:
        run = Proof(module, (x, ids, weights), False)
    except Refusal:  # may be refused, must not be wrong
        return
    args = (x, torch.where(ids == 1, E, ids), weights)
    assert not differences(outcome(run, module, args), outcome(module, module, args), 1e-5)


class ErrorIfFewTokens(Visits):
    def before(self, e: int, x: Tensor, ids: Tensor, weights: Tensor, t: Tensor) -> bool:
        if e == E and x.shape[0] < 40:
            raise IndexError("few tokens, one of them without an expert")
        return e == E


def test_an_error_that_depends_on_a_size() -> None:
    """That many tokens could be a guard, but then it has to be one."""
    module, args = ErrorIfFewTokens(), arguments(IDIOMS["ClassPastTheExperts"])
    with pytest.raises(Refusal) as refusal:
        analyse(type(module).forward, module, any_length(args), {})
    assert str(refusal.value) == f"class {E} of {E + 1} is not shown to be an error in all cases"


class OneHotOfInt32(GShard):
    """An error, though fake tensors do not say so."""

    def combine(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().combine(x, ids.int(), weights)


class OneHotOfPlacesInFloat(Parts):
    def places(self, mask: Tensor) -> Tensor:
        return super().places(mask).float()


@pytest.mark.parametrize("cls", [OneHotOfInt32, OneHotOfPlacesInFloat])
def test_one_hot_takes_int64(cls: type[GShard]) -> None:
    torch.manual_seed(0)
    module, args = cls(), arguments(IDIOMS["GShard"])
    with pytest.raises(RuntimeError, match="one_hot is only applicable"):
        module(*args)
    with pytest.raises(Refusal):
        analyse(cls.forward, module, any_length(args), {}, known(False))
