"""Offsets past 2**31 elements, kernel by kernel: a few rows in memory that is reserved and never touched.

Row tiles are made by hand, or program numbers start late, so that only those rows are computed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compile.kernels import combine as combine_file
from moe_compile.kernels import combine_backward as combine_backward_file
from moe_compile.kernels import counting_sort as sort_file
from moe_compile.kernels import dispatch as dispatch_file
from moe_compile.kernels import gated_gemm as gated_gemm_file
from moe_compile.kernels import gated_gemm_backward as gated_gemm_backward_file
from moe_compile.kernels import grouped_gemm as grouped_gemm_file
from moe_compile.kernels import grouped_gemm_dw as grouped_gemm_dw_file
from moe_compile.kernels import settings

from .conftest import DEVICE, ON_GPU, offsets, random

D, ROWS = 16, 5  # numbers of a row; rows that are looked at
FAR = 2**27 + 9  # the first of them: past 2**31 elements
R = FAR + ROWS
HERE = slice(FAR, R)
late = pytest.mark.skipif(ON_GPU, reason="only the interpreter can start at a later program")


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Not here: it would touch the memory."""


@pytest.fixture(autouse=True)
def one_setting() -> Iterator[None]:
    """Few rows would have other tiles than many, whose sums a GPU may round otherwise."""
    tiles = (16, 16, 16, 4, 2)
    with (
        settings.pinned("grouped_gemm", "d packed", tiles),
        settings.pinned("gated_gemm", "gated", tiles),
        settings.pinned("gated_gemm_backward", "gated", (*tiles[:3], 1, *tiles[3:])),
    ):
        yield


def reserved(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Memory that nobody touches; its numbers are whatever."""
    try:
        return torch.empty(*shape, dtype=dtype, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"some GiB of address space: {error}")


def rows(seed: int, width: int = D) -> tuple[Tensor, Tensor]:
    """(some rows, the same at the far end of memory)."""
    near, far = random(ROWS, width, dtype=torch.float16, seed=seed), reserved(R, width)
    far[HERE] = near
    return near, far


def one_tile(monkeypatch: pytest.MonkeyPatch, file: ModuleType) -> None:
    """The only row tile is the far end's, and the second expert's."""
    tile = torch.tensor([[1, FAR, R]], dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(file, "row_tiles", lambda *_: (tile, 1))


@contextmanager
def programs_from(first: int) -> Iterator[None]:
    """Program number 0 becomes `first`, and so on."""
    from triton.runtime.interpreter import interpreter_builder as builder

    def later(x: int, y: int, z: int) -> None:
        builder.grid_idx = (first + x, y, z)

    builder.set_grid_idx = later
    try:
        yield
    finally:
        del builder.set_grid_idx


def test_grouped_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = rows(0)
    w = random(2, D, D, dtype=torch.float16, seed=1)
    wanted = grouped_gemm_file.grouped_gemm(near, w, offsets(0, ROWS))
    one_tile(monkeypatch, grouped_gemm_file)
    assert torch.equal(grouped_gemm_file.grouped_gemm(far, w, offsets(FAR, ROWS))[HERE], wanted)
    tile = torch.tensor([[2, FAR, R]], dtype=torch.int32, device=DEVICE)  # rows behind the last offset
    monkeypatch.setattr(grouped_gemm_file, "row_tiles", lambda *_: (tile, 1))
    y = grouped_gemm_file.grouped_gemm(far, w, offsets(0, 0))
    assert not y[HERE].any()


def routing() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(offsets, order) of the rows alone, in which token t is row t, and of those at the far end."""
    near = torch.arange(ROWS, dtype=torch.int32, device=DEVICE)
    far = reserved(R, dtype=torch.int32)
    far[HERE] = near + FAR
    return (offsets(0, ROWS), near), (offsets(FAR, ROWS), far)


def test_gated_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = rows(0)
    w = random(2, 2 * D, D, dtype=torch.float16, seed=1)
    of_near, of_far = routing()
    wanted = gated_gemm_file.gated_gemm(near, None, w, *of_near, 1, "silu", True, True)
    one_tile(monkeypatch, gated_gemm_file)
    found = gated_gemm_file.gated_gemm(far, None, w, *of_far, 1, "silu", True, True)
    for mine, other in zip(found, wanted, strict=True):
        assert torch.equal(mine[HERE], other)


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_gated_gemm_backward(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (dout, far_dout), (h, far_h) = rows(0), rows(2, 2 * D)
    down = random(2, D, D, dtype=torch.float16, seed=1)
    of_near, of_far = routing()
    run, rest = gated_gemm_backward_file.gated_gemm_backward, (1, "silu", True, apart, True, False)
    wanted = run(dout, down, h, None, *of_near, *rest)
    one_tile(monkeypatch, gated_gemm_backward_file)
    dh, a, _ = run(far_dout, down, far_h, None, *of_far, *rest)
    assert torch.equal(dh[:, HERE], wanted[0])
    assert torch.equal(a[HERE], wanted[1])


@late
@pytest.mark.parametrize("how", ["rows", "gathered", "described"])
def test_grouped_gemm_dw(how: str) -> None:
    """Far rows, for the second of two experts; its one program is the second."""
    (dy, far_dy), (x, far_x) = rows(0), rows(1)
    _, (_, order) = routing()
    wanted = grouped_gemm_dw_file.grouped_gemm_dw(dy, x, offsets(0, ROWS))[1]
    dw, K, operands = torch.zeros(2, D, D, dtype=torch.float16), int(how == "gathered"), (far_dy, far_x)
    if how == "described":
        operands = grouped_gemm_dw_file.described(*operands, 0, 0, (16, 16, 16))
    with programs_from(1):
        run(grouped_gemm_dw_file._grouped_gemm_dw_kernel, 1)(
            *operands, order, offsets(FAR, ROWS), dw, 2, D, D, K, K, 16, 16, 16, 8, how == "described", False
        )
    assert torch.equal(dw[1], wanted) and not dw[0].any()


@late
def test_grouped_gemm_dw_of_a_late_expert() -> None:
    """Its gradient begins past 2**31."""
    e, width = 2**23 + 1, 16
    dy, x = random(ROWS, width, dtype=torch.float16), random(ROWS, width, dtype=torch.float16, seed=1)
    wanted = grouped_gemm_dw_file.grouped_gemm_dw(dy, x, offsets(ROWS))[0]
    dw, ends = reserved(e + 1, width, width), reserved(e + 1, dtype=torch.int32)
    ends[e - 1], ends[e] = 0, ROWS
    with programs_from(e):
        run(grouped_gemm_dw_file._grouped_gemm_dw_kernel, 1)(
            dy, x, ends, ends, dw, e + 1, width, width, 0, 0, 16, 16, 16, 8, False, False
        )
    assert torch.equal(dw[e], wanted)


def run(kernel: Any, *grid: int) -> Any:
    return kernel[grid]


@late
def test_sort() -> None:
    """Counts and sums of 1024 keys past 2**31, of blocks of 16 pairs; only the last two blocks have any."""
    bins, block, last = 1024, 16, 2**21 + 1
    pairs = (last + 1) * block - 3
    ids, counts = reserved(pairs, dtype=torch.int16), reserved(last + 1, bins, dtype=torch.int32)
    ids[-29:] = torch.arange(29, dtype=torch.int16) % 7
    with programs_from(last - 1):
        run(sort_file._count_kernel, 2)(ids, counts, pairs, 1021, bins, block)
    counts = counts[last - 1 :]
    for row, some in zip(counts, (ids[-29:-13], ids[-13:]), strict=True):
        assert torch.equal(row[:1022], torch.bincount(some.long(), minlength=1022).int())
    sums, order = reserved(last + 2, bins, dtype=torch.int32), reserved(29, dtype=torch.int32)
    ends = reserved(1021, dtype=torch.int32)
    run(sort_file._sum_kernel, bins // 16)(counts, sums[last - 1 :], 2, bins, 16, 16)
    assert not sums[last - 1].any() and torch.equal(sums[last:], counts.cumsum(0).int())
    with programs_from(last - 1):
        run(sort_file._order_kernel, 2)(
            ids, sums, order, ends, order, order, pairs, last + 1, 0, 1021, bins, block, 16, 4, 3, 0
        )
    assert torch.equal(order, torch.argsort(ids[-29:], stable=True).int() + (pairs - 29))


@late
def test_dispatch() -> None:
    """Far rows of far tokens."""
    near, far = rows(0)
    out, (_, (_, order)) = reserved(R, D), routing()
    order[HERE] = order[HERE].flip(0)
    with programs_from(FAR):
        run(dispatch_file._gather_kernel, ROWS, 1)(far, order, out, R, 1, D, 16)
    assert torch.equal(out[HERE], near.flip(0))


def pairs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, dout, weights, positions), of which the last rows and tokens are known; one expert a token."""
    position, weights = reserved(R, dtype=torch.int32), reserved(R, 1)
    position[HERE] = torch.arange(FAR, R, dtype=torch.int32).flip(0)
    weights[HERE] = random(ROWS, 1, dtype=torch.float16, seed=2)
    return rows(0)[1], rows(1)[1], weights, position


@late
def test_combine() -> None:
    y, _, weights, position = pairs()
    out = reserved(R, D)
    with programs_from(FAR):
        run(combine_file._combine_kernel, ROWS, 1)(y, weights, position, offsets(R), out, R, 1, 1, D, True, 16)
    assert torch.equal(out[HERE], weights[HERE] * y[HERE].flip(0))


@late
def test_combine_backward() -> None:
    y, dout, weights, position = pairs()
    dy, dweights = reserved(R, D), reserved(R, 1)
    with programs_from(FAR):
        run(combine_backward_file._combine_backward_kernel, ROWS)(
            dout, y, weights, position, offsets(R), dy, dweights, R, 1, 1, D, 1, 16
        )
    assert torch.equal(dy[HERE].flip(0), weights[HERE] * dout[HERE])
    dots = (dout[HERE].float() * y[HERE].flip(0).float()).sum(1, keepdim=True)
    torch.testing.assert_close(dweights[HERE], dots.half())


@pytest.mark.parametrize("axis", range(3), ids=["experts", "rows", "columns"])
def test_weights_with_a_far_stride(axis: int) -> None:
    """The second expert, row or column begins past 2**31; the memory between is unused."""
    size, far = [2, 16, 16], 2**31 + 64
    size[axis] = 2
    packed = random(*size, dtype=torch.float16)
    stride = [far if i == axis else packed.stride(i) for i in range(3)]
    w = torch.as_strided(reserved(far + packed.numel()), size, stride).copy_(packed)
    (ends, order), _ = routing()
    ends = ends - torch.tensor([-2, 0], dtype=torch.int32, device=DEVICE)  # both experts have rows
    x = random(ROWS, size[2], dtype=torch.float16, seed=1)
    assert torch.equal(grouped_gemm_file.grouped_gemm(x, w, ends), grouped_gemm_file.grouped_gemm(x, packed, ends))
    mine, wanted = (
        gated_gemm_file.gated_gemm(x, None, v, ends, order, 1, "silu", False, True) for v in (w, packed)
    )  # fmt: skip
    assert all(map(torch.equal, mine, wanted))
    dout, h = random(ROWS, size[1], dtype=torch.float16, seed=2), random(ROWS, size[2], dtype=torch.float16, seed=3)
    rest = h, None, ends, order, 1, "silu", False, False, True, False
    mine, wanted = (gated_gemm_backward_file.gated_gemm_backward(dout, v, *rest) for v in (w, packed))
    assert all(map(torch.equal, mine, wanted))
