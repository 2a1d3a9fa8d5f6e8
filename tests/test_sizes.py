"""Functions whose rows come sorted by expert, with the number of each expert's rows: a list, or a tensor that counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tiny import D, E, check_same, compiled, original, regions

pytestmark = pytest.mark.usefixtures("fresh")
R = 13


class Product(nn.Module):
    """As JetMoE writes it: `sizes` is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(E, D, D))

    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        pieces = x.split(sizes, dim=0)
        return torch.cat([F.linear(pieces[e], self.w[e]) for e in range(E)], dim=0)


class Gated(Product):
    """Two products, one after the other: one region."""

    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        y = torch.cat([F.linear(p, self.w[e]) for e, p in enumerate(x.split(sizes))])
        y = F.silu(y) * 2
        return torch.cat([p @ self.w[e] for e, p in enumerate(y.split(sizes))])


class TwoRowsAtOnce(Product):
    """Of two values that lie alike."""

    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        pieces = zip(x.split(sizes), x.flip(0).split(sizes), strict=True)
        return torch.cat([F.linear(p + q, self.w[e]) for e, (p, q) in enumerate(pieces)])


class Set(Product):
    """As Aria writes it: `sizes` is a tensor of counts; rows behind the last stay zero."""

    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        out = torch.zeros(x.shape[0], D, dtype=x.dtype)
        ends = torch.cat((torch.zeros(1, dtype=torch.long), torch.cumsum(sizes, dim=0)))
        for e in range(E):
            start, end = ends[e], ends[e + 1]
            out[start:end] = x[start:end] @ self.w[e]
        return out


class Net(nn.Module):
    """Sorts rows, counts them, and unsorts what comes back."""

    def __init__(self, experts: nn.Module, count: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.experts, self.count = experts, count

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        order = ids.argsort(stable=True)
        y = self.experts(x[order], self.count(ids))
        return torch.zeros_like(x).index_add(0, order, y)


def as_list(ids: Tensor) -> list[int]:
    return torch.bincount(ids, minlength=E).tolist()


def as_counts(ids: Tensor) -> Tensor:
    return torch.histc(ids.float(), bins=E, min=0, max=E - 1).to(torch.int64)


ROUTES = [
    torch.tensor([0, 1, 2, 3] * 3 + [2]), torch.tensor([2] * R), torch.tensor([3, 1] * 6 + [1]),
    torch.tensor([0, 0, 0, 3]), torch.tensor([1]), torch.randint(E, (40,)),
]  # fmt: skip


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("make", "count"), [(Product, as_list), (Gated, as_list), (TwoRowsAtOnce, as_list), (Set, as_counts)]
)
def test_rewritten(make: type[nn.Module], count: Callable[[Tensor], Any], inner: str) -> None:
    model = Net(make(), count)
    reference = original(model)
    run = compiled(model, inner)
    with regions() as found:
        for ids in ROUTES:
            check_same(run, reference, model, reference, torch.randn(len(ids), D), ids)
    assert found and all((r.matched, r.top_k) == (True, 1) for r in found), [r.reason for r in found]


def test_one_graph_for_all_counts() -> None:
    model = Net(Set(), as_counts)
    reference = original(model)
    run = compiled(model, fullgraph=True)
    for ids in ROUTES[:3]:
        check_same(run, reference, model, reference, torch.randn(len(ids), D), ids)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_fewer_rows_than_came() -> None:
    """Ids of no expert are counted nowhere: their rows are the last, and stay zero."""
    model = Net(Set(), as_counts)
    reference = original(model)
    ids = torch.tensor([0, 5, 3, 7, 1, 1, 2])
    with regions() as found:
        check_same(compiled(model), reference, model, reference, torch.randn(7, D), ids)
    assert [r.matched for r in found] == [True]


@pytest.mark.parametrize("sizes", [[4, 4, 4, 2], [4, 4, 4, 0]])
def test_sizes_of_other_rows_are_an_error(sizes: list[int]) -> None:
    model = Net(Product(), lambda ids: sizes)
    x, ids = torch.randn(R, D), ROUTES[0]
    for run in (model, compiled(model)):
        with pytest.raises(RuntimeError):
            run(x, ids)


# -- near misses ------------------------------------------------------------------------------


class Reversed(Product):
    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        return torch.cat([F.linear(p, self.w[e]) for e, p in enumerate(x.split(sizes))][::-1])


class OneLeftOut(Product):
    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        return torch.cat([F.linear(p, self.w[e]) for e, p in enumerate(x.split(sizes)[:-1])])


class SizesReversed(Product):
    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        return torch.cat([F.linear(p, self.w[e]) for e, p in enumerate(x.split(sizes[::-1]))])


class MixesRows(Product):
    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        return torch.cat([F.linear(p, self.w[e]).cumsum(0) for e, p in enumerate(x.split(sizes))])


class Sliced(Product):
    """Rows behind the last are not in the result."""

    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        start, pieces = 0, []
        for e in range(E):
            pieces.append(F.linear(x[start : start + sizes[e]], self.w[e]))
            start += sizes[e]
        return torch.cat(pieces)


class Scaled(Product):
    """By how many rows it has."""

    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        return torch.cat([F.linear(p, self.w[e]) * sizes[e] for e, p in enumerate(x.split(sizes))])


class OneExpertForTwo(Product):
    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        return torch.cat([F.linear(p, self.w[max(e, 1)]) for e, p in enumerate(x.split(sizes))])


class UsedTwice(Product):
    """The first results are there twice: for the second product, and as they are."""

    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        y = torch.cat([F.linear(p, self.w[e]) for e, p in enumerate(x.split(sizes))])
        return y.sum() * torch.cat([p @ self.w[e] for e, p in enumerate(y.split(sizes))])


class SetElsewhere(Set):
    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        out = torch.zeros_like(x)
        ends = torch.cat((torch.zeros(1, dtype=torch.long), torch.cumsum(sizes, dim=0)))
        for e in range(E):
            out[ends[e] : ends[e + 1]] = x[ends[e] : ends[e + 1]] @ self.w[e]
        out[ends[0] : ends[1]] = x[ends[0] : ends[1]] @ self.w[1]
        return out


class SetIntoOnes(Set):
    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        out = torch.ones_like(x)
        ends = torch.cat((torch.zeros(1, dtype=torch.long), torch.cumsum(sizes, dim=0)))
        for e in range(E):
            out[ends[e] : ends[e + 1]] = x[ends[e] : ends[e + 1]] @ self.w[e]
        return out


class SetInMoreRows(Set):
    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        out = torch.zeros(2 * x.shape[0], D)
        ends = torch.cat((torch.zeros(1, dtype=torch.long), torch.cumsum(sizes, dim=0)))
        for e in range(E):
            out[ends[e] : ends[e + 1]] = x[ends[e] : ends[e + 1]] @ self.w[e]
        return out[: x.shape[0]]


class SizesChanged(Set):
    def forward(self, x: Tensor, sizes: Any) -> Tensor:
        sizes = sizes.clone()
        view = sizes.view(-1)
        view.add_(torch.tensor([1, -1, 0, 0]))
        return super().forward(x, sizes)


@pytest.mark.parametrize(
    "make", [Reversed, OneLeftOut, SizesReversed, MixesRows, Sliced, Scaled, OneExpertForTwo, UsedTwice]
)
def test_lists_refused(make: type[nn.Module]) -> None:
    model = Net(make(), as_list)
    reference = original(model)
    ids = torch.tensor([0, 1, 2, 3] * 3)  # all alike, so that every one of them runs
    if make is OneLeftOut:
        model.forward = lambda x, ids: model.experts(x, as_list(ids))  # type: ignore[method-assign]
        reference.forward = lambda x, ids: reference.experts(x, as_list(ids))
    with regions() as found:
        check_same(compiled(model), reference, model, reference, torch.randn(12, D), ids)
    assert found and not any(r.matched for r in found)


@pytest.mark.parametrize("make", [SetElsewhere, SetIntoOnes, SetInMoreRows, SizesChanged])
def test_counts_refused(make: type[nn.Module]) -> None:
    model = Net(make(), as_counts)
    reference = original(model)
    with regions() as found:
        for ids in (ROUTES[0], torch.tensor([0, 1, 3, 4, 4, 6])):
            check_same(compiled(model), reference, model, reference, torch.randn(len(ids), D), ids)
    assert found and not any(r.matched for r in found)


@pytest.mark.parametrize(
    "count",
    [
        lambda ids: as_counts(ids) - 1,
        lambda ids: torch.bincount(ids, torch.ones(len(ids)).neg(), minlength=E).long().neg(),
        lambda ids: as_counts(ids).sub_(1).add_(1),
        lambda ids: torch.tensor([3, 4, 3, 3]),
    ],
)
def test_numbers_that_may_be_negative(count: Callable[[Tensor], Any]) -> None:
    model = Net(Set(), count)
    reference = original(model)
    with regions() as found:
        check_same(compiled(model), reference, model, reference, torch.randn(R, D), ROUTES[0])
    assert found and not any(r.matched for r in found)


def test_a_list_with_a_negative_number() -> None:
    model = Net(Sliced(), lambda ids: [4, -1, 5, 5])
    reference = original(model)
    with regions() as found:
        x = torch.randn(R, D)
        assert torch.equal(compiled(model.experts)(x, [4, -1, 5, 5]), reference.experts(x, [4, -1, 5, 5]))
    assert found and not any(r.matched for r in found)
