"""A folder that is written as a whole or not at all, by all ranks of a job.

    <path>            the last that is complete
    <path>.saving     what is being written; a job that was killed leaves it behind, and nobody reads it
    <path>.previous   the last but one, from the moment that it makes room until the new one stands in its place

A rename is atomic, so whoever is killed, at any time, <path> or <path>.previous is complete.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator

import torch.distributed as dist

from moe_compile.errors import MoeCompileError

SAVING, PREVIOUS = ".saving", ".previous"


def agree(problem: str | None) -> None:
    """Raise `MoeCompileError` on all ranks if one has something to say; nobody is through before all are here."""
    problems = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    if said := next((p for p in problems if p), None):
        raise MoeCompileError(said)


def on_first(work: Callable[[], None]) -> None:
    """Have rank 0 do something to the file system that all see; what it cannot do is an error on all ranks."""
    problem = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            work()
        except (OSError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
    agree(problem)


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str], marks: tuple[str, ...], ours: Callable[[str], bool]) -> Iterator[str]:
    """A new folder for all ranks to write into, which takes the place of `path` when all are through.

    marks: of these files a complete folder has one.  ours: whether a name in the old folder is of what is written
    anew; anything else in there is the user's, and kept.
    """
    path = os.path.realpath(path)
    new = path + SAVING

    def start() -> None:
        shutil.rmtree(new, ignore_errors=True)
        os.makedirs(new)

    on_first(start)
    yield new
    agree(None)
    on_first(lambda: _swap(path, new, marks, ours))


def complete(path: str | os.PathLike[str], marks: tuple[str, ...]) -> str:
    """`path`, or the previous one if a job was killed between the two renames."""
    path = os.path.realpath(path)
    return path if _has(path, marks) or not _has(path + PREVIOUS, marks) else path + PREVIOUS


def _has(path: str, marks: tuple[str, ...]) -> bool:
    return any(os.path.exists(os.path.join(path, mark)) for mark in marks)


def _swap(path: str, new: str, marks: tuple[str, ...], ours: Callable[[str], bool]) -> None:
    old = path + PREVIOUS
    done = _has(path, marks)  # if not, `old` may be the one that is complete
    for folder in (path,) if done else (path, old):
        _keep_others(folder, new, ours)
    if done:
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    elif os.path.isdir(path):
        shutil.rmtree(path)
    os.rename(new, path)
    sync(os.path.dirname(path))
    shutil.rmtree(old, ignore_errors=True)


def _keep_others(folder: str, new: str, ours: Callable[[str], bool]) -> None:
    """Have what is the user's in the new folder too."""
    for entry in os.scandir(folder) if os.path.isdir(folder) else ():
        there = os.path.join(new, entry.name)
        if ours(entry.name) or os.path.exists(there):
            continue
        if entry.is_dir():
            shutil.copytree(entry.path, there, copy_function=_link)
        else:
            _link(entry.path, there)


def _link(source: str, target: str) -> None:
    """The same file under another name; a copy, where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def sync(path: str) -> None:
    """Have a folder's names, or a file's bytes, survive the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
