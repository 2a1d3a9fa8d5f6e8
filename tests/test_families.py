"""The experts of every family in transformers: rewritten in every form, with equal outputs and gradients.

The classes are those that `@use_experts_implementation` decorates in the installed package (tests/families.py).  Each
runs its own eager loop; `grouped_mm` and `batched_mm` are one function for all of them, which a class changes by what
its source says, so each different source runs them once.  `--all-families` runs every form of every class.
"""

import pytest
import torch
from torch import Tensor

from tests.families import EXPERTS, WIDTH, Family, build, families, representatives
from tests.tiny import check_same, compiled, original, regions

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("fresh")

T, K = 12, 2
FORMS = {"eager": "loop", "grouped_mm": "grouped", "batched_mm": "batched"}
ROUTINGS = {"even": range(EXPERTS), "two unchosen": (1, 2, 4), "all alike": (3, 0)}  # who may be chosen


def routed(experts: "range | tuple[int, ...]" = range(EXPERTS), tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids among `experts`, weights."""
    picks = torch.rand(tokens, len(experts)).argsort(-1)[:, :K]
    if len(experts) == K:
        picks = torch.arange(K).expand(tokens, K)
    return torch.randn(tokens, WIDTH), torch.tensor(experts)[picks].contiguous(), torch.rand(tokens, K)


def check(family: Family, form: str, *tokens: int) -> None:
    model = build(family, form)
    reference, run = original(model), compiled(model, "aot_eager", fullgraph=True)
    with regions() as found:
        for number in tokens:
            for experts in ROUTINGS.values():
                check_same(run, reference, model, reference, *routed(experts, number))
    assert [(r.matched, r.form) for r in found] == [(True, FORMS[form])] * len(tokens), [r.reason for r in found]
    assert {r.num_experts for r in found} == {EXPERTS}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "form" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--all-families")
        different = set(representatives())
        cases = [(f, form) for f in families() for form in FORMS if whole or form == "eager" or f in different]
        metafunc.parametrize(("family", "form"), cases, ids=[f"{f}-{form}" for f, form in cases])


def test_experts(family: Family, form: str) -> None:
    check(family, form, T)


@pytest.mark.parametrize("family", representatives(), ids=str)
def test_one_token(family: Family) -> None:
    for form in FORMS:
        check(family, form, 1)


def test_all_are_found() -> None:
    """transformers 5.23 decorates 65 classes; a release may have more, but a scan that finds few is broken."""
    assert len(families()) >= 60
    assert len({f.name for f in families()}) >= 60
    assert len(representatives()) >= 15
