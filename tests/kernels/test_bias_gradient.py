"""kernels/bias_gradient.py against its reference in float64."""

import pytest
import torch

from moe_compile.kernels.bias_gradient import bias_gradient, reference, why_not
from moe_compile.kernels.dispatch import sort_by_expert

from .conftest import DEVICE, DTYPES, random
from .test_gated_gemm import SHAPES


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "ones"])
@pytest.mark.parametrize(("shape", "dtype"), [*((shape, torch.float32) for shape in SHAPES), ("odd sizes", DTYPES[-1])])
def test_values(shape: str, dtype: torch.dtype, weighted: bool) -> None:
    """Of rows, and of tokens with a bias; rows of nobody hold NaN."""
    ids, E, D, _ = SHAPES[shape]
    (T, K), (order, offsets) = ids.shape, sort_by_expert(ids.to(DEVICE), E)
    weights = random(T, K, seed=1) if weighted else None
    rows, tokens, bias = random(T * K, D, dtype=dtype), random(T, D, dtype=dtype), random(E, D, dtype=dtype, seed=2)
    rows[offsets[-1] :] = float("nan")
    for dy, b, top_k in ((rows, None, 0), (tokens, bias, K)):
        args = weights, b, offsets, order, top_k
        found, again = bias_gradient(dy, *args), bias_gradient(dy, *args)
        wide = (v if v is None else v.double() for v in (dy, weights, b))
        exact = reference(*wide, *args[2:])
        rtol = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(found[0], exact[0].to(dtype), rtol=rtol, atol=1e-4)
        torch.testing.assert_close(found[1], exact[1].float(), rtol=1e-4, atol=1e-4)
        assert all(map(torch.equal, found, again))


def test_a_sum_of_many_halves_is_one_of_f32() -> None:
    """4000 times 1.25: in f16 the sum would stay at 2048 or so."""
    order, offsets = sort_by_expert(torch.zeros(4000, 1, dtype=torch.int64, device=DEVICE), 1)
    db, _ = bias_gradient(torch.full((4000, 3), 1.25, dtype=torch.float16, device=DEVICE), None, None, offsets, order)
    assert torch.equal(db, torch.full_like(db, 5000.0))


def test_says_why_not() -> None:
    dy, offsets, order = torch.zeros(4, 8), torch.zeros(2).int(), torch.zeros(4).int()
    assert why_not(dy, None, torch.zeros(2, 8), offsets, order) is None
    assert "dy is torch.float64" in str(why_not(dy.double(), None, None, offsets, order))
    assert "order is torch.int64" in str(why_not(dy, None, None, offsets, order.long()))
    assert "bias is torch.float32 (2, 7)" in str(why_not(dy, None, torch.zeros(2, 7), offsets, order))
    assert "weights are torch.float64" in str(why_not(dy, torch.zeros(4, 1).double(), None, offsets, order))
    with pytest.raises(ValueError, match="order is"):
        bias_gradient(dy, None, None, offsets, order.long())
