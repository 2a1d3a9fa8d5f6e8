"""The terminal summary of a run."""

import math

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from moe_compile.demo.models import REFERENCE
from moe_compile.demo.record import ModelRun, RunRecord


def print_summary(record: RunRecord, console: Console | None = None) -> None:
    """Print tables of times and parity, what was found, and the generated text."""
    console = console or Console(width=max(110, Console().width))
    for model in record.models:
        console.print(_table(model))
        for form, regions in model.regions.items():
            matched = sum(region.matched for region in regions)
            console.print(f"{form}: {matched} of {len(regions)} expert regions rewritten")
        if model.explain_error:
            console.print(f"explain: {model.explain_error}", style="red", markup=False)
        console.print(f"validation loss {model.validation_before:.3f} -> {model.validation_after:.3f}")
        if model.generated or model.generate_error:
            text = Text(model.generate_error or model.prompt + model.generated)
            console.print(Panel(text, title="generated text", title_align="left"))
    console.print(f"{'PASS' if record.passed else 'FAIL'}  in {record.total_s:.0f} s", style="bold")


def _table(model: ModelRun) -> Table:
    table = Table(
        title=f"{model.title}: {model.sizes}, {model.num_parameters / 1e6:.1f} M parameters",
        title_justify="left",
    )
    table.add_column("variant")
    for name in ("steps", "first step s", "step ms", "speed-up", "last loss", "loss difference"):
        table.add_column(name, justify="right")
    table.add_column("losses")
    for run in model.variants:
        parity = next((result for result in model.parity if result.key == run.key), None)
        if run.error:
            table.add_row(run.label, *[""] * 6, escape(f"ERROR {run.error}"))
            continue
        table.add_row(
            run.label,
            str(len(run.losses)),
            number(run.first_step_s, 1),
            number(run.median_s * 1e3, 0),
            f"{number(model.speed_up(run.key, REFERENCE), 2)}x",
            number(run.losses[-1], 3),
            f"{parity.max_relative:.1e}" if parity else "",
            ("PASS" if parity.passed else "FAIL") if parity else "reference",
        )
    return table


def number(value: float, digits: int) -> str:
    """Format a number; a missing one (NaN) is a dash."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
