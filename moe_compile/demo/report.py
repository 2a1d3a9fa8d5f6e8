"""The report of a run: one self-contained index.html, its figures as PNG, the record as JSON."""

from html import escape
from pathlib import Path

from moe_compile.demo.models import REFERENCE
from moe_compile.demo.page import badge, card, facts, figure, page, table
from moe_compile.demo.plots import figures
from moe_compile.demo.record import ModelRun, RegionRecord, RunRecord, VariantRun
from moe_compile.demo.summary import number

CAPTIONS = {
    "loss": "Loss curves",
    "step_time": "Median time per step",
    "first_step": "Time to the first step",
}


def write_report(record: RunRecord, directory: Path) -> Path:
    """Write index.html, the PNGs and record.json into `directory`; return the page's path."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {model.name: figures(model) for model in record.models}
    for found in pictures.values():
        for name, png in found.items():
            (directory / f"{name}.png").write_bytes(png)
    record.save(directory / "record.json")
    target = directory / "index.html"
    target.write_text(render(record, pictures), encoding="utf-8")
    return target


def render(record: RunRecord, pictures: dict[str, dict[str, bytes]]) -> str:
    """Return the whole page; `pictures` maps a model's name to its figures."""
    backend = record.settings.get("compiler under test", "moe_ep")
    parts = [
        f"<h1>Mixture-of-experts training with {escape(backend)}</h1>",
        '<p class="soft">Unmodified Hugging Face models, the same seed, weights and batches, '
        "trained five ways in one run.</p>",
        f"<p>{badge(record.passed)} {_verdict(record)}</p>",
        f'<div class="cards">{"".join(_cards(model, backend) for model in record.models)}</div>',
        *(_model(model, pictures.get(model.name, {})) for model in record.models),
        "<h2>Machine and settings</h2>",
        facts({**record.machine, **record.settings, "whole run": f"{record.total_s:.0f} s"}),
        '<p class="soft">Times hold for this machine and its load during the run. '
        "Compilers start cold for every variant: no cache is kept between them.</p>",
    ]
    return page(f"{backend} demo", "\n".join(parts))


def _verdict(record: RunRecord) -> str:
    limit = max((result.tolerance for model in record.models for result in model.parity), default=0)
    steps = max((result.num_steps for model in record.models for result in model.parity), default=0)
    text = f"Losses of the first {steps} steps against the HF eager loop, bound {limit:g}"
    failed = [run.label for model in record.models for run in model.variants if run.error]
    return escape(text + (f"; did not run: {', '.join(failed)}" if failed else "") + ".")


def _cards(model: ModelRun, backend: str) -> str:
    over_eager = number(model.speed_up("moe_ep_loop", REFERENCE), 1)
    over_inductor = number(model.speed_up("moe_ep_loop", "hf_inductor"), 2)
    return card(f"{over_eager}x", f"{model.title}: {backend} on the eager loop, step time over HF eager") + card(
        f"{over_inductor}x", f"{model.title}: the same, over HF default + Inductor"
    )


def _model(model: ModelRun, pictures: dict[str, bytes]) -> str:
    shown = {
        kind: figure(pictures[f"{model.name}_{kind}"], f"{caption}, {model.title}")
        for kind, caption in CAPTIONS.items()
        if f"{model.name}_{kind}" in pictures
    }
    return "\n".join(
        [
            f"<h2>{escape(model.title)}</h2>",
            f'<p class="soft">{escape(model.sizes)}; {model.num_parameters / 1e6:.1f} M '
            f"parameters; {model.tokens_per_step} tokens per step</p>",
            _times(model),
            shown.get("loss", ""),
            f'<div class="pair">{shown.get("step_time", "")}{shown.get("first_step", "")}</div>',
            f"<p>Loss on held-out text: {number(model.validation_before, 3)} before training, "
            f"<b>{number(model.validation_after, 3)}</b> after.</p>",
            "<h3>What the compiler found</h3>",
            _regions(model),
            _graphs(model),
            _generated(model),
        ]
    )


def _times(model: ModelRun) -> str:
    head = ("Variant", "Steps", "First step (s)", "Step (ms)", "Tokens/s", "Over HF eager",
            "Over Inductor", "Loss difference", "Losses")  # fmt: skip
    times = [run.median_s if run.median_s == run.median_s else float("inf") for run in model.variants]
    best = times.index(min(times)) if times else -1
    return table(head, [_row(model, run) for run in model.variants], numeric=7, best=best)


def _row(model: ModelRun, run: VariantRun) -> tuple[str, ...]:
    parity = next((result for result in model.parity if result.key == run.key), None)
    if run.error:
        return (escape(run.label), *[""] * 7, f"{badge(False, 'ERROR')} {escape(run.error)}")
    return (
        escape(run.label),
        str(len(run.losses)),
        number(run.first_step_s, 1),
        number(run.median_s * 1e3, 0),
        number(model.tokens_per_step / run.median_s, 0),
        f"{number(model.speed_up(run.key, REFERENCE), 2)}x",
        f"{number(model.speed_up(run.key, 'hf_inductor'), 2)}x",
        f"{parity.max_relative:.1e}" if parity else "",
        badge(parity.passed) if parity else badge(None, "reference"),
    )


def _regions(model: ModelRun) -> str:
    if model.explain_error:
        return f"<p>{badge(False, 'ERROR')} {escape(model.explain_error)}</p>"
    head = ("Run as", "Experts", "Top-k", "Rewritten", "Module", "Where", "Form, or why not")
    rows = [
        (
            escape(label),
            str(region.num_experts),
            "" if region.top_k is None else str(region.top_k),
            badge(region.matched, "yes" if region.matched else "no"),
            f"<code>{escape(region.module)}</code>",
            f"<code>{escape(region.location)}</code>",
            escape(region.form if region.matched else region.reason or ""),
        )
        for label, regions in model.regions.items()
        for region in regions
    ]
    return table(head, rows, numeric=2) if rows else "<p>No expert region was found.</p>"


def _graphs(model: ModelRun) -> str:
    region = _printed_region(model)
    if region is None:
        return ""
    return (
        f"<details open><summary>The graph of <code>{escape(region.module)}</code> before and "
        f'after</summary><div class="pair"><div><h3>Before</h3><pre>{escape(shortened(region.before))}</pre>'
        f"</div><div><h3>After</h3><pre>{escape(shortened(region.after))}</pre></div></div></details>"
    )


def shortened(text: str, num_lines: int = 60) -> str:
    """Return the first and last lines of a long graph, and how many lie between."""
    lines = text.splitlines()
    if len(lines) <= num_lines:
        return text
    half = num_lines // 2
    return "\n".join([*lines[:half], f"... {len(lines) - 2 * half} more lines ...", *lines[-half:]])


def _printed_region(model: ModelRun) -> RegionRecord | None:
    found = (region for regions in model.regions.values() for region in regions)
    return next((region for region in found if region.matched and region.before), None)


def _generated(model: ModelRun) -> str:
    head = "<h3>Text written by the trained, compiled model</h3>"
    if model.generate_error:
        return f"{head}<p>{badge(False, 'ERROR')} {escape(model.generate_error)}</p>"
    if not model.generated:
        return ""
    return (
        f"{head}"
        f'<p class="soft">{len(model.generated)} characters in {number(model.generate_s, 1)} s, '
        "compilation of the two inference graphs included; static key-value cache; the prompt is "
        f'grey.</p><pre class="text"><i>{escape(model.prompt)}</i>{escape(model.generated)}</pre>'
    )
