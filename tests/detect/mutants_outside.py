"""Mutants: what is used or changed outside of the loop, and other doubts."""

import contextlib
import random

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.loops import D, E, Listed, Stacked, mutant

# -- mutants: what is used outside ----------------------------------------------------------


@mutant("what the loop selects is used outside of it too (unbind)")
class LeaksRows(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out, penalty = torch.zeros_like(x), torch.zeros(())
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y = expert(x[t])
            penalty = penalty + y.square().sum()
            out.index_add_(0, t, y * weights[t, k, None])
        return out, penalty


@mutant("what surrounds the sum differs when some experts have no rows")
class LeaksNumberOfRows(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out / (1 + torch.where(ids == 0)[0].shape[0])


@mutant("aten.index_put_ at file.py is not known to be row-wise (it reads index)")
class LeaksSelection(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        out[t] = 0
        return out


@mutant("view is read after it was changed in place through another name")
class ReadsAlias(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        alias = out.view(-1)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out + alias.sum()


@mutant("zeros is read after it was changed in place through another name")
class ReadsAliasOfAlias(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        big = torch.zeros(2, *x.shape)
        out = big[0]
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return big.sum(0)


@mutant("aten.index_add_ at file.py changes an input of the region in place")
class AddsIntoInput(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = x.detach().view(x.shape)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, (expert(x[t]) * weights[t, k, None]).detach())
        return out


@mutant("aten.linear at file.py is not known to be row-wise (it reads sumread)")
class AddsIntoWhatItReads(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = x * 1.0
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            rows = rows.index_add(0, t, expert(rows[t]) * weights[t, k, None])
        return rows


@mutant("expert 1 differs from expert 0: it reads token mul_, that one token clone")
class ChangesInput(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        x = x.detach().clone()
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
            x.mul_(0.5)
        return out


@mutant("expert 1 differs from expert 0: it reads slice mul_, that one slice mul", forward_only=True)
class ChangesWeights(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        w = self.w13 * 1.0
        for e in range(E):
            t, k = torch.where(ids == e)
            gate, up = F.linear(x[t], w[e]).chunk(2, -1)
            out.index_add_(0, t, F.linear(F.silu(gate) * up, self.w2[e]) * weights[t, k, None])
            w.mul_(0.5)
        return out


@mutant("the iterations choose their rows in different ways")
class ChangesIds(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        ids = ids.clone()
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
            ids.masked_fill_(ids == e, E - 1)
        return out


@mutant("aten.linear at file.py runs under no_grad inside the expert loop")
class NoGradForOne(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        with torch.no_grad() if e == 1 else contextlib.nullcontext():
            return self.experts[e](x)


@mutant("aten.mul.Tensor at file.py runs under no_grad inside the expert loop")
class NoGradInside(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
        return self.experts[e](x) + y


@mutant("what surrounds the sum differs when some experts have no rows")
class CountsList(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        hits = torch.greater(mask.sum((-1, -2)), 0).nonzero().squeeze(-1).tolist()
        for e in hits:
            k, t = torch.where(mask[e])
            out.index_add_(0, t, self.expert(e, x[t]) * weights[t, k, None])
        return out * 2 if len(hits) == 3 else out


@mutant("it decides on the number of rows that an expert gets (Ne(r, 3))")
class CountsTable(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        hits = torch.greater(mask.sum((-1, -2)), 0).nonzero()
        for e in hits:
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, self.expert(e[0], x[t]) * weights[t, k, None])
        return out * 2 if hits.shape[0] == 3 else out


@mutant("expert 3 adds something else when some experts have no rows")
class NextExpert(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        experts = iter(self.experts)
        for e in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            k, t = torch.where(mask[e[0]])
            out.index_add_(0, t, next(experts)(x[t]) * weights[t, k, None])
        return out


@mutant("it changes a default of KeepsInDefault.run when it runs")
class KeepsInDefault(Listed):
    def run(self, e: int, x: Tensor, seen: list = []) -> Tensor:  # type: ignore[type-arg]  # noqa: B006
        seen.append(e)
        return self.experts[e](x)


@mutant("it reads a tensor that is neither an argument nor a parameter or buffer of its module")
class ChangesData(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        y = self.experts[e](x)
        self.experts[e].up.weight.data.mul_(0.5)
        return y


@mutant("linear_1 is read after it was changed in place through another name")
class InPlaceOnView(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        h = self.experts[e](x)
        h[:, :2].mul_(2)
        return h


@mutant("aten.sub.Tensor at file.py is not known to be row-wise (it reads index)")
class PreviousToken(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t - 1]) * weights[t, k, None])
        return out


@mutant("a tokengrid is used as a number")
class TokenAsNumber(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * t[:, None])
        return out


@mutant("aten.index_add_ at file.py does not add rows to tokens along dimension 0 with factor 1")
class AddsAtChoice(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, k, expert(x[t]) * weights[t, k, None])
        return out


@mutant("aten.flip at file.py is not known to be row-wise (it reads index)")
class AddsBackwards(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t.flip(0), expert(x[t]) * weights[t, k, None])
        return out


@mutant("column 0 of the weights is read for the rows of expert 1")
class FirstWeight(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, 0, None])
        return out


@mutant("aten.sort at file.py is not known to be row-wise (it reads rows)")
class SortedRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x).sort(0).values


@mutant("linalg_vector_norm along dimension 0 lets rows depend on each other")
class NormOverRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return F.normalize(self.experts[e](x), dim=0)


@mutant("sym_size_int, a size known only at run time, is used in the expert")
class LayerNormOverRows(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return F.layer_norm(self.experts[e](x), x.shape)


@mutant("mean reduces over all rows")
class AboveMean(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x).masked_fill(x > x.mean(), 0)


@mutant("aten.pad at file.py is not known to be row-wise (it reads rows)")
class AddsNeighbour(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        y = self.experts[e](x)
        return y + F.pad(y, (0, 0, 1, 0))[:-1]


@mutant("the sum is (11, 6), its terms are (7919, 1), the expert ids are (11, 2)")
class AssignsBroadcast(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_put_((t,), expert(x[t]).sum(-1, keepdim=True), accumulate=True)
        return out


@mutant("no weight belongs to an expert")
class ZeroesChosen(Listed):
    """Changes the sum between two iterations."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
            out.mul_(0.5)
        return out


@mutant("no weight belongs to an expert")
class Clamped(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out = out.index_add(0, t, expert(x[t]) * weights[t, k, None]).clamp(-1, 1)
        return out


@mutant("aten.index_add_ at file.py adds into memory that was never set")
class EmptyBuffer(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return torch.nan_to_num(out) * 0  # memory not set may hold NaN, and NaN * 0 is NaN


@mutant("aten.index_put_ at file.py overwrites what another expert of the same token wrote")
class OnesBuffer(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.ones_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out[t] = expert(x[t]) * weights[t, k, None]
        return out


@mutant("Python asks about nonzero_1, not shown to say which experts were chosen")
class ReportsOther(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if torch.where((ids + 1) % E == e)[0].numel() == 0:
                continue
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


@mutant("expert 1 differs from expert 0: # where that has #")
class RandomScale(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) * random.random()


@mutant("", late=True)
class RandomScaleForAll(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x * random.random(), ids, weights)


@mutant("no weight belongs to an expert")
class SingleExpert(Listed):
    """Right, but nothing tells an expert's weights from shared ones."""

    def __init__(self) -> None:
        super().__init__(num_experts=1)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, ids * 0, weights)


@mutant("expert 4 adds nothing when some experts have no rows")
class TwoInTheMiddle(Listed):
    """Of nine experts, 4 and 5 run if the other one was chosen."""

    def __init__(self) -> None:
        super().__init__(num_experts=9)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ids = ids * 2 + 1
        out = torch.zeros_like(x)
        for e in range(9):
            if (ids == {4: 5, 5: 4}.get(e, e)).any():
                t, k = torch.where(ids == e)
                out.index_add_(0, t, self.experts[e](x[t]) * weights[t, k, None])
        return out


@mutant("expert 4 adds nothing when some experts have no rows")
class TwoInTheMiddleByRows(Listed):
    def __init__(self) -> None:
        super().__init__(num_experts=9)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ids = ids * 2 + 1
        out = torch.zeros_like(x)
        for e in range(9):
            if torch.where(ids == {4: 5, 5: 4}.get(e, e))[0].shape[0] > 0:
                t, k = torch.where(ids == e)
                out.index_add_(0, t, self.experts[e](x[t]) * weights[t, k, None])
        return out


@mutant("aten.to.dtype at file.py runs in an autocast region of its own")
class NoAutocastInside(Listed):
    """Under autocast the experts stay in float32."""

    def run(self, e: int, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.experts[e](x.float())


@mutant("aten.linear at file.py runs in an autocast region of its own")
class AutocastInside(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.experts[e](x).float()


@mutant("Reseeds.run (file.py) sets the state of random numbers (manual_seed)")
class Reseeds(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return self.experts[e](x)


@mutant(
    "it does not run on fake tensors: UnboundLocalError: cannot access local variable 'y' where it is not associated with a value"
)
class ReadsBeforeItSets(Listed):
    """Runs while the first expert has few rows."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.shape[0] > 10:
                y = y * 2  # type: ignore[has-type]  # noqa: F821
            y = expert(x[t])
            out.index_add_(0, t, y * weights[t, k, None])
        return out


@mutant("mul is changed in place while results are added to it")
class StartChanges(Listed):
    """Results are added to a copy of it, out of place."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        start = x * 1.0
        out = start
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out = out.index_add(0, t, expert(x[t]) * weights[t, k, None])
            if e == 1:
                start.mul_(2)
        return out


# -- what outlives the call, changed expert by expert ---------------------------------------


class Loads(Listed):
    """`note` is what a mutant changes: a buffer keeps something of each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(E, D))

    def note(self, e: int, mask: Tensor, t: Tensor, y: Tensor) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            y = self.run(e, x[t])
            self.note(e, ids == e, t, y.detach())
            out.index_add_(0, t, y * weights[t, k, None])
        return out


@mutant("aten.copy_ at file.py changes an input of the region in place")
class KeepsHowMany(Loads):
    def note(self, e: int, mask: Tensor, t: Tensor, y: Tensor) -> None:
        self.load[e] += mask.sum()


@mutant("aten.add_.Tensor at file.py changes an input of the region in place")
class KeepsTokens(Loads):
    def note(self, e: int, mask: Tensor, t: Tensor, y: Tensor) -> None:
        self.load.add_(t.sum())


@mutant("aten.add_.Tensor at file.py changes an input of the region in place")
class KeepsInSlice(Loads):
    def note(self, e: int, mask: Tensor, t: Tensor, y: Tensor) -> None:
        self.load[e].add_(1)


@mutant("aten.lerp_.Scalar at file.py changes an input of the region in place")
class KeepsMean(Loads):
    def note(self, e: int, mask: Tensor, t: Tensor, y: Tensor) -> None:
        self.load[e].lerp_(y.sum(0), 0.1)
