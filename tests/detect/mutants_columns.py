"""Mutants of loops over the columns of the ids."""

import torch
from torch import Tensor

from tests.detect.idioms_columns import ColumnsFirst
from tests.detect.loops import E, K, Listed, mutant


@mutant("expert 0 adds something else for column 1 of its ids than for column 0")
class SecondScaled(ColumnsFirst):
    def rows(self, x: Tensor, mask: Tensor, k: int) -> Tensor:
        return x[mask] * (k + 1)


@mutant("column 1 of the weights is read for the rows of expert 0")
class WeighedByTheOther(ColumnsFirst):
    def weigh(self, weights: Tensor, mask: Tensor, k: int, e: int) -> Tensor:
        return weights[mask, 1 - k].unsqueeze(1)


@mutant("column 0 of the weights is read for the rows of expert 1")
class WeighedByTheFirst(ColumnsFirst):
    def weigh(self, weights: Tensor, mask: Tensor, k: int, e: int) -> Tensor:
        return weights[mask, 0].unsqueeze(1)


@mutant("column 2 of the weights is read for the rows of expert 0")
class WeighedByThree(ColumnsFirst):
    """A column of a wider table."""

    def weigh(self, weights: Tensor, mask: Tensor, k: int, e: int) -> Tensor:
        return weights.repeat(1, 2)[mask, k + 2].unsqueeze(1)


@mutant("expert 0 adds something else for column 1 of its ids than for column 0")
class WeighedWithoutGradient(ColumnsFirst):
    """A column that is taken under no_grad has no gradient."""

    def weigh(self, weights: Tensor, mask: Tensor, k: int, e: int) -> Tensor:
        with torch.no_grad():
            column = weights[:, k]
        return column[mask].unsqueeze(1)


@mutant("the loop visits columns [0] of expert 1, of 2")
class SecondLeftOut(ColumnsFirst):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for k in range(K):
            for e in range(E if k == 0 else 1):
                mask = ids[:, k] == e
                out[mask] += self.run(e, x[mask]) * weights[mask, k].unsqueeze(1)
        return out


@mutant("the loop visits expert 0 of column 1 twice")
class SecondTwice(ColumnsFirst):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for k in (0, 1, 1):
            for e in range(E):
                mask = ids[:, k] == e
                out[mask] += self.run(e, x[mask]) * weights[mask, k].unsqueeze(1)
        return out


@mutant("expert 0 adds something else for column 1 of its ids than for column 0")
class OtherExpertsForTheSecond(ColumnsFirst):
    """Column 1 is of other experts, numbered backwards."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for k in range(K):
            for e in range(E):
                mask = ids[:, k] == e
                out[mask] += self.run(E - 1 - e if k else e, x[mask]) * weights[mask, k].unsqueeze(1)
        return out


@mutant("aten.index_put_ at file.py overwrites what was added by other ids")
class SecondOverwrites(Listed):
    """A token's second expert, in the place of its first."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for k in range(K):
            for e in range(E):
                mask = ids[:, k] == e
                out[mask] = self.run(e, x[mask]) * weights[mask, k].unsqueeze(1)
        return out


@mutant("aten.index_put_ at file.py overwrites what was added by other ids")
class SecondAssigned(Listed):
    """The other way round: what the first column added is lost."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for k in range(K):
            for e in range(E):
                mask = ids[:, k] == e
                if k == 1:
                    out[mask] = self.run(e, x[mask]) * weights[mask, k, None]
                else:
                    out[mask] += self.run(e, x[mask]) * weights[mask, k, None]
        return out


@mutant("nothing is summed over experts")
class ColumnsOnAllTokens(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for k in range(K):
            for e in range(E):
                out = out + (ids[:, k] == e).unsqueeze(-1) * weights[:, k : k + 1] * self.run(e, x)
        return out


@mutant("nothing is summed over experts")
class PickedOfStack(Listed):
    """An index from the end would pick a row here, and is an error of a gather."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        stack = torch.stack([expert(x) for expert in self.experts], 1)
        return (stack[torch.arange(x.shape[0])[:, None], ids] * weights[..., None]).sum(1)


@mutant("the iterations choose their rows in different ways")
class ColumnsOfTwoTables(ColumnsFirst):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, other = torch.zeros_like(x), ids.flip(0)
        for k in range(K):
            for e in range(E):
                mask = (other if k else ids)[:, k] == e
                out[mask] += self.run(e, x[mask]) * weights[mask, k].unsqueeze(1)
        return out


@mutant("expert 5 adds nothing when some experts have no rows")
class IfTheFirst(Listed):
    """All of an expert's pairs go if no token has it in the first column."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            if not (ids[:, 0] == e).any():
                continue
            for k in range(K):
                mask = ids[:, k] == e
                out[mask] += self.run(e, x[mask]) * weights[mask, k].unsqueeze(1)
        return out


@mutant("expert 0 adds nothing when some experts have no rows")
class IfTheOther(ColumnsFirst):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for k in range(K):
            for e in range(E):
                mask = ids[:, k] == e
                if (ids[:, 1 - k] == e).any():
                    out[mask] += self.run(e, x[mask]) * weights[mask, k].unsqueeze(1)
        return out


@mutant("Python decides on any_1, not shown to say whether an expert was chosen")
class IfTheFirstOfAll(Listed):
    """All pairs of an expert, if a token has it in the first column."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            if (ids[:, 0] == e).any():
                t, k = torch.where(ids == e)
                out.index_add_(0, t, self.run(e, x[t]) * weights[t, k, None])
        return out


@mutant("the iterations choose their rows in different ways", forward_only=True, distinct=False)
class ColumnsChange(ColumnsFirst):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, ids = torch.zeros_like(x), ids.clone()
        for k in range(K):
            for e in range(E):
                mask = ids[:, k] == e
                out[mask] += self.run(e, x[mask]) * weights[mask, k].unsqueeze(1)
            ids.add_(1).remainder_(E)
        return out
