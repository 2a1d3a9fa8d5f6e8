"""Train an unmodified Mixtral with its experts split over the ranks.

torchrun --nproc-per-node 4 examples/train_ep.py                            all else replicated
torchrun --nproc-per-node 4 examples/train_ep.py --dp-shard 4 --ep 2        all else split by FSDP2
    --checkpoint DIR    go on from what is there, whatever the degrees were, and write it at the end
"""

import argparse
import datetime
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import MixtralConfig, MixtralForCausalLM

import moe_compile

arguments = argparse.ArgumentParser()
arguments.add_argument("--ep", type=int, help="over how many ranks the experts are split")
arguments.add_argument("--dp-shard", type=int, help="over how many ranks FSDP2 splits the dense parameters")
arguments.add_argument("--checkpoint", type=Path)
arguments.add_argument("--steps", type=int, default=50)
arguments.add_argument("--layers", type=int, default=2)
args = arguments.parse_args()

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
    num_hidden_layers=args.layers,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=16,
    num_experts_per_tok=2,
)
torch.manual_seed(0)
model = MixtralForCausalLM(config).to(device)
mesh = moe_compile.build_mesh(ep=args.ep, dp_shard=args.dp_shard)
moe_compile.parallelize(model, mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
if args.checkpoint and args.checkpoint.exists():
    moe_compile.load_checkpoint(model, optimizer, args.checkpoint)
compiled = torch.compile(model, backend="moe_ep", fullgraph=args.dp_shard is None)  # with FSDP: a graph a layer

report = moe_compile.explain(model, input_ids=text[None, :128])  # runs the model: all ranks take part
if rank == 0:
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
    every = sum(p.numel() for p in model.parameters())
    print(f"{ranks} ranks; this one holds {held:,} of {every:,} parameters\n{report}")

torch.manual_seed(rank)  # each rank has its own batches
start = time.perf_counter()
for step in range(args.steps):
    starts = torch.randint(0, len(text) - 128, (4,)).tolist()
    batch = torch.stack([text[s : s + 128] for s in starts])
    loss = compiled(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    moe_compile.clip_grad_norm_(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(
                f"step {step + 1:3d}  loss {mean.item() / ranks:.3f}  {time.perf_counter() - start:.0f} s", flush=True
            )
if args.checkpoint:
    moe_compile.save_checkpoint(model, optimizer, args.checkpoint)
dist.destroy_process_group()
