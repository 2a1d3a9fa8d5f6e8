"""Triton kernels that sort the routed pairs by expert: all that depends on ids alone, in one, two or three launches.

    key[p]      = ids_TK[p // K, p % K] where that is in [0, E), else E, for the pair p = t*K + k
    order_R     = the pairs p by (key[p], p); position_R[p] = the row of pair p; offsets_E[e] = how many have key <= e
    tiles[i]    = (expert, first row, end of its rows) of row tile i, as kernels/tiles.py says

A stable counting sort by blocks of BLOCK pairs.  The row of a pair is the sum of three numbers: how many pairs have a
smaller key, how many of the same key are in earlier blocks, and how many of them are earlier in its own block.

Launches   1, if there is one block (as in decoding): a pair compares itself with all others.
           2, up to MAX_CELLS counts of MAX_BLOCKS blocks: `count` writes how often each key is in each block; `order`
             sums all counts in every program, and writes the rest.  A program reads 256 KiB of L2 at most, which takes
             some 2 us: about as long as the device needs for one more launch, and less than the host.
           3, with more counts, or where R is symbolic: `sum` adds them up between the two, a few keys a program, so
             that `order` reads two rows of sums.  Two launches would read counts as often as the square of the blocks.
Letters    T tokens, K experts per token, R = T*K pairs, E experts.
Types      ids: any integer but bool.  All results: i32.
Layout     ids are packed.  R < 2**31.
Cost       About 24*R bytes; with two launches 4*bins*R/BLOCK more, with three 8*bins*R/BLOCK, bins = next power of two
           of E+2, at least 16.  BLOCK comparisons a pair.  No host read, no atomics on global memory.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moe_compile.kernels.tiles import compiled, num_tiles, store_row_tiles

BLOCK, CHUNK = 512, 16  # pairs of a block; how many of them are compared with all at a time
MAX_BLOCKS, MAX_CELLS = 128, 2**16  # of two launches: all blocks run at once; counts that a program reads
KEYS, ROWS = 16, 256  # of `sum`: keys of a program; blocks at a time

# -- kernels --------------------------------------------------------------------------------


@triton.jit
def _load_key(ids_ptr, pair, R, E: tl.constexpr):
    """The key of each pair; E + 1 behind the last pair, which therefore sorts last."""
    ids = tl.load(ids_ptr + pair, mask=pair < R, other=0).to(tl.int64)
    key = tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)
    return tl.where(pair < R, key, E + 1)


@triton.jit(do_not_specialize=["R"])
def _count_kernel(ids_ptr, counts_ptr, R, E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """counts[block, key], one block of pairs per program."""
    block = tl.program_id(0)
    key = _load_key(ids_ptr, block * BLOCK + tl.arange(0, BLOCK), R, E)
    tl.store(counts_ptr + block.to(tl.int64) * BINS + tl.arange(0, BINS), tl.histogram(key, BINS))


@triton.jit(do_not_specialize=["num_blocks"])
def _sum_kernel(
    counts_ptr, sums_ptr, num_blocks, BINS: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """sums[block, key] = the counts of the key in earlier blocks; row num_blocks: in all.  KEYS keys per program."""
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    total = tl.zeros([KEYS], tl.int32)
    for first in range(0, num_blocks, ROWS):
        block = first + tl.arange(0, ROWS)
        cell = block.to(tl.int64)[:, None] * BINS + key[None, :]
        inside = (block < num_blocks)[:, None]
        count = tl.load(counts_ptr + cell, mask=inside, other=0)
        tl.store(sums_ptr + cell, total[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        total += tl.sum(count, 0)
    tl.store(sums_ptr + num_blocks.to(tl.int64) * BINS + key, total)


@triton.jit
def _sum_counts(counts_ptr, block, num_blocks, BINS: tl.constexpr, ROWS: tl.constexpr):
    """(how often each key is in all blocks, in those before `block`)."""
    total = tl.zeros([ROWS, BINS], tl.int32)
    before = tl.zeros([ROWS, BINS], tl.int32)
    for first in range(0, num_blocks, ROWS):
        other = first + tl.arange(0, ROWS)
        cell = other.to(tl.int64)[:, None] * BINS + tl.arange(0, BINS)[None, :]
        count = tl.load(counts_ptr + cell, mask=(other < num_blocks)[:, None], other=0)
        total += count
        before += tl.where((other < block)[:, None], count, 0)
    return tl.sum(total, 0), tl.sum(before, 0)


@triton.jit(do_not_specialize=["R", "num_blocks", "num_row_tiles"])
def _order_kernel(
    ids_ptr,
    counts_ptr,
    order_ptr,
    offsets_ptr,
    position_ptr,
    tiles_ptr,
    R,
    num_blocks,
    num_row_tiles,
    E: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    LAUNCHES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """order, of one block of pairs per program, and offsets; positions and tiles of BLOCK_M rows too, if that is not 0.

    counts_ptr: nothing, counts or sums, if this is the first, second or third of LAUNCHES.
    """
    block, index, e = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, BINS)
    pair = block * BLOCK + index
    key = _load_key(ids_ptr, pair, R, E)
    row = tl.zeros([BLOCK], tl.int32)
    for first in range(0, tl.minimum(R - block * BLOCK, BLOCK), CHUNK):
        other_index = first + tl.arange(0, CHUNK)
        other = _load_key(ids_ptr, block * BLOCK + other_index, R, E)
        earlier = (key[:, None] == other[None, :]) & (other_index[None, :] < index[:, None])
        if LAUNCHES == 1:
            earlier = earlier | (other[None, :] < key[:, None])
        row += tl.sum(earlier.to(tl.int32), axis=1)
    if LAUNCHES == 1:
        total = tl.histogram(key, BINS)
        end = tl.cumsum(total, 0)
    else:
        if LAUNCHES == 2:
            total, before = _sum_counts(counts_ptr, block, num_blocks, BINS, ROWS)
        else:
            before = tl.load(counts_ptr + block.to(tl.int64) * BINS + e)
            total = tl.load(counts_ptr + num_blocks.to(tl.int64) * BINS + e)
        end = tl.cumsum(total, 0)
        row += tl.gather(end - total + before, key, 0)
    tl.store(order_ptr + row, pair, mask=pair < R)
    tl.store(offsets_ptr + e, end, mask=(e < E) & (block == 0))
    if BLOCK_M > 0:
        tl.store(position_ptr + pair, row, mask=pair < R)
        store_row_tiles(tiles_ptr, end - total, end, block, num_blocks, num_row_tiles, E, BINS, BLOCK_M)


# -- launcher: grids are never empty, so that nothing is asked about R --------------------------


def launch(ids_TK: Tensor, num_experts: int, tile_rows: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(order_R, offsets_E, position_R, tiles), the last two for tiles of so many rows, or empty; of ids that
    `dispatch.why_not_sort` does not object to."""
    ids_TK, R, E = ids_TK.contiguous(), ids_TK.shape[0] * ids_TK.shape[1], num_experts
    order_R, offsets_E, position_R, tiles = outputs(ids_TK, E, tile_rows)
    num_blocks, bins = torch.sym_max((R + BLOCK - 1) // BLOCK, 1), num_bins(E)
    launches, counts = num_launches(num_blocks, bins), ids_TK
    if launches > 1:
        counts = ids_TK.new_empty(num_blocks * bins, dtype=torch.int32)  # flat: PyTorch would ask if there is one block
        count: Any = wrap_triton(_count_kernel) if compiled(_count_kernel) else _count_kernel
        count[(num_blocks,)](ids_TK, counts, R, E, bins, BLOCK, num_warps=4)
    if launches > 2:
        sums = ids_TK.new_empty((num_blocks + 1) * bins, dtype=torch.int32)
        add: Any = wrap_triton(_sum_kernel) if compiled(_sum_kernel) else _sum_kernel
        add[(bins // KEYS,)](counts, sums, num_blocks, bins, KEYS, ROWS, num_warps=8)
        counts = sums
    order: Any = wrap_triton(_order_kernel) if compiled(_order_kernel) else _order_kernel
    results = order_R, offsets_E, position_R, tiles
    sizes = R, num_blocks, tiles.shape[0], E, bins, BLOCK, CHUNK, rows_at_a_time(bins), launches, tile_rows
    order[(num_blocks,)](ids_TK, counts, *results, *sizes, num_warps=8)
    return results


def outputs(ids_TK: Tensor, E: int, tile_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for what `launch` gives."""
    R = ids_TK.shape[0] * ids_TK.shape[1]
    order_R, offsets_E = (ids_TK.new_empty(n, dtype=torch.int32) for n in (R, E))
    position_R = ids_TK.new_empty(R if tile_rows else 0, dtype=torch.int32)
    return order_R, offsets_E, position_R, ids_TK.new_empty(num_tiles(R, E, tile_rows), 3, dtype=torch.int32)


def num_bins(E: int) -> int:
    """Keys 0 to E + 1, and some that no pair has."""
    return max(triton.next_power_of_2(E + 2), KEYS)


def num_launches(num_blocks: int | torch.SymInt, bins: int) -> int:
    """1, 2 or 3: any number of them sorts any number of pairs, but for 1."""
    if isinstance(num_blocks, torch.SymInt):
        return 3
    if num_blocks == 1:
        return 1
    return 2 if num_blocks <= MAX_BLOCKS and num_blocks * bins <= MAX_CELLS else 3


def rows_at_a_time(bins: int) -> int:
    """How many blocks' counts a program holds: 4096 numbers at most."""
    return min(max(4096 // bins, 1), 64)


def compile_cases(hip: bool = False) -> list[tuple]:
    """What can be launched: (setting, kernel, types, constants, num_warps, num_stages)."""
    cases: list[tuple] = []
    for E in (8, 64, 512, 1022):
        setting, bins = f"{E} experts", num_bins(E)
        ids, i32 = {"ids_ptr": "*i64", "R": "i32"}, {"counts_ptr": "*i32", "num_blocks": "i32"}
        sizes = {"E": E, "BINS": bins, "BLOCK": BLOCK}
        cases.append((setting, _count_kernel, ids | {"counts_ptr": "*i32"}, sizes, 4, 3))
        constants = {"BINS": bins, "KEYS": KEYS, "ROWS": ROWS}
        cases.append((setting, _sum_kernel, i32 | {"sums_ptr": "*i32"}, constants, 8, 3))
        results = ("order_ptr", "offsets_ptr", "position_ptr", "tiles_ptr")
        args = ids | i32 | dict.fromkeys(results, "*i32") | {"num_row_tiles": "i32"}
        for launches, tile_rows in ((1, 16), (2, 64), (3, 128), (3, 0)):
            case = f"{setting}, launch {launches}" + f", tiles of {tile_rows}" * (tile_rows > 0)
            constants = sizes | {"CHUNK": CHUNK, "ROWS": rows_at_a_time(bins), "LAUNCHES": launches}
            cases.append((case, _order_kernel, args, constants | {"BLOCK_M": tile_rows}, 8, 3))
    return cases
