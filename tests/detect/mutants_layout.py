"""How rows lie in memory, which Python can see: an expert's only row is contiguous, however several would lie."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.loops import FF, E, Stacked, idiom, mutant


class Halves(Stacked):
    """`sign` is what a mutant changes."""

    def sign(self, t: Tensor, gate: Tensor) -> Any:
        return 1.0

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            gate, up = F.linear(x[t], self.w13[e]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, self.w2[e]) * self.sign(t, gate)
            out.index_add_(0, t, y * weights[t, k, None])
        return out


@idiom(any_ids=True)
class IndicesLieAsTheyDo(Halves):
    """The columns of the table that `nonzero` gives lie one behind the other."""

    def sign(self, t: Tensor, gate: Tensor) -> Any:
        return 1.0 if t.is_contiguous() and t.stride(0) == 1 else -1.0


@idiom(any_ids=True)
class RowsThatAreAlwaysContiguous(Halves):
    def sign(self, t: Tensor, gate: Tensor) -> Any:
        return 1.0 if gate.exp().contiguous().is_contiguous() else -1.0


@mutant("Python looks at how an expert's rows lie in memory (is_contiguous): one row may lie otherwise", distinct=False)
class ContiguousIfAlone(Halves):
    def sign(self, t: Tensor, gate: Tensor) -> Any:
        return -1.0 if gate.is_contiguous() else 1.0


@mutant("Python looks at how an expert's rows lie in memory (dim_order): one row may lie otherwise", distinct=False)
class OrderOfDimensions(Halves):
    def sign(self, t: Tensor, gate: Tensor) -> Any:
        return -1.0 if gate.t().dim_order() == (0, 1) else 1.0


@idiom(any_ids=True)
class CopiedThenChanged(Stacked):
    """`changed` is what a mutant does first: of one row `contiguous` gives the row itself."""

    def changed(self, h: Tensor) -> Tensor:
        return torch.cat([h[:, :FF].contiguous(), h[:, FF:].clone().mul_(2.0)], -1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            h = F.linear(x[t], self.w13[e])
            gate, up = self.changed(h).chunk(2, -1)
            out.index_add_(0, t, F.linear(F.silu(gate) * up, self.w2[e]) * weights[t, k, None])
        return out


@mutant(
    "aten.mul_.Tensor at file.py changes in place what aten.contiguous at file.py copies unless it is a single row",
    distinct=False,
)
class ChangedIfAlone(CopiedThenChanged):
    def changed(self, h: Tensor) -> Tensor:
        h[:, :FF].contiguous().mul_(2.0)
        return h


@mutant(
    "aten.mul_.Tensor at file.py changes in place what aten.reshape at file.py copies unless it is a single row",
    distinct=False,
)
class ShapedCopyIfAlone(CopiedThenChanged):
    def changed(self, h: Tensor) -> Tensor:
        h[:, FF:].reshape(-1).mul_(2.0)
        return h


@mutant(
    "aten.mul_.Tensor at file.py changes in place what aten.contiguous at file.py copies unless it is a single row",
    distinct=False,
)
class ReadsTheCopy(CopiedThenChanged):
    def changed(self, h: Tensor) -> Tensor:
        copied = h[:, :FF].contiguous()
        h.mul_(2.0)
        return torch.cat([copied, h[:, FF:]], -1)


@mutant(
    "SameIfAlone.changed asks whether two values are one object, as contiguous() of an expert's only row is the row",
    distinct=False,
)
class SameIfAlone(CopiedThenChanged):
    def changed(self, h: Tensor) -> Tensor:
        gate = h[:, :FF]
        return -h if gate.contiguous() is gate else h
