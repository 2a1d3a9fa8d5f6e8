"""Members of long lists that are like the first one: what is left out for them must be the same as for all."""

import gc
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_compile import numbers
from moe_compile.analysis import analyse
from moe_compile.errors import Refusal
from moe_compile.kinds import _structure, kind_of
from moe_compile.parts import listed
from moe_compile.read_walk import reads
from moe_compile.stand_ins import twins
from tests.detect.loops import known
from tests.tiny import FF, D, Separate, routed

E = 9
FORWARD: Any = Separate.forward


class Scaled(nn.Module):
    """An expert with a function, a number and a table beside its weights."""

    TABLE = (1.0, 2.0)

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, FF), nn.Linear(FF, D)
        self.act: Any = torch.tanh
        self.scale, self.options = 2.0, {"half": (0.5, True)}

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x))) * self.scale * self.options["half"][0] * self.TABLE[1]


def scaled() -> Separate:
    return Separate(Scaled, E)


def held() -> Separate:
    """Members that are held elsewhere too, under an earlier name and in a tuple."""
    module = scaled()
    experts = module.experts
    del module._modules["experts"]
    module.first = experts[0]  # type: ignore[assignment]
    module.experts = experts
    module.both = (experts[3], experts[4])  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("make", [scaled, held, lambda: Separate(num_experts=E)], ids=["scaled", "held", "sequential"])
def test_reads_of_members_are_those_of_the_first(make: Callable[[], Separate]) -> None:
    module = make()
    with listed(module):
        like = twins(module, numbers.FEW)
        assert len(like) >= E - 1
        whole, found = reads(FORWARD, module), reads(FORWARD, module, like)
    assert set(found) == set(whole)
    assert any("experts.7" in str(r) and "scale" in str(r) for r in found) or make not in (scaled, held)


def test_a_first_member_of_two_names_is_read() -> None:
    found = {str(r) for r in reads(FORWARD, held())}
    assert any("first" in r and "act" in r for r in found), sorted(found)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "number": lambda e: setattr(e[5], "scale", 3.0),
    "function": lambda e: setattr(e[5], "act", torch.relu),
    "dtype": lambda e: e[5].up.double(),
    "frozen": lambda e: e[5].up.weight.requires_grad_(False),
    "hook": lambda e: e[5].register_forward_hook(print),
    "tied": lambda e: setattr(e[5].up, "weight", e[4].up.weight),
    "tied to the first": lambda e: setattr(e[5].up, "weight", e[0].up.weight),
    "tied to another": lambda e: setattr(e[5].up, "weight", e[6].up.weight),
    "mark": lambda e: setattr(e[5].up.weight, "kept_in", torch.int8),
    "repeated": lambda e: e.__setitem__(5, e[4]),
    "longer": lambda e: e.append(Scaled()),
}


def test_structures_that_differ() -> None:
    found = [_structure(scaled())]
    for change in CHANGES.values():
        module = scaled()
        change(module.experts)
        found.append(_structure(module))
    assert found[0] == _structure(scaled()) and len(set(found)) == len(found)


@pytest.mark.parametrize("at", [(0, 0), (3, 4), (4, 3)])
def test_a_weight_from_outside_tells_members_apart(at: tuple[int, int]) -> None:
    def make(number: int) -> nn.Module:
        module = scaled()
        module.bias = module.experts[number].down.bias  # type: ignore[assignment, union-attr]
        return module

    assert (_structure(make(at[0])) == _structure(make(at[1]))) == (at[0] == at[1])


class Changing(Separate):
    """`change` is what a forward does to members beside its loop."""

    def change(self) -> None:
        pass

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        self.change()
        return out


class Trained(Changing):
    def change(self) -> None:
        list(self.modules())[-1].eval()


class Swapped(Changing):
    def change(self) -> None:
        inner = list(self.modules())[-3]._parameters
        inner["weight"] = inner["bias"]


class Added(Changing):
    def change(self) -> None:
        next(iter(self.children())).get_submodule("6").add_module("more", nn.Identity())


class Buffered(Changing):
    def change(self) -> None:
        list(self.modules())[-1].register_buffer("last", torch.ones(1))


@pytest.mark.parametrize("cls", Changing.__subclasses__(), ids=lambda c: c.__name__)
def test_changes_of_members_are_seen_and_undone(cls: type[Changing]) -> None:
    module = cls(num_experts=E)
    before, tensors = _structure(module), list(module.parameters())
    with pytest.raises(Refusal):
        analyse(cls.forward, module, routed(num_experts=E), {}, known(1))  # type: ignore[arg-type]
    assert _structure(module) == before and all(a is b for a, b in zip(module.parameters(), tensors, strict=True))


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_goes_on_after_a_proof(enabled: bool) -> None:
    module = Separate(num_experts=E)
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        kind_of(inspect.unwrap(FORWARD), module, routed(num_experts=E), {}, known(1), frozenset())
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()
