"""Which calls of the program are questions about data, told by the function that is called and its arguments.

Predicates and tables only: nothing is answered or noted here, and no argument changes.  `answers.py` says what each
question gets.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moe_compile.captured import EXAMPLE

LONGEST = 4096  # iterations of a loop: more are not over experts, and would take minutes to trace

# functions of torch by what is asked with them: sizes that may hold a number of rows, how rows lie in memory, what a
# trace cannot tell; and by what they give: rows of their own, a list of found indices in another shape
HOOKS = {torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook}
SIZES = {
    torch.Tensor.stride,
    torch.Tensor.nbytes.__get__,  # type: ignore[attr-defined]
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.__len__,
    torch.numel,
}
COPIES = {torch.Tensor.contiguous, torch.Tensor.ravel, torch.ravel}
LAYOUT = {torch.Tensor.is_contiguous, torch.Tensor.dim_order}
LOOKS = {
    torch.Tensor.__repr__,
    torch.Tensor.data_ptr,
    torch.Tensor.storage_offset,
    torch.Tensor.untyped_storage,
    torch.Tensor.storage,
    torch.Tensor.is_set_to,
    torch.Tensor._base.__get__,  # type: ignore[union-attr]
    torch.Tensor._version.__get__,  # type: ignore[attr-defined]
}
NONZERO = {torch.Tensor.nonzero, torch.nonzero, torch.Tensor.argwhere, torch.argwhere}
PARTS = {torch.Tensor.__iter__, torch.Tensor.unbind, torch.unbind}
TRANSPOSES = {torch.Tensor.t, torch.t, torch.Tensor.T.__get__}  # type: ignore[attr-defined]
SAME_LIST = {
    torch.Tensor.squeeze,
    torch.squeeze,
    torch.Tensor.flatten,
    torch.flatten,
    torch.Tensor.view,
    torch.Tensor.reshape,
}


def is_mask(index: Any) -> bool:
    """Whether an index selects by truths; `uint8` counts as such, as it does in an index of torch."""
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) and index.dim() > 0


def is_index(index: Any) -> bool:
    """Whether an index is vectors of numbers and no more."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(i, Tensor) and i.dim() == 1 and i.dtype == torch.int64 for i in parts)


def fills_by_mask(tensor: Any, index: Any, value: Any) -> bool:
    """x[mask] = number, with a truth for each number in x: no rows are selected."""
    whole = is_mask(index) and isinstance(tensor, Tensor) and index.dim() > 1 and index.shape == tensor.shape
    return whole and isinstance(value, float | int) and tensor.is_floating_point() and index.dtype == torch.bool


def has_mask(index: Any) -> bool:
    """Whether an index, or one of several, is a mask."""
    return any(map(is_mask, index if isinstance(index, tuple) else (index,)))


def is_unknown(tensor: Tensor) -> bool:
    """Whether a tensor's numbers depend on the data: a fake one that is no literal of the program."""
    return isinstance(tensor, FakeTensor) and tensor.constant is None


def parted_dim(args: Any, kwargs: Any) -> int:
    """The dimension along which a tensor is taken apart, from its start."""
    dim, rank = args[1] if len(args) > 1 else kwargs.get("dim", 0), args[0].dim()
    return int(dim % rank if rank else dim)


def parted_size(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """The size of that dimension, as a tuple of one; none of a tensor without dimensions."""
    along = parted_dim(args, kwargs)
    return tuple(args[0].shape[along : along + 1])


def too_long(args: Any, kwargs: Any) -> bool:
    """Whether a tensor that is taken apart gives more than `LONGEST` parts."""
    return any(isinstance(size, int) and size > LONGEST for size in parted_size(args, kwargs))


def has_rows(result: Any, rows: Any) -> bool:
    """Whether a size that the program reads could hold the number of rows."""
    sizes = result if isinstance(result, (tuple, list)) else [result]
    if isinstance(rows, int):
        return any(isinstance(s, int) and s and s % rows == 0 for s in sizes) if rows == EXAMPLE else False
    symbols = {row.node.expr for row in rows}
    return any(isinstance(s, torch.SymInt) and s.node.expr.free_symbols & symbols for s in sizes)
