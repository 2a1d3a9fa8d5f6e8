"""Train an unmodified Mixtral, small and randomly initialised, through the moe_ep compiler.

python examples/train_mixtral.py
"""

from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import moe_compile

text = torch.tensor(list(Path(torch.__file__).read_bytes()))  # bytes as tokens
config = MixtralConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=16,
    num_experts_per_tok=2,
    output_router_logits=True,  # adds the load-balancing loss
)
torch.manual_seed(0)
model = MixtralForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

example = text[None, :128]
print(moe_compile.explain(model, input_ids=example, labels=example))

compiled = torch.compile(model, backend="moe_ep")
for step in range(50):
    starts = torch.randint(0, len(text) - 128, (4,)).tolist()
    batch = torch.stack([text[start : start + 128] for start in starts])
    loss = compiled(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"step {step + 1:3d}  loss {loss.item():.3f}")
