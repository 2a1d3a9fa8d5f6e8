"""Triton kernels for `moe_ep.dispatch`: sort the routed pairs by expert, gather their tokens.

    key[p]    = ids_TK[p // K, p % K] where that is in [0, E), else E, for the pair p = t*K + k
    order_R   = the pairs p by (key[p], p); offsets_E[e] = how many pairs have key[p] <= e
    x_RD[r]   = x_TD[order_R[r] // K]

A counting sort in two passes over blocks of BLOCK pairs.  Pass one counts each key in each block;
a running sum over (key, block) says where the pairs of one key in one block begin; pass two adds
the number of earlier pairs of the block with the same key.  Every row is written by one pair.

Letters    T tokens, K experts per token, R = T*K pairs, E experts, D model width.
Types      x: bf16 | f16 | f32.  ids: any integer but bool.  order, offsets: i32.
Layout     All row-major; x and ids of other strides are copied first.  R < 2**31.
Cost       Memory bound: 2*R*D elements moved, and about 20*R bytes + 12*bins*R/BLOCK for the sort,
           bins = next power of two of E+2.  No host read, no atomics on global memory.
Gradient   None here: `moe_ep.dispatch` has it (an unweighted `combine`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton
from triton.runtime.jit import JITFunction

import moe_compile.ops

MAX_EXPERTS = 1022  # two bins are ours: 1024 counters per block
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
BLOCK, CHUNK = 512, 16  # pairs of a block; how many of them are compared with all at a time

# -- kernels --------------------------------------------------------------------------------


@triton.jit
def _load_key(ids_ptr, pair, R, E: tl.constexpr):
    """The key of each pair; E + 1 behind the last pair, which therefore sorts last."""
    ids = tl.load(ids_ptr + pair, mask=pair < R, other=0).to(tl.int64)
    key = tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)
    return tl.where(pair < R, key, E + 1)


@triton.jit(do_not_specialize=["R", "num_blocks"])
def _count_kernel(ids_ptr, counts_ptr, R, num_blocks, E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """counts[key, block], one block of pairs per program."""
    block = tl.program_id(0)
    key = _load_key(ids_ptr, block * BLOCK + tl.arange(0, BLOCK), R, E)
    counts = tl.histogram(key, BINS)
    tl.store(counts_ptr + tl.arange(0, BINS) * num_blocks + block, counts)


@triton.jit(do_not_specialize=["R", "num_blocks"])
def _order_kernel(
    ids_ptr,
    counts_ptr,
    ends_ptr,
    order_ptr,
    R,
    num_blocks,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """order[start of (key, block) + rank in the block] = pair."""
    block = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    pair = block * BLOCK + index
    key = _load_key(ids_ptr, pair, R, E)
    rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, BLOCK, CHUNK):
        other_index = first + tl.arange(0, CHUNK)
        other = _load_key(ids_ptr, block * BLOCK + other_index, R, E)
        same = key[:, None] == other[None, :]
        earlier = other_index[None, :] < index[:, None]
        rank += tl.sum((same & earlier).to(tl.int32), axis=1)
    cell = key * num_blocks + block
    start = tl.load(ends_ptr + cell) - tl.load(counts_ptr + cell)
    tl.store(order_ptr + start + rank, pair, mask=pair < R)


@triton.jit(do_not_specialize=["R"])
def _gather_kernel(x_ptr, order_ptr, out_ptr, R, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program copies BLOCK_D elements of one row."""
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (d < D) & (r < R)
    t = (tl.load(order_ptr + r, mask=r < R, other=0) // K).to(tl.int64)
    tl.store(out_ptr + r * D + d, tl.load(x_ptr + t * D + d, mask=inside), mask=inside)


# -- launchers: grids are never empty, so that nothing is asked about R ------------------------


@triton_op("moe_ep_triton::sort_by_expert", mutates_args=())
def sort_by_expert(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order_R, offsets_E), both i32."""
    return _sort(ids_TK, num_experts)


@triton_op("moe_ep_triton::dispatch", mutates_args=())
def dispatch(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x_RD, offsets_E, order_R)."""
    if reason := why_not(x_TD, ids_TK, num_experts):
        raise ValueError(f"moe_ep_triton.dispatch: {reason}")
    order_R, offsets_E = _sort(ids_TK, num_experts)
    x_TD, R, D, K = x_TD.contiguous(), order_R.shape[0], int(x_TD.shape[1]), int(ids_TK.shape[1])
    x_RD = x_TD.new_empty(R, D)
    block, warps = _launch_config(D)
    gather: Any = wrap_triton(_gather_kernel) if compiled(_gather_kernel) else _gather_kernel
    grid = (torch.sym_max(R, 1), max(triton.cdiv(D, block), 1))
    gather[grid](x_TD, order_R, x_RD, R, K, D, BLOCK_D=block, num_warps=warps)
    return x_RD, offsets_E, order_R


def _sort(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    if reason := why_not_sort(ids_TK, num_experts):
        raise ValueError(f"moe_ep_triton.sort_by_expert: {reason}")
    ids_TK, R, E = ids_TK.contiguous(), ids_TK.shape[0] * ids_TK.shape[1], num_experts
    num_blocks, bins = torch.sym_max((R + BLOCK - 1) // BLOCK, 1), triton.next_power_of_2(E + 2)
    counts = ids_TK.new_empty(bins, num_blocks, dtype=torch.int32)
    order_R = ids_TK.new_empty(R, dtype=torch.int32)
    count: Any = wrap_triton(_count_kernel) if compiled(_count_kernel) else _count_kernel
    count[(num_blocks,)](ids_TK, counts, R, num_blocks, E, bins, BLOCK, num_warps=4)
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)
    order: Any = wrap_triton(_order_kernel) if compiled(_order_kernel) else _order_kernel
    args = (ids_TK, counts, ends, order_R, R, num_blocks)
    order[(num_blocks,)](*args, E, BLOCK, CHUNK, num_warps=8)
    return order_R, ends.view(bins, num_blocks).narrow(0, 0, E).select(1, -1).clone()


def compiled(kernel: object) -> bool:
    """Not so under TRITON_INTERPRET=1, where `wrap_triton` of torch 2.11 refuses the kernel."""
    return isinstance(kernel, JITFunction)


def _launch_config(D: int) -> tuple[int, int]:
    """(BLOCK_D, num_warps) of the gather."""
    return (2048, 4) if D > 1024 else (max(16, triton.next_power_of_2(D)), 2)


@sort_by_expert.register_fake
def _(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    R = ids_TK.shape[0] * ids_TK.shape[1]
    order_R, offsets_E = (ids_TK.new_empty(n, dtype=torch.int32) for n in (R, num_experts))
    return order_R, offsets_E


@dispatch.register_fake
def _(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    R = ids_TK.shape[0] * ids_TK.shape[1]
    order_R, offsets_E = (ids_TK.new_empty(n, dtype=torch.int32) for n in (R, num_experts))
    return x_TD.new_empty(R, x_TD.shape[1]), offsets_E, order_R


def why_not(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> str | None:
    """Return why these kernels cannot take these arguments, or None if they can."""
    if x_TD.dtype not in FLOATS or x_TD.dim() != 2:
        return f"x is {x_TD.dtype} with {x_TD.dim()} dimensions, expected bf16, f16 or f32 with 2"
    return why_not_sort(ids_TK, num_experts)


def why_not_sort(ids_TK: Tensor, num_experts: int) -> str | None:
    if ids_TK.dtype not in INTEGERS or ids_TK.dim() != 2:
        return f"ids are {ids_TK.dtype} with {ids_TK.dim()} dimensions, expected integers with 2"
    if not 1 <= num_experts <= MAX_EXPERTS:
        return f"{num_experts} experts, expected 1 to {MAX_EXPERTS}"
    if ids_TK.shape[1] < 1:
        return "ids have 0 experts per token"
    return None


def compile_cases(hip: bool = False) -> list[tuple]:
    """What can be launched: (setting, kernel, types, constants, num_warps, num_stages)."""
    ids, i32 = {"ids_ptr": "*i64"}, {"counts_ptr": "*i32", "R": "i32", "num_blocks": "i32"}
    cases: list[tuple] = []
    for E in (8, 512):
        setting, sizes = f"{E} experts", {"E": E, "BLOCK": BLOCK}
        constants, args = sizes | {"BINS": triton.next_power_of_2(E + 2)}, ids | i32
        cases.append((setting, _count_kernel, args, constants, 4, 3))
        args = args | {"ends_ptr": "*i32", "order_ptr": "*i32"}
        cases.append((setting, _order_kernel, args, sizes | {"CHUNK": CHUNK}, 8, 3))
    for D in (768, 4096):
        block, warps = _launch_config(D)
        args = {"x_ptr": "*bf16", "order_ptr": "*i32", "out_ptr": "*bf16", "R": "i32"}
        constants = {"K": 8, "D": D, "BLOCK_D": block}
        cases.append((f"D={D}", _gather_kernel, args, constants, warps, 3))
    return cases


# -- references: the meaning of the ops, and the oracles of their tests ---------------------

sort_by_expert_reference = moe_compile.ops.sort_by_expert
dispatch_reference = moe_compile.ops.dispatch_reference
