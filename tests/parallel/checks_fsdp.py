"""What holds on several ranks when dense parameters are sharded by FSDP2, beside experts that are sharded over "ep"."""

import copy
import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import moe_compile
from tests.parallel import checks
from tests.parallel.checks import (
    Batches, Mixing, agree, language, listed, mixtral, own_names, parity, refusal, same, square, stacked, tokens,
)  # fmt: skip
from tests.parallel.ranks import Ranks
from tests.tiny import Block, D, Experts, Net, close, compiled


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


def module_list(ranks: Ranks) -> None:
    """Uneven batches, one of them empty, gradients accumulated, experts in copies if there are ranks for them."""
    parity(ranks, listed(), tokens(ranks, [5, 0, 3, 9]), ep=2, dp_shard=ranks.size, run=compiled, parts=2, steps=2)


def hybrid(ranks: Ranks) -> None:
    """Two copies of all: dense parameters over two ranks each, experts over the same two."""
    parity(ranks, stacked(2), tokens(ranks, [5, 0, 3, 9]), ep=2, dp_shard=2, run=layers)


def mixtral_layers(ranks: Ranks) -> None:
    batches: Batches = [(torch.randint(0, 32, (2, 5)),) for _ in range(ranks.size)]
    parity(ranks, mixtral("eager", tie_word_embeddings=True), batches, language, dp_shard=ranks.size, run=layers)


def mixtral_checkpointing(ranks: Ranks) -> None:
    model = mixtral("grouped_mm")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    batches: Batches = [(torch.randint(0, 32, (2, 5)),) for _ in range(ranks.size)]
    parity(ranks, model, batches, language, dp_shard=ranks.size, steps=2, run=compiled)


def inductor(ranks: Ranks) -> None:
    parity(ranks, stacked(), tokens(ranks, [6, 4]), dp_shard=ranks.size, run=lambda m: compiled(m, "inductor"))


def gathered(ranks: Ranks) -> None:
    """Uncompiled, another backend, a refused region: right by gathering, also where a rank reaches no expert."""
    for run in (lambda m: m, lambda m: torch.compile(m, backend="aot_eager")):
        torch._dynamo.reset()
        parity(ranks, stacked(), tokens(ranks, [6, 0, 3]), dp_shard=ranks.size, run=run, expect="")
    model = Net(2, lambda: Block(Mixing(checks.E), num_experts=checks.E))
    parity(ranks, model, tokens(ranks, [2, 3]), dp_shard=ranks.size, run=compiled, expect="")


def frozen_experts(ranks: Ranks) -> None:
    model = stacked()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    parity(ranks, model, tokens(ranks), dp_shard=ranks.size, run=compiled)


def one_block(ranks: Ranks) -> None:
    """A model without a list of layers is one unit."""
    parity(ranks, Block(Experts(checks.E), num_experts=checks.E), tokens(ranks), dp_shard=ranks.size, run=compiled)


# -- clipping -------------------------------------------------------------------------------

MESHES: dict[int, list[dict[str, int]]] = {
    1: [{}, {"dp_shard": 1}],
    2: [{}, {"ep": 1}, {"dp_shard": 2}, {"dp_shard": 2, "ep": 1}],
    4: [{"ep": 2}, {"ep": 2, "dp_shard": 2}, {"ep": 2, "dp_shard": 4}],
}


def clipping(ranks: Ranks) -> None:
    """The norm, and what is left, are those of one process, over every kind of mesh."""
    for degrees in MESHES[ranks.size]:
        for norm_type in (2.0, 1.0, 3.0, math.inf):
            torch._dynamo.reset()
            torch.manual_seed(0)
            reference = stacked()
            model = moe_compile.parallelize(copy.deepcopy(reference), moe_compile.build_mesh(**degrees))
            assert agree(ranks, model, model, reference, tokens(ranks, [5, 2]))
            want = nn.utils.clip_grad_norm_(reference.parameters(), 0.1, norm_type)
            assert want > 0.2
            given = model if norm_type == 2.0 else model.parameters()
            got = moe_compile.clip_grad_norm_(given, 0.1, norm_type, foreach=None if norm_type != 1.0 else False)
            assert got.dtype == torch.float32 and close(got, want), (degrees, norm_type, got, want)
            same(own_names(model, lambda p: p.grad), own_names(reference, lambda p: p.grad), f"{degrees}: clipped")
            every = [torch.zeros(()) for _ in range(ranks.size)]
            dist.all_gather(every, got)
            assert len({float(x) for x in every}) == 1, every
            assert close(
                moe_compile.clip_grad_norm_(model, 1e9, norm_type), nn.utils.get_total_norm(grads(reference), norm_type)
            )


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def clipping_what_is_not_finite(ranks: Ranks) -> None:
    """One number on one rank is enough, for all ranks; a rank without any gradient takes part."""
    for degrees, bad in ((MESHES[ranks.size][0], math.nan), (MESHES[ranks.size][-1], math.inf)):
        model = moe_compile.parallelize(stacked(), moe_compile.build_mesh(**degrees))
        square(model, torch.randn(4, D)).backward()
        if ranks.rank == ranks.size - 1:
            local = model.layers[0].experts.w2.grad.to_local()
            local.view(-1)[0] = bad
        for norm_type in (2.0, math.inf):
            for error_if_nonfinite in (False, True):
                try:
                    total = moe_compile.clip_grad_norm_(model, 1e9, norm_type, error_if_nonfinite)
                except RuntimeError as error:
                    assert error_if_nonfinite and "is non-finite" in str(error)
                else:
                    assert not error_if_nonfinite and not total.isfinite(), (norm_type, bad, total)
            if math.isinf(bad):  # that was scaled by zero, and is NaN now
                bad = math.nan
        model.zero_grad()
        weight = model.layers[0].experts.w2
        if ranks.rank == 0:
            weight.grad = torch.ones_like(weight)
        total = moe_compile.clip_grad_norm_(model, 1e9)
        copies = ranks.size // weight.device_mesh.size()
        assert close(
            total, torch.tensor(weight.to_local().numel() / copies if not ranks.rank else float(total**2)).sqrt()
        )
        assert "above 0" in refusal(lambda model=model: moe_compile.clip_grad_norm_(model, 1.0, 0.0))


CHECKS = {
    1: [whole_model, clipping],
    2: [
        whole_model, layer_by_layer, module_list, mixtral_layers, mixtral_checkpointing, inductor, gathered,
        frozen_experts, one_block, clipping, clipping_what_is_not_finite,
    ],
    4: [hybrid, module_list, gathered, clipping, clipping_what_is_not_finite],
}  # fmt: skip
