"""What holds on several ranks of weights that are no stacks, and that the forward views as such."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
from moe_compile.parallel.checkpoint import model_state, optimizer_state
from tests.parallel import checks
from tests.parallel.checks import agree, own_names, parity, same, tokens
from tests.parallel.checks_fsdp import equal, shared_directory
from tests.parallel.ranks import Ranks
from tests.tiny import FF, Block, D, Net, compiled


class Flat(nn.Module):
    """The weights of all experts below each other, as dbrx has them, a bias, and a stack of other sizes."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts, self.ffn = num_experts, FF
        self.w1 = nn.Parameter(0.3 * torch.randn(num_experts * FF, D))
        self.w2 = nn.Parameter(0.3 * torch.randn(num_experts * FF, D))
        self.bias = nn.Parameter(0.3 * torch.randn(num_experts * FF))
        self.last = nn.Parameter(0.3 * torch.randn(num_experts, 2, D * D // 2))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        shape = (self.num_experts, self.ffn, x.shape[-1])
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            h = F.linear(x[t], self.w1.view(shape)[e], self.bias.view(self.num_experts, self.ffn)[e])
            y = F.silu(h) @ self.w2.view(self.num_experts, FF, D)[e]
            out.index_add_(0, t, y @ self.last.view(self.num_experts, D, D)[e] * weights[t, k, None])
        return out


class Chunked(Flat):
    """Pieces of the views, in lists, as transformers 4 writes dbrx; a view of a view; a transposed one."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        w1 = [w.squeeze(0) for w in self.w1.view(-1, FF, D).chunk(self.num_experts, dim=0)]
        w2 = self.w2.reshape(self.num_experts, FF, D).flatten(1).unflatten(1, (FF, D)).unbind(0)
        bias = self.pick(self.bias, self.num_experts)
        last = self.last.flatten(1).unflatten(-1, (D, D)).transpose(1, 2)
        for e in range(self.num_experts):
            t, k = torch.where(ids == e)
            y = F.silu(F.linear(x[t], w1[e], bias[e])) @ w2[e]
            out.index_add_(0, t, F.linear(y, last[e]) * weights[t, k, None])
        return out

    def pick(self, flat: Tensor, number: int) -> Tensor:
        return flat.unflatten(0, (number, -1))


def net(cls: type[Flat] = Flat, number: int = 0) -> nn.Module:
    number = number or checks.E
    return Net(1, lambda: Block(cls(number), num_experts=number))


def flat(ranks: Ranks) -> None:
    """As many experts on each rank, and fewer on the last."""
    parity(ranks, net(), tokens(ranks, [6, 9]), inner="aot_eager")
    parity(ranks, net(Chunked), tokens(ranks, [6, 3]), steps=1)
    parity(ranks, net(number=2 * ranks.size), tokens(ranks, [6, 0]), steps=1)
    parity(ranks, net(), tokens(ranks), expect="gather_weights", steps=1)
    parity(ranks, net(), tokens(ranks, [6, 0]), expect="", run=lambda model: model, steps=1)
