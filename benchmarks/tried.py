"""Launch settings that benchmarks/tune.py tries for a product: few, by reasoning."""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from moe_compile.kernels import settings
from moe_compile.kernels.settings import Problem, Setting

MANY = (
    (128, 128, 64, 8), (128, 256, 64, 8), (64, 128, 64, 4), (256, 128, 64, 8), (64, 128, 64, 8), (64, 256, 64, 8),
    (128, 128, 64, 4), (128, 64, 64, 4), (128, 128, 128, 8),
)  # fmt: skip
SEVERAL = (
    (64, 128, 64, 4), (32, 128, 64, 4), (64, 64, 64, 4), (32, 64, 64, 4), (64, 256, 64, 8), (16, 128, 64, 4),
    (64, 128, 64, 8), (32, 128, 128, 4),
)  # fmt: skip
FEW = (
    (16, 64, 128, 4), (16, 32, 128, 4), (16, 32, 256, 4), (16, 128, 64, 4), (16, 64, 64, 4), (16, 128, 128, 8),
    (16, 64, 256, 4), (32, 64, 128, 4),
)  # fmt: skip
"""Rows, columns and inner width of a tile, and warps: from 64 rows an expert on, from 16 on, and below.  The sum takes
128 registers of a thread at most; wider tiles with 4 warps spill (docs/performance.md has what was cross-compiled)."""
LAUNCHED = ((1, 0), (0, 1), (1, 1), (0, 2), (1, 2))  # TMA, programs for each multiprocessor; (0, 0) goes without saying


class Job(NamedTuple):
    """One product: who computes it, for which problem, by `calls[routing]()`."""

    problem: Problem
    seed: Setting
    calls: list[Callable[[], Tensor]]


def candidates(job: Job, shared_bytes: int) -> list[Setting]:
    """Settings worth trying, nearest to the kernel's own guess first, which is not among them."""
    kernel, rows = job.problem.kernel, job.problem.rows
    of_weights, parts = kernel == "grouped_gemm_dw", kernel == "gated_gemm_backward"
    tiles = MANY if rows >= 64 or of_weights else SEVERAL if rows >= 16 else FEW
    of_stages = (5, 7) if of_weights else (3, 4) if rows >= 16 else (3, 4, 6)
    of_stages = (2, 3) if shared_bytes <= 65536 else of_stages  # AMD's
    halves = 2 if (kernel, job.problem.form) == ("gated_gemm", "gated") else 1
    plain: list[list[Setting]] = []  # by tile
    for m, n, k, warps in tiles:
        if (not of_weights and m > max(16, 2 * rows)) or n // halves < 16:
            continue  # most of a tile would be empty; or no tile
        cuts = [(p,) for p in ((4, 2) if m > 16 else (1,)) if n // p >= 32] if parts else [()]
        # gathered rows of a weight's gradient: Triton spends every other stage on their indices
        fitting = [s for s in of_stages if ((s + 1) // 2 if of_weights else s) * (m + n) * k * 2 <= shared_bytes]
        pairs = [(s, cut) for s in fitting for cut in cuts if cut == cuts[0] or s == fitting[0]]
        plain.append([(m, n // halves, k, *cut, warps, stages) for stages, cut in pairs])
    launched = [(setting, how) for ways in plain[:3] for setting in ways[:1] for how in launches(job)]
    found = [setting for ways in plain for setting in ways]
    if "TMA" in settings.NAMES[kernel]:
        found = [(*s, 0, 0) for s in found] + [(*s, *how) for s, how in launched]

    def far(setting: Setting) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(setting, job.seed, strict=False))

    return sorted((s for s in found if whole(job, s) != whole(job, job.seed)), key=far)


def launches(job: Job) -> list[tuple[int, int]]:
    """How else than one program a tile, by pointers: descriptors from Hopper on, persistent grids with many tiles."""
    if "TMA" not in settings.NAMES[job.problem.kernel]:
        return []
    device = job.problem.device
    tma = device.startswith("sm_") and int(device[3:]) >= 90
    many = job.problem.rows >= 64 or job.problem.kernel == "grouped_gemm_dw"
    return [(t, p) for t, p in LAUNCHED if (tma or not t) and (many or not p)]


def whole(job: Job, setting: Setting) -> Setting:
    """With what may be left out."""
    return (*setting, *(0,) * (len(settings.NAMES[job.problem.kernel]) - len(setting)))


def crossed(job: Job, times: dict[Setting, float]) -> Setting | None:
    """The best tile launched in the best way, if nobody tried it; None too where there is one way."""
    right = [whole(job, s) for s, took in sorted(times.items(), key=lambda item: item[1]) if took < math.inf]
    names = settings.NAMES[job.problem.kernel]
    if "TMA" not in names or not right:
        return None
    at = names.index("TMA")
    tile = next((s[:at] for s in right if not any(s[at:])), right[0][:at])
    how = next((s[at:] for s in right if any(s[at:])), right[0][at:])
    found = (*tile, *how)
    return None if found in right or any(whole(job, s) == found for s in times) else found
