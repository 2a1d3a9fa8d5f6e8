"""One training run: losses, time per step, time to the first step."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_compile.demo.data import Corpus
from moe_compile.demo.models import ModelSpec, Variant, build_model
from moe_compile.demo.record import VariantRun

ADAM_EPS = 1e-5
"""Above AdamW's usual 1e-8 on purpose. A token whose K-th and (K+1)-th router scores are equal to
within rounding may go to either expert. Such a token alone gives that expert gradients near 1e-9,
which eps 1e-8 blows up to full-size updates: two correct runs then differ by 1e-2 after 20 steps
(eps 1e-6: up to 4e-4, eps 1e-5: 6e-6; weights perturbed by 3e-7, both models, 2-core CPU)."""


@dataclass(frozen=True)
class TrainSettings:
    """Everything that fixes a run besides the model. Rates per step, lengths in tokens."""

    batch_size: int = 4
    length: int = 128
    seed: int = 0
    learning_rate: float = 1e-3
    warm_up_steps: int = 10
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step trains on."""
        return self.batch_size * self.length


class Trainer:
    """An unmodified model, AdamW, and the batches of `corpus` in a fixed order."""

    def __init__(self, spec: ModelSpec, variant: Variant, corpus: Corpus, settings: TrainSettings) -> None:
        self.settings = settings
        self.corpus = corpus
        self.variant = variant
        self.model = build_model(spec, variant.experts, settings.seed, settings.dtype, settings.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.learning_rate, eps=ADAM_EPS, fused=True)
        self.num_steps = 0

    def compile(self) -> None:
        """Hand the model to the variant's compiler; the work happens in the first step."""
        if self.variant.backend is not None:
            self.model.compile(backend=self.variant.backend)

    def step(self) -> float:
        """Train on the next batch and return its loss (cross entropy + load balancing)."""
        settings = self.settings
        rate = settings.learning_rate * min(1.0, (self.num_steps + 1) / settings.warm_up_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens = self.corpus.batch(self.num_steps, settings.batch_size, settings.length, settings.seed).to(
            settings.device
        )
        loss: Tensor = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
        return loss.item()

    def timed_step(self) -> tuple[float, float]:
        """Return (loss, seconds) of one step, with the device idle before and after."""
        synchronize(self.settings.device)
        start = time.perf_counter()
        loss = self.step()
        synchronize(self.settings.device)
        return loss, time.perf_counter() - start


def train_variant(trainer: Trainer, num_steps: int, on_step: Callable[[int, float], None] | None = None) -> VariantRun:
    """Run `num_steps` steps; the first one includes compilation. Errors end up in the record."""
    run = VariantRun(trainer.variant.key, trainer.variant.label)
    try:
        start = time.perf_counter()
        trainer.compile()
        for index in range(num_steps):
            loss, seconds = trainer.timed_step()
            if index == 0:
                run.first_step_s = time.perf_counter() - start
            run.losses.append(loss)
            run.step_s.append(seconds)
            if on_step is not None:
                on_step(index, loss)
    except Exception as error:  # a compiler may raise anything; the other variants still run
        run.error = describe(error)
    return run


@torch.no_grad()
def validation_loss(model: nn.Module, batches: list[Tensor], device: str) -> float:
    """Mean loss over held-out batches, by the uncompiled forward (`Module.forward`)."""
    model.eval()
    losses = [
        model.forward(input_ids=tokens, labels=tokens, use_cache=False).loss.item()
        for tokens in (batch.to(device) for batch in batches)
    ]
    model.train()
    return sum(losses) / len(losses)


def describe(error: Exception) -> str:
    """Return the type and the first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def synchronize(device: str) -> None:
    """Wait until the device has finished."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@contextmanager
def cold_compilers() -> Iterator[None]:
    """No compiled code from before: Dynamo reset, Inductor's caches off and its folder empty."""
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    gc.collect()
    with config.patch(force_disable_caches=True), fresh_cache():
        yield
    torch._dynamo.reset()
    gc.collect()


def warm_up_toolchain(device: str) -> None:
    """Compile something small, so that no variant pays for imports and compiler start-up."""
    with cold_compilers():
        value = torch.randn(8, 8, device=device, requires_grad=True)
        torch.compile(lambda x: x.sin().softmax(-1).sum())(value).backward()
