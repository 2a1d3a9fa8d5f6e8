"""Triton kernels for `moe_ep.dispatch`: sort the routed pairs by expert, gather their tokens.

    order_R, offsets_E   as counting_sort.py says
    x_RD[r]              = x_TD[order_R[r] // K]

Letters    T tokens, K experts per token, R = T*K pairs, E experts, D model width.
Types      x: bf16 | f16 | f32.  ids: any integer but bool.  order, offsets: i32.
Layout     All row-major; x and ids of other strides are copied first.  R < 2**31.
Cost       Memory bound: 2*R*D elements moved, and the sort, of one to three launches.  No host read, no atomics.
Gradient   None here: `moe_ep.dispatch` has it (an unweighted `combine`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

import moe_compile.ops
from moe_compile.kernels import counting_sort
from moe_compile.kernels.tiles import compiled

MAX_EXPERTS = 1022  # two bins are ours: 1024 counters per block
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# -- kernels --------------------------------------------------------------------------------


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
    _check(ids_TK, num_experts)
    return counting_sort.launch(ids_TK, num_experts)[:2]


@triton_op("moe_ep_triton::route_rows", mutates_args=())
def route_rows(ids_TK: Tensor, num_experts: int, tile_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(order_R, offsets_E, position_R, tiles): all that `gated_gemm`, `grouped_gemm` and `combine` want of a routing.

    tiles: i32[tiles, 3], the row tiles of `tile_rows` rows, at least 1.
    """
    _check(ids_TK, num_experts)
    if tile_rows < 1:
        raise ValueError(f"moe_ep_triton.route_rows: tiles of {tile_rows} rows, expected at least 1")
    return counting_sort.launch(ids_TK, num_experts, tile_rows)


@triton_op("moe_ep_triton::dispatch", mutates_args=())
def dispatch(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x_RD, offsets_E, order_R)."""
    if reason := why_not(x_TD, ids_TK, num_experts):
        raise ValueError(f"moe_ep_triton.dispatch: {reason}")
    order_R, offsets_E, *_ = counting_sort.launch(ids_TK, num_experts)
    x_TD, R, D, K = x_TD.contiguous(), order_R.shape[0], int(x_TD.shape[1]), int(ids_TK.shape[1])
    x_RD = x_TD.new_empty(R, D)
    block, warps = _launch_config(D)
    gather: Any = wrap_triton(_gather_kernel) if compiled(_gather_kernel) else _gather_kernel
    grid = (torch.sym_max(R, 1), max(triton.cdiv(D, block), 1))
    gather[grid](x_TD, order_R, x_RD, R, K, D, BLOCK_D=block, num_warps=warps)
    return x_RD, offsets_E, order_R


def _check(ids_TK: Tensor, num_experts: int) -> None:
    if reason := why_not_sort(ids_TK, num_experts):
        raise ValueError(f"moe_ep_triton.sort_by_expert: {reason}")


def _launch_config(D: int) -> tuple[int, int]:
    """(BLOCK_D, num_warps) of the gather."""
    return (2048, 4) if D > 1024 else (max(16, triton.next_power_of_2(D)), 2)


@sort_by_expert.register_fake
def _(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    return counting_sort.outputs(ids_TK, num_experts, 0)[:2]


@route_rows.register_fake
def _(ids_TK: Tensor, num_experts: int, tile_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return counting_sort.outputs(ids_TK, num_experts, tile_rows)


@dispatch.register_fake
def _(x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order_R, offsets_E, *_ = counting_sort.outputs(ids_TK, num_experts, 0)
    return x_TD.new_empty(order_R.shape[0], x_TD.shape[1]), offsets_E, order_R


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
    cases: list[tuple] = []
    for D in (768, 4096):
        block, warps = _launch_config(D)
        args = {"x_ptr": "*bf16", "order_ptr": "*i32", "out_ptr": "*bf16", "R": "i32"}
        constants = {"K": 8, "D": D, "BLOCK_D": block}
        cases.append((f"D={D}", _gather_kernel, args, constants, warps, 3))
    return cases


# -- references: the meaning of the ops, and the oracles of their tests ---------------------

sort_by_expert_reference = moe_compile.ops.sort_by_expert
dispatch_reference = moe_compile.ops.dispatch_reference
