"""What capture and proof cost, in CPU time of the process and in wall time, and how they grow with the experts.

    python -m benchmarks.capture_cost [--repeats 3] [--only qwen|experts|dynamo|plain] [--out DIR]

qwen     the shape of Qwen3-30B-A3B (48 layers, 128 experts, 8 a token) on the meta device, both of transformers' forms:
         everything that the hook adds to Dynamo, capture, proof, guards and the translation of the rewrite
experts  one proof at 8, 64 and 512 experts: transformers' loop over chosen experts, `for e in range(E)`, a ModuleList;
         beside it "unrolled": every iteration of the loop traced
dynamo   the first call of a compiled list of modules, eager behind Dynamo: rewritten, proof included; beside it
         "lifted", Dynamo alone on a forward that hands the same weights to two products: what no proof can save
plain    a dense Llama under Dynamo alone: its compile with the backend's hook asked at each call, over the same without

Each number is from a fresh process, after one proof of another kind (imports, first uses) has run.
"""

import dataclasses
import functools
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.first_call import median
from moe_compile.demo.machine import machine_facts
from moe_compile.demo.summary import number

SECONDS_BOUND = 10.0  # qwen: added to Dynamo
RATIO_BOUND = 1.3  # experts: 512 over 8
PLAIN_BOUND = 0.02  # plain: added to a model without experts
COUNTS = (8, 64, 512)


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure: `form` and `size` are the group's own."""

    group: str
    form: str
    size: int
    unrolled: bool = False


def cases(only: str) -> list[Case]:
    """Return the cases of one group, or of all."""
    found = [Case("qwen", form, 48) for form in ("eager", "grouped_mm")]
    for form in ("chosen", "range", "modules"):
        found += [Case("experts", form, size) for size in COUNTS]
    found += [Case("experts", "chosen", size, unrolled=True) for size in COUNTS]
    found += [Case("dynamo", form, size) for form in ("rewritten", "lifted") for size in (COUNTS[0], COUNTS[-1])]
    found += [Case("plain", form, 8) for form in ("without", "with")]
    return [case for case in found if only in ("all", case.group)]


# -- in a fresh process ---------------------------------------------------------------------


@dataclasses.dataclass
class Clock:
    """CPU and wall seconds, summed over the times that it ran."""

    cpu_s: float = 0.0
    wall_s: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add what the block takes."""
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            self.cpu_s += time.process_time() - cpu
            self.wall_s += time.perf_counter() - wall

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time added."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                return call(*args, **kwargs)

        return timed


def measure(case: Case) -> Clock:
    """Run one case in this process."""
    return {"qwen": qwen, "experts": one_proof, "dynamo": first_call, "plain": plain}[case.group](case)


def qwen(case: Case) -> Clock:
    """Time everything that the hook does while the whole model is compiled."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moe_compile import dynamo_hook

    prove("chosen", 8)
    sizes: dict[str, Any] = dict(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=case.size, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        norm_topk_prob=True,
    )  # fmt: skip
    config = Qwen3MoeConfig(**sizes)
    config._experts_implementation = case.form
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    clock = Clock()
    dynamo_hook._rewritten = clock.around(dynamo_hook._rewritten)
    model.compile(backend="moe_ep", options={"inner": "eager", "strict": True})
    model(input_ids=torch.zeros(1, 64, dtype=torch.long, device="meta"), use_cache=False)
    return clock


def one_proof(case: Case) -> Clock:
    """Time one proof, from the function to its rewritten form."""
    from moe_compile import analysis

    prove(case.form, COUNTS[0])
    if case.unrolled:
        analysis._prove = functools.partial(analysis._proven, visit=None)  # type: ignore[assignment]
    clock = Clock()
    prove(case.form, case.size, clock)
    return clock


def prove(form: str, num_experts: int, clock: Clock | None = None) -> None:
    """Prove a module of the form, of which nothing is known yet."""
    from moe_compile import kinds
    from moe_compile.arguments import Known
    from tests.detect.loops import any_length
    from tests.tiny import Separate, routed

    forms: dict[str, Callable[..., Any]] = {"chosen": _mixtral, "range": _ranged, "modules": Separate}
    module = forms[form](num_experts=num_experts)
    args = any_length(routed(num_experts=num_experts))
    kinds.forget()
    with (clock or Clock()).running():
        kind = kinds.kind_of(inspect.unwrap(type(module).forward), module, args, {}, Known((1,)), frozenset())
    if isinstance(kind, kinds.Declined):
        raise RuntimeError(kind.reason)


def _mixtral(num_experts: int) -> Any:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    from tests.tiny import D

    config = MixtralConfig(hidden_size=D, intermediate_size=2 * D, num_local_experts=num_experts)
    config._experts_implementation = "eager"
    return MixtralExperts(config)


def _ranged(num_experts: int) -> Any:
    import torch
    from torch import Tensor, nn

    from tests.tiny import Experts

    class Ranged(Experts):
        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for e in range(self.num_experts):
                t, k = torch.where(ids == e)
                gate, up = nn.functional.linear(x[t], self.w13[e]).chunk(2, -1)
                y = nn.functional.linear(self.act(gate) * up, self.w2[e])
                out.index_add_(0, t, y * weights[t, k, None])
            return out

    return Ranged(num_experts)


def first_call(case: Case) -> Clock:
    """Time the first call of a list of modules; one of another size came before."""
    import torch

    from moe_compile import kinds
    from tests.tiny import routed

    backend: Any = {"backend": "eager"}
    if case.form == "rewritten":
        backend = {"backend": "moe_ep", "options": {"inner": "eager", "strict": True}}
    for num_experts, clock in ((COUNTS[1], Clock()), (case.size, Clock())):
        torch._dynamo.reset()
        kinds.forget()
        module = _lifted(num_experts) if case.form == "lifted" else _separate(num_experts)
        inputs = routed(num_experts=num_experts)
        with clock.running(), torch.no_grad():
            torch.compile(module, **backend)(*inputs)
    return clock


def _separate(num_experts: int) -> Any:
    from tests.tiny import Separate

    return Separate(num_experts=num_experts)


def _lifted(num_experts: int) -> Any:
    import torch
    from torch import Tensor

    from tests.tiny import Separate

    class Lifted(Separate):
        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            up, down = ([e[i].weight for e in self.experts] for i in (0, 2))  # type: ignore[index]
            up_bias, down_bias = (torch.stack([e[i].bias for e in self.experts]) for i in (0, 2))  # type: ignore[index]
            offsets = torch.zeros(len(up), dtype=torch.int32)
            h = torch.ops.moe_ep.grouped_gemm(x, up, offsets) + up_bias[0]
            return torch.ops.moe_ep.grouped_gemm(h, down, offsets) + down_bias[0]

    return Lifted(num_experts=num_experts)


def plain(case: Case) -> Clock:
    """Time Dynamo on a model without experts, with our hook or without it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=case.size, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tokens, clock = torch.zeros(1, 16, dtype=torch.long), Clock()
    backend: Any = {"backend": "moe_ep", "options": {"inner": "eager"}} if case.form == "with" else {"backend": "eager"}
    torch.compile(LlamaForCausalLM(config).model.layers[0].mlp, **backend)(torch.zeros(1, 16, 256))
    model.compile(**backend)
    with clock.running():
        model(input_ids=tokens, use_cache=False)
    return clock


# -- all of them ----------------------------------------------------------------------------


def in_fresh_process(case: Case) -> Clock:
    """Run `measure` in a new interpreter; NaN when it fails."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.capture_cost", "--one"]
    done = subprocess.run([*command, json.dumps(dataclasses.asdict(case))], capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return Clock(float("nan"), float("nan"))
    return Clock(*map(float, done.stdout.split()[-2:]))


Measured = list[tuple[Case, list[Clock]]]


def cpu(measured: Measured, **which: Any) -> float:
    """Return the median CPU seconds of the one case that agrees."""
    (times,) = [t for case, t in measured if all(getattr(case, k) == v for k, v in which.items())]
    return median([clock.cpu_s for clock in times])


def verdicts(measured: Measured) -> dict[str, tuple[float, float | None]]:
    """Return what was measured against each bound, None where there is none."""
    groups = {case.group for case, _ in measured}
    found: dict[str, tuple[float, float | None]] = {}
    if "qwen" in groups:
        for form in ("eager", "grouped_mm"):
            found[f"qwen, {form}: seconds"] = (cpu(measured, group="qwen", form=form), SECONDS_BOUND)
    if "experts" in groups:
        for form, unrolled in (("chosen", False), ("range", False), ("modules", False), ("chosen", True)):
            few, many = (
                cpu(measured, group="experts", form=form, unrolled=unrolled, size=size)
                for size in (COUNTS[0], COUNTS[-1])
            )
            name = f"experts, {form}{' unrolled' if unrolled else ''}: {COUNTS[-1]} over {COUNTS[0]}"
            found[name] = (many / few, None if unrolled else RATIO_BOUND)
        few, many = (cpu(measured, group="experts", form="modules", size=n) for n in (COUNTS[0], COUNTS[-1]))
        found["experts, modules: microseconds for one more weight"] = (
            1e6 * (many - few) / (4 * (COUNTS[-1] - COUNTS[0])), None,
        )  # fmt: skip
    if "dynamo" in groups:
        ours, theirs = (cpu(measured, group="dynamo", form=f, size=COUNTS[-1]) for f in ("rewritten", "lifted"))
        found[f"dynamo: rewritten over lifted, {COUNTS[-1]} experts"] = (ours / theirs, None)
    if "plain" in groups:
        without, ours = (cpu(measured, group="plain", form=form) for form in ("without", "with"))
        found["plain: added share"] = (ours / without - 1, PLAIN_BOUND)
    return found


def show(console: Console, measured: Measured) -> None:
    """Print all cases."""
    table = Table(title="capture and proof", title_justify="left")
    for name in ("group", "form", "size", "median CPU s", "min CPU s", "median wall s"):
        table.add_column(name, justify="left" if name in ("group", "form") else "right")
    for case, times in measured:
        cpus, walls = [t.cpu_s for t in times], [t.wall_s for t in times]
        form = f"{case.form}, unrolled" if case.unrolled else case.form
        table.add_row(
            case.group, form, str(case.size), number(median(cpus), 2), number(min(cpus), 2), number(median(walls), 2)
        )
    console.print(table)


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Fresh processes per number.")] = 3,
    only: Annotated[str, typer.Option(help="qwen, experts, dynamo, plain or all")] = "all",
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("benchmarks/results"),
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure capture and proof in fresh processes."""
    if one:
        clock = measure(Case(**json.loads(one)))
        print(clock.cpu_s, clock.wall_s)
        return
    console = Console(width=max(110, Console().width))
    measured: Measured = [(case, []) for case in cases(only)]
    target = out / f"capture_cost_{only}_{time.strftime('%Y%m%d_%H%M%S')}.json"
    for _ in range(repeats):  # rounds over all cases: a slow minute does not hit one case alone
        for case, times in measured:
            times.append(in_fresh_process(case))
            console.print(f"{case}: {number(times[-1].cpu_s, 2)} s of CPU", style="dim")
        write(target, measured)  # after every round: a run that is cut short keeps what it measured
    show(console, measured)
    judged = verdicts(measured)
    for name, (value, bound) in judged.items():
        said = "no bound" if bound is None else f"bound {bound}: {'holds' if value <= bound else 'MISSED'}"
        console.print(f"{name}: {number(value, 3)} ({said})")
    console.print(f"written: {target}")
    if any(bound is not None and not value <= bound for value, bound in judged.values()):
        raise typer.Exit(1)


def write(target: Path, measured: Measured) -> None:
    """Write the JSON: machine, command, what was measured against each bound, and every time."""
    content = {
        "machine": machine_facts(),
        "command": " ".join(["python -m benchmarks.capture_cost", *sys.argv[1:]]),
        "verdicts": {name: {"value": value, "bound": bound} for name, (value, bound) in verdicts(measured).items()},
        "cases": [{**dataclasses.asdict(case), "times": [dataclasses.asdict(t) for t in ts]} for case, ts in measured],
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
