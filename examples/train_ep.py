"""Train an unmodified Mixtral with its experts split over the ranks.

torchrun --nproc-per-node 4 examples/train_ep.py
"""

import datetime
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import MixtralConfig, MixtralForCausalLM

import moe_compile

cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=10))
rank, ranks = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
else:
    torch.set_num_threads(1)

text = torch.tensor(list(Path(torch.__file__).read_bytes()), device=device)  # bytes as tokens
config = MixtralConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=16,
    num_experts_per_tok=2,
)
torch.manual_seed(0)
model = MixtralForCausalLM(config).to(device)
mesh = moe_compile.build_mesh()
moe_compile.parallelize(model, mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
compiled = torch.compile(model, backend="moe_ep", fullgraph=True)

report = moe_compile.explain(model, input_ids=text[None, :128])  # runs the model: all ranks take part
if rank == 0:
    held = sum(p.to_local().numel() for p in model.parameters() if hasattr(p, "to_local"))
    every = sum(p.numel() for p in model.parameters() if hasattr(p, "to_local"))
    print(f"{ranks} ranks; each holds {held:,} of {every:,} expert parameters\n{report}")

torch.manual_seed(rank)  # each rank has its own batches
start = time.perf_counter()
for step in range(50):
    starts = torch.randint(0, len(text) - 128, (4,)).tolist()
    batch = torch.stack([text[s : s + 128] for s in starts])
    loss = compiled(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(
                f"step {step + 1:3d}  loss {mean.item() / ranks:.3f}  {time.perf_counter() - start:.0f} s", flush=True
            )
dist.destroy_process_group()
