"""One case of the fuzzer: write a program to a file, run it, prove it, and compare whatever was rewritten."""

import contextlib
import copy
import importlib.util
import itertools
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from moe_compile import numbers
from moe_compile.arguments import Known
from moe_compile.errors import Refusal
from tests.detect.loops import Proof, differences, outcome
from tests.fuzz.parts import D, Parts

FOLDER = Path(tempfile.mkdtemp(prefix="moe_fuzz_"))
_number = itertools.count()
DTYPE = torch.float64


def load(source: str, scope: Mapping[str, Any] = MappingProxyType({})) -> ModuleType:
    """The program as a module with a file, as inspect and the guards want it; `scope`: names that it finds there."""
    name = f"moe_fuzz_{next(_number)}"
    path = FOLDER / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    vars(module).update(scope)
    spec.loader.exec_module(module)
    return module


def forget(module: ModuleType) -> None:
    sys.modules.pop(module.__name__, None)
    Path(str(module.__file__)).unlink(missing_ok=True)


class Chosen(Protocol):
    """What is known of the ids that a program takes."""

    top_k: int
    experts: int
    distinct: bool  # no token has an expert twice, and none is out of range


def arguments(tokens: int, routing: str, parts: Chosen, seed: int, width: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids, weights; `routing`: "even", "skewed" (all tokens alike), "unchosen" (some experts have no rows)."""
    g = torch.Generator().manual_seed(seed)
    top_k, experts = parts.top_k, torch.arange(parts.experts)
    x = torch.randn(tokens, width, generator=g, dtype=DTYPE)
    weights = torch.rand(tokens, top_k, generator=g, dtype=DTYPE) + 0.1
    if routing == "unchosen":
        experts = torch.cat([experts[:1], experts[2:]])[-max(3, top_k) :]
        experts = experts if len(experts) >= top_k else torch.arange(parts.experts)
    if parts.distinct:
        ids = experts[torch.rand(tokens, len(experts), generator=g).argsort(-1)[:, :top_k]]
    else:
        ids = experts[torch.randint(len(experts), (tokens, top_k), generator=g)]
    if routing == "skewed" and tokens:
        ids = ids[:1].expand_as(ids).contiguous()
    if routing == "outside":
        ids[::3, -1] = parts.experts
    return x, ids, weights


def routings(parts: Chosen, outside: bool, width: int = D) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The calls that are compared; `outside`: one of them with ids out of range."""
    cases = [
        (11, "even"),
        (7, "even"),
        (4, "skewed"),
        (9, "unchosen"),
        (1, "even"),
        (3, "even"),
        (6, "even"),
        (2, "unchosen"),
        *([(5, "outside")] if outside else []),
    ]
    return [arguments(t, how, parts, seed, width) for seed, (t, how) in enumerate(cases)]


def as_called(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Arguments with gradients where they can have one, that no leaves are, so that a program may change them."""
    return tuple((a.detach().requires_grad_() if a.is_floating_point() else a).clone() for a in args)


class Run:
    """A module or its proof, called from the state in which the module was made."""

    def __init__(self, module: ModuleType, model: nn.Module) -> None:
        self.module, self.model = module, model
        self.before = {n: p.detach().clone() for n, p in self._tensors()}
        self.plain = self._plain()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    def _plain(self) -> dict[str, Any]:
        """What Python holds: attributes that programs set, a global list."""
        held = {f"{n} of {i}": v for i, m in enumerate(self.model.modules()) for n, v in vars(m).items() if n in STATE}
        held["CALLS"] = self.module.CALLS
        return copy.deepcopy(tree_map_only(Tensor, Tensor.detach, held))  # type: ignore[no-any-return]

    def restore(self) -> None:
        for name, p in self._tensors():
            p.data.copy_(self.before[name])
        for i, m in enumerate(self.model.modules()):
            for name in STATE & vars(m).keys():
                setattr(m, name, copy.deepcopy(self.plain[f"{name} of {i}"]))
        self.module.CALLS[:] = self.plain["CALLS"]

    def __call__(self, run: Any, args: tuple[Tensor, ...]) -> dict[str, Tensor | None] | str:
        """What comes of a call, changed arguments, parameters and Python state included; or that it raises."""
        self.restore()
        torch.manual_seed(7)
        passed: list[Tensor] = []

        def call(*given: Tensor) -> Any:
            passed[:] = [a.clone() for a in given]  # as `as_called`
            return run(*passed)

        try:
            found = outcome(call, self.model, args)
            plain = self._plain()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        found |= {f"argument {i}": a.detach().clone() for i, a in enumerate(passed)}
        found |= {f"value of {n}": p.detach().clone() for n, p in self.model.named_parameters()}
        found |= {f"attribute {n}": v for n, v in plain.items() if isinstance(v, Tensor)}
        state = repr({n: v for n, v in plain.items() if not isinstance(v, Tensor)})
        return found | {"python": torch.tensor(list(state.encode()))}


STATE = {"seen", "last", "mode"}


def check(parts: Parts) -> str:
    """ "invalid", "refused: why" or "rewritten".  Raises AssertionError if a rewritten program has other numbers."""
    return check_source(parts.source, parts)


def check_source(source: str, parts: Parts) -> str:
    """The same of a text, whose sizes and ids `parts` tells of."""
    warnings.simplefilter("ignore")
    try:
        compile(source, "program", "exec")
    except SyntaxError:
        return "invalid"
    module = load(source)
    try:
        return _check(module, parts)
    finally:
        forget(module)


def _check(module: ModuleType, parts: Parts) -> str:
    torch.manual_seed(0)
    try:
        model = module.Model().to(DTYPE)
    except Exception:  # an edit made nonsense of it
        return "invalid"
    cases = routings(parts, not parts.distinct and "empty" not in parts.source)
    known = Known((1,), ((1, parts.experts),)) if parts.distinct else Known(())
    return compared(Run(module, model), cases, known, parts.few, exact(module))


def exact(module: ModuleType) -> bool:
    """Whether a program has no numbers in a narrower type."""
    text = Path(str(module.__file__)).read_text()
    return not any(word in text for word in ("float32", ".float()", "half"))


def compared(run: Run, cases: Sequence[tuple[Tensor, ...]], known: Known, least: int, exact: bool) -> str:
    """ "invalid", "refused: why" or "rewritten" of a model, by these calls.

    `known`: what the proof is told of the arguments.  `least`: from how many experts on one visit may stand for many.
    """
    model = run.model
    given = as_called(cases[0])
    with unset_is_nan():
        expected = [run(model, args) for args in cases[:2]]
        if any(isinstance(want, str) for want in expected):
            return "invalid"
        expected += [run(model, args) for args in cases[2:]]
    if sum(map(finite, expected)) < 4:
        return "invalid"
    run.restore()
    try:
        with few(least):
            proof = Proof(model, given, known)
    except Refusal as refusal:
        return f"refused: {refusal}"
    except AssertionError as left:  # a pass left the region as it was
        if "DispatchExperts" in str(left):
            return "refused: by a pass"
        raise

    def wrong(proof: Proof, args: tuple[Tensor, ...], want: dict[str, Tensor | None] | str) -> str | None:
        got = run(proof, args)
        if isinstance(want, str):  # of no tokens the sum is empty, where a program may have nothing to join
            fine = isinstance(got, str) or not args[0].shape[0]
            return None if fine else f"no error, where the program has {want}"
        found = got if isinstance(got, str) else ", ".join(differences(got, want, 1e-9 if exact else 1e-5))
        return found if finite(want) and found else None

    for args, want in zip(cases, expected, strict=True):
        tokens = args[0].shape[0]
        found = wrong(proof, args, want) if covers(proof, tokens) else "another number of tokens"
        if found and (tokens < 2 or not covers(proof, tokens)):  # which has a proof of its own
            with few(least), contextlib.suppress(Refusal):
                run.restore()
                found = None
                found = wrong(Proof(model, as_called(args), known, fixed=True), args, want)
        assert not found, f"{found}: with {tokens} tokens, ids {args[1].tolist()}"
    return "rewritten"


def covers(proof: Proof, tokens: int) -> bool:
    """Whether a proof is for so many tokens: what the trace assumed of their number holds."""
    return all(bool(guard.subs(dict.fromkeys(guard.free_symbols, tokens))) for guard in proof.guards)


@contextlib.contextmanager
def unset_is_nan() -> Iterator[None]:
    """Memory that `torch.empty` leaves unset holds NaN, so that a program that reads it has no numbers to compare."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def few(least: int) -> Iterator[None]:
    """One visit stands for many experts from so many of them on."""
    before = numbers.FEW
    numbers.FEW = least
    try:
        yield
    finally:
        numbers.FEW = before


def finite(values: dict[str, Tensor | None] | str) -> bool:
    return not isinstance(values, str) and all(bool(v.isfinite().all()) for v in values.values() if v is not None)
