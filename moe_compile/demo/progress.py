"""The progress bar."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_compile.demo.run import Progress as OnProgress


@contextmanager
def show_progress(console: Console | None = None) -> Iterator[OnProgress]:
    """Show one line for each thing that runs; yield the callback that `run_demo` takes."""
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, object] = {}
        last: list[str] = []

        def on_progress(title: str, step: int, total: int, loss: float) -> None:
            if title not in tasks:
                _finish(progress, tasks, last)
                tasks[title] = progress.add_task(title, total=total, loss="")
                last.append(title)
            shown = "" if math.isnan(loss) else f"loss {loss:.3f}"
            progress.update(tasks[title], completed=step, loss=shown)  # type: ignore[arg-type]

        yield on_progress
        _finish(progress, tasks, last)


def _finish(progress: Progress, tasks: dict[str, object], last: list[str]) -> None:
    for title in last:
        task = next(task for task in progress.tasks if task.id == tasks[title])
        progress.update(task.id, completed=task.total)
        progress.stop_task(task.id)
    last.clear()
