"""The package as it is installed: a wheel holds every file that the tree has, and works from another folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("moe_compile", "passes", "kernels", "pyproject.toml", "README.md", "LICENSE")
USE = """
import torch, moe_compile
from torch import nn
assert "site" in moe_compile.__file__, moe_compile.__file__

class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out

model, ids = Experts(), torch.rand(5, 4).topk(2).indices
args = torch.randn(5, 8), ids, torch.rand(5, 2)
compiled = torch.compile(model, backend="moe_ep", fullgraph=True, options={"inner": "aot_eager", "strict": True})
assert torch.allclose(compiled(*args), model(*args), atol=1e-6)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed into."""
    tree, site = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("site")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tree / part, **({"symlinks": True} if copy is shutil.copytree else {}))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tree / "dist")]
    subprocess.run(build, cwd=tree, check=True, timeout=300)
    with zipfile.ZipFile(next((tree / "dist").glob("*.whl"))) as wheel:
        wheel.extractall(site)
    return site


def test_every_file_is_in_the_wheel(site: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = (p for suffix in ("*.py", "*.cpp", "*.h") for p in folder.rglob(suffix))
        return {str(p.relative_to(folder)) for p in found}

    rooms = {f"{room}/{name}" for room in ("passes", "kernels") for name in files(ROOT / room)}
    here = {name for name in files(ROOT / "moe_compile") if not name.startswith(("passes/", "kernels/"))} | rooms
    assert files(site / "moe_compile") == here


def test_the_wheel_works_elsewhere(site: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, env=env, check=True, timeout=300)


def test_a_package_that_the_command_needs_is_named(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'matplotlib' else find(name, *a)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-m", "moe_compile.cli"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 1
    assert run.stderr.strip() == "moe-compile: this command needs matplotlib: pip install 'moe-compile[demo]'"
