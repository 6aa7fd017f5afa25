"""How weights follow the gradient of a loss: optimizer, rate, and for how long."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from robustclip.checks import check_choice, check_integer, check_range
from robustclip.component import component


def one_cycle(share: float, rise: float = 0.2, start: float = 1 / 25, end: float = 1e-4) -> float:
    """Up along half a cosine over the first fifth of the updates, down along another half over the rest."""
    if share < rise:
        low, place = start, 1 - share / rise
    else:
        low, place = end, (share - rise) / (1 - rise)
    return low + (1 - low) * (1 + math.cos(math.pi * place)) / 2


SCHEDULES: dict[str, Callable[[float], float]] = {"one-cycle": one_cycle, "constant": lambda share: 1.0}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.98), eps=1e-6),
    "adam": partial(torch.optim.Adam, betas=(0.9, 0.98), eps=1e-6),
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


@component
class Optimisation:
    """How the weights follow the gradient, and for how long.

    `epochs` passes over the pictures (`updates=None`), so that more pictures mean more updates; or a fixed number of
    `updates` of `batch_size` pictures; with both, whichever is fewer. The learning `rate` rises and falls once
    ("one-cycle") or stays ("constant"). Weight decay is decoupled ("adamw"), or part of the gradient ("adam", "sgd").
    """

    updates: int | None = 600
    epochs: float | None = None
    batch_size: int = 128
    optimizer: str = "adamw"
    rate: float = 2e-3
    schedule: str = "one-cycle"
    weight_decay: float = 1e-4
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if self.updates is None and self.epochs is None:
            raise ValueError("updates=None and epochs=None are not allowed together; give one of the two")
        if self.updates is not None:
            check_integer("updates", self.updates, 1)
        check_integer("batch_size", self.batch_size, 1)
        for name in ("epochs", "clip_norm"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1e-9)
        check_range("rate", self.rate, 0)
        check_range("weight_decay", self.weight_decay, 0)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)

    def start(self, weights: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The optimizer for these weights; the loop sets its rate."""
        return OPTIMIZERS[self.optimizer](weights, lr=self.rate, weight_decay=self.weight_decay)

    def updates_on(self, pictures: int) -> int:
        """How many updates there are on a set of so many pictures."""
        needed = math.inf if self.epochs is None else math.ceil(self.epochs * pictures / self.batch_size)
        return int(min(needed, math.inf if self.updates is None else self.updates))

    def rate_at(self, update: int, updates: int) -> float:
        """The learning rate of an update."""
        return self.rate * SCHEDULES[self.schedule](update / updates)
