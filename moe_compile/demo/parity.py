"""Do the losses of two runs agree?"""

import math
from collections.abc import Sequence

from moe_compile.demo.record import ParityResult

COMPARED_STEPS = {"float32": 20, "bfloat16": 10}
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Largest relative difference of two losses. The float32 bound is 1000 times the rounding of one
loss (1e-7 measured between uncompiled forms). In bfloat16 a token's last expert is soon another
one, and correct runs part: Hugging Face's own two forms, uncompiled, differ by up to 3e-3 within
10 steps and by up to 2e-2 within 20 (both models, three seeds, 2-core CPU)."""


def compare_losses(
    key: str,
    reference: Sequence[float],
    losses: Sequence[float],
    tolerance: float,
    num_steps: int = max(COMPARED_STEPS.values()),
) -> ParityResult:
    """Return the largest relative difference over the first `num_steps` steps both runs have."""
    pairs = list(zip(reference, losses, strict=False))[:num_steps]
    differences = [abs(value - wanted) / abs(wanted) for wanted, value in pairs]
    finite = all(math.isfinite(difference) for difference in differences)
    worst = max(differences, default=math.nan) if finite else math.nan
    return ParityResult(key, len(pairs), worst, tolerance)
