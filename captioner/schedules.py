"""What changes over a run: pure functions of the step and of the scores so far."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["cosine", "drops", "ramp", "rise"]


def rise(step: int, warmup: int) -> float:
    """Return the share of the peak learning rate while it rises: linear, 1 from ``warmup`` on."""
    return min(1.0, (step + 1) / max(warmup, 1))


def cosine(step: int, steps: int) -> float:
    """Return 1 at the first of ``steps``, falling as a cosine to 0 at the end.

    Source: Loshchilov and Hutter, "SGDR" (2017), equation 5, with one period.
    """
    return 0.5 * (1.0 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))


def drops(scores: Sequence[float], patience: int) -> int:
    """Return how often ``patience`` scores in a row were no better than the best before them."""
    best, waited, count = -math.inf, 0, 0
    for score in scores:
        waited = 0 if score > best else waited + 1
        best = max(best, score)
        if waited == patience:
            waited, count = 0, count + 1
    return count


def ramp(step: int, steps: int, highest: float) -> float:
    """Return a value that rises from 0 to ``highest`` as a line over ``steps``.

    Source: the linear decay of Bengio et al., "Scheduled Sampling" (2015), section 2.4.
    """
    return highest * min(step / max(steps, 1), 1.0)
