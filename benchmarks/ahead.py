"""Compile launch settings before they are tried, in processes of their own, into Triton's cache on disk.

`Ahead` starts one process, which has no GPU.  For each task it forks another one, `jobs` of them at a time, in the
order given, which ends when it has compiled its task: it makes the product's operands on torch's "meta" device, where
they take no memory, pins the setting, and calls the kernel's own launcher, in which each launch is a `warmup`.  So
types, divisibility by 16 (the address of a tensor there is 0), constants, descriptors and options are those of a
launch, and so is the key in the cache (Triton 3.6 and 3.7 hash the kernel's source, these, the target, ptxas, and some
environment variables); what a launch then finds there, it does not compile.  Where a key is another one, nothing is
lost but the worker's time: the launch compiles, as without this module.

At its end it says on stderr how many settings the workers compiled, and how many kernels this process had to.

A task that takes longer than its limit is ended, with its ptxas, and one that ends by a signal is not tried by anybody
else: `ready` says why.  One that raises, or whose process is killed (by whoever kills what takes too much memory), is
left to the launch.  Workers are killed when the process that made them ends, however it does: the pipe between them
closes.  If the process that forks them ends, launches compile, and what was forked ends soon after its limit.  POSIX
alone.
"""

import functools
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

POLL_S = 0.02  # how late the end of a worker is noticed
KILL = signal.SIGKILL


class Task(NamedTuple):
    """A product of a layer (benchmarks/products.py) at one setting."""

    shape: str
    kernel: str
    form: str
    D: int
    F: int
    setting: tuple[int, ...]


class Ahead:
    """Tasks under way, by a name of the caller's; a context, at whose end the workers end."""

    def __init__(
        self, tasks: Mapping[Any, Task] | None = None, target: Sequence[Any] = (), jobs: int = 0, limit_s: float = 60.0
    ) -> None:
        """target: the arguments of a GPUTarget.  Without jobs, everything is ready at once and nothing is compiled."""
        self.compiled, self.left_over, self._why = 0, 0, dict[Hashable, str]()
        self._names = list(tasks or {}) if jobs > 0 else []
        self._under_way, self._read = set(self._names), b""
        self._process: subprocess.Popen[bytes] | None = None
        if not self._names:
            return
        # A session of its own: what a terminal or `timeout` sends to a group does not reach it before it has tidied up.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ahead"],
            start_new_session=True,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        listed = [task._asdict() for task in (tasks or {}).values()]
        asked = {"tasks": listed, "target": list(target), "jobs": jobs, "limit_s": limit_s}
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), os.fdopen(os.dup(self._process.stdin.fileno()), "wb") as pipe:
            pipe.write(json.dumps(asked).encode() + b"\n")
        from triton import knobs

        knobs.compilation.listener = self._count

    def _count(self, *_: object, cache_hit: bool, **__: object) -> None:
        self.left_over += not cache_hit

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):  # it may be loading torch, and will end after that
                self._process.wait(1.0)
            self._process.stdout.close()
            print(f"workers compiled {self.compiled} settings, this process {self.left_over} kernels", file=sys.stderr)
        self._process, self._under_way = None, set()

    def ready(self, names: Sequence[Hashable], until: float) -> Iterator[tuple[int, str | None]]:
        """(index, why it is to be passed over, if it is) of each: the first one first, then as they get ready.

        Ends without the rest at `until`, by `time.monotonic`.  Names of no task are ready.
        """
        for group in (range(len(names))[:1], range(len(names))[1:]):
            left = list(group)
            while left:
                self._listen(0.0)
                found = next((i for i in left if names[i] not in self._under_way), None)
                if found is not None:
                    left.remove(found)
                    yield found, self._why.get(names[found])
                elif time.monotonic() > until:
                    return
                else:
                    self._listen(until - time.monotonic())

    def _listen(self, seconds: float) -> None:
        """Take in what has ended; wait so long for it."""
        if self._process is None or not self._under_way:
            return
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], max(0.0, min(seconds, 3600.0)))[0]:
            return
        some = self._process.stdout.read(1 << 16)
        if not some:  # nobody is there to compile the rest
            self._under_way.clear()
        *lines, self._read = (self._read + some).split(b"\n")
        for index, compiled, why in map(json.loads, lines):
            name = self._names[index]
            self._under_way.discard(name)
            self.compiled += compiled
            if why is not None:
                self._why[name] = why


# -- the workers ------------------------------------------------------------------------------


def serve() -> None:
    """Work off the tasks of the first line of stdin; report [index, compiled, why not or null] on stdout, a line each.

    Nothing is compiled in this process, which has one thread, so that it may fork.
    """
    asked = json.loads(_line(0))
    tasks = [Task(**{**task, "setting": tuple(task["setting"])}) for task in asked["tasks"]]
    reports, errors = os.dup(1), os.dup(2)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)  # what a compiler prints, a launch will print again
    os.nice(10)
    _be_on(asked["target"])
    list(_calls(tasks[0]))  # what it loads is there for all
    waiting, running = list(enumerate(tasks)), dict[int, tuple[int, float]]()
    try:
        while waiting or running:
            while waiting and len(running) < asked["jobs"]:
                index, task = waiting.pop(0)
                running[_fork(task, asked["limit_s"], nothing, errors)] = index, time.monotonic() + asked["limit_s"]
            if select.select([0], [], [], POLL_S)[0]:  # nothing more is sent: the other end is closed
                return
            for pid, (index, until) in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                late = not ended and time.monotonic() > until
                if not ended and not late:
                    continue
                del running[pid]
                _kill(pid)  # with what it started
                if late:
                    os.waitpid(pid, 0)
                report = [index, not late and status == 0, _why_not(status, late, asked["limit_s"])]
                os.write(reports, json.dumps(report).encode() + b"\n")
    except BrokenPipeError:
        return
    finally:
        for pid in running:
            _kill(pid)


def _line(file: int) -> bytes:
    """The first line, and no byte more."""
    found = b""
    while not found.endswith(b"\n"):
        some = os.read(file, 1 << 16)
        if not some:
            raise SystemExit(0)
        found += some
    return found


def _why_not(status: int, late: bool, limit_s: float) -> str | None:
    if late:
        return f"not compiled after {limit_s:.0f} s"
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != KILL:
        return f"its compiler ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return None


def _kill(pid: int) -> None:
    """End a worker and all that it started."""
    with suppress(OSError):  # none is left
        os.killpg(pid, KILL)


def _fork(task: Task, limit_s: float, nothing: int, errors: int) -> int:
    """Start a worker, in a process group of its own."""
    pid = os.fork()
    if pid:
        with suppress(OSError):  # it was faster
            os.setpgid(pid, pid)
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        signal.alarm(math.ceil(limit_s) + 5)  # if nobody is left to end it
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # rather this process than the one that measures
        os.dup2(nothing, 0)
        os.dup2(nothing, 2)
        compile_task(task)
        status = 0
    except BaseException as error:
        first = (str(error).splitlines() or [""])[0][:200]
        os.write(errors, f"  {list(task.setting)}: not compiled ahead: {type(error).__name__}: {first}\n".encode())
    finally:
        os._exit(status)


def _be_on(target: Sequence[Any]) -> None:
    """Have Triton compile for a device that this process does not have, and load before forking what takes time."""
    from types import SimpleNamespace

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.cache import triton_key

    there: Any = SimpleNamespace(
        get_current_target=lambda: GPUTarget(*target), get_current_device=lambda: 0, get_current_stream=lambda _: 0
    )
    triton.runtime.driver.set_active(there)
    triton_key()  # of all of Triton's files; kept


def compile_task(task: Task) -> None:
    """Call the task's product on operands without memory, with a `warmup` for each launch."""
    from unittest import mock

    from torch._library.custom_ops import CustomOpDef
    from torch._library.triton import set_wrap_triton_enabled
    from triton.runtime.jit import KernelInterface

    from moe_compile.kernels import settings

    def on_meta(op: CustomOpDef, *args: Any, **kwargs: Any) -> Any:
        return op._init_fn(*args, **kwargs)  # the launcher: on "meta" the op itself would only make its results

    def warm_up(kernel: Any, grid: Any) -> Any:
        return functools.partial(kernel.warmup, grid=grid)

    call = next(_calls(task))
    with (
        mock.patch.object(CustomOpDef, "__call__", on_meta),
        mock.patch.object(KernelInterface, "__getitem__", warm_up),
        set_wrap_triton_enabled(False),
        settings.pinned(task.kernel, task.form, task.setting),
    ):
        call()


def _calls(task: Task) -> Iterator[Callable[[], object]]:
    """The task's product on "meta"."""
    from benchmarks.products import jobs
    from benchmarks.timing import Machine

    for job in jobs(task.shape, Machine("meta"), ((task.kernel, task.form),)):
        if (job.problem.D, job.problem.F) == (task.D, task.F):
            yield job.calls[0]


if __name__ == "__main__":
    serve()
