"""What holds on several ranks when some of them share their tokens: experts over "ep", attention over "tp"."""

import copy
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import moe_compile
from tests.parallel import checks
from tests.parallel.checks import SGD, Batches, agree, mixtral, language, own_names, refusal, same, stacked
from tests.parallel.ranks import Ranks
from tests.tiny import Block, D, Experts, close, compiled, regions


class Attention(nn.Module):
    """Two heads; each rank along "tp" has one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, D // 2)).transpose(0, 1) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(D), Attention()
        self.experts = Block(Experts(checks.E), num_experts=checks.E)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.experts(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


PLAN = {f"layers.*.attention.{n}": ColwiseParallel() for n in "qkv"} | {"layers.*.attention.o": RowwiseParallel()}


def square(model: Callable[..., Any], x: Tensor) -> Tensor:
    return model(x).square().sum() / 8


def first(ranks: Ranks) -> None:
    torch.manual_seed(0)
    model = Model()
    reference = copy.deepcopy(model)
    mesh = moe_compile.build_mesh(ep=2, tp=2)
    parallelize_module(model, mesh["tp"], PLAN)
    moe_compile.parallelize(model, mesh)
    batches = [torch.randn(5, D) for _ in range(ranks.size // 2)]
    import os
    call = compiled(model, os.environ.get("INNER", "eager"), fullgraph=True, strategy="alltoall")
    with regions() as found:
        got = square(call, batches[ranks.rank // 2])
    want = sum(square(reference, b) for b in batches) / len(batches)
    got.backward()
    want.backward()
    print([str(r.reason) for r in found], got, square(reference, batches[ranks.rank//2]), flush=True)
    same(own_names(model, lambda p: p.grad), own_names(reference, lambda p: p.grad), "gradient")
    print("OK", flush=True)

CHECKS = {4: [first]}
