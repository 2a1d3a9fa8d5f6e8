"""Attributes that a forward leaves on its module: set as ever by a rewritten function, or a reason."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_compile.analysis import analyse
from moe_compile.errors import Refusal
from tests.detect.loops import D, E, K, Mlp, differences, outcome
from tests.detect.test_refused import text
from tests.tiny import compiled, regions

pytestmark = pytest.mark.usefixtures("fresh")


class Routed(nn.Module):
    aux_loss: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Mlp() for _ in range(E))
        self.gate, self.last_logits = nn.Linear(D, E), None

    def mixed(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.experts[e](x[t]) * w[t, k, None])
        return out


class Block(Routed):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        w, ids = logits.softmax(-1).topk(K, -1)
        self.last_logits = logits
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.experts[e](x[t]) * w[t, k, None])
        self.aux_loss = (w.sum(0) ** 2).sum() * 0.1
        self.made = out
        return out


class Net(nn.Module):
    """Others read what the blocks left, and what they left lies on the blocks after a call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(), Block()

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x))
        return y, self.a.aux_loss + self.b.aux_loss, self.a.last_logits, self.b.made * 2


def test_set_as_ever() -> None:
    torch.manual_seed(0)
    net = Net().double()
    net.a.gate.weight.data[1] = -100 * net.a.gate.weight.data[1].abs()  # an expert without tokens
    original, run = copy.deepcopy(net), compiled(net, fullgraph=True)
    for tokens in (11, 5, 1, 3):
        x = torch.randn(tokens, D, dtype=torch.float64).abs()
        with regions() as found:
            got = outcome(run, net, (x,))
        assert not differences(got, outcome(original, original, (x,)), 1e-12)
        assert all(r.matched for r in found), [r.reason for r in found]
        for mine, theirs in ((net.a, original.a), (net.b, original.b)):
            for name in ("last_logits", "aux_loss", "made"):
                left = getattr(mine, name)
                assert torch.allclose(left, getattr(theirs, name)) and left.requires_grad


def test_what_was_left_is_what_was_returned() -> None:
    block = Block()
    run = compiled(lambda x: block(x), fullgraph=True)
    with regions() as found:
        out = run(torch.randn(7, D))
    assert found[0].matched and block.made is out


class SetOnce(Routed):
    """What the cases below change."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        self.aux_loss = w.sum()
        return self.mixed(x, ids, w)


def test_the_control_is_proven() -> None:
    module = SetOnce()
    assert analyse(SetOnce.forward, module, [torch.randn(11, D)], {}).capture.kept == ("aux_loss",)


class ReadsOthersByName(SetOnce):
    """Names that are written out are those of other attributes."""

    def mixed(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = super().mixed(x, ids, w)
        return out * getattr(self, "factor", 2.0) if hasattr(self, "gate") else out


def test_other_attributes_read_by_name() -> None:
    module = ReadsOthersByName()
    assert analyse(SetOnce.forward, module, [torch.randn(11, D)], {}).capture.kept == ("aux_loss",)
    original, run = copy.deepcopy(module), compiled(module)
    for tokens in (11, 4):
        x = torch.randn(tokens, D)
        with regions() as found:
            got = outcome(run, module, (x,))
        assert all(r.matched for r in found), [r.reason for r in found]
        assert not differences(got, outcome(original, original, (x,)), 1e-5)
        assert torch.allclose(module.aux_loss, original.aux_loss)


class SetInALoop(Routed):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            y = self.experts[e](x[t]) * w[t, k, None]
            out.index_add_(0, t, y)
            self.made = y
        return out


class SetInABranch(Routed):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        if self.training:
            self.aux_loss = w.sum()
        return self.mixed(x, ids, w)


class SetTwice(Routed):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        self.aux_loss = w.sum()
        self.aux_loss = w.sum() * 2
        return self.mixed(x, ids, w)


class ReadByAHelper(Routed):
    def mixed(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().mixed(x, ids, w) if self.aux_loss is None else x

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        self.aux_loss = w.sum()
        return self.mixed(x, ids, w)


class ReadByName(Routed):
    def mixed(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().mixed(x, ids, w) * (2 if getattr(self, "aux" + "_loss") is None else 3)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        self.aux_loss = w.sum()
        return self.mixed(x, ids, w)


class ReadByItsName(SetOnce):
    def mixed(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().mixed(x, ids, w) * (2 if getattr(self, "aux_loss", None) is None else 3)


class ReadByAnAlias(SetOnce):
    def mixed(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        read = getattr
        return super().mixed(x, ids, w) * (2 if read(self, "_".join(("aux", "loss"))) is None else 3)


class ReadByAMap(SetOnce):
    def mixed(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        known = [value for value in map(getattr, [self], ["aux_" + "loss"]) if value is not None]
        return super().mixed(x, ids, w) * (2 if hasattr(self, "gate") and not known else 3)


class AddedTo(Routed):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        self.total += w.sum()
        return self.mixed(x, ids, w)

    total: Any = 0.0


class ReturnsBefore(Routed):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        if not self.training:
            return self.mixed(x, ids, w)
        self.aux_loss = w.sum()
        return self.mixed(x, ids, w)


class SetOnAnother(Routed):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        self.gate.aux_loss = w.sum()
        return self.mixed(x, ids, w)


class AnotherSelf(Routed):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        out = self.mixed(x, ids, w)
        self = self.gate  # type: ignore[assignment]
        self.aux_loss = w.sum()
        return out


class SetsABuffer(Routed):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        self.load = w.sum()
        return self.mixed(x, ids, w)


class SetsAProperty(Routed):
    @property
    def load(self) -> Tensor | None:
        return None

    @load.setter
    def load(self, value: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        self.load = w.sum()  # type: ignore[assignment]
        return self.mixed(x, ids, w)


class SetsANumber(Routed):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        self.aux_loss = 3
        return self.mixed(x, ids, w)


class SetsAnInput(Routed):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        self.aux_loss = x
        return self.mixed(x, ids, w)


class SetsAParameter(Routed):
    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        self.tied = self.gate.weight
        return self.mixed(x, ids, w)


SETS = "{}.forward (file.py) sets the attribute {}"
REFUSED = {
    SetInALoop: SETS.format("SetInALoop", "made"),
    SetInABranch: SETS.format("SetInABranch", "aux_loss"),
    SetTwice: SETS.format("SetTwice", "aux_loss"),
    ReadByAHelper: SETS.format("ReadByAHelper", "aux_loss"),
    ReadByName: SETS.format("ReadByName", "aux_loss"),
    ReadByItsName: SETS.format("SetOnce", "aux_loss"),
    ReadByAnAlias: SETS.format("SetOnce", "aux_loss"),
    ReadByAMap: SETS.format("SetOnce", "aux_loss"),
    AddedTo: SETS.format("AddedTo", "total"),
    ReturnsBefore: SETS.format("ReturnsBefore", "aux_loss"),
    SetOnAnother: SETS.format("SetOnAnother", "aux_loss"),
    AnotherSelf: SETS.format("AnotherSelf", "aux_loss"),
    SetsABuffer: SETS.format("SetsABuffer", "load"),
    SetsAProperty: SETS.format("SetsAProperty", "load"),
    SetsANumber: "it sets the attribute aux_loss to something else than a tensor that it made (int)",
    SetsAnInput: "it sets the attribute aux_loss to something else than a tensor that it made (a tensor from outside)",
    SetsAParameter: "it sets the attribute tied to something else than a tensor that it made (a tensor from outside)",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda c: c.__name__)
def test_refused(make: Callable[[], nn.Module]) -> None:
    module = make()
    with pytest.raises(Refusal) as refusal:
        analyse(type(module).forward, module, [torch.randn(11, D)], {})  # type: ignore[arg-type]
    assert text(str(refusal.value)).replace("(file.py:n)", "(file.py)") == REFUSED[make]  # type: ignore[index]
    original, run = copy.deepcopy(module), compiled(module)
    for tokens in (11, 4):
        x = torch.randn(tokens, D)
        assert not differences(outcome(run, module, (x,)), outcome(original, original, (x,)), 1e-5)
        for name, left in vars(original).items():
            if isinstance(left, Tensor):
                assert torch.allclose(vars(module)[name], left, atol=1e-5), name


def test_a_trace_leaves_nothing() -> None:
    """What was there before is there after, in its place."""
    module = Block()
    before = dict(vars(module))
    analyse(Block.forward, module, [torch.randn(11, D)], {})
    assert list(vars(module)) == list(before) and all(vars(module)[n] is v for n, v in before.items())
