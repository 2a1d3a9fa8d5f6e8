"""All models and variants in a row, with a callback for progress."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from moe_compile.demo.data import Corpus, load_corpus
from moe_compile.demo.generate import PROMPT, generate_text
from moe_compile.demo.machine import machine_facts
from moe_compile.demo.models import (
    REFERENCE,
    SPECS,
    ExpertsForm,
    ModelSpec,
    Variant,
    build_model,
    num_parameters,
    variants,
)
from moe_compile.demo.parity import COMPARED_STEPS, TOLERANCE, compare_losses
from moe_compile.demo.record import ModelRun, RegionRecord, RunRecord
from moe_compile.demo.train import (
    Trainer,
    TrainSettings,
    cold_compilers,
    describe,
    train_variant,
    validation_loss,
    warm_up_toolchain,
)

FORMS: dict[str, ExpertsForm] = {"HF eager loop": "eager", "HF default": "grouped_mm"}
LONGEST = "moe_ep_loop"  # the variant that trains to the end and then writes text


@dataclass(frozen=True)
class DemoSettings:
    """What the command line chooses. Steps per variant; the longest one has its own number."""

    train: TrainSettings
    models: Sequence[str] = ("mixtral", "qwen3_moe")
    steps: int = 30
    long_steps: int = 600
    new_tokens: int = 300
    backend: str = "moe_ep"
    compiled_text: bool = True  # text comes out of compiled code; otherwise the trained weights write it uncompiled
    specs: Mapping[str, ModelSpec] = field(default_factory=lambda: SPECS)

    def steps_of(self, variant: Variant) -> int:
        """Return how many steps a variant trains for."""
        return max(self.steps, self.long_steps) if variant.key == LONGEST else self.steps


Progress = Callable[[str, int, int, float], None]
"""Called as (what runs, step, steps in all, loss)."""


def run_demo(settings: DemoSettings, on_progress: Progress) -> RunRecord:
    """Train every chosen model with every variant and return the record."""
    start = time.perf_counter()
    corpus = load_corpus()
    record = RunRecord(machine_facts(settings.train.device), _settings_text(settings, corpus))
    on_progress("start the compilers", 0, 1, float("nan"))
    warm_up_toolchain(settings.train.device)
    for name in settings.models:
        record.models.append(_run_model(settings.specs[name], settings, corpus, on_progress))
    record.total_s = time.perf_counter() - start
    return record


def _run_model(spec: ModelSpec, settings: DemoSettings, corpus: Corpus, on_progress: Progress) -> ModelRun:
    train = settings.train
    run = ModelRun(
        spec.name,
        spec.title,
        spec.sizes,
        num_parameters(build_model(spec)),
        train.tokens_per_step,
        prompt=PROMPT,
    )
    for variant in variants(settings.backend):
        num_steps = settings.steps_of(variant)
        title = f"{spec.title}: {variant.label}"
        on_progress(title, 0, num_steps, float("nan"))
        with cold_compilers():
            trainer = Trainer(spec, variant, corpus, train)
            if variant.key == LONGEST:
                batches = corpus.validation_batches(8, train.batch_size, train.length)
                run.validation_before = validation_loss(trainer.model, batches, train.device)
            on_step = partial(_report_step, on_progress, title, num_steps)
            result = train_variant(trainer, num_steps, on_step)
            run.variants.append(result)
            if variant.key == LONGEST and not result.error:
                run.validation_after = validation_loss(trainer.model, batches, train.device)
                on_progress(f"{spec.title}: generate text", 0, 1, float("nan"))
                _generate(run, trainer.model, settings)
    _compare(run, settings)
    on_progress(f"{spec.title}: explain", 0, 1, float("nan"))
    _explain(run, spec, settings, corpus)
    return run


def _report_step(on_progress: Progress, title: str, num_steps: int, step: int, loss: float) -> None:
    on_progress(title, step + 1, num_steps, loss)


def _compare(run: ModelRun, settings: DemoSettings) -> None:
    reference = run.variant(REFERENCE)
    dtype = str(settings.train.dtype).removeprefix("torch.")
    bound, steps = TOLERANCE[dtype], COMPARED_STEPS[dtype]
    for result in run.variants:
        if reference is not None and result is not reference and not result.error:
            run.parity.append(compare_losses(result.key, reference.losses, result.losses, bound, steps))


def _generate(run: ModelRun, model: nn.Module, settings: DemoSettings) -> None:
    stance = "default" if settings.compiled_text else "force_eager"
    try:
        with torch.compiler.set_stance(stance):
            text = generate_text(model, settings.train.device, max_new_tokens=settings.new_tokens)
        run.generated, run.generate_s = text
    except Exception as error:  # reported beside the numbers that did come out
        run.generate_error = describe(error)


def _explain(run: ModelRun, spec: ModelSpec, settings: DemoSettings, corpus: Corpus) -> None:
    train = settings.train
    tokens = corpus.batch(0, train.batch_size, train.length, train.seed).to(train.device)
    try:
        from moe_compile import explain

        for label, experts in FORMS.items():
            model = build_model(spec, experts, train.seed, train.dtype, train.device)
            torch._dynamo.reset()
            report = explain(model, input_ids=tokens, labels=tokens, use_cache=False)
            run.regions[label] = [region_record(region) for region in report.regions]
    except Exception as error:  # reported beside the numbers that did come out
        run.explain_error = describe(error)


def region_record(region: Any) -> RegionRecord:
    """Copy what the report shows from a region of `moe_compile.explain`."""
    return RegionRecord(
        region.matched,
        region.module,
        region.location,
        region.form,
        region.num_experts,
        region.top_k,
        region.reason,
        getattr(region, "before", ""),
        getattr(region, "after", ""),
    )


def _settings_text(settings: DemoSettings, corpus: Corpus) -> dict[str, str]:
    train = settings.train
    return {
        "compiler under test": settings.backend,
        "dtype": str(train.dtype).removeprefix("torch."),
        "device": train.device,
        "batch": f"{train.batch_size} x {train.length} tokens",
        "steps": f"{settings.steps} (longest variant {max(settings.steps, settings.long_steps)})",
        "seed": str(train.seed),
        "optimizer": f"AdamW (fused), peak rate {train.learning_rate:g}",
        "text": f"{len(corpus.train):,} bytes in {len(corpus.train_files)} files of the standard "
        f"library; {len(corpus.validation):,} bytes held out",
    }
