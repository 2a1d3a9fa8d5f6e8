"""Row tiles: how the grouped products share rows of experts out among programs.

The sort (counting_sort.py), or a small kernel, writes the expert and the rows of each tile of BLOCK_M rows; a tile has
rows of one expert only, tiles left over do nothing, and the rows behind the last offset are a group of their own, with
number E.  Of n groups that
have rows no routing makes more than n + (R - n) // BLOCK_M tiles, and n is R or E + 1 at most.  No host read; the
number of tiles depends on R and E alone, and with few rows it is R.

A program computes one tile of rows by one of columns; or, in a persistent grid, one after another: as many programs as
the device runs at a time, in the same order of tiles.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton
from triton.runtime.jit import JITFunction

GROUP_M = 8  # row tiles that take turns before the next column tile
FILL = 264  # programs: two for each of 132 multiprocessors
TILES = 32  # that a program of the table writes, if experts have as many rows

# -- kernels --------------------------------------------------------------------------------


@triton.jit
def store_row_tiles(
    tiles_ptr, start, end, program, num_programs, num_row_tiles, E: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """tiles[i] = (expert, first row, end of its rows) of row tile i; expert > E: no such tile.

    start, end: the rows of each of GROUPS groups, of which E + 1 are meant.  The programs write every tile once, taking
    turns at those of a group; what is left over, at most one tile for each group that has rows, is for the first.
    """
    e = tl.arange(0, GROUPS)  # group E: the rows behind the last offset
    count = tl.where(e <= E, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    last = tl.cumsum(count, 0)
    for turn in range(program, tl.max(count, 0), num_programs):
        tile, mine = tiles_ptr + 3 * (last - count + turn), turn < count
        tl.store(tile, e, mask=mine)
        tl.store(tile + 1, start + turn * BLOCK_M, mask=mine)
        tl.store(tile + 2, end, mask=mine)
    i = tl.sum(count, 0) + e
    left_over = (i < num_row_tiles) & (program == 0)
    tl.store(tiles_ptr + 3 * i, E + 1, mask=left_over)
    tl.store(tiles_ptr + 3 * i + 1, 0, mask=left_over)
    tl.store(tiles_ptr + 3 * i + 2, 0, mask=left_over)


@triton.jit(do_not_specialize=["R", "num_row_tiles"])
def _row_tiles_kernel(
    offsets_ptr, tiles_ptr, R, num_row_tiles, E: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """The tiles of a routing that is sorted."""
    e = tl.arange(0, GROUPS)
    end = tl.load(offsets_ptr + e, mask=e < E, other=0)
    end = tl.where(e < E, end, R)
    start = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e <= E), other=0)
    store_row_tiles(
        tiles_ptr, start, end, tl.program_id(0), tl.num_programs(0), num_row_tiles, E, GROUPS, BLOCK_M
    )  # fmt: skip


@triton.jit
def row_in_turn(program, num_row_tiles, NUM_COL_TILES: tl.constexpr, GROUP_M: tl.constexpr):
    """The row tile of a program.

    Row tiles run fastest, within groups of GROUP_M, so that neighbours read the same columns, of weights mostly, and
    programs that run at one time few rows and few columns.
    """
    group = program // (GROUP_M * NUM_COL_TILES)
    group_size = tl.minimum(num_row_tiles - group * GROUP_M, GROUP_M)
    return group * GROUP_M + program % (GROUP_M * NUM_COL_TILES) % group_size


@triton.jit
def column_in_turn(program, num_row_tiles, NUM_COL_TILES: tl.constexpr, GROUP_M: tl.constexpr):
    """Its column tile."""
    group = program // (GROUP_M * NUM_COL_TILES)
    group_size = tl.minimum(num_row_tiles - group * GROUP_M, GROUP_M)
    return program % (GROUP_M * NUM_COL_TILES) // group_size


@triton.jit
def program_tile(
    tiles_ptr, program, num_row_tiles, NUM_COL_TILES: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr
):  # fmt: skip
    """(expert, rows, which of them are its own, column tile) of a program; expert > E: nothing to do."""
    tile = row_in_turn(program, num_row_tiles, NUM_COL_TILES, GROUP_M)
    e = tl.load(tiles_ptr + 3 * tile).to(tl.int64)
    r = tl.load(tiles_ptr + 3 * tile + 1).to(tl.int64) + tl.arange(0, BLOCK_M)
    r_in = r < tl.load(tiles_ptr + 3 * tile + 2)
    return e, r, r_in, column_in_turn(program, num_row_tiles, NUM_COL_TILES, GROUP_M)  # last: fewer registers


@triton.jit
def store_columns(out_ptr, tile, r, r_in, f, F: tl.constexpr, ROW: tl.constexpr):
    """out[r, f] = tile, rows of ROW numbers, of which the first F are meant."""
    tl.store(out_ptr + r[:, None] * ROW + f[None, :], tile, mask=r_in[:, None] & (f < F)[None, :])


@triton.jit
def sum_products(
    acc, x_ptrs, w_ptrs, r_in, f_in, D: tl.constexpr, STRIDE_D: tl.constexpr, BLOCK_K: tl.constexpr,
    scales_ptrs=None, SCALED: tl.constexpr = 0,  # type: ignore[assignment]
):  # fmt: skip
    """acc[r, f] + the sum over d of x[r, d] * w[d, f].  The pointers are those of the first BLOCK_K; x is packed,
    w of x's type or a narrower one whose numbers x's type holds.

    SCALED: 0, or how many d, a multiple of BLOCK_K, share a scale: the column's is scales_ptrs[d // SCALED].
    """
    tl.static_assert(SCALED % BLOCK_K == 0)
    d = tl.arange(0, BLOCK_K)
    for first in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            x = tl.load(x_ptrs, mask=r_in[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=f_in[None, :], other=0.0)
        else:
            d_in = first + d < D
            x = tl.load(x_ptrs, mask=r_in[:, None] & d_in[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=f_in[None, :] & d_in[:, None], other=0.0)
        if SCALED > 0:
            scale = tl.load(scales_ptrs + first // SCALED, mask=f_in, other=0.0).to(tl.float32)
            acc += tl.dot(x, w.to(x.dtype), input_precision="ieee") * scale[None, :]
        else:
            acc = tl.dot(x, w.to(x.dtype), acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * STRIDE_D
    return acc


@triton.jit
def sum_described_products(
    acc, x_ptrs, w, e, f, r_in, D: tl.constexpr, F_PACKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """As `sum_products`, of weights by a descriptor (`by_descriptor`), from column f of each half on."""
    d, expert = tl.arange(0, BLOCK_K), e.to(tl.int32)
    for first in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            x = tl.load(x_ptrs, mask=r_in[:, None], other=0.0)
        else:
            x = tl.load(x_ptrs, mask=r_in[:, None] & (first + d < D)[None, :], other=0.0)
        if F_PACKED:
            tile = tl.reshape(w.load([expert, first, 0, f]), [BLOCK_K, BLOCK_N])
        else:
            tile = tl.trans(tl.reshape(w.load([expert, 0, f, first]), [BLOCK_N, BLOCK_K]))
        acc = tl.dot(x, tile, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
    return acc


# -- launching ------------------------------------------------------------------------------


def compiled(kernel: object) -> bool:
    """Not so under TRITON_INTERPRET=1, where `wrap_triton` of torch 2.11 refuses the kernel."""
    return isinstance(kernel, JITFunction)


Made = dict[int, tuple[Tensor, int | torch.SymInt]]
"""Row tiles of one routing that other launches made, by BLOCK_M."""


def row_tiles(
    offsets_E: Tensor, R: int | torch.SymInt, block_m: int, made: Made | None = None
) -> tuple[Tensor, int | torch.SymInt]:
    """(i32[tiles, 3], number of tiles): expert, first row and end of its rows of each tile of `block_m` rows.

    Those in `made` are taken, and others added to it.
    """
    if made is not None and block_m in made:
        return made[block_m]
    E = int(offsets_E.shape[0])
    num_row_tiles = num_tiles(R, E, block_m)
    tiles = offsets_E.new_empty(num_row_tiles, 3)
    make: Any = wrap_triton(_row_tiles_kernel) if compiled(_row_tiles_kernel) else _row_tiles_kernel
    groups, programs = triton.next_power_of_2(E + 1), (num_row_tiles + TILES - 1) // TILES
    make[(programs,)](offsets_E.contiguous(), tiles, R, num_row_tiles, E, groups, block_m, num_warps=4)
    if made is not None:
        made[block_m] = tiles, num_row_tiles
    return tiles, num_row_tiles


def num_tiles(R: int | torch.SymInt, E: int, block_m: int) -> int | torch.SymInt:
    """How many tiles of so many rows always suffice; at least one, so that grids are not empty.  None without rows."""
    if not block_m:
        return 0
    groups_with_rows = torch.sym_min(R, E + 1)
    return torch.sym_max(groups_with_rows + (R - groups_with_rows) // block_m, 1)


def made_of(tiles: Tensor | None, block_m: int) -> Made:
    """As `row_tiles` takes what the sort gave."""
    return {} if tiles is None else {block_m: (tiles, tiles.shape[0])}


def num_programs(
    num_row_tiles: int | torch.SymInt, num_col_tiles: int, per_multiprocessor: int, device: torch.device
) -> int | torch.SymInt:
    """One for each tile, or no more than so many for each multiprocessor, if that is not 0."""
    num_tiles = num_row_tiles * num_col_tiles
    if not per_multiprocessor:
        return num_tiles
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return torch.sym_min(num_tiles, per_multiprocessor * count)


def hint(R: int | torch.SymInt, E: int) -> int:
    """R, or a guess that adds no guard where it is symbolic."""
    if isinstance(R, torch.SymInt):
        R = R.node.hint if R.node.has_hint() else 256 * E
    return int(R)


def rows_per_expert(R: int | torch.SymInt, E: int) -> int:
    """About how many rows an expert has."""
    return hint(R, E) // E


def fills(R: int | torch.SymInt, E: int, F: int, block_n: int) -> bool:
    """Whether tiles of 16 rows by `block_n` columns are enough programs for a device, if rows are few."""
    return min(hint(R, E), E) * triton.cdiv(F, block_n) >= FILL


def compile_cases(hip: bool = False) -> list[tuple]:
    """What can be launched: (setting, kernel, types, constants, num_warps, num_stages)."""
    E = 128
    args = {"offsets_ptr": "*i32", "tiles_ptr": "*i32", "R": "i32", "num_row_tiles": "i32"}
    constants = {"E": E, "GROUPS": triton.next_power_of_2(E + 1), "BLOCK_M": 128}
    return [("row tiles", _row_tiles_kernel, args, constants, 4, 3)]
