"""All tests and benchmarks of a GPU, in parts of under ten minutes each, whatever is red on the way.

    python -m benchmarks.gpu tests [--part 1/3]     pytest of tests/kernels, a part of its files
    python -m benchmarks.gpu all [--skip tune]      every part, one after the other; a part that left something out is
                                                    run again, and goes on (of tests, what was compiled is kept)
    python -m benchmarks.gpu summary [--page docs/performance.md]

Parts are processes of their own; what each finds is in the file of the machine (records.py).  Exit status: 1 if a test
failed or a row of ours is red in what these commands found, 3 if something was left out, else 0.  `summary` judges all
that the file has.  With --dry, on a CPU, tiny, and of the tests the smallest file.
"""

import argparse
import importlib.util
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

from benchmarks import gpu_page, records
from benchmarks.records import LEFT_OUT, RED, Record, Row, is_ours

TESTS, KERNELS = 3, 14  # parts
MODELS = ("mixtral", "qwen3_moe", "deepseek_v3")
PART_S, TEST_S = 590, 540  # a part is stopped then, and pytest of a part; other commands end by their own clocks
GRACE_S, STOPPED = 20, -99
AGAIN = 4  # runs of a part that leaves something out
ROOT = Path(__file__).resolve().parent.parent
Run = Callable[[list[str], float], int]


def test_files(part: str, dry: bool = False) -> list[Path]:
    """The files of a part; every n-th one, since neighbours are of one size."""
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    if dry:
        return [ROOT / "tests" / "kernels" / "test_bias_gradient.py"]
    i, n = map(int, part.split("/"))
    records.part_of(files, part)  # is it one?
    return files[i - 1 :: n]


def run(command: list[str], seconds: float) -> int:
    """A process with all of its output here; STOPPED if it had to be stopped: first as a person would, by Ctrl-C."""
    print(f"$ {' '.join(command[1:])}", flush=True)
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        print(f"stopped after {seconds:.0f} s: {' '.join(command[1:])}")
        return STOPPED


def tests(part: str, record: Record, dry: bool = False, run: Run = run, seconds: float = TEST_S) -> int:
    """Run them; a row for each file, red with the names of what failed."""
    files, several = test_files(part, dry), importlib.util.find_spec("xdist") is not None and not dry
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *(str(file.relative_to(ROOT)) for file in files), "-q", "-ra"]
        command += ["-n", "8", "--dist", "loadfile"] if several else []
        began = time.monotonic()
        status = run([*command, f"--junitxml={report}"], seconds)
        found = of_report(report.read_text()) if report.exists() else {}
    for file in files:
        row: Row = {"shape": file.stem, "what": "tests", "way": "moe_compile"}
        row |= found.get(file.stem) or {"red": f"no result: pytest ended with {status}"}
        if status == STOPPED and not row.get("failures"):  # how many more there are is not known
            row["red"] = f"stopped after {time.monotonic() - began:.0f} s"
        record.add(row)
    return LEFT_OUT if status == STOPPED else RED if status or record.red() else 0


def of_report(text: str) -> dict[str, Row]:
    """Counts and failures for each file, from what pytest wrote as JUnit's XML."""
    found: dict[str, Row] = {}
    for case in ElementTree.fromstring(text).iter("testcase"):
        stem = next((name for name in case.get("classname", "").split(".") if name.startswith("test_")), "")
        row = found.setdefault(stem, {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "failures": []})
        row["seconds"] = round(row["seconds"] + float(case.get("time", 0)), 1)
        if case.find("failure") is not None or case.find("error") is not None:
            row["failed"] += 1
            row["failures"].append(case.get("name", ""))
        else:
            row["skipped" if case.find("skipped") is not None else "passed"] += 1
    for row in found.values():
        row["red"] = f"failed: {', '.join(row['failures'])}" if row["failures"] else None
    return found


def parts(skip: list[str], since: str, dry: bool, out: Path | None = None) -> list[list[str]]:
    """The commands of everything, the tests first."""
    python, more = [sys.executable, "-m"], ["--dry"] * dry + (["--out", str(out)] if out else [])
    found = {
        "tests": [["benchmarks.gpu", "tests", "--part", f"{i}/{TESTS}", *more] for i in range(1, TESTS + 1)],
        "kernels": [
            ["benchmarks.kernels_gpu", "--part", f"{i}/{KERNELS}", "--since", since, *more]
            for i in range(1, KERNELS + 1)
        ],
        "slices": [["benchmarks.slices", "--model", model, "--since", since, *more] for model in MODELS],
        "tune": [["benchmarks.tune"]] * (not dry),
    }
    return [[*python, *command] for name, commands in found.items() if name not in skip for command in commands]


def all_parts(commands: list[list[str]], run: Run = run) -> dict[str, int]:
    """The last exit status of each command."""
    found: dict[str, int] = {}
    for command in commands:
        for _ in range(AGAIN):
            status = run(command, PART_S)
            found[" ".join(command[2:])] = LEFT_OUT if status == STOPPED else status
            if status not in (LEFT_OUT, STOPPED):
                break
    return found


def verdict(rows: list[Row], statuses: dict[str, int]) -> tuple[int, str]:
    """(exit status, what to say) of rows and of what commands ended with."""
    red = [row for row in rows if row.get("red") and is_ours(row["way"])]
    lines = [f"RED {' '.join(str(row[name]) for name in records.KEY if row[name])}: {row['red']}" for row in red]
    lines += [f"exit status {status}: {command}" for command, status in statuses.items() if status not in (0, LEFT_OUT)]
    left = [command for command, status in statuses.items() if status == LEFT_OUT]
    lines += [f"left something out: {command}" for command in left]
    measured = sum(1 for row in rows if row.get("time_us") or row.get("step_ms"))
    lines.append(f"{gpu_page.of_tests(rows)} {measured} rows timed, {len(red)} of ours red.".strip())
    failed = red or any(status not in (0, LEFT_OUT) for status in statuses.values())
    return RED if failed else LEFT_OUT if left else 0, "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tests", "all", "summary"])
    parser.add_argument("--part", default="1/1", metavar="i/n", help="of the tests' files")
    parser.add_argument("--skip", nargs="*", default=[], choices=["tests", "kernels", "slices", "tune"])
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="benchmarks/results, but for a dry run")
    parser.add_argument("--page", type=Path, default=None, help="a page with a place for the tables")
    options = parser.parse_args()
    name = "dry run"
    if not options.dry:
        import torch

        if not torch.cuda.is_available():
            print("this needs a CUDA machine; torch sees none", file=sys.stderr)
            return 2
        name = torch.cuda.get_device_name()
    record = Record(options.out or (None if options.dry else ROOT / "benchmarks" / "results"), name, "tests")
    if options.what == "tests":
        try:
            return tests(options.part, record, options.dry)
        except ValueError as error:
            parser.error(str(error))
    began, statuses = time.strftime(records.DATE), {}
    if options.what == "all":
        statuses = all_parts(parts(options.skip, began, options.dry, options.out))
    rows = [row for row in record.rows() if options.what == "summary" or row["date"] >= began]
    status, text = verdict(rows, statuses)
    print(text)
    if options.page is not None:
        gpu_page.write(options.page, name, record.rows())
    return status


if __name__ == "__main__":
    sys.exit(main())
