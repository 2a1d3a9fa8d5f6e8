"""Training steps of a few layers of Mixtral, Qwen3-30B-A3B and DeepSeek-V3, beside transformers and Inductor.

    python -m benchmarks.slices [--model mixtral] [--minutes 9] [--way-limit-s 240] [--since "2026-11-22 10:00:00"]
                                [--out benchmarks/results] [--page docs/performance.md]

Layers have the sizes of the published models, weights are random, in bf16; a step is forward, backward and plain SGD,
whose time is the same for all ways.  Ways are built one after the other in one process, from equal seeds, and see equal
tokens.  One whose losses differ from HF eager's is not timed.  Results go into one file for the machine, after each way
(records.py).  A way that takes longer than its limit is left out, as red, and one that hangs ends the process, and is.
--since leaves out what the results have from that time on: but for HF eager, whose losses are needed.  What does not
fit into the minutes is left out, and said to be.  Exit status: 3 if something was left out, else 1 if ours is red.
--dry runs the same on a CPU, on tiny layers in f32, without times, and writes nothing unless --out is given.
"""

import argparse
import gc
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_page, limits, records
from benchmarks.timing import first_line

MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "config": "MixtralConfig", "num_hidden_layers": 2, "hidden_size": 4096, "intermediate_size": 14336,
        "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "qwen3_moe": {
        "config": "Qwen3MoeConfig", "num_hidden_layers": 4, "hidden_size": 2048, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "norm_topk_prob": True, "vocab_size": 151936,
    },
    "deepseek_v3": {  # one dense layer, one of experts: 11.3 billion numbers
        "config": "DeepseekV3Config", "num_hidden_layers": 2, "first_k_dense_replace": 1, "vocab_size": 129280,
    },
}  # fmt: skip
DRY: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 64, "num_attention_heads": 2}
DRY_OF: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 16, "num_local_experts": 4, "num_key_value_heads": 1},
    "qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1,
                  "head_dim": 16},
    "deepseek_v3": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
                    "moe_intermediate_size": 16, "intermediate_size": 32, "q_lora_rank": 8, "kv_lora_rank": 8,
                    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 2},
}  # fmt: skip
# (experts of transformers, compiler); the first is what losses are compared with, the last takes long to compile
WAYS = {
    "HF eager": ("eager", None),
    "moe_compile, of HF eager": ("eager", "moe_ep"),
    "HF grouped_mm": ("grouped_mm", None),
    "HF grouped_mm, inductor": ("grouped_mm", "inductor"),
    "moe_compile, of HF grouped_mm": ("grouped_mm", "moe_ep"),
    "HF eager, inductor": ("eager", "inductor"),
}
CHECKED, TIMED = 3, 10  # steps whose losses are compared, the first of which compile; steps that are timed
SLOW_S = 20.0  # steps are timed for as long as this, or TIMED times
BOUND = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # relative, of a loss


@dataclass
class Found:
    """One way: medians, or why there are none."""

    model: str
    way: str
    red: str = ""
    losses: list[float] = field(default_factory=list)
    first_step_s: float | None = None
    step_ms: float | None = None
    tokens_per_s: float | None = None
    peak_bytes: int | None = None

    def line(self) -> str:
        """The row for people."""
        head = f"{self.model:<13}{self.way:<31}"
        if self.red:
            return f"{head}RED {self.red}"
        if self.step_ms is None or self.peak_bytes is None:
            return f"{head}right, not timed: losses {' '.join(f'{loss:.4f}' for loss in self.losses)}"
        speed = f"{self.step_ms:>9.1f} ms{self.tokens_per_s:>10.0f} tokens/s{self.peak_bytes / 2**30:>8.2f} GiB"
        return f"{head}{speed}{self.first_step_s:>8.1f} s first"


def build(name: str, experts: str, device: str, dtype: torch.dtype, dry: bool) -> torch.nn.Module:
    """An unmodified model in training mode; equal on each call."""
    import transformers

    sizes = {**MODELS[name], **(DRY | DRY_OF[name] if dry else {}), "use_cache": False}
    config = getattr(transformers, sizes.pop("config"))(**sizes)
    for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, special, None)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa", experts_implementation=experts
        )
    return model.train()  # type: ignore[no-any-return]


def measure(name: str, way: str, tokens: Tensor, wanted: list[float], dry: bool) -> Found:
    """Compare the first losses with `wanted`, if there are any, then time.  May raise `limits.TimeUp`."""
    experts, backend = WAYS[way]
    found, device, dtype = Found(name, way), tokens.device.type, torch.float32 if dry else torch.bfloat16
    if not dry:
        torch.cuda.reset_peak_memory_stats()
    try:
        model = build(name, experts, device, dtype, dry)
        if backend is not None:
            model.compile(backend="aot_eager" if dry and backend == "inductor" else backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

        def step() -> Tensor:
            loss: Tensor = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        start = time.perf_counter()
        found.losses.append(step().item())
        found.first_step_s = time.perf_counter() - start
        found.losses += [step().item() for _ in range(CHECKED - 1)]
        found.red = why_wrong(found.losses, wanted or found.losses, BOUND[dtype])
        if not dry and not found.red:
            found.step_ms = timed_ms(step)
            found.tokens_per_s = 1e3 * tokens.numel() / found.step_ms
            found.peak_bytes = torch.cuda.max_memory_allocated()
    except Exception as error:  # a compiler may raise anything, memory may not suffice
        found.red = first_line(error)
    return found


def why_wrong(losses: list[float], wanted: list[float], bound: float) -> str:
    """The largest relative difference, if it is past the bound or no number."""
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))
    finite = all(loss == loss and abs(loss) != float("inf") for loss in losses)
    return "" if finite and worst <= bound else f"losses differ by {worst:.1e}, bound {bound:g}"


def timed_ms(step: Any) -> float:
    """The median of some steps, each between two events."""
    taken: list[float] = []
    while len(taken) < TIMED and sum(taken) < 1e3 * SLOW_S:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        step()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def free(device: str) -> None:
    """Give back what a way had: compilers keep their models until they are told."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--way-limit-s", type=float, default=240.0)
    parser.add_argument("--since", default=None, metavar="DATE")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny, without times")
    parser.add_argument("--out", type=Path, default=None, help="benchmarks/results, but for a dry run")
    parser.add_argument("--page", type=Path, default=None, help="a page with a place for the tables")
    options = parser.parse_args()
    stop = time.monotonic() + 60 * options.minutes
    if not options.dry and not torch.cuda.is_available():
        print("slices needs a CUDA machine; torch sees none", file=sys.stderr)
        return 2
    import moe_compile  # noqa: F401  (the backend)

    device = "cpu" if options.dry else "cuda"
    name = "dry run" if options.dry else torch.cuda.get_device_name()
    record = records.Record(options.out or (None if options.dry else Path("benchmarks/results")), name, "slices")
    print(f"{name}, torch {torch.__version__}")
    left_out = False
    for model in options.model:
        vocab, size = (64, (2, 8)) if options.dry else (32000, (options.batch_size, options.length))
        tokens = torch.randint(vocab, size, generator=torch.Generator().manual_seed(0)).to(device)
        left_out |= not steps_of(model, tokens, record, options, stop)
    if options.page is not None:
        gpu_page.write(options.page, name, record.rows())
    return records.LEFT_OUT if left_out else records.RED if record.red() else 0


def steps_of(model: str, tokens: Tensor, record: records.Record, options: argparse.Namespace, stop: float) -> bool:
    """Measure a model by all ways, and keep what is found; whether there was time for all of them."""
    wanted: list[float] = []
    fields = {"shape": model, "routing": "x".join(map(str, tokens.shape)), "what": "step"}
    todo = [way for way in WAYS if not record.has(options.since, **fields, way=way)]
    ways = list(dict.fromkeys([*list(WAYS)[:1], *todo])) if todo else []
    for count, way in enumerate(ways):
        found, left = Found(model, way), stop - time.monotonic()
        too_slow = f"no end after {options.way_limit_s:.0f} s"

        def keep(found: Found) -> None:
            record.add(fields | asdict(found))

        def hung(found: Found = found, left: float = left, too_slow: str = too_slow, keep: Any = keep) -> None:
            if left > options.way_limit_s:
                found.red = f"{too_slow}, nor any way to stop it"
                keep(found)

        try:
            with limits.limited(min(left, options.way_limit_s), hung):
                found = measure(model, way, tokens, wanted, options.dry)
        except limits.TimeUp:
            if left <= options.way_limit_s:
                print("\n".join(f"{model:<13}{rest:<31}left out: no time" for rest in ways[count:]))
                return False
            found.red = too_slow
        wanted = wanted or found.losses
        keep(found)
        print(found.line(), flush=True)
        free(tokens.device.type)
    return True


if __name__ == "__main__":
    sys.exit(main())
