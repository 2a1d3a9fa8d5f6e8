"""Check and time the kernels on a CUDA machine, beside what else there is for experts.

    python -m benchmarks.kernels_gpu [--shapes T,H,I,E,K ...] [--routing balanced zipf one_empty] [--minutes 9]
                                     [--layers WAY ...]

T tokens, H model width, I expert width, E experts, K experts per token; bf16, gated experts: one
product H -> 2I, one I -> H.  Forward 6*T*K*H*I FLOP, forward and backward 18*T*K*H*I.  "forward" are
the products alone, with balanced routing; "layer" is all from tokens to tokens, with each routing and by
each way of peers.py.  A way that gives wrong numbers is not timed; for one of ours the exit status is 1.  Times are
medians of CUDA events.  What does not fit into the minutes is left out, and said to be.  --layers: no kernels alone,
and of the layers only these ways.

--dry runs the same on a CPU, once, on a tiny shape in f32, with Triton's interpreter: it times nothing.
"""

import argparse
import functools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.peers import ROUTINGS, routed
from benchmarks.peers import ways as layer_ways

SHAPES = [
    "8192,2048,768,128,8", "32768,2048,768,128,8", "8192,4096,14336,8,2", "40960,768,256,128,8",
    "24576,1536,256,128,8", "32768,4096,512,128,8", "32768,4096,1024,128,8",
    "32768,4096,2048,64,4", "32768,2048,512,512,10", "256,2048,768,128,8",
]  # fmt: skip
DRY = ["12,32,16,4,2"]
REPEATS, WARM_UP = 20, 5


@dataclass(frozen=True)
class Machine:
    """Where and in what numbers: CUDA and bf16, or a dry run on a CPU."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    backend: str = "inductor"

    def time_us(self, call: Callable[[], object]) -> float | None:
        """The median of REPEATS calls; None in a dry run, which makes one."""
        if self.device == "cpu":
            call()
            return None
        return time_us(call)

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """What a call has at once beside what is there before it; None in a dry run."""
        return None if self.device == "cpu" else peak_bytes(call)


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


def peak_bytes(call: Callable[[], object]) -> int:
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


class Rows:
    """Checks and times ways for one shape and routing; one dict for each, as the JSON has them."""

    def __init__(self, shape: str, routing: str, machine: Machine) -> None:
        self.shape, self.routing, self.machine = shape, routing, machine
        self.T, self.H, self.W, self.E, self.K = map(int, shape.split(","))
        self.R = self.T * self.K
        torch.manual_seed(0)
        self.ids = routed(routing, self.T, self.E, self.K, machine.device)
        self.weights = torch.rand(self.T, self.K, device=machine.device).to(machine.dtype)

    def random(self, *sizes: int) -> Tensor:
        """Numbers about as large as a layer's."""
        return torch.randn(*sizes, device=self.machine.device, dtype=self.machine.dtype) / sizes[-1] ** 0.5

    def row(
        self, what: str, way: str, checks: list, call: Callable, flop: int = 0, size: int = 0, roundings: int = 1
    ) -> dict:
        """Check, then time."""
        red, taken, peak = None, None, None
        for mine, reference in checks:
            try:
                red = red or why_wrong(mine(), reference(), roundings)
            except Exception as error:  # whatever went wrong, it is not to be timed
                red = first_line(error)
        try:
            if red is None:
                taken, peak = self.machine.time_us(call), self.machine.peak_bytes(call)
        except Exception as error:
            red = first_line(error)
        found = {"shape": self.shape, "routing": self.routing, "what": what, "way": way, "flop": flop, "bytes": size}
        return found | {"red": red, "time_us": taken, "peak_bytes": peak}

    def kernels(self) -> Iterator[dict]:
        """Each kernel alone, and the products of a layer."""
        from moe_compile.kernels import combine as c
        from moe_compile.kernels import combine_backward as cb
        from moe_compile.kernels import dispatch as d

        T, H, W, E, K, R = self.T, self.H, self.W, self.E, self.K, self.R
        sizes = (T, H), (E, 2 * W, H), (E, H, W), (R, W), (R, 2 * W), (R, H)
        x, up, down, act, dy_up, dy = (self.random(*s) for s in sizes)
        ids, weights, row = self.ids, self.weights, self.row
        x_R, ends, order = d.dispatch_reference(x, ids, E)
        exact = [(lambda i=i: d.dispatch(x, ids, E)[i], lambda v=v: v)
                 for i, v in enumerate((x_R, ends, order))]  # fmt: skip
        yield row("dispatch", "moe_compile", exact, lambda: d.dispatch(x, ids, E), size=4 * R * H + 24 * R)
        combine = (weights, order, ends)
        check = (lambda: c.combine(dy, *combine, K), lambda: c.combine_reference(dy, *combine, K))
        yield row("combine", "moe_compile", [check], check[0], size=2 * (R + T) * H + 12 * R)
        back = [(lambda i=i: cb.combine_backward(x, dy, *combine)[i],
                 lambda i=i: cb.combine_backward_reference(x, dy, *combine)[i])
                for i in (0, 1)]  # fmt: skip
        size = 2 * (2 * R + T) * H + 12 * R
        yield row("combine_backward", "moe_compile", back, lambda: cb.combine_backward(x, dy, *combine), size=size)
        for way, gemms in ways().items():
            yield from self.products(way, gemms, ends, [(x_R, up), (act, down)], [(dy, down), (dy_up, up)])

    def products(
        self, way: str, gemms: Gemms, ends: Tensor, forward: list[tuple[Tensor, Tensor]], back: list[tuple]
    ) -> Iterator[dict]:
        """The products of a layer; `back` has the gradient of each product's result, with its weight."""
        from moe_compile.kernels import grouped_gemm as g
        from moe_compile.kernels import grouped_gemm_dw as gw

        of_inputs = [(dy, w.transpose(1, 2)) for dy, w in back]
        of_weights = [(dy, x) for (dy, _), (x, _) in zip(back, forward[::-1], strict=True)]

        def run() -> None:
            for x, w in forward:
                gemms.gemm(x, w, ends)

        def run_all() -> None:
            for x, w in forward + of_inputs:
                gemms.gemm(x, w, ends)
            for dy, x in of_weights:
                gemms.dw(dy, x, ends)

        checks = [
            (lambda a=a, w=w: gemms.gemm(a, w, ends),
             lambda a=a, w=w: g.grouped_gemm_reference(a.float(), w.float(), ends))
            for a, w in forward + of_inputs
        ]  # fmt: skip
        checks += [
            (lambda a=a, b=b: gemms.dw(a, b, ends),
             lambda a=a, b=b: gw.grouped_gemm_dw_reference(a.float(), b.float(), ends))
            for a, b in of_weights
        ]  # fmt: skip
        flop = 6 * self.R * self.H * self.W
        yield self.row("forward", way, checks[:2], run, flop=flop)
        yield self.row("forward+backward", way, checks, run_all, flop=3 * flop)

    def layers(self, only: list[str] | None = None) -> Iterator[dict]:
        """Whole layers, ours and the peers', or of those named.  Raises `KeyError` for a name that is no way's."""
        T, H, W, E = self.T, self.H, self.W, self.E
        x, up, down, dout = (self.random(*s) for s in ((T, H), (E, 2 * W, H), (E, H, W), (T, H)))
        wanted = functools.cache(lambda: layer_reference(x, self.ids, self.weights, up, down, dout, E))
        flop = 6 * self.R * H * W
        ways = layer_ways(self.ids, E, self.machine.backend)
        for name, way in ((name, ways[name]) for name in only or ways):
            if way.layer is None:
                found = {"shape": self.shape, "routing": self.routing, "what": "layer", "way": name}
                yield found | {"skipped": way.why_not}
                continue
            swap = (lambda v: torch.cat(v.chunk(2, 1)[::-1], 1)) if way.up_first else (lambda v: v)
            leaves = [nn.Parameter(v) for v in (x, self.weights, swap(up), down)]

            def step(layer=way.layer, leaves=leaves) -> list[Tensor]:
                out = layer(*leaves)
                return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

            def inference(layer=way.layer, leaves=leaves) -> Tensor:
                with torch.no_grad():
                    return layer(*leaves)

            checks = [(inference, lambda: wanted()[0])]
            yield self.row("layer forward", name, checks, inference, flop=flop, roundings=3)
            results = functools.cache(step)  # one step for all of its checks
            back: tuple[Callable, ...] = (lambda v: v, lambda v: v, lambda v: v, swap, lambda v: v)
            whole: list = [
                (lambda i=i, of=results, back=back: back[i](of()[i]), lambda i=i: wanted()[i]) for i in range(5)
            ]
            yield self.row("layer f+b", name, whole, step, flop=3 * flop, roundings=3)
            results.cache_clear()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def measured(
    shapes: list[str], routings: list[str], machine: Machine, stop: float, only: list[str] | None = None
) -> Iterator[dict]:
    """All rows, balanced routing first, or the layers of the ways named; after the time `stop`, a row that says what is
    left out."""
    parts = [(routing, shape, part) for routing in routings for shape in shapes for part in ("kernels", "layers")]
    for routing, shape, part in parts:
        if part == "kernels" and (only or routing != routings[0]):
            continue
        of_shape = Rows(shape, routing, machine)
        rows = of_shape.kernels() if part == "kernels" else of_shape.layers(only)
        while time.monotonic() < stop and (row := next(rows, None)) is not None:
            yield row
        if time.monotonic() >= stop:
            yield {"shape": shape, "routing": routing, "what": part, "way": "", "skipped": "left out: no time"}
        if machine.device == "cuda":
            del rows, of_shape
            torch._dynamo.reset()
            torch.cuda.empty_cache()


def layer_reference(
    x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, dout: Tensor, E: int
) -> list[Tensor]:
    """The result and the gradients of x, weights, up and down, in f32."""
    from moe_compile.expert_mlp import backward_reference, reference

    x, weights, up, down, dout = (v.float() for v in (x, weights, up, down, dout))
    out, h, ends, order = reference(x, ids, weights, [], [up], [down], E, "silu", True)
    rest: tuple[Any, ...] = (weights, ends, order, [], [up], [down], "silu", True, True, True)
    dx, dweights, _, dup, ddown, *_ = backward_reference(dout, x, h, *rest)
    return [out, dx, dweights, dup, ddown]


def line(row: dict, ceiling: float) -> str:
    """A row for people."""
    head = f"{row['shape']:<24}{row['routing']:<10}{row['what']:<18}{row['way']:<26}"
    if row.get("skipped"):
        return f"{head}{row['skipped']}"
    if row["red"]:
        return f"{head}RED {row['red']}"
    if row["time_us"] is None:
        return f"{head}right, not timed"
    tflops, gbs = (row[k] / row["time_us"] / f for k, f in (("flop", 1e6), ("bytes", 1e3)))
    speed = f"{gbs:>9.0f} GB/s   " if row["bytes"] else f"{tflops:>9.0f} TFLOP/s"
    percent = f"{100 * tflops / ceiling:>5.0f} %" if row["flop"] else " " * 7
    return f"{head}{row['time_us']:>10.0f} us{speed}{percent}{row['peak_bytes'] / 2**30:>8.2f} GiB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=None, metavar="T,H,I,E,K")
    parser.add_argument("--routing", nargs="+", default=list(ROUTINGS), choices=ROUTINGS)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--layers", nargs="+", default=None, metavar="WAY")
    parser.add_argument("--dry", action="store_true", help="on a CPU, once, without times")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    stop = time.monotonic() + 60 * options.minutes
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined
        os.environ["LIGER_FUSED_MOE_AUTOTUNE"] = "0"  # to choose one of several settings, Triton asks for a driver
    elif not torch.cuda.is_available():
        print("kernels_gpu needs a CUDA machine; torch sees none", file=sys.stderr)
        return 2
    import triton

    machine = Machine("cpu", torch.float32, "aot_eager") if options.dry else Machine()
    known = layer_ways(torch.zeros(1, 1, dtype=torch.int64), 1, machine.backend)
    if unknown := [way for way in options.layers or [] if way not in known]:
        parser.error(f"no ways: {', '.join(unknown)}; there are {'; '.join(known)}")
    name, ceiling = ("dry run", 0.0) if options.dry else (torch.cuda.get_device_name(), dense_tflops())
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"dense 8192^3 bf16: {ceiling:.0f} TFLOP/s; percentages are of that")
    rows = []
    shapes = options.shapes or (DRY if options.dry else SHAPES)
    for row in measured(shapes, options.routing, machine, stop, options.layers):
        rows.append(row)
        print(line(row, ceiling), flush=True)
    if not options.dry:
        options.out.mkdir(parents=True, exist_ok=True)
        of_what = " ".join([name, *(options.layers or [])])  # some ways alone do not replace the record of all
        path = options.out / f"kernels_{re.sub(r'[^a-z0-9]+', '_', of_what.lower()).strip('_')}.json"
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        record = {"machine": name, **versions, "dense_tflops": ceiling, "rows": rows}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {path}")
    return 1 if any(row.get("red") for row in rows if row["way"].startswith("moe_compile")) else 0


if __name__ == "__main__":
    sys.exit(main())
