"""Tiles of weights by tensor descriptors: the same bits as by pointers, where there is a descriptor, else pointers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compile.kernels import gated_gemm as gated_gemm_file
from moe_compile.kernels import gated_gemm_backward as gated_gemm_backward_file
from moe_compile.kernels import grouped_gemm as grouped_gemm_file
from moe_compile.kernels import grouped_gemm_dw as grouped_gemm_dw_file
from moe_compile.kernels import settings
from moe_compile.kernels.dispatch import sort_by_expert
from moe_compile.kernels.weights import by_descriptor, separate, stacked

from .conftest import DEVICE, ON_GPU, offsets, random
from .test_gated_gemm import GPT_OSS
from .test_gated_gemm import SHAPES as ROUTED
from .test_gated_gemm_backward import check

TILES = (16, 32, 32, 4, 2)
TILES_IN_PARTS = (16, 32, 32, 2, 4, 2)
HALF = torch.float16
pytestmark = pytest.mark.skipif(
    ON_GPU and torch.cuda.get_device_capability()[0] < 9, reason="TMA is that of Hopper and later"
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each launch that wanted a descriptor, whether it got one."""
    found: list[bool] = []

    def note(*args: Any) -> Any:
        descriptor = by_descriptor(*args)
        found.append(descriptor is not None)
        return descriptor

    for file in (grouped_gemm_file, gated_gemm_file, gated_gemm_backward_file):
        monkeypatch.setattr(file, "by_descriptor", note)
    described = grouped_gemm_dw_file.described
    monkeypatch.setattr(grouped_gemm_dw_file, "described", lambda *args: (
        found.append(described(*args) is not None), described(*args))[1])  # fmt: skip
    return found


def both_ways(kernel: str, form: str, call: Any) -> list[Any]:
    """By pointers, and by descriptors."""
    found = []
    for tma in (0, 1):
        tiles = TILES_IN_PARTS if kernel == "gated_gemm_backward" else TILES
        with settings.pinned(kernel, form, (*tiles, tma)):
            found.append(call())
    return found


# (rows of each expert, rows behind the last, D, F): one row; widths that no tile divides; whole tiles; nobody's rows
SHAPES = [([0, 1, 0], 0, 32, 32), ([5, 0, 17, 1], 0, 40, 56), ([64, 64], 0, 64, 64), ([0, 3], 20, 72, 24)]


@pytest.mark.parametrize("packed", ["d", "f"])
@pytest.mark.parametrize(("counts", "tail", "D", "F"), SHAPES)
def test_grouped_gemm(counts: list[int], tail: int, D: int, F: int, packed: str, asked: list[bool]) -> None:
    x, ends = random(sum(counts) + tail, D, dtype=HALF), offsets(*counts)
    w = random(len(counts), F, D, dtype=HALF, seed=1)
    w = w if packed == "d" else w.mT.contiguous().mT
    pointers, tma = both_ways(
        "grouped_gemm", f"{packed} packed", lambda: grouped_gemm_file.grouped_gemm(x, w, ends)
    )  # fmt: skip
    assert torch.equal(pointers, tma) and asked == [True]
    exact = grouped_gemm_file.grouped_gemm_reference(x.double(), w.double(), ends)
    torch.testing.assert_close(tma, exact.half(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("packed", ["d", "f"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize(("D", "F"), [(32, 32), (40, 56), (72, 24)])
def test_gated_gemm(D: int, F: int, gated: bool, packed: str, asked: list[bool]) -> None:
    x, w = random(11, D, dtype=HALF), random(4, 2 * F if gated else F, D, dtype=HALF, seed=1)
    w = w if packed == "d" else w.mT.contiguous().mT
    ids = torch.tensor([[0, 3], [3, 0], [9, 3]] * 3 + [[1, 0], [3, 3]], device=DEVICE)
    order, ends = sort_by_expert(ids, 4)
    rest = ends, order, 2, "silu", gated, True
    form = "gated" if gated else "plain"
    pointers, tma = both_ways("gated_gemm", form, lambda: gated_gemm_file.gated_gemm(x, None, w, *rest))
    assert all(map(torch.equal, pointers, tma)) and asked == [True]


def test_numbers_around_the_weights_are_not_read(asked: list[bool]) -> None:
    """A part of something larger, NaN around it: beyond a row, beyond the rows, beyond the experts."""
    around = torch.full((4, 64, 64), float("nan"), dtype=HALF, device=DEVICE)
    w = around[1:3, 8:48, 8:48].copy_(random(2, 40, 40, dtype=HALF, seed=1))
    x, ends = random(9, 40, dtype=HALF), offsets(4, 5)
    pointers, tma = both_ways("grouped_gemm", "d packed", lambda: grouped_gemm_file.grouped_gemm(x, w, ends))
    assert torch.equal(pointers, tma) and tma.isfinite().all() and asked == [True]


def odd(w: Tensor) -> Tensor:
    memory = torch.zeros(w.numel() + 1, dtype=w.dtype, device=w.device)
    return memory[1:].view(w.shape).copy_(w)


NONE = {
    "f32": lambda w: w.float(),
    "an odd address": odd,
    "rows of 20 bytes": lambda w: w[:, :, :10],
    "one for all": lambda w: w[:1].expand(3, -1, -1),
    "neither packed": lambda w: torch.stack([w, w], -1)[..., 0],
}


@pytest.mark.parametrize("why", NONE)
def test_no_descriptor(why: str, asked: list[bool]) -> None:
    w = random(3, 16, 16, dtype=HALF, seed=1)
    w = NONE[why](w.contiguous() if why != "rows of 20 bytes" else w[:, :, :10].contiguous())
    x, ends = random(9, w.shape[2], dtype=w.dtype), offsets(3, 4, 2)
    form = stacked(w).packed()
    pointers, tma = both_ways("grouped_gemm", form, lambda: grouped_gemm_file.grouped_gemm(x, w, ends))
    assert torch.equal(pointers, tma) and asked == [False]


def test_no_descriptor_of_separate_weights_nor_of_two_stacks(asked: list[bool]) -> None:
    w = random(3, 16, 16, dtype=HALF, seed=1)
    x, ends = random(9, 16, dtype=HALF), offsets(3, 4, 2)
    weights = [v.clone() for v in w]
    pointers, tma = both_ways(
        "grouped_gemm", "d packed", lambda: grouped_gemm_file.launch(x, separate(weights), ends)
    )  # fmt: skip
    assert torch.equal(pointers, tma) and asked == [False]
    order, ends = sort_by_expert(torch.arange(9, device=DEVICE).view(9, 1) % 3, 3)
    rest = ends, order, 1, "silu", True, True
    pointers, tma = both_ways("gated_gemm", "gated", lambda: gated_gemm_file.gated_gemm(x, w, w.clone(), *rest))
    assert all(map(torch.equal, pointers, tma)) and asked == [False]


def test_off_unless_a_setting_says_so(asked: list[bool]) -> None:
    x, w = random(9, 16, dtype=HALF), random(3, 16, 16, dtype=HALF, seed=1)
    grouped_gemm_file.grouped_gemm(x, w, offsets(3, 4, 2))
    with settings.pinned("grouped_gemm", "d packed", TILES):
        grouped_gemm_file.grouped_gemm(x, w, offsets(3, 4, 2))
    assert not asked
    from moe_compile import MoeCompileError

    for kernel, setting in (("grouped_gemm", (*TILES, 2)), ("grouped_gemm_scaled", (*TILES, 1))):
        with pytest.raises(MoeCompileError, match=r"TMA is|each at least 1"):
            settings.checked(kernel, setting)


# -- the backward ---------------------------------------------------------------------------

IDS = torch.tensor([[0, 3], [3, 0], [9, 3]] * 3 + [[1, 0], [3, 3]])  # of 4 experts: one is nobody's, one has no rows


@pytest.mark.parametrize("packed", ["f", "d"])
@pytest.mark.parametrize("form", ["gated", "apart", "pairs", "plain"])
@pytest.mark.parametrize(("D", "F"), [(32, 32), (40, 56), (72, 24)])
def test_gated_gemm_backward(D: int, F: int, form: str, packed: str, asked: list[bool]) -> None:
    gated, how = form != "plain", GPT_OSS if form == "pairs" else "silu"
    order, ends = sort_by_expert(IDS.to(DEVICE), 4)
    dout, down = random(11, D, dtype=HALF), random(4, D, F, dtype=HALF, seed=1) / D**0.5
    down = down if packed == "f" else down.mT.contiguous().mT
    h = random(22, 2 * F if gated else F, dtype=HALF, seed=2)
    h[int(ends[-1]) :] = 0
    args = dout, down, h, random(11, 2, dtype=HALF, seed=3), ends, order, 2
    pointers, tma = both_ways(
        "gated_gemm_backward", "gated" if gated else "plain",
        lambda: gated_gemm_backward_file.gated_gemm_backward(*args, how, gated, form == "apart", True, True),
    )  # fmt: skip
    assert all(map(torch.equal, pointers, tma)) and asked == [True]
    if form != "pairs":  # a rounding may cross a limit
        check(tma, args, how, gated, scaled=True)


@pytest.mark.parametrize("gathered", ["neither", "dy", "x", "both"])
@pytest.mark.parametrize("shape", ["odd sizes", "whole tiles", "empty experts", "one takes all", "no rows", "nobody's"])
def test_grouped_gemm_dw(shape: str, gathered: str, asked: list[bool]) -> None:
    """Rows of tokens that are gathered come by pointers, others by a descriptor, if there are any."""
    ids, E, D, F = ROUTED[shape]
    (T, K), R, D, F = ids.shape, ids.numel(), -(-D // 8) * 8, -(-F // 8) * 8
    order, ends = sort_by_expert(ids.to(DEVICE), E)
    dy_k, x_k = K if gathered in ("dy", "both") else 0, K if gathered in ("x", "both") else 0
    dy, x = random(T if dy_k else R, F, dtype=HALF), random(T if x_k else R, D, dtype=HALF, seed=1)
    args = dy, x, ends, order if dy_k or x_k else None, dy_k, x_k
    form = "rows" if gathered == "neither" else "gathered"
    pointers, tma = both_ways("grouped_gemm_dw", form, lambda: grouped_gemm_dw_file.grouped_gemm_dw(*args))
    assert torch.equal(pointers, tma) and asked == [R > 0 and gathered != "both"]
    dy_RF, x_RD = dy[order // K] if dy_k else dy, x[order // K] if x_k else x
    exact = grouped_gemm_dw_file.grouped_gemm_dw_reference(dy_RF.double(), x_RD.double(), ends)
    torch.testing.assert_close(tma, exact.half(), rtol=2e-3, atol=2e-3)  # one rounding of the result


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_of_others_do_not_leak_into_a_gradient(bad: float, asked: list[bool]) -> None:
    """A tile of rows ends where the expert ends, also where the next one's rows are no numbers."""
    dy, x, ends = random(50, 24, dtype=HALF), random(50, 40, dtype=HALF, seed=1), offsets(3, 7, 0, 20)
    dy[3:10] = x[3:10] = dy[30:] = x[30:] = bad  # the second expert, and the rows behind the last
    pointers, tma = both_ways(
        "grouped_gemm_dw", "rows", lambda: grouped_gemm_dw_file.grouped_gemm_dw(dy, x, ends)
    )  # fmt: skip
    assert torch.equal(pointers.nan_to_num(), tma.nan_to_num()) and asked == [True]
    assert tma[[0, 2, 3]].isfinite().all() and not tma[1].isfinite().any() and not tma[2].any()


def test_no_descriptor_in_the_backward(asked: list[bool]) -> None:
    """Of f32, of an odd address, of rows of 20 bytes, of separate weights."""
    ends = offsets(3, 4, 2)
    rows = random(9, 16, dtype=HALF)
    for dy, x in ((rows.float(), rows.float()), (odd(rows), rows), (rows, odd(rows)), (rows, rows[:, :10])):
        pointers, tma = both_ways(
            "grouped_gemm_dw", "rows", lambda dy=dy, x=x: grouped_gemm_dw_file.grouped_gemm_dw(dy, x, ends)
        )
        assert torch.equal(pointers, tma)
    order, ends = sort_by_expert(torch.arange(9, device=DEVICE).view(9, 1) % 3, 3)
    down = random(3, 16, 24, dtype=HALF, seed=1)
    args = random(9, 24, dtype=HALF, seed=2), None, ends, order, 1, "relu", False, False, True, False
    each = [v.clone() for v in down]
    for w in (stacked(down), separate(each)):
        pointers, tma = both_ways(
            "gated_gemm_backward", "plain", lambda w=w: gated_gemm_backward_file.launch(rows, w, *args)
        )
        assert all(map(torch.equal, pointers, tma))
    assert asked == [False] * 4 + [True, False]


@pytest.mark.parametrize("kernel", [kernel for kernel, names in settings.NAMES.items() if "TMA" in names])
def test_tuning_tries_descriptors_on_hopper_alone(kernel: str) -> None:
    from benchmarks.tried import Job, candidates

    for device, tried in (("sm_80", False), ("sm_90", True), ("sm_100", True), ("gfx942", False)):
        problem = settings.Problem(kernel, "d packed", device, "bf16", 256, 2048, 768)
        seed = (128, 128, 64, 4, 8, 3) if kernel == "gated_gemm_backward" else (128, 128, 64, 8, 3)
        found = candidates(Job(problem, seed, []), 232448)
        assert any(s[-2] == 1 for s in found) == tried and any(s[-1] == 2 for s in found)
        assert all(len(s) == len(settings.NAMES[kernel]) and settings.checked(kernel, s) == s for s in found)
