"""Checks that run on several ranks, all those of one world size in one spawn.

A check is a function of `Ranks` in a module such as checks.py that raises on the rank that finds a fault.  The first
fault ends the run, for ranks that left a collective half done cannot go on together; every wait has a time limit.

There are as many experts as a check needs for uneven shards.  `EP` in its module says over how many ranks experts are
split, if that is not all of them; `OVER_ALL` names the checks of such a module that split them over all besides.

MOE_COMPILE_TEST_TIMES names a file to which rank 0 appends what each check took: seconds, and those of its processor.
"""

import datetime
import gc
import importlib
import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LIMIT_S = 120  # for each check, on a machine with other work
COLLECTIVE_S = 180
# What the first compilation of a process imports: the ranks of every test have it from one process
PRELOAD = [
    *(f"tests.parallel.{name}" for name in (
        "checks", "checks_chunks", "checks_edp", "checks_files", "checks_flat", "checks_fsdp", "checks_together", "checks_tp",
        "strategies",
    )),
    "torch._inductor.select_algorithm", "torch._export.db",
    "torch._dynamo.testing", "torch.export._trace", "torch.utils.cpp_extension", "torch.distributed.fsdp",
    "transformers.models.mixtral.modeling_mixtral",
    "tests.parallel.warm",
]  # fmt: skip


@dataclass(frozen=True)
class Ranks:
    """What a check gets: this rank, and how many there are."""

    rank: int
    size: int


def run(size: int, names: list[str], module: str = "tests.parallel.checks") -> dict[str, str]:
    """What went wrong in each check of a module, "" if nothing did."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    results: Any = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [context.Process(target=_work, args=(rank, size, port, names, module, results)) for rank in range(size)]
    for worker in workers:
        worker.start()
    try:
        return _collect(names, size, results)
    finally:
        for worker in workers:
            worker.join(5)
            if worker.is_alive():
                worker.kill()


def _collect(names: list[str], size: int, results: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    done: dict[str, int] = dict.fromkeys(names, 0)
    limit = LIMIT_S * len(names)
    end = time.monotonic() + limit
    while min(done.values()) < size:
        try:
            name, rank, error = results.get(timeout=max(0.1, min(5.0, end - time.monotonic())))
        except queue.Empty:
            if time.monotonic() > end or found:
                break
            continue
        done[name] += 1
        if error:
            found[name] = found.get(name, "") + f"rank {rank}:\n{error}\n"
            end = min(end, time.monotonic() + 5)  # what the others have to say about it
    for name in names:
        if done[name] < size and name not in found:
            first = next(iter(found), None)
            found[name] = f"not run: {first} failed" if first else f"{done[name]} of {size} ranks finished in {limit} s"
    return {name: found.get(name, "") for name in names}


def _work(rank: int, size: int, port: int, names: list[str], module: str, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    import torch
    import torch.distributed as dist

    from tests.parallel import checks, checks_flat, checks_together, strategies

    home = importlib.import_module(module)
    torch.set_num_threads(1)
    gc.freeze()  # what was imported, so that no collection walks over it while graphs are traced
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=COLLECTIVE_S))
    for name in names:
        ep = size if name in getattr(home, "OVER_ALL", ()) else min(size, getattr(home, "EP", size))
        checks.E = max(3, 2 * ep - 1)  # the last rank holds fewer
        torch._dynamo.reset()
        torch.manual_seed(0)
        start = time.monotonic(), time.process_time()
        try:
            places = (home, strategies, checks_flat, checks_together)
            check: Callable[[Ranks], None] = next(getattr(m, name) for m in places if hasattr(m, name))
            check(Ranks(rank, size))
            dist.barrier()
            _note(rank, size, name, *start)
        except BaseException:
            results.put((name, rank, traceback.format_exc(limit=-12)))
            break
        results.put((name, rank, ""))
    results.close()
    results.join_thread()
    os._exit(0)  # without waiting for ranks that hang


def _note(rank: int, size: int, name: str, wall: float, cpu: float) -> None:
    if (path := os.environ.get("MOE_COMPILE_TEST_TIMES")) and not rank:
        with open(path, "a") as file:
            file.write(f"{time.monotonic() - wall:7.1f} s {time.process_time() - cpu:7.1f} s  {size} {name}\n")


def groups(checks: dict[int, list[str]], most: int = 8) -> list[tuple[int, list[str]]]:
    """(ranks, names) of at most so many checks, evenly: each group is one test, so that no two workers start it."""
    found = []
    for size, names in checks.items():
        number = -(-len(names) // most)
        each = -(-len(names) // number)
        found += [(size, names[i : i + each]) for i in range(0, len(names), each)]
    return found


def name_of(group: tuple[int, list[str]]) -> str:
    size, names = group
    return f"{size}-{names[0]}-{len(names)}"


def faults(found: dict[str, str]) -> str:
    """What went wrong, check by check."""
    return "\n".join(f"{name}: {error}" for name, error in found.items() if error)
