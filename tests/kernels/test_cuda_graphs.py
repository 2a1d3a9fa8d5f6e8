"""A layer on one device reads nothing on the host, so that a CUDA graph can hold its forward and its backward.

Without a GPU nothing can be captured; there it is shown that no op of the compiled layer, and no PyTorch op around the
kernels' launches, has an output whose size or value the host must know.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import Block, D, Experts, Separate, T, compiled

from .conftest import DEVICE, random
from .test_cuda import FORMS, OURS, everything, mlp_arguments

READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
LAYERS: dict[str, Callable[[], nn.Module]] = {"stacked": Experts, "separate": Separate}


class Ran(TorchDispatchMode):
    """Which ops ran, and those of them whose outputs the host reads, or must."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()
        self.reads: set[str] = set()

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Dynamo runs nothing that it compiled where there is a mode of another kind."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.add(str(func))
        if READS & set(func.tags):
            self.reads.add(str(func))
        return func(*args, **kwargs or {})


def step_of(run: Callable[[Tensor], Tensor], block: nn.Module) -> tuple[Tensor, Callable[[], list[Tensor]]]:
    """(x, what gives the result of x and all gradients)."""
    x, dout = random(T, D).requires_grad_(), random(T, D, seed=1)

    def step() -> list[Tensor]:
        out = run(x)
        return [out.detach(), *torch.autograd.grad(out, [x, *block.parameters()], dout)]

    return x, step


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("experts", LAYERS)
def test_no_op_of_a_compiled_layer_reads_the_host(experts: str) -> None:
    """The plain layer has such ops, in its forward."""
    block = Block(LAYERS[experts]()).to(DEVICE)
    found = []
    for run in (block, compiled(block, "aot_eager", fullgraph=True)):
        _, step = step_of(run, block)
        step()
        with Ran() as ran:
            step()
        found.append(ran)
    plain, ours = found
    assert "aten.nonzero.default" in plain.reads and not ours.reads
    assert {"moe_ep.expert_mlp.default", "moe_ep.expert_mlp_backward.default"} <= ours.ops


@pytest.mark.parametrize("form", FORMS)
def test_no_op_around_the_kernels_reads_the_host(form: str) -> None:
    args = mlp_arguments("mixed", form, torch.float32, torch.float32, biased=True)
    with Ran() as ran:
        everything(*OURS, args)
    assert ran.ops and not ran.reads


@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU: nothing to capture")
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("experts", LAYERS)
def test_a_layer_in_a_cuda_graph(experts: str, inner: str) -> None:
    """Replayed with another routing in the same memory, it gives the bits of a run without the graph."""
    block = Block(LAYERS[experts]()).to(DEVICE)
    x, step = step_of(compiled(block, inner, fullgraph=True), block)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compile, and what libraries allocate at first
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    chosen = []
    for seed in (2, 3):
        with torch.no_grad():
            x.copy_(random(T, D, seed=seed))
            chosen.append(block.router(x).topk(block.top_k).indices)
        graph.replay()
        assert all(map(torch.equal, captured, step()))
    assert not torch.equal(*chosen)
