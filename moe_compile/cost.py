"""A first cost table: which kernel a grouped GEMM gets on which device; and what a rewrite is estimated to save.

time_us = launches + max(FLOPs / rate, bytes / bandwidth), the larger of compute and memory time.  The rates are what
the sources below report or what arithmetic suggests; none is measured by this project yet.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

# TFLOP/s at many rows per expert, bf16.  CUTLASS and plain-pointer Triton grouped GEMMs on an H200 with long
# contiguous rows: 597-624 and 469-490 (tile-ai/TileOPs pull request 1567).  Unmeasured here.
RATE = {"triton": 480.0, "grouped_mm": 600.0}
BANDWIDTH = 4.0e3  # GB/s; 4.3 measured for copies on an H200 by others
LAUNCH_US = {"triton": 8.0, "grouped_mm": 14.0}  # the grouped kernel first sets up its problem list
TILE_ROWS = {"triton": 16, "grouped_mm": 128}  # rows that a tile computes even if an expert has fewer

aten = torch.ops.aten


def grouped_gemm_us(kernel: str, x_RD: Tensor, w_EFD: Tensor) -> float:
    """Estimated microseconds of y = x @ w[e].T on one device, balanced routing.

    The number of rows may be symbolic: then the caller's example size counts, and adds no guard.
    """
    E, F, D = (int(s) for s in w_EFD.shape)
    rows = hint(x_RD.shape[0])
    padded = max(rows, E * min(TILE_ROWS[kernel], max(rows // E, 1) * 2))
    flops = 2.0 * padded * F * D
    moved = x_RD.element_size() * (rows * (D + F) + E * F * D)
    return LAUNCH_US[kernel] + max(flops / RATE[kernel] / 1e6, moved / BANDWIDTH / 1e3)


def hint(size: int | torch.SymInt) -> int:
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.hint is not None else 4096
    return int(size)


# -- what a rewrite saves -------------------------------------------------------------------


@dataclass(frozen=True)
class Gain:
    """Forward work of a function with a region, as it was written and as rewritten: arithmetic, nothing is measured.

    flops: of the experts' products.  launches: calls that compute something, before any fusion.
    """

    flops_before: float
    flops_after: float
    launches_before: int
    launches_after: int

    def __str__(self) -> str:
        flops = f"{short(self.flops_after)}FLOP"
        if self.flops_before != self.flops_after:
            flops += f" instead of {short(self.flops_before)}FLOP"
        after = f"{self.launches_after} launch{'es' * (self.launches_after != 1)}"
        return f"{flops}, {after} instead of {self.launches_before}"


def product_flops(node: Node, form: str) -> tuple[float, float]:
    """FLOPs of the products of an `experts` node: in a region of this form, and as rewritten.

    A dense form multiplies every token by every expert, all others only the rows that were routed.
    """
    ids, body_attr, num_experts = node.args[0], node.args[5], node.args[6]
    assert isinstance(ids, Node) and isinstance(body_attr, Node) and isinstance(num_experts, int)
    body = getattr(node.graph.owning_module, str(body_attr.target))
    weights = [n.args[1] for n in body.graph.nodes if n.target in (aten.linear.default, aten.matmul.default)]
    tokens, top_k = (hint(s) for s in ids.meta["val"].shape)
    per_token = tokens * sum(2.0 * w.meta["val"].numel() for w in weights)
    return per_token * (num_experts if form == "dense" else top_k), per_token * top_k


def computing(graph: Graph) -> list[str]:
    """The ops of a graph, in order, that compute something: neither views nor parts of a result."""
    return [n.target._schema.name.removeprefix("aten::") for n in graph.nodes if computes(n)]


def computes(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return any(r.alias_info is None or r.alias_info.is_write for r in returns)


def short(number: float) -> str:
    """1234567 -> "1.2 M", for a unit to follow."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} "
