"""Rounding errors of the kernels beside those of PyTorch's own products, an expert at a time (cuBLAS on a GPU)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile import cuda

from .conftest import ON_GPU, random

# a GPU's pipelines are full, and several warps work on a tile; the interpreter takes what it can
T, D, FF, E, K = (4096, 2048, 768, 16, 4) if ON_GPU else (96, 128, 64, 5, 2)
NAMES = ("out", "dx", "dweights", "dup", "ddown")


def loop(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Experts as models write them, every product and every result in the type of the weights."""
    out = torch.zeros_like(x)
    for e in range(E):
        t, k = torch.where(ids == e)
        gate, linear = F.linear(x[t], up[e]).chunk(2, -1)
        out.index_add_(0, t, (F.linear(F.silu(gate) * linear, down[e]) * weights[t, k, None]).to(x.dtype))
    return out


def results(wide: bool, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """(x, weights, up, down; ids; out and gradients by the loop), the latter in f64 if `wide`."""
    values = [
        random(T, D),
        random(T, K, seed=1).softmax(-1),
        D**-0.5 * random(E, 2 * FF, D, seed=2),
        random(E, D, FF, seed=3),
    ]
    ids = random(T, E, seed=4).topk(K).indices
    values = [v.to(dtype) for v in values]
    leaves = [(v.double() if wide else v.clone()).requires_grad_() for v in values]
    out = loop(leaves[0], ids, *leaves[1:])
    out.backward(random(T, D, seed=5).to(dtype).to(out.dtype))
    return values, ids, [out.detach(), *(v.grad for v in leaves if v.grad is not None)]


def by_kernels(ids: Tensor, x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> list[Tensor]:
    out, h, offsets, order = cuda.mlp(x, ids, weights, [], [up], [down], E, "silu", True)
    dout = random(T, D, seed=5).to(x.dtype)
    back = cuda.mlp_backward(dout, x, h, weights, offsets, order, [], [up], [down], "silu", True, True, True)
    return [out, back[0], back[1], back[3], back[4]]


def error(mine: Tensor, exact: Tensor) -> float:
    """Root of the mean of squares, relative to the numbers'."""
    return float((mine.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_worse_than_a_product_an_expert(dtype: torch.dtype) -> None:
    values, ids, exact = results(True, dtype)
    _, _, theirs = results(False, dtype)
    ours = by_kernels(ids, *values)
    assert all(map(torch.equal, ours, by_kernels(ids, *values)))
    ratios = {n: error(a, c) / error(b, c) for n, a, b, c in zip(NAMES, ours, theirs, exact, strict=True)}
    assert max(ratios.values()) <= 1.0, ratios
    assert min(error(b, c) for b, c in zip(theirs, exact, strict=True)) > torch.finfo(dtype).eps / 8  # they do round
