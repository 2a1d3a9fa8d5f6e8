"""Mutants: one expert is another function of its rows, or what it computes is no function of them alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.detect.idioms import Gated, Normed
from tests.detect.loops import FF, D, E, Listed, Stacked, mutant

# -- mutants: another function of the rows for one expert -----------------------------------


@mutant("expert 2 differs from expert 0: aten.relu where that has aten.gelu")
class OtherActivation(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[2].act = F.relu


@mutant("expert 2 differs from expert 0: 2.0 where that has 1.0")
class OtherScale(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) * (2.0 if e == 2 else 1.0)


@mutant("expert 1 differs from expert 0: 2 where that has 1")
class IndexAsNumber(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x) * (e + 1)


@mutant("expert 2 differs from expert 0: aten.to.dtype where that has token x")
class OtherDtype(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x.double().float() if e == 2 else x)


@mutant("expert 1 differs from expert 0: aten.mul.Tensor where that has aten.linear")
class OtherForward(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[1].forward = lambda x: x * 2  # type: ignore[method-assign]


@mutant("expert 3 differs from expert 0: 5 arguments for 4")
class OtherEps(Listed):
    def __init__(self) -> None:
        super().__init__(lambda: Normed(nn.LayerNorm))
        self.experts[3].norm.eps = 0.1


@mutant(
    "expert 1 differs from expert 0: experts_1_up_weight is torch.float32 (4, 6), experts_0_up_weight is torch.float32 (10, 6)"
)
class OtherWidth(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[1].up, self.experts[1].down = nn.Linear(D, 4), nn.Linear(4, D)


@mutant("expert 3 differs from expert 0: 2 arguments for 3")
class OneWithoutBias(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[3].up = nn.Linear(D, FF, bias=False)


@mutant("dropout with p = 0.5 draws random numbers expert by expert")
class Dropout(Listed):
    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)))


@mutant("dropout with p = 0.5 draws random numbers expert by expert")
class OneWithDropout(Listed):
    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Linear(D, D), nn.Dropout(0.0)))
        self.experts[1][1].p = 0.5


@mutant("no rule for aten.dropout on expert weights", late=True)
class DropConnect(Stacked):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            y = F.linear(F.linear(x[t], F.dropout(self.w13[e, :FF], 0.5)), self.w2[e])
            out.index_add_(0, t, y * weights[t, k, None])
        return out


@mutant("aten.randn_like at file.py is not known to be row-wise (it reads rows)")
class Noise(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x + 0.1 * torch.randn_like(x))


@mutant("module experts.2 has hooks")
class HookOnOne(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[2].register_forward_hook(lambda m, a, y: y * 2)


@mutant("it puts a hook on a tensor, which a trace would lose")
class TensorHook(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        y = self.experts[e](x)
        if y.requires_grad:
            y.register_hook(lambda g: g * 2)
        return y


@mutant("expert 1 differs from expert 0: aten.linear where that has token x")
class BranchOnNumber(Listed):
    def __init__(self) -> None:
        super().__init__()
        for i, expert in enumerate(self.experts):
            expert.depth = 2 if i == 1 else 1

    def run(self, e: int, x: Tensor) -> Tensor:
        for _ in range(self.experts[e].depth):
            x = self.experts[e](x)
        return x


@mutant("Python decides on gt, not shown to say whether an expert was chosen")
class BranchOnTensor(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        y = self.experts[e](x)
        if e == 1 and y.abs().sum() > 0.1:
            y = y * 2
        return y


@mutant("Python decides on gt, not shown to say whether an expert was chosen")
class BranchOnWeight(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        if self.experts[e].up.bias[0] > 0:
            x = x * 2
        return self.experts[e](x)


@mutant(
    "expert 1 differs from expert 0: experts_0_up_weight is used twice there, experts_1_up_weight and experts_1_gate_weight here"
)
class TiedInOneOnly(Listed):
    def __init__(self) -> None:
        super().__init__(Gated)
        self.experts[0].up.weight = self.experts[0].gate.weight


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


@mutant("it uses the custom autograd function Double on rows of experts, as no rule does")
class OwnGradient(Listed):
    def run(self, e: int, x: Tensor) -> Tensor:
        return Double.apply(self.experts[e](x))
