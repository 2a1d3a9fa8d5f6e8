"""What GPUs can do: data sheets, and two shares of them that are assumed.

A rate that products reach is `cost.RATE` over an H100's peak, for every GPU: published kernels, none of them measured
by this project.  Links reach `LINK` of what their data sheet says: assumed.
"""

from dataclasses import dataclass, replace

from moe_compile import cost
from moe_compile.errors import MoeCompileError
from moe_compile.parallel.costs import MACHINES, Machine


@dataclass(frozen=True)
class Gpu:
    """Data sheet of one GPU and of the machines that it is sold in.  GB is 10^9 bytes.

    tflops: dense products of 16-bit numbers.  within: GB/s one way to the GPUs of its node.  between: GB/s of its share
    of the node's network ports.
    """

    name: str
    tflops: float
    memory_gb: float
    memory_gb_s: float
    within: float
    between: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("v100-16gb", 125.0, 16.0, 900.0, 50.0, 4.2),  # Summit: NVLink 2 to two neighbours, 25 GB/s for six GPUs
        Gpu("a100-40gb", 312.0, 40.0, 1555.0, 300.0, 25.0),  # NVLink 3; DGX A100: eight ports of 200 Gbit/s
        Gpu("a100", 312.0, 80.0, 2039.0, 300.0, 25.0),
        Gpu("h100", 989.0, 80.0, 3350.0, 450.0, 50.0),  # NVLink 4; DGX H100: eight ports of 400 Gbit/s
        Gpu("h200", 989.0, 141.0, 4800.0, 450.0, 50.0),
        Gpu("b200", 2250.0, 180.0, 8000.0, 900.0, 50.0),  # NVLink 5; DGX B200
    )
}

RATE = cost.RATE["triton"] / GPUS["h100"].tflops  # of the peak, by products
MEMORY = cost.BANDWIDTH / GPUS["h200"].memory_gb_s  # of the data sheet, by what is bound by memory
LINK = 0.8  # of the data sheet, by large messages: assumed
USABLE = 0.9  # of the memory: the rest is the driver's, the libraries', and lost between allocations; assumed
HOP_US = 5.0  # from node to node, in a ring of nodes: assumed


def machine(gpu: Gpu) -> Machine:
    """The GPU for the cost model of the strategies."""
    return replace(
        MACHINES["cuda"], within=LINK * gpu.within, between=LINK * gpu.between, gflops=1e3 * RATE * gpu.tflops,
        memory=MEMORY * gpu.memory_gb_s,
    )  # fmt: skip


def find(name: str) -> Gpu:
    """A GPU by its name; `MoeCompileError` if it is not known."""
    if name not in GPUS:
        raise MoeCompileError(f"no GPU {name!r}; known: {', '.join(GPUS)}")
    return GPUS[name]
