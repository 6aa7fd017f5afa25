"""Claims of papers, and verdicts computed from measured differences."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from enum import StrEnum

import pandas as pd

from robustclip.study.statistics import Estimate
from robustclip.study.store import Store, Where, write_whole

OUTCOMES = ("holds", "fails", "undecided")
MANY = 4  # conditions of which the evidence names every interval


@dataclass(frozen=True)
class Claim:
    """What a paper says: `printed` are its numbers, `mark` is where we have them from (paper, code, reconstructed)."""

    id: str
    statement: str
    printed: str = ""
    mark: str = "paper"


@dataclass(frozen=True)
class Condition:
    """One testable part of a claim: an estimate must lie above and/or below a bound, with its whole interval."""

    what: str
    estimate: Estimate
    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        if self.above is None and self.below is None:
            raise ValueError(f"condition {self.what!r} has no bound; give above=... or below=...")

    @property
    def outcome(self) -> str:
        """ "holds" if the interval is inside the bounds, "fails" if it is outside, else "undecided"."""
        low, high = self.estimate.low, self.estimate.high
        lower = float("-inf") if self.above is None else self.above
        upper = float("inf") if self.below is None else self.below
        if low > lower and high < upper:
            return "holds"
        return "fails" if high <= lower or low >= upper else "undecided"


class Verdict(StrEnum):
    """What the measurements say about a claim."""

    REPRODUCED = "reproduced"
    PARTLY = "partly"
    NOT_REPRODUCED = "not reproduced"
    NOT_TESTABLE = "not testable at this scale"


@dataclass(frozen=True)
class Judgement:
    """A claim with the conditions it was tested by."""

    claim: Claim
    conditions: tuple[Condition, ...]

    @property
    def verdict(self) -> Verdict:
        """All conditions hold: reproduced. Some: partly. None, and one fails: not reproduced. Else not testable."""
        outcomes = [condition.outcome for condition in self.conditions]
        if outcomes and all(outcome == "holds" for outcome in outcomes):
            return Verdict.REPRODUCED
        if "holds" in outcomes:
            return Verdict.PARTLY
        return Verdict.NOT_REPRODUCED if "fails" in outcomes else Verdict.NOT_TESTABLE


def judge(claim: Claim, conditions: Sequence[Condition] = ()) -> Judgement:
    """The claim with its computed verdict; no conditions means that this scale cannot test it."""
    return Judgement(claim, tuple(conditions))


def verdict_table(judgements: Sequence[Judgement]) -> pd.DataFrame:
    """One row per claim: id, statement, printed numbers, mark, verdict and the measured evidence."""
    rows = [(*astuple(entry.claim), str(entry.verdict), _evidence(entry.conditions)) for entry in judgements]
    return pd.DataFrame(rows, columns=["id", "statement", "printed", "mark", "verdict", "evidence"])


def keep_verdicts(table: pd.DataFrame, scale: str, page: str, store: Where = None) -> pd.DataFrame:
    """Store what a page found, for the summary of its part, and return it; `page` is like "mmcoa/ablation"."""
    path = Store.of(store).root / scale / "verdicts" / f"{page}.csv"
    write_whole(path, table.to_csv(index=False, lineterminator="\n"))
    return table


def kept_verdicts(scale: str, part: str, folder: Where = None) -> pd.DataFrame:
    """What the pages of a part found: the frame of `verdict_table` with their names in front; empty if none ran.

    `folder` is a store, or "results" for the committed verdicts of a scale.
    """
    root = Store.of(folder).root / scale / "verdicts"
    pages = [
        pd.read_csv(path, keep_default_na=False).assign(page=path.stem) for path in sorted((root / part).glob("*.csv"))
    ]
    names = ["page", "id", "statement", "printed", "mark", "verdict", "evidence"]
    return pd.concat(pages)[names].reset_index(drop=True) if pages else pd.DataFrame(columns=names)


def _evidence(conditions: Sequence[Condition]) -> str:
    """One entry per condition, such as "gain on CIFAR10: 31.0 [24.1, 37.2] (holds)"; of many, the values by outcome."""
    if len(conditions) > MANY:
        by_outcome: dict[str, list[str]] = {}
        for entry in sorted(conditions, key=lambda entry: OUTCOMES.index(entry.outcome)):
            by_outcome.setdefault(entry.outcome, []).append(f"{entry.what} {entry.estimate.value:+.1f}")
        return ". ".join(
            f"{out} {len(some)} of {len(conditions)}: {'; '.join(some)}" for out, some in by_outcome.items()
        )
    parts = [(entry.what, *entry.estimate, entry.outcome) for entry in conditions]
    return "; ".join(f"{what}: {value:.1f} [{low:.1f}, {high:.1f}] ({out})" for what, value, low, high, out in parts)
