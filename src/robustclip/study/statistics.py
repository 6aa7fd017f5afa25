"""Intervals and tests for accuracies, in percent, from per-image outcomes (0 or 1)."""

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from robustclip.checks import check_range


@cache
def _quantile(level: float) -> float:
    """The z that a standard normal number stays below in size with this probability."""
    return float(stats.norm.ppf((1 + level) / 2))


Z = _quantile(0.95)


class Estimate(NamedTuple):
    """A value in percent (or points) with its 95 % confidence interval, from which `z` has its standard errors."""

    value: float
    low: float
    high: float

    def z(self, above: float | None = None, below: float | None = None) -> float:
        """How many standard errors the value lies inside its bounds: negative outside, 0 where the interval is NaN.

        The standard error towards a bound is the half of the interval on that side over 1.96, so that |z| is 1.96 where
        the interval touches the bound. An interval without width is exact, and z infinite.
        """
        down, up = self.value - self.low, self.high - self.value
        inside = [] if above is None else [_errors(self.value - above, down, up)]
        return min(inside + ([] if below is None else [_errors(below - self.value, up, down)]))


def wilson(correct: int, n: int, level: float = 0.95) -> Estimate:
    """Accuracy in percent with the Wilson score interval.

    The p between low and high are those with |correct / n - p| <= z sqrt(p (1 - p) / n).
    """
    check_range("n", n, 1)
    check_range("correct", correct, 0, n)
    z = _quantile(check_range("level", level, 0, 1))
    spread = z * math.sqrt(correct * (n - correct) / n + z**2 / 4)
    low, high = ((correct + z**2 / 2 + sign * spread) / (n + z**2) for sign in (-1, 1))
    return Estimate(100 * correct / n, 100 * low if correct else 0.0, 100 * high if correct < n else 100.0)


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


def hierarchical(first: ArrayLike, second: ArrayLike | None = None, draws: int = 4000, seed: int = 0) -> Estimate:
    """Accuracy over training seeds and images, or that of the first minus the second, with a bootstrap interval.

    Outcomes are (seeds, images), or (images,) of one seed, on the same images. Where both have several seeds these are
    pairs; one seed is paired with each of the other's. The interval of one seed says nothing about other seeds.
    """
    return macro([first], None if second is None else [second], draws, seed)


def macro(
    first: Sequence[ArrayLike], second: Sequence[ArrayLike] | None = None, draws: int = 4000, seed: int = 0
) -> Estimate:
    """Mean over roles of what `hierarchical` estimates: equal weight per role, however many images each has.

    A draw takes S - 1 of S seeds with replacement, the same for all roles (S of them would make the variance over seeds
    too small by (S - 1) / S), and new images of each role. Two right and two wrong images are added to draw from, for
    differences half a one for each side and one for neither (Agresti and Coull 1998; Agresti and Min 2005): so the
    interval has a width even if all images agree.
    """
    check_range("draws", draws, 100)
    others = [None] * len(first) if second is None else second
    if not len(first) or len(first) != len(others):
        raise ValueError(
            f"give outcomes of at least one role, and of the same roles, not {len(first)} and {len(others)}"
        )
    roles = list(map(_differences, first, others))
    count = len(roles[0])
    if any(len(role) != count for role in roles):
        raise ValueError(f"seeds must be the same for all roles, got {[len(role) for role in roles]} of them")
    return _bootstrap(tuple((role.shape, role.tobytes()) for role in roles), second is not None, draws, seed)


@lru_cache(maxsize=8192)  # pages ask for the same mean again and again
def _bootstrap(roles: tuple[tuple[tuple[int, int], bytes], ...], paired: bool, draws: int, seed: int) -> Estimate:
    """What `macro` estimates, from the shape and the bytes of each role's outcomes."""
    outcomes = [np.frombuffer(told, np.int8).reshape(shape) for shape, told in roles]
    random, count = np.random.default_rng(seed), len(outcomes[0])
    drawn = max(count - 1, 1)
    shares = random.multinomial(drawn, np.full(count, 1 / count), size=draws) / drawn
    pseudo = {1: 0.5, -1: 0.5, 0: 1} if paired else {1: 2, 0: 2}
    means = 100 * np.mean([_redrawn(role, pseudo, shares, random) for role in outcomes], axis=0)
    value = 100 * float(np.mean([role.mean() for role in outcomes]))
    low, high = np.quantile(means - means.mean() + value, [0.025, 0.975])
    return Estimate(value, max(float(low), -100.0 if paired else 0.0), min(float(high), 100.0))


def _errors(inside: float, toward: float, away: float) -> float:
    """A distance from a bound in standard errors, by the half of the interval on the side where the bound lies."""
    half = toward if inside > 0 else away
    if math.isnan(half + inside):
        return 0.0
    return Z * inside / half if half > 0 else math.copysign(math.inf, inside or -1.0)


def _differences(first: ArrayLike, second: ArrayLike | None) -> np.ndarray:
    """Outcomes (seeds, images) as numbers, or those of the first minus those of the second."""
    a, b = (np.atleast_2d(np.asarray(side)) for side in (first, 0 if second is None else second))
    if a.ndim != 2 or not a.size or (second is not None and (a.shape[1] != b.shape[1] or 1 != len(a) != len(b) != 1)):
        raise ValueError(f"outcomes must be (seeds, images) of the same images and seeds, got {a.shape} and {b.shape}")
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise ValueError("outcomes must be 0 or 1 for each image")
    return a.astype(np.int8) - b.astype(np.int8)


def _redrawn(
    outcomes: np.ndarray, pseudo: dict[int, float], shares: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Means (draws,) over images drawn again, each image the mean over seeds by their shares (draws, seeds).

    Images of the same outcomes are alike, so that what is drawn is how many there are of each kind.
    """
    kinds, counts = np.unique(outcomes, axis=1, return_counts=True)
    extra = np.repeat(np.array([list(pseudo)]), len(outcomes), axis=0)
    kinds, weights = np.hstack([kinds, extra]), np.concatenate([counts, list(pseudo.values())])
    drawn = random.multinomial(counts.sum(), weights / weights.sum(), size=len(shares))
    return (shares @ kinds * drawn).sum(axis=1) / counts.sum()


def _table(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, int, int]:
    """Counts of images that both get right, only the first, only the second, neither."""
    a, b = np.asarray(first), np.asarray(second)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"outcomes must be two equally long sequences, got shapes {a.shape} and {b.shape}")
    if not np.isin([a, b], (0, 1)).all():
        raise ValueError("outcomes must be 0 or 1 for each image")
    a, b = a.astype(bool), b.astype(bool)
    return tuple(int(count) for count in ((a & b).sum(), (a & ~b).sum(), (~a & b).sum(), (~a & ~b).sum()))
