"""What was claimed and what was found: the answer on top of a page, claims with verdict and evidence."""

from collections.abc import Mapping, Sequence
from html import escape

import pandas as pd

from robustclip.checks import check_choice
from robustclip.report.figures import Picture
from robustclip.report.markup import SYMBOLS, Block, badge, folded, paragraphs
from robustclip.report.tables import Field, HtmlTable, grade_of, label
from robustclip.report.words import DUE, MISSING, WORLDS
from robustclip.study.claims import is_tested, summed

OUTCOMES = {"agree": "✓ agrees", "contradict": "✗ contradicts", "open": "? open", "outside": "○ outside this world"}


def answer(
    sentences: Sequence[str], figure: Picture | None = None, verdicts: Mapping[str, pd.DataFrame] | None = None
) -> Block:
    """Open a page with what was found: two or three computed sentences, verdict words with counts, one figure."""
    if isinstance(sentences, str) or not sentences:
        raise ValueError(f"sentences={sentences!r} is not allowed; give a list of two or three sentences")
    counted = {WORLDS.get(scale, scale): _words(frame) for scale, frame in (verdicts or {}).items() if len(frame)}
    badges = [f"<p>{escape(head)}: {_badges(counts)}</p>" for head, counts in counted.items()]
    html = [paragraphs(sentences, "said"), *badges, figure._repr_html_() if figure else ""]
    text = [*sentences, *(f"{head}: {_counted(counts)}" for head, counts in counted.items())]
    text += [repr(figure)] * bool(figure)
    section = '<section class="robustclip-answer" aria-label="Answer">'
    return Block("\n".join([section, *html, "</section>"]), "\n\n".join(text))


def verdicts(found: Mapping[str, pd.DataFrame], caption: str = "Claims under test") -> Block:
    """List claims with the verdict at each scale, its counts and effect; below, folded, every condition at every scale.

    `found` maps scales to frames of `verdict_table` or `kept_verdicts`. Each claim is the anchor of its id; in a frame
    of several pages it leads to the page that tested it.
    """
    rows = _together(found)
    lines, seen = [], set()
    for (number, page), mine in rows.groupby(["id", "page"], sort=False):
        first, anchor = mine.iloc[0], f"{number}-{page}".replace("/", "-") if number in seen else number
        seen.add(number)
        target = f"{page}.html#{number}" if page else f"#{anchor}"
        name = f'<a id="{escape(anchor)}" href="{escape(target)}">{escape(number)}</a>'
        printed = f"{first['printed']} {grade_of(first['mark'])}".strip() or MISSING
        parts = [mine[mine["scale"] == scale] for scale in found]
        told = [summed(part) if len(part) else None for part in parts]
        verdicts = [verdict_field(one) if one and is_tested(one) else Field(DUE) for one in told]
        lines.append((Field(number, html=name), Field(first["statement"]), Field(printed), *verdicts))
    heads = ("claim", "statement", "printed", *(WORLDS.get(scale, scale) for scale in found))
    if not rows["printed"].any():  # statements of our own, printed nowhere
        heads, lines = (*heads[:2], *heads[3:]), [(*line[:2], *line[3:]) for line in lines]
    table = HtmlTable(heads, tuple(lines), 1, caption)
    evidence = _evidence(rows, found)
    folding = folded("Evidence: every condition at every scale", evidence._repr_html_())
    return Block(table._repr_html_() + folding, f"{table!r}\n\n{evidence!r}")


def evidence(found: Mapping[str, pd.DataFrame], ids: Sequence[str]) -> HtmlTable:
    """Show every condition of some claims: where it had to lie, and the estimate with its outcome at each scale."""
    rows = _together(found)
    return _evidence(rows[rows["id"].isin(ids)], found)


def _together(found: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The verdicts of all scales in one frame with the columns `scale` and `page`; a condition may stand there once."""
    if not found or all(frame.empty for frame in found.values()):
        raise ValueError("no verdicts; give frames of `verdict_table` by scale, as in {'quick': frame}")
    rows = pd.concat([frame.assign(scale=scale) for scale, frame in found.items()], ignore_index=True)
    rows = rows.assign(page=rows.get("page", pd.Series("", index=rows.index)).fillna(""))
    for word in rows["verdict"].unique():
        check_choice("verdict", word, SYMBOLS)
    for row in rows[rows.duplicated(["scale", "page", "id", "what"])].to_dict("records"):
        raise ValueError(f"claim {row['id']!r} has {row['what']!r} twice at scale {row['scale']}; give an id once")
    padded = rows["id"].str.replace(r"\d+", lambda digits: digits[0].zfill(4), regex=True)  # C2 before C10
    return rows.loc[padded.sort_values(kind="stable").index]


def _words(frame: pd.DataFrame) -> dict[str, int]:
    """How many claims that were tested got each verdict, in the order of the words."""
    claims = frame.drop_duplicates([name for name in ("page", "id") if name in frame])
    counts = claims[claims.apply(is_tested, axis=1).astype(bool)]["verdict"].value_counts()
    return {word: int(counts[word]) for word in SYMBOLS if word in counts}


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def _badges(counts: Mapping[str, int]) -> str:
    return " ".join(badge(word, count) for word, count in counts.items())


def verdict_field(found: Mapping) -> Field:
    """The place of a verdict, of what `summed` says: word, counts, the smallest and the largest effect it rests on."""
    ends = dict.fromkeys(
        interval(found[end], found[f"{end}_low"], found[f"{end}_high"])
        for end in ("smallest", "largest")
        if not pd.isna(found.get(end))
    )
    counts = f"{found['agree']} agree, {found['contradict']} contradict, {found['open']} open"
    small = tuple(filter(None, [counts if ends else "", " to ".join(ends), found["note"]]))
    word = found["verdict"]
    return Field(f"{SYMBOLS[word]} {word}", [*SYMBOLS].index(word), small=small, html=badge(word))


def _evidence(rows: pd.DataFrame, scales: Mapping[str, object]) -> HtmlTable:
    """One line per condition: where it had to lie, and the estimate with its outcome at each scale.

    Of a claim that a scale has tested no other condition is due there: its world has no such set.
    """
    lines, tested = [], rows[rows.apply(is_tested, axis=1).astype(bool)]
    judged = set(tested[["scale", "page", "id"]].itertuples(index=False, name=None))
    for (page, claim, what), part in rows.groupby(["page", "id", "what"], sort=False):
        by_scale = {row["scale"]: row for row in part.to_dict("records")}
        row = next(iter(by_scale.values()))
        bounds = [f"{side} {row[side]:g}" for side in ("above", "below") if not pd.isna(row[side])]
        absent = {scale: Field() if (scale, page, claim) in judged else Field(DUE) for scale in scales}
        places = [_outcome(by_scale[scale]) if scale in by_scale else absent[scale] for scale in scales]
        what += " (decides nothing)" * (not row["core"])
        lines.append((Field(claim), label("what", what), Field(" and ".join(bounds) or MISSING), *places))
    heads = ("claim", "condition", "agrees if", *(WORLDS.get(scale, scale) for scale in scales))
    return HtmlTable(heads, tuple(lines), 2, "")


def _outcome(row: Mapping) -> Field:
    text = OUTCOMES[row["outcome"]] + f" ({row['reason']})" * bool(row["reason"])
    told = interval(row["value"], row["low"], row["high"])
    return Field(text) if pd.isna(row["value"]) else Field(told, row["value"], small=(text,))


def interval(value: float, low: float, high: float) -> str:
    """An effect with its interval, as in "+3.1 [+1.0, +5.2]"."""
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
