"""Small graphs for the golden tests of passes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from moe_compile.capture import capture
from moe_compile.captured import Capture
from moe_compile.detect.facts import Facts
from moe_compile.passes.detect_experts import DetectExperts
from moe_compile.rewrite import PassReport

T, K, E, D, F = 5, 2, 2, 4, 3


class Stacked(nn.Module):
    """Two experts with stacked weights; `loop` runs them as Hugging Face's eager form does."""

    def __init__(self, num_experts: int = E) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(num_experts, F, D))
        self.down = nn.Parameter(torch.randn(num_experts, D, F))

    def loop(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.up.shape[0]):
            t, k = torch.where(ids == e)
            y = nn.functional.linear(torch.relu(nn.functional.linear(x[t], self.up[e])), self.down[e])
            out.index_add_(0, t, y * weights[t, k, None])
        return out


def inputs(num_experts: int = E, tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights, with gradients where they can have one; distinct ids for each token."""
    g = torch.Generator().manual_seed(1)
    ids = torch.rand(tokens, num_experts, generator=g).argsort(1)[:, :K]
    return torch.randn(tokens, D, generator=g), ids, torch.rand(tokens, ids.shape[1], generator=g)


def captured(module: nn.Module, fn: Any, *args: Tensor) -> Capture:
    return capture(fn, module, args, {})


def detected(module: nn.Module, fn: Any, *args: Tensor) -> tuple[GraphModule, PassReport]:
    found = captured(module, fn, *args)
    report = DetectExperts(Facts(constants=found.constants))(found.gm)
    return found.gm, report


def run(gm: GraphModule, module: nn.Module, *args: Tensor) -> Tensor:
    """Call a captured graph; the last input, as long as a selection, is not read by a rewritten one."""
    return gm(*args, *[p for _, p in module.named_parameters()])[0]


def gradients(out: Tensor, *leaves: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return list(torch.autograd.grad((out * weight).sum(), leaves))
