"""Tiles of weights by tensor descriptors: the same bits as by pointers, where there is a descriptor, else pointers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compile.kernels import gated_gemm as gated_gemm_file
from moe_compile.kernels import grouped_gemm as grouped_gemm_file
from moe_compile.kernels import settings
from moe_compile.kernels.dispatch import sort_by_expert
from moe_compile.kernels.weights import by_descriptor, separate, stacked

from .conftest import DEVICE, ON_GPU, offsets, random

TILES = (16, 32, 32, 4, 2)
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

    for file in (grouped_gemm_file, gated_gemm_file):
        monkeypatch.setattr(file, "by_descriptor", note)
    return found


def both_ways(kernel: str, form: str, call: Any) -> list[Any]:
    """By pointers, and by descriptors."""
    found = []
    for tma in (0, 1):
        with settings.pinned(kernel, form, (*TILES, tma)):
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

    for kernel, setting in (("grouped_gemm", (*TILES, 2)), ("grouped_gemm_dw", (*TILES, 1))):
        with pytest.raises(MoeCompileError, match=r"TMA is|each at least 1"):
            settings.checked(kernel, setting)


def test_tuning_tries_descriptors_on_hopper_alone() -> None:
    from benchmarks.tune import Job, candidates

    for device, tried in (("sm_80", False), ("sm_90", True), ("sm_100", True), ("gfx942", False)):
        problem = settings.Problem("grouped_gemm", "d packed", device, "bf16", 256, 2048, 768)
        found = candidates(Job(problem, (128, 128, 64, 8, 3), []), 232448)
        assert any(s[5:6] == (1,) for s in found) == tried
        assert all(settings.checked("grouped_gemm", s) == s for s in found)
