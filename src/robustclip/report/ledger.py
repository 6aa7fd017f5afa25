"""The claims ledger as a page shows it: one row per claim, a column per world, select boxes, counts per paper."""

from collections.abc import Mapping
from html import escape

import pandas as pd
from matplotlib.figure import Figure

from robustclip.report.claims import interval, verdict_field
from robustclip.report.figures import COLORS, stacked
from robustclip.report.markup import SYMBOLS
from robustclip.report.tables import Field, HtmlTable, grade_of
from robustclip.report.words import DUE, MISSING, WORLDS

LOOKS = dict(zip(SYMBOLS, (COLORS[2], COLORS[1], COLORS[3], COLORS[0], "0.6"), strict=True)) | {DUE: "0.85"}
ATTACKERS = {"both": "blind and aware", "none": MISSING}


def ledger(frame: pd.DataFrame, root: str = "", caption: str = "Claims") -> HtmlTable:
    """Show a frame of `study.ledger`: a row per claim that leads to its evidence, and its verdict at every scale.

    `root` leads from the page to the first folder of the book. Statements of our own stand under their page, claims of
    papers under the paper with what was printed, what is attacked and who attacks.
    """
    ours, scales = frame["ours"].all(), list(frame["scale"].unique())
    lines = []
    for _, rows in frame.groupby(["page", "id"], sort=False):
        first, by_scale = rows.iloc[0], {row["scale"]: row for row in rows.to_dict("records")}
        verdicts = [_verdict(by_scale[scale]) for scale in scales]
        facts = [Field(first["page"], first["page"])] if ours else _facts(first)
        lines.append((_name(first, root), Field(first["statement"]), *facts, *verdicts))
    heads = ["claim", "statement", *(["page"] if ours else ["paper", "printed", "attacked", "attacker"])]
    chosen, worlds = heads[2:3] + ([] if ours else ["attacked"]), [WORLDS.get(scale, scale) for scale in scales]
    return HtmlTable((*heads, *worlds), tuple(lines), 1, caption, filters=(*chosen, *worlds))


def tally(frame: pd.DataFrame, title: str = "Claims of the papers, by verdict") -> Figure:
    """Draw how many claims of each paper got which verdict, a panel per scale."""
    symbols = {word: f"{SYMBOLS.get(word, '')} {word}".strip() for word in LOOKS}
    looks = {symbols[word]: color for word, color in LOOKS.items()}
    return stacked(frame.assign(verdict=frame["verdict"].map(symbols)), "paper", "verdict", "scale", looks, title)


def _name(row: Mapping, root: str) -> Field:
    """The id, an anchor that leads to the page that tested the claim."""
    name = escape(row["id"])
    target = f' href="{escape(root + row["link"])}"' if row["link"] else ""
    return Field(row["id"], html=f'<a id="{name}"{target}>{name}</a>')


def _verdict(row: Mapping) -> Field:
    """The place of a verdict; of one that is due, what the same world in small says meanwhile."""
    if row["verdict"] != DUE:
        place = verdict_field(row)
        gain = "" if pd.isna(row["aware"]) else interval(row["aware"], row["aware_low"], row["aware_high"])
        return place._replace(small=(*place.small, *[f"aware: {row['defense']} {gain} over CLIP alone"] * bool(gain)))
    meanwhile = f"quick: {SYMBOLS[row['meanwhile']]} {row['meanwhile']}" if row["meanwhile"] else ""
    return Field(DUE, small=tuple(filter(None, (meanwhile, row["note"]))))


def _facts(row: Mapping) -> list[Field]:
    """Paper, printed number with its place, what is attacked and who attacks."""
    place = tuple(filter(None, (row["where"], grade_of(row["mark"]))))
    attacker = ATTACKERS.get(row["attacker"], row["attacker"])
    attacked = row["modality"] if row["modality"] != "none" else MISSING
    return [
        Field(row["paper"], row["paper"]),
        Field(row["printed"] or MISSING, small=place),
        Field(attacked, attacked),
        Field(attacker, attacker),
    ]
