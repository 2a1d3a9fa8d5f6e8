"""Models compiled for an H200 and run without one.

`install()`, in a process of its own: from then on Inductor compiles each graph as one for a CUDA
device that nobody has, and what it writes runs on the CPU.  Its kernels and ours run in Triton's interpreter, our ops in
their forms for CUDA (moe_compile/cuda.py), the others as PyTorch has them on a CPU.  So what is chosen for CUDA is seen,
with the sizes, strides and alignments that Inductor asserts of our outputs, when memory is used again, and the numbers.
Not seen: time, streams, and whatever the interpreter does otherwise than a GPU.
"""

import contextlib
import importlib.util
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.compile_fx
import torch.utils._triton
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.triton_heuristics import GridExpr
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch.fx import GraphModule
from torch.fx.node import map_aggregate
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

from moe_compile import cuda
from moe_compile.passes import fuse_experts
from tests.interpreter import interpret

DEVICE = torch.device("cuda", 0)
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=140 * 2**30, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536, gcnArchName="",
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 * 2**20,
)  # fmt: skip
IN_FORMS_FOR_CUDA = {"expert_mlp": cuda.mlp, "expert_mlp_backward": cuda.mlp_backward} | {
    name: getattr(cuda, name)
    for name in ("dispatch", "grouped_gemm", "grouped_gemm_scaled", "grouped_gemm_dw", "combine", "combine_backward")
}
sources: list[str] = []  # what Inductor wrote, a program a graph
uncapturable: list[str] = []  # nodes for which Inductor would make no CUDA graph of their graph


def install() -> None:
    interpret()
    _have_a_device()
    interpreter_builder.options = InterpreterOptions(debug=True)  # as Inductor asks for: assertions count
    config.compile_threads, config.fx_graph_cache = 1, False
    torch._functorch.config.enable_autograd_cache = False
    fuse_experts.FuseExperts.refuse = lambda self, found: fuse_experts._why_not_cuda(found)  # type: ignore[assignment,method-assign]
    compile_fx = torch._inductor.compile_fx
    compile_fx.fx_codegen_and_compile = _on_cuda(compile_fx.fx_codegen_and_compile)  # type: ignore[assignment]
    GraphLowering._compile_to_module_lines = _load  # type: ignore[assignment,method-assign]


def _have_a_device() -> None:
    """What Inductor and Triton ask about the device, and no more."""
    for answer in vars(torch.utils._triton).values():  # given before
        getattr(answer, "cache_clear", lambda: None)()
    torch._C._ensureCUDADeviceGuardSet()
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
    answers: dict[str, Any] = dict(
        is_available=True, device_count=1, current_device=0, get_compute_capability=90, is_triton_capable=True,
        raise_if_triton_unavailable=None, is_bf16_supported=True, synchronize=None, get_device_properties=H200,
    )  # fmt: skip
    for name, answer in answers.items():
        setattr(CudaInterface, name, staticmethod(lambda *_, answer=answer, **__: answer))
    CudaInterface.Worker.get_device_properties = staticmethod(lambda *_: H200)  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda *_: H200  # type: ignore[assignment,return-value]
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda._exchange_device = lambda *_: 0  # two functions: Dynamo keeps a table of both
    torch.cuda._maybe_exchange_device = lambda *_: 0


def _on_cuda(compile_graph: Any) -> Any:
    """Inductor's inner compiler for a graph with the device of everything in it changed."""

    def compile_there(gm: GraphModule, inputs: Sequence[Any], to_check: Any, **kwargs: Any) -> Any:
        mode = torch._guards.detect_fake_mode(inputs)
        assert mode is not None
        for node in gm.graph.nodes:
            node.args = map_aggregate(node.args, lambda a: DEVICE if isinstance(a, torch.device) else a)
            node.kwargs = map_aggregate(node.kwargs, lambda a: DEVICE if isinstance(a, torch.device) else a)
        with mode:
            there = [
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE)
                if isinstance(t, torch.Tensor)
                else t
                for t in inputs
            ]
            FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*there)
        with config.patch(joint_graph_constant_folding=False):  # it computes on the device
            compiled = compile_graph(gm, there, [], **kwargs)
        if (node := get_first_incompatible_cudagraph_node(gm)) is not None:
            uncapturable.append(str(node))
        return compiled

    return compile_there


# -- running what Inductor wrote ----------------------------------------------------------------


HERE = "from tests.imitated_cuda import"
PROGRAM = {  # what is read otherwise in a program that Inductor wrote
    "\nimport torch\n": f"\n{HERE} Torch\ntorch = Torch()\n",
    "from torch._inductor.async_compile import AsyncCompile": f"{HERE} Compiler as AsyncCompile",
    "empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda": f"{HERE} empty_strided_cuda",
    "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": "get_raw_stream = lambda _: None",
    "torch.cuda._DeviceGuard(0)": "torch.nothing()",
    "torch.cuda.set_device(0)": "pass",
    "device(type='cuda', index=0)": "device(type='cpu')",
}
KERNEL = {
    "triton_helpers.set_driver_to_gpu()": "",
    "import triton_helpers, triton_heuristics": f"import triton_helpers\n{HERE} heuristics as triton_heuristics",
    "from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math": (
        "from tests import libdevice, libdevice as tl_math"
    ),
}


def _changed(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def _load(lowering: GraphLowering, written: Any) -> Any:
    sources.append(written.value)
    names: dict[str, Any] = {"__name__": "written"}
    exec(compile(_changed(written.value, PROGRAM), "written by Inductor", "exec"), names)
    return SimpleNamespace(call=names["call"], __file__="written.py", key="written", recursively_apply_fns=None)


class Torch:
    """torch, with our ops in their forms for CUDA."""

    nothing = contextlib.nullcontext

    def __getattr__(self, name: str) -> Any:
        return _Ops() if name == "ops" else getattr(torch, name)


class _Ops:
    def __getattr__(self, name: str) -> Any:
        return _MoeEp() if name == "moe_ep" else getattr(torch.ops, name)


class _MoeEp:
    def __getattr__(self, name: str) -> Any:
        ours = IN_FORMS_FOR_CUDA.get(name)
        return SimpleNamespace(default=ours) if ours else getattr(torch.ops.moe_ep, name)


def empty_strided_cuda(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """New memory, full of what no result may depend on."""
    out = torch.empty_strided(size, stride, dtype=dtype)
    return out.fill_(math.nan if dtype.is_floating_point else 0 if dtype == torch.bool else torch.iinfo(dtype).max)


class Compiler:
    """In the place of Inductor's: kernels are loaded from their sources, for the interpreter."""

    def triton(self, name: str, source: str, **_: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:  # Triton reads the file of a function
            path = Path(folder) / f"{name}.py"
            path.write_text(_changed(source, KERNEL))
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return getattr(module, name)

    def wait(self, scope: dict[str, Any]) -> None:
        pass


class _Kernel:
    """One of Inductor's kernels, with small blocks, so that there are several, in Inductor's own grid."""

    def __init__(self, fn: Any, hints: dict[str, int], constants: dict[Any, Any], about: dict[str, Any]) -> None:
        names = fn.arg_names
        self.fn, self.names = fn, names
        self.constants = {names[k[0]] if isinstance(k, tuple) else k: v for k, v in constants.items()}
        most = {"x": 8 if any(d.startswith("r") for d in hints) else 64, "y": 8, "z": 4}
        ahead = {d: min(triton.next_power_of_2(n), most.get(d, 32)) for d, n in hints.items()}
        blocks = {f"{d.upper()}BLOCK": n for d, n in ahead.items()}
        self.blocks = {name: n for name, n in blocks.items() if name in names and name not in self.constants}
        self.grid = GridExpr.from_meta(about, self.blocks)

    def run(self, *args: Any, stream: Any) -> None:
        given = dict(zip(self.names, args, strict=False)) | self.constants | self.blocks
        self.fn[self.grid.eval_slow(given)](**given)


class _Heuristics:
    def __getattr__(self, kind: str) -> Any:
        def decorator(*, triton_meta: Any, inductor_meta: Any, size_hints: Any = None, **_: Any) -> Any:
            return lambda fn: _Kernel(fn, size_hints or {}, triton_meta.get("constants", {}), inductor_meta)

        return decorator


heuristics = _Heuristics()
