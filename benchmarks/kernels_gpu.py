"""Check and time the kernels on a CUDA machine, beside what else there is for experts.

    python -m benchmarks.kernels_gpu [--shapes T,H,I,E,K ...] [--routing balanced zipf one_empty] [--minutes 9]
                                     [--part 1/14] [--since "2026-11-22 10:00:00"] [--layers WAY ...]
                                     [--row-limit-s 150] [--out benchmarks/results] [--page docs/performance.md]

T tokens, H model width, I expert width, E experts, K experts per token; bf16, gated experts: one product H -> 2I, one
I -> H.  Forward 6*T*K*H*I FLOP, forward and backward 18*T*K*H*I.  "forward" are the products alone, with balanced
routing; "layer" is all from tokens to tokens, with each routing and by each way of peers.py.  Times are medians of CUDA
events; what takes more than 300 ms is timed once.

A way that gives wrong numbers is not timed.  Of ours it is red, too, if a second run gives other bits, if the error is
more than 1.1 of that of a loop of torch.mm in the same type, or if a fused layer keeps more for its backward than its
tokens, the products before the activation and the routing.

What matters comes first: layers of all shapes with balanced routing, kernels alone, the other routings, and last the
ways that may take minutes.  --part i/n takes a part of that; --since leaves out what the results have from that time
on, so that a command goes on where another one ended; --layers: no kernels alone, and of the layers only these ways.
Results go into one file for the machine, after each row (records.py).  A way that takes longer than the limit of a row
is left out, as red; one that hangs ends the process, and is.  What does not fit into the minutes is left out, and said
to be.  Exit status: 3 if something was left out, else 1 if one of ours is red.

--dry runs the same on a CPU, once, on a tiny shape in f32, with Triton's interpreter: it times nothing, and writes
nothing unless --out is given.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import gpu_page, limits, peers, records, timing
from benchmarks.peers import ROUTINGS, routed
from benchmarks.peers import ways as layer_ways
from benchmarks.timing import BOUND_OF_KEPT, BOUND_OF_RATIO, Machine, first_line, why_wrong

SHAPES = [
    "8192,2048,768,128,8", "32768,2048,768,128,8", "8192,4096,14336,8,2", "40960,768,256,128,8",
    "24576,1536,256,128,8", "32768,4096,512,128,8", "32768,4096,1024,128,8",
    "32768,4096,2048,64,4", "32768,2048,512,512,10", "256,2048,768,128,8",
]  # fmt: skip
DRY = ["12,32,16,4,2"]
GRAPHED = 256  # tokens up to which a layer of ours is timed in a CUDA graph too
ROUNDINGS = 6  # of a layer, one after the other: gate and up, activation, their product, the next product, the result


class Gemms(NamedTuple):
    """One way to do the products: y = gemm(x, w, ends) and dw = dw(dy, x, ends)."""

    gemm: Callable[[Tensor, Tensor, Tensor], Tensor]
    dw: Callable[[Tensor, Tensor, Tensor], Tensor]


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
        LOOP: Gemms(loop_gemm, loop_dw),
    }


LOOP = "loop of torch.mm"
Results = Callable[[], list[Tensor]]


class Limits(NamedTuple):
    """When a row is to end, which rows are wanted at all, and who is told of one that hangs."""

    stop: float = float("inf")  # time.monotonic()
    row_s: float = float("inf")
    done: Callable[..., bool] = lambda **_: False  # by the fields of a row
    hung: Callable[[dict], object] = lambda _: None


class NoTime(Exception):
    """The time of the whole command is up."""


class Rows:
    """Checks and times ways for one shape and routing; one dict for each, as the JSON has them."""

    def __init__(self, shape: str, routing: str, machine: Machine, limits: Limits = Limits()) -> None:  # noqa: B008
        self.shape, self.routing, self.machine, self.limits = shape, routing, machine, limits
        self.T, self.H, self.W, self.E, self.K = map(int, shape.split(","))
        self.R = self.T * self.K
        torch.manual_seed(0)
        self.ids = routed(routing, self.T, self.E, self.K, machine.device)
        self.weights = torch.rand(self.T, self.K, device=machine.device).to(machine.dtype)
        self.wide = torch.float64 if machine.dtype == torch.float32 else torch.float32

    def random(self, *sizes: int) -> Tensor:
        """Numbers about as large as a layer's."""
        return torch.randn(*sizes, device=self.machine.device, dtype=self.machine.dtype) / sizes[-1] ** 0.5

    def row(
        self, what: str, way: str, results: Results, exact: Results, call: Callable, *, loop: Results | None = None,
        kept: Callable[[], int] | None = None, kept_bound: int | None = None, roundings: int = 1, **sizes: int,
    ) -> Iterator[dict]:  # fmt: skip
        """Check, then time; nothing if the row is there already.  Raises `NoTime`."""
        found: dict = {"shape": self.shape, "routing": self.routing, "what": what, "way": way}
        if self.limits.done(**found):
            return
        found |= {"flop": 0, "bytes": 0, **sizes, "red": None, "time_us": None, "peak_bytes": None}
        left = self.limits.stop - time.monotonic()
        too_slow = f"no end after {self.limits.row_s:.0f} s"

        def hung() -> None:
            if left > self.limits.row_s:
                self.limits.hung(found | {"red": f"{too_slow}, nor any way to stop it"})

        try:
            with limits.limited(min(left, self.limits.row_s), hung):
                found |= self.checked(records.is_ours(way), results, exact, loop, roundings)
                if kept is not None:
                    found |= {"kept_bytes": kept(), "kept_bound": kept_bound}
                    if kept_bound and found["kept_bytes"] > BOUND_OF_KEPT * kept_bound:
                        found["red"] = found["red"] or (
                            f"keeps {found['kept_bytes']} bytes for its backward, expected {kept_bound}"
                        )
                if found["red"] is None:
                    found["time_us"], found["peak_bytes"] = self.machine.time_us(call), self.machine.peak_bytes(call)
        except limits.TimeUp:
            torch._dynamo.reset()  # what was being compiled
            if left <= self.limits.row_s:
                raise NoTime from None
            found["red"] = too_slow
        except Exception as error:  # whatever went wrong, it is not to be timed
            found["red"] = first_line(error)
        yield found

    def checked(self, ours: bool, results: Results, exact: Results, loop: Results | None, roundings: int) -> dict:
        """Why it is red, and our error beside that of a loop."""
        mine, right = results(), exact()
        reds = [why_wrong(a, b, roundings) for a, b in zip(mine, right, strict=True)]
        red, ratio = next((red for red in reds if red), None), None
        if ours and not all(map(torch.equal, mine, results())):
            red = red or "a second run gives other bits"
        if loop is not None:
            ratio = timing.error_ratio(mine, loop(), right)
            by_roundings = self.machine.dtype != torch.float32  # in f32 the order of sums decides
            if ours and by_roundings and not ratio <= BOUND_OF_RATIO:
                red = red or f"error {ratio:.2f} of that of {LOOP}, bound {BOUND_OF_RATIO}"
        return {"red": red, "error_ratio": ratio}

    def kernels(self) -> Iterator[dict]:
        """Each kernel alone, and the products of a layer."""
        from moe_compile.kernels import combine as c
        from moe_compile.kernels import combine_backward as cb
        from moe_compile.kernels import dispatch as d

        T, H, W, E, K, R = self.T, self.H, self.W, self.E, self.K, self.R
        sizes = (T, H), (E, 2 * W, H), (E, H, W), (R, W), (R, 2 * W), (R, H)
        x, up, down, act, dy_up, dy = (self.random(*s) for s in sizes)
        ids, weights, row, name = self.ids, self.weights, self.row, "moe_compile"
        s = x.element_size()
        x_R, ends, order = d.dispatch_reference(x, ids, E)

        def dispatch() -> list[Tensor]:
            return list(d.dispatch(x, ids, E))

        yield from row("dispatch", name, dispatch, lambda: [x_R, ends, order], dispatch, bytes=2 * s * R * H + 24 * R)
        args = (weights, order, ends)

        def combine() -> list[Tensor]:
            return [c.combine(dy, *args, K)]

        def combined() -> list[Tensor]:
            return [c.combine_reference(dy.to(self.wide), weights.to(self.wide), order, ends, K)]

        yield from row("combine", name, combine, combined, combine, bytes=s * (R + T) * H + 12 * R)

        def back() -> list[Tensor]:
            return list(cb.combine_backward(x, dy, *args))

        def exact() -> list[Tensor]:
            wide = (v.to(self.wide) for v in (x, dy, weights))
            return list(cb.combine_backward_reference(*wide, order, ends))

        yield from row("combine_backward", name, back, exact, back, bytes=s * (2 * R + T) * H + 12 * R)
        back_of = [(dy, down), (dy_up, up)]
        yield from self.products(ends, [(x_R, up), (act, down)], back_of)

    def products(self, ends: Tensor, forward: list[tuple[Tensor, Tensor]], back: list[tuple]) -> Iterator[dict]:
        """The products of a layer; `back` has the gradient of each product's result, with its weight."""
        from moe_compile.kernels import grouped_gemm as g
        from moe_compile.kernels import grouped_gemm_dw as gw

        of_inputs = [(dy, w.transpose(1, 2)) for dy, w in back]
        of_weights = [(dy, x) for (dy, _), (x, _) in zip(back, forward[::-1], strict=True)]

        def results(gemms: Gemms, both: bool, wide: torch.dtype | None = None) -> list[Tensor]:
            def to(v: Tensor) -> Tensor:
                return v if wide is None else v.to(wide)

            found = [gemms.gemm(to(x), to(w), ends) for x, w in forward + of_inputs * both]
            return found + [gemms.dw(to(dy), to(x), ends) for dy, x in of_weights * both]

        def run(gemms: Gemms, both: bool) -> None:
            for x, w in forward + of_inputs * both:
                gemms.gemm(x, w, ends)
            for dy, x in of_weights * both:
                gemms.dw(dy, x, ends)

        found, flop = ways(), 6 * self.R * self.H * self.W
        right = Gemms(g.grouped_gemm_reference, gw.grouped_gemm_dw_reference)
        for both, what in ((False, "forward"), (True, "forward+backward")):
            exact = functools.cache(functools.partial(results, right, both, self.wide))
            loop = functools.cache(functools.partial(results, found[LOOP], both))
            for way, gemms in found.items():
                it, call = functools.partial(results, gemms, both), functools.partial(run, gemms, both)
                yield from self.row(what, way, it, exact, call, loop=loop, flop=flop * (3 if both else 1))

    def layers(self, only: list[str] | None = None, last: bool | None = None) -> Iterator[dict]:
        """Whole layers, ours and the peers', or those named; those that may take minutes, if `last`, or the others.

        Raises `KeyError` for a name that is no way's.
        """
        T, H, W, E, R = self.T, self.H, self.W, self.E, self.R
        x, up, down, dout = (self.random(*s) for s in ((T, H), (E, 2 * W, H), (E, H, W), (T, H)))
        wanted = functools.cache(lambda: layer_reference(x, self.ids, self.weights, up, down, dout, E, wide=self.wide))

        def steps(layer: Callable, leaves: list[nn.Parameter]) -> tuple[Results, Results]:
            def step() -> list[Tensor]:
                out = layer(*leaves)
                return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

            def inference() -> list[Tensor]:
                with torch.no_grad():
                    return [layer(*leaves)]

            return inference, step

        def parameters(up: Tensor) -> list[nn.Parameter]:
            return [nn.Parameter(v) for v in (x, self.weights, up, down)]

        @functools.cache
        def loops() -> list[Tensor]:
            layer = peers.loop(self.ids, E).layer
            assert layer is not None
            return steps(layer, parameters(up))[1]()

        s, ways = x.element_size(), layer_ways(self.ids, E, self.machine.backend)
        flop, size = 6 * R * H * W, s * (3 * E * H * W + 2 * T * H + 2 * R * W)  # at least: one read, one write of each
        formula = s * (T * H + 2 * R * W + T * self.K) + 8 * R + 4 * R + 4 * E  # weights, ids, order and ends
        chosen = only or [name for name, way in ways.items() if last is None or way.last == last]
        for name in chosen:
            way = ways[name]
            if way.layer is None:
                found = {"shape": self.shape, "routing": self.routing, "what": "layer", "way": name}
                yield found | {"skipped": way.why_not}
                continue
            swap = (lambda v: torch.cat(v.chunk(2, 1)[::-1], 1)) if way.up_first else (lambda v: v)
            leaves = parameters(swap(up))
            inference, step = steps(way.layer, leaves)

            def put_back(found: list[Tensor], swap: Callable = swap) -> list[Tensor]:
                return [*found[:3], swap(found[3]), found[4]]

            roundings = ROUNDINGS if records.is_ours(name) else ROUNDINGS + self.K  # they round each sum over k
            checks: dict[str, Any] = {"roundings": roundings}
            yield from self.row("layer forward", name, inference, lambda: wanted()[:1], inference,
                                loop=lambda: loops()[:1], flop=flop, bytes=size, **checks)  # fmt: skip
            kept = functools.partial(
                self.machine.kept_bytes, lambda of=way.layer, at=leaves: of(*at), leaves[:2], leaves[2:]
            )
            yield from self.row("layer f+b", name, lambda step=step, back=put_back: back(step()), wanted, step,
                                loop=loops, flop=3 * flop, kept=kept, kept_bound=formula if way.lean else None,
                                **checks)  # fmt: skip
            if name == "moe_compile fused" and T <= GRAPHED:
                yield from self.graphs(name, inference, step, wanted, loops, flop, checks)

    def graphs(
        self, name: str, inference: Results, step: Results, wanted: Results, loops: Results, flop: int, checks: dict
    ) -> Iterator[dict]:
        """The same in a CUDA graph: few tokens are bound by launches."""
        name += ", CUDA graph"
        if self.machine.device == "cpu":
            found = {"shape": self.shape, "routing": self.routing, "what": "layer", "way": name}
            yield found | {"skipped": "no CUDA graph without a GPU"}
            return
        for what, run, count, times in (("layer forward", inference, 1, 1), ("layer f+b", step, 5, 3)):
            graph = functools.cache(functools.partial(timing.captured, run))
            yield from self.row(
                what, name, lambda graph=graph: [v.clone() for v in graph()()], lambda count=count: wanted()[:count],
                lambda graph=graph: graph()(), loop=lambda count=count: loops()[:count], flop=times * flop, **checks,
            )  # fmt: skip


def layer_reference(
    x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, dout: Tensor, E: int,
    wide: torch.dtype = torch.float32,
) -> list[Tensor]:  # fmt: skip
    """The result and the gradients of x, weights, up and down, in a wider type."""
    from moe_compile.expert_mlp import backward_reference, reference

    x, weights, up, down, dout = (v.to(wide) for v in (x, weights, up, down, dout))
    out, h, ends, order = reference(x, ids, weights, [], [up], [down], E, "silu", True)
    rest: tuple[Any, ...] = (weights, ends, order, [], [up], [down], "silu", True, True, True)
    dx, dweights, _, dup, ddown, *_ = backward_reference(dout, x, h, *rest)
    return [out, dx, dweights, dup, ddown]


class Job(NamedTuple):
    """A part of the rows of a shape and a routing."""

    what: str  # "layers", "kernels", or "last layers"
    routing: str
    shape: str


def jobs(shapes: list[str], routings: list[str], only: list[str] | None = None) -> list[Job]:
    """All there is to do, what matters most first; with names of ways, the layers by those alone."""
    rounds = [("layers", routing) for routing in routings]
    if not only:
        rounds = [*rounds[:1], ("kernels", routings[0]), *rounds[1:], *(("last layers", r) for r in routings)]
    return [Job(what, routing, shape) for what, routing in rounds for shape in shapes]


def measured(todo: list[Job], machine: Machine, limits: Limits, only: list[str] | None = None) -> Iterator[dict]:
    """The rows of the jobs; after the time `limits.stop`, a row for each that says what is left out."""
    for job in todo:
        try:
            if time.monotonic() >= limits.stop:
                raise NoTime
            of_shape = Rows(job.shape, job.routing, machine, limits)
            if job.what == "kernels":
                yield from of_shape.kernels()
            else:
                yield from of_shape.layers(only, None if only else job.what == "last layers")
        except NoTime:
            left_out = {"no_time": True, "skipped": "left out: no time"}
            yield {"shape": job.shape, "routing": job.routing, "what": job.what, "way": ""} | left_out
        except Exception as error:  # operands that do not fit, say
            yield {"shape": job.shape, "routing": job.routing, "what": job.what, "way": "", "red": first_line(error)}
        torch._dynamo.reset()  # and the memory of what it compiled
        if machine.device == "cuda":
            torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=None, metavar="T,H,I,E,K")
    parser.add_argument("--routing", nargs="+", default=list(ROUTINGS), choices=ROUTINGS)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--row-limit-s", type=float, default=150.0)
    parser.add_argument("--part", default="1/1", metavar="i/n")
    parser.add_argument("--since", default=None, metavar="DATE")
    parser.add_argument("--layers", nargs="+", default=None, metavar="WAY")
    parser.add_argument("--dry", action="store_true", help="on a CPU, once, without times")
    parser.add_argument("--out", type=Path, default=None, help="benchmarks/results, but for a dry run")
    parser.add_argument("--page", type=Path, default=None, help="a page with a place for the table")
    options = parser.parse_args()
    stop = time.monotonic() + 60 * options.minutes
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined
        os.environ["LIGER_FUSED_MOE_AUTOTUNE"] = "0"  # to choose one of several settings, Triton asks for a driver
    elif not torch.cuda.is_available():
        print("kernels_gpu needs a CUDA machine; torch sees none", file=sys.stderr)
        return 2
    machine = Machine("cpu", torch.float32, "aot_eager") if options.dry else Machine()
    known = layer_ways(torch.zeros(1, 1, dtype=torch.int64), 1, machine.backend)
    if unknown := [way for way in options.layers or [] if way not in known]:
        parser.error(f"no ways: {', '.join(unknown)}; there are {'; '.join(known)}")
    shapes = options.shapes or (DRY if options.dry else SHAPES)
    try:
        todo = records.part_of(jobs(shapes, options.routing, options.layers), options.part)
    except ValueError as error:
        parser.error(str(error))
    name, ceiling = ("dry run", 0.0) if options.dry else (torch.cuda.get_device_name(), timing.dense_tflops())
    out = options.out or (None if options.dry else Path("benchmarks/results"))
    record = records.Record(out, name, "kernels_gpu")
    print(", ".join([name, *(f"{package} {version}" for package, version in records.versions().items())]))
    print(f"dense 8192^3 bf16: {ceiling:.0f} TFLOP/s; percentages are of that")

    def keep(row: dict) -> None:
        if not row.get("no_time"):
            record.add(row | {"dense_tflops": ceiling})
        print(gpu_page.line(row, ceiling), flush=True)

    done = functools.partial(record.has, options.since)
    left_out = False
    for row in measured(todo, machine, Limits(stop, options.row_limit_s, done, keep), options.layers):
        keep(row)
        left_out = left_out or bool(row.get("no_time"))
        if row.get("red") and (why := timing.lost(machine.device)):
            print(f"the device runs nothing more in this process: {why}; run it again with --since")
            return records.LEFT_OUT
    if options.page is not None:
        gpu_page.write(options.page, name, record.rows())
    return records.LEFT_OUT if left_out else records.RED if record.red() else 0


if __name__ == "__main__":
    sys.exit(main())
