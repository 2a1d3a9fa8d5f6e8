"""A job is killed while it saves, and started again: the last checkpoint is there, and the losses go on bit by bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_compile
from moe_compile.parallel import folders
from tests.parallel.restarted import SAVED, STEPS

RANKS, LIMIT_S = 2, 300


def test_killed_and_started_again_by_torchrun(tmp_path: Path) -> None:
    """One command: the launcher sees that a rank was killed, ends the others, and starts all again."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command = [*launch, "--max-restarts", "1", "-m", "tests.parallel.restarted", str(tmp_path)]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # docs/multi_node.md
    done = subprocess.run(command, timeout=LIMIT_S, env=alone, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert "exitcode: -9" in done.stderr, done.stderr
    assert (tmp_path / "killed").read_text(), "it was not killed in the middle"
    assert sorted(p.parent.name for p in tmp_path.glob("*/.metadata")) == [f"step-{i}" for i in range(SAVED, STEPS + 1)]
    for rank in range(RANKS):
        whole, rest = (json.loads((tmp_path / f"{name}-{rank}").read_text()) for name in ("whole", "rest"))
        assert len(whole) == STEPS and rest == whole[SAVED:]
    assert not list(tmp_path.glob("step-*.*"))


@pytest.mark.parametrize("dies_at", range(1, 5))
def test_killed_at_any_rename(tmp_path: Path, dies_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is done last, the old weights can be loaded, or the new ones; and saving again works."""
    model, path, number = torch.nn.Linear(2, 2), tmp_path / "one", 0
    torch.nn.init.constant_(model.weight, 1.0)
    moe_compile.save_checkpoint(model, None, path)
    (path / "notes").write_text("the user's")

    class Killed(BaseException):
        pass

    def dying(call: Any) -> Any:
        def before(*args: Any, **kwargs: Any) -> Any:
            nonlocal number
            number += ".metadata" not in str(args[0])  # torch's own rename
            if number == dies_at and ".metadata" not in str(args[0]):
                raise Killed
            return call(*args, **kwargs)

        return before

    torch.nn.init.constant_(model.weight, 2.0)
    with monkeypatch.context() as patch:
        for module, name in ((folders.os, "rename"), (folders.shutil, "rmtree")):
            patch.setattr(module, name, dying(getattr(module, name)))
        with pytest.raises(Killed):
            moe_compile.save_checkpoint(model, None, path)
            raise AssertionError("nobody was killed")
    other = torch.nn.Linear(2, 2)
    path.mkdir(exist_ok=True)  # as scripts do before they look
    moe_compile.load_checkpoint(other, None, path)
    assert other.weight[0, 0].item() in (1.0, 2.0)
    moe_compile.save_checkpoint(model, None, path)
    moe_compile.load_checkpoint(other, None, path)
    assert torch.equal(other.weight, model.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one"]
    assert (path / "notes").exists()
