"""A job is killed while it saves, and started again: the last checkpoint is there, and the losses go on bit by bit."""

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import moe_compile
from moe_compile.parallel import folders
from tests.parallel import ranks
from tests.tiny import D

RANKS, STEPS, SAVED = 2, 4, 2
LIMIT_S = 240


def job(rank: int, port: int, folder: str, kill: bool) -> None:
    """Train from the last checkpoint, if there is one; save after each step from `SAVED` on; write down the losses.

    Each has a folder, into which ranks put what is theirs first (the place in the data), so that all of it is there
    when the checkpoint is.

    kill: this is the first job, which trains to its end once without saving, for the comparison; then from the start
    again, until its last rank is killed in the middle of the second checkpoint, when files of it are written.
    """
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    import torch.distributed as dist
    from torch.distributed.checkpoint import FileSystemWriter

    from tests.parallel import checks

    checks.E = 3
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if kill:
        note(folder, rank, "whole", train(rank, None))
        write, saves = FileSystemWriter.write_data, []

        def killed(*args: Any) -> Any:
            found = write(*args)
            saves.append(found.wait() if hasattr(found, "wait") else None)
            if len(saves) == 2 and rank == RANKS - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        with mock.patch.object(FileSystemWriter, "write_data", killed):
            train(rank, folder)
    else:
        note(folder, rank, "rest", train(rank, folder))
    os._exit(0)


def train(rank: int, folder: str | None) -> list[float]:
    from tests.parallel.checks import listed, square

    torch.manual_seed(0)
    model = moe_compile.parallelize(listed(), moe_compile.build_mesh(dp_shard=RANKS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    random, start, losses = torch.Generator().manual_seed(rank), 0, []
    if done := sorted(path.parent for path in Path(folder or "").glob("step-?/.metadata")) if folder else []:
        moe_compile.load_checkpoint(model, optimizer, done[-1])
        start = int(done[-1].name.removeprefix("step-"))
        random.set_state(torch.load(done[-1] / f"random-{rank}"))
    for step in range(start, STEPS):
        loss = square(model, torch.randn(5, D, generator=random))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        if folder is not None and step + 1 >= SAVED:
            path = Path(folder) / f"step-{step + 1}"
            path.mkdir(exist_ok=True)
            torch.save(random.get_state(), path / f"random-{rank}")
            moe_compile.save_checkpoint(model, optimizer, path)
    return losses


def note(folder: str, rank: int, name: str, losses: list[float]) -> None:
    Path(f"{folder}/{name}-{rank}").write_text(json.dumps(losses))


def start(folder: str, kill: bool) -> list[int | None]:
    """Run a job as a launcher does: when one rank dies, the others are killed.  Returns the exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(ranks.PRELOAD)
    workers = [context.Process(target=job, args=(rank, port, folder, kill)) for rank in range(RANKS)]
    for worker in workers:
        worker.start()
    workers[-1].join(LIMIT_S)
    workers[0].join(10 if workers[-1].exitcode else LIMIT_S)
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
        worker.join()
    return codes


def test_killed_and_started_again(tmp_path: Path) -> None:
    codes = start(str(tmp_path), kill=True)
    assert codes[-1] == -signal.SIGKILL
    assert [p.parent.name for p in tmp_path.glob("*/.metadata")] == [f"step-{SAVED}"]
    assert list((tmp_path / f"step-{SAVED + 1}.saving").glob("*.distcp")), "it was not killed in the middle"
    assert start(str(tmp_path), kill=False) == [0] * RANKS
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
