"""The claims ledger: every claim of the papers and every statement of ours, with its verdict in each world."""

import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import pandas as pd

from robustclip.study.claims import ENDS, Verdict, is_tested, kept_verdicts, shipped_verdicts, summed
from robustclip.study.scales import EVIDENCE

DUE = "due"
PARTS = {  # parts of the book with verdicts -> folders of their pages
    **{name: name for name in ("mmcoa", "cola", "scc")},
    **{name: f"survey/{name}" for name in ("testtime", "finetuning")},
    **{name: name for name in ("beyond", "foundations")},
}
SMALLER = {"full": "quick"}  # the same world in small, whose word is told while a verdict is due
KNOWING, WORST = "GEN-C1", ": worst case − CLIP alone"  # where the gains against those who know stand, and their name
FACTS = ("paper", "modality", "attacker", "where", "defense")
SAID = ("id", "statement", "printed", "mark", "ours", "page")
FOUND = ("verdict", "agree", "contradict", "open", "outside", *ENDS, "note")
AWARE = ("aware", "aware_low", "aware_high")
COLUMNS = ("scale", *SAID, *FACTS, *FOUND, *AWARE, "meanwhile", "link")


@cache
def known_claims() -> dict[str, dict]:
    """What is known of each claim of a paper beyond its verdicts, by id: `assets/claims.toml`, in its order."""
    told = tomllib.loads(files("robustclip").joinpath("assets/claims.toml").read_text(encoding="utf-8"))
    return {name: {"paper": paper} | facts for paper, claims in told.items() for name, facts in claims.items()}


def ledger(scales: Sequence[str] = EVIDENCE) -> pd.DataFrame:
    """One row per claim and scale: what was said, where, and the verdict with its counts and effects.

    Verdicts are the shipped ones; of pages that ship none, those that they found here. A claim that nothing tests is
    "due" (`meanwhile` is then the word of the same world in small), or "outside this world" with the reason in `note`.
    `aware` is what `defense` keeps more than CLIP alone, in points with an interval, if attackers know it.
    """
    judged = {scale: verdict_rows(scale) for scale in dict.fromkeys([*scales, *SMALLER.values()])}
    found = {scale: _found(rows) for scale, rows in judged.items()}
    said, rows = _claims(found), []
    for scale in scales:
        gains = _gains(judged[scale])
        small = found.get(SMALLER.get(scale, ""), {})
        for key, claim in said.items():
            verdict = found[scale].get(key)
            verdict = verdict if verdict and is_tested(verdict) else _missing(claim)
            word = small[key]["verdict"] if verdict["verdict"] == DUE and key in small else ""
            rows.append(verdict | gains.get(claim["defense"], {}) | claim | {"scale": scale, "meanwhile": word})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def in_both(claims: pd.DataFrame, one: str, other: str) -> pd.DataFrame:
    """The words of two scales, a row per statement of a ledger that both have tested, whatever they found."""
    tested = claims[~claims["verdict"].isin([DUE, str(Verdict.OUTSIDE)])]
    words = tested.pivot(index=["page", "id"], columns="scale", values="verdict").reindex(columns=[one, other])
    return words.dropna()


def verdict_rows(scale: str) -> pd.DataFrame:
    """Every condition of every page ("mmcoa/ablation") at a scale: what is shipped, else what the page found here."""
    parts = []
    for part in PARTS:
        shipped, kept = shipped_verdicts(scale, part), kept_verdicts(scale, part)
        both = [shipped, kept[~kept["page"].isin(shipped["page"])]]
        parts += [frame.assign(page=f"{part}/" + frame["page"]) for frame in both if len(frame)]
    return pd.concat(parts, ignore_index=True) if parts else kept


def _found(rows: pd.DataFrame) -> dict[tuple[str, str], dict]:
    """The verdicts by page and id."""
    return {key: summed(part) for key, part in rows.groupby(["page", "id"], sort=False)}


def _gains(rows: pd.DataFrame) -> dict[str, dict]:
    """By defense: what it keeps more than CLIP alone against the strongest of all attackers, aware ones included."""
    worst = rows[(rows["id"] == KNOWING) & rows["what"].str.endswith(WORST)]
    return {
        row["what"].removesuffix(WORST): dict(zip(AWARE, (row["value"], row["low"], row["high"]), strict=True))
        for row in worst.to_dict("records")
    }


def _claims(everything: dict[str, dict]) -> dict[tuple[str, str], dict]:
    """What was said, by page and id: the papers' claims in the order of the file, then our own statements."""
    told = {
        key: one for found in reversed(everything.values()) for key, one in found.items()
    }  # the first scale's words
    pages = {name: page for page, name in told}
    known, keys = known_claims(), []
    for name, facts in known.items():
        keys.append((pages.get(name, facts.get("page", "")), name))
    keys += sorted((key for key in told if key[1] not in known), key=lambda key: (*_place(key[0]), _natural(key[1])))
    return {key: _claim(key, told.get(key, {})) for key in keys}


def _place(page: str) -> tuple[int, str]:
    return [*PARTS].index(page.partition("/")[0]), page


def _natural(name: str) -> str:
    """An id whose numbers sort as numbers."""
    head = name.rstrip("0123456789")
    return f"{head}{name[len(head) :].zfill(4)}"


def _claim(key: tuple[str, str], told: dict) -> dict:
    """One claim: what was printed as its page told it, else as the file does, and what the file knows of it."""
    page, name = key
    facts = dict.fromkeys((*FACTS, "statement", "printed", "mark", "why"), "") | known_claims().get(name, {})
    part, _, place = page.partition("/")
    link = f"{PARTS[part]}/{place}.html#{name}" if page else ""
    said = {"id": name, "page": page, "link": link, "ours": bool(told.get("ours", False))}
    said |= {column: told[column] for column in ("printed", "mark") if told}
    return facts | said | {"statement": facts["statement"] or told.get("statement", "")}


def _missing(claim: dict) -> dict:
    """The verdict on what no page has tested: due, or outside this world where the file says why none is to."""
    word = str(Verdict.OUTSIDE) if claim["why"] and not claim["page"] else DUE
    return {"verdict": word, "note": claim["why"], **dict.fromkeys(("agree", "contradict", "open", "outside"), 0)}
