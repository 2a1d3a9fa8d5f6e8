"""What real programs look like: the sources that `python -m tests.fuzz.sources` edits.

A subject is a class, with the text of all that it is made of (its bases, the classes and functions that it names, where
these stand in the same files), how a module is made of it, and the calls that are compared.
"""

import ast
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from moe_compile.arguments import Known
from tests import coverage_table, families, test_whole_layers
from tests.detect import loops, mutants_numbers, test_refused
from tests.detect.test_rewritten import IDIOMS
from tests.fuzz.check import DTYPE, arguments, routings

KINDS = ("families", "idioms", "layers", "mutants")
TESTS = "tests.detect."
Calls = Sequence[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Plan:
    """The calls of a subject, and what is known of their arguments; no `known`: it is compiled as a whole."""

    calls: Calls
    known: Known | None


@dataclass(frozen=True)
class Subject:
    form: str  # one of `KINDS`
    cls: type
    make: Callable[[Any], nn.Module]  # of the class, as it was edited
    plan: Callable[[Random], Plan]

    @functools.cached_property
    def source(self) -> str:
        """The definitions that may be edited, in an order in which they can be made."""
        return "\n\n".join(_written(found.__module__)[found.__name__] for found in _made_of(self.cls))

    @property
    def scope(self) -> dict[str, Any]:
        """The names that these definitions find in their files."""
        files = dict.fromkeys(found.__module__ for found in _made_of(self.cls))
        held = {n: v for file in files for n, v in vars(sys.modules[file]).items() if not n.startswith("__")}
        return {"torch": torch, "F": nn.functional, **held}


@functools.cache
def subjects(*kinds: str) -> tuple[Subject, ...]:
    """All subjects of these kinds, in a fixed order."""
    made = {"families": _families, "idioms": _idioms, "layers": _layers, "mutants": _mutants}
    return tuple(s for kind in kinds for s in made[kind]())


# -- the text -------------------------------------------------------------------------------


@functools.cache
def _made_of(cls: type) -> tuple[Any, ...]:
    """The class and what it is made of: first what others are made of."""
    found: dict[Any, None] = {}
    open_: set[Any] = set()

    def visit(made: Any) -> None:
        if not _is_own(made, cls) or made in open_:
            return
        open_.add(made)
        for base in getattr(made, "__bases__", ()):
            visit(base)
        scope = vars(sys.modules[made.__module__])
        for node in ast.walk(ast.parse(_written(made.__module__)[made.__name__])):
            if isinstance(node, ast.Name) and node.id in scope:
                visit(scope[node.id])
        found[made] = None

    visit(cls)
    return tuple(found)


def _is_own(made: Any, cls: type) -> bool:
    """Whether a name stands for a class or a function of the class's own file, or for a class of the tests' loops."""
    if not isinstance(made, type | types.FunctionType):
        return False
    if made.__module__ != cls.__module__ and not (isinstance(made, type) and made.__module__.startswith(TESTS)):
        return False
    if made.__name__ not in _written(made.__module__):
        return False
    return not issubclass(made, torch.autograd.Function) if isinstance(made, type) else made.__closure__ is None


@functools.cache
def _written(module: str) -> dict[str, str]:
    """The classes and functions of a file; those of tests without the decorators that put them into tables."""
    found = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            if isinstance(node, ast.ClassDef) and module.startswith("tests."):
                node.decorator_list = []
            found[node.name] = ast.unparse(node)
    return found


# -- the subjects ---------------------------------------------------------------------------


@dataclass
class _Ids:
    top_k: int
    experts: int
    distinct: bool


def _routed(draw: Random, top_k: int, experts: int, width: int, known: Known | None = None, flat: bool = False) -> Plan:
    """Calls with x, ids and weights; `known`: if it is not given, the ids may be a topk's or not."""
    if known is None:
        known = draw.choice((Known(()), Known((1,), ((1, experts),))))
    ids = _Ids(top_k, experts, bool(known.distinct))
    calls = [*routings(ids, not known.distinct, width), arguments(0, "even", ids, 0, width)]
    if flat:
        calls = [(x, ids[:, 0].contiguous(), weights) for x, ids, weights in calls]
    return Plan(calls, known)


def _of_case(form: str, case: Any) -> list[Subject]:
    """Of an idiom or a mutant."""
    made = case.make
    if not isinstance(made, type) or made.__name__ not in _written(made.__module__) or case.forward_only:
        return []
    known = loops.known(case.distinct)
    plan = functools.partial(_routed, top_k=case.top_k, experts=loops.E, width=loops.D, known=known, flat=case.flat)
    return [Subject(form, made, lambda cls: cls().to(DTYPE), plan)]


def _idioms() -> list[Subject]:
    return [s for case in (*IDIOMS.values(), *mutants_numbers.IDIOMS.values()) for s in _of_case("idioms", case)]


def _mutants() -> list[Subject]:
    held = (*test_refused.MUTANTS.values(), *mutants_numbers.MUTANTS.values())
    return [s for case in held for s in _of_case("mutants", case)]


def _families() -> list[Subject]:
    """Of transformers: the classes with several forms, of equal sources one, and those with one form."""
    found = []
    routed = functools.partial(_routed, top_k=2, experts=families.EXPERTS, width=families.WIDTH)
    for family in families.representatives():
        make = functools.partial(families.build, family, "eager")
        of = lambda cls, make=make: make(cls=cls).to(DTYPE)  # noqa: E731
        found.append(Subject("families", getattr(family.module(), family.cls), of, routed))
    for name, cls, config, more, inputs in coverage_table.OTHERS:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        of = functools.partial(_other, config=config, more=more)
        plan = routed if inputs is coverage_table.routed else _PLANS[inputs]
        found.append(Subject("families", getattr(module, cls), of, plan))
    return found


def _other(cls: Any, config: str, more: tuple[Any, ...]) -> nn.Module:
    import transformers

    settings = coverage_table.SMALL
    model = cls(getattr(transformers, config)(**settings) if config else types.SimpleNamespace(**settings), *more)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.to(DTYPE).eval()  # type: ignore[no-any-return]


def _whole(draw: Random, width: int, lead: Sequence[tuple[int, ...]], index: bool = False) -> Plan:
    """Calls with activations of these shapes; the last ones are alike, so that they choose alike."""
    g = torch.Generator().manual_seed(draw.randrange(1000))
    rows = [torch.randn(*shape, width, generator=g, dtype=DTYPE) for shape in lead]
    rows.append(rows[0][:1].expand_as(rows[0]).contiguous())
    datasets = [torch.randint(families.EXPERTS, (len(x), 1, 1), generator=g) for x in rows]
    return Plan([(x, d) if index else (x,) for x, d in zip(rows, datasets, strict=True)], None)


_SHAPES = ((2, 6), (3, 5), (1, 7), (2, 1), (1, 1))
_PLANS: dict[Any, Callable[[Random], Plan]] = {
    coverage_table.sequence: functools.partial(_whole, width=families.WIDTH, lead=_SHAPES),
    coverage_table.datasets: functools.partial(_whole, width=families.WIDTH, lead=_SHAPES, index=True),
}


def _layers() -> list[Subject]:
    plan = functools.partial(_whole, width=loops.D, lead=((11,), (7,), (4,), (2,), (1,)))
    held = (test_whole_layers.MOEFeedForward, test_whole_layers.MLPBlock, test_whole_layers.MOELayer)
    return [Subject("layers", cls, lambda cls: cls().to(DTYPE), plan) for cls in held]
