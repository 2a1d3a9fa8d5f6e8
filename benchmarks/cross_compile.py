"""Compile every kernel at every setting for several GPUs, on a machine that needs none of them.

    python -m benchmarks.cross_compile [--arch sm_80 sm_90 sm_100 gfx942] [--kernel NAME] [--first] [--triton VERSION]

Prints registers, shared memory, spills, the matrix instruction of each and how it loads its operands.  Exits with 1 if
one spills, asks for more shared memory than a block may have, is serialised by ptxas (a C75xx warning), fails to
compile, has no asynchronous load of an operand in a pipelined product (more than one stage; by TMA, if the operand has
a descriptor), or multiplies 16-bit tiles of 64 rows or more on Hopper by anything but wgmma.  The cases come from
`compile_cases()` of each kernel module; without --first, also from the tables of settings (kernels/settings.jsonl and
MOE_COMPILE_SETTINGS): the forms of each entry's product, at its widths and setting, for its device.
"""

import argparse
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from moe_compile.kernels import settings
from moe_compile.kernels.settings import Entry

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What one block may have, in bytes (CUDA programming guide, compute capabilities; CDNA3 LDS).
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TMA_LOAD, COPY = "cp.async.bulk.tensor", "cp.async.cg"
MATRIX = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma")


class Case(NamedTuple):
    """One entry of `compile_cases()`."""

    setting: str
    kernel: JITFunction
    args: dict[str, str | tuple[str, ...]]  # name -> type, or those of a tuple; the other parameters are constants
    constants: dict[str, object]
    num_warps: int
    num_stages: int

    def pipelined(self) -> bool:
        return self.num_stages > 1

    def by_wgmma(self) -> bool:
        """Whether a product is one for a warp group: of 16-bit tiles with 64 rows or more."""
        rows = self.constants.get("BLOCK_M", 0)
        narrow = any(
            str(kind).startswith(("*bf16", "*fp16", "tensordesc<bf16", "tensordesc<fp16"))
            for kind in self.args.values()
        )
        return narrow and isinstance(rows, int) and rows >= 64 and self.num_warps >= 4

    def why_not(self, arch: str) -> str | None:
        """Why a target cannot run it: only Hopper and later read descriptors, and sm_80 widens no e4m3."""
        if self.described() and arch not in ("sm_90", "sm_100"):
            return "a tensor descriptor"
        return "e4m3" if arch == "sm_80" and "*fp8e4nv" in self.args.values() else None

    def described(self) -> bool:
        """Whether an argument is a tensor descriptor, which Hopper and later can read."""
        return any(str(kind).startswith("tensordesc") for kind in self.args.values())

    def form(self) -> str:
        """The form that an entry of a table of settings has for this case (settings.choose)."""
        if "GATED" in self.constants:
            return "gated" if self.constants["GATED"] else "plain"
        if "X_K" in self.constants:
            return "gathered" if self.constants["DY_K"] or self.constants["X_K"] else "rows"
        return "d packed" if self.constants["STRIDE_D"] == 1 else "f packed"

    def asynchronous(self) -> list[str]:
        """How a pipelined product should load: rows by pointers too, unless all have descriptors."""
        rows = [str(kind) for name, kind in self.args.items() if name in ("x_ptr", "dy_ptr", "dout_ptr")]
        by_pointers = not self.described() or any(kind.startswith("*") for kind in rows)
        return ["TMA"] * self.described() + ["cp.async"] * by_pointers


@dataclass(frozen=True)
class Row:
    """One kernel, compiled; registers per thread, bytes of the rest."""

    kernel: str
    setting: str
    arch: str
    registers: int = 0
    shared: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    matrix: str = "-"
    loads: str = "-"
    serialised: bool = False
    meant: tuple[str, ...] = ()  # instructions that it should have
    error: str = ""

    def fault(self) -> str:
        if self.error:
            return self.error
        if self.spill_stores or self.spill_loads:
            return "spills"
        if self.serialised:
            return "serialised"
        for instruction in self.meant:
            if instruction not in (self.matrix, *self.loads.split("+")):
                return f"no {instruction}"
        return "too much shared memory" if self.shared > SHARED_LIMIT[self.arch] else ""

    def __str__(self) -> str:
        return (
            f"{self.kernel:<26}{self.setting:<50}{self.arch:<8}{self.registers:>5}{self.shared:>8}"
            f"{self.spill_stores:>7}/{self.spill_loads:<6}{self.matrix:<18}{self.loads:<14}{self.fault()}"
        )


HEADER = (
    f"{'kernel':<26}{'setting':<50}{'target':<8}{'regs':>5}{'shared':>8}{'spills st/ld':>14}"
    f"{'matrix op':<18}{'loads':<14}fault"
)


def compile_case(case: Case, arch: str) -> Row:
    kernel = case.kernel
    name = kernel.__name__.strip("_").removesuffix("_kernel")
    signature = {n: case.args.get(n, "constexpr") for n in kernel.arg_names}
    # Tensors come from PyTorch's allocator, so every pointer is a multiple of 16.
    pointers = [i for i, n in enumerate(kernel.arg_names) if str(signature[n]).startswith("*")]
    attrs = {(i,): [["tt.divisibility", 16]] for i in pointers}
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    source = ASTSource(kernel, signature, case.constants, attrs)
    try:
        compiled = triton.compile(source, target=TARGETS[arch], options=options)
    except Exception as error:  # whatever a compiler can say, it belongs in the table
        return Row(name, case.setting, arch, error=f"{type(error).__name__}: {error}"[:200])
    measure = _measure_amd if TARGETS[arch].backend == "hip" else _measure_nvidia
    found = measure(compiled, arch)
    text = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    matrix = next((m for m in MATRIX if m in text), "-")
    loads = "+".join(["TMA"] * (TMA_LOAD in text) + ["cp.async"] * (COPY in text)) or "-"
    meant = ["wgmma.mma_async"] if arch == "sm_90" and matrix != "-" and case.by_wgmma() else []
    if TARGETS[arch].backend == "cuda" and matrix != "-" and case.pipelined():
        meant += case.asynchronous()
    shared = compiled.metadata.shared
    return Row(name, case.setting, arch, shared=shared, matrix=matrix, loads=loads, meant=tuple(meant), **found)


def _measure_nvidia(compiled, arch: str) -> dict:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    newer = folder / "ptxas-blackwell"
    ptxas = newer if arch == "sm_100" and newer.exists() else folder / "ptxas"
    exact = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"])
    with tempfile.TemporaryDirectory() as scratch:
        ptx = Path(scratch) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        cubin = str(ptx.with_suffix(".cubin"))
        command = [str(ptxas), "-v", f"--gpu-name={exact[1] if exact else arch}", str(ptx)]
        result = subprocess.run([*command, "-o", cubin], capture_output=True, text=True)
    log = result.stdout + result.stderr
    if result.returncode:
        return {"error": f"ptxas: {log.strip()[:200]}"}
    return {
        "registers": _number(r"Used (\d+) registers", log),
        "spill_stores": _number(r"(\d+) bytes spill stores", log),
        "spill_loads": _number(r"(\d+) bytes spill loads", log),
        "serialised": re.search(r"C75\d\d", log) is not None,
    }


def _measure_amd(compiled, arch: str) -> dict:
    text = compiled.asm["amdgcn"]
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
        "spill_stores": _number(r"\.vgpr_spill_count:\s+(\d+)", text),
        "spill_loads": _number(r"\.sgpr_spill_count:\s+(\d+)", text),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's log has no {pattern!r}")
    return int(found[1])


def cases(hip: bool, only: str | None = None, first: bool = False) -> list[Case]:
    """All cases of the modules in kernels/ (of one of them); or only the first of each kernel."""
    found: dict[tuple, Case] = {}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        module = importlib.import_module(f"moe_compile.kernels.{path.stem}")
        if only in (None, path.stem) and hasattr(module, "compile_cases"):
            for case in map(Case._make, module.compile_cases(hip=hip)):
                name = case.kernel.__name__
                found.setdefault((name,) if first else (name, case.setting), case)
    return list(found.values())


def entries(only: str | None = None) -> list[Entry]:
    """All entries of the tables of settings, of one kernel or of all."""
    paths = [Path(path) for path in (os.environ.get(settings.VARIABLE), settings.TABLE) if path]
    return [entry for path in paths for entry in settings.read(path) if only in (None, entry.problem.kernel)]


def cases_of(entry: Entry, hip: bool) -> list[Case]:
    """What this entry can launch: by descriptors if it asks for TMA, and by pointers, which tensors may need."""
    problem, own = entry.problem, len([n for n in settings.NAMES[entry.problem.kernel] if n not in settings.ASKED])
    tma, programs = (*entry.setting[own:], 0, 0)[:2]
    module = importlib.import_module(f"moe_compile.kernels.{problem.kernel}")
    found: dict[str, Case] = {}
    for case in map(Case._make, module.compile_cases(hip, problem.D, problem.F, entry.setting[:own])):
        if case.setting.split()[0] != problem.dtype or case.form() != problem.form:
            continue
        if case.described() > bool(tma):
            continue
        constants = case.constants | ({"PERSISTENT": programs > 0} if "PERSISTENT" in case.constants else {})
        name = f"{case.setting.replace(' persistent', '').rstrip(',')}, D={problem.D} F={problem.F}"
        name += ", persistent" if programs else ""
        found.setdefault(name, case._replace(setting=name, constants=constants))
    return list(found.values())


def compile_target(arch: str, only: str | None, first: bool, table: list[Entry]) -> list[Row]:
    """All that is asked of one target, each printed at once."""
    hip, rows = TARGETS[arch].backend == "hip", []
    todo = cases(hip, only, first)
    for entry in table:
        if entry.problem.device == arch:
            of_entry = cases_of(entry, hip)
            todo += of_entry
            if not of_entry:
                name = f"{entry.problem.dtype} {list(entry.setting)}"
                rows.append(Row(entry.problem.kernel, name, arch, error=f"no case is {entry.problem.form!r}"))
                print(rows[-1], flush=True)
    for case in todo:
        if not case.why_not(arch):
            rows.append(compile_case(case, arch))
            print(rows[-1], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernel", help="a module of kernels/, all of them if left out")
    parser.add_argument("--first", action="store_true", help="one setting of each kernel")
    parser.add_argument("--triton", help="the version that this should be, else exit with 2")
    options = parser.parse_args()
    if options.triton not in (None, triton.__version__):
        parser.error(f"this is triton {triton.__version__}, at {triton.__file__}")
    print(f"triton {triton.__version__}")
    print(HEADER, flush=True)  # before the forks
    if not all(isinstance(case.kernel, JITFunction) for case in cases(False, options.kernel, True)):
        parser.error("unset TRITON_INTERPRET")
    rows: list[Row] = []
    table = [] if options.first else entries(options.kernel)
    for arch in options.arch:  # each in a process of its own: Triton 3.6 keeps the first target's casts of float8
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
            rows += process.submit(compile_target, arch, options.kernel, options.first, table).result()
    for device in sorted({entry.problem.device for entry in table} - set(TARGETS)):
        print(f"not compiled: settings for {device}, which is no target here")
    faults = sum(bool(row.fault()) for row in rows)
    print(f"{len(rows)} compiled, {faults} at fault")
    return 1 if faults or not rows else 0


if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="cross_compile_"))
    sys.exit(main())
