"""Mutants of lists of tokens: experts that mix rows or differ, lists of other lengths, changes in between."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.detect.idioms_choice import ChoiceOfAll, ChoiceOfStacked, ExpertChoice
from tests.detect.loops import E, mutant

NOTHING = "nothing is summed over experts"


@mutant("mean along dimension 0 lets rows depend on each other")
class ListMeans(ExpertChoice):
    def run(self, e: int, x: Tensor) -> Tensor:
        y = super().run(e, x)
        return y - y.mean(0)


@mutant("softmax along dimension 0 lets rows depend on each other")
class ListSoftmax(ExpertChoice):
    def run(self, e: int, x: Tensor) -> Tensor:
        return super().run(e, x).softmax(0)


@mutant("expert 2 differs from expert 0: aten.relu where that has aten.linear")
class ListOtherActivation(ExpertChoice):
    def run(self, e: int, x: Tensor) -> Tensor:
        y = super().run(e, x)
        return y.relu() if e == 2 else y


@mutant("expert 3 differs from expert 0: 2 where that has 1")
class ListScaled(ExpertChoice):
    def run(self, e: int, x: Tensor) -> Tensor:
        return super().run(e, x) * (2 if e == E - 1 else 1)


@mutant("no weight belongs to an expert")
class ListOfOneExpert(ExpertChoice):
    def run(self, e: int, x: Tensor) -> Tensor:
        return super().run(0, x)


@mutant("dropout with p = 0.5 draws random numbers expert by expert")
class ListDropout(ExpertChoice):
    def run(self, e: int, x: Tensor) -> Tensor:
        return F.dropout(super().run(e, x), 0.5)


@mutant("the grad mode changes among the experts of a dense sum")
class ListNoGrad(ExpertChoice):
    def run(self, e: int, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().run(e, x)


@mutant(NOTHING)
class ListTwice(ExpertChoice):
    def put(self, out: Tensor, tokens: Tensor, y: Tensor) -> Tensor:
        return out.index_add(0, tokens, y, alpha=2)


@mutant(NOTHING)
class ListAssigned(ExpertChoice):
    """The last expert of a token wins."""

    def put(self, out: Tensor, tokens: Tensor, y: Tensor) -> Tensor:
        return out.index_copy(0, tokens, y)


@mutant("3 experts are used, w2 holds 4")
class ListOfThree(ChoiceOfStacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tokens, out = x[:, :E].t().topk(3)[1], torch.zeros_like(x)
        for e in range(E - 1):
            out.index_add_(0, tokens[e], self.expert(e, x[tokens[e]]))
        return out


@mutant("the lists of tokens are not of one length: [1, 2, 3, 4]")
class ListsGrow(ExpertChoice):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tokens, out = x[:, :E].t().topk(E)[1], torch.zeros_like(x)
        for e in range(E):
            token = tokens[e, : e + 1]
            out.index_add_(0, token, self.run(e, x[token]))
        return out


@mutant(NOTHING)
class ListReadsSum(ExpertChoice):
    """Each expert reads what those before it made."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, tokens = self.lists(x, weights)
        out = torch.zeros_like(x)
        for e in range(E):
            out = out.index_add(0, tokens[e], self.run(e, (x + out)[tokens[e]]))
        return out


@mutant("aten.mul_.Tensor at file.py changes a value outside of the expert", forward_only=True)
class ListTokensChange(ExpertChoice):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, tokens = self.lists(x, weights)
        x, out = x * 1.0, torch.zeros_like(x)
        for e in range(E):
            out.index_add_(0, tokens[e], self.run(e, x[tokens[e]]))
            x.mul_(1.5)
        return out


@mutant("getitem_1 is read after it was changed in place through another name", forward_only=True)
class ListsChange(ExpertChoice):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, tokens = self.lists(x, weights)
        out = torch.zeros_like(x)
        for e in range(E):
            token = tokens[0]
            out.index_add_(0, token, self.run(e, x[token]))
            tokens[0] = tokens[1]
        return out


@mutant("index is read after it was changed in place through another name", forward_only=True)
class ListRowsChange(ChoiceOfAll):
    """An expert changes the rows that all of them share."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, tokens = self.lists(x, weights)
        rows, out = x[tokens], torch.zeros_like(x)
        for e in range(E):
            out.index_add_(0, tokens[e], self.run(e, rows[e].mul_(2) + rows[0]))
        return out


@mutant("what aten.index_add_ at file.py changes is read elsewhere")
class ListSumSeen(ExpertChoice):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gates, tokens = self.lists(x, weights)
        out = torch.zeros_like(x)
        seen = out.view(-1)
        for e in range(E):
            out.index_add_(0, tokens[e], self.run(e, x[tokens[e]]))
        return out, seen * 2


@mutant("mul is changed in place while results are added to it")
class ListStartChanges(ExpertChoice):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, tokens = self.lists(x, weights)
        start = x * 2
        out = start
        for e in range(E):
            out = out.index_add(0, tokens[e], self.run(e, x[tokens[e]]))
            if e == 1:
                start.mul_(2)
        return out


@mutant(NOTHING)
class ListIntoNothing(ExpertChoice):
    """Memory that was never set, and then set."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, tokens = self.lists(x, weights)
        out = torch.empty_like(x)
        for e in range(E):
            out.index_add_(0, tokens[e], self.run(e, x[tokens[e]]))
            if e == 1:
                out.zero_()
        return out


@mutant("reshape to (2, 3, 6) mixes rows and features", tokens=12)
class ListTurned(ExpertChoice):
    """The rows of a list the other way round inside of the expert."""

    def run(self, e: int, x: Tensor) -> Tensor:
        return super().run(e, x.reshape(2, -1, x.shape[-1]).transpose(0, 1).reshape(x.shape))


@mutant("nothing is summed over experts", forward_only=True)
class ListScatteredInPart(ExpertChoice):
    """The first columns alone: torch has no gradient for it."""

    def put(self, out: Tensor, tokens: Tensor, y: Tensor) -> Tensor:
        return out.scatter_add(0, tokens[:, None].expand(-1, 3), y)


@mutant("nothing is summed over experts")
class ListScatteredByColumn(ExpertChoice):
    """Another token for each column."""

    def put(self, out: Tensor, tokens: Tensor, y: Tensor) -> Tensor:
        return out.scatter_add(0, (tokens[:, None] + torch.arange(y.shape[1])) % out.shape[0], y)


@mutant("nothing is summed over experts")
class ListScatteredAcross(ExpertChoice):
    def put(self, out: Tensor, tokens: Tensor, y: Tensor) -> Tensor:
        return out.scatter_add(1, tokens[:, None].expand_as(y) % y.shape[1], y[: out.shape[0]])


@mutant("nothing is summed over experts")
class ListReadInBetween(ExpertChoice):
    """In place, and every expert reads what the others have added."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, tokens = self.lists(x, weights)
        out = x * 0.5
        for e, expert in enumerate(self.experts):
            out = out.index_add(0, tokens[e], gates[e, :, None] * expert(out[tokens[e]]))
        return out


@mutant("what aten.index_add_ at file.py changes is read elsewhere")
class ListOnTopSeen(ExpertChoice):
    """Another name of what is added to is read afterwards."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, tokens = self.lists(x, weights)
        out = x * 0.5
        seen = out[1:]
        for e, expert in enumerate(self.experts):
            out.index_add_(0, tokens[e], gates[e, :, None] * expert(x[tokens[e]]))
        return out[1:] + seen


@mutant("index_add_ is read after it was changed in place through another name")
class ListOnTopScaled(ExpertChoice):
    """Halved after each expert, through another name."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates, tokens = self.lists(x, weights)
        out = x * 0.5
        for e, expert in enumerate(self.experts):
            out.index_add_(0, tokens[e], gates[e, :, None] * expert(x[tokens[e]]))
            out.view(-1).mul_(0.5)
        return out
