"""kernels/dispatch.py against its references: every value is a copy or an index, so exact."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_compile.kernels import counting_sort
from moe_compile.kernels.counting_sort import BLOCK, MAX_BLOCKS, num_bins, num_launches
from moe_compile.kernels.dispatch import (
    dispatch,
    dispatch_reference,
    route_rows,
    sort_by_expert,
    sort_by_expert_reference,
    why_not,
)

from .conftest import DEVICE, DTYPES, random


def ids_of(case: str) -> tuple[torch.Tensor, int]:
    g = torch.Generator().manual_seed(0)

    def draw(T: int, K: int, low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (T, K), generator=g).to(DEVICE)

    return {
        "odd sizes": lambda: (draw(63, 3, 0, 5), 5),
        "several blocks": lambda: (draw(BLOCK + 7, 3, 0, 7), 7),
        "one expert takes all": lambda: (torch.full((70, 2), 2, device=DEVICE), 4),
        "empty experts": lambda: (draw(33, 2, 3, 5), 9),
        "more experts than pairs": lambda: (draw(2, 2, 0, 300), 300),
        "512 experts": lambda: (draw(300, 2, 0, 512), 512),
        "one token": lambda: (draw(1, 1, 0, 1), 1),
        "no tokens": lambda: (draw(0, 2, 0, 4), 4),
        "ids out of range": lambda: (draw(300, 3, -3, 9), 5),
        "nobody takes any": lambda: (draw(20, 3, -3, 0), 5),
        "int32 ids": lambda: (draw(40, 2, 0, 5).int(), 5),
        "int8 ids": lambda: (draw(40, 2, -100, 100).to(torch.int8), 400),
        "strided ids": lambda: (draw(2, 40, 0, 5).t(), 5),
    }[case]()


CASES = [
    "odd sizes",
    "several blocks",
    "one expert takes all",
    "empty experts",
    "more experts than pairs",
    "512 experts",
    "one token",
    "no tokens",
    "ids out of range",
    "nobody takes any",
    "int32 ids",
    "int8 ids",
    "strided ids",
]


@pytest.mark.parametrize("case", CASES)
def test_order_and_offsets(case: str) -> None:
    ids, E = ids_of(case)
    order, ends = sort_by_expert(ids, E)
    order_ref, ends_ref = sort_by_expert_reference(ids.long(), E)
    assert order.dtype == ends.dtype == torch.int32
    assert torch.equal(order, order_ref)
    assert torch.equal(ends, ends_ref)


def check_routing(ids: torch.Tensor, E: int, rows: int) -> None:
    """All that `route_rows` gives, the tiles by a loop over groups."""
    order, ends, position, tiles = route_rows(ids, E, rows)
    order_ref, ends_ref = sort_by_expert_reference(ids.long(), E)
    assert torch.equal(order, order_ref) and torch.equal(ends, ends_ref)
    R = ids.numel()
    assert torch.equal(position[order.long()], torch.arange(R, device=DEVICE).int())
    wanted, first = [], 0
    for e, end in enumerate([*ends.tolist(), R]):
        wanted += [[e, r, end] for r in range(first, end, rows)]
        first = end
    groups = min(R, E + 1)
    unused = max(groups + (R - groups) // rows, 1) - len(wanted)
    assert tiles.tolist() == wanted + [[E + 1, 0, 0]] * unused
    assert all(t.dtype == torch.int32 for t in (order, ends, position, tiles))


@pytest.mark.parametrize("rows", [16, 128])
@pytest.mark.parametrize("case", CASES)
def test_positions_and_row_tiles(case: str, rows: int) -> None:
    check_routing(*ids_of(case), rows)


@pytest.mark.parametrize("launches", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_by_more_launches(case: str, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same by counts, and by sums, of any number of blocks; as many as are added at a time, and more."""
    monkeypatch.setattr(counting_sort, "BLOCK", 32)
    monkeypatch.setattr(counting_sort, "ROWS", 16)
    monkeypatch.setattr(counting_sort, "num_launches", lambda *_: launches)
    monkeypatch.setattr(counting_sort, "rows_at_a_time", lambda _: 4)
    check_routing(*ids_of(case), 16)


def test_how_many_launches() -> None:
    """One for a block; two while a program reads 256 KiB of counts at most, and all blocks run at once."""
    assert num_launches(1, 1024) == 1
    assert num_launches(2, 1024) == num_launches(64, 1024) == 2 and num_launches(65, 1024) == 3
    assert num_launches(MAX_BLOCKS, num_bins(8)) == 2 and num_launches(MAX_BLOCKS + 1, num_bins(8)) == 3
    assert [num_bins(E) for E in (1, 14, 15, 1022)] == [16, 16, 32, 1024]


@pytest.mark.parametrize(("tokens", "names"), [
    (BLOCK // 2, ["_order_kernel"]),
    (BLOCK // 2 + 1, ["_count_kernel", "_order_kernel"]),
])  # fmt: skip
def test_launches(tokens: int, names: list[str], launched: list[str]) -> None:
    ids = (torch.arange(2 * tokens, device=DEVICE) % 5).view(tokens, 2)
    launched.clear()
    check = sort_by_expert(ids, 5)
    assert launched == names
    launched.clear()
    assert torch.equal(route_rows(ids, 5, 16)[0], check[0])
    assert launched == names


def test_third_launch(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting_sort, "MAX_BLOCKS", 1)
    sort_by_expert(torch.zeros(BLOCK + 1, 1, dtype=torch.int64, device=DEVICE), 5)
    assert launched == ["_count_kernel", "_sum_kernel", "_order_kernel"]


def test_outputs_share_no_memory() -> None:
    results = route_rows(torch.zeros(40, 2, dtype=torch.int64, device=DEVICE), 5, 16)
    assert len({t.untyped_storage().data_ptr() for t in results}) == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["odd sizes", "no tokens", "ids out of range"])
@pytest.mark.parametrize("D", [1, 96, 2049])
def test_rows(case: str, D: int, dtype: torch.dtype) -> None:
    ids, E = ids_of(case)
    ids = ids[:21]
    x = random(ids.shape[0], D, dtype=dtype)
    assert why_not(x, ids, E) is None
    for mine, reference in zip(dispatch(x, ids, E), dispatch_reference(x, ids, E), strict=True):
        assert torch.equal(mine, reference)


def test_strided_tokens() -> None:
    ids, E = ids_of("odd sizes")
    x = random(1, 24).expand(63, 24)
    assert torch.equal(dispatch(x, ids, E)[0], dispatch_reference(x, ids, E)[0])


def test_shapes_without_a_gpu() -> None:
    with FakeTensorMode():
        x = torch.empty(6, 16, dtype=torch.bfloat16, device="cuda")
        ids = torch.empty(6, 2, dtype=torch.int64, device="cuda")
        x_R, ends, order = dispatch(x, ids, 5)
        routing = route_rows(ids, 5, 16)
    assert [(*t.shape, t.dtype) for t in routing] == [(*s, torch.int32) for s in ((12,), (5,), (12,), (6, 3))]
    assert (x_R.shape, x_R.dtype, x_R.device.type) == ((12, 16), torch.bfloat16, "cuda")
    assert (ends.shape, ends.dtype, order.shape, order.dtype) == (
        (5,),
        torch.int32,
        (12,),
        torch.int32,
    )


def test_says_why_not() -> None:
    x, ids = torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int64)
    assert why_not(x.double(), ids, 4) == "x is torch.float64 with 2 dimensions, expected bf16, f16 or f32 with 2"
    assert why_not(x, ids.float(), 4) == "ids are torch.float32 with 2 dimensions, expected integers with 2"
    assert why_not(x, ids, 0) == "0 experts, expected 1 to 1022"
    assert why_not(x, ids, 2000) == "2000 experts, expected 1 to 1022"
    assert why_not(x, ids[:, :0], 4) == "ids have 0 experts per token"
    with pytest.raises(ValueError, match="2000 experts"):
        dispatch(x, ids, 2000)
    with pytest.raises(ValueError, match="tiles of 0 rows"):
        route_rows(ids, 4, 0)
