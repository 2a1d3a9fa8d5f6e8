"""PNG figures from a record: loss curves, step times, times to the first step."""

import io
import math
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_compile.demo.models import REFERENCE
from moe_compile.demo.record import ModelRun, VariantRun

COLORS = {
    "hf_eager": "#6b7280",
    "hf_default": "#94a3b8",
    "hf_inductor": "#d97706",
    "moe_ep_loop": "#2563eb",
    "moe_ep_default": "#0d9488",
}
STYLE = {"hf_eager": "-", "hf_default": "--", "hf_inductor": "-.", "moe_ep_default": ":"}
Draw = Callable[[Figure, ModelRun], None]


def figures(model: ModelRun) -> dict[str, bytes]:
    """Return every figure of one model as PNG bytes, keyed by file name without the suffix."""
    drawings: dict[str, Draw] = {
        "loss": _losses,
        "step_time": _step_times,
        "first_step": _first_steps,
    }
    return {f"{model.name}_{name}": _png(draw, model) for name, draw in drawings.items()}


def _png(draw: Draw, model: ModelRun) -> bytes:
    wide = draw is _losses
    figure = Figure(figsize=(10.5, 4.2) if wide else (7.2, 3.2), dpi=130, layout="constrained")
    draw(figure, model)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _losses(figure: Figure, model: ModelRun) -> None:
    left, right = figure.subplots(1, 2)
    longest = max(model.variants, key=lambda run: len(run.losses))
    compared = max((result.num_steps for result in model.parity), default=20)
    steps = range(1, len(longest.losses) + 1)
    left.plot(steps, longest.losses, color=_color(longest), lw=1.1, label=longest.label)
    if not math.isnan(model.validation_after):
        left.plot(
            [len(longest.losses)],
            [model.validation_after],
            "o",
            color="#b91c1c",
            label="held-out text",
        )
    left.set_title("Training to the end")
    for run in sorted(model.variants, key=lambda run: run.key != "moe_ep_loop"):
        shown = run.losses[:compared]
        lw = 4.5 if run.key == "moe_ep_loop" else 1.6
        right.plot(
            range(1, len(shown) + 1), shown, color=_color(run), label=run.label, lw=lw,
            ls=STYLE.get(run.key, "-"), alpha=0.45 if lw > 2 else 1.0,
        )  # fmt: skip
    right.set_title(f"The first {compared} steps, all variants")
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per byte, with balancing term)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
        _plain(axes)


def _step_times(figure: Figure, model: ModelRun) -> None:
    def note(run: VariantRun) -> str:
        return f"{run.median_s * 1e3:.0f} ms   {model.speed_up(run.key, REFERENCE):.2f}x"

    _bars(figure, model, lambda run: run.median_s * 1e3, note, "median time per step (ms)")


def _first_steps(figure: Figure, model: ModelRun) -> None:
    def note(run: VariantRun) -> str:
        return f"{run.first_step_s:.1f} s"

    label = "time to the end of the first step, compilation included (s)"
    _bars(figure, model, lambda run: run.first_step_s, note, label)


def _bars(
    figure: Figure,
    model: ModelRun,
    value: Callable[[VariantRun], float],
    note: Callable[[VariantRun], str],
    label: str,
) -> None:
    axes = figure.subplots()
    shown = [run for run in model.variants if math.isfinite(value(run))]
    widths = [value(run) for run in shown]
    places = range(len(shown))
    axes.barh(places, widths, color=[_color(run) for run in shown], height=0.62)
    for place, run, width in zip(places, shown, widths, strict=True):
        axes.annotate(note(run), (width, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(list(places), [run.label for run in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(widths, default=1.0))
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    _plain(axes)


def _color(run: VariantRun) -> str:
    return COLORS.get(run.key, "#111827")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
