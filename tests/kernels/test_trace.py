"""torch.compile sees through the ops to their kernels, and asks nothing about the number of rows.

In a process without the interpreter, on fake CUDA tensors: as Inductor's front half does it.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = """
import logging
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from moe_compile.kernels import combine, combine_backward, dispatch, grouped_gemm, grouped_gemm_dw
from moe_compile.kernels import bias_gradient, gated_gemm, gated_gemm_backward, tiles

logging.disable(logging.WARNING)  # without a driver it cannot tell which arguments are written
ops = torch.ops.moe_ep_triton

def layer(x, ids, w, down, weights, mask):
    if mask is not None:  # a number of tokens that only the device knows
        kept = torch.ops.aten.nonzero.default(mask).squeeze(1)
        x, ids, weights = (torch.index_select(t, 0, kept) for t in (x, ids, weights))
    rows, ends, order = ops.dispatch(x, ids, 8)
    y = ops.grouped_gemm(rows, w, ends)
    out = ops.combine(y, weights, order, ends, 2), ops.combine(y, None, order, ends, 2)
    dy, dweights = ops.combine_backward(out[0], y, weights, order, ends)
    order, ends, position, tiles = ops.route_rows(ids, 8, 16)
    last, bias = ops.combine(y, None, order, ends, 2, position), w.new_empty(8, 32)
    how = "silu alpha=1.702 limit=7.0 shift=1.0 pairs"
    a, h = ops.gated_gemm(x, None, w, ends, order, 2, how, True, True, bias, tiles, 16)
    dh, _, dots = ops.gated_gemm_backward(x, down, h, weights, ends, order, 2, "silu", True, False, True, True)
    dbias = *ops.bias_gradient(dh.select(0, 0), None, None, ends, order), *ops.bias_gradient(y, None, bias, ends, order)
    dup = ops.grouped_gemm_dw(dh.select(0, 0), x, ends, order, 0, 2)
    return *out, last, ops.grouped_gemm_dw(y, rows, ends), dy, dweights, a, dup, dots, *dbias

for known in ("number", "symbol", "device"):  # of tokens: who knows how many
    shape_env = ShapeEnv(allow_dynamic_output_shape_ops=True)
    mode = FakeTensorMode(shape_env=shape_env)
    T = mode.from_tensor(torch.empty(10), static_shapes=False).shape[0] if known == "symbol" else 10
    with mode:
        new = lambda *s, dtype=torch.bfloat16: torch.empty(*s, dtype=dtype, device="cuda")
        mask = new(T, dtype=torch.bool) if known == "device" else None
        args = new(T, 16), new(T, 2, dtype=torch.int64), new(8, 32, 16), new(8, 16, 16), new(T, 2), mask
        graph = make_fx(dispatch_functionalize(layer), tracing_mode="real")(*args).graph  # torch 2.11 needs the mode on
    launches = sum("triton_kernel_wrapper" in str(node.target) for node in graph.nodes)
    opaque = sum("moe_ep" in str(node.target) for node in graph.nodes)
    print(f"{launches} launches, {opaque} opaque ops, guards {shape_env.guards}")
"""


def test_launches_without_guards() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # dispatch 2, grouped_gemm 2, combine twice 2, combine_backward 2, grouped_gemm_dw 1
    # route_rows 1, combine 1, gated_gemm 1, gated_gemm_backward 2, bias_gradient twice 2, grouped_gemm_dw 1
    # where T is no number, each of the two sorts has two more, since rows may be many; where nobody knows T, they are
    # taken to be many, and the product makes larger tiles of its own
    assert result.stdout.splitlines() == [f"{n} launches, 0 opaque ops, guards []" for n in (19, 23, 24)]
