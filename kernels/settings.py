"""How the grouped products are launched: by a table of what was measured, or else by each kernel's own guess.

An entry is one line of settings.jsonl, written by `python -m benchmarks.tune` on the device it names:

    {"kernel": "gated_gemm", "form": "gated", "device": "sm_90", "dtype": "bf16", "rows": 512, "D": 2048, "F": 768,
     "setting": [128, 64, 64, 8, 3]}

rows are those of an expert, on average; D and F the inner and outer width of the product.  An entry counts for the same
kernel, form, device, dtype and widths, and for rows from half to twice its own; the nearest one is taken.  Settings
change times, never numbers' meaning: sums may be rounded in another order.

MOE_COMPILE_SETTINGS names a file of the same form that goes before the table; `pinned` goes before both.  Where there
is no device to ask what it is, as when graphs for a GPU are compiled elsewhere, no entry counts.
"""

import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe_compile.errors import MoeCompileError

Setting = tuple[int, ...]
TABLE = Path(__file__).parent / "settings.jsonl"
VARIABLE = "MOE_COMPILE_SETTINGS"
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
ASKED = ("TMA", "PROGRAMS")
NAMES = {
    "grouped_gemm": (*TILE, *ASKED),
    "grouped_gemm_scaled": TILE,
    "grouped_gemm_dw": (*TILE, *ASKED),
    "gated_gemm": ("BLOCK_M", "BLOCK_F", "BLOCK_K", "num_warps", "num_stages", *ASKED),
    "gated_gemm_backward": ("BLOCK_M", "BLOCK_F", "BLOCK_K", "PARTS", "num_warps", "num_stages", *ASKED),
}
"""What the numbers of a setting are, kernel by kernel.  TMA: 1 if tiles of weights, or of rows that a weight's gradient
does not gather, come by tensor descriptors, where the device and the tensors allow it (weights.py); 0, or left out, if
by pointers.  PROGRAMS: how many for each multiprocessor, each of which computes tiles until none is left; 0, or left
out, for one a tile."""

_pinned: Mapping[tuple[str, str], Setting] = {}  # never changed in place; of the process: backwards have threads


@dataclass(frozen=True)
class Problem:
    """One product that a kernel is asked for."""

    kernel: str
    form: str
    device: str
    dtype: str
    rows: int
    D: int
    F: int


@dataclass(frozen=True)
class Entry:
    """A setting that was the fastest for a problem."""

    problem: Problem
    setting: Setting

    def line(self) -> str:
        """The entry as a line of the table."""
        return json.dumps({**asdict(self.problem), "setting": self.setting})


def choose(
    kernel: str, form: str, device: torch.device, dtype: torch.dtype, rows: int, D: int, F: int, *, seed: Setting
) -> Setting:
    """The setting for a product: a pin, an entry of a table, or else the kernel's own guess, `seed`.

    Raises `MoeCompileError` if a table cannot be read.
    """
    if (kernel, form) in _pinned:
        return _pinned[kernel, form]
    tables = [read(path) for path in _paths()]
    if not any(tables):
        return seed
    problem = Problem(kernel, form, device_name(device), DTYPES.get(dtype, str(dtype)), rows, D, F)
    for table in tables:
        if (entry := _nearest(table, problem)) is not None:
            return entry.setting
    return seed


@contextmanager
def pinned(kernel: str, form: str, setting: Setting) -> Iterator[None]:
    """Launch this form of a kernel by this setting only, in all threads; for measurements."""
    global _pinned
    before = _pinned
    _pinned = {**before, (kernel, form): checked(kernel, setting)}
    try:
        yield
    finally:
        _pinned = before


def device_name(device: torch.device) -> str:
    """The kind of device that an entry names: "sm_90", "gfx942"; "cpu" for the interpreter, "cuda" if there is none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def read(path: Path | str) -> tuple[Entry, ...]:
    """The entries of a table.  Raises `MoeCompileError` naming the file and the line, for what is not one."""
    try:
        changed = os.stat(path).st_mtime_ns
    except OSError as error:
        raise MoeCompileError(f"settings of kernels: {path}: {error.strerror}; {VARIABLE} names it") from error
    return _read(path, changed)


@functools.cache
def _read(path: Path | str, changed: int) -> tuple[Entry, ...]:
    entries = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            if line.strip():
                found: dict[str, Any] = json.loads(line)
                setting = checked(found["kernel"], tuple(found.pop("setting")))
                entries.append(Entry(Problem(**found), setting))
        except (ValueError, TypeError, KeyError, AttributeError, MoeCompileError) as error:
            raise MoeCompileError(f"settings of kernels: {path}:{number}: {error}") from error
    return tuple(entries)


def checked(kernel: str, setting: Setting) -> Setting:
    """The setting, if it is one for this kernel; else `MoeCompileError`."""
    if kernel not in NAMES:
        raise MoeCompileError(f"unknown kernel {kernel!r}; there are settings for {', '.join(NAMES)}")
    names = [name for name in NAMES[kernel] if name not in ASKED]
    rest = setting[len(names) :]
    if len(setting) < len(names) or any(not isinstance(n, int) or n < 1 for n in setting[: len(names)]):
        raise MoeCompileError(f"setting {list(setting)} of {kernel}: expected {', '.join(names)}, each at least 1")
    if len(rest) > len(NAMES[kernel]) - len(names) or any(n not in (0, 1) for n in rest[:1]):
        raise MoeCompileError(f"setting {list(setting)} of {kernel}: TMA is {list(rest)}, expected 0 or 1")
    if any(not isinstance(n, int) or not 0 <= n <= 8 for n in rest[1:]):
        raise MoeCompileError(f"setting {list(setting)} of {kernel}: PROGRAMS is {rest[1]}, expected 0 to 8")
    for name, value in zip(names, setting, strict=False):
        if name != "num_stages" and value & (value - 1):
            raise MoeCompileError(f"setting {list(setting)} of {kernel}: {name} is {value}, no power of two")
        if name.startswith("BLOCK") and value < 16:
            raise MoeCompileError(f"setting {list(setting)} of {kernel}: {name} is {value}, less than 16")
    return setting


def table_texts() -> tuple[str, ...]:
    """The text of all tables, for the keys of compilers' caches: compiled code holds its settings.

    Raises `MoeCompileError` if a table cannot be read.
    """
    for path in _paths():
        read(path)
    return tuple(Path(path).read_text() for path in _paths())


def _paths() -> list[Path | str]:
    """The user's table, if there is one, and ours."""
    return [path for path in (os.environ.get(VARIABLE), TABLE) if path]


def _nearest(table: tuple[Entry, ...], problem: Problem) -> Entry | None:
    def key(p: Problem) -> tuple[str, str, str, str, int, int]:
        return p.kernel, p.form, p.device, p.dtype, p.D, p.F

    def far(entry: Entry) -> float:
        return abs(math.log2(max(entry.problem.rows, 1) / max(problem.rows, 1)))

    near = [entry for entry in table if key(entry.problem) == key(problem) and far(entry) <= 1]
    return min(near, key=far, default=None)
