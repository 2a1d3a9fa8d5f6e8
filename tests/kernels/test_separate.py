"""Weights that are not stacked: read by their addresses, with the numbers of the stacked ones, and no copy of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compile import cuda, ops
from moe_compile.kernels import weights as weights_file
from moe_compile.kernels.gated_gemm import gated_gemm
from moe_compile.kernels.grouped_gemm import grouped_gemm
from moe_compile.kernels.weights import separate, why_not_separate

from .conftest import DEVICE, DTYPES, offsets, random
from .test_cuda import DEFINITION, OURS, assert_near, everything, mlp_arguments
from .test_grouped_gemm import SHAPES, check, operands

LAYOUTS = {
    "parameters": lambda w: w.clone(),
    "transposed": lambda w: w.t().contiguous().t(),
    "rows of more": lambda w: torch.cat([w.new_full((3, w.shape[1]), float("nan")), w])[3:],
    "columns of more": lambda w: torch.cat([w, w * float("nan")], 1)[:, : w.shape[1]],
    "odd address": lambda w: torch.cat([w.new_full((1,), float("nan")), w.flatten()])[1:].view(w.shape),
}


@pytest.fixture(autouse=True)
def nothing_is_stacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each `torch.stack` of a test copied together."""
    copies: list[int] = []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda v, *more: (copies.append(len(v)), stack(v, *more))[1])
    return copies


def separately(x: Tensor, weights: list[Tensor], ends: Tensor) -> Tensor:
    assert why_not_separate(weights) is None
    return cuda.grouped_gemm(x, weights, ends)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_grouped_gemm(shape: str, dtype: torch.dtype, nothing_is_stacked: list[int]) -> None:
    x, w, ends = operands(shape, dtype)
    weights = [v.clone() for v in w]
    y = separately(x, weights, ends)
    check(y, x, w, ends)
    assert torch.equal(y, grouped_gemm(x, w, ends)) and not nothing_is_stacked


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, nothing_is_stacked: list[int]) -> None:
    x, w, ends = operands("odd sizes", torch.float32)
    weights = [LAYOUTS[layout](v) for v in w]
    check(separately(x, weights, ends), x, w, ends)
    dy = random(23, 35, seed=5)
    check(separately(dy, [v.t() for v in weights], ends), dy, w.mT, ends)
    assert not nothing_is_stacked


def test_more_experts_than_one_launch_can_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_file, "CHUNK", 4)
    x, w, ends = operands("more experts than rows", torch.float32)
    weights = [v.clone() for v in w]
    assert separate(weights).pointer.tolist() == [v.data_ptr() for v in weights]
    assert torch.equal(separately(x, weights, ends), grouped_gemm(x, w, ends))


def test_what_is_known_of_addresses() -> None:
    memory = torch.zeros(64, dtype=torch.float16, device=DEVICE)
    shapes = {16: (0, 8, 32), 8: (0, 12), 4: (8, 2), 2: (0, 16, 1)}
    for multiple, starts in shapes.items():
        assert separate([memory[s : s + 4].view(2, 2) for s in starts]).multiple == multiple


def test_weights_that_moved_and_weights_that_changed() -> None:
    """Nothing of an earlier call is used: the same list with other memory, the same memory with other numbers."""
    x, w, ends = operands("odd sizes", torch.float32)
    weights = [torch.nn.Parameter(v.clone()) for v in w]
    first = separately(x, weights, ends)
    for v in weights:
        v.data = 2 * v.data
    torch.testing.assert_close(separately(x, weights, ends), 2 * first)
    with torch.no_grad():
        for v in weights:
            v.mul_(2)
    torch.testing.assert_close(separately(x, weights, ends), 4 * first)
    torch.testing.assert_close(separately(x, weights[::-1], ends), grouped_gemm(x, 4 * w.flip(0), ends))


def test_one_expert_alone_and_one_for_all() -> None:
    x, w, _ = operands("odd sizes", torch.float32)
    torch.testing.assert_close(separately(x, [w[0].clone()], offsets(23)), x @ w[0].t(), rtol=1e-5, atol=1e-4)
    same = w[0].clone()
    ends = offsets(5, 17, 1)
    assert torch.equal(separately(x, [same] * 3, ends), grouped_gemm(x, w[:1].expand(3, -1, -1), ends))


def test_weights_of_other_experts_are_not_read() -> None:
    x, w, ends = operands("odd sizes", torch.float32)
    weights = [v.clone() for v in w]
    weights[1].fill_(float("nan"))
    rows = torch.arange(23, device=DEVICE)
    assert torch.equal(separately(x, weights, ends).isnan().any(1), (rows >= 5) & (rows < 22))


def test_weights_that_are_not_alike_are_stacked(nothing_is_stacked: list[int]) -> None:
    x, w, ends = operands("odd sizes", torch.float32)
    weights = [w[0].clone(), w[1].t().contiguous().t(), w[2].clone()]
    assert why_not_separate(weights) == "strides (1, 35) beside (33, 1)"
    assert torch.equal(cuda.grouped_gemm(x, weights, ends), grouped_gemm(x, w, ends)) and nothing_is_stacked == [3]
    assert "torch.float16 (35, 33)" in str(why_not_separate([w[0], w[1].half()]))
    assert "(34, 33)" in str(why_not_separate([w[0], w[1, :34]]))
    assert "on meta" in str(why_not_separate([w[0], w[1].to("meta")]))


# -- expert_mlp -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids", ["mixed", "empty experts", "nobody", "no tokens"])
@pytest.mark.parametrize("form", ["separate", "plain separate"])
def test_mlp(form: str, ids: str, dtype: torch.dtype, nothing_is_stacked: list[int]) -> None:
    args = mlp_arguments(ids, form, dtype, dtype)
    ours = everything(*OURS, args)
    assert not nothing_is_stacked
    assert_near(ours, everything(*DEFINITION, args, wide=True))
    x, i, weights, *groups, E, activation, gated = args
    stacked = [[torch.cat([v[None] for v in group])] if group else [] for group in groups]
    assert all(map(torch.equal, ours, everything(*OURS, (x, i, weights, *stacked, E, activation, gated))))


def mixed(change: Any) -> tuple[Any, ...]:
    """Two stacks, of which `change` makes something else."""
    x, ids, weights, (gate,), (up,), (down,), *rest = mlp_arguments("mixed", "two stacks", torch.float32, torch.float32)
    return x, ids, weights, *change(gate, up, down), *rest


FORMS = {
    "only down": (0, lambda g, u, d: ([g], [u], [*d.clone()])),
    "only up": (0, lambda g, u, d: ([g], [*u.clone()], [d])),  # not of gate's strides, but of its rows'
    "gate and up of other strides": (2, lambda g, u, d: ([*g.clone()], [v.t().contiguous().t() for v in u], [d])),
    "stacks of other strides": (0, lambda g, u, d: ([g.clone()], [u.mT.contiguous().mT], [d])),
    "transposed": (0, lambda g, u, d: tuple([v.t().contiguous().t() for v in w] for w in (g, u, d))),
}


@pytest.mark.parametrize("form", FORMS)
def test_mlp_of_mixed_layouts(form: str, nothing_is_stacked: list[int]) -> None:
    copies, change = FORMS[form]
    args = mixed(change)
    ours = everything(*OURS, args)
    assert len(nothing_is_stacked) == copies
    assert_near(ours, everything(*DEFINITION, args, wide=True))


def test_gate_and_up_in_one_matrix_an_expert() -> None:
    x, ids, weights, gate, (up,), (down,), *rest = mlp_arguments("mixed", "one stack", torch.float32, torch.float32)
    args = x, ids, weights, gate, [v.clone() for v in up], [v.clone() for v in down], *rest
    assert_near(everything(*OURS, args), everything(*DEFINITION, args, wide=True))


def test_gradients_of_separate_weights_are_parts_of_one_buffer() -> None:
    """Of each of gate, up and down: nothing is copied out of what the kernel wrote."""
    x, ids, weights, *groups, E, activation, gated = mlp_arguments("mixed", "separate", torch.float32, torch.float32)
    groups = [[v.requires_grad_() for v in group] for group in groups]
    out = torch.ops.moe_ep.expert_mlp(x, ids, weights, *groups, E, activation, gated)[0]
    out.sum().backward()
    for group in groups:
        assert len({v.grad.untyped_storage().data_ptr() for v in group}) == 1
        assert [v.grad.storage_offset() for v in group] == [e * group[0].numel() for e in range(E)]
    w = [random(4, 3, seed=e).requires_grad_() for e in range(2)]
    ops.grouped_gemm(random(5, 3), w, offsets(2, 3)).sum().backward()
    assert len({v.grad.untyped_storage().data_ptr() for v in w}) == 1


def test_two_stacks_of_other_strides_are_copied_by_the_op() -> None:
    x, ids, _, (gate,), (up,), *_ = mlp_arguments("mixed", "two stacks", torch.float32, None)
    order, ends = ops.sort_by_expert(ids, 3)
    rest = ends, order, 2, "silu", True, True
    one = gated_gemm(x, gate, up, *rest)
    assert all(map(torch.equal, one, gated_gemm(x, gate, up.mT.contiguous().mT, *rest)))
