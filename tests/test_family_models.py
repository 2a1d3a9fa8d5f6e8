"""Whole models of the families of transformers: the loss and all gradients agree, all experts are rewritten.

By default a few families of different structure; `--all-families` runs all, in two forms, and skips those whose config
or model cannot be made small by name (tests/family_models.py), with what they say.
"""

import pytest
import torch

from tests.family_models import build, experts, names
from tests.test_models import check
from tests.tiny import compiled, regions

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("fresh")

DIFFERENT = ("afmoe", "aria", "deepseek_v3", "gpt_oss", "nemotron_h")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.config.getoption("--all-families"):
        cases = [(name, form) for name in names() for form in ("eager", "grouped_mm")]
    else:
        cases = [(name, "eager") for name in DIFFERENT]
    metafunc.parametrize(("family", "form"), cases, ids=["-".join(case) for case in cases])


def test_model(family: str, form: str) -> None:
    built = build(family, form)
    if isinstance(built, str):
        assert family not in DIFFERENT, built
        pytest.skip(built)
    model, ids = built
    try:
        with regions() as found:
            check(compiled(model, "aot_eager"), model, ids)
    except RuntimeError:  # in the backward of another part, by AOTAutograd alone too: without it then
        torch._dynamo.reset()
        with pytest.raises(RuntimeError):
            check(torch.compile(model, backend="aot_eager"), model, ids)
        torch._dynamo.reset()
        with regions() as found:
            check(compiled(model, "eager"), model, ids)
    # After a graph break Dynamo meets a layer again, so there may be more reports than layers.
    assert all(r.matched for r in found), [(r.location, r.reason) for r in found if not r.matched]
    assert len(found) >= experts(model)
