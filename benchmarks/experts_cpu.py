"""Time the experts of a layer on a CPU beside all three forms of transformers, and its default under Inductor.

    python -m benchmarks.experts_cpu [--shapes T,D,F,E,K ...] [--routing random ...] [--dtype float32,bfloat16]
                                     [--rounds 7] [--out benchmarks/results] [--page docs/performance.md]

Each way is transformers' own Qwen3MoeExperts, unmodified, from tokens to tokens: its loop ("eager"), `grouped_mm`,
`batched_mm`, the second under Inductor, and the loop under `moe_ep`. "forward" is without gradients, "forward+backward"
gives those of tokens, routing weights and both stacks. Shapes and routing are those of kernels_cpu.py. Ways take turns
in one process; times are medians, but what takes longer than 300 ms is timed once; ratios are peer / ours. A way whose
error against float64 is red is not timed, and if it is ours the exit status is 1. `batched_mm` gathers its experts'
weights for each pair of a token and an expert: where that is more than 4 GB it is left out.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks import pages
from benchmarks.kernels_cpu import DTYPES, ROUTINGS, SHAPES, Problem, machine, problem, timed
from benchmarks.peers import transformers_experts
from moe_compile.demo.machine import machine_facts

OURS = "moe_ep"
PEERS = {
    "HF eager": ("eager", None),
    "HF grouped_mm": ("grouped_mm", None),
    "HF batched_mm": ("batched_mm", None),
    "HF grouped_mm, Inductor": ("grouped_mm", "inductor"),
}
PARTS = ("forward", "forward+backward")
MOST_BYTES = 4e9
SLOW_MS = 300.0  # what takes longer is timed once
Step = Callable[[], list[Tensor]]


@dataclass
class Row:
    """Medians of one part by all ways on one shape; ways that are red or left out, with the reason."""

    shape: str
    routing: str
    dtype: str
    part: str
    ms: dict[str, float]
    why_not: dict[str, str]

    def ratio(self, peer: str) -> float:
        """How many times as long the peer takes; NaN where one of the two was not timed."""
        return self.ms.get(peer, float("nan")) / self.ms.get(OURS, float("nan"))


def steps(p: Problem, form: str, backend: str | None) -> dict[str, Step]:
    """What a way does for each part: results, and all gradients."""
    layer = transformers_experts(p.ids_TK, p.up.shape[0], form, backend).layer
    if layer is None:
        raise typer.BadParameter("transformers is not installed")
    inputs = [v.detach().requires_grad_() for v in (p.x_TD, p.weights_TK)]
    inputs += [torch.nn.Parameter(v) for v in (p.up, p.down)]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [layer(*inputs)]

    def both() -> list[Tensor]:
        out = layer(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, p.dout_TD)]

    return {"forward": forward, "forward+backward": both}


def in_double(p: Problem) -> Problem:
    return Problem(p.x_TD.double(), p.ids_TK, *(v.double() for v in (p.weights_TK, p.up, p.down, p.dout_TD)))


def why_wrong(found: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> str | None:
    """Each tensor is within some roundings of its type, in the mean square, or it is red."""
    bound = 4 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    errors = [((f.double() - e).norm() / e.norm().clamp_min(1e-30)).item() for f, e in zip(found, exact, strict=True)]
    return None if all(e <= bound for e in errors) else f"relative error {max(errors):.1e}, bound {bound:.1e}"


def measure(shape: str, name: str, routings: list[str], rounds: int) -> Iterator[Row]:
    """Check, then time in turns.  The ids change in place, so that what was compiled stays."""
    T, D, F, E, K = map(int, shape.split(","))
    p = problem(shape, "random", DTYPES[name])
    exact = steps(in_double(p), "eager", None)
    left_out: dict[str, str] = {}
    found: dict[str, dict[str, Step]] = {}
    for way, how in {OURS: ("eager", "moe_ep"), **PEERS}.items():
        if how[0] == "batched_mm" and (size := T * K * 3 * D * F * p.up.element_size()) > MOST_BYTES:
            left_out[way] = f"gathers {1e-9 * size:.0f} GB of weights"
            continue
        found[way] = steps(p, *how)
    for routing in routings:
        if routing == "even" and T * K % E:
            continue
        p.ids_TK.copy_(problem(shape, routing, DTYPES[name]).ids_TK)
        for part in PARTS:
            row = Row(shape, routing, name, part, {}, dict(left_out))
            want = exact[part]()
            for way, parts in found.items():
                if red := why_wrong(parts[part](), want, DTYPES[name]):
                    row.why_not[way] = red
            calls = {way: parts[part] for way, parts in found.items() if way not in row.why_not}
            times: dict[str, list[float]] = {way: [] for way in calls}
            for _ in range(rounds):
                for way, call in calls.items():
                    if not times[way] or times[way][0] < SLOW_MS:
                        call()  # the caches belong to another way before this
                        times[way].append(timed(call))
            row.ms = {way: statistics.median(values) for way, values in times.items()}
            yield row


def lines(rows: list[Row]) -> list[list[str]]:
    """Cells of the page's table: for each type and part the median, lowest and highest ratio to each peer."""
    found = []
    for name in dict.fromkeys(row.dtype for row in rows):
        for part in PARTS:
            here = [r for r in rows if (r.dtype, r.part) == (name, part)]
            cells = [f"{name}, {part}"]
            for peer in PEERS:
                ratios = [r.ratio(peer) for r in here if peer in r.ms and OURS in r.ms]
                spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"
                cells.append(spread)
            found.append(cells)
    return found


def summary(rows: list[Row], command: str) -> str:
    """The table, and every shape on which a form of transformers is ahead."""
    shapes, routings = (list(dict.fromkeys(getattr(row, field) for row in rows)) for field in ("shape", "routing"))
    measured = f"(T,D,F,E,K) {'; '.join(shapes)}; routing {', '.join(routings)}"
    facts = f"{measured}; {machine()}; `{command}`, {time.strftime('%d %B %Y')}."
    behind = [
        f"{r.part} of {r.shape} in {r.dtype}, {r.routing}, to {peer}: {r.ratio(peer):.2f}"
        for r in rows
        for peer in PEERS
        if r.ratio(peer) < 1
    ]
    table = pages.table(["peer / ours: median (lowest to highest)", *PEERS], lines(rows))
    return f"{facts}\n\n{table}\n\nBehind: {'; '.join(behind) or 'on no shape'}."


def main(
    shapes: Annotated[list[str] | None, typer.Option(help="T,D,F,E,K; may be given several times.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or both with a comma")] = "float32,bfloat16",
    routing: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(ROUTINGS)}; all, if left out")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each way.")] = 7,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("benchmarks/results"),
    page: Annotated[Path | None, typer.Option(help="A page with a place for a summary.")] = None,
) -> None:
    """Measure the experts of a layer side by side."""
    if unknown := set(routing or ()) - set(ROUTINGS):
        raise typer.BadParameter(f"routing {sorted(unknown)} is not among {', '.join(ROUTINGS)}")
    console = Console(width=max(120, Console().width))
    command = " ".join(["python -m benchmarks.experts_cpu", *sys.argv[1:]])
    content: dict[str, Any] = {"machine": machine_facts("cpu"), "command": command, "threads": torch.get_num_threads()}
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"experts_cpu_{time.strftime('%Y%m%d_%H%M%S')}.json"
    rows: list[Row] = []
    for shape in shapes or SHAPES:
        for name in dtype.split(","):
            torch._dynamo.reset()
            rows += measure(shape, name, list(routing or ROUTINGS), rounds)
        # After every shape: a run that is cut short keeps what it measured.
        target.write_text(json.dumps({**content, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
        for row in rows:
            if row.shape == shape:
                ratios = ", ".join(f"{peer} {row.ratio(peer):.2f}" for peer in PEERS if peer in row.ms)
                said = f"{row.ms.get(OURS, float('nan')):8.2f} ms; {ratios}; {row.why_not or ''}"
                console.print(f"{shape:22} {row.routing:7} {row.dtype:9} {row.part:17} {said}", markup=False)
    text = summary(rows, command)
    console.print(text, markup=False)
    console.print(f"written: {target}")
    if page is not None:
        pages.write_into(page, "experts_cpu", text)
    if any(OURS in row.why_not for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
