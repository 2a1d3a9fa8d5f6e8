"""The C++ kernels: compiled for this machine once, by Inductor's own compiler and cache, beside the first capture.

One library for each type of number, the same functions in each: nobody waits for a type that is not used.
"""

import ctypes
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)
_TEXTS = "vectors.h", "routing.cpp", "grouped_gemm.cpp", "gate.cpp"
SOURCES = tuple(Path(__file__).parent / "kernels" / name for name in _TEXTS)
# what the text is told of the type (kernels/vectors.h)
NUMBERS = {torch.float32: "", torch.bfloat16: "#define BFLOAT16\n", torch.float16: "#define FLOAT16\n"}
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_FORM = _INT, ctypes.c_float, ctypes.c_float, ctypes.c_float  # what an activation is
_ARGUMENTS = {
    "sort_by_expert": (_POINTER, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _INT),
    "invert": (_POINTER, _LONG, _POINTER),
    "gather": (_POINTER, _LONG, _POINTER, _LONG, _POINTER, _LONG, _INT),
    "combine": (_POINTER, _LONG, _POINTER, _INT, _POINTER, _POINTER, _LONG, _POINTER, _LONG, _LONG, _INT),
    "combine_backward": (
        *(_POINTER, _POINTER, _LONG, _POINTER, _INT, _POINTER, _POINTER, _LONG),
        *(_POINTER, _POINTER, _LONG, _LONG, _INT),
    ),
    "grouped_gemm": (
        *(_POINTER, _LONG, _POINTER, _LONG, _INT, _POINTER, _LONG),
        *(_POINTER, _LONG, _LONG, _LONG, _LONG, _INT, _INT),
    ),
    "grouped_gemm_dw": (_POINTER, _LONG, _POINTER, _LONG, _POINTER, _LONG, _POINTER, _LONG, _LONG, _INT),
    "gate": (*_FORM, _POINTER, _LONG, _LONG, _INT, _POINTER, _LONG, _LONG, _INT),
    "gate_backward": (*_FORM, _POINTER, _LONG, _LONG, _INT, *[_POINTER] * 5, _LONG, _LONG, _INT),
    "spread": (_POINTER, _POINTER, _LONG, _POINTER, _LONG, _LONG, _INT),
    "bias_gradient": (_POINTER, _POINTER, _POINTER, _LONG, _POINTER, _LONG, _INT),
    "add_bias_dots": (_POINTER, _POINTER, _POINTER, _LONG, _POINTER, _LONG, _INT),
}


@functools.cache
def prepare(dtype: torch.dtype) -> Callable[[], ctypes.CDLL]:
    """Begin to compile, in the background.  The function returned waits for the library, or raises."""
    start = ThreadPoolExecutor(1, thread_name_prefix="moe_compile")
    task = start.submit(_load, dtype)
    start.shutdown(wait=False)
    return task.result


def _load(dtype: torch.dtype) -> ctypes.CDLL:
    from torch._inductor.codecache import CppCodeCache

    text = NUMBERS[dtype] + "\n".join(s.read_text() for s in SOURCES)
    # The order of a sum is the source's; one rounding for a product and its sum is what makes it fast.
    return CppCodeCache.load(text, extra_flags=("-ffp-contract=fast",))


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for numbers of this type, or None on a machine that cannot compile them: said once, as a warning."""
    try:
        try:
            loaded = prepare(dtype)()
        except OSError:  # Inductor's folder was another one when that began, and is gone
            loaded = _load(dtype)
    except Exception as error:  # a compiler, a file system or a loader may fail in many ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        log.warning("no C++ kernels, experts run one %s product after another on the CPU: %s", dtype, reason)
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded


def why_not(*values: Tensor) -> str | None:
    """Return why these operands of a product cannot go to the kernels, or None."""
    dtypes = {v.dtype for v in values}
    if len(dtypes) > 1 or not dtypes <= NUMBERS.keys():
        return f"no C++ product of {' and '.join(sorted(map(str, dtypes)))}"
    return None if library(values[0].dtype) is not None else "this machine has no C++ compiler"


def layout(weights: Sequence[Tensor]) -> tuple[bool, int] | None:
    """(stored transposed, row stride) of all experts' matrices, or None if they cannot be read in place.

    `weights` as for `grouped_gemm`: one stack or separate matrices.
    """
    strides = {w.stride()[-2:] for w in weights}
    if len(strides) != 1:
        return None
    ((rows, columns),) = strides
    if columns == 1:
        return False, rows
    if rows == 1:
        return True, columns
    return None


def addresses(weights: Sequence[Tensor]) -> Iterable[int]:
    """Where each expert's matrix begins."""
    if weights[0].dim() == 2:
        return [w.data_ptr() for w in weights]
    first, step = weights[0].data_ptr(), weights[0].stride(0) * weights[0].element_size()
    return range(first, first + step * weights[0].shape[0], step) if step else [first] * weights[0].shape[0]
