"""Results that are set, or read and written back, at an expert's tokens in a tensor that holds other values before."""

from typing import Any

import torch
from torch import Tensor

from tests.detect.loops import E, Listed, Stacked, idiom


@idiom()
class ReadAndWritten(Listed):
    def start(self, x: Tensor) -> Tensor:
        return x.clone()

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = self.start(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            out[t] = self.written(out, t, self.run(e, x[t]) * weights[t, k, None])
        return out

    def written(self, out: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return out[t] + y


@idiom()
class ReadAndWrittenTurned(ReadAndWritten):
    def start(self, x: Tensor) -> Tensor:
        return x * 0.5

    def written(self, out: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.add(y, out[t])


@idiom()
class ReadAndWrittenByMask(Listed):
    """Nobody's tokens keep what a shared expert made of them."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = self.experts[0](x) + x
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1)
            if not mask.any():
                continue
            out[mask] += expert(x[mask]) * (weights * (ids == e)).sum(-1)[mask, None]
        return out


@idiom(flat=True, any_ids=True)
class SetInAClone(Listed):
    """One expert a token, ids of nobody among them."""

    def start(self, x: Tensor) -> Tensor:
        return x.clone()

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = self.start(x)
        for e in range(E):
            self.put(out, ids == e, e, x, weights)
        return out

    def put(self, out: Tensor, mask: Tensor, e: int, x: Tensor, weights: Tensor) -> None:
        out[mask] = self.run(e, x[mask]) * weights[mask][:, :1]


@idiom(flat=True, any_ids=True)
class SetIfAny(SetInAClone):
    def start(self, x: Tensor) -> Tensor:
        return torch.sin(x)

    def put(self, out: Tensor, mask: Tensor, e: int, x: Tensor, weights: Tensor) -> None:
        if mask.any():
            super().put(out, mask, e, x, weights)


@idiom(top_k=1, any_ids=True)
class SetInAColumn(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = x + 1
        for e in range(E):
            t, k = torch.where(ids == e)
            if len(t) == 0:
                continue
            out[t] = self.expert(e, x[t]) * weights[t, k, None]
        return out.tanh()


@idiom(flat=True, any_ids=True)
class SetByCopies(SetInAClone):
    def put(self, out: Tensor, mask: Tensor, e: int, x: Tensor, weights: Tensor) -> None:
        t = torch.where(mask)[0]
        out.index_copy_(0, t, self.run(e, x[t]))


@idiom(flat=True, any_ids=True)
class SetWhereSure(SetInAClone):
    """Who is not sure keeps his row."""

    def put(self, out: Tensor, mask: Tensor, e: int, x: Tensor, weights: Tensor) -> None:
        super().put(out, mask & (weights[:, 0] > 0.5), e, x, weights)


@idiom(flat=True, any_ids=True)
class SetAndPassedOn(SetInAClone):
    """The last expert is none: its tokens are set to themselves."""

    def run(self, e: int, x: Tensor) -> Tensor:
        return x * 3 if e == E - 1 else super().run(e, x)


@idiom(top_k=1)
class SetForAll(Listed):
    """Ids that are shown to be experts'."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        out, hit = x * 2, torch.nn.functional.one_hot(ids, E).permute(2, 1, 0)
        for e in (hit.sum((-1, -2)) > 0).nonzero():
            e = e[0]
            k, t = torch.where(hit[e])
            out[t] = self.experts[e](x[t]) * weights[t, k, None]
        return out, x + out
