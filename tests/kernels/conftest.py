"""Where the kernel tests run: on the GPU if there is one, else in Triton's interpreter.

TRITON_INTERPRET=1 chooses the interpreter; it must be set before kernels are defined, so it is set
here, at import, and stays set for the process.  That harms no other test: without a GPU nothing
else runs Triton kernels, and tests that compile them start a process without the variable.
"""

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from tests.interpreter import interpret

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

if not ON_GPU:
    interpret()


with torch.device("cpu"):  # torch remembers now which functions take a device, and not while others stand in for them
    torch.empty(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, or numbers that no index can be: what a kernel leaves out shows."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if out.dtype == torch.bool:
                return out.fill_(True)
            return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of Triton kernels, as they are launched from now on."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    names: list[str] = []

    def noting(run):
        def run_noted(self, *args, **kwargs):
            names.append(self.fn.__name__)
            with _disable_current_modes():  # the interpreter runs ops of PyTorch's
                return run(self, *args, **kwargs)

        return run_noted

    for kind in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(kind, "run", noting(kind.run))
    return names


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def offsets(*counts: int) -> torch.Tensor:
    """i32 inclusive ends of groups of these sizes."""
    return torch.tensor(counts, device=DEVICE).cumsum(0).int()
