"""What the first compilation of a process costs, paid once: ranks.py imports this where ranks are forked from.

Of all that it does, ranks keep what a process does once: modules that torch imports late, tables that it fills, the
C++ kernels, Inductor's probes of this machine's instructions.  Proofs and compiled code are dropped again.
"""

import gc

import torch
from torch._inductor.cpu_vec_isa import pick_vec_isa

from moe_compile import kinds, native
from tests.tiny import D, Net, compiled


def once() -> None:
    torch.set_num_threads(1)  # no thread that a fork would lose
    # The first backward of a process counts its devices, and starts threads for them.  A torch built for CUDA that
    # finds no GPU counts one as soon as it has made a fake tensor: so the first one is here.
    torch.ones(1, requires_grad=True).backward()
    torch.hub.tqdm.monitor_interval = 0
    for dtype in (torch.float32, torch.bfloat16):
        native.library(dtype)
    pick_vec_isa()
    call = compiled(Net(1), "aot_eager", fullgraph=True)
    call(torch.randn(6, D)).sum().backward()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    kinds.forget()
    gc.collect()
    gc.freeze()


# With CUDA, autograd starts threads, and a process that was forked from such a one refuses to run a backward.
if not torch.cuda.is_available():
    once()
