"""What holds when experts are split once more over the ranks that hold the same ones ("edp"), 2 x 2 ranks."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

import moe_compile
from moe_compile import kinds
from tests.parallel import checks
from tests.parallel.checks import Batches, agree, language, listed, mixtral, own_names, parity, refusal, same, square, stacked, tokens
from tests.parallel.checks_fsdp import layers, placed
from tests.parallel.ranks import Ranks
from tests.tiny import Block, D, Experts, Net, close, compiled, regions

SPLIT: dict[str, Any] = {"ep": 2, "dp_shard": 4, "experts": "sharded"}


def experts_of(model: nn.Module) -> dict[str, DTensor]:
    return {n: p for n, p in model.named_parameters() if "expert" in n and isinstance(p, DTensor)}


def quarter(ranks: Ranks, model: nn.Module) -> None:
    """A rank holds a quarter of each weight, within what rounding experts up to whole ones adds."""
    for name, parameter in experts_of(model).items():
        whole, held = parameter.numel() // checks.E, parameter.to_local().numel()
        most = -(-checks.E // 2)
        first = parameter.device_mesh["ep"].get_local_rank() == 0
        assert held == (most if first else checks.E - most) * whole // 2, (name, held, parameter.shape)
        assert parameter.to_local().untyped_storage().nbytes() == 4 * held, name


def stacks(ranks: Ranks) -> None:
    quarter(ranks, parity(ranks, stacked(2), tokens(ranks, [5, 8, 3, 6]), run=layers, **SPLIT))


def lists(ranks: Ranks) -> None:
    quarter(ranks, parity(ranks, listed(), tokens(ranks, [5, 0, 3, 9]), run=placed, parts=2, steps=2, **SPLIT))

CHECKS = {4: [stacks, lists]}
