"""First-call time (compile and run, forward and backward) of moe_ep beside Inductor.

    python -m benchmarks.first_call [--repeats 3] [--only models|experts|depth] [--out DIR]

models   the demo's models: moe_ep on both forms over Inductor on HF default
experts  8 and 128 experts of equal size: the ratio shows whether cost grows with their number
depth    2 and 8 layers, beside a dense Llama of the same width and depth under Inductor

Each number is the median of fresh processes with all compiler caches off. The clocks start after
imports, model building and a small compilation that starts Inductor and its tools. Beside seconds,
CPU seconds of the process and of the C++ compilers it starts: these swing less on a busy machine.
"""

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moe_compile.demo.machine import machine_facts
from moe_compile.demo.models import SPECS, ModelSpec, build_model, variants
from moe_compile.demo.summary import number
from moe_compile.demo.train import cold_compilers, warm_up_toolchain

EXPERTS_RATIO_BOUND = 1.3  # first call at 128 experts over 8 experts
SMALL = ModelSpec("qwen3_moe", "Qwen3-MoE", 8, 2, 256, 64, 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to time: a model and a variant key, or the dense model ("dense")."""

    group: str
    spec: ModelSpec
    variant: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one first call took, in seconds."""

    first_call_s: float
    self_cpu_s: float
    compilers_cpu_s: float

    @property
    def cpu_s(self) -> float:
        """CPU seconds, C++ compilers included."""
        return self.self_cpu_s + self.compilers_cpu_s


FAILED = Cost(float("nan"), float("nan"), float("nan"))


def cases(only: str) -> list[Case]:
    """Return the cases of one group, or of all."""
    compiled = ("hf_inductor", "moe_ep_loop", "moe_ep_default")
    found = [Case("models", spec, key) for spec in SPECS.values() for key in compiled]
    for num_experts in (8, 128):
        spec = replace(SMALL, num_experts=num_experts)
        found += [Case("experts", spec, key) for key in compiled]
    for num_layers in (2, 8):
        spec = replace(SMALL, num_layers=num_layers)
        found += [Case("depth", spec, key) for key in ("dense", "moe_ep_loop")]
    return [case for case in found if only in ("all", case.group)]


def time_first_call(case: Case, batch_size: int = 4, length: int = 128) -> Cost:
    """Return the cost of the first forward and backward, compilation included, in this process."""
    import torch

    warm_up_toolchain("cpu")
    variant = next((entry for entry in variants() if entry.key == case.variant), None)
    if variant is None:
        model, backend = _dense(case.spec), "inductor"
    else:
        model, backend = build_model(case.spec, variant.experts), variant.backend or "eager"
    tokens = torch.randint(0, 256, (batch_size, length), generator=torch.manual_seed(0))
    with cold_compilers():
        before = _clocks()
        model.compile(backend=backend)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        return Cost(*(after - start for after, start in zip(_clocks(), before, strict=True)))


def _clocks() -> tuple[float, float, float]:
    """Seconds; CPU seconds of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), time.process_time(), children.ru_utime + children.ru_stime


def _dense(spec: ModelSpec) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=spec.width,
        intermediate_size=spec.expert_width * spec.top_k,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
    )
    return LlamaForCausalLM(config).train()


def in_fresh_process(case: Case) -> Cost:
    """Run `time_first_call` in a new interpreter and return its cost; NaN when it fails."""
    content = json.dumps(dataclasses.asdict(case))
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.first_call", "--one", content]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return FAILED
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def show(console: Console, group: str, entries: list[tuple[Case, list[Cost]]]) -> None:
    """Print the table of one group."""
    table = Table(title=f"first call, {group} (s)", title_justify="left")
    names = ("model", "layers", "experts", "variant", "median s", "min s", "over Inductor", "CPU s", "over Inductor")
    for name in names:
        table.add_column(name, justify="left" if name in ("model", "variant") else "right")
    inductor = {case.spec: costs for case, costs in entries if case.variant == "hf_inductor"}
    for case, costs in entries:
        spec = case.spec
        seconds, cpu = _medians(costs)
        reference, reference_cpu = _medians(inductor.get(spec, [FAILED]))
        dense = case.variant == "dense"
        table.add_row(
            "Llama" if dense else spec.title,
            str(spec.num_layers),
            "" if dense else str(spec.num_experts),
            "dense + Inductor" if dense else case.variant,
            number(seconds, 1),
            number(min(cost.first_call_s for cost in costs), 1),
            number(seconds / reference, 2),
            number(cpu, 1),
            number(cpu / reference_cpu, 2),
        )
    console.print(table)


def _medians(costs: list[Cost]) -> tuple[float, float]:
    """Seconds, CPU seconds."""
    return median([cost.first_call_s for cost in costs]), median([cost.cpu_s for cost in costs])


def experts_ratios(entries: list[tuple[Case, list[Cost]]]) -> dict[str, float]:
    """Return for each variant the first call at the most experts over the one at the fewest."""
    ratios = {}
    for key in dict.fromkeys(case.variant for case, _ in entries):
        times = {case.spec.num_experts: _medians(costs)[0] for case, costs in entries if case.variant == key}
        ratios[key] = times[max(times)] / times[min(times)]
    return ratios


def median(times: list[float]) -> float:
    """Median; NaN as soon as one run failed."""
    return statistics.median(times) if all(t == t for t in times) else float("nan")


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Fresh processes per number.")] = 3,
    only: Annotated[str, typer.Option(help="models, experts, depth or all")] = "all",
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("benchmarks/results"),
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure first calls in fresh processes."""
    if one:
        entry = json.loads(one)
        cost = time_first_call(Case(entry["group"], ModelSpec(**entry["spec"]), entry["variant"]))
        print(json.dumps(dataclasses.asdict(cost)))
        return
    console = Console(width=max(110, Console().width))
    measured: list[tuple[Case, list[Cost]]] = [(case, []) for case in cases(only)]
    for _ in range(repeats):  # rounds over all cases: a slow minute does not hit one case alone
        for case, costs in measured:
            costs.append(cost := in_fresh_process(case))
            spec = case.spec
            size = f"{spec.title} {spec.num_layers} layers, {spec.num_experts} experts"
            console.print(f"{case.group}: {size}, {case.variant}: {number(cost.first_call_s, 1)} s", style="dim")
    for group in dict.fromkeys(case.group for case, _ in measured):
        show(console, group, [entry for entry in measured if entry[0].group == group])
    ratios = experts_ratios([entry for entry in measured if entry[0].group == "experts"])
    late = [key for key, r in ratios.items() if "moe_ep" in key and not r <= EXPERTS_RATIO_BOUND]
    for key, ratio in ratios.items():
        console.print(f"128 over 8 experts, {key}: {ratio:.2f} (bound {EXPERTS_RATIO_BOUND})")
    content = {
        "machine": machine_facts(),
        "command": " ".join(["python -m benchmarks.first_call", *sys.argv[1:]]),
        "experts_ratio": ratios,
        "cases": [
            {
                **dataclasses.asdict(case),
                **{key: [getattr(c, key) for c in costs] for key in dataclasses.asdict(FAILED)},
            }
            for case, costs in measured
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"first_call_{only}_{time.strftime('%Y%m%d_%H%M%S')}.json"
    target.write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"written: {target}")
    if late:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
