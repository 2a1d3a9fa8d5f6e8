"""Training step time of the demo's models: HF eager, HF default, Inductor, and moe_ep on both forms.

    python -m benchmarks.step [--model both] [--rounds 5] [--out benchmarks/results]

All variants live in one process with equal weights and batches. Rounds are interleaved, so a slow
minute of the machine hits every variant. A variant whose first losses differ from HF eager's is
not timed.
"""

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from moe_compile.demo.data import Corpus, load_corpus
from moe_compile.demo.machine import machine_facts
from moe_compile.demo.models import QUICK, REFERENCE, SPECS, ModelSpec, variants
from moe_compile.demo.parity import TOLERANCE, compare_losses
from moe_compile.demo.summary import number
from moe_compile.demo.train import Trainer, TrainSettings, cold_compilers, describe

PARITY_STEPS = 5
BASELINES = (REFERENCE, "hf_default", "hf_inductor")


@dataclasses.dataclass
class Timing:
    """One variant: seconds of its timed steps, or why it was not timed."""

    key: str
    label: str
    max_relative: float = float("nan")
    step_s: list[float] = dataclasses.field(default_factory=list)
    refused: str = ""

    @property
    def median_ms(self) -> float:
        """Median step in milliseconds; NaN when it was not timed."""
        return 1e3 * statistics.median(self.step_s) if self.step_s else float("nan")


def measure(
    spec: ModelSpec, corpus: Corpus, settings: TrainSettings, rounds: int, steps: int, backend: str
) -> list[Timing]:
    """Check every variant against the reference, then time the good ones in interleaved rounds."""
    # Compiled code of all variants must stay alive: one cold start, no reset between them.
    with cold_compilers():
        timings: list[Timing] = []
        trainers: list[tuple[Timing, Trainer]] = []
        reference: list[float] = []
        for variant in variants(backend):
            timing = Timing(variant.key, variant.label)
            timings.append(timing)
            trainer = Trainer(spec, variant, corpus, settings)
            try:
                trainer.compile()
                losses = [trainer.step() for _ in range(PARITY_STEPS)]
            except Exception as error:  # a compiler may raise anything; the others are still timed
                timing.refused = describe(error)
                continue
            reference = reference or losses
            bound = TOLERANCE[str(settings.dtype).removeprefix("torch.")]
            parity = compare_losses(variant.key, reference, losses, bound)
            timing.max_relative = parity.max_relative
            if parity.passed:
                trainers.append((timing, trainer))
            else:
                timing.refused = f"losses differ by {parity.max_relative:.1e}, bound {bound:g}"
        for _ in range(rounds):
            for timing, trainer in trainers:
                trainer.step()  # the caches belong to another variant before this
                timing.step_s += [trainer.timed_step()[1] for _ in range(steps)]
    return timings


def show(console: Console, spec: ModelSpec, timings: list[Timing]) -> None:
    """Print one table."""
    median = {timing.key: timing.median_ms for timing in timings}
    table = Table(title=f"{spec.title}: {spec.sizes}", title_justify="left")
    table.add_column("variant")
    for name in ("step ms", "min ms", "x HF eager", "x HF default", "x Inductor", "loss difference"):
        table.add_column(name, justify="right")
    for timing in timings:
        if timing.refused:
            table.add_row(timing.label, "refused", timing.refused)
            continue
        ratios = [f"{number(median[base] / timing.median_ms, 2)}" for base in BASELINES]
        fastest = number(1e3 * min(timing.step_s), 1)
        table.add_row(timing.label, number(timing.median_ms, 1), fastest, *ratios, f"{timing.max_relative:.0e}")
    console.print(table)


def to_json(spec: ModelSpec, timings: list[Timing]) -> dict[str, Any]:
    """Return one model's results as plain data."""
    entries = [{**dataclasses.asdict(timing), "median_ms": timing.median_ms} for timing in timings]
    return {"model": dataclasses.asdict(spec), "variants": entries}


def main(
    model: Annotated[str, typer.Option(help="mixtral, qwen3_moe or both")] = "both",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps per round and variant.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    backend: Annotated[str, typer.Option(help="The compiler under test.")] = "moe_ep",
    quick: Annotated[bool, typer.Option("--quick", help="One layer instead of two.")] = False,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("benchmarks/results"),
) -> None:
    """Measure the training step of the five variants side by side."""
    settings = TrainSettings(batch_size, length, dtype=getattr(torch, dtype), device=device)
    specs = QUICK if quick else SPECS
    names = tuple(specs) if model == "both" else (model,)
    corpus = load_corpus()
    console = Console(width=max(110, Console().width))
    results, refused = [], False
    for name in names:
        timings = measure(specs[name], corpus, settings, rounds, steps, backend)
        show(console, specs[name], timings)
        results.append(to_json(specs[name], timings))
        refused |= any(timing.refused for timing in timings)
    content = {
        "machine": machine_facts(device),
        "command": " ".join(["python -m benchmarks.step", *sys.argv[1:]]),
        "batch_size": batch_size,
        "length": length,
        "dtype": dtype,
        "models": results,
    }
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"step_{device}_{dtype}_{time.strftime('%Y%m%d_%H%M%S')}.json"
    target.write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"written: {target}")
    if refused:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
