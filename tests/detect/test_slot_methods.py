"""Slots whose parts are methods: which function is proven, and compiled."""

import copy

import pytest
import torch
from torch import Tensor

from moe_compile.candidates import is_candidate
from tests.detect.idioms_gshard import GShard
from tests.detect.idioms_slot_flat import FlatSlotsOfAll
from tests.detect.idioms_slot_rows import SlotForLate, SlotRows, SlotRowsOfOne
from tests.detect.loops import IDIOMS, Idiom, arguments, differences, outcome
from tests.tiny import compiled, regions


class Whole(SlotRows):
    """A forward that only calls others: all of it is one method."""

    everything = SlotRows.forward

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.everything(x, ids, weights) + x


class WithoutPlaces(GShard):
    """Rows of all experts, which no layout has made: the method is asked, as ever."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.made(x.expand(4, -1, -1)).sum(0)


@pytest.mark.parametrize("make", [SlotRows, SlotForLate, SlotRowsOfOne, FlatSlotsOfAll])
def test_the_function_around_the_experts_is_asked(make: type[GShard]) -> None:
    assert is_candidate(make.forward, make())  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [Whole, WithoutPlaces])
def test_others_are_not(make: type[GShard]) -> None:
    assert not is_candidate(make.forward, make())  # type: ignore[arg-type]
    assert is_candidate(GShard.made, make())  # type: ignore[arg-type]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", ["SlotRows", "SlotForLate", "FlatSlotsOfAll"])
def test_compiled(name: str) -> None:
    case: Idiom = IDIOMS[name]
    torch.manual_seed(0)
    module, args = case.make(), arguments(case)
    original = copy.deepcopy(module)
    with regions() as found:
        got = outcome(compiled(module), module, args)
    assert {(r.matched, r.reason) for r in found} == {(True, None)}
    assert not differences(got, outcome(original, original, args), 1e-5)
