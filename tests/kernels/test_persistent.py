"""Persistent grids (PROGRAMS of kernels/settings.py): fewer programs, the same tiles, the same bits."""

import pytest
import torch

from moe_compile.kernels import grouped_gemm as grouped_gemm_file
from moe_compile.kernels import settings
from moe_compile.kernels.dispatch import sort_by_expert
from moe_compile.kernels.gated_gemm import gated_gemm
from moe_compile.kernels.grouped_gemm import grouped_gemm
from moe_compile.kernels.tiles import num_programs

from .conftest import DEVICE, random
from .test_gated_gemm import GPT_OSS, SHAPES

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
