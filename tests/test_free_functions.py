"""Loops in functions that belong to no module: weights or modules are arguments, or a closure holds them."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tiny import FF, D, E, Separate, close, compiled, regions, routed

pytestmark = pytest.mark.usefixtures("fresh")


def body(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.silu(x @ up) @ down


def by_weights(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(up.shape[0]):
        t, k = torch.where(ids == e)
        out.index_add_(0, t, body(x[t], up[e], down[e]) * weights[t, k, None])
    return out


def by_modules(x: Tensor, ids: Tensor, weights: Tensor, experts: Any, scale: float = 1.0) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        t, k = torch.where(ids == e)
        out.index_add_(0, t, expert(x[t]) * weights[t, k, None] * scale)
    return out


def closure(experts: Any) -> Callable[..., Tensor]:
    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out

    return run


def parameters() -> tuple[Tensor, Tensor]:
    return (0.3 * torch.randn(E, D, FF)).requires_grad_(), (0.3 * torch.randn(E, FF, D)).requires_grad_()


def check(run: Callable[..., Tensor], *args: Any, leaves: list[Tensor], matched: list[bool] | None = None) -> None:
    """Same outputs and gradients; `matched`: what the report says of the functions that may hold a loop."""
    with regions() as found:
        got = compiled(run)(*args)
    grads = torch.autograd.grad(got.square().sum(), leaves)
    want = run(*args)
    assert close(got, want)
    assert all(map(close, grads, torch.autograd.grad(want.square().sum(), leaves)))
    assert [r.matched for r in found] == ([True] if matched is None else matched), [r.reason for r in found]


def test_weights_are_arguments() -> None:
    up, down = parameters()
    check(by_weights, *routed(), up, down, leaves=[up, down])
    check(lambda x, ids, p, up: by_weights(x, ids, p, up, down=down) * 2, *routed(), up, leaves=[up, down])


def test_a_function_without_a_name() -> None:
    up, down = parameters()
    run = lambda x, ids, p, up, down: by_weights(x, ids, p, up, down)  # noqa: E731
    nameless = types.FunctionType(by_weights.__code__, globals(), "<lambda>")
    args = *routed(), up, down
    assert close(compiled(run)(*args), run(*args))
    check(lambda *args: nameless(*args), *routed(), up, down, leaves=[up, down])


def test_a_size_that_may_be_one_is_no_symbol_of_two_and_more() -> None:
    """Between two reads of data Dynamo's symbols stand for 0 and 1, too."""
    up, down = parameters()

    def run(x: Tensor, ids: Tensor, weights: Tensor, numbers: Tensor) -> Tensor:
        n = numbers.tolist()[0]
        torch._check(n >= 0)
        torch._check(n <= x.shape[0])
        return by_weights(x[:n], ids[:n], weights[:n], up, down)

    with regions() as found, torch._dynamo.config.patch(capture_scalar_outputs=True):
        for n in (5, 1, 0):
            args = *routed(), torch.tensor([n])
            assert close(compiled(run)(*args), run(*args))
    assert {r.matched for r in found} == {False}
    assert "may be 0 or 1" in str(found[0].reason)


def test_modules_are_an_argument() -> None:
    experts = Separate().experts
    leaves = list(experts.parameters())
    check(by_modules, *routed(), experts, leaves=leaves)
    check(lambda x, ids, p: by_modules(x, ids, p, scale=2.0, experts=experts), *routed(), leaves=leaves)


def test_a_closure_holds_the_modules() -> None:
    """Two closures of one code, each with modules of its own; and one whose modules are exchanged."""
    for experts in (Separate().experts, Separate().experts):
        check(closure(experts), *routed(), leaves=list(experts.parameters()))
    first, second = closure(Separate().experts), closure(Separate().experts)
    run, args = compiled(lambda which, *args: which(*args)), routed()
    for which in (first, second, first):
        assert close(run(which, *args), which(*args))
    cell = first.__closure__[0]  # type: ignore[attr-defined]
    cell.cell_contents = Separate().experts
    assert close(run(first, *args), first(*args))


def test_other_modules_and_weights_in_later_calls() -> None:
    run, args = compiled(by_modules), routed()
    for experts in (Separate().experts, Separate().experts):
        assert close(run(*args, experts), by_modules(*args, experts))
    run = compiled(by_weights)
    for _ in range(2):
        weights = parameters()
        assert close(run(*args, *weights), by_weights(*args, *weights))
    up, down = parameters()
    assert close(run(*args, up[:3], down[:3]), by_weights(*args, up[:3], down[:3]))


class Called(nn.ModuleList):
    """Can be called itself, with hooks that a rewrite would lose."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def calls_the_list(x: Tensor, ids: Tensor, weights: Tensor, experts: Any) -> Tensor:
    return by_modules(experts(x), ids, weights, experts)


def test_a_list_that_can_be_called_is_left_alone() -> None:
    experts = Called(Separate().experts)
    experts.register_forward_hook(lambda module, args, out: out + 1)
    check(calls_the_list, *routed(), experts, leaves=list(experts.parameters()), matched=[])


def test_experts_with_hooks_are_left_alone() -> None:
    experts = Separate().experts
    experts[1].register_forward_hook(lambda module, args, out: out * 2)
    check(by_modules, *routed(), experts, leaves=list(experts.parameters()), matched=[False])


def leaves_one_out(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(1, up.shape[0]):
        t, k = torch.where(ids == e)
        out.index_add_(0, t, body(x[t], up[e], down[e]) * weights[t, k, None])
    return out


def shares_a_weight(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(up.shape[0]):
        t, k = torch.where(ids == e)
        out.index_add_(0, t, body(x[t], up[e], down[0]) * weights[t, k, None])
    return out + up[0].sum()


@pytest.mark.parametrize(("run", "matched"), [(leaves_one_out, [False]), (shares_a_weight, [False])])
def test_other_loops(run: Callable[..., Tensor], matched: list[bool]) -> None:
    up, down = parameters()
    check(run, *routed(), up, down, leaves=[up, down], matched=matched)


def test_two_lists_are_left_alone() -> None:
    one, other = Separate().experts, Separate().experts

    def both(x: Tensor, ids: Tensor, weights: Tensor, a: Any, b: Any) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, a[e](b[e](x[t])) * weights[t, k, None])
        return out

    leaves = [*one.parameters(), *other.parameters()]
    check(both, *routed(), one, other, leaves=leaves, matched=[])
