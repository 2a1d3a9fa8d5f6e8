"""kernels/gated_gemm.py against its reference in float64."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_compile.activations import ACTIVATIONS
from moe_compile.kernels.dispatch import sort_by_expert
from moe_compile.kernels.gated_gemm import gated_gemm, gated_gemm_reference, why_not

from .conftest import DEVICE, DTYPES, ON_GPU, random

# (ids of the tokens, E, D, F): ids outside [0, E) are nobody's
SHAPES = {
    "odd sizes": (torch.arange(46).view(23, 2) % 3, 3, 33, 35),
    "several tiles": (torch.arange(300).view(150, 2) ** 2 % 5, 5, 64, 70),
    "whole tiles": (torch.arange(256).view(256, 1) // 128, 2, 128, 128),
    "empty experts": (torch.tensor([[1, 4], [4, 1], [4, 4]]), 6, 48, 16),
    "one takes all": (torch.full((50, 1), 2), 3, 16, 24),
    "no rows": (torch.empty(0, 2, dtype=torch.int64), 2, 16, 16),
    "nobody's": (torch.tensor([[0, -1], [7, 1], [3, 3], [1, 0]]), 3, 40, 16),
    "only nobody's": (torch.full((37, 1), 9), 2, 16, 16),
}
GPT_OSS = "silu alpha=1.702 limit=0.9 shift=1.0 pairs"  # limits that some numbers are beyond
GATED = (*ACTIVATIONS, GPT_OSS, "gelu limit=0.9", "relu pairs", "silu shift=-0.5")
EITHER = [*((how, True) for how in GATED), *((how, False) for how in (*ACTIVATIONS, "silu alpha=1.702 limit=0.9"))]
RTOL = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def operands(shape: str, dtype: torch.dtype, gated: bool = True):
    """x, w, offsets, order, K."""
    ids, E, D, F = SHAPES[shape]
    x = random(ids.shape[0], D, dtype=dtype)
    w = (random(E, 2 * F if gated else F, D, seed=1) / D**0.5).to(dtype)
    order, offsets = sort_by_expert(ids.to(DEVICE), E)
    return x, w, offsets, order, ids.shape[1]


def check(found: tuple[Tensor, Tensor], x: Tensor, gate: Tensor | None, up: Tensor, *rest) -> None:
    """f32: sums in another order.  Half: h is rounded once; a is one rounding of a function of the rounded h."""
    rest = tuple(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in rest)
    wide = x.double(), None if gate is None else gate.double(), up.double()
    for mine, exact in zip(found, gated_gemm_reference(*wide, *rest), strict=True):
        rtol = RTOL[x.dtype]
        torch.testing.assert_close(mine, exact.to(x.dtype), rtol=rtol, atol=max(rtol, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape: str, gated: bool, dtype: torch.dtype) -> None:
    x, w, offsets, order, K = operands(shape, dtype, gated)
    rest = offsets, order, K, "silu", gated
    a, h = gated_gemm(x, None, w, *rest, True)
    check((a, h), x, None, w, *rest)
    again, none = gated_gemm(x, None, w, *rest, False)
    assert torch.equal(a, again) and none.numel() == 0


@pytest.mark.parametrize(("activation", "gated"), EITHER)
def test_activations(activation: str, gated: bool) -> None:
    x, w, offsets, order, K = operands("odd sizes", torch.float32, gated)
    rest = offsets, order, K, activation, gated
    bias = random(*w.shape[:2], seed=5)
    check(gated_gemm(3 * x, None, w, *rest, True, bias), 3 * x, None, w, *rest, bias)


SOME = [("odd sizes", dtype) for dtype in DTYPES] + [
    (shape, torch.float32) for shape in ("several tiles", "empty experts", "no rows", "nobody's", "only nobody's")
]


@pytest.mark.parametrize(("shape", "dtype"), SOME)
def test_pairs_limits_and_biases(shape: str, dtype: torch.dtype) -> None:
    x, w, *routing = operands(shape, dtype)
    w = w.mT.contiguous().mT  # the numbers of a pair are neighbours
    rest = *routing, GPT_OSS, True
    bias = random(*w.shape[:2], dtype=dtype, seed=5)
    a, h = gated_gemm(x, None, w, *rest, True, bias)
    check((a, h), x, None, w, *rest, bias)
    again, none = gated_gemm(x, None, w, *rest, False, bias.t().contiguous().t())
    assert torch.equal(a, again) and none.numel() == 0
    halves = torch.cat([w[:, ::2], w[:, 1::2]], 1), torch.cat([bias[:, ::2], bias[:, 1::2]], 1)
    same, _ = gated_gemm(x, None, halves[0], *routing, GPT_OSS.removesuffix(" pairs"), True, False, halves[1])
    torch.testing.assert_close(a, same)  # as an interpreter's products of other strides may be summed in another order


def test_a_bias_of_two_stacks_and_of_other_experts() -> None:
    x, w, offsets, order, K = operands("nobody's", torch.float32)
    rest, bias = (offsets, order, K, "silu", True), random(*w.shape[:2], seed=5)
    bias[1] = float("nan")
    one, two = (gated_gemm(x, *v, *rest, True, bias) for v in ((None, w), w.chunk(2, 1)))
    r = torch.arange(order.shape[0], device=DEVICE)
    for mine, other in zip(one, two, strict=True):
        assert torch.equal(mine.isnan().any(1), (r >= offsets[0]) & (r < offsets[1]))
        assert torch.equal(mine.nan_to_num(), other.nan_to_num()) and not mine[offsets[-1] :].any()


@pytest.mark.parametrize("shape", ["odd sizes", "several tiles", "nobody's"])
def test_two_stacks(shape: str) -> None:
    x, w, *routing = operands(shape, torch.float32)
    rest = *routing, "gelu", True
    gate, up = w.chunk(2, 1)
    one = gated_gemm(x, None, w, *rest, True)
    for two in ((gate, up), (gate.contiguous(), up.contiguous()), (gate.mT.contiguous().mT, up)):
        for a, b in zip(gated_gemm(x, *two, *rest, True), one, strict=True):
            assert torch.equal(a, b)


def test_the_gate_comes_first() -> None:
    x, w, *routing = operands("odd sizes", torch.float32)
    swapped = torch.cat(w.chunk(2, 1)[::-1], 1)
    a, _ = gated_gemm(x, None, w, *routing, "silu", True, False)
    b, _ = gated_gemm(x, None, swapped, *routing, "silu", True, False)
    assert not torch.allclose(a, b, rtol=1e-2)


def test_rows_of_other_tokens_do_not_leak() -> None:
    x, w, offsets, order, K = operands("odd sizes", torch.float32)
    x[5] = float("nan")
    for out in gated_gemm(x, None, w, offsets, order, K, "silu", True, True):
        assert torch.equal(out.isnan().any(1), order // K == 5)


def test_weights_of_other_experts_do_not_leak() -> None:
    x, w, offsets, order, K = operands("odd sizes", torch.float32)
    w[1] = float("nan")
    for out in gated_gemm(x, None, w, offsets, order, K, "silu", True, True):
        r = torch.arange(order.shape[0], device=DEVICE)
        assert torch.equal(out.isnan().any(1), (r >= offsets[0]) & (r < offsets[1]))


def test_any_strides() -> None:
    x, w, *routing = operands("odd sizes", torch.float32)
    rest = *routing, "silu", True
    for v in (w.mT.contiguous().mT, torch.stack([w, w], -1)[..., 0], w[:1].expand(3, 70, 33)):
        check(gated_gemm(x, None, v, *rest, True), x, None, v, *rest)
    check(gated_gemm(x.t().contiguous().t(), None, w, *rest, True), x, None, w, *rest)


def test_offsets_past_32_bits() -> None:
    """The second expert lies 2**31 + 64 elements behind the first; the memory between is unused."""
    stride = 2**31 + 64
    try:
        memory = torch.zeros(0, dtype=torch.float16, device=DEVICE)
        memory.untyped_storage().resize_(2 * (stride + 32 * 16))
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space: {error}")
    w = torch.as_strided(memory, (2, 32, 16), (stride, 16, 1))
    w.copy_(random(2, 32, 16, dtype=torch.float16))
    order, offsets = sort_by_expert(torch.arange(9, device=DEVICE).view(9, 1) % 2, 2)
    rest = offsets, order, 1, "silu", True, False
    x = random(9, 16, dtype=torch.float16)
    assert torch.equal(gated_gemm(x, None, w, *rest)[0], gated_gemm(x, None, w.contiguous(), *rest)[0])


@pytest.mark.skipif(not ON_GPU, reason="4 GiB of products: too slow in the interpreter")
def test_rows_past_32_bits() -> None:
    R, D, F = 2**20 + 3, 16, 2048
    x = torch.zeros(R, D, dtype=torch.float16, device=DEVICE)
    x[-1] = 1
    w = random(1, F, D, dtype=torch.float16)
    order, offsets = sort_by_expert(torch.zeros(R, 1, dtype=torch.int64, device=DEVICE), 1)
    a, h = gated_gemm(x, None, w, offsets, order, 1, "relu", False, True)
    torch.testing.assert_close(h[-1], w[0].float().sum(1).half(), rtol=1e-2, atol=1e-2)
    assert torch.equal(a[-1], torch.relu(h[-1]))


def test_shapes_without_a_gpu() -> None:
    with FakeTensorMode():
        x, w, order, offsets = (torch.empty(*s, dtype=t, device="cuda") for s, t in (
            ((6, 8), torch.bfloat16), ((3, 10, 8), torch.bfloat16), ((12,), torch.int32), ((3,), torch.int32)
        ))  # fmt: skip
        a, h = gated_gemm(x, None, w, offsets, order, 2, "silu", True, True)
        b, none = gated_gemm(x, w, w, offsets, order, 2, "silu", True, False)
    assert (a.shape, h.shape, b.shape, none.shape) == ((12, 5), (12, 10), (12, 10), (0,))
    assert {(v.dtype, v.device.type) for v in (a, h, b, none)} == {(torch.bfloat16, "cuda")}


def test_says_why_not() -> None:
    x, w, offsets, order = torch.zeros(4, 8), torch.zeros(2, 6, 8), torch.zeros(2).int(), torch.zeros(8).int()
    rest = offsets, order, 2, "silu", True
    assert why_not(x, None, w, *rest) is None
    assert why_not(x.double(), None, w.double(), *rest) == (
        "x is torch.float64 and up is torch.float64, expected one of bf16, f16, f32"
    )
    assert "up is torch.float16" in str(why_not(x, None, w.half(), *rest))
    assert "order is torch.int64" in str(why_not(x, None, w, offsets, order.long(), 2, "silu", True))
    assert why_not(x, None, w[:1], *rest) == "offsets are for 2 experts, up for 1"
    assert why_not(x[:, :7], None, w, *rest) == "rows of x have 7 elements, those of up 8"
    assert why_not(x, None, w[:, :5], *rest) == "up has 5 rows"
    assert why_not(x, w[:, :3], w, *rest) == "gate is (2, 3, 8), up is (2, 6, 8), expected the same, and `gated`"
    assert "activation elu" in str(why_not(x, None, w, offsets, order, 2, "elu", True))
    assert why_not(x, w, w, offsets, order, 2, "silu pairs", True) == "activation silu pairs of two stacks"
    bias = torch.zeros(2, 6)
    assert why_not(x, None, w, *rest, bias) is None and "(2, 12)" in str(why_not(x, w, w, *rest, bias))
    assert "bias is torch.float16 (2, 6)" in str(why_not(x, None, w, *rest, bias.half()))
    with pytest.raises(ValueError, match="order is"):
        gated_gemm(x, None, w, offsets, order.long(), 2, "silu", True, True)
