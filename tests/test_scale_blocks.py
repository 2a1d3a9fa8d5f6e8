"""scale_blocks.py against numbers: what it takes for scales of blocks are such, in random chains of shapes."""

import random
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from moe_compile.scale_blocks import blocks_of

FACTORS = (1, 2, 2, 3, 4)
OTHERS: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.flip(0),
    lambda t: t.double().float(),
    lambda t: t.transpose(0, -1),
]


def shapes_of(n: int, dice: random.Random) -> list[int]:
    """Some sizes whose product is n."""
    sizes = [1]
    for factor in (2, 2, 2, 2, 3, 3, 5):
        if n % factor == 0:
            n //= factor
            sizes = [*sizes, factor] if dice.random() < 0.5 else [*sizes[:-1], sizes[-1] * factor]
    return [*sizes, n] if n > 1 else sizes


def grown(dim: int, sizes: list[int], t: Tensor) -> Tensor:
    return t.unsqueeze(dim).expand(sizes)


def chain(seed: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Ops that repeat, regroup, or do something else, to a matrix of each of some experts in the end."""
    dice = random.Random(seed)
    source = torch.randn([dice.choice(FACTORS) for _ in range(dice.randint(1, 4))])
    steps: list[Callable[[Tensor], Tensor]] = []
    now = source
    for _ in range(dice.randint(1, 5)):
        kind, dim = dice.choice(["repeat", "repeat", "group", "group", "unsqueeze", "else"]), dice.randrange(now.dim())
        step: Callable[[Tensor], Tensor]
        if kind == "repeat" and now.numel() < 200:
            step = partial(torch.repeat_interleave, repeats=dice.choice((2, 3)), dim=dim)
        elif kind == "group":
            step = partial(torch.reshape, shape=shapes_of(now.numel(), dice))
        elif kind == "unsqueeze" and now.numel() < 200:
            step = partial(grown, dim, [*now.shape[:dim], dice.choice((1, 2)), *now.shape[dim:]])
        else:
            step = dice.choice(OTHERS)
        steps.append(step)
        now = step(now)
    rest = [1, *shapes_of(now.numel(), dice)]
    cut = sorted(dice.sample(range(1, len(rest) + 1), 2)) if len(rest) > 1 else [1, 1]
    end = [prod(rest[: cut[0]]), prod(rest[cut[0] : cut[1]]), prod(rest[cut[1] :])]

    def run(t: Tensor) -> Tensor:
        for step in steps:
            t = step(t)
        return t.reshape(end)

    return run, source


class Noting(torch.fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[str, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


@pytest.mark.parametrize("part", range(4))
def test_chains(part: int) -> None:
    found = 0
    for seed in range(100 * part, 100 * part + 100):
        run, source = chain(seed)
        gm = make_fx(run, tracing_mode="fake", pre_dispatch=True)(source)
        (last,) = (n for n in gm.graph.nodes if n.op == "output")
        scale = last.args[0]
        want = run(source)
        blocks = blocks_of(scale, want.shape, want.shape)
        if blocks is None:
            continue
        found += 1
        noted = Noting(gm)
        noted.run(source)
        small = noted.values[blocks.source.name].reshape([*blocks.lead, blocks.rows, blocks.columns])
        assert (small.shape[0],) == want.shape[:1] and blocks.columns < want.shape[2]
        full = small.repeat_interleave(want.shape[1] // blocks.rows, 1)
        assert torch.equal(full.repeat_interleave(want.shape[2] // blocks.columns, 2), want), seed
    assert found >= 5
