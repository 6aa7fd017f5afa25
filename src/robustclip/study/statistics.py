"""Intervals and tests for accuracies, in percent, from per-image outcomes (0 or 1)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from robustclip.checks import check_range


class Estimate(NamedTuple):
    """A value in percent (or points) with its confidence interval."""

    value: float
    low: float
    high: float


def wilson(correct: int, n: int, level: float = 0.95) -> Estimate:
    """Accuracy in percent with the Wilson score interval.

    The p between low and high are those with |correct / n - p| <= z sqrt(p (1 - p) / n).
    """
    check_range("n", n, 1)
    check_range("correct", correct, 0, n)
    interval = stats.binomtest(correct, n).proportion_ci(check_range("level", level, 0, 1), method="wilson")
    return Estimate(100 * correct / n, 100 * float(interval.low), 100 * float(interval.high))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact p value that two models are equally often right on the same images.

    Of the b + c images on which they differ, the first is right on b; under equality b is Binomial(b + c, 1/2).
    """
    _, only_first, only_second, _ = _table(first, second)
    differ = only_first + only_second
    return float(stats.binomtest(only_first, differ).pvalue) if differ else 1.0


def paired_difference(first: Sequence[bool], second: Sequence[bool], level: float = 0.95) -> Estimate:
    """Accuracy of the first minus the second in points, on the same images, with Newcombe's interval (method 10).

    It joins the two Wilson intervals (l1, u1), (l2, u2) through the correlation phi of the outcomes:
    low = d - sqrt((p1 - l1)^2 - 2 phi (p1 - l1)(u2 - p2) + (u2 - p2)^2), and high alike with u1 and l2.
    """
    both, only_first, only_second, neither = _table(first, second)
    n = len(first)
    p1, l1, u1 = wilson(both + only_first, n, level)
    p2, l2, u2 = wilson(both + only_second, n, level)
    cross = both * neither - only_first * only_second
    cross = max(cross - n / 2, 0) if cross > 0 else cross
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    phi = cross / math.sqrt(margins) if margins else 0.0
    down = math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    up = math.sqrt((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2)
    return Estimate(p1 - p2, p1 - p2 - down, p1 - p2 + up)


def mean_interval(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean over seeds with Student's t interval; one value alone has no interval (NaN)."""
    numbers = np.asarray(values, dtype=float)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"values={values!r} is not allowed; give at least one finite number")
    mean, half = float(numbers.mean()), math.nan
    if len(numbers) > 1:
        quantile = stats.t.ppf((1 + check_range("level", level, 0, 1)) / 2, len(numbers) - 1)
        half = float(quantile * stats.sem(numbers))
    return Estimate(mean, mean - half, mean + half)


def _table(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, int, int]:
    """Counts of images that both get right, only the first, only the second, neither."""
    a, b = np.asarray(first), np.asarray(second)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"outcomes must be two equally long sequences, got shapes {a.shape} and {b.shape}")
    if not np.isin([a, b], (0, 1)).all():
        raise ValueError("outcomes must be 0 or 1 for each image")
    a, b = a.astype(bool), b.astype(bool)
    return tuple(int(count) for count in ((a & b).sum(), (a & ~b).sum(), (~a & b).sum(), (~a & ~b).sum()))
