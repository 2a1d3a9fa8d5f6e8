"""kernels/combine.py against its reference in float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_compile.kernels.combine import combine, combine_reference, positions, why_not
from moe_compile.ops import sort_by_expert

from .conftest import DEVICE, DTYPES, random

# (T, K, E, D, lowest id, highest id)
SHAPES = {
    "odd sizes": (21, 3, 5, 33, 0, 5),
    "wide": (3, 2, 4, 1025, 0, 4),
    "one token": (1, 1, 1, 1, 0, 1),
    "no tokens": (0, 2, 4, 16, 0, 4),
    "ids out of range": (30, 3, 4, 20, -3, 8),
    "nobody takes any": (7, 2, 4, 20, -3, 0),
    "top 8": (17, 8, 64, 24, 0, 64),
}


def operands(shape: str, dtype: torch.dtype):
    T, K, E, D, low, high = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    order, ends = sort_by_expert(torch.randint(low, high, (T, K), generator=generator), E)
    y, weights = random(T * K, D, dtype=dtype), random(T, K, dtype=dtype, seed=1)
    y[int(ends[-1]) :] = float("nan")  # rows that nobody computed must not be read
    return y, weights, order.to(DEVICE), ends.to(DEVICE)


def check(y, weights, order, ends, top_k) -> None:
    out = combine(y, weights, order, ends, top_k)
    wide = weights if weights is None else weights.double()
    reference = combine_reference(y.double(), wide, order, ends, top_k)
    # One rounding of the result; an f32 sum of 8 terms is off by 1e-6.
    torch.testing.assert_close(out, reference.to(out.dtype))
    narrow = combine_reference(y, weights, order, ends, top_k)
    assert out.dtype == narrow.dtype
    assert out.shape == narrow.shape
    assert torch.equal(out, combine(y, weights, order, ends, top_k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape: str, dtype: torch.dtype) -> None:
    y, weights, order, ends = operands(shape, dtype)
    assert why_not(y, weights, order, ends, weights.shape[1]) is None
    check(y, weights, order, ends, weights.shape[1])
    check(y, None, order, ends, weights.shape[1])


def test_adds_in_the_order_of_k() -> None:
    """The same bits as the reference, where no multiplication can be contracted with the sum."""
    y, _, order, ends = operands("top 8", torch.float32)
    mine = combine(y, None, order, ends, 8)
    assert torch.equal(mine, combine_reference(y, None, order, ends, 8))


def test_mixed_dtypes_and_strides() -> None:
    y, weights, order, ends = operands("odd sizes", torch.float16)
    check(y, weights.float(), order, ends, 3)
    check(y.t().contiguous().t(), weights.t().contiguous().t(), order, ends, 3)


def test_positions_invert_the_order() -> None:
    *_, order, _ = operands("odd sizes", torch.float32)
    assert torch.equal(order[positions(order).long()], torch.arange(63, device=DEVICE).int())


def test_takes_positions(launched: list[str]) -> None:
    """The same bits, without a launch for them."""
    y, weights, order, ends = operands("odd sizes", torch.float32)
    position = positions(order)
    for w in (weights, None):
        launched.clear()
        out = combine(y, w, order, ends, 3, position)
        assert launched == ["_combine_kernel"]
        assert torch.equal(out, combine(y, w, order, ends, 3))
        assert launched[1:] == ["_invert_kernel", "_combine_kernel"]


def test_shapes_without_a_gpu() -> None:
    with FakeTensorMode():
        y, weights = (torch.empty(*s, device="cuda") for s in ((6, 8), (3, 2)))
        order, ends = (torch.empty(n, dtype=torch.int32, device="cuda") for n in (6, 4))
        weighted = combine(y.half(), weights, order, ends, 2)
        plain = combine(y.half(), None, order, ends, 2)
    assert (weighted.shape, weighted.dtype, weighted.device.type) == ((3, 8), torch.float32, "cuda")
    assert (plain.shape, plain.dtype, plain.device.type) == ((3, 8), torch.float16, "cuda")


def test_says_why_not() -> None:
    y, weights = torch.zeros(4, 8), torch.zeros(2, 2)
    order, ends = torch.zeros(4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    assert why_not(y.double(), None, order, ends, 2) == "y is torch.float64, expected bf16, f16 or f32"
    assert why_not(y, weights.double(), order, ends, 2) == "weights are torch.float64, expected bf16, f16 or f32"
    assert why_not(y, None, order.long(), ends, 2) == "order is torch.int64 and offsets are torch.int32, expected int32"
    assert why_not(y, None, order, ends, 0) == "top_k is 0, expected 1 to 64"
    assert why_not(y, weights, order, ends, 4) == "top_k is 4, weights have 2 per token"
    assert why_not(y, None, order, ends[:0], 2) == "offsets are for 0 experts"
    reason = "positions are torch.int64 with 1 dimensions, expected int32 with 1"
    assert why_not(y, None, order, ends, 2, order.long()) == reason
    with pytest.raises(ValueError, match=r"positions are torch\.int64"):
        combine(y, None, order, ends, 2, order.long())
    with pytest.raises(ValueError, match="top_k is 100"):
        combine(y, None, order, ends, 100)
