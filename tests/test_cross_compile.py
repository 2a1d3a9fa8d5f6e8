"""Each kernel compiles for Hopper on a machine without a GPU, and spills nothing.

All settings and targets: `python -m benchmarks.cross_compile`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no build for this platform")
ROOT = Path(__file__).resolve().parent.parent
KERNELS = {
    "bias_gradient",
    "combine",
    "combine_backward",
    "count",
    "gated_gemm",
    "gated_gemm_backward",
    "gather",
    "grouped_gemm",
    "grouped_gemm_dw",
    "grouped_gemm_scaled",
    "invert",
    "order",
    "row_tiles",
    "sum",
    "table",
}


def cross_compile(*arguments: str, interpret: str | None = None) -> subprocess.CompletedProcess:
    """In a process of its own: here Triton may have been imported as an interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = interpret
    command = [sys.executable, "-m", "benchmarks.cross_compile", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_one_setting_of_each_kernel_on_hopper() -> None:
    result = cross_compile("--arch", "sm_90", "--first")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line for line in result.stdout.splitlines() if " sm_90 " in line]
    assert {row.split()[0] for row in rows} >= KERNELS
    assert all(" 0/0 " in row for row in rows), result.stdout
    multiplies = [row for row in rows if row.startswith(("grouped_gemm", "gated_gemm"))]
    assert multiplies
    assert all("wgmma" in row and "cp.async" in row for row in multiplies), result.stdout


def test_refuses_interpreted_kernels() -> None:
    result = cross_compile("--arch", "sm_90", "--kernel", "combine", interpret="1")
    assert result.returncode == 2
    assert "unset TRITON_INTERPRET" in result.stderr


def test_a_row_says_its_fault() -> None:
    """In a process of its own too: the module imports Triton."""
    program = (
        "from benchmarks.cross_compile import Row\n"
        "row = lambda **kw: print(Row('k', 's', 'sm_90', **kw).fault())\n"
        "row(); row(spill_loads=8); row(serialised=True); row(shared=232449); row(error='no')\n"
        "row(matrix='mma.sync', meant=('wgmma.mma_async',)); row(loads='TMA', meant=('TMA',))\n"
        "row(loads='TMA', meant=('TMA', 'cp.async')); row(loads='TMA+cp.async', meant=('TMA', 'cp.async'))"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "",
        "spills",
        "serialised",
        "too much shared memory",
        "no",
        "no wgmma.mma_async",
        "",
        "no cp.async",
        "",
    ]
