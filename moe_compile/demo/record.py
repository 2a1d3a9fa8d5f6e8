"""What a demo run leaves behind: plain dataclasses that read and write JSON."""

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 3  # left out of the median: allocator, caches, late recompilation


@dataclass
class VariantRun:
    """One variant of one model. Times in seconds; `error` is "" when it ran to the end."""

    key: str
    label: str
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    first_step_s: float = math.nan
    error: str = ""

    @property
    def median_s(self) -> float:
        """Median time of a step after warm-up, in seconds; NaN when too few steps ran."""
        timed = self.step_s[WARM_UP_STEPS:]
        return statistics.median(timed) if timed else math.nan


@dataclass
class ParityResult:
    """Largest relative difference of a variant's losses from the reference's."""

    key: str
    num_steps: int
    max_relative: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """NaN counts as different."""
        return self.num_steps > 0 and self.max_relative <= self.tolerance


@dataclass
class RegionRecord:
    """One record of `moe_compile.explain`, as text."""

    matched: bool
    module: str
    location: str
    form: str
    num_experts: int
    top_k: int | None
    reason: str | None
    before: str = ""
    after: str = ""


@dataclass
class ModelRun:
    """Everything about one model."""

    name: str
    title: str
    sizes: str
    num_parameters: int
    tokens_per_step: int
    variants: list[VariantRun] = field(default_factory=list)
    parity: list[ParityResult] = field(default_factory=list)
    regions: dict[str, list[RegionRecord]] = field(default_factory=dict)
    explain_error: str = ""
    validation_before: float = math.nan
    validation_after: float = math.nan
    prompt: str = ""
    generated: str = ""
    generate_s: float = math.nan
    generate_error: str = ""

    def variant(self, key: str) -> VariantRun | None:
        """Return the run of the variant called `key`."""
        return next((run for run in self.variants if run.key == key), None)

    def speed_up(self, key: str, over: str) -> float:
        """Return how many times faster a step of `key` is than one of `over`."""
        fast, slow = self.variant(key), self.variant(over)
        return slow.median_s / fast.median_s if fast and slow else math.nan


@dataclass
class RunRecord:
    """One whole run: the machine, the settings, the models."""

    machine: dict[str, str]
    settings: dict[str, str]
    models: list[ModelRun] = field(default_factory=list)
    total_s: float = math.nan

    @property
    def passed(self) -> bool:
        """True when every variant ran and every compared loss curve equals the reference."""
        return bool(self.models) and all(
            model.parity
            and all(result.passed for result in model.parity)
            and not any(run.error for run in model.variants)
            for model in self.models
        )

    def to_json(self) -> str:
        """Return the record as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def save(self, path: Path) -> None:
        """Write the record to `path`."""
        path.write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: Path) -> "RunRecord":
        """Read a record that `save` wrote."""
        content: dict[str, Any] = json.loads(path.read_text())
        models = [_model(entry) for entry in content.pop("models")]
        return cls(**content, models=models)


def _model(entry: dict[str, Any]) -> ModelRun:
    variants = [VariantRun(**run) for run in entry.pop("variants")]
    parity = [ParityResult(**result) for result in entry.pop("parity")]
    regions = {form: [RegionRecord(**region) for region in found] for form, found in entry.pop("regions").items()}
    return ModelRun(**entry, variants=variants, parity=parity, regions=regions)
