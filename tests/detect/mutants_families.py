"""One class more than there are experts, whose visit is an error: idioms where it always is one, mutants where not."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.loops import E, Listed, Mlp, Stacked, idiom, mutant


def chosen(ids: Tensor, classes: int = E + 1) -> tuple[Tensor, Tensor]:
    """The mask by class, and the classes that somebody chose."""
    mask = F.one_hot(ids, classes).permute(2, 1, 0)
    return mask, torch.greater(mask.sum((-1, -2)), 0).nonzero().squeeze(-1)


class Visits(Stacked):
    """The loop of Nemotron-H.  `before` is what a mutant does first for each class, True to go on to the next one."""

    classes = E + 1

    def before(self, e: int, x: Tensor, ids: Tensor, weights: Tensor, t: Tensor) -> bool:
        return False

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x, dtype=weights.dtype)
        mask, hit = chosen(ids, self.classes)
        for i in hit:
            e = i.item()
            k, t = torch.where(mask[e])
            if t.numel() == 0:
                continue
            if self.before(e, x, ids, weights, t):
                continue
            out.index_add_(0, t, (self.expert(e, x[t]) * weights[t, k, None]).to(out.dtype))
        return out.to(x.dtype)


@idiom(distinct=False)
class ClassPastTheExperts(Visits):
    pass


@mutant("the loop fails at class 4, which is not told from pairs that are dropped")
class DroppedPastTheExperts(Stacked):
    """An id of the last class is an error unless it comes late."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        mask, out = F.one_hot(ids, E + 1), torch.zeros_like(x)
        mask = torch.logical_and(mask, mask.cumsum(0) <= 3).permute(2, 1, 0)
        for e in (mask.sum((1, 2)) > 0).nonzero():
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, self.expert(e[0], x[t]) * weights[t, k, None])
        return out


@idiom(distinct=False)
class ModulePastTheExperts(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask, hit = chosen(ids)
        for e in hit.tolist():
            expert = self.experts[e]
            k, t = torch.where(mask[e])
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@idiom(distinct=False)
class FactorsPastTheExperts(Stacked):
    """The first error is that of a list of numbers."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, factors = torch.zeros_like(x), [1.0] * E
        mask, hit = chosen(ids)
        for e in hit.tolist():
            k, t = torch.where(mask[e])
            y = factors[e] * x[t]
            out.index_add_(0, t, self.expert(e, y) * weights[t, k, None])
        return out


# -- mutants --------------------------------------------------------------------------------


@mutant("it does not run on fake tensors: IndexError: index 4 is out of bounds for dimension 0 with size 4")
class TwoClassesPast(Visits):
    classes = E + 2


@mutant("it does not run on fake tensors: IndexError: an expert is missing")
class ErrorAtAnExpert(Visits):
    def before(self, e: int, x: Tensor, ids: Tensor, weights: Tensor, t: Tensor) -> bool:
        if e == 1:
            raise IndexError("an expert is missing")
        return e == E


@mutant("it does not run on fake tensors: KeyError: '4'")
class KeyPastTheExperts(Stacked):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({str(e): Mlp() for e in range(E)})

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask, hit = chosen(ids)
        for e in hit.tolist():
            k, t = torch.where(mask[e])
            out.index_add_(0, t, self.experts[str(e)](x[t]) * weights[t, k, None])
        return out


@mutant("class 4 of 5 is not shown to be an error in all cases")
class ErrorIfTheFirstHasRows(Visits):
    def before(self, e: int, x: Tensor, ids: Tensor, weights: Tensor, t: Tensor) -> bool:
        if e == E and (ids == 0).any():
            raise IndexError("class 4 beside expert 0")
        return e == E


@mutant("what Python asks of the data depends on which experts have rows")
class ErrorIfOneOfTwoHasNoRows(Visits):
    """In the world with all experts, and in that with none of them, it is an error."""

    def before(self, e: int, x: Tensor, ids: Tensor, weights: Tensor, t: Tensor) -> bool:
        if e == E and ((ids == 1).any() or not (ids == 2).any()):
            raise IndexError("class 4 beside expert 1, or without expert 2")
        return e == E


@mutant("it decides on the number of rows that an expert gets (r > 3)")
class ErrorIfManyRows(Visits):
    def before(self, e: int, x: Tensor, ids: Tensor, weights: Tensor, t: Tensor) -> bool:
        if e == E and t.numel() > 3:
            raise IndexError("more than three rows without an expert")
        return e == E


@mutant("class 4 of 5 is not shown to be an error in all cases")
class ErrorUnlessOneRow(Visits):
    def before(self, e: int, x: Tensor, ids: Tensor, weights: Tensor, t: Tensor) -> bool:
        if e == E and t.numel() != 1:
            raise IndexError("rows without an expert")
        return e == E


@mutant("it decides on the number of rows that an expert gets (r <= 9999)")
class ErrorIfFewRows(Visits):
    """Row 9999 of those that chose nobody."""

    def before(self, e: int, x: Tensor, ids: Tensor, weights: Tensor, t: Tensor) -> bool:
        if e == E:
            x[t][9999]
        return e == E


@mutant("Python asks about gt, not shown to say which experts were chosen")
class ErrorByWeights(Visits):
    def before(self, e: int, x: Tensor, ids: Tensor, weights: Tensor, t: Tensor) -> bool:
        if e == E and weights.sum() > 0:
            raise IndexError("weights without an expert")
        return e == E


@mutant("ErrorAtTheFifth.forward calls append in a loop that skips iterations")
class ErrorAtTheFifth(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, seen = torch.zeros_like(x), []
        mask, hit = chosen(ids)
        for e in hit.tolist():
            seen.append(e)
            if len(seen) > E:
                raise IndexError("too many experts")
            k, t = torch.where(mask[e])
            out.index_add_(0, t, self.expert(min(e, E - 1), x[t]) * weights[t, k, None])
        return out


@mutant("expert 3 adds something else when some experts have no rows")
class ErrorAtTheEndOfAnother(Stacked):
    """A count that each visit moves on: an expert that nobody chose shifts the others."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, more = torch.zeros_like(x), 0
        mask, hit = chosen(ids)
        for e in hit.tolist():
            k, t = torch.where(mask[e])
            y = F.linear(x[t], self.w13[more])[:, :10]
            out.index_add_(0, t, F.linear(y, self.w2[more]) * weights[t, k, None])
            more = more + 1
        return out


@mutant("a Python loop runs over squeeze_1, not shown to be the list of chosen experts")
class ErrorByOtherIds(Stacked):
    """Which classes are visited says another tensor of ids."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask, _ = chosen(ids)
        _, hit = chosen((ids + 1).remainder(E))
        for e in hit.tolist():
            k, t = torch.where(mask[e])
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


@mutant("what Python asks of the data depends on which experts have rows")
class ErrorInAPrelude(Stacked):
    """The loop that visits the last class runs only if expert 1 has rows; the other one skips that class."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask, hit = chosen(ids)
        if (ids == 1).any():
            for c in hit.tolist():
                self.w2[c]
        for e in range(E):
            k, t = torch.where(mask[e])
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out


# -- mutants: how many rows an expert has ---------------------------------------------------


class Counted(Listed):
    def skip(self, e: int, rows: int, first: int) -> bool:
        return False

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        first = torch.where(ids == 0)[0].numel()
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if not self.skip(e, t.numel(), first):
                out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("it decides on the number of rows that an expert gets (Ne(r, 4))")
class LastSkipsFour(Counted):
    def skip(self, e: int, rows: int, first: int) -> bool:
        return e == E - 1 and rows == 4


@mutant("it decides on the number of rows that an expert gets (Ne(r, r + 1))")
class SkipsOneMoreThanTheFirst(Counted):
    def skip(self, e: int, rows: int, first: int) -> bool:
        return e == 1 and rows == first + 1
