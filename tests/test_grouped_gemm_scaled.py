"""The op `grouped_gemm_scaled`: its definition, gradient and CPU form, against dequantised weights in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compile import cpu, ops
from moe_compile.float8 import widened
from moe_compile.grouped_gemm_scaled import FLOAT8, grouped_gemm_scaled, reference
from tests.parallel.test_tiled import Peak

E, D, F = 5, 12, 20
ENDS = torch.tensor([4, 4, 9, 10, 17], dtype=torch.int32)  # an empty expert; three rows behind
R = 20
FORMS = ("none", "by expert", "by feature", "by block")
KNOWN = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def operands(form: str, dtype: torch.dtype, kind: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor, Any]:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(R, D, generator=g), 30 * torch.randn(E, F, D, generator=g)
    shape = {"by expert": (E,), "by feature": (E, F), "by block": (E, 5, 3)}.get(form)
    scales = None if shape is None else 0.01 * torch.randn(shape, generator=g)
    return x.to(dtype), w.to(kind), scales


def wide(w: Tensor, scales: Tensor | None) -> Tensor:
    if scales is None:
        return w.double()
    if scales.dim() == 3:
        return w.double() * scales.double().repeat_interleave(F // 5, 1).repeat_interleave(D // 3, 2)
    return w.double() * scales.double().reshape(E, -1, 1)


def close(got: Tensor, want: Tensor, roundings: int = 1) -> None:
    """Each rounding is half a unit of the type; sums of 12 or 20 products in f32 are another."""
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(
        got.double(), want, rtol=roundings * eps, atol=4 * eps * float(want.detach().abs().max())
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", FLOAT8, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_the_gradient_of_x(form: str, kind: torch.dtype, dtype: torch.dtype) -> None:
    x, w, scales = operands(form, dtype, kind)
    for weights in ([w], list(w.unbind(0)), [w.transpose(1, 2).contiguous().transpose(1, 2)]):
        mine = x.clone().requires_grad_()
        y = grouped_gemm_scaled(mine, weights, scales, ENDS)
        exact = x.double().requires_grad_()
        want = ops.grouped_gemm(exact, [wide(w, scales)], ENDS)
        close(y, want)
        assert y.dtype == dtype and not y[17:].any()
        close(reference(x, weights, scales, ENDS), want)
        dy = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
        first = torch.autograd.grad(y, mine, dy, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(y, mine, dy)[0])
        # a scale by feature is rounded into dy, all of whose F products add up
        close(first, torch.autograd.grad(want, exact, dy.double())[0], roundings=2 if form == "by feature" else 1)


@pytest.mark.parametrize("kind", FLOAT8, ids=str)
def test_every_number_is_widened_exactly(kind: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(kind).view(16, 16)
    numbers = torch.where(every.float().isfinite(), every.float(), 0).to(kind)
    for w in (every, numbers, numbers.t(), numbers[::2, 1::3], numbers[:0]):
        out = torch.empty_like(w, dtype=torch.float32).fill_(-1)
        assert widened(w, out) is out
        torch.testing.assert_close(out, w.float(), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(out.signbit(), w.float().signbit()) or w is every


def test_small_gradients_in_f16() -> None:
    """dy * scale is less than f16 holds, dx is not."""
    x, w, _ = operands("none", torch.float16)
    w = torch.full_like(w.float(), 256).to(w.dtype)
    x, scales = x.requires_grad_(), torch.full((E, F), 2.0**-14)
    y = grouped_gemm_scaled(x, [w], scales, ENDS)
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0**-12))
    want = torch.full((R, F), 2.0**-26, dtype=torch.float64)
    close(dx, ops.grouped_gemm(want, [w.double().transpose(1, 2)], ENDS), roundings=2)


def test_a_gradient_of_the_gradient() -> None:
    """It is linear in x: the gradient of dx by dy is the op again."""
    for form in FORMS:
        x, w, scales = operands(form, torch.float64)
        dy = torch.randn(R, F, dtype=torch.float64).requires_grad_()
        run = lambda x, w=w, scales=scales: grouped_gemm_scaled(x, [w], scales, ENDS)  # noqa: E731
        x.requires_grad_()
        (dx,) = torch.autograd.grad(run(x), x, dy, create_graph=True)
        (again,) = torch.autograd.grad(dx, dy, x.detach())
        torch.testing.assert_close(again, run(x).detach())


def test_weights_and_scales_are_frozen() -> None:
    x, w, scales = operands("by expert", torch.float32)
    for trained in (w.requires_grad_(), scales.requires_grad_()):
        y = grouped_gemm_scaled(x.requires_grad_(), [w], scales, ENDS)
        with pytest.raises(RuntimeError, match="a gradient for rows alone: weights and scales are frozen"):
            y.sum().backward()
        trained.requires_grad_(False)


def test_what_fake_tensors_and_autograd_are_told() -> None:
    """As torch checks them; its check of the schema compares arguments by ops that float8 does not have."""
    for form in FORMS:
        x, w, scales = operands(form, torch.float32)
        torch.library.opcheck(grouped_gemm_scaled, (x.requires_grad_(), [w], scales, ENDS), test_utils=KNOWN)


def test_no_rows() -> None:
    x, w, scales = operands("by feature", torch.float32)
    mine = x[:0].requires_grad_()
    y = grouped_gemm_scaled(mine, [w], scales, torch.zeros(E, dtype=torch.int32))
    assert y.shape == (0, F) and torch.autograd.grad(y.sum(), mine)[0].shape == (0, D)


def test_rows_that_nobody_reads_may_hold_anything() -> None:
    x, w, scales = operands("by feature", torch.float32)
    x[17:] = float("nan")
    mine = x.requires_grad_()
    y = grouped_gemm_scaled(mine, [w], scales, ENDS)
    dy = torch.ones_like(y)
    dy[17:] = float("nan")
    assert not y[17:].any() and not torch.autograd.grad(y, mine, dy)[0][17:].any()


@pytest.mark.parametrize(
    "said",
    {
        "weights are torch.float32, expected one of float8_e4m3fn, float8_e5m2": lambda x, w, s: (x, [w.float()], s),
        "weights are torch.float8_e4m3fnuz": lambda x, w, s: (x, [w.float().to(torch.float8_e4m3fnuz)], s),
        "rows are torch.float8_e4m3fn, expected a wider float": lambda x, w, s: (x.to(w.dtype), [w], s),
        "rows are torch.int64": lambda x, w, s: (x.long(), [w], s),
        r"weights of 4 experts \(20, 12\), offsets of 5": lambda x, w, s: (x, [w[1:]], s),
        "rows of 11 numbers": lambda x, w, s: (x[:, 1:], [w], s),
        r"scales are \(5, 12\), expected \(5,\) or \(5, 20\)": lambda x, w, s: (x, [w], s[:, :12]),
        r"scales are \(5, 20, 5\), expected .* of blocks of \(5, 20, 12\)": lambda x, w, s: (
            x,
            [w],
            s[..., None].expand(5, 20, 5),
        ),
        r"scales are \(5, 3, 4\)": lambda x, w, s: (x, [w], s[:, :12].view(5, 3, 4)),
        r"scales are \(1, 5, 4\)": lambda x, w, s: (x, [w], s[:1].view(1, 5, 4)),
        "scales are torch.float64, expected f32, bf16 or f16": lambda x, w, s: (x, [w], s.double()),
    }.items(),
    ids=lambda case: case[0],
)
def test_errors(said: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=said[0]):
        grouped_gemm_scaled(*said[1](*operands("by feature", torch.float32)), ENDS)


# -- memory ---------------------------------------------------------------------------------


def test_no_stack_of_wider_weights() -> None:
    """The weight of one expert at a time, of those that have rows: here one of 64."""
    x, w = torch.randn(8, 256, dtype=torch.bfloat16), torch.randn(64, 256, 256).to(FLOAT8[0])
    ends = torch.full((64,), 8, dtype=torch.int32)
    ends[:31] = 0
    for run in (reference, cpu.grouped_gemm_scaled):
        with Peak() as peak:
            run(x, [w], torch.ones(64, 256), ends)
        one = 4 * 256 * 256
        assert one <= peak.most < 2 * one, run
