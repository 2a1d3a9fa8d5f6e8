"""Check and time the kernels on a CUDA machine, beside torch._grouped_mm and a loop of torch.mm.

    python -m benchmarks.kernels_gpu [--shapes T,H,I,E,K ...] [--out benchmarks/results]

T tokens, H model width, I expert width, E experts, K experts per token; bf16, gated experts: one
product H -> 2I, one I -> H.  Forward 6*T*K*H*I FLOP, forward and backward 18*T*K*H*I.  "forward" are
the products alone, "layer" is all from tokens to tokens: fused (`moe_ep.expert_mlp`), by the general
ops, and by torch._grouped_mm with PyTorch's own gather and index_add.  A kernel whose check is red is
not timed, and the exit status is 1.  Times are medians of CUDA events.
"""

import argparse
import functools
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SHAPES = [
    "8192,2048,768,128,8", "32768,2048,768,128,8", "8192,4096,14336,8,2", "40960,768,256,128,8",
    "24576,1536,256,128,8", "32768,4096,512,128,8", "32768,4096,1024,128,8",
    "32768,4096,2048,64,4", "32768,2048,512,512,10", "256,2048,768,128,8",
]  # fmt: skip
REPEATS, WARM_UP = 20, 5


class Gemms(NamedTuple):
    """One way to do the products: y = gemm(x, w, ends) and dw = dw(dy, x, ends)."""

    gemm: Callable[[Tensor, Tensor, Tensor], Tensor]
    dw: Callable[[Tensor, Tensor, Tensor], Tensor]


def time_us(call: Callable[[], object]) -> float:
    for _ in range(WARM_UP):
        call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in "se"] for _ in range(REPEATS)]
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3


def dense_tflops(n: int = 8192) -> float:
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / time_us(lambda: a @ b) / 1e6


def ways() -> dict[str, Gemms]:
    from moe_compile.kernels.grouped_gemm import grouped_gemm
    from moe_compile.kernels.grouped_gemm_dw import grouped_gemm_dw

    def torch_gemm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, w.transpose(1, 2), offs=ends)

    def torch_dw(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(dy.t(), x, offs=ends)

    def groups(x: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
        stops = ends.tolist()  # a host read, as such a loop has
        return x.split([b - a for a, b in zip([0, *stops], stops, strict=False)])

    def loop_gemm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        return torch.cat([torch.mm(g, w[e].t()) for e, g in enumerate(groups(x, ends))])

    def loop_dw(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        pairs = zip(groups(dy, ends), groups(x, ends), strict=True)
        return torch.stack([torch.mm(a.t(), b) for a, b in pairs])

    return {
        "moe_compile": Gemms(grouped_gemm, grouped_gemm_dw),
        "torch._grouped_mm": Gemms(torch_gemm, torch_dw),
        "loop of torch.mm": Gemms(loop_gemm, loop_dw),
    }


def layers(ids: Tensor, E: int) -> dict[str, Callable[..., Tensor]]:
    """Ways to do a whole layer, differentiable: layer(x, weights, up, down) -> out."""
    from moe_compile import ops
    from moe_compile.expert_mlp import expert_mlp

    K, silu = ids.shape[1], torch.nn.functional.silu

    def fused(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return expert_mlp(x, ids, weights, [], [up], [down], E, "silu", True)[0]

    def general(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        rows, ends, order = ops.dispatch(x, ids, E)
        g, u = ops.grouped_gemm(rows, [up], ends).chunk(2, 1)
        return ops.combine(ops.grouped_gemm(silu(g) * u, [down], ends), weights, order, ends, K)

    def torchs(x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        order = ids.reshape(-1).argsort(stable=True)
        ends = torch.bincount(ids.reshape(-1), minlength=E).cumsum(0).int()
        g, u = torch._grouped_mm(x[order // K], up.mT, offs=ends).chunk(2, 1)
        y = torch._grouped_mm(silu(g) * u, down.mT, offs=ends) * weights.reshape(-1)[order, None]
        return torch.zeros_like(x).index_add_(0, order // K, y)

    return {"moe_compile fused": fused, "moe_compile": general, "torch._grouped_mm": torchs}


def peak_bytes(call: Callable[[], object]) -> int:
    """What a call has at once beside what is there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def why_wrong(value: Tensor, reference: Tensor, roundings: int = 1) -> str | None:
    """A bf16 result is off by 2**-9 of itself at most, about 0.0017 in the mean square, for each rounding."""
    if not value.is_floating_point():
        return None if torch.equal(value, reference) else "indices differ"
    if value.shape != reference.shape:
        return f"shape {tuple(value.shape)}, expected {tuple(reference.shape)}"
    error = value.float() - reference.float()
    rms = (error.norm() / reference.float().norm().clamp_min(1e-30)).item()
    worst = (error.abs().max() / reference.float().abs().max().clamp_min(1e-30)).item()
    if rms <= 4e-3 * roundings and worst <= 2**-7 * roundings:  # NaN fails both
        return None
    return f"relative error {rms:.1e} in the mean square, {worst:.1e} of the largest"


def measure(shape: str) -> list[dict]:
    """Rows of (what, by whom, time, FLOP, bytes, or the reason why it is red)."""
    from moe_compile.kernels import combine as c
    from moe_compile.kernels import combine_backward as cb
    from moe_compile.kernels import dispatch as d
    from moe_compile.kernels import grouped_gemm as g
    from moe_compile.kernels import grouped_gemm_dw as gw

    T, H, W, E, K = map(int, shape.split(","))
    R = T * K
    torch.manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16) / sizes[-1] ** 0.5

    weights, ids = torch.rand(T, E, device="cuda").topk(K)
    weights = weights.bfloat16()
    x, up, down, act, dy_up, dy = (random(*s) for s in ((T, H), (E, 2 * W, H), (E, H, W), (R, W), (R, 2 * W), (R, H)))
    x_R, ends, order = d.dispatch_reference(x, ids, E)

    rows: list[dict] = []

    def row(what: str, way: str, checks: list, call: Callable, flop: int = 0, size: int = 0, roundings: int = 1):
        red = None
        for mine, reference in checks:
            try:
                red = red or why_wrong(mine(), reference(), roundings)
            except Exception as error:  # whatever went wrong, it is not to be timed
                red = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        found = {"shape": shape, "what": what, "way": way, "flop": flop, "bytes": size, "red": red}
        rows.append(
            found | {"time_us": None if red else time_us(call), "peak_bytes": None if red else peak_bytes(call)}
        )

    exact = [(lambda i=i: d.dispatch(x, ids, E)[i], lambda v=v: v)
             for i, v in enumerate((x_R, ends, order))]  # fmt: skip
    row("dispatch", "moe_compile", exact, lambda: d.dispatch(x, ids, E), size=4 * R * H + 24 * R)
    combine = (weights, order, ends)
    check = (lambda: c.combine(dy, *combine, K), lambda: c.combine_reference(dy, *combine, K))
    row("combine", "moe_compile", [check], check[0], size=2 * (R + T) * H + 12 * R)
    back = [(lambda i=i: cb.combine_backward(x, dy, *combine)[i],
             lambda i=i: cb.combine_backward_reference(x, dy, *combine)[i])
            for i in (0, 1)]  # fmt: skip
    size = 2 * (2 * R + T) * H + 12 * R
    row("combine_backward", "moe_compile", back, lambda: cb.combine_backward(x, dy, *combine),
        size=size)  # fmt: skip

    for way, (gemm, dw) in ways().items():

        def forward(gemm=gemm) -> None:
            gemm(x_R, up, ends)
            gemm(act, down, ends)

        def forward_backward(gemm=gemm, dw=dw, forward=forward) -> None:
            forward()
            gemm(dy, down.transpose(1, 2), ends)
            gemm(dy_up, up.transpose(1, 2), ends)
            dw(dy, act, ends)
            dw(dy_up, x_R, ends)

        products = [(x_R, up), (act, down)]
        backward = [(dy, down.transpose(1, 2)), (dy_up, up.transpose(1, 2))]
        checks = [
            (lambda a=a, w=w, gemm=gemm: gemm(a, w, ends),
             lambda a=a, w=w: g.grouped_gemm_reference(a.float(), w.float(), ends))
            for a, w in products + backward
        ]  # fmt: skip
        checks += [
            (lambda a=a, b=b, dw=dw: dw(a, b, ends),
             lambda a=a, b=b: gw.grouped_gemm_dw_reference(a.float(), b.float(), ends))
            for a, b in ((dy, act), (dy_up, x_R))
        ]  # fmt: skip
        row("forward", way, checks[:2], forward, flop=6 * R * H * W)
        row("forward+backward", way, checks, forward_backward, flop=18 * R * H * W)

    wanted = functools.cache(lambda: layer_reference(x, ids, weights, up, down, dy[:T], E))
    leaves = [v.detach().requires_grad_() for v in (x, weights, up, down)]
    for way, layer in layers(ids, E).items():

        def step(layer=layer) -> list[Tensor]:
            out = layer(*leaves)
            return [out.detach(), *torch.autograd.grad(out, leaves, dy[:T])]

        def inference(layer=layer) -> Tensor:
            with torch.no_grad():
                return layer(*leaves)

        row("layer forward", way, [(inference, lambda: wanted()[0])], inference, flop=6 * R * H * W, roundings=3)
        results = functools.cache(step)  # one step for all of its checks
        whole: list = [(lambda i=i, of=results: of()[i], lambda i=i: wanted()[i]) for i in range(5)]
        row("layer f+b", way, whole, step, flop=18 * R * H * W, roundings=3)
        results.cache_clear()
    return rows


def layer_reference(
    x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, dout: Tensor, E: int
) -> list[Tensor]:
    """The result and the gradients of x, weights, up and down, in f32."""
    from moe_compile.expert_mlp import backward_reference, reference

    x, weights, up, down, dout = (v.float() for v in (x, weights, up, down, dout))
    out, h, ends, order = reference(x, ids, weights, [], [up], [down], E, "silu", True)
    rest: tuple[Any, ...] = (weights, ends, order, [], [up], [down], "silu", True, True, True)
    dx, dweights, _, dup, ddown = backward_reference(dout, x, h, *rest)
    return [out, dx, dweights, dup, ddown]


def line(row: dict, ceiling: float) -> str:
    head = f"{row['shape']:<24}{row['what']:<18}{row['way']:<19}"
    if row["red"]:
        return f"{head}RED {row['red']}"
    tflops, gbs = (row[k] / row["time_us"] / f for k, f in (("flop", 1e6), ("bytes", 1e3)))
    speed = f"{gbs:>9.0f} GB/s" if row["bytes"] else f"{tflops:>9.0f} TFLOP/s"
    percent = f"{100 * tflops / ceiling:>6.0f} %" if row["flop"] else ""
    return f"{head}{row['time_us']:>10.0f} us{speed}{percent}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="T,H,I,E,K")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels_gpu needs a CUDA machine; torch sees none", file=sys.stderr)
        return 2
    import triton

    name, ceiling = torch.cuda.get_device_name(), dense_tflops()
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"dense 8192^3 bf16: {ceiling:.0f} TFLOP/s; percentages are of that")
    rows = []
    for shape in options.shapes:
        for row in measure(shape):
            rows.append(row)
            print(line(row, ceiling), flush=True)
        torch.cuda.empty_cache()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"kernels_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.json"
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    record = {"machine": name, **versions, "dense_tflops": ceiling, "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")
    return 1 if any(row["red"] for row in rows if row["way"].startswith("moe_compile")) else 0


if __name__ == "__main__":
    sys.exit(main())
