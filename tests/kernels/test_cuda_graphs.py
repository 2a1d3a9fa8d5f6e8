"""A layer on one device reads nothing on the host, so that a CUDA graph can hold its forward and its backward.

Without a GPU nothing can be captured; there it is shown that no op of the compiled layer, and no PyTorch op around the
kernels' launches, has an output whose size or value the host must know.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moe_compile import cuda
from tests.tiny import Block, D, Experts, Separate, T, compiled

from .conftest import DEVICE, random
from .test_cuda import FORMS, OURS, arguments, everything, mlp_arguments

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


class Asked(TorchFunctionMode):
    """Which methods that give the host a tensor's numbers were called: of a tensor on a CPU no op need run for that."""

    METHODS = frozenset({"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy"})

    def __init__(self) -> None:
        super().__init__()
        self.methods: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.methods |= {getattr(func, "__name__", "")} & self.METHODS
        return func(*args, **kwargs or {})


def general() -> dict[str, tuple[Any, ...]]:
    """Arguments of the general ops; in f32, and that of float8 weights once for each kind of scale."""
    args = arguments(torch.float32)
    x, (w,), offsets = args["grouped_gemm"]
    narrow, (experts, inner, width) = w.to(torch.float8_e5m2), w.shape
    args["grouped_gemm separate"] = (x, list(w), offsets)
    for kind, shape in (
        ("none", None),
        ("experts", (experts,)),
        ("features", (experts, inner)),
        ("blocks", (experts, inner // 16, width // 16)),
    ):
        args[f"grouped_gemm_scaled {kind}"] = (x, [narrow], None if shape is None else random(*shape).abs(), offsets)
    return args


@pytest.mark.parametrize("name", general())
def test_no_op_around_the_kernels_of_the_general_ops_reads_the_host(name: str) -> None:
    """Bodies that have no fused form, and float8 weights, are these.  In f64 no kernel runs, and products do read."""
    op, args = name.split()[0], general()[name]
    with Ran() as ran, Asked() as asked:
        getattr(cuda, op)(*args)
    assert ran.ops and not ran.reads and not asked.methods
    if op == "grouped_gemm":
        x, weights, offsets = args
        with Asked() as asked:
            cuda.grouped_gemm(x.double(), [w.double() for w in weights], offsets)
        assert asked.methods == {"tolist"}
