"""Each kernel compiles for Hopper on a machine without a GPU, and spills nothing.

All settings and targets: `python -m benchmarks.cross_compile`.
"""

import json
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


ENTRY = {"device": "sm_90", "dtype": "fp16", "rows": 256, "D": 512, "F": 256}


def entry(**more: object) -> str:
    return json.dumps(ENTRY | more) + "\n"


def test_settings_of_a_table_are_compiled(tmp_path: Path) -> None:
    """By descriptors and pointers where it asks for TMA; for its own device; at its widths; one that spills shows."""
    table = tmp_path / "settings.jsonl"
    table.write_text(
        entry(kernel="grouped_gemm_dw", form="rows", setting=[64, 128, 32, 4, 3, 1, 1])
        + entry(kernel="grouped_gemm_dw", form="rows", device="sm_120", setting=[64, 64, 32, 4, 3])
        + entry(kernel="grouped_gemm_dw", form="gathered", dtype="bf16", setting=[128, 256, 64, 4, 3])
    )
    program = (
        "from benchmarks import cross_compile as c\n"
        "c.cases = lambda *_: []\n"  # those of the table alone
        "import sys; sys.argv = ['cross_compile', '--arch', 'sm_80', 'sm_90', '--kernel', 'grouped_gemm_dw']\n"
        "sys.exit(c.main())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "MOE_COMPILE_SETTINGS": str(table)
    }
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = [line for line in result.stdout.splitlines() if line.startswith("grouped_gemm_dw")]
    assert [line[26:76].strip() for line in rows] == [
        "fp16 64x128x32 w4 s3, D=512 F=256, persistent",
        "fp16 64x128x32 w4 s3 TMA, D=512 F=256, persistent",
        "bf16 128x256x64 w4 s3 dy gathered, D=512 F=256",
        "bf16 128x256x64 w4 s3 x gathered, D=512 F=256",
    ], result.stdout + result.stderr
    assert all(" sm_90 " in row for row in rows)
    assert all("spills" in row for row in rows[2:]), result.stdout  # 256 registers of each thread for the sum alone
    assert not any("spills" in row for row in rows[:2]), result.stdout
    assert "not compiled: settings for sm_120, which is no target here" in result.stdout
    assert result.returncode == 1


def test_every_product_has_a_case_for_each_type_and_form() -> None:
    """So that no entry of a table is left out."""
    program = (
        "from benchmarks.cross_compile import cases_of\n"
        "from moe_compile.kernels.settings import Entry, NAMES, Problem\n"
        "forms = {'gated_gemm': ('gated', 'plain'), 'gated_gemm_backward': ('gated', 'plain'),\n"
        "         'grouped_gemm_dw': ('rows', 'gathered')}\n"
        "for kernel in NAMES:\n"
        "    for form in forms.get(kernel, ('d packed', 'f packed')):\n"
        "        for dtype in ('bf16', 'fp16', 'fp32'):\n"
        "            tma = 'TMA' in NAMES[kernel] and dtype != 'fp32'\n"
        "            setting = (64, 64, 32, *([2] if 'PARTS' in NAMES[kernel] else []), 4, 3, *([1, 0] if tma else []))\n"
        "            found = cases_of(Entry(Problem(kernel, form, 'sm_90', dtype, 256, 512, 256), setting), hip=False)\n"
        "            ways = {case.described() for case in found}\n"
        "            print(kernel, form, dtype, len(found), ways == ({False, True} if tma else {False}))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 30
    assert all(line.endswith(" True") for line in lines), result.stdout


def test_refuses_interpreted_kernels() -> None:
    result = cross_compile("--arch", "sm_90", "--kernel", "combine", interpret="1")
    assert result.returncode == 2
    assert "unset TRITON_INTERPRET" in result.stderr


def test_refuses_another_triton() -> None:
    result = cross_compile("--arch", "sm_90", "--kernel", "combine", "--triton", "3.0.0")
    assert result.returncode == 2
    assert "this is triton 3." in result.stderr


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
