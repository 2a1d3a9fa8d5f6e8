"""Do the losses of two runs agree?"""

import math
from collections.abc import Sequence

from moe_compile.demo.record import ParityResult

COMPARED_STEPS = 20
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest relative difference of two losses. The float32 bound is 1000 times the rounding of one
loss (1e-7 measured between uncompiled forms); bfloat16 keeps 8 bits, so one rounding is 4e-3."""


def compare_losses(
    key: str,
    reference: Sequence[float],
    losses: Sequence[float],
    tolerance: float,
    num_steps: int = COMPARED_STEPS,
) -> ParityResult:
    """Return the largest relative difference over the first `num_steps` steps both runs have."""
    pairs = list(zip(reference, losses, strict=False))[:num_steps]
    differences = [abs(value - wanted) / abs(wanted) for wanted, value in pairs]
    finite = all(math.isfinite(difference) for difference in differences)
    worst = max(differences, default=math.nan) if finite else math.nan
    return ParityResult(key, len(pairs), worst, tolerance)
