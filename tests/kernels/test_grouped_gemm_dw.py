"""kernels/grouped_gemm_dw.py against its reference in float64, and against autograd."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_compile.kernels.dispatch import sort_by_expert
from moe_compile.kernels.grouped_gemm_dw import (
    grouped_gemm_dw,
    grouped_gemm_dw_reference,
    why_not,
)
from moe_compile.ops import grouped_gemm

from .conftest import DEVICE, DTYPES, offsets, random
from .test_gated_gemm import SHAPES as ROUTED
from .test_grouped_gemm import SHAPES


def operands(shape: str, dtype: torch.dtype):
    counts, tail, D, F = SHAPES[shape]
    R = sum(counts) + tail
    return random(R, F, dtype=dtype), random(R, D, dtype=dtype, seed=1), offsets(*counts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape: str, dtype: torch.dtype) -> None:
    dy, x, ends = operands(shape, dtype)
    assert why_not(dy, x, ends) is None
    dw = grouped_gemm_dw(dy, x, ends)
    reference = grouped_gemm_dw_reference(dy.double(), x.double(), ends).to(dtype)
    # f32: sums of up to 300 products in another order.  Half: one rounding of the result.
    rtol = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(dw, reference, rtol=rtol, atol=1e-4 if rtol < 1e-4 else rtol)
    assert torch.equal(dw, grouped_gemm_dw(dy, x, ends))


@pytest.mark.parametrize("shape", ["odd sizes", "empty experts", "tail"])
def test_is_the_gradient_of_the_weights(shape: str) -> None:
    dy, x, ends = operands(shape, torch.float32)
    w = random(len(ends), dy.shape[1], x.shape[1]).double().requires_grad_()
    (dw,) = torch.autograd.grad(grouped_gemm(x.double(), [w], ends), w, dy.double())
    torch.testing.assert_close(grouped_gemm_dw(dy, x, ends), dw.float(), rtol=1e-5, atol=1e-4)


def test_rows_of_others_do_not_leak() -> None:
    dy, x, ends = operands("tail", torch.float32)
    dy[3:] = x[3:] = float("nan")  # the second expert and the tail
    dw = grouped_gemm_dw(dy, x, ends)
    assert not dw[0].isnan().any()
    assert dw[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["odd sizes", "several tiles", "empty experts", "no rows", "nobody's"])
def test_rows_gathered_as_they_are_loaded(shape: str, dtype: torch.dtype) -> None:
    """The bits of a gathered copy."""
    ids, E, D, F = ROUTED[shape]
    (T, K), R = ids.shape, ids.numel()
    order, ends = sort_by_expert(ids.to(DEVICE), E)
    per_row, per_token = random(R, F, dtype=dtype), random(T, D, dtype=dtype, seed=1)
    copy = per_token[order // K]
    for mine, theirs in (
        (grouped_gemm_dw(per_row, per_token, ends, order, 0, K), grouped_gemm_dw(per_row, copy, ends)),
        (grouped_gemm_dw(per_token, per_row, ends, order, K, 0), grouped_gemm_dw(copy, per_row, ends)),
        (grouped_gemm_dw(per_token, per_token, ends, order, K, K), grouped_gemm_dw(copy, copy, ends)),
    ):
        assert torch.equal(mine, theirs)


def test_strided_gradient() -> None:
    dy, x, ends = operands("odd sizes", torch.float32)
    dy = dy[:1].expand(dy.shape)
    reference = grouped_gemm_dw_reference(dy, x, ends)
    torch.testing.assert_close(grouped_gemm_dw(dy, x, ends), reference, rtol=1e-5, atol=1e-4)


def test_shapes_without_a_gpu() -> None:
    with FakeTensorMode():
        dy, x = (torch.empty(6, n, dtype=torch.bfloat16, device="cuda") for n in (4, 8))
        dw = grouped_gemm_dw(dy, x, torch.empty(3, dtype=torch.int32, device="cuda"))
    assert (dw.shape, dw.dtype, dw.device.type) == ((3, 4, 8), torch.bfloat16, "cuda")


def test_says_why_not() -> None:
    dy, x, ends = torch.zeros(4, 8), torch.zeros(4, 6), torch.zeros(2, dtype=torch.int32)
    mixed = "dy is torch.float32 and x is torch.float16, expected one of bf16, f16, f32"
    assert why_not(dy, x.half(), ends) == mixed
    assert why_not(dy, x, ends.long()) == "offsets are torch.int64, expected int32"
    assert why_not(dy, x[0], ends) == "dy has 2 dimensions and x 1, expected 2"
    assert why_not(dy, x, ends[:0]) == "offsets are for 0 experts"
    with pytest.raises(ValueError, match="0 experts"):
        grouped_gemm_dw(dy, x, ends[:0])
