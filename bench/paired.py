"""Compare methods on the same clips: paired tests, Holm's correction, and whether an order repeats on other clips.

Clips are independent; a clip's edits and seeds are not. So every number here is of clips.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

# With fewer independent clips a difference is reported without significance.
LEAST_CLIPS = 4
LEVEL = 0.05
# More halvings than this are not all tried, but this many random ones.
_HALVINGS = 200

Side = Literal["greater", "two-sided"]


class Difference(NamedTuple):
    """A mean difference over ``n`` clips, its standard error, and the probability of one as large by chance.

    ``error`` is None of one clip, ``p`` of fewer than LEAST_CLIPS.
    """

    mean: float
    error: float | None
    n: int
    p: float | None


class Repeats(NamedTuple):
    """How well an order agrees between two halves of the clips: mean and least Kendall's tau over ``halvings``."""

    mean: float
    least: float
    halvings: int


def difference(values: Sequence[float], side: Side = "greater") -> Difference:
    """Test one difference per clip against 0 by the paired t-test, one-sided (mean above 0) or two-sided.

    Differences that are all equal have no spread to test with: then by the sign test, whose least p is 2 ** -n.
    """
    n = len(values)
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    if n < LEAST_CLIPS:
        return Difference(mean, error, n, None)
    if error is not None and error > 1e-12 * max(abs(mean), 1e-300):
        return Difference(mean, error, n, float(stats.ttest_1samp(values, 0.0, alternative=side).pvalue))
    above, unequal = sum(value > 0 for value in values), sum(value != 0 for value in values)
    p = stats.binomtest(above, unequal, alternative=side).pvalue if unequal else 1.0
    return Difference(mean, 0.0, n, float(p))


def holm(probabilities: Sequence[float | None]) -> list[float | None]:
    """Correct for how many differences are looked at (Holm 1979); None stays None and is not counted."""
    known = sorted((p, index) for index, p in enumerate(probabilities) if p is not None)
    corrected: list[float | None] = [None] * len(probabilities)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = largest
    return corrected


def repeats(scores: Mapping[str, Mapping[str, float]], seed: int = 0) -> Repeats | None:
    """Return Kendall's tau of the order of methods between two disjoint halves of the clips.

    ``scores``: method -> clip -> mean. All halvings, or a fixed number of random ones of ``seed``. A half in which all
    methods are equal has no order, and agrees with none: tau 0. None for fewer than LEAST_CLIPS clips that all methods
    have, or fewer than three methods.
    """
    clips = sorted(set.intersection(*(set(found) for found in scores.values()))) if scores else []
    if len(clips) < LEAST_CLIPS or len(scores) < 3:
        return None
    table = np.array([[scores[method][clip] for clip in clips] for method in scores])
    taus = []
    for half in _halves(len(clips), seed):
        rest = [index for index in range(len(clips)) if index not in half]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tau = float(stats.kendalltau(table[:, list(half)].mean(1), table[:, rest].mean(1)).statistic)
        taus.append(0.0 if math.isnan(tau) else tau)
    return Repeats(statistics.fmean(taus), min(taus), len(taus))


def _halves(n: int, seed: int) -> list[tuple[int, ...]]:
    count = math.comb(n, n // 2)
    if count <= 2 * _HALVINGS:
        every = list(combinations(range(n), n // 2))
        # With an even number of clips, every halving occurs twice.
        return [half for half in every if 0 in half] if n % 2 == 0 else every
    random = np.random.default_rng(seed)
    return [tuple(random.choice(n, n // 2, replace=False).tolist()) for _ in range(_HALVINGS)]
