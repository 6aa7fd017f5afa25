"""Time two ways to do the same thing, in turns in one process, so that both meet the same machine.

Beside the seconds on the clock stand those the processor spent on us: where others compute at the same time, their
ratio is the steadier one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of every round, and what the last round returned."""

    ours: list[float]
    rival: list[float]
    our_result: Any
    rival_result: Any
    our_processor: list[float] = field(default_factory=list)
    rival_processor: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """How many times faster ours was, round by round, smallest first."""
        return _ratios(self.ours, self.rival)

    def row(self, name: str, **more: Any) -> dict:
        """One line of the table: median seconds, median ratio and its range over the rounds."""
        return {
            "name": name,
            "ours_seconds": median(self.ours),
            "rival_seconds": median(self.rival),
            "ratio": median(self.ratios),
            "ratio_low": self.ratios[0],
            "ratio_high": self.ratios[-1],
            "ratio_processor": median(_ratios(self.our_processor, self.rival_processor) or self.ratios),
            "rounds": len(self.ours),
            **more,
        }


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long `work` takes, everything it queued on a GPU included, and what it returns."""
    _wait()
    begin = perf_counter()
    result = work()
    _wait()
    return perf_counter() - begin, result


def side_by_side(ours: Callable[[], Any], rival: Callable[[], Any], rounds: int = 3, warm_up: bool = True) -> Timing:
    """Run both in turns for `rounds` rounds after a warm-up; who goes first alternates."""
    if rounds < 1:
        raise ValueError(f"rounds={rounds!r} is not allowed; it must be at least 1")
    if warm_up:
        ours(), rival()
    times: tuple[list[float], list[float]] = ([], [])
    processor: tuple[list[float], list[float]] = ([], [])
    results: list[Any] = [None, None]
    for turn in range(rounds):
        for who in (0, 1) if turn % 2 == 0 else (1, 0):
            begin = process_time()
            spent, results[who] = seconds((ours, rival)[who])
            processor[who].append(process_time() - begin)
            times[who].append(spent)
    return Timing(*times, *results, *processor)


def _ratios(ours: list[float], rival: list[float]) -> list[float]:
    return sorted(theirs / own for own, theirs in zip(ours, rival, strict=True))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
