"""moe_compile/cuda.py: each op by its kernel, where the kernel takes the arguments, else by its definition."""

from typing import Any

import pytest
import torch

from moe_compile import cuda, ops
from moe_compile.kernels import grouped_gemm

from .conftest import DEVICE, random

E, K, T, D, F = 3, 2, 7, 16, 32


def arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    ids = torch.tensor([[0, 2], [2, 1], [5, 0], [2, 0], [0, 2], [-1, 2], [2, 0]], device=DEVICE)
    x, w, weights = random(T, D, dtype=dtype), random(E, F, D, dtype=dtype), random(T, K, dtype=dtype, seed=1)
    x_RD, offsets, order = ops.dispatch_reference(x, ids, E)
    y = random(T * K, F, dtype=dtype, seed=2)
    return {
        "dispatch": (x, ids, E),
        "grouped_gemm": (x_RD, [w], offsets),
        "grouped_gemm_dw": (y, x_RD, offsets),
        "combine": (y, weights, order, offsets, K),
        "combine_backward": (random(T, F, dtype=dtype, seed=3), y, weights, order, offsets),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", arguments(torch.float32))
def test_values(op: str, dtype: torch.dtype) -> None:
    args = arguments(dtype)[op]
    want = getattr(ops, f"{op}_reference")(*args)
    torch.testing.assert_close(getattr(cuda, op)(*args), want, rtol=1e-5, atol=1e-5)


def test_separate_weights() -> None:
    x, (w,), offsets = arguments(torch.float32)["grouped_gemm"]
    torch.testing.assert_close(cuda.grouped_gemm(x, list(w), offsets), cuda.grouped_gemm(x, [w], offsets))


def test_who_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for f32; the definition for f64, which no kernel takes."""
    kernels: list[torch.dtype] = []
    run = grouped_gemm.grouped_gemm
    monkeypatch.setattr(grouped_gemm, "grouped_gemm", lambda x, *more: (kernels.append(x.dtype), run(x, *more))[1])
    for dtype in (torch.float32, torch.float64):
        cuda.grouped_gemm(*arguments(dtype)["grouped_gemm"])
    assert kernels == [torch.float32]


@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU: the ops' own kernels are those of the CPU")
@pytest.mark.parametrize("op", arguments(torch.float32))
def test_registered(op: str) -> None:
    args = arguments(torch.float32)[op]
    torch.testing.assert_close(getattr(ops, op)(*args), getattr(ops, f"{op}_reference")(*args), rtol=1e-5, atol=1e-5)
