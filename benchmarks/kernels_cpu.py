"""Time the CPU kernels beside the matrix products alone: one torch.mm an expert, and torch.bmm where rows are equal.

    python -m benchmarks.kernels_cpu [--quick] [--shapes T,D,F,E,K ...] [--routing random ...] [--threads 0]
                                     [--out benchmarks/results]

Routing is random; even, where all experts can have as many rows; or skewed, where expert e is chosen in proportion to
1 / (e + 1) and the last one by nobody: how well threads share experts of all sizes. T tokens, D model width, F expert
width, E experts, K experts a token. The peers get sorted rows. "torch.mm" and "torch.bmm" write into outputs that
exist; ours gives new ones, as a step of training needs them, and so does "mm, new": products into the parts of one
new stack. A whole block is `expert_mlp` (gated, SiLU) forward and backward, from unsorted tokens to all gradients;
beside it stand its six products alone. Ways take turns in one process, times are medians, ratios are peer / ours. A
kernel whose error against float64 is red is not timed, and the exit status is 1.
"""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import pages
from moe_compile import cpu, ops
from moe_compile.demo.machine import machine_facts
from moe_compile.demo.summary import number
from moe_compile.ops import groups

SHAPES = [
    "16,512,256,128,8", "16,1024,1024,8,2", "128,512,256,64,4", "512,256,256,64,4", "512,256,128,64,8",
    "512,512,256,128,8", "2048,512,512,16,2", "2048,1024,1024,16,4", "4096,512,512,8,2",
]  # fmt: skip
QUICK = ["16,256,128,64,4", "512,256,256,64,4", "1024,256,256,8,2"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUTINGS = ("random", "even", "skewed")
PEERS = ("torch.mm", "mm, new", "torch.bmm")
BOUND, BOUNDS = 0.9, {"block": 0.8}  # of the time of the products alone
Call = Callable[[], Any]


@dataclass
class Row:
    """Medians of one kernel and its peers on one shape."""

    shape: str
    routing: str
    dtype: str
    what: str
    gflop: float
    red: str | None  # why it was not timed
    ms: dict[str, float]  # by way
    first_ms: dict[str, float]  # the very first call, in which a library may compile

    def ratio(self, peer: str) -> float:
        """How many times as long the peer takes."""
        return self.ms.get(peer, float("nan")) / self.ms.get("ours", float("nan"))


@dataclass
class Problem:
    """Operands of one shape; rows sorted by expert."""

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    up: Tensor  # [E, 2F, D]
    down: Tensor  # [E, D, F]
    dout_TD: Tensor

    def __post_init__(self) -> None:
        E = self.up.shape[0]
        self.x_RD, self.ends, self.order = ops.dispatch(self.x_TD, self.ids_TK, E)
        g = torch.Generator().manual_seed(1)
        R, (_, D, F) = self.x_RD.shape[0], self.down.shape
        self.h_RG, self.a_RF, self.y_RD = (
            torch.randn(R, width, generator=g).to(self.x_TD.dtype) for width in (2 * F, F, D)
        )


def problem(shape: str, routing: str, dtype: torch.dtype) -> Problem:
    """Random operands, with `routing` as above."""
    T, D, F, E, K = map(int, shape.split(","))
    g = torch.Generator().manual_seed(0)
    if routing == "even":
        ids = torch.arange(T * K).remainder(E).view(T, K)
    else:
        odds = torch.ones(E) if routing == "random" else 1 / torch.arange(1.0, E + 1)
        if routing == "skewed":
            odds[-1] = 0
        ids = odds.expand(T, E).multinomial(K, generator=g)

    def random(*sizes: int) -> Tensor:
        return (torch.randn(*sizes, generator=g) / sizes[-1] ** 0.5).to(dtype)

    weights = torch.rand(T, K, generator=g).to(dtype)
    return Problem(random(T, D), ids, weights, random(E, 2 * F, D), random(E, D, F), random(T, D))


# -- ways -----------------------------------------------------------------------------------


def one_by_one(pairs: Sequence[tuple[Tensor, Tensor]]) -> Call:
    """torch.mm of each pair, into memory that exists."""
    work = [(a, b, a.new_empty(a.shape[0], b.shape[1])) for a, b in pairs]

    def call() -> None:
        for a, b, out in work:
            torch.mm(a, b, out=out)

    return call


def into_new(stacks: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Call:
    """torch.mm of each pair, into the parts of new memory for each stack of products."""
    work = []
    for pairs in stacks:
        sizes = [(a.shape[0], b.shape[1]) for a, b in pairs]
        work.append((sum(m * n for m, n in sizes), [(a, b, m, n) for (a, b), (m, n) in zip(pairs, sizes, strict=True)]))

    def call() -> None:
        for total, parts in work:
            memory, begin = parts[0][0].new_empty(total), 0
            for a, b, m, n in parts:
                torch.mm(a, b, out=memory[begin : begin + m * n].view(m, n))
                begin += m * n

    return call


def batched(a: Tensor, b: Tensor) -> Call:
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return lambda: torch.bmm(a, b, out=out)


def products(p: Problem, routing: str) -> dict[str, dict[str, Any]]:
    """For each kind of product with the first weights: our call, its definition, and the peers."""
    rows, E = list(groups(p.ends)), p.up.shape[0]
    x, dh, w, wt = p.x_RD, p.h_RG, p.up, p.up.transpose(1, 2)
    forward, inputs = ([f(e, r) for e, r in rows] for f in (lambda e, r: (x[r], wt[e]), lambda e, r: (dh[r], w[e])))
    ends = [0, *p.ends.tolist()]  # a stack of gradients has those of experts without rows too, which are zero
    weights = [(dh[a:b].t(), x[a:b]) for a, b in itertools.pairwise(ends)]
    found: dict[str, dict[str, Any]] = {
        "forward": {
            "ours": lambda: cpu.grouped_gemm(x, [w], p.ends),
            "exact": lambda: ops.grouped_gemm_reference(x.double(), [w.double()], p.ends),
            "torch.mm": one_by_one(forward),
            "mm, new": into_new([forward]),
        },
        "input grad.": {
            "ours": lambda: cpu.grouped_gemm(dh, [wt], p.ends),
            "exact": lambda: ops.grouped_gemm_reference(dh.double(), [wt.double()], p.ends),
            "torch.mm": one_by_one(inputs),
            "mm, new": into_new([inputs]),
        },
        "weight grad.": {
            "ours": lambda: cpu.grouped_gemm_dw(dh, x, p.ends),
            "exact": lambda: ops.grouped_gemm_dw_reference(dh.double(), x.double(), p.ends),
            "torch.mm": one_by_one(weights),
            "mm, new": into_new([weights]),
        },
    }
    if routing == "even":
        xs, dhs = x.view(E, -1, x.shape[1]), dh.view(E, -1, dh.shape[1])
        for what, (a, b) in zip(found, ((xs, wt), (dhs, w), (dhs.transpose(1, 2), xs)), strict=True):
            found[what]["torch.bmm"] = batched(a, b)
    return found


def block(p: Problem) -> dict[str, Any]:
    """Forward and backward of `expert_mlp`, and its six products alone."""
    E = p.up.shape[0]

    def run(forward: Any, backward: Any, *v: Tensor) -> Tensor:
        x, weights, up, down, dout = v
        out, h, ends, order = forward(x, p.ids_TK, weights, [], [up], [down], E, "silu", True)
        grads = backward(dout, x, h, weights, ends, order, [], [up], [down], "silu", True, True, True)
        return torch.cat([g.reshape(-1) / g.norm() for g in map(Tensor.double, (out, *grads)) if g.numel()])

    def ours() -> None:
        _, h, ends, order = cpu.mlp(p.x_TD, p.ids_TK, p.weights_TK, [], [p.up], [p.down], E, "silu", True)
        routing = p.weights_TK, ends, order
        cpu.mlp_backward(p.dout_TD, p.x_TD, h, *routing, [], [p.up], [p.down], "silu", True, True, True)

    from moe_compile.expert_mlp import backward_reference, reference

    values = p.x_TD, p.weights_TK, p.up, p.down, p.dout_TD
    pairs: list[list[tuple[Tensor, Tensor]]] = []
    for e, r in groups(p.ends):
        x, h, a, y, up, down = p.x_RD[r], p.h_RG[r], p.a_RF[r], p.y_RD[r], p.up[e], p.down[e]
        pairs.append([(x, up.t()), (a, down.t()), (y, down), (h, up), (y.t(), a), (h.t(), x)])
    return {
        "ours": ours,
        "value": lambda: run(cpu.mlp, cpu.mlp_backward, *values),
        "exact": lambda: run(reference, backward_reference, *(v.double() for v in values)),
        "torch.mm": one_by_one([pair for six in pairs for pair in six]),
        "mm, new": into_new(list(zip(*pairs, strict=True))),
    }


# -- measuring ------------------------------------------------------------------------------


def why_wrong(value: Tensor, exact: Tensor, dtype: torch.dtype) -> str | None:
    """A result is off by a rounding of its type and some of its f32 sums in the mean square, or it is red."""
    error = ((value.double() - exact).norm() / exact.norm()).item()
    bound = torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    return None if error <= bound else f"relative error {error:.1e}, bound {bound:.1e}"  # NaN fails too


def timed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def measure(shape: str, routing: str, name: str, rounds: int) -> list[Row]:
    """Check, then time in turns."""
    T, D, F, E, K = map(int, shape.split(","))
    if routing == "even" and T * K % E:
        return []
    p, dtype = problem(shape, routing, DTYPES[name]), DTYPES[name]
    rows = []
    for what, ways in {**products(p, routing), "block": block(p)}.items():
        gflop = 2e-9 * T * K * D * F * (9 if what == "block" else 2)
        row = Row(shape, routing, name, what, gflop, None, {}, {})
        rows.append(row)
        row.red = why_wrong(ways.get("value", ways["ours"])(), ways["exact"](), dtype)
        if row.red:
            continue
        calls = {way: ways[way] for way in ("ours", *PEERS) if way in ways}
        row.first_ms = {way: timed(call) for way, call in calls.items()}
        times: dict[str, list[float]] = {way: [] for way in calls}
        for _ in range(rounds):
            for way, call in calls.items():
                call()  # the caches belong to another way before this
                times[way].append(timed(call))
        row.ms = {way: statistics.median(values) for way, values in times.items()}
    return rows


def show(console: Console, rows: list[Row]) -> None:
    """Print one table."""
    table = Table(title="ratios: peer / ours", title_justify="left")
    for name in ("T,D,F,E,K", "rows", "dtype", "what"):
        table.add_column(name, no_wrap=True)
    for name in ("ours ms", "GFLOP/s", *(f"x {peer}" for peer in PEERS), "first torch.mm"):
        table.add_column(name, justify="right")
    for row in rows:
        head = row.shape, row.routing, row.dtype, row.what
        if row.red:
            table.add_row(*head, "RED", row.red)
            continue
        speeds = number(row.ms["ours"], 2), number(1e3 * row.gflop / row.ms["ours"], 0)
        ratios = [number(row.ratio(peer), 2) for peer in PEERS]
        table.add_row(*head, *speeds, *ratios, number(row.first_ms["torch.mm"], 1))
    console.print(table)


def summary(rows: list[Row], command: str) -> str:
    """Medians and ranges over shapes and routings, and what is below the bounds, for a page."""
    head = ["peer / ours: median (lowest to highest)"]
    lines: dict[str, list[str]] = {what: [what] for what in dict.fromkeys(row.what for row in rows)}
    low = []
    for name in dict.fromkeys(row.dtype for row in rows):
        for peer in ("mm, new", "torch.mm"):
            head.append(f"{name}, {'new memory' if peer == 'mm, new' else 'memory that exists'}")
            for what, line in lines.items():
                here = [r for r in rows if (r.dtype, r.what, r.red) == (name, what, None)]
                ratios = [r.ratio(peer) for r in here]
                line.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
                low += [
                    f"{what} of {r.shape} in {name}, {r.routing}: {r.ratio(peer):.2f}"
                    for r in here
                    if peer == "mm, new" and r.ratio(peer) < BOUNDS.get(what, BOUND)
                ]
    shapes, routings = (list(dict.fromkeys(getattr(row, field) for row in rows)) for field in ("shape", "routing"))
    measured = f"(T,D,F,E,K) {'; '.join(shapes)}; routing {', '.join(routings)}"
    facts = f"{measured}; {machine()}; `{command}`, {time.strftime('%d %B %Y')}."
    below = f"Below {BOUND} of the products alone (a block: {BOUNDS['block']}), into new memory: "
    return f"{facts}\n\n{pages.table(head, list(lines.values()))}\n\n{below}{'; '.join(low) or 'none'}."


def machine() -> str:
    facts = machine_facts("cpu")
    return f"{facts['cores']} cores of an {facts['processor']}, torch {facts['torch']}"


def main(
    shapes: Annotated[list[str] | None, typer.Option(help="T,D,F,E,K; may be given several times.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or several with commas")] = "float32,bfloat16",
    routing: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(ROUTINGS)}; all, if left out")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each way.")] = 15,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0: as torch chooses.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Three small shapes, few rounds.")] = False,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("benchmarks/results"),
    page: Annotated[Path | None, typer.Option(help="A page with a place for a summary.")] = None,
) -> None:
    """Measure products and whole blocks side by side."""
    if threads:
        torch.set_num_threads(threads)
    if unknown := set(routing or ()) - set(ROUTINGS):
        raise typer.BadParameter(f"routing {sorted(unknown)} is not among {', '.join(ROUTINGS)}")
    console = Console(width=max(120, Console().width))
    command = " ".join(["python -m benchmarks.kernels_cpu", *sys.argv[1:]])
    content = {"machine": machine_facts("cpu"), "command": command, "threads": torch.get_num_threads()}
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"kernels_cpu_{time.strftime('%Y%m%d_%H%M%S')}.json"
    rows: list[Row] = []
    for shape in shapes or (QUICK if quick else SHAPES):
        for how in routing or ROUTINGS:
            for name in dtype.split(","):
                rows += measure(shape, how, name, min(rounds, 5) if quick else rounds)
        # After every shape: a run that is cut short keeps what it measured.
        target.write_text(json.dumps({**content, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
        console.print(f"{shape}: measured", style="dim")
    show(console, rows)
    console.print(f"written: {target}")
    if page is not None:
        pages.write_into(page, "kernels_cpu", summary(rows, command))
    if any(row.red for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
