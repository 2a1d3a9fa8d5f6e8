"""kernels/gated_gemm_backward.py against its reference in float64, and that against autograd."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_compile.activations import activate, activate_backward, between
from moe_compile.kernels import settings
from moe_compile.kernels.dispatch import sort_by_expert
from moe_compile.kernels.gated_gemm import gated_gemm
from moe_compile.kernels.gated_gemm_backward import gated_gemm_backward, gated_gemm_backward_reference, why_not

from .conftest import DEVICE, DTYPES, random
from .test_gated_gemm import EITHER, GPT_OSS, RTOL, SHAPES, SOME


def operands(shape: str, dtype: torch.dtype, gated: bool = True, weighted: bool = True):
    """dout, down, h, weights, offsets, order, K."""
    ids, E, D, F = SHAPES[shape]
    (T, K), R = ids.shape, ids.numel()
    order, offsets = sort_by_expert(ids.to(DEVICE), E)
    h = random(R, 2 * F if gated else F, dtype=dtype, seed=2)
    h[int(offsets[-1]) :] = 0  # as the forward leaves it
    down = (random(E, D, F, seed=1) / D**0.5).to(dtype)
    weights = random(T, K, dtype=dtype, seed=3) if weighted else None
    return random(T, D, dtype=dtype), down, h, weights, offsets, order, K


def wide(args: tuple) -> tuple:
    return tuple(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in args)


def check(found: tuple[Tensor, Tensor, Tensor], args: tuple, activation: str, gated: bool, scaled: bool) -> None:
    dh, a, dots = found
    weights, order = args[3], args[5]
    dh_ref, a_ref, dots_ref = gated_gemm_backward_reference(*wide(args), activation, gated)
    if scaled and weights is not None:
        a_ref = a_ref * weights.double().reshape(-1).index_select(0, order)[:, None]
    rtol = RTOL[dh.dtype]
    near = {"rtol": rtol, "atol": max(rtol, 1e-5)}
    torch.testing.assert_close(torch.cat(list(dh), 1), dh_ref.to(dh.dtype), **near)
    torch.testing.assert_close(a, a_ref.to(a.dtype), **near)
    assert dots.dtype == torch.float32
    if weights is None:
        assert dots.numel() == 0
    else:
        torch.testing.assert_close(dots, dots_ref.float(), rtol=1e-4, atol=1e-4)  # no operand is rounded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape: str, gated: bool, dtype: torch.dtype) -> None:
    args = operands(shape, dtype, gated)
    rest = "silu", gated, False, True, True
    found = gated_gemm_backward(*args, *rest)
    assert found[0].shape[0] == 1
    check(found, args, "silu", gated, scaled=True)
    assert all(map(torch.equal, found, gated_gemm_backward(*args, *rest)))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_epilogue_in_quarters(dtype: torch.dtype, gated: bool) -> None:
    """As the kernel's own guesses for 16 rows and more have it, in 16 bits."""
    args = operands("odd sizes", dtype, gated)
    with settings.pinned("gated_gemm_backward", "gated" if gated else "plain", (64, 128, 64, 4, 8, 4)):
        found = gated_gemm_backward(*args, "silu", gated, False, True, True)
    check(found, args, "silu", gated, scaled=True)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "ones"])
@pytest.mark.parametrize(("activation", "gated"), EITHER)
def test_activations(activation: str, gated: bool, weighted: bool) -> None:
    args = operands("odd sizes", torch.float32, gated, weighted)
    found = gated_gemm_backward(*args, activation, gated, False, True, False)
    check(found, args, activation, gated, scaled=False)


@pytest.mark.parametrize(("shape", "dtype"), SOME)
def test_pairs_and_limits(shape: str, dtype: torch.dtype) -> None:
    dout, down, h, *rest = operands(shape, dtype)
    numbers = h.view(-1)
    numbers[: min(4, h.numel())] = torch.tensor([0.9, -0.9, 0.9, 0.9])[: h.numel()]  # at the limits
    h[int(rest[1][-1]) :] = 0
    args = dout, down.mT.contiguous().mT, h, *rest
    found = gated_gemm_backward(*args, GPT_OSS, True, False, True, True)
    if dtype == torch.float32:
        check(found, args, GPT_OSS, True, scaled=True)
    halves = dout, down, torch.cat([h[:, ::2], h[:, 1::2]], 1), *rest
    same = gated_gemm_backward(*halves, GPT_OSS.removesuffix(" pairs"), True, False, True, True)
    F = down.shape[2]
    assert torch.equal(found[0][0], torch.stack(same[0][0].split(F, 1), 2).flatten(1))
    assert torch.equal(found[1], same[1])
    torch.testing.assert_close(
        found[2], same[2], rtol=1e-5, atol=1e-5
    )  # a GPU adds the columns of a row in another order


@pytest.mark.parametrize("shape", ["odd sizes", "nobody's", "several tiles"])
def test_halves_apart(shape: str) -> None:
    args = operands(shape, torch.float32)
    together, apart = (gated_gemm_backward(*args, "gelu", True, how, False, False) for how in (False, True))
    assert apart[0].shape == (2, args[2].shape[0], args[2].shape[1] // 2) and apart[1].numel() == 0
    assert torch.equal(torch.cat(list(apart[0]), 1), together[0][0]) and torch.equal(apart[2], together[2])


@pytest.mark.parametrize(("activation", "gated"), EITHER)
def test_it_is_the_gradient(activation: str, gated: bool) -> None:
    """Of sum over r of weight[r] * dot(dout[r], down @ a(h[r])), by autograd in float64."""
    args = operands("odd sizes", torch.float32, gated)
    dout, down, h, weights, offsets, order, K = wide(args)
    h.requires_grad_(), weights.requires_grad_()
    a = between(h, activation, gated)
    expert = torch.bucketize(torch.arange(h.shape[0], device=DEVICE), offsets, right=True)
    y = torch.einsum("rf,rdf->rd", a, down[expert])
    loss = (weights.reshape(-1)[order] * (y * dout[order // K]).sum(1)).sum()
    dh, dweights = torch.autograd.grad(loss, [h, weights])
    mine, _, dots = gated_gemm_backward(*args, activation, gated, False, False, False)
    torch.testing.assert_close(mine[0], dh.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dots.view(dweights.shape), dweights.float(), rtol=1e-4, atol=1e-4)


SPECIAL = [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 89.0, -89.0, 1e4, -1e4, 1e18, -1e18, float("nan")]


@pytest.mark.parametrize("activation", [how for how, gated in EITHER if not gated])
def test_an_activation_is_torchs(activation: str) -> None:
    """Value and slope far from zero and on NaN; the value on infinities too."""
    g = torch.cat([torch.tensor(SPECIAL), torch.linspace(-12, 12, 193)]).to(DEVICE)[:, None]
    order, offsets = sort_by_expert(torch.zeros_like(g).long(), 1)
    one = torch.ones(1, 1, 1, device=DEVICE)
    args = torch.ones_like(g), one, g, None, offsets, order, 1, activation, False
    dh, a, _ = gated_gemm_backward(*args, False, True, False)
    wide = g.double()
    near = {"rtol": 2e-5, "atol": 3e-6, "equal_nan": True}  # as the CPU kernel's test
    torch.testing.assert_close(a, activate(activation, wide).float(), **near)
    torch.testing.assert_close(dh[0], activate_backward(activation, torch.ones_like(wide), wide).float(), **near)
    x = g if activation == "gelu" else torch.cat([g, torch.tensor([[float("inf")], [-float("inf")]], device=DEVICE)])
    order, offsets = sort_by_expert(torch.zeros_like(x).long(), 1)
    forward, _ = gated_gemm(x, None, one, offsets, order, 1, activation, False, False)
    torch.testing.assert_close(forward, activate(activation, x), **near)


def test_nobodys_rows_are_zeros_whatever_they_hold() -> None:
    dout, down, h, weights, offsets, order, K = operands("nobody's", torch.float32)
    stop = int(offsets[-1])
    h[stop:], weights.view(-1)[order[stop:]] = float("nan"), float("inf")
    dh, a, dots = gated_gemm_backward(dout, down, h, weights, offsets, order, K, "silu", True, False, True, True)
    assert not dh[0, stop:].any() and not a[stop:].any() and not dots[order[stop:]].any()
    assert dh[0, :stop].isfinite().all() and dots.isfinite().all()


def test_tokens_do_not_leak() -> None:
    args = operands("odd sizes", torch.float32)
    args[0][5] = float("nan")
    dh, _, dots = gated_gemm_backward(*args, "silu", True, False, False, False)
    assert torch.equal(dh[0].isnan().any(1), args[5] // args[6] == 5)
    assert torch.equal(dots.isnan().view(-1, args[6]).any(1), torch.arange(23, device=DEVICE) == 5)


def test_any_strides_and_wide_weights() -> None:
    dout, down, h, weights, *routing = operands("odd sizes", torch.float16)
    args = (dout.t().contiguous().t(), down.mT.contiguous().mT, h.t().contiguous().t(), weights.float(), *routing)
    found = gated_gemm_backward(*args, "silu", True, False, True, True)
    check(found, args, "silu", True, scaled=True)


def test_a_large_gradient_of_f16_meets_its_weight_before_it_is_rounded() -> None:
    """dout @ down is past 65504, its product with the routing weight is not."""
    dout, down = torch.full((1, 64), 4e4).half().to(DEVICE), torch.ones(1, 64, 16).half().to(DEVICE)
    order, offsets = sort_by_expert(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), 1)
    h, weights = torch.ones(1, 16).half().to(DEVICE), torch.full((1, 1), 1e-3).half().to(DEVICE)
    dh, _, _ = gated_gemm_backward(dout, down, h, weights, offsets, order, 1, "relu", False, False, False, False)
    torch.testing.assert_close(dh, torch.full_like(dh, 64 * 4e4 * 1e-3), rtol=1e-2, atol=0)


def test_shapes_without_a_gpu() -> None:
    with FakeTensorMode():
        new = lambda *s, dtype=torch.bfloat16: torch.empty(*s, dtype=dtype, device="cuda")  # noqa: E731
        args = new(6, 8), new(3, 8, 5), new(12, 10), new(6, 2), new(3, dtype=torch.int32), new(12, dtype=torch.int32)
        dh, a, dots = gated_gemm_backward(*args, 2, "silu", True, True, True, True)
    assert (dh.shape, a.shape, dots.shape, dots.dtype) == ((2, 12, 5), (12, 5), (12,), torch.float32)


def test_says_why_not() -> None:
    dout, down, h, weights, offsets, order, K = operands("odd sizes", torch.float32)
    rest = offsets, order, K, "silu", True
    assert why_not(dout, down, h, weights, *rest) is None
    assert "dout is torch.float16" in str(why_not(dout.half(), down, h, weights, *rest))
    assert "weights are torch.float64" in str(why_not(dout, down, h, weights.double(), *rest))
    assert "rows of h have 69 elements" in str(why_not(dout, down, h[:, 1:], weights, *rest))
    assert "rows of dout have 32 elements" in str(why_not(dout[:, 1:], down, h, weights, *rest))
    assert "order is torch.int64" in str(why_not(dout, down, h, weights, offsets, order.long(), K, "silu", True))
    assert "offsets for 2" in str(why_not(dout, down, h, weights, offsets[1:], order, K, "silu", True))
    assert why_not(dout, down, h, weights, offsets, order, K, "silu pairs", True, True) == "activation silu pairs apart"
    with pytest.raises(ValueError, match="activation elu"):
        gated_gemm_backward(dout, down, h, weights, offsets, order, K, "elu", True, False, True, True)
