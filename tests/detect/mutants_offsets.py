"""Mutants of loops whose offsets are sums of tensors: other sums, sums that were changed, and sums that count."""

from typing import Any

import torch
from torch import Tensor

from tests.detect.idioms_counts import Inferred
from tests.detect.loops import E, K, mutant

BOUNDS = (
    "moe_ep_capture.rows_between at file.py slices between numbers that are not where an expert's rows begin and end"
)


class ByTensors(Inferred):
    """The offset after the expert whose rows lie from `start` on, and the list of all sizes."""

    def outputs(self, rows: Tensor, sizes: Any) -> Tensor:
        outputs = []
        start = 0
        for e, size in enumerate(sizes):
            end = self.after(start, size, sizes, e)
            if size == 0:
                continue
            outputs.append(self.experts[e](rows[start:end]))
            start = end
        return torch.cat(outputs, dim=0) if outputs else rows.new_empty(0)

    def read(self, counts: Tensor) -> Any:
        return counts

    def after(self, start: Any, size: Tensor, sizes: Tensor, e: int) -> Any:
        raise NotImplementedError


@mutant(BOUNDS)
class OneRowMore(ByTensors):
    def after(self, start: Any, size: Tensor, sizes: Tensor, e: int) -> Any:
        return start + size + 1


@mutant(BOUNDS)
class SizeTwice(ByTensors):
    def after(self, start: Any, size: Tensor, sizes: Tensor, e: int) -> Any:
        return start + size + size


@mutant(BOUNDS)
class SizeScaled(ByTensors):
    def after(self, start: Any, size: Tensor, sizes: Tensor, e: int) -> Any:
        return torch.add(start, size, alpha=2) if e else size * 2


@mutant(BOUNDS)
class SumAddedTo(ByTensors):
    """In place, and nothing in the end; but nobody looks twice."""

    def after(self, start: Any, size: Tensor, sizes: Tensor, e: int) -> Any:
        end = start + size
        end += 1
        return end


@mutant("add is read after it was changed in place through another name")
class SumAddedToByAnotherName(ByTensors):
    def after(self, start: Any, size: Tensor, sizes: Tensor, e: int) -> Any:
        end = start + size
        end.view(1).add_(1)
        return end


@mutant("getitem is read after it was changed in place through another name")
class SizesChangedMeanwhile(ByTensors):
    """Each size is one more when it is added than when it was asked about."""

    def after(self, start: Any, size: Tensor, sizes: Tensor, e: int) -> Any:
        sizes.add_(1)
        return start + size


@mutant("moe_ep_capture.rows_between at file.py slices rows by the counts of other ids")
class SizesOfOtherIds(ByTensors):
    def others(self, ids: Tensor) -> Tensor:
        return torch.randn(ids.shape[0], E).topk(K)[1]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = self.order(ids)
        y = self.outputs(self.rows(x, order), self.counts(self.others(ids)))
        return self.total(self.unsort(y, order), ids, weights)

    def after(self, start: Any, size: Tensor, sizes: Tensor, e: int) -> Any:
        return start + size


@mutant("expert 1 differs from expert 0: leaf('outer', 'add') where that has 0")
class OffsetIsUsed(Inferred):
    """It says how many rows came before."""

    def read(self, counts: Tensor) -> Any:
        return counts

    def outputs(self, rows: Tensor, sizes: Any) -> Tensor:
        outputs = []
        start: Any = 0
        for e, size in enumerate(sizes):
            end = start + size
            if size == 0:
                continue
            outputs.append(self.experts[e](rows[start:end]) * (1 + 0 * size) + start)
            start = end
        return torch.cat(outputs, dim=0) if outputs else rows.new_empty(0)


@mutant("expert 1 differs from expert 0: 2 where that has 1")
class TensorThatCounts(Inferred):
    """A constant in a tensor, that says how many iterations ran."""

    def read(self, counts: Tensor) -> Any:
        return counts

    def outputs(self, rows: Tensor, sizes: Any) -> Tensor:
        outputs = []
        start: Any = 0
        ran = torch.tensor(0)
        for e, size in enumerate(sizes):
            end = start + size
            if size == 0:
                continue
            ran = ran + 1
            outputs.append(self.experts[e](rows[start:end]) * int(ran))
            start = end
        return torch.cat(outputs, dim=0) if outputs else rows.new_empty(0)


@mutant("Inferred.outputs carries start from one iteration to the next and skips some")
class LastOffsetIsUsed(Inferred):
    def read(self, counts: Tensor) -> Any:
        return counts

    def outputs(self, rows: Tensor, sizes: Any) -> Tensor:
        outputs = []
        start: Any = 0
        for e, size in enumerate(sizes):
            end = start + size
            if size == 0:
                continue
            outputs.append(self.experts[e](rows[start:end]))
            start = end
        return torch.cat(outputs, dim=0) * end / K if outputs else rows.new_empty(0)
