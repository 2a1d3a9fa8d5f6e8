"""The weights of all experts as the grouped products take them: one stack, or a table of addresses.

    stack      [E, F, D] of any strides; the weight of expert e begins e * STRIDE_E elements behind its first
    addresses  i64[E], where each of E separate matrices [F, D] begins: nothing is copied together

A table is new memory for each call, filled by a kernel whose arguments are the addresses: those of this call, never of
an earlier one.  So nothing is read by the host, nothing is kept between calls, and under CUDA graphs, which keep the
arguments of a kernel, the table is a temporary of the graph and lives as long as it does.

What the table points to is invisible to a compiler: the matrices must be arguments of the op that makes the table, and
of which the products are a part, or their memory might serve somebody else before the products read it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._library.triton import is_wrap_triton_enabled
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_compile.kernels.dispatch import compiled

CHUNK, HIP_CHUNK = 128, 32  # addresses of a launch: 1 KiB of 4 for arguments; on AMD they all lie in scalar registers


class Weights(NamedTuple):
    """What a kernel is given.

    pointer: the stack or the table.  multiple: 0 for a stack, else of how many bytes all addresses are a multiple.
    """

    pointer: Tensor
    shape: tuple[int, int, int]
    stride: tuple[int, int, int]
    multiple: int

    def packed(self) -> str:
        """Which dimension is contiguous, as forms of settings are named."""
        return "d packed" if self.stride[2] == 1 else "f packed"

    def transposed(self) -> "Weights":
        """The same numbers as [E, D, F]."""
        (E, F, D), (of_e, of_f, of_d) = self.shape, self.stride
        return self._replace(shape=(E, D, F), stride=(of_e, of_d, of_f))


# -- kernels --------------------------------------------------------------------------------


@triton.jit
def _table_kernel(table_ptr, numbers, COUNT: tl.constexpr):
    """table[i] = the address in numbers[i].  One program."""
    for i in tl.static_range(COUNT):
        tl.store(table_ptr + i, (numbers[i].to(tl.int64) - 3) >> 1)


@triton.jit
def weight_of(w_ptr, e, like_ptr, STRIDE_E: tl.constexpr, MULTIPLE: tl.constexpr):
    """Where the weight of expert e begins; like_ptr points to numbers of its type."""
    if MULTIPLE == 0:
        return w_ptr + e * STRIDE_E
    else:
        address = tl.load(w_ptr + e).to(tl.pointer_type(like_ptr.dtype.element_ty))
        return tl.multiple_of(address, MULTIPLE)


# -- launching ------------------------------------------------------------------------------


def stacked(w_EFD: Tensor) -> Weights:
    """One stack."""
    E, F, D = map(int, w_EFD.shape)
    of_e, of_f, of_d = map(int, w_EFD.stride())
    return Weights(w_EFD, (E, F, D), (of_e, of_f, of_d), 0)


def restrided(w: Weights, stride: tuple[int, int, int]) -> Weights:
    """A copy of a stack in other strides."""
    assert w.multiple == 0, "separate weights differ in strides"
    copy = torch.empty_strided(w.shape, stride, dtype=w.pointer.dtype, device=w.pointer.device).copy_(w.pointer)
    return w._replace(pointer=copy, stride=stride)


def separate(weights: Sequence[Tensor]) -> Weights:
    """The addresses of E matrices that `why_not_separate` does not object to.  Not for fake tensors."""
    addresses = [w.data_ptr() for w in weights]
    table = torch.empty(len(addresses), dtype=torch.int64, device=weights[0].device)
    run: Any = _table_kernel
    chunk = CHUNK if torch.version.hip is None else HIP_CHUNK
    for first in range(0, len(addresses), chunk):
        # Odd numbers: Triton would compile the kernel again for each pattern of multiples of 16 in a tuple.
        some = tuple(2 * a + 3 for a in addresses[first : first + chunk])
        run[(1,)](table[first:], some, len(some), num_warps=1)
    (F, D), (of_f, of_d) = map(int, weights[0].shape), map(int, weights[0].stride())
    multiple = next(n for n in (16, 8, 4, 2, 1) if all(a % n == 0 for a in addresses))
    return Weights(table, (len(weights), F, D), (0, of_f, of_d), multiple)


def by_descriptor(w: Weights, halves: int, block_f: int, block_k: int) -> TensorDescriptor | None:
    """A descriptor of a stack [E, halves * F, D] as [E, halves, F, D], or [E, D, halves, F] where f is packed, whose
    tiles are `block_f` rows of each half by `block_k` numbers, zeros beyond F and D; None where there is none.

    TMA is that of Hopper and later.  It wants 16-bit numbers here, and addresses and strides of 16 bytes.  It needs the
    real address: a launch that a compiler traces takes pointers.
    """
    (E, G, D), (of_e, of_f, of_d) = w.shape, w.stride
    if w.multiple or not _can_be_described(w.pointer):
        return None
    F = G // halves
    of_half = F * of_f if halves > 1 else of_e
    shape, stride, block = [E, halves, F, D], [of_e, of_half, of_f, of_d], [1, halves, block_f, block_k]
    if of_d != 1:
        shape, stride, block = ([v[0], v[3], v[1], v[2]] for v in (shape, stride, block))
    strides_fit = stride[-1] == 1 and all(n > 0 and n % 8 == 0 for n in stride[:-1])
    if not strides_fit or min(shape) < 1 or max(block) > 256:
        return None
    return TensorDescriptor(w.pointer, shape, stride, block)


def rows_by_descriptor(x_RD: Tensor, block_r: int, block_d: int) -> TensorDescriptor | None:
    """A descriptor of packed rows, or None where there is none, as above.

    Its tiles, of `block_r` rows by `block_d` numbers, are read by `load_ragged`: zeros beyond a group's last row and
    beyond D.
    """
    R, D = x_RD.shape
    if not _can_be_described(x_RD) or D % 8 or not 1 <= R <= 1 << 30 or max(block_r, block_d) > 256:
        return None
    return create_ragged_descriptor(x_RD, [block_r, block_d])


def _can_be_described(x: Tensor) -> bool:
    """Whether TMA can read tensors of this type at this address, and the address is known."""
    if (is_wrap_triton_enabled() and compiled(_table_kernel)) or x.element_size() != 2:
        return False
    if x.device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(x.device)[0] < 9):
        return False
    return x.data_ptr() % 16 == 0


def descriptor_type(dtype: str, halves: int, block_f: int, block_k: int, f_packed: bool) -> str:
    """The type of such a descriptor, for `compile_cases`."""
    block = [1, block_k, halves, block_f] if f_packed else [1, halves, block_f, block_k]
    return f"tensordesc<{dtype}{block}>"


def packed_rows_type(dtype: str, block_r: int, block_d: int) -> str:
    """The type of a descriptor of rows, likewise."""
    return f"tensordesc<{dtype}{[1, 1, block_r, block_d]}>"


def why_not_separate(weights: Sequence[Tensor]) -> str | None:
    """Return why these matrices must be copied to one stack, or None."""
    first = weights[0]
    for w in weights:
        if (w.dim(), w.shape, w.dtype, w.device) != (2, first.shape, first.dtype, first.device):
            return (
                f"{w.dtype} {tuple(w.shape)} on {w.device} beside {first.dtype} {tuple(first.shape)} on {first.device}"
            )
        if w.stride() != first.stride():
            return f"strides {w.stride()} beside {first.stride()}"
    return None


def compile_cases(hip: bool = False) -> list[tuple]:
    """What can be launched: (setting, kernel, types, constants, num_warps, num_stages)."""
    chunk = HIP_CHUNK if hip else CHUNK
    args = {"table_ptr": "*i64", "numbers": ("i64",) * chunk}
    return [(f"{chunk} addresses", _table_kernel, args, {"COUNT": chunk}, 1, 3)]
