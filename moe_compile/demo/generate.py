"""Text from a trained model through `model.generate` and a KV cache."""

import time
from typing import Any

import torch
from torch import nn

from moe_compile.demo.data import decode, encode

PROMPT = "def __init__(self, name):\n    "


@torch.no_grad()
def generate_text(
    model: nn.Module, device: str, prompt: str = PROMPT, max_new_tokens: int = 200, seed: int = 0
) -> tuple[str, float]:
    """Return (new text, seconds). Sampled at temperature 0.7 with a static key-value cache.

    A model compiled in place runs its compiled code here too: one graph for the prompt and one
    for the single-token steps. The seconds include compiling both.
    """
    model.eval()
    tokens = encode(prompt).to(device)
    torch.manual_seed(seed)
    start = time.perf_counter()
    generator: Any = model
    output = generator.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        cache_implementation="static",
        disable_compile=True,  # the model is compiled already; no second compiler on top
    )
    seconds = time.perf_counter() - start
    model.train()
    return decode(output[0, tokens.shape[1] :].tolist()), seconds
