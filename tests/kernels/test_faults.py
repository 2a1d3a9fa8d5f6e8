"""Faults that kernels for experts are known for, and that no other file here looks for.

Numbers that nobody may read are NaN; what a backward keeps is not written; routings at the edges; weights as views.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compile import cuda
from moe_compile.kernels import combine as combine_file
from moe_compile.kernels import combine_backward as combine_backward_file
from moe_compile.kernels.dispatch import dispatch, sort_by_expert
from moe_compile.kernels.gated_gemm import gated_gemm
from moe_compile.kernels.grouped_gemm import grouped_gemm
from moe_compile.kernels.grouped_gemm_dw import grouped_gemm_dw

from .conftest import DEVICE, offsets, random
from .test_cuda import DEFINITION, OURS, assert_near, everything, mlp_arguments

NAN, INF = float("nan"), float("inf")
NOBODYS = torch.tensor([[0, 3], [-1, 1], [7, 9], [1, 0]])  # three experts: pair 1, 2, 4 and 5 are nobody's


def routing() -> tuple[Tensor, Tensor, Tensor]:
    """(order, offsets, which pairs are nobody's)."""
    ids = NOBODYS.to(DEVICE)
    return *sort_by_expert(ids, 3), (ids < 0) | (ids > 2)


# -- numbers that nobody may read -----------------------------------------------------------


def test_rows_behind_the_last_offset_are_not_read() -> None:
    """Not by a product, whose tail is zeros, nor by a gather."""
    x, w, ends = random(70, 24), random(3, 20, 24, seed=1), offsets(4, 0, 5)
    x[9:] = NAN
    y = grouped_gemm(x, w, ends)
    assert y[:9].isfinite().all() and not y[9:].any()
    order, ends, _ = routing()
    tokens = random(4, 24)
    tokens[2] = INF  # all of its pairs are nobody's
    for out in gated_gemm(tokens, None, random(3, 40, 24, seed=1), ends, order, 2, "silu", True, True):
        assert out[:4].isfinite().all() and not out[4:].any()
    dy = random(8, 20, seed=2)
    assert grouped_gemm_dw(dy, tokens, ends, order, 0, 2).isfinite().all()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_routing_weights_of_nobodys_pairs_are_not_read(bad: float) -> None:
    order, ends, nobodys = routing()
    y, weights = random(8, 24), random(4, 2, seed=1)
    clean = combine_file.combine(y, weights.masked_fill(nobodys, 0), order, ends, 2)
    weights[nobodys] = bad
    assert torch.equal(combine_file.combine(y, weights, order, ends, 2), clean)
    assert torch.equal(combine_file.combine_reference(y, weights, order, ends, 2), clean)
    dy, dweights = combine_backward_file.combine_backward(random(4, 24, seed=2), y, weights, order, ends)
    assert dy.isfinite().all() and not dweights[nobodys].any()


def test_memory_between_rows_is_not_read() -> None:
    """Weights that are a part of something larger, NaN around them; widths that no block divides."""
    x, ends = random(9, 33), offsets(4, 5)
    around = torch.full((4, 60, 50), NAN, device=DEVICE)
    w = around[1:3, 7:42, 5:38].copy_(random(2, 35, 33, seed=1))
    assert torch.equal(grouped_gemm(x, w, ends), grouped_gemm(x, w.contiguous(), ends))
    order, ends = sort_by_expert(torch.arange(9, device=DEVICE).view(9, 1) % 2, 2)
    rest = ends, order, 1, "silu", False, True
    assert all(map(torch.equal, gated_gemm(x, None, w, *rest), gated_gemm(x, None, w.contiguous(), *rest)))


# -- routings at the edges, and weights as views --------------------------------------------

EDGES = {
    "one token": [[2, 0]],
    "more experts than rows": [[1, 5]],
    "the last expert takes all": [[2, 2]] * 9,
    "the first expert takes all": [[0, 0]] * 9,
    "one row each": [[0, 1], [2, 9]],
}


def edge(ids: Any, transposed: bool = False) -> tuple[Any, ...]:
    """Arguments of `expert_mlp`: two stacks in f32, or views of [E, in, out] as some models keep them."""
    i = torch.tensor(ids, device=DEVICE)
    _, _, _, gate, up, down, E, activation, gated = mlp_arguments("mixed", "two stacks", torch.float32, torch.float32)
    gate, up, down = ([w.mT.contiguous().mT if transposed else w for w in group] for group in (gate, up, down))
    x, weights = random(i.shape[0], up[0].shape[2], seed=7), random(*i.shape, seed=8)
    return x, i, weights, gate, up, down, E, activation, gated


@pytest.mark.parametrize("case", EDGES)
def test_edges(case: str) -> None:
    args = edge(EDGES[case])
    ours = everything(*OURS, args)
    assert_near(ours, everything(*DEFINITION, args, wide=True))
    used = torch.zeros(3, dtype=torch.bool, device=DEVICE)
    used[args[1][(args[1] >= 0) & (args[1] < 3)]] = True
    for gradient in ours[4:7]:  # of gate, up and down: exactly zero for an expert without rows
        assert torch.equal(gradient.flatten(1).any(1), used)


def test_transposed_weights() -> None:
    args = edge([[0, 2], [1, 2], [5, 0], [2, 1], [1, 1]], transposed=True)
    assert all(w.stride(1) == 1 for group in args[3:6] for w in group)
    assert_near(everything(*OURS, args), everything(*DEFINITION, args, wide=True))


def test_more_experts_than_pairs() -> None:
    ids, x = torch.tensor([[37, 3]], device=DEVICE), random(1, 16)
    rows, ends, _ = dispatch(x, ids, 40)
    w = random(40, 8, 16, seed=1)
    torch.testing.assert_close(grouped_gemm(rows, w, ends), torch.stack([w[3] @ x[0], w[37] @ x[0]]))
    dw = grouped_gemm_dw(random(2, 8, seed=2), rows, ends)
    assert dw.flatten(1).any(1).nonzero().flatten().tolist() == [3, 37]


# -- a second backward ----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["one stack", "two stacks", "separate", "plain"])
def test_a_second_backward(form: str) -> None:
    """The same bits: nothing that the forward kept, nor an argument, is written to."""
    args = mlp_arguments("mixed", form, torch.float32, torch.float32)
    x, ids, weights, gate, up, down, _, activation, gated = args
    out, h, ends, order = cuda.mlp(*args)
    dout = random(*out.shape, seed=9)
    kept = [dout, x, ids, h, weights, ends, order, *gate, *up, *down, out]
    before = [v.clone() for v in kept]
    back = (dout, x, h, weights, ends, order, gate, up, down, activation, gated, True, True)
    first = [v.clone() for v in cuda.mlp_backward(*back)]
    assert all(map(torch.equal, first, cuda.mlp_backward(*back)))
    assert all(map(torch.equal, kept, before))
