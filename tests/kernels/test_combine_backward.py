"""kernels/combine_backward.py against its reference in float64, and against autograd."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_compile.kernels.combine_backward import (
    combine_backward,
    combine_backward_reference,
    why_not,
)
from moe_compile.ops import combine

from .conftest import DTYPES, random
from .test_combine import SHAPES, operands


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape: str, dtype: torch.dtype) -> None:
    y, weights, order, ends = operands(shape, dtype)
    dout = random(weights.shape[0], y.shape[1], dtype=dtype, seed=2)
    assert why_not(dout, y, weights, order, ends) is None
    mine = combine_backward(dout, y, weights, order, ends)
    wide = (dout.double(), y.double(), weights.double())
    for value, reference in zip(mine, combine_backward_reference(*wide, order, ends), strict=True):
        # One rounding of the result; the f32 sum over D = 1025 is off by 1e-5.
        reference = reference.to(dtype)
        if dtype == torch.float32:
            torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-4)
        else:
            torch.testing.assert_close(value, reference)
    again = combine_backward(dout, y, weights, order, ends)
    assert torch.equal(mine[0], again[0])
    assert torch.equal(mine[1], again[1])


@pytest.mark.parametrize("shape", ["odd sizes", "ids out of range"])
def test_is_the_gradient_of_combine(shape: str) -> None:
    y, weights, order, ends = operands(shape, torch.float32)
    y = y.nan_to_num()
    wide = [v.double().requires_grad_() for v in (y, weights)]  # for the definition, on any device
    out = combine(*wide, order, ends, weights.shape[1])
    dout = random(*out.shape, seed=2)
    reference = tuple(g.float() for g in torch.autograd.grad(out, wide, dout.double()))
    mine = combine_backward(dout, y, weights, order, ends)
    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-4)


def test_mixed_dtypes_and_strides() -> None:
    y, weights, order, ends = operands("odd sizes", torch.float16)
    dout = random(1, 1).expand(21, 33)  # f32, as the gradient of a sum arrives
    dy, dweights = combine_backward(dout, y, weights.float(), order, ends)
    dy_ref, dweights_ref = combine_backward_reference(dout, y, weights.float(), order, ends)
    assert (dy.dtype, dweights.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(dy, dy_ref)
    torch.testing.assert_close(dweights, dweights_ref, rtol=1e-5, atol=1e-4)


def test_shapes_without_a_gpu() -> None:
    with FakeTensorMode():
        dout, y, weights = (torch.empty(*s, device="cuda") for s in ((3, 8), (6, 8), (3, 2)))
        order, ends = (torch.empty(n, dtype=torch.int32, device="cuda") for n in (6, 4))
        dy, dweights = combine_backward(dout, y.half(), weights, order, ends)
    assert (dy.shape, dy.dtype, dy.device.type) == ((6, 8), torch.float16, "cuda")
    assert (dweights.shape, dweights.dtype) == ((3, 2), torch.float32)


def test_says_why_not() -> None:
    dout, y, weights = torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(2, 2)
    order, ends = torch.zeros(4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    assert (
        why_not(dout.double(), y, weights, order, ends)
        == "dout is torch.float64 (2, 8), expected bf16, f16 or f32 in 2-D"
    )
    assert (
        why_not(dout, y, weights, order, ends.long())
        == "order is torch.int32 and offsets are torch.int64, expected int32"
    )
    assert why_not(dout, y, weights[:, :0], order, ends) == "top_k is 0, expected 1 to 64"
    assert why_not(dout, y, weights, order, ends[:0]) == "offsets are for 0 experts"
    with pytest.raises(ValueError, match="top_k is 0"):
        combine_backward(dout, y, weights[:, :0], order, ends)
