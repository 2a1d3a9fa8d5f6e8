"""Persistent grids (PROGRAMS of kernels/settings.py): fewer programs, the same tiles, the same bits."""

import pytest
import torch
import triton
import triton.language as tl

from moe_compile.kernels import grouped_gemm as grouped_gemm_file
from moe_compile.kernels import settings
from moe_compile.kernels.dispatch import sort_by_expert
from moe_compile.kernels.gated_gemm import gated_gemm
from moe_compile.kernels.gated_gemm_backward import gated_gemm_backward
from moe_compile.kernels.grouped_gemm import grouped_gemm
from moe_compile.kernels.grouped_gemm_dw import grouped_gemm_dw
from moe_compile.kernels.tiles import column_in_turn, num_programs, row_in_turn

from .conftest import DEVICE, random
from .test_gated_gemm import GPT_OSS, SHAPES
from .test_gated_gemm_backward import check

SETTING = (16, 32, 32, 4, 2)


@pytest.mark.parametrize("tma", [0, 1], ids=["pointers", "TMA"])
@pytest.mark.parametrize("shape", ["odd sizes", "no rows", "nobody's"])
def test_the_same_bits(shape: str, tma: int) -> None:
    """New memory holds NaN, so a tile that no program takes shows."""
    ids, E, D, F = SHAPES[shape]
    D, F = 8 * D, 8 * F  # what a descriptor can have
    order, offsets = sort_by_expert(ids.to(DEVICE), E)
    x, w, bias = (random(*s, dtype=torch.float16) for s in ((ids.shape[0], D), (E, 2 * F, D), (E, 2 * F)))
    found = []
    for programs in (0, 1, 3):
        setting = (*SETTING, tma, programs)
        with (
            settings.pinned("gated_gemm", "gated", setting),
            settings.pinned("grouped_gemm", "d packed", setting),
        ):
            a, h = gated_gemm(x, None, w, offsets, order, ids.shape[1], GPT_OSS, True, True, bias)
            found.append((a, h, grouped_gemm(h, w.mT.contiguous()[:, :, : 2 * F], offsets)))
    assert not any(v.isnan().any() for v in found[0])
    for some in found[1:]:
        assert all(map(torch.equal, some, found[0]))


MORE = {"more experts than rows": (torch.tensor([[1, 37]]), 40, 2, 2)}


@pytest.mark.parametrize("tma", [0, 1], ids=["pointers", "TMA"])
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("shape", ["odd sizes", "one takes all", "no rows", "nobody's", "more experts than rows"])
def test_the_same_bits_of_the_backward(shape: str, apart: bool, tma: int) -> None:
    """And those of float64, but for roundings; zeros for experts without rows."""
    ids, E, D, F = (SHAPES | MORE)[shape]
    (T, K), R, D, F = ids.shape, ids.numel(), -(-D // 8) * 8, -(-F // 8) * 8
    order, offsets = sort_by_expert(ids.to(DEVICE), E)
    dout, down, h, weights = (
        random(*s, dtype=torch.float16, seed=i) for i, s in enumerate(((T, D), (E, D, F), (R, 2 * F), (T, K)))
    )
    h[int(offsets[-1]) :] = 0
    args = dout, down / D**0.5, h, weights, offsets, order, K
    found = []
    for programs in (0, 1, 3):
        with (
            settings.pinned("gated_gemm_backward", "gated", (*SETTING[:3], 2, *SETTING[3:], tma, programs)),
            settings.pinned("grouped_gemm_dw", "gathered", (*SETTING, tma, programs)),
        ):
            back = gated_gemm_backward(*args, "silu", True, apart, True, True)
            found.append((*back, grouped_gemm_dw(dout, back[1], offsets, order, K, 0)))
    assert not any(v.isnan().any() for v in found[0])
    for some in found[1:]:
        assert all(map(torch.equal, some, found[0]))
    check(found[0][:3], args, "silu", True, scaled=True)
    counts = torch.diff(offsets, prepend=offsets.new_zeros(1))
    assert not found[0][3][counts == 0].any()


@triton.jit
def _turns_kernel(out_ptr, num_rows, COLS: tl.constexpr, GROUP_M: tl.constexpr):
    i = tl.program_id(0)
    tl.store(out_ptr + 2 * i, row_in_turn(i, num_rows, COLS, GROUP_M))
    tl.store(out_ptr + 2 * i + 1, column_in_turn(i, num_rows, COLS, GROUP_M))


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_neighbours_share_a_column(rows: int) -> None:
    """Each tile once; rows fastest, four at a time."""
    out = torch.empty(5 * rows, 2, dtype=torch.int32, device=DEVICE)
    _turns_kernel[(5 * rows,)](out, rows, 5, 4)
    groups = [range(first, min(first + 4, rows)) for first in range(0, rows, 4)]
    assert out.tolist() == [[row, column] for group in groups for column in range(5) for row in group]


def test_programs_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many programs as were asked for, and no more than tiles."""
    counts: list[int] = []

    def note(*args) -> int:
        counts.append(num_programs(*args))
        return counts[-1]

    monkeypatch.setattr(grouped_gemm_file, "num_programs", note)
    x, w, offsets = random(70, 32), random(2, 64, 32, seed=1), torch.tensor([40, 70], device=DEVICE).int()
    wanted = grouped_gemm(x, w, offsets)
    for programs in (0, 2):
        with settings.pinned("grouped_gemm", "d packed", (*SETTING, 0, programs)):
            torch.testing.assert_close(grouped_gemm(x, w, offsets), wanted, rtol=1e-5, atol=1e-5)
    tiles = (3 + (70 - 3) // 16) * 2
    device = torch.device(DEVICE)
    per = num_programs(10**6, 1, 1, device)
    assert counts[1:] == [tiles, min(tiles, 2 * per)]
    assert num_programs(3, 2, 0, device) == 6 and num_programs(1, 1, 2, device) == 1
