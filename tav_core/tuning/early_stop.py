"""Find the step at which a tuning stopped improving: the loss jumps from step to step, so its mean decides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def stopped_improving_at(losses: Sequence[float], patience: int) -> int | None:
    """Return the number of steps after which the loss had not fallen for ``patience`` steps; None if it still falls.

    The loss is smoothed over the last ``patience`` steps; ``patience`` steps after its lowest value, progress is
    over, which is after twice as many at the earliest. It depends on nothing that comes after the step it names.
    Losses that are not finite (steps that were left out) are passed over.
    """
    values = np.asarray(losses, dtype=np.float64)
    if patience < 1 or len(values) < 2 * patience:
        return None
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.where(finite, values, 0.0).cumsum()])
    counts = np.concatenate([[0], finite.cumsum()])
    sums, counts = sums[patience:] - sums[:-patience], counts[patience:] - counts[:-patience]
    best, since = np.inf, 0
    for window, (total, count) in enumerate(zip(sums, counts, strict=True)):
        smooth = total / count if count else np.inf
        best, since = (smooth, 0) if smooth < best else (best, since + 1)
        if since == patience:
            return window + patience
    return None
