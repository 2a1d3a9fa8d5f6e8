"""kernels/grouped_gemm.py against its reference in float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_compile import ops
from moe_compile.kernels.grouped_gemm import grouped_gemm, grouped_gemm_reference, why_not

from .conftest import DEVICE, DTYPES, ON_GPU, offsets, random

# (rows of each expert, rows behind the last, D, F)
SHAPES = {
    "odd sizes": ([5, 17, 1], 0, 33, 35),
    "several tiles": ([130, 70, 300], 3, 64, 130),
    "whole tiles": ([128, 256], 0, 128, 128),
    "empty experts": ([0, 9, 0, 0, 20, 0], 0, 48, 16),
    "one takes all": ([0, 0, 50], 0, 16, 24),
    "no rows": ([0, 0], 0, 16, 16),
    "more experts than rows": ([0, 1, 0, 0, 1] * 4, 0, 16, 16),
    "tail": ([3, 4], 70, 40, 16),
    "only a tail": ([0, 0], 37, 16, 16),
}


def operands(shape: str, dtype: torch.dtype):
    counts, tail, D, F = SHAPES[shape]
    x = random(sum(counts) + tail, D, dtype=dtype)
    return x, random(len(counts), F, D, dtype=dtype, seed=1), offsets(*counts)


def check(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> None:
    """f32: sums of up to 130 products in another order.  Half: one rounding of the result."""
    y_ref = grouped_gemm_reference(x.double(), w.double(), ends)
    rtol = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[x.dtype]
    torch.testing.assert_close(y, y_ref.to(x.dtype), rtol=rtol, atol=1e-4 if rtol < 1e-4 else rtol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape: str, dtype: torch.dtype) -> None:
    x, w, ends = operands(shape, dtype)
    assert why_not(x, w, ends) is None
    y = grouped_gemm(x, w, ends)
    check(y, x, w, ends)
    assert torch.equal(y, grouped_gemm(x, w, ends))


@pytest.mark.parametrize("shape", ["odd sizes", "several tiles", "tail"])
def test_transposed_weights_give_the_input_gradient(shape: str) -> None:
    x, w, ends = operands(shape, torch.float32)
    wide = x.double().requires_grad_()  # the definition, which autograd goes through
    y = ops.grouped_gemm(wide, [w.double()], ends)
    dy = random(*y.shape, seed=2)
    (dx,) = torch.autograd.grad(y, wide, dy.double())
    mine = grouped_gemm(dy, w.transpose(1, 2), ends)
    torch.testing.assert_close(mine, dx.float(), rtol=1e-5, atol=1e-4)


def test_rows_of_other_experts_do_not_leak() -> None:
    x, w, ends = operands("odd sizes", torch.float32)
    x[:5] = float("nan")
    assert torch.equal(grouped_gemm(x, w, ends).isnan().any(1), torch.arange(23, device=DEVICE) < 5)


def test_weights_of_any_strides() -> None:
    x, _, ends = operands("odd sizes", torch.float32)
    w = random(3, 35, 66)[:, :, ::2]  # neither F nor D is contiguous
    check(grouped_gemm(x, w, ends), x, w, ends)
    w = random(1, 35, 33).expand(3, 35, 33)
    check(grouped_gemm(x, w, ends), x, w, ends)


def test_strided_rows() -> None:
    _, w, ends = operands("odd sizes", torch.float32)
    x = random(33, 23).t()
    check(grouped_gemm(x, w, ends), x, w, ends)


def test_offsets_past_32_bits() -> None:
    """The second expert lies 2**31 + 64 elements behind the first; the memory between is unused."""
    stride = 2**31 + 64
    try:
        memory = torch.zeros(0, dtype=torch.float16, device=DEVICE)
        memory.untyped_storage().resize_(2 * (stride + 16 * 16))
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space: {error}")
    w = torch.as_strided(memory, (2, 16, 16), (stride, 16, 1))
    w.copy_(random(2, 16, 16, dtype=torch.float16))
    x, ends = random(9, 16, dtype=torch.float16), offsets(4, 5)
    y = grouped_gemm(x, w, ends)
    assert torch.equal(y, grouped_gemm(x, w.contiguous(), ends))


@pytest.mark.skipif(not ON_GPU, reason="8 GiB of rows: too slow in the interpreter")
def test_rows_past_32_bits() -> None:
    R, D = 2**21 + 3, 1024
    x = torch.zeros(R, D, dtype=torch.float16, device=DEVICE)
    x[-1] = 1
    w = random(1, 1024, D, dtype=torch.float16)
    y = grouped_gemm(x, w, offsets(R))
    torch.testing.assert_close(y[-1], w[0].float().sum(1).half(), rtol=1e-2, atol=1e-1)


def test_shapes_without_a_gpu() -> None:
    with FakeTensorMode():
        x, w = (torch.empty(*s, dtype=torch.bfloat16, device="cuda") for s in ((6, 8), (3, 4, 8)))
        y = grouped_gemm(x, w, torch.empty(3, dtype=torch.int32, device="cuda"))
    assert (y.shape, y.dtype, y.device.type) == ((6, 4), torch.bfloat16, "cuda")


def test_says_why_not() -> None:
    x, w, ends = torch.zeros(4, 8), torch.zeros(2, 6, 8), torch.zeros(2, dtype=torch.int32)
    float64 = "x is torch.float64 and w is torch.float64, expected one of bf16, f16, f32"
    assert why_not(x.double(), w.double(), ends) == float64
    mixed = "x is torch.float32 and w is torch.float16, expected one of bf16, f16, f32"
    assert why_not(x, w.half(), ends) == mixed
    assert why_not(x, w, ends.long()) == "offsets are torch.int64, expected int32"
    assert why_not(x, w[0], ends) == "x has 2 dimensions and w 2, expected 2 and 3"
    assert why_not(x, w[:1], ends) == "offsets are for 2 experts, w for 1"
    assert why_not(x[:, :7], w, ends) == "rows of x have 7 elements, those of w 8"
    assert why_not(x, w.expand(2, 6, 8)[:0], ends) == "0 experts, expected 1 to 1022"
    with pytest.raises(ValueError, match="expected int32"):
        grouped_gemm(x, w, ends.long())
