"""The grouped product under `max_autotune`: Inductor times the candidates and writes the faster one into the graph."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from moe_compile import autotune, ops

E, F, D = 4, 16, 32
calls: list[tuple[str, list[int], int]] = []


def ends(rows: int) -> Tensor:
    """Offsets with an expert without rows, and two rows that nobody takes."""
    return torch.tensor([rows // 2, rows // 2, rows - 4, rows - 2], dtype=torch.int32)


@torch.library.custom_op("moe_ep_test::quick", mutates_args=())
def quick_op(x_RD: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    calls.append(("quick", offsets_E.tolist(), x_RD.shape[0]))
    return ops.grouped_gemm_reference(x_RD, [w_EFD], offsets_E)


@torch.library.custom_op("moe_ep_test::slow", mutates_args=())
def slow_op(x_RD: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    calls.append(("slow", offsets_E.tolist(), x_RD.shape[0]))
    time.sleep(0.05)
    return ops.grouped_gemm_reference(x_RD, [w_EFD], offsets_E)


for op in (quick_op, slow_op):
    op.register_fake(lambda x_RD, w_EFD, offsets_E: x_RD.new_empty(x_RD.shape[0], w_EFD.shape[1]))


def quick(x_RD: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    return torch.ops.moe_ep_test.quick(x_RD, w_EFD, offsets_E)  # type: ignore[no-any-return]


def slow(x_RD: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    return torch.ops.moe_ep_test.slow(x_RD, w_EFD, offsets_E)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("order", [(slow, quick), (quick, slow)], ids=["slow-first", "quick-first"])
def test_the_faster_one_runs(order: Any) -> None:
    autotune.lower_to(*order)

    def layer(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:  # operands that are not in memory as they come
        return torch.ops.moe_ep_timed.grouped_gemm(x.relu(), w.transpose(1, 2), offsets) + 1  # type: ignore[no-any-return]

    compiled = torch.compile(layer, options={"max_autotune": True}, fullgraph=True, dynamic=True)
    x, w, offsets = torch.randn(24, D), torch.randn(E, D, F), ends(24)
    calls.clear()
    with fresh_cache():  # what was timed is kept on disk
        compiled(x, w, offsets)
    assert {name for name, _, _ in calls} == {"slow", "quick"}
    for _, seen, rows in calls[:-1]:  # timed with rows for each expert, as many as there are
        assert seen == [rows // E * (e + 1) for e in range(E)]
    for rows in (24, 30):
        x, offsets = torch.randn(rows, D), ends(rows)
        calls.clear()
        with fresh_cache():
            found = compiled(x, w, offsets)
        assert calls[-1] == ("quick", offsets.tolist(), rows)
        assert torch.allclose(found, ops.grouped_gemm_reference(x.relu(), [w.transpose(1, 2)], offsets) + 1, atol=1e-5)


def test_torchs_product_leaves_no_row_unset() -> None:
    x, w, offsets = torch.randn(24, D).bfloat16(), torch.randn(E, F, D).bfloat16(), ends(24)
    found = autotune.grouped_mm(x, w, offsets)
    assert not found[22:].any()
    assert torch.allclose(found, ops.grouped_gemm_reference(x, [w], offsets), atol=0.1)
