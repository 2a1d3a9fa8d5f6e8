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
    """Keep `demo` a subcommand although it is the only one."""


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


def _quiet() -> None:
    """Leave the terminal to the progress bar: no advice from libraries."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module="torch")


def main() -> None:
    """Entry point of the `moe-compile` script."""
    sys.exit(app())


if __name__ == "__main__":
    main()
