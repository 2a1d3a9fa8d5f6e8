"""What holds on several ranks when dense parameters are sharded by FSDP2, beside experts that are sharded over "ep"."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.parallel.checks import Batches, language, listed, mixtral, parity, stacked, tokens
from tests.parallel.ranks import Ranks
from tests.tiny import compiled


def layers(model: nn.Module) -> nn.Module:
    """Each unit compiled on its own, as one full graph."""
    for module in model.modules():
        if isinstance(module, FSDPModule) and module is not model:
            module.compile(backend="moe_ep", fullgraph=True, options={"inner": "aot_eager"})
    return model


def whole_model(ranks: Ranks) -> None:
    model = parity(ranks, stacked(2), tokens(ranks), dp_shard=ranks.size, run=lambda m: compiled(m, "aot_eager"))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert isinstance(model.layers[0], FSDPModule) and isinstance(model.head.weight, DTensor)


def layer_by_layer(ranks: Ranks) -> None:
    parity(ranks, stacked(2), tokens(ranks, [3, 5]), dp_shard=ranks.size, run=layers)


CHECKS = {2: [whole_model, layer_by_layer]}
