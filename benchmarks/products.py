"""The products of a gated bf16 expert layer that benchmarks/tune.py finds settings for."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.peers import routed
from benchmarks.timing import Machine
from benchmarks.tried import Job
from moe_compile.kernels import settings
from moe_compile.kernels.settings import Problem, Setting

Call = Callable[[Tensor, Tensor], Tensor]
"""Called with offsets and order."""


def jobs(shape: str, machine: Machine, wanted: tuple[tuple[str, str], ...]) -> Iterator[Job]:
    """The wanted products of a layer, forward and backward.

    On "meta" the operands take no memory: for who wants to know the products, or to compile them (ahead.py).
    """
    from moe_compile.kernels import gated_gemm as a
    from moe_compile.kernels import gated_gemm_backward as b
    from moe_compile.kernels import grouped_gemm as g
    from moe_compile.kernels import grouped_gemm_dw as w
    from moe_compile.kernels import grouped_gemm_scaled as q
    from moe_compile.kernels.tiles import fills
    from moe_compile.ops import dispatch

    T, H, W, E, K = map(int, shape.split(","))
    R, hip, device, dtype = T * K, torch.version.hip is not None, torch.device(machine.device), machine.dtype
    torch.manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=dtype) / sizes[-1] ** 0.5

    x, dout, up, down, act, h = (random(*s) for s in ((T, H), (T, H), (E, 2 * W, H), (E, H, W), (R, W), (R, 2 * W)))
    weights, rows = torch.rand(T, K, device=device, dtype=torch.float32), R // E
    sorted_by = [dispatch(x, routed(name, T, E, K, machine.device), E)[1:] for name in ("balanced", "zipf")]

    def job(kernel: str, form: str, D: int, F: int, seed: Setting, call: Call) -> Iterator[Job]:
        problem = Problem(kernel, form, settings.device_name(device), settings.DTYPES[dtype], rows, D, F)
        if (kernel, form) in wanted:
            yield Job(problem, seed, [functools.partial(call, ends, order) for ends, order in sorted_by])

    of_product = g._seed(rows, dtype, hip, fills(R, E, H, 64))
    yield from job("gated_gemm", "gated", H, W, a._seed(rows, dtype, True, hip, fills(R, E, W, 32)),
                   lambda ends, order: a.gated_gemm(x, None, up, ends, order, K, "silu", True, True)[0])  # fmt: skip
    yield from job("grouped_gemm", "d packed", W, H, of_product, lambda ends, order: g.grouped_gemm(act, down, ends))
    yield from job("gated_gemm_backward", "gated", H, W, b._seed(rows, dtype, hip),
                   lambda ends, order: b.gated_gemm_backward(dout, down, h, weights, ends, order, K, "silu", True,
                                                             False, True, True)[0])  # fmt: skip
    yield from job("grouped_gemm_dw", "gathered", H, 2 * W, w._seed(rows, dtype, hip, True),
                   lambda ends, order: w.grouped_gemm_dw(h, x, ends, order, 0, K))  # fmt: skip
    yield from job("grouped_gemm_dw", "gathered", W, H, w._seed(rows, dtype, hip, True),
                   lambda ends, order: w.grouped_gemm_dw(dout, act, ends, order, K, 0))  # fmt: skip
    yield from job("grouped_gemm", "f packed", 2 * W, H, of_product,
                   lambda ends, order: g.grouped_gemm(h, up.mT, ends))  # fmt: skip
    if not any(kernel == "grouped_gemm_scaled" for kernel, _ in wanted):
        return
    kind = torch.float8_e5m2 if q.why_not_widened(torch.float8_e4m3fn, device) else torch.float8_e4m3fn
    down8, up8, scales = (16 * down).to(kind), (16 * up).to(kind), torch.rand(E, H, device=device)
    yield from job("grouped_gemm_scaled", "d packed", W, H, of_product,
                   lambda ends, order: q.grouped_gemm_scaled(act, down8, scales, ends))  # fmt: skip
    yield from job("grouped_gemm_scaled", "f packed", 2 * W, H, of_product,
                   lambda ends, order: q.grouped_gemm_scaled(h, up8.mT, None, ends))  # fmt: skip
