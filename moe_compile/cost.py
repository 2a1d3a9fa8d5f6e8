"""A first cost table: which kernel a grouped GEMM gets on which device.

time_us = launches + max(FLOPs / rate, bytes / bandwidth), the larger of compute and memory time.  The rates are what
the sources below report or what arithmetic suggests; none is measured by this project yet.
"""

import torch
from torch import Tensor

# TFLOP/s at many rows per expert, bf16.  CUTLASS and plain-pointer Triton grouped GEMMs on an H200 with long
# contiguous rows: 597-624 and 469-490 (tile-ai/TileOPs pull request 1567).  Unmeasured here.
RATE = {"triton": 480.0, "grouped_mm": 600.0}
BANDWIDTH = 4.0e3  # GB/s; 4.3 measured for copies on an H200 by others
LAUNCH_US = {"triton": 8.0, "grouped_mm": 14.0}  # the grouped kernel first sets up its problem list
TILE_ROWS = {"triton": 16, "grouped_mm": 128}  # rows that a tile computes even if an expert has fewer


def grouped_gemm_us(kernel: str, x_RD: Tensor, w_EFD: Tensor) -> float:
    """Estimated microseconds of y = x @ w[e].T on one device, balanced routing.

    The number of rows may be symbolic: then the caller's example size counts, and adds no guard.
    """
    E, F, D = (int(s) for s in w_EFD.shape)
    rows = _hint(x_RD.shape[0])
    padded = max(rows, E * min(TILE_ROWS[kernel], max(rows // E, 1) * 2))
    flops = 2.0 * padded * F * D
    moved = x_RD.element_size() * (rows * (D + F) + E * F * D)
    return LAUNCH_US[kernel] + max(flops / RATE[kernel] / 1e6, moved / BANDWIDTH / 1e3)


def _hint(size: int | torch.SymInt) -> int:
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.hint is not None else 4096
    return int(size)
