"""A time limit for something that may hang, or compile for minutes, in this process.

First an alarm raises `TimeUp` in the main thread.  That is of no use inside a call that does not come back (a kernel
that never ends, a compiler on another thread); so some seconds later a thread says what there is to say and ends the
process.  POSIX alone; main thread alone.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.records import LEFT_OUT

GRACE_S, DAY_S = 20.0, 86400.0


class TimeUp(BaseException):
    """No `Exception`: compilers catch those and go on."""


@contextmanager
def limited(seconds: float, on_hang: Callable[[], object], grace_s: float = GRACE_S) -> Iterator[None]:
    """Raises `TimeUp` after so many seconds; where that does not help, calls `on_hang` and exits with LEFT_OUT."""
    if seconds <= 0:
        raise TimeUp
    seconds = min(seconds, DAY_S)  # timers do not take infinity

    def ring(*_: object) -> None:
        raise TimeUp

    def end() -> None:
        try:
            on_hang()
            sys.stdout.flush()
        finally:
            os._exit(LEFT_OUT)

    thread = threading.Timer(seconds + grace_s, end)
    thread.daemon = True
    before = signal.signal(signal.SIGALRM, ring)
    try:
        thread.start()
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        thread.cancel()
        signal.signal(signal.SIGALRM, before)
