"""What a launcher starts, kills and starts again: `python -m torch.distributed.run .. -m tests.parallel.restarted FOLDER`.

Ranks train from the last checkpoint in the folder, if there is one, save after each step from `SAVED` on, and write down
the losses.  When they are started for the first time, they train to the end without saving before, for the comparison;
then from the start again, until the last rank is killed in the middle of the second checkpoint, when files of it are
written.
"""

import datetime
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import moe_compile
from tests.parallel import checks
from tests.tiny import D

STEPS, SAVED = 4, 2


def job(folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.checkpoint import FileSystemWriter

    checks.E = 3
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, starts = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if starts:
        note(folder, rank, "rest", train(rank, folder))
        os._exit(0)
    note(folder, rank, "whole", train(rank, None))
    write, saves = FileSystemWriter.write_data, []

    def killed(*args: Any) -> Any:
        found = write(*args)
        saves.append(found.wait() if hasattr(found, "wait") else None)
        if len(saves) == 2 and rank == dist.get_world_size() - 1:
            Path(folder, "killed").write_text(" ".join(p.name for p in Path(folder).glob("*.saving/*.distcp")))
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    with mock.patch.object(FileSystemWriter, "write_data", killed):
        train(rank, folder)


def train(rank: int, folder: str | None) -> list[float]:
    """Each rank's losses from the last checkpoint on.

    A checkpoint has a folder, into which ranks put what is theirs first (the place in the data), so that all of it is
    there when the checkpoint is.
    """
    torch.manual_seed(0)
    model = moe_compile.parallelize(
        checks.listed(), moe_compile.build_mesh(dp_shard=torch.distributed.get_world_size())
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    random, start, losses = torch.Generator().manual_seed(rank), 0, []
    if done := sorted(path.parent for path in Path(folder or "").glob("step-?/.metadata")) if folder else []:
        moe_compile.load_checkpoint(model, optimizer, done[-1])
        start = int(done[-1].name.removeprefix("step-"))
        random.set_state(torch.load(done[-1] / f"random-{rank}"))
    for step in range(start, STEPS):
        loss = checks.square(model, torch.randn(5, D, generator=random))
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


if __name__ == "__main__":
    job(sys.argv[1])
