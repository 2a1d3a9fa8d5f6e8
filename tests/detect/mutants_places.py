"""Mutants of results that are set, or read and written back, where other values were before."""

from typing import Any

import torch
from torch import Tensor

from tests.detect.idioms_places import ReadAndWritten, SetInAClone
from tests.detect.loops import E, Listed, mutant

# -- read and written back ------------------------------------------------------------------


@mutant(
    "aten.index_put_ at file.py keeps only one of two equal tokens: the ids (ids) are not shown to be distinct, as those of topk are",
    distinct=False,
    repeats=True,
)
class WrittenTwiceByOne(ReadAndWritten):
    """A token may choose an expert twice: one of both results is kept."""


@mutant("aten.index_put_ at file.py overwrites what another expert of the same token wrote")
class ReadScaled(ReadAndWritten):
    def written(self, out: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return out[t] * 0.5 + y


@mutant("aten.index_put_ at file.py overwrites what another expert of the same token wrote")
class AddedScaled(ReadAndWritten):
    def written(self, out: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.add(out[t], y, alpha=2)


@mutant("aten.index_put_ at file.py overwrites what another expert of the same token wrote")
class Subtracted(ReadAndWritten):
    def written(self, out: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return out[t] - y


@mutant("aten.add.Tensor at file.py is not known to be row-wise (it reads index)")
class ReadAtOthers(ReadAndWritten):
    def written(self, out: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return out[(t + 1) % out.shape[0]] + y


@mutant("aten.index_put_ at file.py overwrites what another expert of the same token wrote")
class ReadTwice(ReadAndWritten):
    def written(self, out: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return out[t] + out[t] * y


@mutant("aten.index_put_ at file.py overwrites what another expert of the same token wrote")
class OneNumberARow(ReadAndWritten):
    def written(self, out: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return out[t] + y[:, :1]


@mutant("aten.index_put_ at file.py overwrites what another expert of the same token wrote")
class ReadElsewhere(Listed):
    """Each expert adds to the values before, of which the last one's stay."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, before = x * 2, x * 2
        for e in range(E):
            t, k = torch.where(ids == e)
            out[t] = before[t] + self.run(e, x[t]) * weights[t, k, None]
        return out


@mutant("aten.index_put_ at file.py overwrites what another expert of the same token wrote")
class ReadByExperts(ReadAndWritten):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = self.start(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out[t] = out[t] + self.run(e, out[t]) * weights[t, k, None]
        return out


@mutant("aten.index_put at file.py overwrites what another expert of the same token wrote")
class ReadByExpertsOutOfPlace(ReadAndWritten):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = self.start(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out = out.index_put((t,), out[t] + self.run(e, out[t]) * weights[t, k, None])
        return out


@mutant("aten.index_put_ at file.py overwrites what another expert of the same token wrote")
class ScaledInBetween(ReadAndWritten):
    def written(self, out: Tensor, t: Tensor, y: Tensor) -> Tensor:
        old = out[t]
        out.mul_(2)
        return old + y


@mutant("view is read after it was changed in place through another name")
class StartReadLater(ReadAndWritten):
    """Through another name."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self_out = super().start(x)
        seen = self_out.view(-1)
        for e in range(E):
            t, k = torch.where(ids == e)
            self_out[t] = self_out[t] + self.run(e, x[t]) * weights[t, k, None]
        return self_out + seen.view_as(x)


# -- set ------------------------------------------------------------------------------------


@mutant("aten.index_put_ at file.py overwrites what another expert of the same token wrote")
class SetByTwo(Listed):
    """Of two experts of a token the later one's result is kept."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = x.clone()
        for e in range(E):
            t, k = torch.where(ids == e)
            out[t] = self.run(e, x[t]) * weights[t, k, None]
        return out


@mutant("aten.index_add_ at file.py adds to what experts have set in clone", flat=True)
class SetThenAdded(SetInAClone):
    def put(self, out: Tensor, mask: Tensor, e: int, x: Tensor, weights: Tensor) -> None:
        if e:
            t = torch.where(mask)[0]
            out.index_add_(0, t, self.run(e, x[t]))
        else:
            out[mask] = self.run(e, x[mask])


@mutant("aten.index_put_ at file.py overwrites what was added to clone", flat=True)
class AddedThenSet(SetInAClone):
    def put(self, out: Tensor, mask: Tensor, e: int, x: Tensor, weights: Tensor) -> None:
        if e == 0:
            t = torch.where(mask)[0]
            out.index_add_(0, t, self.run(e, x[t]))
        else:
            out[mask] = self.run(e, x[mask])


@mutant("aten.index_put_ at file.py adds to what experts have set in clone", flat=True)
class SetThenReadAndWritten(SetInAClone):
    def put(self, out: Tensor, mask: Tensor, e: int, x: Tensor, weights: Tensor) -> None:
        y = self.run(e, x[mask])
        out[mask] = out[mask] + y if e else y


@mutant("aten.index_put_ at file.py is not known to be row-wise (it reads rows)", flat=True)
class SetAtOthers(SetInAClone):
    def put(self, out: Tensor, mask: Tensor, e: int, x: Tensor, weights: Tensor) -> None:
        out[mask.roll(1, 0)] = self.run(e, x[mask])


@mutant("no weight belongs to an expert", flat=True)
class SetThenScaled(SetInAClone):
    def put(self, out: Tensor, mask: Tensor, e: int, x: Tensor, weights: Tensor) -> None:
        out[mask] = self.run(e, x[mask])
        out.mul_(2)


@mutant("aten.linear at file.py is not known to be row-wise (it reads sumread)", flat=True)
class ExpertsReadWhatWasSet(SetInAClone):
    def put(self, out: Tensor, mask: Tensor, e: int, x: Tensor, weights: Tensor) -> None:
        out[mask] = self.run(e, out[mask])


@mutant("the loop visits experts [0, 1, 2, 3, 0], not each of 0..4 once", flat=True)
class SetOnceMore(SetInAClone):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = x.clone()
        for e in (0, 1, 2, 3, 0):
            self.put(out, ids == e, e, x, weights)
        return out


@mutant("the loop visits experts [0, 2, 3], not each of 0..2 once", flat=True)
class SetButForOne(SetInAClone):
    def put(self, out: Tensor, mask: Tensor, e: int, x: Tensor, weights: Tensor) -> None:
        if e != 1:
            super().put(out, mask, e, x, weights)


@mutant("the sum is (11, 6), its terms are (7919, 1), the expert ids are (11,)", flat=True)
class SetToOneNumber(SetInAClone):
    def put(self, out: Tensor, mask: Tensor, e: int, x: Tensor, weights: Tensor) -> None:
        out[mask] = self.run(e, x[mask])[:, :1]


@mutant("clone is read through another name while results are added to it", flat=True)
class SetAndSeen(SetInAClone):
    """Another name of the memory is read afterwards."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = x.clone()
        seen = out[1:]
        for e in range(E):
            self.put(out, ids == e, e, x, weights)
        return out[1:] * seen


@mutant("aten.mul.Tensor at file.py is not known to be row-wise (it reads sumread)", flat=True)
class SetToScaled(SetInAClone):
    """Each token once; what was there is read."""

    def put(self, out: Tensor, mask: Tensor, e: int, x: Tensor, weights: Tensor) -> None:
        out[mask] = out[mask] * 0.5 + self.run(e, x[mask])


@mutant("clone_1 is read after it was changed in place through another name", flat=True)
class SetByOthers(SetInAClone):
    """By ids that change on the way."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, ids = x.clone(), ids.clone()
        for e in range(E):
            self.put(out, ids == e, e, x, weights)
            ids[0] = E - 1
        return out


@mutant("new_zeros is read after it was changed in place through another name", top_k=1)
class SetIfFirst(Listed):
    """A list that says which experts had rows before."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, seen = x + 1, x.new_zeros(E)
        for e in range(E):
            t, k = torch.where(ids == e)
            if len(t) == 0:
                continue
            seen[e] = seen.sum() + 1
            out[t] = self.experts[e](x[t]) * seen[e].clone()
        return out


@mutant("expert 1 differs from expert 0: 2 where that has 1", top_k=1)
class SetInAList(Listed):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out, seen = x + 1, [0] * E
        for e in range(E):
            t, k = torch.where(ids == e)
            if len(t) == 0:
                continue
            seen[e] = sum(seen) + 1
            out[t] = self.experts[e](x[t]) * seen[e]
        return out


@mutant("expert 1 differs from expert 0: aten.mul.Tensor where that has aten.linear")
class NotATensorAtFirst(Listed):
    """The first expert with rows is told from the others."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out: Any = 0
        for e in range(E):
            t, k = torch.where(ids == e)
            if len(t) == 0:
                continue
            y = self.experts[e](x[t]) * weights[t, k, None]
            out = torch.zeros_like(x).index_add(0, t, y if isinstance(out, int) else y * 2) + out
        return out
