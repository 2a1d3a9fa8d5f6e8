"""How many launches an `expert_mlp` on CUDA is: kernels, and PyTorch's own ops between them."""

import pytest
import torch
from torch import Tensor

from moe_compile import cuda
from moe_compile.kernels import counting_sort
from moe_compile.kernels.counting_sort import BLOCK

from .test_cuda import mlp_arguments
from .test_cuda_graphs import Ran

PRODUCTS = ["_gated_gemm_kernel", "_grouped_gemm_kernel", "_combine_kernel"]
MEMORY = {"aten.empty.memory_format", "aten.new_empty.default", "aten.promote_types.default"}  # no kernel of PyTorch's
POISON = {"aten.fill_.Scalar"}  # of new memory, by conftest
SORTS = [("mixed", BLOCK, ["_order_kernel"]), ("mixed", 8, ["_count_kernel", "_order_kernel"])]


@pytest.mark.parametrize(("ids", "block", "sort"), [*SORTS, ("no tokens", BLOCK, ["_order_kernel"])])
@pytest.mark.parametrize("form", ["one stack", "two stacks", "plain"])
def test_a_forward(
    form: str, ids: str, block: int, sort: list[str], launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sort of one launch, or of two where there are several blocks, and three kernels; so is an inference."""
    args = mlp_arguments(ids, form, torch.float32, torch.float32, biased=True)
    wanted = cuda.mlp(*args)
    monkeypatch.setattr(counting_sort, "BLOCK", block)
    for run in (cuda.mlp, cuda.mlp_result):
        launched.clear()
        with Ran() as ran:
            out = run(*args)
        assert launched == sort + PRODUCTS
        assert ran.ops <= MEMORY | POISON
        assert torch.equal(out if isinstance(out, Tensor) else out[0], wanted[0])
