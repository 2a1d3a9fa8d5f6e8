"""How far `moe-compile plan` is from what others have published: predicted beside measured, with the error.

    python -m benchmarks.plan_accuracy [--write]      # --write: the tables of docs/planning.md anew

No number is fitted: products run at the share of the peak that hardware.py states, whatever a row measures.

granite, mixtral   fms-acceleration, scripts/benchmarks/refs (Apache-2.0), its README: 100 steps of 128 samples,
                   full fine-tuning in bfloat16 on A100-80GB, layers checkpointed. Tokens of one GPU and micro-batch
                   follow from its tokens/s, run time and accumulation; tokens/s are of one GPU
TED                Singh et al., DeepSpeed-TED, ICS 2023: the speed-up of its two communication optimisations. What the
                   abstract does not say is assumed: tensor parallelism 4, Summit's nodes, 16384 tokens a GPU
layers             the forward of one gated expert layer on one GPU, bf16, router excluded, as the kernels' authors
                   report it
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from moe_compile.parallel.costs import forward_times
from moe_compile.plan import hardware
from moe_compile.plan.hardware import GPUS
from moe_compile.plan.layouts import Layout
from moe_compile.plan.memory import Setup
from moe_compile.plan.search import Option, predict
from moe_compile.plan.shapes import PRESETS, Shape
from moe_compile.plan.step import Cluster, Ways, experts

PAGE = Path(__file__).parent.parent / "docs" / "planning.md"
BEGIN, END = "<!-- begin: python -m benchmarks.plan_accuracy --write -->", "<!-- end -->"
A100 = Cluster(GPUS["a100"], 8)


@dataclass(frozen=True)
class Row:
    """One published number.  error: predicted over measured, less one."""

    group: str
    what: str
    unit: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def rows() -> list[Row]:
    """Everything that is compared."""
    return [*mixtral(), *granite(), *ted(), *layers()]


# -- fine-tuning on A100 --------------------------------------------------------------------

FSDP_ALONE = Ways(fsdp_alone=True)


def fine_tuning(shape: Shape, layout: Layout, tokens: int, ways: Ways) -> Option:
    """A micro-batch of a bf16 fine-tuning: all of a number in 8 bytes."""
    return predict(shape, layout, A100, Setup(tokens, tokens, kept=2, states=4), ways)


def rate(option: Option, tokens: int, accumulation: int) -> float:
    """Tokens a second of one GPU: gradients are averaged and the optimizer runs once in so many micro-batches."""
    step = option.step
    return tokens / (step.total_us - step.end_us * (1 - 1 / accumulation)) * 1e6


def mixtral() -> Iterator[Row]:
    """Mixtral-8x7B on 8 GPUs, 16 micro-batches of one sample: FSDP alone, and with experts over all 8."""
    tokens = round(83 * 4019 / 1600)  # a micro-batch; with EP 337 * 996 / 1600 = 210
    ways = (
        ("FSDP", Layout(dp_shard=8, splits_experts=True), FSDP_ALONE, 83, 44.0, 54.8),
        ("EP 8", Layout(8, 1, 8), Ways(), 337, 33.5, 45.5),
    )
    rates = []
    for name, layout, way, measured, allocated, peak in ways:
        found = fine_tuning(PRESETS["mixtral-8x7b"], layout, tokens, way)
        rates.append(rate(found, tokens, 16))
        yield Row("mixtral", f"{name}, {tokens} tokens a micro-batch", "tokens/s/GPU", measured, rates[-1])
        memory = found.memory
        state = memory.parameters + memory.gradients + memory.states
        yield Row("mixtral", f"{name}: allocated; predicted: state", "GiB", allocated, state / 2**30)
        yield Row("mixtral", f"{name}: peak", "GiB", peak, memory.total / 2**30)
    yield Row("mixtral", "speed-up by EP", "x", 4019 / 996, rates[1] / rates[0])


# (GPUs, EP, tokens/s of a GPU), accumulation 16 / GPUs, 8 samples a micro-batch: refs/a100_80gb_moe.csv
GRANITE = ((1, 1, 4784), (2, 1, 3657), (4, 1, 3349), (2, 2, 2943), (4, 2, 2901), (4, 4, 2817))


def granite() -> Iterator[Row]:
    """PowerMoE-3b with ScatterMoE's kernels: whole on each GPU, or its experts over 2 or 4."""
    tokens, shape, found = round(4784 * 741.1 / 1600), PRESETS["granite-3b-a800m"], {}
    for gpus, ep, measured in GRANITE:
        option = fine_tuning(shape, Layout(ep, 1, gpus), tokens, Ways())
        found[gpus, ep] = rate(option, tokens, 16 // gpus)
        yield Row("granite", f"{gpus} GPUs, EP {ep}, {tokens} tokens", "tokens/s/GPU", measured, found[gpus, ep])
    for (gpus, ep, measured), (base, base_ep, base_measured) in ((GRANITE[5], GRANITE[2]), (GRANITE[5], GRANITE[0])):
        name = f"{gpus} GPUs with EP {ep} over {base} with EP {base_ep}"
        yield Row("granite", name, "x", measured / base_measured, found[gpus, ep] / found[base, base_ep])
    name = "an older run: EP 4 over EP 1, taken to be on 4 and 1 GPUs"
    yield Row("granite", name, "x", 3494 / 5441, found[4, 4] / found[1, 1])


# -- DeepSpeed-TED --------------------------------------------------------------------------


def ted() -> Iterator[Row]:
    """A GPT-3 6.7B whose every other layer has 16 experts, 40 B in all, on 128 V100."""
    D, layers = 4096, 32
    shape = Shape(
        "ted", layers, layers // 2, D, 4 * D, 16, 1, 50257, 32, D, D, 4 * D * D, dense=8 * D * D, matrices=2, tied=True
    )
    cluster, setup, layout = Cluster(GPUS["v100-16gb"], 6), Setup(16384, 2048, kept=2, states=12), Layout(16, 4, 32)
    yield Row("TED", "parameters", "billions", 40, shape.parameters / 1e9)
    before = Ways(drop_duplicates=False, repeat_collectives=True)
    times = [predict(shape, layout, cluster, setup, w).step.total_us for w in (before, Ways())]
    yield Row("TED", "speed-up by dropping duplicates and repeating no collective", "x", 1.26, times[0] / times[1])


# -- one layer ------------------------------------------------------------------------------

# (T, D, F, E, K), who, on what, TFLOP/s of the forward: the fastest that is published for the shape
LAYERS = (
    ((8192, 2048, 768, 128, 8), "Liger CuTe", "h200", 345),
    ((32768, 2048, 768, 128, 8), "Liger", "h100", 501),
    ((8192, 4096, 14336, 8, 2), "Liger CuTe", "h200", 613),
    ((40960, 768, 256, 128, 8), "SonicMoE", "h100", 337),
    ((24576, 1536, 256, 128, 8), "SonicMoE", "h100", 363),
    ((32768, 4096, 512, 128, 8), "SonicMoE", "h100", 501),
    ((32768, 4096, 1024, 128, 8), "SonicMoE", "h100", 556),
    ((32768, 4096, 2048, 64, 4), "SonicMoE", "h100", 593),
    ((32768, 2048, 512, 512, 10), "torch grouped_mm", "h100", 181),
)


def layers() -> Iterator[Row]:
    """TFLOP/s of the products, over the whole layer's time."""
    for (T, D, F, E, K), who, gpu, measured in LAYERS:
        shape = Shape("layer", 1, 1, D, F, E, K, 1, 1, D, D, 0)
        times = forward_times("grouped", "exact", experts(shape, Layout(), T), hardware.machine(GPUS[gpu]), 8)
        yield Row("layers", f"T={T} D={D} F={F} E={E} K={K}, {who}, {gpu}", "TFLOP/s", measured,
                  6 * T * K * D * F / times.run_us / 1e6)  # fmt: skip


# -- the tables -----------------------------------------------------------------------------


def tables() -> str:
    """All rows as Markdown, and what they come to."""
    found, lines = rows(), []
    for group in dict.fromkeys(row.group for row in found):
        mine = [row for row in found if row.group == group]
        lines += [f"### {group}", "", "| what | unit | published | predicted | error |", "|---|---|---|---|---|"]
        lines += [
            f"| {r.what} | {r.unit} | {short(r.measured)} | {short(r.predicted)} | {r.error:+.0%} |" for r in mine
        ]
        lines.append("")
    lines += ["| kind of number | rows | median of predicted / published | furthest |", "|---|---|---|---|"]
    for unit, name in (
        ("tokens/s/GPU", "speed"),
        ("x", "ratios of speeds"),
        ("GiB", "memory"),
        ("TFLOP/s", "one layer"),
    ):
        ratios = sorted(r.predicted / r.measured for r in found if r.unit == unit)
        furthest = max(ratios, key=lambda ratio: max(ratio, 1 / ratio))
        lines.append(f"| {name} ({unit}) | {len(ratios)} | {statistics.median(ratios):.2f} | {furthest:.2f} |")
    return "\n".join(lines)


def short(number: float) -> str:
    """Three digits."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def page(text: str) -> str:
    """The page with its tables anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main(write: Annotated[bool, typer.Option("--write", help="Write docs/planning.md.")] = False) -> None:
    """Print the tables."""
    print(tables())
    if write:
        PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    typer.run(main)
