"""What the GPU's benchmarks measure, and when a result is wrong.

`Machine` is where and in what numbers: CUDA and bf16; or a CPU and f32 for a dry run, which makes each call once, times
nothing, and counts what is kept by autograd's own hooks.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REPEATS, WARM_UP = 20, 5
SLOW_MS = 300.0  # what takes longer is timed once
BOUND_OF_RATIO = 1.1  # our error beside that of torch.mm, an expert at a time, in the same type
BOUND_OF_KEPT = 1.02  # beside the formula; an allocator rounds sizes up

Call = Callable[[], object]


@dataclass(frozen=True)
class Machine:
    """Where and in what numbers."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    backend: str = "inductor"

    def time_us(self, call: Call) -> float | None:
        """The median of REPEATS calls; None in a dry run, which makes one."""
        if self.device == "cpu":
            call()
            return None
        return time_us(call)

    def peak_bytes(self, call: Call) -> int | None:
        """What a call has at once beside what is there before it; None in a dry run."""
        return None if self.device == "cpu" else peak_bytes(call)

    def kept_bytes(self, forward: Callable[[], Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> int:
        """What a forward keeps for its backward: `inputs`, which it must, but no weights of experts, and no result."""
        if self.device == "cpu":
            return saved_bytes(forward, weights)
        return allocated_bytes(forward) + sum(v.nbytes for v in inputs)


def time_us(call: Call, repeats: int = REPEATS, warm_up: int = WARM_UP) -> float:
    """The median of some calls, each between two events; one call alone, if it is slow."""

    def timed(count: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in "se"] for _ in range(count)]
        for start, end in pairs:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    first = timed(1)[0]
    if first > SLOW_MS:
        return 1e3 * first
    for _ in range(warm_up - 1):
        call()
    return 1e3 * statistics.median(timed(repeats))


def dense_tflops(n: int = 8192) -> float:
    """The ceiling: one large product of random numbers."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / time_us(lambda: a @ b) / 1e6


def peak_bytes(call: Call) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def allocated_bytes(forward: Callable[[], Tensor]) -> int:
    """What there is after a forward, but for its result, and was not before."""
    before = torch.cuda.memory_allocated()
    out = forward()
    return torch.cuda.memory_allocated() - before - out.untyped_storage().nbytes()


def saved_bytes(forward: Callable[[], Tensor], weights: Sequence[Tensor]) -> int:
    """The memory of what autograd saves, each piece once."""
    saved: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        memory = value.untyped_storage()
        saved[memory.data_ptr()] = memory.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        out = forward()
    for value in (out, *weights):
        saved.pop(value.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def captured(step: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """The same step as a CUDA graph; its results are overwritten by the next call."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


def error(value: Tensor, exact: Tensor) -> float:
    """Root of the mean of squares, relative to the numbers'."""
    wide = torch.promote_types(exact.dtype, torch.float32)
    norm = exact.to(wide).norm().clamp_min(1e-30)
    return float((value.to(wide) - exact.to(wide)).norm() / norm)


def why_wrong(value: Tensor, reference: Tensor, roundings: int = 1) -> str | None:
    """Whether a result is further off than so many roundings to its type, one after the other, make it; None if not.

    A rounding to nearest moves a number by half a unit in the last place at most, eps / 2 of itself, and by
    eps / sqrt(12) in the mean square if all numbers are just above a power of two, where that is most of them (bf16:
    2.3e-3; 1.7e-3 for normal ones).  Roundings are independent, so their squares add up; of single numbers, here
    beside the largest, they may all go one way.  Sums in f32 have an error of their own, some of its eps; of a single
    long sum 2.4e-4, as tensor cores cut bits off when they add.
    """
    if not value.is_floating_point():
        return None if torch.equal(value, reference) else "indices differ"
    if value.shape != reference.shape:
        return f"shape {tuple(value.shape)}, expected {tuple(reference.shape)}"
    eps, of_sums = torch.finfo(value.dtype).eps, 16 * torch.finfo(torch.float32).eps
    if not value.numel():
        return None
    rms, bound = error(value, reference), math.sqrt(roundings / 12) * eps + of_sums
    wide = torch.promote_types(reference.dtype, torch.float32)
    off, largest = (value.to(wide) - reference.to(wide)).abs().max(), reference.abs().max().to(wide).clamp_min(1e-30)
    worst, bound_of_worst = float(off / largest), roundings * eps / 2 + 128 * of_sums
    if rms <= bound and worst <= bound_of_worst:  # NaN fails both
        return None
    return (
        f"relative error {rms:.1e} in the mean square, bound {bound:.1e}; "
        f"{worst:.1e} of the largest, bound {bound_of_worst:.1e}"
    )


def error_ratio(mine: Sequence[Tensor], loops: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest ratio of our error to that of a loop over experts, result by result."""
    least = torch.finfo(mine[0].dtype).eps / 16  # a loop that happens to be exact
    return max(error(a, c) / max(error(b, c), least) for a, b, c in zip(mine, loops, exact, strict=True))


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def lost(device: str = "cuda") -> str | None:
    """Why nothing more can run on this device in this process: some errors of kernels stay.  None if it can."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return first_line(error)
    return None
