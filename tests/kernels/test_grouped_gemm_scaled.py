"""kernels/grouped_gemm_scaled.py against its reference in float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_compile.grouped_gemm_scaled import FLOAT8
from moe_compile.kernels import grouped_gemm as unscaled
from moe_compile.kernels import settings
from moe_compile.kernels.grouped_gemm_scaled import (
    grouped_gemm_scaled,
    grouped_gemm_scaled_reference,
    why_not,
    why_not_widened,
)

from .conftest import DEVICE, DTYPES, ON_GPU, offsets, random
from .test_grouped_gemm import SHAPES

SCALES = ("none", "by expert", "by feature")
# (rows of each expert, rows behind the last, D, F, blocks of D, blocks of F)
BLOCKS = {
    "whole tiles": ([64, 130], 0, 256, 256, 2, 2),
    "odd numbers": ([5, 17, 1], 0, 48, 35, 3, 5),
    "one block": ([0, 9], 3, 32, 24, 1, 1),
    "no rows": ([0, 0], 0, 32, 16, 2, 4),
    "only a tail": ([0, 0], 37, 32, 16, 2, 4),
    "more experts than rows": ([0, 1, 0, 0, 1] * 4, 0, 64, 16, 4, 1),
    "one takes all": ([0, 0, 50], 0, 128, 24, 1, 24),
}


def weights(*shape: int, kind: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return (20 * random(*shape, seed=1)).to(kind)


def scales(form: str, E: int, F: int, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    """Of both signs, about as weights have them that are some hundredths."""
    if form == "none":
        return None
    return (0.01 * random(*((E,) if form == "by expert" else (E, F)), seed=2)).to(dtype)


def operands(shape: str, form: str, dtype: torch.dtype, kind: torch.dtype = torch.float8_e4m3fn):
    counts, tail, D, F = SHAPES[shape]
    x = random(sum(counts) + tail, D, dtype=dtype)
    return x, weights(len(counts), F, D, kind=kind), scales(form, len(counts), F), offsets(*counts)


def check(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, s: torch.Tensor | None, ends: torch.Tensor) -> None:
    """f32: sums of up to 130 products in another order.  Half: one rounding of the result."""
    y_ref = grouped_gemm_scaled_reference(x.double(), w, s, ends)
    rtol = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[x.dtype]
    atol = rtol * max(float(y_ref.abs().max()), 1e-6) if y_ref.numel() else 0.0
    torch.testing.assert_close(y, y_ref.to(x.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape: str, form: str, dtype: torch.dtype) -> None:
    x, w, s, ends = operands(shape, form, dtype)
    if form == "none" and dtype == torch.float16:
        x = x / 64  # the sums fit
    assert why_not(x, w, s, ends) is None
    y = grouped_gemm_scaled(x, w, s, ends)
    check(y, x, w, s, ends)
    assert torch.equal(y, grouped_gemm_scaled(x, w, s, ends))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BLOCKS)
def test_scales_of_blocks(shape: str, dtype: torch.dtype) -> None:
    """Forward, and with weights and scales transposed, as the gradient of x has them."""
    counts, tail, D, F, of_d, of_f = BLOCKS[shape]
    E, ends = len(counts), offsets(*counts)
    w, s = weights(E, F, D), 0.01 * random(E, of_f, of_d, seed=2)
    x = random(sum(counts) + tail, D, dtype=dtype)
    x[sum(counts) :] = float("nan")
    for args in ((x, w, s, ends), (x, w.mT.contiguous().mT, s.mT.contiguous().mT, ends)):
        assert why_not(*args) is None
        y = grouped_gemm_scaled(*args)
        check(y, *args)
        assert torch.equal(y, grouped_gemm_scaled(*args)) and not y[sum(counts) :].any()
    exact = torch.repeat_interleave(torch.repeat_interleave(s, F // of_f, 1), D // of_d, 2).double() * w.double()
    torch.testing.assert_close(
        grouped_gemm_scaled_reference(x.double(), w, s, ends), unscaled.grouped_gemm_reference(x.double(), exact, ends)
    )
    if (F // of_f) % 16 == 0:
        dy = random(*y.shape, dtype=dtype, seed=3)
        check(grouped_gemm_scaled(dy, w.mT, s.mT, ends), dy, w.mT, s.mT, ends)


def test_steps_within_blocks() -> None:
    """A setting whose steps are wider than a block is made narrower; one of several steps a block is taken."""
    x, w, ends = random(9, 96), weights(2, 16, 96), offsets(4, 5)
    for of_d in (1, 2, 3):  # blocks of 96, 48 and 32
        s = 0.01 * random(2, 2, of_d, seed=2)
        for block_k in (16, 32, 64, 128):
            with settings.pinned("grouped_gemm_scaled", "d packed", (16, 16, block_k, 4, 2)):
                check(grouped_gemm_scaled(x, w, s, ends), x, w, s, ends)
    assert why_not(x, w, random(2, 2, 12), ends) == "scales of blocks 8 wide, expected a multiple of 16"


def test_scales_of_other_blocks_do_not_leak() -> None:
    """NaN in one block: in the columns of its features, for rows of its expert."""
    x, w, ends = random(9, 64), weights(2, 32, 64), offsets(4, 5)
    s = 0.01 * random(2, 2, 4, seed=2)
    s[1, 0, 2] = float("nan")
    nan = grouped_gemm_scaled(x, w, s, ends).isnan()
    assert nan[4:, :16].all() and not nan[:4].any() and not nan[:, 16:].any()


def test_every_number_of_float8() -> None:
    """All patterns, NaN and infinities among them, come to the product as they are."""
    for kind in FLOAT8:
        numbers = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(kind)
        if not ON_GPU:  # triton's interpreter (3.6, 3.7) takes the patterns of NaN and infinities for numbers
            numbers = numbers[numbers.float().isfinite()]
        y = grouped_gemm_scaled(torch.ones(1, 1, device=DEVICE), numbers.view(1, -1, 1), None, offsets(1))
        torch.testing.assert_close(y[0], numbers.float(), rtol=0, atol=0, equal_nan=True)


def test_e5m2_and_scales_of_16_bits() -> None:
    x, w, _, ends = operands("odd sizes", "none", torch.float32, torch.float8_e5m2)
    for dtype in (torch.float16, torch.bfloat16):
        s = scales("by feature", 3, 35, dtype)
        check(grouped_gemm_scaled(x, w, s, ends), x, w, s, ends)


def test_scales_do_not_overflow_on_the_way() -> None:
    """The sum alone is past what f16 holds, scaled it fits."""
    x, w = torch.full((4, 64), 100.0, dtype=torch.float16), torch.full((1, 16, 64), 448.0).to(torch.float8_e4m3fn)
    y = grouped_gemm_scaled(x.to(DEVICE), w.to(DEVICE), torch.full((1,), 2.0**-10, device=DEVICE), offsets(4))
    assert y.tolist() == [[100 * 448 * 64 / 1024] * 16] * 4


@pytest.mark.parametrize("shape", ["odd sizes", "several tiles", "tail"])
def test_transposed_weights(shape: str) -> None:
    """As the gradient of x has them."""
    counts, _, D, _ = SHAPES[shape]
    x, w, _, ends = operands(shape, "none", torch.float32)
    dy = random(x.shape[0], w.shape[1], seed=3)
    s = scales("by feature", len(counts), D)
    check(grouped_gemm_scaled(dy, w.transpose(1, 2), s, ends), dy, w.transpose(1, 2), s, ends)


def test_weights_and_scales_of_any_strides() -> None:
    x, _, _, ends = operands("odd sizes", "none", torch.float32)
    w, s = weights(3, 35, 66)[:, :, ::2], scales("by feature", 35, 3).t()
    check(grouped_gemm_scaled(x, w, s, ends), x, w, s, ends)
    w, s = weights(1, 35, 33).expand(3, 35, 33), scales("by expert", 1, 1).expand(3)
    check(grouped_gemm_scaled(x, w, s, ends), x, w, s, ends)


def test_rows_and_scales_of_other_experts_do_not_leak() -> None:
    x, w, s, ends = operands("odd sizes", "by expert", torch.float32)
    x[:5], s[2] = float("nan"), float("nan")
    nan = grouped_gemm_scaled(x, w, s, ends).isnan().any(1)
    rows = torch.arange(23, device=DEVICE)
    assert torch.equal(nan, (rows < 5) | (rows >= 22))


def test_shapes_without_a_gpu() -> None:
    with FakeTensorMode():
        x, w = (torch.empty(*s, dtype=torch.bfloat16, device="cuda") for s in ((6, 8), (3, 4, 8)))
        ends = torch.empty(3, dtype=torch.int32, device="cuda")
        y = grouped_gemm_scaled(x, w.to(torch.float8_e5m2), None, ends)
    assert (y.shape, y.dtype, y.device.type) == ((6, 4), torch.bfloat16, "cuda")


def test_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, ends = torch.zeros(4, 8), torch.zeros(2, 6, 8).to(torch.float8_e4m3fn), torch.zeros(2, dtype=torch.int32)
    assert why_not(x.double(), w, None, ends) == "x is torch.float64, expected one of bf16, f16, f32"
    assert why_not(x, w, None, ends.long()) == "offsets are torch.int64, expected int32"
    assert why_not(x, w[0], None, ends) == "x has 2 dimensions and w 2, expected 2 and 3"
    assert why_not(x, w[:0], None, ends) == "0 experts, expected 1 to 1022"
    other = "weights are torch.float32, expected one of float8_e4m3fn, float8_e5m2"
    assert why_not(x, w.float(), None, ends) == other
    assert why_not(x, w, torch.ones(3), ends) == "scales are (3,), expected (2,) or (2, 6), or of blocks of (2, 6, 8)"
    with pytest.raises(ValueError, match="expected int32"):
        grouped_gemm_scaled(x, w, None, ends.long())
    if not ON_GPU:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        said = "torch.float8_e4m3fn on sm_80, which widens no such numbers"
        assert why_not_widened(torch.float8_e4m3fn, torch.device("cuda")) == said
        assert why_not_widened(torch.float8_e5m2, torch.device("cuda")) is None
        assert why_not_widened(torch.float8_e4m3fn, torch.device("cpu")) is None
