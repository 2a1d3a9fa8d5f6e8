"""Find the fastest launch settings of the grouped products on this device, and add them to the kernels' table.

    python -m benchmarks.tune [--shapes T,H,I,E,K ...] [--kernels NAME ...] [--limit-s 540] [--out FILE]

For each product of a gated bf16 expert layer of each shape (see benchmarks/kernels_gpu.py) every candidate is checked
against the kernel's own guess and timed on balanced routing and on Zipf-skewed routing; the one with the smallest
product of the two medians is kept.  What the table has for this device is left out, so that a run that
ended at its limit goes on where it was.  A candidate that the device cannot run, or whose result differs, is
passed over.
"""

import argparse
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from benchmarks.kernels_gpu import SHAPES
from benchmarks.timing import time_us, why_wrong
from moe_compile.kernels import settings
from moe_compile.kernels.settings import Entry, Problem, Setting

DTYPE = torch.bfloat16
BLOCKS_M, BLOCKS_N, BLOCKS_K, WARPS, STAGES = (
    (16, 32, 64, 128),
    (32, 64, 128, 256),
    (32, 64, 128, 256),
    (4, 8),
    (2, 3, 4, 5),
)
ACCUMULATORS = 128  # registers of a thread that the sum may take

Call = Callable[[Tensor, Tensor], Tensor]
"""Called with offsets and order."""


class Job(NamedTuple):
    """One product: who computes it, for which problem, by `calls[routing]()`."""

    problem: Problem
    seed: Setting
    calls: list[Callable[[], Tensor]]


def candidates(job: Job, shared_bytes: int) -> list[Setting]:
    """Settings worth trying, nearest to the kernel's own guess first."""
    ours = job.problem.device
    names = settings.NAMES[job.problem.kernel]
    tma = ours.startswith("sm_") and int(ours[3:]) >= 90
    kernel, halves = job.problem.kernel, 2 if (job.problem.kernel, job.problem.form) == ("gated_gemm", "gated") else 1
    found: list[Setting] = []
    for m, n, k, warps, stages in itertools.product(BLOCKS_M, BLOCKS_N, BLOCKS_K, WARPS, STAGES):
        if (n == 32 or k == 256) and m > 16:
            continue  # for few rows: more programs, each with as many bytes on their way
        if m * n > ACCUMULATORS * 32 * warps or stages * (m + n) * k * DTYPE.itemsize > shared_bytes:
            continue
        if kernel != "grouped_gemm_dw" and m > max(16, 2 * job.problem.rows):
            continue  # most of a tile would be empty
        # as many programs as fit a multiprocessor by their registers, where there are tiles enough for several turns
        persistent = (0, 1, 2)[: 1 + min(2, 65536 // (32 * warps * 128))] if job.problem.rows >= 64 else (0,)
        asked = [(t, p) for t in (0, 1)[: 1 + tma] for p in persistent] if "TMA" in names else [()]
        parts = [(p,) for p in (1, 2, 4) if n // p >= 32] if "PARTS" in names else [()]
        found += [(m, n // halves, k, *some, warps, stages, *rest) for some in parts for rest in asked]

    def far(setting: Setting) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(setting, job.seed, strict=False))

    return sorted((s for s in found if s != job.seed), key=far)


def routings(T: int, E: int, K: int) -> list[Tensor]:
    """Ids [T, K] without repeats in a row: balanced, and by Zipf's law over the experts."""
    generator = torch.Generator("cuda").manual_seed(0)
    balanced = torch.rand(T, E, device="cuda", generator=generator)
    zipf = -torch.arange(1, E + 1, device="cuda").float().log()  # log of 1 / rank; Gumbel noise draws by it
    noise = -(-torch.rand(T, E, device="cuda", generator=generator).log()).log()
    return [balanced.topk(K)[1], (zipf + noise).topk(K)[1]]


def jobs(shape: str) -> Iterator[Job]:
    """The products of a layer, forward and backward."""
    from moe_compile.kernels import gated_gemm as a
    from moe_compile.kernels import gated_gemm_backward as b
    from moe_compile.kernels import grouped_gemm as g
    from moe_compile.kernels import grouped_gemm_dw as w
    from moe_compile.kernels import grouped_gemm_scaled as q
    from moe_compile.kernels.tiles import fills
    from moe_compile.ops import dispatch

    T, H, W, E, K = map(int, shape.split(","))
    R, hip = T * K, torch.version.hip is not None
    device = torch.device("cuda")

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=DTYPE) / sizes[-1] ** 0.5

    x, dout, up, down, act, h = (random(*s) for s in ((T, H), (T, H), (E, 2 * W, H), (E, H, W), (R, W), (R, 2 * W)))
    weights, rows = torch.rand(T, K, device=device, dtype=torch.float32), R // E
    sorted_by = [dispatch(x, ids, E)[1:] for ids in routings(T, E, K)]

    def job(kernel: str, form: str, D: int, F: int, seed: Setting, call: Call) -> Job:
        problem = Problem(kernel, form, settings.device_name(device), settings.DTYPES[DTYPE], rows, D, F)
        return Job(problem, seed, [functools.partial(call, ends, order) for ends, order in sorted_by])

    yield job("gated_gemm", "gated", H, W, a._seed(rows, DTYPE, True, hip, fills(R, E, W, 32)),
              lambda ends, order: a.gated_gemm(x, None, up, ends, order, K, "silu", True, True)[0])  # fmt: skip
    yield job("grouped_gemm", "d packed", W, H, g._seed(rows, DTYPE, hip, fills(R, E, H, 64)),
              lambda ends, order: g.grouped_gemm(act, down, ends))  # fmt: skip
    yield job("grouped_gemm", "f packed", 2 * W, H, g._seed(rows, DTYPE, hip, fills(R, E, H, 64)),
              lambda ends, order: g.grouped_gemm(h, up.mT, ends))  # fmt: skip
    kind = torch.float8_e5m2 if q.why_not_widened(torch.float8_e4m3fn, device) else torch.float8_e4m3fn
    down8, up8, scales = (16 * down).to(kind), (16 * up).to(kind), torch.rand(E, H, device=device)
    yield job("grouped_gemm_scaled", "d packed", W, H, g._seed(rows, DTYPE, hip, fills(R, E, H, 64)),
              lambda ends, order: q.grouped_gemm_scaled(act, down8, scales, ends))  # fmt: skip
    yield job("grouped_gemm_scaled", "f packed", 2 * W, H, g._seed(rows, DTYPE, hip, fills(R, E, H, 64)),
              lambda ends, order: q.grouped_gemm_scaled(h, up8.mT, None, ends))  # fmt: skip
    yield job("gated_gemm_backward", "gated", H, W, b._seed(rows, DTYPE, hip),
              lambda ends, order: b.gated_gemm_backward(dout, down, h, weights, ends, order, K, "silu", True, False,
                                                        True, True)[0])  # fmt: skip
    yield job("grouped_gemm_dw", "gathered", H, 2 * W, w._seed(rows, DTYPE, hip, True),
              lambda ends, order: w.grouped_gemm_dw(h, x, ends, order, 0, K))  # fmt: skip
    yield job("grouped_gemm_dw", "gathered", W, H, w._seed(rows, DTYPE, hip, True),
              lambda ends, order: w.grouped_gemm_dw(dout, act, ends, order, K, 0))  # fmt: skip


def best(
    job: Job, settings_to_try: list[Setting], until: float, clock: Callable[..., float] = time_us
) -> Setting | None:
    """The fastest setting; None if time was up before all were tried."""
    references = [call().clone() for call in job.calls]

    def times(setting: Setting) -> float:
        with settings.pinned(job.problem.kernel, job.problem.form, setting):
            try:
                if any(why_wrong(call(), ref) for call, ref in zip(job.calls, references, strict=True)):
                    return math.inf
                return math.prod(clock(call) for call in job.calls)
            except Exception as error:  # too much shared memory, too many registers: the device says no
                print(f"  {list(setting)}: {type(error).__name__}", file=sys.stderr)
                return math.inf

    fastest, shortest = job.seed, times(job.seed)
    for setting in settings_to_try:
        if time.monotonic() > until:
            return None
        if (took := times(setting)) < shortest:
            fastest, shortest = setting, took
    return fastest


def add(entry: Entry, path: Path) -> None:
    """Append an entry to the table."""
    with path.open("a") as file:
        file.write(entry.line() + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="T,H,I,E,K")
    parser.add_argument("--kernels", nargs="+", default=list(settings.NAMES), choices=settings.NAMES)
    parser.add_argument("--limit-s", type=float, default=540)
    parser.add_argument("--out", type=Path, default=settings.TABLE)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.tune needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    until = time.monotonic() + chosen.limit_s
    driver: Any = triton.runtime.driver.active
    shared = driver.utils.get_device_properties(0)["max_shared_mem"]
    for shape in chosen.shapes:
        for job in jobs(shape):
            known = {entry.problem for entry in settings.read(chosen.out)} if chosen.out.exists() else set()
            if job.problem.kernel not in chosen.kernels or job.problem in known:
                continue
            setting = best(job, candidates(job, shared), until)
            if setting is None:
                print(f"time is up at {job.problem}; run it again to go on")
                return 0
            entry = Entry(job.problem, setting)
            add(entry, chosen.out)
            print(f"{entry.line()}  (the kernel's own guess: {list(job.seed)})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
