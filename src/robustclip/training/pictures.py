"""Training pictures, k-shot subsets of them, and the order in which they come."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from robustclip.checks import check_choice, check_integer
from robustclip.classes import Classes
from robustclip.data.sources import load_samples
from robustclip.data.tinyworld import generator

SAMPLERS = ("fixed", "released")


@dataclass(frozen=True, eq=False)
class Pictures:
    """Labeled pictures to learn from; `fetch` turns rows into (k, 3, h, w) pixels in [0, 1]."""

    labels: Tensor = field(repr=False)
    classes: Classes = field(repr=False)
    digest: str
    fetch: Callable[[Tensor], Tensor] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def prompts(self) -> tuple[str, ...]:
        """One per class."""
        return self.classes.prompts

    @classmethod
    def of(cls, role: str, source: str = "tinyworld", n: int | None = None) -> "Pictures":
        """The first n pictures of a role's training split, kept in memory as bytes."""
        samples = load_samples(role, source, "train", n)
        images = (samples.images * 255).round().to(torch.uint8)
        fetch = lambda rows: images[rows].float().div_(255)  # noqa: E731
        return cls(samples.labels, samples.classes, f"{samples.digest}-{n}", fetch)


class Order:
    """Which pictures make up the batch of each update; nothing to remember between updates but their number.

    "fixed" draws a subset of k pictures per class once and shuffles it anew in every epoch. "released" follows MMCoA's
    code: in every epoch the next k pictures of each class, new ones until its list is used up, and ordered by class.
    Batches go on from one epoch into the next.
    """

    def __init__(self, labels: Tensor, batch_size: int, shots: int | None, sampler: str, seed: int) -> None:
        check_choice("sampler", sampler, SAMPLERS)
        self.batch_size, self.sampler, self.seed, self.shots = batch_size, sampler, seed, shots
        shuffled = torch.randperm(len(labels), generator=generator(f"subset/{seed}", 0))
        by_class = shuffled[labels[shuffled].argsort(stable=True)]
        self.lists = by_class.split(labels.bincount().tolist())
        if shots is not None:
            smallest = min(map(len, self.lists))
            check_integer(f"shots (the smallest class has {smallest} pictures)", shots, 1, smallest)
        self.subset = torch.cat([rows[:shots] for rows in self.lists])
        draw = self._shuffled if sampler == "fixed" or shots is None else self._next
        self._epoch = lru_cache(maxsize=2)(draw)

    def __len__(self) -> int:
        """Pictures in an epoch."""
        return len(self.subset)

    def rows(self, update: int) -> Tensor:
        """The batch of an update."""
        start, end, length = update * self.batch_size, (update + 1) * self.batch_size, len(self)
        epochs = range(start // length, (end - 1) // length + 1)
        return torch.cat([self._epoch(i)[max(0, start - i * length) : end - i * length] for i in epochs])

    def _shuffled(self, epoch: int) -> Tensor:
        return self.subset[torch.randperm(len(self), generator=generator(f"order/{self.seed}", epoch))]

    def _next(self, epoch: int) -> Tensor:
        window = torch.arange(epoch * self.shots, (epoch + 1) * self.shots)
        return torch.cat([rows[window % len(rows)] for rows in self.lists])
