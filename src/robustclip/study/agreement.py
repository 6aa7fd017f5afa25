"""Do two sides put methods in the same order? Kendall's rank correlation, with an interval over images and trainings.

one = Side("photo", {"TeCoA": {"cifar10": outcomes}, ...})   # measured: right or wrong (seeds, images) of each set
two = Side("paper", {"TeCoA": 38.2, ...})                    # printed: a number
agreement(one, two)                                          # Estimate, 100 times the correlation
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple
from zlib import crc32

import numpy as np

from robustclip.checks import check_range
from robustclip.study.statistics import Estimate

FEWEST = 4  # methods that make an order: six pairs


class Side(NamedTuple):
    """What methods keep on one side, by set or in print; sides of the same name are of the same images."""

    name: str
    kept: Mapping[str, Mapping[str, np.ndarray] | float]


def tau_b(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of values (..., methods): (C - D) / sqrt((C + D + T1) (C + D + T2)), 0 where a side is all ties.

    C pairs of methods stand in the same order on both sides, D in the opposite one, T1 and T2 are tied on one only.
    """
    first, second = (np.sign(side[..., :, None] - side[..., None, :]) for side in (one, two))
    size = np.sqrt(np.square(first).sum((-2, -1)) * np.square(second).sum((-2, -1)))
    return (first * second).sum((-2, -1)) / np.where(size, size, 1)


def redrawn(side: Side, methods: Sequence[str], draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Accuracies (1 + draws, methods): first those measured, then those of images and trainings drawn again.

    All methods keep the same images: the first ones of a set that all of them have. Of S trainings of a method S - 1
    are drawn with replacement, as in `macro`. Printed numbers stay.
    """
    check_range("draws", draws, 100)
    values = [side.kept[method] for method in methods]
    if not isinstance(values[0], Mapping):
        return np.tile(np.asarray(values, dtype=float), (1 + draws, 1))
    means = []
    for name in values[0]:
        parts = [np.atleast_2d(sets[name]) for sets in values]
        size = min(part.shape[1] for part in parts)
        weights = _weights(size, size, draws, f"{side.name}/{name}/{size}", seed)
        shares = [_weights(len(part), max(len(part) - 1, 1), draws, f"{side.name}:{method}", seed)
                  for part, method in zip(parts, methods, strict=True)]  # fmt: skip
        means.append([(share * (weights @ part[:, :size].T)).sum(1) for share, part in zip(shares, parts, strict=True)])
    return np.mean(means, axis=0).T.round(9)  # so that equal counts are ties


def told(values: np.ndarray, most: float = 1.0) -> Estimate:
    """The first of some correlations, of which the others are bootstrap draws, in hundredths, with a 95 % interval.

    Noise pulls an order towards none, that of the draws twice. So the interval joins the draws' quantiles with their
    mirror image at the value, within the `most` that can be.
    """
    value, (low, high) = values[0], np.quantile(values[1:], [0.025, 0.975])
    ends = min(low, 2 * value - high), max(high, 2 * value - low)
    return Estimate(*(100 * float(np.clip(number, -most, most)) for number in (value, *ends)))


def correlations(one: Side, two: Side, draws: int = 2000, seed: int = 0) -> np.ndarray | None:
    """The correlation of two sides and its draws (1 + draws,), of the methods that both know; None for too few."""
    methods = [method for method in one.kept if method in two.kept]
    if len(methods) < FEWEST:
        return None
    return tau_b(*(redrawn(side, methods, draws, seed) for side in (one, two)))


def agreement(one: Side, two: Side, draws: int = 2000, seed: int = 0) -> Estimate | None:
    """How far two sides agree on the order of the methods that both know; None for fewer than `FEWEST` of them."""
    found = correlations(one, two, draws, seed)
    return None if found is None else told(found)


@lru_cache(maxsize=64)  # pages compare the same images of many pairs of sides; 5 MB each at 300 images
def _weights(count: int, drawn: int, draws: int, name: str, seed: int) -> np.ndarray:
    """Equal weights of so many, and how often each is among some `drawn` again: (1 + draws, count).

    What has the same name is drawn alike, whatever else is asked. Not to be changed by who reads it.
    """
    random, equal = np.random.default_rng([seed, crc32(name.encode())]), np.full(count, 1 / count)
    return np.vstack([equal, random.multinomial(drawn, equal, size=draws) / drawn])
