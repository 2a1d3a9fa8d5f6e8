"""Mutants of capacities and of experts that nothing weighs: other tables, masks in other places, changes in between."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_capacity import CAPACITY, DroppedByToken, DroppedPairs, Unweighed, UnweighedMatrices
from tests.detect.loops import D, E, K, Listed, T, mutant

NOTHING = "nothing is summed over experts"
SELECTED = "rows are selected by select, which is not shown to say which ids are those of an expert"

# -- tables ---------------------------------------------------------------------------------


@mutant(SELECTED)
class KeptByPosition(DroppedPairs):
    """Not zeros and ones; where(...) selects the same, but == 1 would not."""

    def kept(self, mask: Tensor) -> Tensor:
        return (mask * mask.cumsum(0)).eq(1)


@mutant(SELECTED)
class KeptByTwo(DroppedPairs):
    def kept(self, mask: Tensor) -> Tensor:
        return (mask * (mask.cumsum(0) <= CAPACITY).int().mul(2)) == 1


@mutant(SELECTED.replace("select,", "select_1,"))
class KeptByBytes(DroppedPairs):
    """Truths seen as numbers of four bytes."""

    def kept(self, mask: Tensor) -> Tensor:
        four = (mask.cumsum(0) <= CAPACITY)[..., None].expand(-1, -1, -1, 4).contiguous()
        return (mask * four.view(torch.int32)[..., 0]) == 1


@mutant(SELECTED)
class KeptBySum(DroppedPairs):
    def kept(self, mask: Tensor) -> Tensor:
        return mask + (mask.cumsum(0) <= CAPACITY)


@mutant(SELECTED)
class KeptByOr(DroppedPairs):
    def kept(self, mask: Tensor) -> Tensor:
        return mask.bool() | (mask.cumsum(0) == CAPACITY)


@mutant(SELECTED)
class KeptWhereMissing(DroppedPairs):
    def kept(self, mask: Tensor) -> Tensor:
        return ~mask.bool() & (mask.cumsum(0) <= CAPACITY)


@mutant(SELECTED)
class KeptInOtherOrder(DroppedPairs):
    """The table as [K, T, E], which has other rows."""

    def kept(self, mask: Tensor) -> Tensor:
        wide = mask.reshape(K, -1, E)
        return (wide * (wide.cumsum(1) <= CAPACITY)).reshape(-1, K, E)


@mutant(SELECTED)
class KeptByBits(DroppedByToken):
    """2 & 1 is nothing."""

    def kept(self, mask: Tensor) -> Tensor:
        return mask & (mask.cumsum(0) <= CAPACITY)


@mutant(
    "a token that chose an expert twice counts once: the ids (ids_kept) are not shown to be distinct, as those of topk are",
    distinct=False,
    repeats=True,
)
class KeptTwice(DroppedByToken):
    pass


@mutant("a mask of numbers is an index: it picks rows 0 and 1", flat=True)
class NumbersAsIndex(Listed):
    """Rows 0 and 1, each many times."""

    def put(self, out: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        return out.index_add_(0, mask, y)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask, out = F.one_hot(ids, E).t(), torch.zeros_like(x)
        for e in range(E):
            out = self.put(out, mask[e], self.run(e, x[mask[e]]))
        return out


@mutant("a mask of numbers is an index: it picks rows 0 and 1", flat=True)
class NumbersAsIndexPut(NumbersAsIndex):
    def put(self, out: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        return out.index_put((mask,), y, accumulate=True)


@mutant("a mask of numbers is an index: it picks rows 0 and 1", flat=True)
class NumbersAsIndexAssigned(NumbersAsIndex):
    def put(self, out: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        out[mask] = out[mask] + y
        return out


@mutant(SELECTED)
class MaskInOtherOrder(Listed):
    """The rows of [T, K] as if there were K of T."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask, out = F.one_hot(ids, E).reshape(K, T, E), torch.zeros_like(x)
        for e in range(E):
            t, _ = torch.where(mask.select(2, e))
            out.index_add_(0, t, self.run(e, x[t]))
        return out


# -- changes in between ---------------------------------------------------------------------


@mutant(SELECTED)
class IdsChangeBeforeTheyAreKept(DroppedPairs):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ids, out = ids.clone(), torch.zeros_like(x)
        mask = F.one_hot(ids, E)
        ids.fill_(0)
        mask = self.kept(mask).permute(2, 1, 0)
        for e in range(E):
            k, t = torch.where(mask[e])
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@mutant("permute is read after it was changed in place through another name")
class TableChangesLater(DroppedPairs):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        table, out = self.kept(F.one_hot(ids, E)), torch.zeros_like(x)
        mask = table.permute(2, 1, 0)
        for e in range(E):
            k, t = torch.where(mask[e])
            out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
            table[:1] = 0
        return out


@mutant("view is read after it was changed in place through another name")
class TruthsChange(DroppedPairs):
    """Numbers that were truths."""

    def kept(self, mask: Tensor) -> Tensor:
        truths = (mask.cumsum(0) <= CAPACITY).int()
        seen = truths.view(-1, *mask.shape[1:])
        truths += 1
        return (mask * seen) == 1


# -- every expert on every token, and a mask ------------------------------------------------


@mutant(NOTHING, flat=True)
class UnweighedOthers(Unweighed):
    def mask(self, ids: Tensor, e: int) -> Tensor:
        return (ids != e)[:, None]


@mutant(NOTHING, flat=True)
class UnweighedTwice(Unweighed):
    def mask(self, ids: Tensor, e: int) -> Tensor:
        return (ids == e)[:, None] * 2


@mutant(NOTHING, flat=True, tokens=D)
class UnweighedFeatures(Unweighed):
    """Along the features, of which there are as many as tokens."""

    def mask(self, ids: Tensor, e: int) -> Tensor:
        return (ids == e)[None, :]


@mutant(NOTHING, flat=True, tokens=D)
class UnweighedFeaturesToo(Unweighed):
    def mask(self, ids: Tensor, e: int) -> Tensor:
        return ids == e


@mutant("expert 3 differs from expert 0: 2 where that has 1", flat=True)
class UnweighedScaled(Unweighed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return super().run(e, x) * (2 if e == E - 1 else 1)


@mutant("mean along dimension 0 lets rows depend on each other", flat=True)
class UnweighedMeans(Unweighed):
    def run(self, e: int, x: Tensor) -> Tensor:
        y = super().run(e, x)
        return y - y.mean(0)


@mutant("the loop visits experts [0, 1, 2, 2], not each of 0..3 once", flat=True)
class UnweighedRepeated(Unweighed):
    def mask(self, ids: Tensor, e: int) -> Tensor:
        return (ids == min(e, 2))[:, None]


@mutant(
    "a token that chose an expert twice counts once: the ids (ids) are not shown to be distinct, as those of topk are",
    distinct=False,
    repeats=True,
)
class UnweighedOnce(Unweighed):
    def mask(self, ids: Tensor, e: int) -> Tensor:
        return (ids == e).any(-1)[:, None]


@mutant("view to (22, 6) mixes rows and features", flat=True)
class MatricesJoined(UnweighedMatrices):
    """Softmax over all patches of all tokens."""

    def run(self, e: int, x: Tensor) -> Tensor:
        return super().run(e, x.view(-1, D).softmax(0).view_as(x))


@mutant(NOTHING, flat=True, tokens=2)
class MatricesByPatch(UnweighedMatrices):
    """The expert of each patch, not of each token."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        patches = torch.cat([x, x * 2 - 1], -1).view(-1, 2, D)
        out = torch.zeros_like(patches)
        for e in range(E):
            out = out + self.run(e, patches) * (ids == e)[None, :, None]
        return out.sum(1)
