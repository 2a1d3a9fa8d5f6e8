"""Check and time the kernels on a CUDA machine, beside what else there is for experts.

    python -m benchmarks.kernels_gpu [--shapes T,H,I,E,K ...] [--routing balanced zipf one_empty] [--minutes 9]
                                     [--part 1/14] [--since "2026-11-22 10:00:00"] [--layers WAY ...]
                                     [--row-limit-s 150] [--out benchmarks/results] [--page docs/performance.md]

T tokens, H model width, I expert width, E experts, K experts per token; bf16, gated experts: one product H -> 2I, one
I -> H.  Forward 6*T*K*H*I FLOP, forward and backward 18*T*K*H*I.  "forward" are the products alone, with balanced
routing; "layer" is all from tokens to tokens, with each routing and by each way of peers.py.  Times are medians of CUDA
events; what takes more than 300 ms is timed once.

A way that gives wrong numbers is not timed.  Of ours it is red, too, if a second run gives other bits, if the error is
more than 1.1 of that of a loop of torch.mm in the same type, or if a fused layer keeps more for its backward than its
tokens, the products before the activation and the routing.

What matters comes first: layers of all shapes with balanced routing, kernels alone, the other routings, and last the
ways that may take minutes.  --part i/n takes a part of that; --since leaves out what the results have from that time
on, so that a command goes on where another one ended; --layers: no kernels alone, and of the layers only these ways.
Results go into one file for the machine, after each row (records.py).  A way that takes longer than the limit of a row
is left out, as red; one that hangs ends the process, and is.  What does not fit into the minutes is left out, and said
to be.  Exit status: 3 if something was left out, else 1 if one of ours is red.

--dry runs the same on a CPU, once, on a tiny shape in f32, with Triton's interpreter: it times nothing, and writes
nothing unless --out is given.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import gpu_page, records, timing
from benchmarks.gpu_rows import Limits, NoTime, Rows
from benchmarks.peers import ROUTINGS
from benchmarks.peers import ways as layer_ways
from benchmarks.timing import Machine, first_line

SHAPES = [
    "8192,2048,768,128,8", "32768,2048,768,128,8", "8192,4096,14336,8,2", "40960,768,256,128,8",
    "24576,1536,256,128,8", "32768,4096,512,128,8", "32768,4096,1024,128,8",
    "32768,4096,2048,64,4", "32768,2048,512,512,10", "256,2048,768,128,8",
]  # fmt: skip
DRY = ["12,32,16,4,2"]


class Job(NamedTuple):
    """A part of the rows of a shape and a routing."""

    what: str  # "layers", "kernels", or "last layers"
    routing: str
    shape: str


def jobs(shapes: list[str], routings: list[str], only: list[str] | None = None) -> list[Job]:
    """All there is to do, what matters most first; with names of ways, the layers by those alone."""
    rounds = [("layers", routing) for routing in routings]
    if not only:
        rounds = [*rounds[:1], ("kernels", routings[0]), *rounds[1:], *(("last layers", r) for r in routings)]
    return [Job(what, routing, shape) for what, routing in rounds for shape in shapes]


def measured(todo: list[Job], machine: Machine, limits: Limits, only: list[str] | None = None) -> Iterator[dict]:
    """The rows of the jobs; after the time `limits.stop`, a row for each that says what is left out."""
    for job in todo:
        try:
            if time.monotonic() >= limits.stop:
                raise NoTime
            of_shape = Rows(job.shape, job.routing, machine, limits)
            if job.what == "kernels":
                yield from of_shape.kernels()
            else:
                yield from of_shape.layers(only, None if only else job.what == "last layers")
        except NoTime:
            left_out = {"no_time": True, "skipped": "left out: no time"}
            yield {"shape": job.shape, "routing": job.routing, "what": job.what, "way": ""} | left_out
        except Exception as error:  # operands that do not fit, say: nothing of ours was measured, which is red
            way, red = "moe_compile, beside any row", first_line(error)
            yield {"shape": job.shape, "routing": job.routing, "what": job.what, "way": way, "red": red}
        torch._dynamo.reset()  # and the memory of what it compiled
        if machine.device == "cuda":
            torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=None, metavar="T,H,I,E,K")
    parser.add_argument("--routing", nargs="+", default=list(ROUTINGS), choices=ROUTINGS)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--row-limit-s", type=float, default=150.0)
    parser.add_argument("--part", default="1/1", metavar="i/n")
    parser.add_argument("--since", default=None, metavar="DATE")
    parser.add_argument("--layers", nargs="+", default=None, metavar="WAY")
    parser.add_argument("--dry", action="store_true", help="on a CPU, once, without times")
    parser.add_argument("--out", type=Path, default=None, help="benchmarks/results, but for a dry run")
    parser.add_argument("--page", type=Path, default=None, help="a page with a place for the table")
    options = parser.parse_args()
    stop = time.monotonic() + 60 * options.minutes
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined
        os.environ["LIGER_FUSED_MOE_AUTOTUNE"] = "0"  # to choose one of several settings, Triton asks for a driver
    elif not torch.cuda.is_available():
        print("kernels_gpu needs a CUDA machine; torch sees none", file=sys.stderr)
        return 2
    machine = Machine("cpu", torch.float32, "aot_eager") if options.dry else Machine()
    known = layer_ways(torch.zeros(1, 1, dtype=torch.int64), 1, machine.backend)
    if unknown := [way for way in options.layers or [] if way not in known]:
        parser.error(f"no ways: {', '.join(unknown)}; there are {'; '.join(known)}")
    shapes = options.shapes or (DRY if options.dry else SHAPES)
    try:
        todo = records.part_of(jobs(shapes, options.routing, options.layers), options.part)
    except ValueError as error:
        parser.error(str(error))
    name, ceiling = ("dry run", 0.0) if options.dry else (torch.cuda.get_device_name(), timing.dense_tflops())
    out = options.out or (None if options.dry else Path("benchmarks/results"))
    record = records.Record(out, name, "kernels_gpu")
    print(", ".join([name, *(f"{package} {version}" for package, version in records.versions().items())]))
    print(f"dense 8192^3 bf16: {ceiling:.0f} TFLOP/s; percentages are of that")

    def keep(row: dict) -> None:
        if not row.get("no_time"):
            record.add(row | {"dense_tflops": ceiling})
        print(gpu_page.line(row, ceiling), flush=True)

    done = functools.partial(record.has, options.since)
    left_out = False
    for row in measured(todo, machine, Limits(stop, options.row_limit_s, done, keep), options.layers):
        keep(row)
        left_out = left_out or bool(row.get("no_time"))
        if row.get("red") and (why := timing.lost(machine.device)):
            print(f"the device runs nothing more in this process: {why}; run it again with --since")
            return records.LEFT_OUT
    if options.page is not None:
        gpu_page.write(options.page, name, record.rows())
    return records.LEFT_OUT if left_out else records.RED if record.red() else 0


if __name__ == "__main__":
    sys.exit(main())
