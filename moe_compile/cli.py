"""The `moe-compile` command."""

import importlib.util
import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

PACKAGES = ("typer", "rich", "transformers", "matplotlib")  # of the extra `demo`
if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
    sys.exit(f"moe-compile: this command needs {', '.join(missing)}: pip install 'moe-compile[demo]'")

import typer  # noqa: E402

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Tools of moe_compile.")


class DType(StrEnum):
    """Types a demo model can train in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(StrEnum):
    """Where to run."""

    cpu = "cpu"
    cuda = "cuda"


class Model(StrEnum):
    """Which of the demo's models to train."""

    mixtral = "mixtral"
    qwen3_moe = "qwen3_moe"
    both = "both"


@app.callback()
def root() -> None:
    """Tools of moe_compile."""


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A run of under three minutes.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the longest run (default 600; quick 60).")] = None,
    dtype: Annotated[DType, typer.Option(help="Type of the weights.")] = DType.float32,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    out: Annotated[Path, typer.Option(help="Report directory.")] = Path("moe_compile_demo"),
    model: Annotated[Model, typer.Option(help="Which model to train.")] = Model.both,
    backend: Annotated[str, typer.Option(help="The compiler under test.")] = "moe_ep",
) -> None:
    """Train unmodified MoE models with and without moe_ep; compare losses and times."""
    _quiet()
    import torch

    from moe_compile.demo.models import QUICK, SPECS
    from moe_compile.demo.progress import show_progress
    from moe_compile.demo.report import write_report
    from moe_compile.demo.run import DemoSettings, run_demo
    from moe_compile.demo.summary import print_summary
    from moe_compile.demo.train import TrainSettings

    if device is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device", param_hint="--device")
    settings = DemoSettings(
        TrainSettings(dtype=getattr(torch, dtype), device=device),
        ("mixtral", "qwen3_moe") if model is Model.both else (model.value,),
        steps=21 if quick else 30,
        long_steps=steps or (60 if quick else 600),
        new_tokens=120 if quick else 300,
        backend=backend,
        compiled_text=not quick,  # two graphs less to compile
        specs=QUICK if quick else SPECS,
    )
    with show_progress() as on_progress:
        record = run_demo(settings, on_progress)
    print_summary(record)
    typer.echo(f"\nReport: {write_report(record, out).resolve()}")
    if not record.passed:
        raise typer.Exit(1)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="A transformers config.json, a folder with one, or a preset.")],
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs.")],
    gpus_per_node: Annotated[int, typer.Option(min=1, help="How many of them share a node.")] = 8,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, a100-40gb, b200 or v100-16gb.")] = "h100",
    batch: Annotated[int, typer.Option(min=1, help="Tokens of a GPU, a step.")] = 4096,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sequence (default: 4096, or the batch).")
    ] = None,
    checkpoint: Annotated[bool, typer.Option(help="Compute layers again in the backward.")] = True,
    state_bytes: Annotated[int, typer.Option(help="Of a number: 16, all in float32; 8, all in 16 bits.")] = 16,
    max_tp: Annotated[int, typer.Option(min=1, help="Tensor parallelism up to this degree.")] = 1,
    rows: Annotated[int, typer.Option(min=1, help="Lines of the table.")] = 12,
) -> None:
    """Predict memory and step time of every way to divide the GPUs, and recommend one.  Needs no GPU."""
    from rich.console import Console

    from moe_compile.errors import MoeCompileError
    from moe_compile.plan import hardware, search, shapes
    from moe_compile.plan.memory import Setup
    from moe_compile.plan.step import Cluster
    from moe_compile.plan.table import print_plan

    if state_bytes not in (8, 16):
        raise typer.BadParameter("8 or 16", param_hint="--state-bytes")
    setup = Setup(batch, length or min(4096, batch), checkpoint, state_bytes // 4, state_bytes // 2)
    try:
        cluster = Cluster(hardware.find(gpu), gpus_per_node)
        found = search.plan(shapes.load(model), gpus, cluster, setup, max_tp)
    except MoeCompileError as error:
        raise typer.BadParameter(str(error)) from error
    print_plan(found, Console(width=max(150, Console().width)), rows)


def _quiet() -> None:
    """Leave the terminal to the progress bar: no advice from libraries."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module="torch")


def main() -> None:
    """Entry point of the `moe-compile` script."""
    sys.exit(app())


if __name__ == "__main__":
    main()
