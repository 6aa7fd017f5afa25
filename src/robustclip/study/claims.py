"""Claims of papers, and verdicts computed from what was measured: three counts, and one word by rule."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

import pandas as pd
from scipy import stats

from robustclip.checks import check_choice
from robustclip.study.scales import EVIDENCE
from robustclip.study.shipped import shipped_folder
from robustclip.study.statistics import Estimate, Z
from robustclip.study.store import Store, Where, write_whole

LEVEL = 0.05  # of all tests of a claim together, both sides
POWER = float(stats.norm.ppf(0.8))  # standard errors beyond the bound of a test for a power of 80 %
LARGEST = 4.0  # standard errors that one condition brings into the mean of all
COLUMNS = (
    *("id", "statement", "printed", "mark", "ours", "verdict", "agree", "contradict", "open", "outside", "note"),
    *("what", "value", "low", "high", "above", "below", "p", "outcome", "core", "reason"),
)
ENDS = tuple(f"{end}{side}" for end in ("smallest", "largest") for side in ("", "_low", "_high"))  # of core effects
TYPES = dict.fromkeys(("value", "low", "high", "above", "below", "p"), float)


@dataclass(frozen=True)
class Claim:
    """What a paper says: `printed` are its numbers, `mark` is where we have them from (paper, code, reconstructed).

    A statement that no paper makes is `ours`.
    """

    id: str
    statement: str
    printed: str = ""
    mark: str = "paper"
    ours: bool = False


@dataclass(frozen=True)
class Condition:
    """One testable part of a claim: an estimate must lie above and/or below a bound.

    Core conditions are what the paper says; others are shown and decide nothing. `outside` says why this world cannot
    test one: a reason that `room` finds in the baselines, without a look at the outcome.
    """

    what: str
    estimate: Estimate
    above: float | None = None
    below: float | None = None
    core: bool = True
    outside: str = ""

    def __post_init__(self) -> None:
        if self.above is None and self.below is None:
            raise ValueError(f"condition {self.what!r} has no bound; give above=... or below=...")

    @property
    def z(self) -> float:
        """Standard errors between the estimate and the nearest bound, positive on the claimed side."""
        return self.estimate.z(self.above, self.below)

    @property
    def p(self) -> float:
        """Two-sided p value of a truth on the bound, by the normal curve: 0.05 where the 95 % interval touches it.

        Of a mean over few seeds, whose tails are longer, values below 0.05 are too small.
        """
        return float(2 * stats.norm.sf(abs(self.z)))

    @property
    def visible(self) -> float:
        """The distance from the bound that the interval excludes it with a power of 80 %, in points."""
        return (Z + POWER) / Z * (self.estimate.high - self.estimate.low) / 2


class Verdict(StrEnum):
    """What the measurements say about a claim."""

    SUPPORTED = "supported"
    MIXED = "mixed"
    CONTRADICTED = "contradicted"
    OPEN = "open"
    OUTSIDE = "outside this world"


@dataclass(frozen=True)
class Judgement:
    """A claim with the conditions it was tested by; `outside` says why this world cannot test any of them."""

    claim: Claim
    conditions: tuple[Condition, ...]
    outside: str = ""

    @property
    def outcomes(self) -> list[str]:
        """Of each condition: agree, contradict, open or outside, after Holm within those that decide, and the rest."""
        found = ["outside" if self.outside or part.outside else "open" for part in self.conditions]
        for core in (True, False):
            group = [i for i, part in enumerate(self.conditions) if part.core == core and found[i] == "open"]
            for i, rejected in zip(group, holm([self.conditions[i].p for i in group]), strict=True):
                if rejected:
                    found[i] = "agree" if self.conditions[i].z > 0 else "contradict"
        return found

    @property
    def counts(self) -> dict[str, int]:
        """How many core conditions agree, contradict, are open, lie outside this world."""
        found = [outcome for part, outcome in zip(self.conditions, self.outcomes, strict=True) if part.core]
        return {outcome: found.count(outcome) for outcome in ("agree", "contradict", "open", "outside")}

    @property
    def verdict(self) -> Verdict:
        """The word: supported if some conditions agree, none contradicts, and `together` they reach 1.96.

        Contradicted if some contradict and none agrees; mixed if some do either. Outside this world if no condition can
        be tested there. Else open.
        """
        agree, contradict, unsettled, outside = self.counts.values()
        if self.outside or (outside and not agree + contradict + unsettled):
            return Verdict.OUTSIDE
        if contradict:
            return Verdict.MIXED if agree else Verdict.CONTRADICTED
        return Verdict.SUPPORTED if agree and together(self._deciding("z")) >= Z else Verdict.OPEN

    @property
    def note(self) -> str:
        """Of an open claim the effect that could have been seen and what would settle it; why one is outside."""
        if self.verdict is Verdict.OUTSIDE:
            return self.outside or "; ".join(dict.fromkeys(part.outside for part in self.conditions if part.outside))
        visible = [distance for distance in self._deciding("visible") if not math.isnan(distance)]
        if self.verdict is not Verdict.OPEN or not visible:
            return "not tested" * (self.verdict is Verdict.OPEN)
        return f"a distance of {median(visible):.1f} from the bound would have been seen; {self._settled_by()}"

    @property
    def times(self) -> float:
        """How many times as many images would settle an open claim with a power of 80 %, if the estimates are true."""
        zs = self._deciding("z")
        reached = max(together(zs), together([-z for z in zs]))
        return max(1.0, ((Z + POWER) / reached) ** 2) if reached > 0 else math.inf

    def _settled_by(self) -> str:
        if self.times > 100:
            return "what was measured is too close to the bound for any affordable n"
        return f"if the truth is what was measured, {self.times:.1f} times as many images would settle it"

    def _deciding(self, name: str) -> list[float]:
        return [getattr(part, name) for part in self.conditions if part.core and not part.outside]


def judge(claim: Claim, conditions: Sequence[Condition] = (), outside: str = "") -> Judgement:
    """The claim with its computed verdict; `outside` is a reason, known beforehand, why this world cannot test it."""
    return Judgement(claim, tuple(conditions), outside)


def holm(ps: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Which of m hypotheses fall: in the order of p, each as long as p <= level / (m - those that fell before)."""
    rejected = [False] * len(ps)
    for before, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        if not ps[index] <= level / (len(ps) - before):
            break
        rejected[index] = True
    return rejected


def together(zs: Sequence[float]) -> float:
    """Standard errors that conditions reach together: their mean z, but not more than two thirds of them reach.

    A mean of z has a variance of at most 1, however the conditions depend on each other, so that 1.96 is a valid bound.
    """
    if not zs:
        return 0.0
    reached = sorted((max(-LARGEST, min(z, LARGEST)) for z in zs), reverse=True)
    return min(sum(reached) / len(reached), reached[math.ceil(2 * len(reached) / 3) - 1])


def room(*sides: Estimate, claims: str, floor: float = 2.0, ceiling: float = 92.0, by: float = 0.0) -> str:
    """Why the baseline leaves no room for what is claimed, or "": a rule that looks at accuracies, not at differences.

    A claimed "gain" over a baseline needs it below the ceiling, a "loss" above the floor; a "difference" of two sides
    needs one of them above the floor and one below the ceiling, which is that of the design of our worlds. A loss `by`
    so many points needs a baseline as far above the floor.
    """
    check_choice("claims", claims, ("gain", "loss", "difference"))
    values = [side.value for side in sides]
    floor += by if claims == "loss" else 0
    told = " and ".join(f"{value:.1f} %" for value in values)
    if claims != "loss" and min(values) >= ceiling:
        return f"ceiling: {told} leaves no room for a {claims}"
    if claims != "gain" and max(values) <= floor:
        return f"floor: {told} leaves no room for a {claims}"
    return ""


def verdict_table(judgements: Sequence[Judgement]) -> pd.DataFrame:
    """One row per condition, with the verdict on its claim; of a claim without conditions, one row with its note."""
    twice = pd.Series([entry.claim.id for entry in judgements], dtype=str)
    if twice.duplicated().any():
        raise ValueError(f"claim {twice[twice.duplicated()].iloc[0]!r} is judged twice; give each claim its own id")
    rows = [row for entry in judgements for row in _rows(entry)]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(TYPES)


def keep_verdicts(judgements: Sequence[Judgement], scale: str, page: str, store: Where = None) -> pd.DataFrame:
    """Store what a page found, for the summary of its part, and return its table; `page` is like "mmcoa/ablation"."""
    table = verdict_table(judgements)
    records = table.astype(object).where(table.notna(), None).to_dict("records")
    path = Store(store).root / scale / "verdicts" / f"{page}.json"
    write_whole(path, json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    return table


def kept_verdicts(scale: str, part: str, folder: Where = None) -> pd.DataFrame:
    """What the pages of a part found: the frame of `verdict_table` with their names in front; empty if none ran.

    `folder` is a store, or the folder of shipped results. An id names one statement in all pages of a part.
    """
    found = sorted((Store(folder).root / scale / "verdicts" / part).glob("*.json"))
    rows = [{"page": path.stem} | row for path in found for row in json.loads(path.read_text(encoding="utf8"))]
    table = pd.DataFrame(rows, columns=["page", *COLUMNS]).astype(TYPES)
    for name, same in table.groupby("id"):
        if same["statement"].nunique() > 1:
            pages = " and ".join(same["page"].unique())
            raise ValueError(f"claim {name!r} says different things on the pages {pages}; give each its own id")
    return table


def summed(rows: pd.DataFrame) -> dict:
    """One claim at one scale, of all its conditions: the first columns, and the two `ENDS` of the effects that decide.

    The smallest and the largest effect are those of the core conditions that this world can test; without any, they are
    not there.
    """
    decides = rows["core"].astype(bool) & rows["outcome"].ne("outside") & rows["value"].notna()
    effects = rows[decides].sort_values("value")
    ends = effects.iloc[[0, -1]][["value", "low", "high"]].to_numpy().ravel() if len(effects) else []
    first = rows.iloc[0]
    return {name: first[name] for name in COLUMNS[: COLUMNS.index("what")]} | dict(zip(ENDS, ends, strict=False))


def is_tested(found: Mapping) -> bool:
    """Whether a verdict rests on anything: a claim is open without a condition where nothing was measured for it."""
    return found["verdict"] != Verdict.OPEN or any(found[outcome] for outcome in ("agree", "contradict", "open"))


def shipped_verdicts(scale: str, part: str) -> pd.DataFrame:
    """What the pages of a part found at a shipped scale; empty where nothing is shipped, or ignored."""
    folder = None if os.environ.get("ROBUSTCLIP_FRESH") == "1" else shipped_folder()
    return kept_verdicts(scale, part, folder) if folder else pd.DataFrame(columns=["page", *COLUMNS]).astype(TYPES)


def verdicts_by_scale(
    found: pd.DataFrame, scale: str, page: str, others: Sequence[str] = EVIDENCE
) -> dict[str, pd.DataFrame]:
    """What a page found at every scale: what is shipped of the others, and `found` at this one."""
    part, _, name = page.partition("/")
    frames = {one: shipped_verdicts(one, part) for one in others}
    own = {one: table[table["page"] == name].drop(columns="page") for one, table in frames.items()}
    return own | {scale: found}


def _rows(entry: Judgement) -> list[dict]:
    """The rows of one claim in a table of verdicts."""
    claim = vars(entry.claim) | {"verdict": str(entry.verdict)} | entry.counts | {"note": entry.note}
    if not entry.conditions:
        outcome = "outside" if entry.outside else "open"
        return [claim | {"what": entry.note, "outcome": outcome, "core": True, "reason": entry.outside}]
    return [
        claim
        | {"what": part.what, **part.estimate._asdict(), "above": part.above, "below": part.below, "p": part.p}
        | {"outcome": outcome, "core": part.core, "reason": part.outside or entry.outside}
        for part, outcome in zip(entry.conditions, entry.outcomes, strict=True)
    ]
