"""MKL's batched product for groups of unlike sizes, as PyTorch's CPU builds carry it.

One call computes C_g = op(A_g) @ op(B_g) for all groups g; threads take whole groups, where a loop of products joins
and splits all threads for every expert.  PyTorch exposes the batched product for equal sizes only, so the symbol is
called by its C interface (Intel oneAPI MKL reference, `cblas_?gemm_batch`).  A build without MKL says so by `why_not`.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112
_SYMBOLS = {torch.float32: ("cblas_sgemm_batch", ctypes.c_float), torch.float64: ("cblas_dgemm_batch", ctypes.c_double)}


class Product(NamedTuple):
    """One group: C [m, n] = A [m, k] @ B [k, n], given by addresses; a_t, b_t: stored transposed; ld: row strides."""

    m: int
    n: int
    k: int
    a: int
    a_t: bool
    lda: int
    b: int
    b_t: bool
    ldb: int
    c: int
    ldc: int


def why_not(dtype: torch.dtype) -> str | None:
    """Return why products of this dtype cannot be batched here, or None."""
    if dtype not in _SYMBOLS:
        return f"no batched product for {dtype}"
    return None if _symbol(dtype) is not None else "this build of PyTorch exports no MKL"


@functools.cache
def _symbol(dtype: torch.dtype) -> Callable[..., Any] | None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return getattr(ctypes.CDLL(str(library)), _SYMBOLS[dtype][0])
    except (OSError, AttributeError):
        return None


def multiply(dtype: torch.dtype, products: Sequence[Product]) -> None:
    """Compute all products.  The addresses must stay valid; none of the outputs may overlap."""
    if not products:
        return
    function, scalar, n = _symbol(dtype), _SYMBOLS[dtype][1], len(products)
    assert function is not None
    columns = list(zip(*products, strict=True))
    m, cols, k, a, a_t, lda, b, b_t, ldb, c, ldc = columns
    ints, pointers, scalars = ctypes.c_int * n, ctypes.c_void_p * n, scalar * n
    flag = {False: _PLAIN, True: _TRANSPOSED}
    function(
        _ROW_MAJOR,
        ints(*(flag[t] for t in a_t)),
        ints(*(flag[t] for t in b_t)),
        ints(*m),
        ints(*cols),
        ints(*k),
        scalars(*[1.0] * n),
        pointers(*a),
        ints(*lda),
        pointers(*b),
        ints(*ldb),
        scalars(*[0.0] * n),
        pointers(*c),
        ints(*ldc),
        n,
        ints(*[1] * n),
    )


def layout(matrix: Tensor) -> tuple[bool, int] | None:
    """(stored transposed, row stride) of a matrix that MKL can read in place, or None."""
    rows, columns = matrix.stride()
    if columns == 1 and rows >= max(matrix.shape[1], 1):
        return False, rows
    if rows == 1 and columns >= max(matrix.shape[0], 1):
        return True, columns
    return None
