"""Rows of kernels_gpu for one shape and routing: kernels alone, the products of a layer, and layers by all ways.

Each is checked, and then timed: see kernels_gpu.py for what is red.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import limits, peers, records, timing
from benchmarks.peers import routed
from benchmarks.peers import ways as layer_ways
from benchmarks.timing import BOUND_OF_KEPT, BOUND_OF_RATIO, Machine, first_line, why_wrong

GRAPHED = 256  # tokens up to which a layer of ours is timed in a CUDA graph too
ROUNDINGS = 6  # of a layer, one after the other: gate and up, activation, their product, the next product, the result
LOOP = "loop of torch.mm"
Results = Callable[[], list[Tensor]]


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
            wide = x.to(self.wide), dy.to(self.wide), weights.to(self.wide)
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
            leaves = parameters(swapped(up) if way.up_first else up)
            inference, step = steps(way.layer, leaves)

            roundings = ROUNDINGS if records.is_ours(name) else ROUNDINGS + self.K  # they round each sum over k
            checks: dict[str, Any] = {"roundings": roundings}
            yield from self.row("layer forward", name, inference, lambda: wanted()[:1], inference,
                                loop=lambda: loops()[:1], flop=flop, bytes=size, **checks)  # fmt: skip
            kept = functools.partial(
                self.machine.kept_bytes, functools.partial(way.layer, *leaves), leaves[:2], leaves[2:]
            )
            back = functools.partial(gate_first, step, way.up_first)
            yield from self.row("layer f+b", name, back, wanted, step, loop=loops, flop=3 * flop, kept=kept,
                                kept_bound=formula if way.lean else None, **checks)  # fmt: skip
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
            replay = functools.cache(functools.partial(timing.captured, run))
            its = [functools.partial(some, of, count) for of in (wanted, loops)]
            yield from self.row(what, name, functools.partial(copies, replay), its[0], functools.partial(again, replay),
                                loop=its[1], flop=times * flop, **checks)  # fmt: skip


def swapped(up: Tensor) -> Tensor:
    """The two halves of [E, 2I, H] in turn."""
    return torch.cat(up.chunk(2, 1)[::-1], 1)


def gate_first(step: Results, up_first: bool) -> list[Tensor]:
    """Results of a step, with the gradient of `up` as everybody has it."""
    out, dx, dweights, dup, ddown = step()
    return [out, dx, dweights, swapped(dup) if up_first else dup, ddown]


def some(results: Results, count: int) -> list[Tensor]:
    return results()[:count]


def again(replay: Callable[[], Results]) -> list[Tensor]:
    """What a captured step gives, until the next time."""
    return replay()()


def copies(replay: Callable[[], Results]) -> list[Tensor]:
    return [value.clone() for value in replay()()]


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
