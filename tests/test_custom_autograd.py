"""Custom autograd functions before and after the experts: called again, with the gradient that they define."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import D, E, Separate, T, check_same, compiled, original, regions, routed

pytestmark = pytest.mark.usefixtures("fresh")


class Triple(torch.autograd.Function):
    """A gradient that no trace of the forward would give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(x)
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.factor * g + 0.1 * x, None


class AddLoss(torch.autograd.Function):
    """Returns its first argument, and sends a gradient into the second."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        return g, torch.ones((), dtype=ctx.dtype)


class TwoParts(torch.autograd.Function):
    """Several results, one without a gradient, and a context of its own."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sigmoid(), x > 0

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Tensor:
        return 5 * g * ctx.saved_tensors[0]


class InLine(Separate):
    """In the function that loops."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        weights = Triple.apply(weights, 2.0)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


class After(Separate):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.shape[0] == 0:
                continue
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return AddLoss.apply(Triple.apply(out, 0.5), (weights**2).mean())


class Gates(Separate):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gate, on = TwoParts.apply(weights)
        weights = torch.where(on, gate, weights)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


def test_skewed_routing() -> None:
    model = After()
    reference = original(model)
    x, _, weights = routed()
    ids = torch.tensor([[0, 2]] * T)
    with regions() as found:
        check_same(compiled(model, fullgraph=True), reference, model, reference, x, ids, weights)
    assert [r.matched for r in found] == [True]


def test_the_gradient_is_not_that_of_a_trace() -> None:
    """What the tests above would not see if the two were equal."""
    x = torch.randn(3, requires_grad=True)
    Triple.apply(x, 3.0).sum().backward()
    assert not torch.allclose(x.grad, torch.ones(3))  # type: ignore[arg-type]


# -- near misses ------------------------------------------------------------------------------


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


SEEN: list[int] = []


class Counts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        SEEN.append(1)
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class SetsAttribute(torch.autograd.Function):
    last: Any = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        SetsAttribute.last = 1
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class Derived(Triple):
    pass


class Weighted(Separate):
    """`self.change(weights)`, then the loop."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        weights = self.change(weights)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out

    def change(self, weights: Tensor) -> Tensor:
        raise NotImplementedError


class ChangesInPlace(Weighted):
    def change(self, weights: Tensor) -> Tensor:
        return InPlace.apply(weights * 1)


class ChangesList(Weighted):
    def change(self, weights: Tensor) -> Tensor:
        return Counts.apply(weights)


class ChangesClass(Weighted):
    def change(self, weights: Tensor) -> Tensor:
        return SetsAttribute.apply(weights)


class AppliesDerived(Weighted):
    def change(self, weights: Tensor) -> Tensor:
        return Derived.apply(weights, 2.0)


class Unnamed(Weighted):
    def change(self, weights: Tensor) -> Tensor:
        class Local(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x * 2

            @staticmethod
            def backward(ctx: Any, g: Tensor) -> Tensor:
                return 7 * g

        return Local.apply(weights)


class AmongExperts(Separate):
    """On what belongs to no expert, but in each iteration."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.shape[0] == 0:
                continue
            weights = Triple.apply(weights, 2.0)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


class OnRows(Separate):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, Triple.apply(expert(x[t]), 2.0) * weights[t, k, None])
        return out


class OnTheRunningSum(Separate):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out = out.index_add(0, t, expert(x[t]) * weights[t, k, None])
            out = Triple.apply(out, 2.0)
        return out


class OnWeights(nn.Module):
    """Of each expert's own weight, whether or not somebody chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.3 * torch.randn(E, D, D))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out = out.index_add(0, t, (x[t] @ Triple.apply(self.w[e], 2.0)) * weights[t, k, None])
        return out


class OnWeightsOfTheChosen(OnWeights):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            if t.shape[0] == 0:
                continue
            out = out.index_add(0, t, (x[t] @ Triple.apply(self.w[e], 2.0)) * weights[t, k, None])
        return out


class ManyWeights(OnWeights):
    """One visit would stand for many experts."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.3 * torch.randn(9, D, D))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(9):
            t, k = torch.where(ids == e)
            out = out.index_add(0, t, (x[t] @ Triple.apply(self.w[e], 2.0)) * weights[t, k, None])
        return out


@pytest.mark.parametrize("make", [InLine, After, Gates, OnWeights, ManyWeights])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_the_gradient_is_the_functions_own(make: type[nn.Module], inner: str) -> None:
    model = make()
    reference = original(model)
    run = compiled(model, inner, fullgraph=True)
    with regions() as found:
        for tokens in (T, 7, 1):
            check_same(run, reference, model, reference, *routed(tokens, 9 if make is ManyWeights else E))
    assert found and all(r.matched for r in found), [r.reason for r in found]


NAME = "it uses the custom autograd function "
REFUSED: dict[type[nn.Module], str] = {
    ChangesInPlace: NAME + "InPlace, which changes an argument in place",
    ChangesList: "it changes SEEN when it runs",
    ChangesClass: "SetsAttribute.forward (test_custom_autograd.py",
    AppliesDerived: NAME + "Derived, which is made from another one",
    Unnamed: NAME + "Local, for which no name is found",
    AmongExperts: "expert 1 differs from expert 0",
    OnRows: NAME + "Triple on rows of experts, as no rule does",
    OnTheRunningSum: "no weight belongs to an expert",
    OnWeightsOfTheChosen: "what surrounds the sum differs when some experts have no rows",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda m: m.__name__)
def test_refused(make: type[nn.Module]) -> None:
    model = make()
    reference = original(model)
    with regions() as found:
        for _ in range(2):
            check_same(compiled(model), reference, model, reference, *routed())
    assert found and not any(r.matched for r in found)
    assert all(REFUSED[make] in str(r.reason) for r in found), [r.reason for r in found]


def test_another_function_of_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class that is applied is guarded, not its name."""

    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
            return 11 * g, None

    model = InLine()
    reference = original(model)
    run = compiled(model, fullgraph=True)
    check_same(run, reference, model, reference, *routed())
    monkeypatch.setitem(globals(), "Triple", Other)
    with regions() as found:
        check_same(run, reference, model, reference, *routed())
    assert [r.matched for r in found] == [True]
    model = InLine()  # proven again: another instance must not get the first one's
    reference = original(model)
    check_same(compiled(model, fullgraph=True), reference, model, reference, *routed())


def test_another_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = InLine()
    reference = original(model)
    check_same(compiled(model, fullgraph=True), reference, model, reference, *routed())
    monkeypatch.setattr(Triple, "backward", staticmethod(lambda ctx, g: (13 * g, None)))
    torch._dynamo.reset()
    check_same(compiled(model, fullgraph=True), reference, model, reference, *routed())
