"""Whole models whose experts have forms of their own: the same loss and gradients, and what is rewritten of them."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import close, compiled, original, regions

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("fresh")

WIDTH = 32
COMMON = dict(vocab_size=64, pad_token_id=0, use_cache=False)
CAUSAL = COMMON | dict(
    hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    head_dim=16, num_experts_per_tok=2,
)  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "step3p7": CAUSAL | dict(
        n_routed_experts=4, moe_intermediate_size=24, share_expert_dim=24, mlp_layer_types=["sparse"] * 2,
        layer_types=["full_attention"] * 2, sliding_window=8, swiglu_limits=[0.0, 0.05], swiglu_limits_shared=[None, 0.05],
    ),
    "dbrx": COMMON | dict(
        d_model=WIDTH, n_heads=2, n_layers=2, max_seq_len=64,
        ffn_config=dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2, hidden_size=WIDTH),
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
    ),
    "longcat_flash": COMMON | dict(
        hidden_size=WIDTH, num_layers=2, num_attention_heads=2, ffn_hidden_size=48, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, head_dim=8, v_head_dim=16, expert_ffn_hidden_size=24,
        n_routed_experts=4, zero_expert_num=2, moe_topk=2,
    ),
    "nllb-moe": COMMON | dict(
        d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        encoder_attention_heads=2, decoder_attention_heads=2, num_experts=4, expert_capacity=4,
        encoder_sparse_step=2, decoder_sparse_step=2, moe_token_dropout=0.0,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    ),
    "switch_transformers": COMMON | dict(
        d_model=WIDTH, d_kv=16, d_ff=24, num_heads=2, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, num_experts=4, expert_capacity=2, dropout_rate=0.0, router_jitter_noise=0.0,
    ),
    "llama4_text": CAUSAL | dict(
        intermediate_size=24, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=2,
        interleave_moe_layer_step=1, attention_chunk_size=16,
    ),
}  # fmt: skip
PARTS = {"step3p7": "Step3p7TextModel"}  # the class, where no AutoModel knows it
REWRITTEN = {
    "step3p7": 2,
    "dbrx": 2,
    "longcat_flash": 2,
    "nllb-moe": 2,
    "switch_transformers": 2,
    "llama4_text": 2,
}  # how many layers


def build(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model with random weights, and inputs."""
    torch.manual_seed(0)
    if family in PARTS:
        cls = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), PARTS[family])
        model = cls._from_config(cls.config_class(**CONFIGS[family]), attn_implementation="eager")
    else:
        config = transformers.AutoConfig.for_model(family, **CONFIGS[family])
        model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    inputs = dict(input_ids=torch.randint(3, 64, (2, 10)))
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 64, (2, 7))
    return model.train(), inputs


def step(run: Any, owner: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and all gradients."""
    owner.zero_grad()
    torch.manual_seed(1)
    out = run(**inputs)[0]
    out.mul(torch.randn(out.shape)).sum().backward()
    return {"output": out.detach()} | {n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", CONFIGS)
def test_model(family: str) -> None:
    model, inputs = build(family)
    reference = original(model)
    want = step(reference, reference, inputs)
    with regions() as found:
        got = step(compiled(model, "aot_eager"), model, inputs)
    assert got.keys() >= {n for n, g in want.items() if g.any()}
    for name, value in got.items():
        expected = want.get(name, torch.zeros_like(value))
        assert close(value, expected, 1e-5) or float((value - expected).norm()) < 1e-8, name
    assert sum(r.matched for r in found) == REWRITTEN[family], [(r.location, r.reason) for r in found]
