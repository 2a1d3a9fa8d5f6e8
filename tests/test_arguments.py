"""What the caller of a candidate is known to hand over: masks of one_hot, with the late ones dropped."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile import arguments
from tests.tiny import FF, D, E, T, close, compiled, original, regions

pytestmark = pytest.mark.usefixtures("fresh")
CAPACITY = 2


class Masked(nn.Module):
    """Experts that get a mask [T, 1, E]; numbers other than zero choose."""

    def __init__(self) -> None:
        super().__init__()
        self.w13, self.w2 = nn.Parameter(torch.randn(E, FF, D)), nn.Parameter(torch.randn(E, D, FF))

    def forward(self, x: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = mask.permute(2, 1, 0)
        for e in range(E):
            k, t = torch.where(mask[e])
            out.index_add_(0, t, F.linear(F.silu(F.linear(x[t], self.w13[e])), self.w2[e]) * weights[t, k, None])
        return out


class Router(nn.Module):
    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.router, self.experts, self.mask = nn.Linear(D, E), Masked(), mask

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).max(-1)
        return self.experts(x.view(-1, D), self.mask(ids).view(-1, 1, E), weights.view(-1, 1))


def late(mask: Tensor) -> Tensor:
    return mask.cumsum(-2) <= CAPACITY


def grown(mask: Tensor) -> Tensor:
    mask[..., 0] = 1
    return mask


SHOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "one_hot": lambda ids: F.one_hot(ids, E),
    "dropped": lambda ids: F.one_hot(ids, E) * late(F.one_hot(ids, E)),
    "truths first": lambda ids: late(F.one_hot(ids, E)).mul(F.one_hot(ids, num_classes=E)),
    "both truths": lambda ids: F.one_hot(ids, E).bool() & late(F.one_hot(ids, E)),
    "reshaped": lambda ids: F.one_hot(ids, E).reshape(-1, E).float().contiguous(),
    "nobody": lambda ids: F.one_hot(ids, E) * (late(F.one_hot(ids, E)) & (ids < 0).unsqueeze(-1)),
}
NOT_SHOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "times two": lambda ids: F.one_hot(ids, E) * 2,
    "times numbers": lambda ids: F.one_hot(ids, E) * F.one_hot(ids, E).cumsum(-2),
    "or": lambda ids: F.one_hot(ids, E).bool() | late(F.one_hot(ids, E)),
    "not": lambda ids: ~F.one_hot(ids, E).bool(),
    "sum": lambda ids: F.one_hot(ids, E) + F.one_hot(ids.flip(-1), E),
    "turned": lambda ids: F.one_hot(ids, E).transpose(-1, -2).reshape(-1, E),
    "changed": lambda ids: grown(F.one_hot(ids, E)),
    "broadcast": lambda ids: F.one_hot(ids[:1], E) * (ids.unsqueeze(-1) >= 0),
    "bits": lambda ids: F.one_hot(ids, E).view(torch.float64).bool(),
}


def step(run: Callable[[Tensor], Tensor], owner: nn.Module, x: Tensor) -> list[Tensor]:
    owner.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    out.mul(torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(torch.zeros(()) if p.grad is None else p.grad for p in owner.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("name", [*SHOWN, *NOT_SHOWN])
def test_mask(name: str) -> None:
    torch.manual_seed(0)
    model, x = Router((SHOWN | NOT_SHOWN)[name]), torch.randn(2, T // 2, D)
    reference = original(model)
    want = step(reference, reference, x)
    with regions() as found:
        got = step(compiled(model, "aot_eager"), model, x)
    assert [r.matched for r in found] == [name in SHOWN], [r.reason for r in found]
    for mine, theirs in zip(got, want, strict=True):
        assert close(mine, theirs) if theirs.any() else not mine.any()


def test_tokens_that_are_dropped_have_no_gradient() -> None:
    torch.manual_seed(0)
    model, x = Router(SHOWN["dropped"]), torch.randn(1, T, D)
    with torch.no_grad():
        model.router.weight.zero_()  # all choose the first expert: of T tokens CAPACITY have a place
    x.requires_grad_()
    with regions() as found:
        out = compiled(model, "aot_eager")(x)
    assert [r.matched for r in found] == [True]
    out.sum().backward()
    assert out[:CAPACITY].any() and not out[CAPACITY:].any()
    assert x.grad is not None and x.grad[0, :CAPACITY].any() and not x.grad[0, CAPACITY:].any()


def test_a_view_as_another_dtype_is_no_cast() -> None:
    graph = torch.fx.Graph()
    table = graph.call_function(F.one_hot, (graph.placeholder("ids"), E))
    table.args[0].meta["example_value"] = torch.zeros(T, dtype=torch.int64)  # type: ignore[union-attr]
    table.meta["example_value"] = torch.zeros(T, E, dtype=torch.int64)
    assert arguments.from_one_hot(table)
    for dtype, shown in ((torch.int64, True), (torch.float64, False)):
        view = graph.call_method("view", (table, T, E))
        view.meta["example_value"] = torch.zeros(T, E, dtype=dtype)
        assert arguments.from_one_hot(view) is shown
