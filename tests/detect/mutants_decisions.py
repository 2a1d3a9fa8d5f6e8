"""Mutants: Python decides on data, not only on whether an expert has rows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.idioms import ChosenFromStartToEnd
from tests.detect.loops import E, Listed, Mlp, Stacked, mutant

# -- mutants: decisions ---------------------------------------------------------------------


@mutant("expert 2 adds nothing when some experts have no rows")
class IfAnyOfAnother(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if (ids == (e + 1) % E).any():
                t, k = torch.where(ids == e)
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("expert 2 adds nothing when some experts have no rows")
class IfAnyOfOtherToo(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if (ids == (e + 1) % E).any():
                if (ids == e).any():
                    t, k = torch.where(ids == e)
                    out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("expert 3 adds nothing when some experts have no rows")
class NestedDecisions(Listed):
    """Experts 1, 2, 3 run only if expert 0 has rows."""

    def add(self, out: Tensor, e: int, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        if e < E and (ids == e).any():
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.experts[e](x[t]) * weights[t, k, None])
            self.add(out, e + 1, x, ids, weights)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        self.add(out, 0, x, ids, weights)
        return out


@mutant("expert 2 adds nothing when some experts have no rows")
class RowsOfAnother(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if torch.where(ids == (e + 1) % E)[0].numel() == 0:
                continue
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("it decides on the number of rows that an expert gets (Eq(r, r))")
class AsManyRowsAsTheFirst(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        first = torch.where(ids == 0)[0].shape[0]
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y = expert(x[t]) * weights[t, k, None]
            if t.shape[0] == first:
                y = y * 2
            out.index_add_(0, t, y)
        return out


@mutant("it decides on the number of rows that an expert gets (r > 3)")
class MoreThanThreeRows(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.numel() > 3:
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("expert 0 adds nothing when an expert has one row")
class MoreThanOneRow(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.numel() > 1:
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("expert 2 adds something else when an expert has one row")
class OneRowByAnother(Listed):
    """Experts 2 and 3 are exchanged for a single row."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            other = {2: 3, 3: 2}.get(e, e) if t.numel() == 1 else e
            out.index_add_(0, t, self.experts[other](x[t]) * weights[t, k, None])
        return out


@mutant("Python decides on gt, not shown to say whether an expert was chosen")
class SumOfMaskAboveTwo(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.sum() > 2:
                t, k = torch.where(mask)
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("Python decides on lt, not shown to say whether an expert was chosen")
class BreaksAtTheLast(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if e > ids.max():
                break
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("BreaksAtEmpty.forward leaves a loop early, depending on data")
class BreaksAtEmpty(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.numel() == 0:
                break
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("what surrounds the sum differs when some experts have no rows")
class OtherwiseIfEmpty(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if (ids == e).any():
                t, k = torch.where(ids == e)
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
            else:
                out = out + 1
        return out


@mutant("what surrounds the sum differs when some experts have no rows")
class AfterwardsIfEmpty(Listed):
    """What follows the loop depends on whether expert 0 has rows."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        if (ids == 0).any():
            return out
        return out + 1


@mutant("what surrounds the sum differs when an expert has one row")
class AfterwardsIfOneRow(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out * 2 if torch.where(ids == 0)[0].numel() == 1 else out


@mutant("what surrounds the sum differs when some experts have no rows")
class EarlyReturn(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if not (ids == 0).any():
            return x
        return super().forward(x, ids, weights)


@mutant("a Python loop runs over nonzero, not shown to be the list of chosen experts")
class ChosenOfOtherIds(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        others = F.one_hot((ids + 1) % E, E).permute(2, 1, 0)
        for e in torch.greater(others.sum((-1, -2)), 0).nonzero():
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, self.expert(e[0], x[t]) * weights[t, k, None])
        return out


@mutant("Python takes a part of the list of chosen experts")
class AllChosenButTheFirst(ChosenFromStartToEnd):
    def chosen(self, hit: Tensor) -> Tensor:
        return hit[1:]


@mutant("Python takes a part of the list of chosen experts")
class AllChosenButTheLast(ChosenFromStartToEnd):
    def chosen(self, hit: Tensor) -> Tensor:
        return hit[:-1]


@mutant("Python takes a part of the list of chosen experts")
class EverySecondChosen(ChosenFromStartToEnd):
    def chosen(self, hit: Tensor) -> Tensor:
        return hit[::2]


@mutant("Python takes a part of the list of chosen experts")
class TwoOfTheChosen(ChosenFromStartToEnd):
    def chosen(self, hit: Tensor) -> Tensor:
        return hit[:2]


@mutant("ReadsInTheOtherBranchLater.forward carries seen from one iteration to the next and skips some")
class ReadsInTheOtherBranchLater(Listed):
    """An outer loop comes back to the `if` around the loop, by its other branch."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, seen = torch.zeros_like(x), -1
        for again in (False, True):
            if not again:
                for e, expert in enumerate(self.experts):
                    t, k = torch.where(ids == e)
                    if t.numel() > 0:
                        seen = e
                        out = out.index_add(0, t, expert(x[t]) * weights[t, k, None])
            else:
                out = out * (seen + 2)
        return out


@mutant("a Python loop runs over 4097 rows or numbers")
class TooLong(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        for number in torch.zeros(4097):
            x = x + number
        return super().forward(x, ids, weights)


@mutant("a Python loop runs over the rows of an expert")
class LoopsOverRows(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            for t in torch.where(ids == e)[0]:
                out[t] += expert(x[t])
        return out


# -- one answer remembered for a later expert, of more experts than have rows in a quick look -----------------


class EightExperts(Listed):
    """Whether somebody has the id 8, which no expert has, changes what expert 4 adds."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Mlp() for _ in range(8))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        known = bool((ids == 8).any())
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if self.skips(t):
                continue
            scale = 3.0 if not known and e == 4 else 1.0
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None] * scale)
        return out

    def skips(self, t: Tensor) -> bool:
        return False


@mutant("expert 4 adds something else when some experts have no rows")
class RemembersTheLastClass(EightExperts):
    pass


@mutant("expert 4 adds something else when some experts have no rows")
class RemembersAndSkips(EightExperts):
    def skips(self, t: Tensor) -> bool:
        return t.numel() == 0
