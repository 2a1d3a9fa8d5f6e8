"""Generate with an unmodified Qwen3-MoE and a key-value cache through the moe_ep compiler.

    python examples/generate.py

The weights are random, so the tokens mean nothing; they equal those of the uncompiled model.
"""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

config = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=16,
    num_experts_per_tok=4,
)
torch.manual_seed(0)
model = Qwen3MoeForCausalLM(config).eval()
prompt = torch.tensor([list(b"The experts of a layer")])
options = {
    "attention_mask": torch.ones_like(prompt),
    "max_new_tokens": 16,
    "do_sample": False,
    "cache_implementation": "static",  # fixed shapes: one graph for the prompt, one per token
    "disable_compile": True,  # compiled below, by moe_ep
}
plain = model.generate(prompt, **options)
model.compile(backend="moe_ep")  # in place, so that `generate` runs the compiled forward
compiled = model.generate(prompt, **options)
print("tokens", compiled[0, prompt.shape[1] :].tolist())
print("same as uncompiled:", torch.equal(plain, compiled))
