"""The tree: two rooms with one name each, and one file, one test and one docstring a pass."""

import ast
import importlib
import importlib.util
import itertools
from pathlib import Path

import pytest

from moe_compile import pipeline

ROOT = Path(__file__).parent.parent
PASSES = pipeline.ALL
LOWER = {cls.__module__.rsplit(".", 1)[-1] for cls in pipeline.LOWER}


@pytest.mark.parametrize("room", ["passes", "kernels"])
def test_room(room: str) -> None:
    assert (ROOT / "moe_compile" / room).resolve() == ROOT / room
    assert not (ROOT / room / "__init__.py").exists(), "would shadow the PyPI package `kernels`"
    spec = importlib.util.find_spec(room)
    assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents
    for file in (ROOT / room).glob("*.py"):
        found = importlib.util.find_spec(f"moe_compile.{room}.{file.stem}")
        assert found is not None and Path(str(found.origin)).resolve() == file


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_rooms_do_not_import_each_other() -> None:
    """But for the lower stage, which is where kernels are chosen."""
    for file in (ROOT / "kernels").glob("*.py"):
        assert not [n for n in imports(file) if n.startswith("moe_compile.passes")], file
    for file in (ROOT / "passes").glob("*.py"):
        assert file.stem in LOWER or not [n for n in imports(file) if n.startswith("moe_compile.kernels")], file


def test_nobody_imports_the_bare_names() -> None:
    files = itertools.chain.from_iterable(
        (ROOT / d).rglob("*.py") for d in ("moe_compile", "tests", "benchmarks", "examples")
    )
    for file in files:
        assert not [n for n in imports(file) if n.partition(".")[0] in ("passes", "kernels")], file


@pytest.mark.parametrize("cls", PASSES, ids=lambda cls: cls.__name__)
def test_a_pass_has_its_file_test_and_docstring(cls: type) -> None:
    name = cls.__module__.rsplit(".", 1)[-1]
    assert cls.__name__ == "".join(word.capitalize() for word in name.split("_"))
    assert (ROOT / "passes" / f"{name}.py").exists()
    assert (ROOT / "tests" / "passes" / f"test_{name}.py").exists()
    doc = importlib.import_module(cls.__module__).__doc__ or ""
    for part in ("Before", "After:", "Stage", "Numerics", "Why", "Refuses"):
        assert f"\n{part}" in doc, part


def test_every_file_of_passes_is_in_the_pipeline() -> None:
    assert {p.stem for p in (ROOT / "passes").glob("*.py")} == {cls.__module__.rsplit(".", 1)[-1] for cls in PASSES}
    assert set(pipeline.PASS_NAMES) == {cls.__module__.rsplit(".", 1)[-1] for cls in PASSES}


def test_no_pass_name_contains_another() -> None:
    """Inductor's `disabled_passes` matches parts of names."""
    for one, other in itertools.permutations(pipeline.PASS_NAMES, 2):
        assert one not in other


def test_the_backend_is_registered() -> None:
    import importlib.metadata

    found = [e for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "moe_ep"]
    assert [e.value for e in found] == ["moe_compile.backend:moe_ep"]
