"""Sources of real programs with random edits: `python -m tests.fuzz.sources --cases 1000 [--of families] [--jobs 2]`.

The experts of transformers, the idioms and mutants of tests/detect and the layers of tests/test_whole_layers.py, each with
one to three edits of its syntax tree (source_edits.py), run and proven as the programs of the grammar are (check.py).
Whole layers are compiled.  Every wrong rewrite is printed, as a difference to the source that was edited.
"""

import ast
import contextlib
import copy
import difflib
import functools
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from moe_compile import kinds
from tests.detect.loops import differences
from tests.fuzz.check import DTYPE, Run, compared, exact, few, finite, forget, load, unset_is_nan
from tests.fuzz.pool import long_run
from tests.fuzz.source_edits import edited
from tests.fuzz.subjects import KINDS, Calls, Plan, Subject, subjects
from tests.fuzz.tally import Tally
from tests.tiny import compiled, regions

OFTEN = {"families": 4, "idioms": 4, "mutants": 2, "layers": 1}
SECONDS = 120  # for one program
VARIED = ("frozen", "tied", "int32", "single")  # what may be other than usual: parameters, ids, weights


@dataclass(frozen=True)
class Case:
    """A subject with edits."""

    number: int
    subject: Subject
    source: str
    edits: tuple[str, ...]
    plan: Plan
    least: int  # from how many experts on one visit may stand for many
    gradients: bool
    varied: str = ""  # one of `VARIED`

    @property
    def form(self) -> str:
        return self.subject.form

    def __str__(self) -> str:
        before, after = (text.splitlines() for text in (ast.unparse(ast.parse(self.subject.source)), self.source))
        changed = difflib.unified_diff(before, after, lineterm="", n=12)
        modes = f"least {self.least}, gradients {self.gradients}, {self.varied or 'as usual'}, known {self.plan.known}"
        head = f"# program {self.number}, {self.subject.cls.__module__}.{self.subject.cls.__name__}, {modes}"
        return "\n".join([head, f"# {self.edits}", *changed])


def case(number: int, of: tuple[str, ...] = KINDS) -> Case:
    """The case of a number."""
    draw = Random(number)
    subject = draw.choice(subjects(*draw.choices(of, [OFTEN[kind] for kind in of])))
    source, edits = edited(draw, subject.source, draw.choice((1, 1, 1, 2, 2, 3)))
    least, gradients = draw.choice((2, 8)), draw.random() < 0.85
    varied = draw.choice(VARIED) if draw.random() < 0.2 else ""
    return Case(number, subject, source, tuple(edits), subject.plan(draw), least, gradients, varied)


def check(case: Case) -> str:
    """ "invalid", "refused: why" or "rewritten".  Raises AssertionError if a rewritten program has other numbers."""
    warnings.simplefilter("ignore")
    try:
        module = load(case.source, {**case.subject.scope, "CALLS": []})
    except Exception:  # an edit made nonsense of it
        return "invalid"
    try:
        torch.set_default_dtype(DTYPE)  # `torch.zeros(n)` rounds nothing
        with in_time(), torch.set_grad_enabled(case.gradients):
            return _check(module, case)
    finally:
        torch.set_default_dtype(torch.float32)
        forget(module)


def _check(module: ModuleType, case: Case) -> str:
    torch.manual_seed(0)
    try:
        model = case.subject.make(getattr(module, case.subject.cls.__name__))
    except Exception:
        return "invalid"
    for m in model.modules():  # what edits may change
        if type(m).__module__ == module.__name__:
            m.seen, m.last = 0, 0
            if "self.count" in case.source:
                m.register_buffer("count", torch.zeros(8, dtype=torch.float64))
    if case.varied in ("frozen", "tied"):
        vary(case, model)
    if case.plan.known is not None:
        calls = [converted(args, case.varied) for args in case.plan.calls]
        is_exact = exact(module) and case.varied != "single"
        return compared(Run(module, model), calls, case.plan.known, case.least, is_exact)
    return compiled_whole(Run(module, model), Run(module, copy.deepcopy(model)), case.plan.calls, case.least)


def vary(case: Case, model: nn.Module) -> None:
    """Some parameters without gradients, or two of one shape that are one."""
    draw = Random(case.number)
    if case.varied == "frozen":
        for p in model.parameters():
            p.requires_grad_(draw.random() < 0.5)
        return
    held = [(m, n, p) for m in model.modules() for n, p in m._parameters.items() if p is not None]
    alike = [(a, b) for a in held for b in held if a[2].shape == b[2].shape and a[2] is not b[2]]
    if alike:
        (_, _, p), (owner, name, _) = draw.choice(alike)
        setattr(owner, name, p)


def converted(args: tuple[Tensor, ...], varied: str) -> tuple[Tensor, ...]:
    x, ids, weights = args
    return x, ids.int() if varied == "int32" else ids, weights.float() if varied == "single" else weights


def compiled_whole(run: Run, original: Run, calls: Calls, least: int) -> str:
    """The same of a layer that is compiled."""
    with unset_is_nan():
        expected = [original(original.model, args) for args in calls]
    if isinstance(expected[0], str) or sum(map(finite, expected)) < 3:
        return "invalid"
    _fresh()
    with few(least), regions() as found:
        got = [run(compiled(run.model), args) for args in calls]
    reasons = [r.reason for r in found if not r.matched]
    if not any(r.matched for r in found):
        return f"refused: {reasons[0] if reasons else 'no function that could hold a sum over experts'}"
    for args, want, mine in zip(calls, expected, got, strict=True):
        if wrong := differ(mine, want):
            _fresh()
            by_dynamo = run(torch.compile(run.model, backend="eager"), args)
            assert differ(by_dynamo, want), f"{wrong}: with {[tuple(a.shape) for a in args]}"
            return "refused: Dynamo gives other numbers itself"
    return "rewritten"


def _fresh() -> None:
    torch._dynamo.reset()
    kinds.forget()


def differ(got: Any, want: Any) -> str:
    if isinstance(want, str):
        return "" if isinstance(got, str) else f"no error, where the program has {want}"
    found = got if isinstance(got, str) else ", ".join(differences(got, want, 1e-5))
    return found if finite(want) else ""


class TooLong(BaseException):
    """Nobody may take it for an error of the program."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(numbers: range, of: tuple[str, ...] = KINDS) -> Tally:
    """Check the cases of these numbers."""
    found = Tally()
    for number in numbers:
        drawn = case(number, of)
        try:
            result, _, reason = check(drawn).partition(": ")
        except TooLong:
            result, reason = "late", ""
        except Exception as error:
            result, reason = "wrong", f"{type(error).__name__}: {error}"
            found.wrong.append(f"{drawn}\n# {reason}")
            print(found.wrong[-1], flush=True)
        found.add(drawn, result, reason)
    return found


def main(
    cases: Annotated[int, typer.Option(min=0)] = 1000,
    seed: Annotated[int, typer.Option(help="Another seed, other programs.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once.")] = 1,
    of: Annotated[list[str] | None, typer.Option(help="families, idioms, layers, mutants; all by default.")] = None,
    report: Annotated[Path | None, typer.Option(help="Where the counts and the wrong programs go.")] = None,
) -> None:
    """Check edited sources; exit with an error if one was rewritten wrongly."""
    kinds_of = functools.partial(run, of=tuple(of or KINDS))
    raise typer.Exit(bool(long_run(kinds_of, cases, seed, jobs, report).wrong))


if __name__ == "__main__":
    typer.run(main)
