"""One case of the fuzzer: write a program to a file, run it, prove it, and compare whatever was rewritten."""

import importlib.util
import itertools
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from moe_compile.errors import Refusal
from tests.detect.loops import Proof, differences, outcome
from tests.fuzz.grammar import D, E, Parts

FOLDER = Path(tempfile.mkdtemp(prefix="moe_fuzz_"))
_number = itertools.count()
DTYPE = torch.float64


def load(source: str) -> ModuleType:
    """The program as a module with a file, as inspect and the guards want it."""
    name = f"moe_fuzz_{next(_number)}"
    path = FOLDER / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def forget(module: ModuleType) -> None:
    sys.modules.pop(module.__name__, None)
    Path(str(module.__file__)).unlink(missing_ok=True)


def arguments(tokens: int, top_k: int, routing: str, distinct: bool, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D, generator=g, dtype=DTYPE)
    weights = torch.rand(tokens, top_k, generator=g, dtype=DTYPE) + 0.1
    experts = torch.tensor([0, 2, 3]) if routing == "unchosen" else torch.arange(E)
    if distinct:
        ids = experts[torch.rand(tokens, len(experts), generator=g).argsort(-1)[:, :top_k]]
    else:
        ids = experts[torch.randint(len(experts), (tokens, top_k), generator=g)]
    if routing == "skewed":
        ids = ids[:1].expand_as(ids).contiguous()
    return x, ids, weights


def routings(parts: Parts) -> list[tuple[Tensor, Tensor, Tensor]]:
    cases = [
        (11, "even"),
        (11, "even"),
        (4, "skewed"),
        (9, "unchosen"),
        (1, "even"),
        (3, "even"),
        (6, "even"),
        (2, "unchosen"),
    ]
    return [arguments(t, parts.top_k, how, parts.distinct, seed) for seed, (t, how) in enumerate(cases)]


def check(parts: Parts) -> str:
    """ "invalid", "refused: why" or "rewritten".  Raises AssertionError if a rewritten program has other numbers."""
    try:
        compile(parts.source, "program", "exec")
    except SyntaxError:
        return "invalid"
    module = load(parts.source)
    try:
        torch.manual_seed(0)
        model = module.Model().to(DTYPE)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        cases = routings(parts)
        try:
            expected = [outcome(model, model, args) for args in cases]
        except Exception:  # an edit made nonsense of it
            return "invalid"
        if sum(map(finite, expected)) < 4:
            return "invalid"
        restore(model, before)
        try:
            run = Proof(model, cases[0], parts.distinct)
        except Refusal as refusal:
            return f"refused: {refusal}"
        except AssertionError as left:  # a pass left the region as it was
            if "DispatchExperts" in str(left):
                return "refused: by a pass"
            raise
        for args, want in zip(cases, expected, strict=True):
            if not finite(want):
                continue
            restore(model, before)
            wrong = differences(outcome(run, model, args), want, 1e-9)
            assert not wrong, f"{wrong} differ for {tuple(args[0].shape)}, ids {args[1].tolist()}\n{parts.source}"
        return "rewritten"
    finally:
        forget(module)


def finite(values: dict[str, Tensor | None]) -> bool:
    return all(bool(v.isfinite().all()) for v in values.values() if v is not None)


def restore(model: torch.nn.Module, before: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.data.copy_(before[name])
