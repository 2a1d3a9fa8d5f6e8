"""Whole models that read counts on the host: JetMoE, whose experts are one product after another on split rows."""

import pytest
import torch
from torch import Tensor, nn

from tests.test_models import check
from tests.tiny import compiled, regions

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("fresh")

LAYERS, EXPERTS = 2, 4


def jetmoe() -> nn.Module:
    config = transformers.JetMoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=LAYERS, num_key_value_heads=2,
        kv_channels=16, num_local_experts=EXPERTS, num_experts_per_tok=2, max_position_embeddings=64,
        use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.JetMoeForCausalLM(config).train()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def fused_experts(run: nn.Module, ids: Tensor) -> int:
    """How many layers' experts run as one op in a forward, once it is compiled."""
    with torch.no_grad():
        run(input_ids=ids)
    with torch.profiler.profile() as profile, torch.no_grad():
        run(input_ids=ids)
    return sum(e.count for e in profile.key_averages() if e.key == "moe_ep::expert_mlp")


def test_jetmoe() -> None:
    """The experts of every layer are rewritten, and both halves of those between which attention runs."""
    model, ids = jetmoe(), torch.randint(3, 64, (2, 10))
    run = compiled(model, "aot_eager")
    with regions() as found:
        check(run, model, ids)
    halves = {("input_linear", EXPERTS, 1), ("experts.output_linear", EXPERTS, 1)}
    assert {(r.module, r.num_experts, r.top_k) for r in found} == {("mlp", EXPERTS, 2), *halves}
    assert all(r.matched for r in found), [r.reason for r in found]
    assert fused_experts(run, ids) == LAYERS
