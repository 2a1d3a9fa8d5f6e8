"""docs/coverage.md is what running the families gives.

All 200 rows take minutes, so a run checks the families that have one form, a few of the others by turns of the calendar
of their names, and that no class is missing; `python -m tests.coverage_table --check` and
`pytest tests/test_families.py --all-families` run everything.
"""

import re

import pytest
import torch

from tests.coverage_table import FORMS, OTHERS, PAGE, decorated, other, recorded, unlisted
from tests.families import families, representatives

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.skipif(
        f"transformers {transformers.__version__}\n" not in PAGE.read_text(),
        reason="the page is of another transformers",
    ),
]


def test_every_class_has_its_rows() -> None:
    expected = {(f.name, f.cls, form) for f in families() for form in FORMS} | {(o[0], o[1], "-") for o in OTHERS}
    assert {row[:3] for row in recorded()} == expected
    assert not unlisted()


@pytest.mark.parametrize("entry", OTHERS, ids=lambda entry: entry[0])
def test_families_with_one_form(entry: tuple) -> None:
    check(other(*entry))


@pytest.mark.parametrize("family", representatives()[::4], ids=str)
def test_some_of_the_others(family) -> None:
    for form in FORMS:
        check(decorated(family, form))


def check(row: tuple) -> None:
    page = {r[:3]: r for r in recorded()}
    if torch.__version__.startswith(re.findall(r"\(torch (\d+\.\d+)", PAGE.read_text())[0]):
        assert page[row[:3]] == row
    else:  # reasons may quote torch
        assert page[row[:3]][:5] == row[:5]
