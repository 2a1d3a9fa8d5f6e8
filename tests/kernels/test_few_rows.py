"""Few rows, as in decoding: how many tiles there are, that they hold every row once, and products of a few rows."""

import pytest
import torch

from moe_compile.kernels import grouped_gemm as grouped_gemm_file
from moe_compile.kernels import settings
from moe_compile.kernels.gated_gemm import _seed as gated_seed
from moe_compile.kernels.grouped_gemm import _seed
from moe_compile.kernels.tiles import fills, row_tiles

from .conftest import DEVICE, DTYPES, offsets, random
from .test_cuda import DEFINITION, OURS, assert_near, everything

# (rows of each expert, rows behind the last)
COUNTS = {
    "one row": ([0, 0, 1, 0, 0, 0, 0], 0),
    "only a row of nobody's": ([0] * 7, 1),
    "no rows": ([0] * 7, 0),
    "a row each, and one of nobody's": ([1] * 7, 1),
    "fewer than experts": ([0, 1, 0, 2, 1, 0, 0], 0),
    "fewer than experts, and nobody's": ([0, 1, 0, 2, 1, 0, 0], 2),
    "all to one": ([0, 0, 0, 40, 0, 0, 0], 0),
    "one more than whole tiles": ([17, 17, 17, 17, 17, 17, 17], 17),
    "whole tiles": ([16, 0, 32, 0, 16, 0, 0], 16),
    "one expert": ([5], 0),
}


@pytest.mark.parametrize("case", COUNTS)
def test_tiles_hold_every_row_once(case: str) -> None:
    counts, tail = COUNTS[case]
    R, E, block = sum(counts) + tail, len(counts), 16
    tiles, number = row_tiles(offsets(*counts), R, block)
    groups = min(R, E + 1)
    assert number == tiles.shape[0] == max(groups + (R - groups) // block, 1)
    owner = torch.repeat_interleave(torch.arange(E + 1), torch.tensor([*counts, tail]))
    seen = torch.zeros(R, dtype=torch.int64)
    for e, first, end in tiles.tolist():
        if e <= E:
            rows = slice(first, min(first + block, end))
            assert rows.start < rows.stop and (owner[rows] == e).all()
            seen[rows] += 1
    assert (seen == 1).all()


def test_the_number_of_tiles_is_the_least_that_always_suffices() -> None:
    """Some routing needs each: a row to each of as many groups as there can be, the rest to one of them."""
    E, block = 7, 16
    for R in (1, 6, 7, 8, 9, 23, 24, 25, 40):
        groups = min(R, E + 1)
        counts = [R - groups + 1, *[1] * (groups - 1), *[0] * (E + 1 - groups)]
        tiles, number = row_tiles(offsets(*counts[:E]), R, block)
        assert (tiles[:, 0] <= E).sum() == number


@pytest.mark.parametrize("case", COUNTS)
def test_few_rows(case: str) -> None:
    counts, tail = COUNTS[case]
    x, w = random(sum(counts) + tail, 48), random(len(counts), 40, 48, seed=1)
    y = grouped_gemm_file.grouped_gemm(x, w, offsets(*counts))
    exact = grouped_gemm_file.grouped_gemm_reference(x.double(), w.double(), offsets(*counts))
    torch.testing.assert_close(y, exact.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 20])
@pytest.mark.parametrize("separate", [False, True], ids=["stacks", "separate"])
def test_decode(separate: bool, tokens: int, dtype: torch.dtype) -> None:
    """A whole layer: rows to some of the experts, or all to one."""
    E, D, F, K = 20, 32, 48, 2
    x, weights = random(tokens, D, dtype=dtype), random(tokens, K, dtype=dtype, seed=1).abs()
    groups = [[0.3 * random(E, *s, dtype=dtype, seed=n)] for n, s in enumerate(((F, D), (F, D), (D, F)), 2)]
    if separate:
        groups = [[v.clone() for v in w] for (w,) in groups]
    spread = torch.randint(E, (tokens, K), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for ids in (spread, torch.full_like(spread, 7)):
        args = x, ids, weights, *groups, E, "silu", True
        assert_near(everything(*OURS, args), everything(*DEFINITION, args, wide=True))


def test_more_columns_where_programs_are_few() -> None:
    """For one token, Mixtral's last product has 2 tiles of 4096 columns, Qwen3's 8 of 2048; for eight, Qwen3's has 64."""
    assert not fills(2, 8, 4096, 64) and not fills(8, 128, 2048, 64) and fills(64, 128, 2048, 64)
    bf16 = torch.bfloat16
    assert _seed(0, bf16, False, True) == (16, 64, 128, 4, 4) and _seed(0, bf16, False, False) == (16, 32, 128, 4, 6)
    assert _seed(512, bf16, False, False) == _seed(512, bf16, False, True) == (128, 128, 64, 8, 3)
    for filled in (False, True):
        for dtype in (torch.float32, bf16):
            for hip in (False, True):
                setting = _seed(1, dtype, hip, filled)
                assert settings.checked("grouped_gemm", setting)[0] == 16
                assert settings.checked("gated_gemm", gated_seed(1, dtype, True, hip, filled))[1] == setting[1] // 2
