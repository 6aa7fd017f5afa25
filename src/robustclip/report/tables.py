"""Tables: semantic HTML that needs no script, and the same as Markdown where HTML is not shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import numpy as np
import pandas as pd

from robustclip.checks import check_choice
from robustclip.report import words

VERDICTS = {"reproduced": "✓", "partly": "◐", "not reproduced": "✗", "not testable": "○"}


class Entry(NamedTuple):
    """One place in a table: what is read, what a script sorts by, whether it is the best."""

    text: str = words.MISSING
    sort: object = ""
    best: bool = False


@dataclass(frozen=True, repr=False)
class Table:
    """A finished table; the first `labels` columns name the row."""

    heads: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    labels: int
    caption: str
    notes: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        """Return plain HTML; "dataframe" is the class that notebook and book themes color in light and dark."""
        heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in self.heads)
        tags = [("th", ' scope="row"')] * self.labels + [("td", "")] * (len(self.heads) - self.labels)
        body = "\n".join(f"<tr>{''.join(map(_html, tags, row))}</tr>" for row in self.rows)
        return (
            '<div class="robustclip-table-wrap" style="overflow-x:auto">\n<table class="robustclip-table dataframe">\n'
            f"<caption>{escape(self.caption)}</caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n"
            f'</table>\n<p class="robustclip-table-note">{"<br>".join(map(escape, self.notes))}</p>\n</div>'
        )

    def __repr__(self) -> str:
        body = [[f"**{entry.text}**" if entry.best else entry.text for entry in row] for row in self.rows]
        lines = [[text.replace("|", "\\|") for text in line] for line in (self.heads, *body)]
        widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        grid = "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)
        return "\n\n".join([self.caption, grid, *self.notes])


def table(
    frame: pd.DataFrame,
    rows: str | Sequence[str] = ("model", "attack"),
    columns: str | Sequence[str] = "dataset",
    value: str = "accuracy",
    interval: str = "range",
    best: str | None = None,
    caption: str = "Results",
    note: str = "",
) -> Table:
    """Pivot a frame of `evaluate`: one `value` for each combination of `rows` and `columns`; two are an error.

    `interval` is "range" (83.0 [79.1, 86.4]), "half" (83.0 ± 3.6) or "none". `best="model"` prints the highest of the
    models in bold, for each column and each combination of the other rows.
    """
    down, across = ([names] if isinstance(names, str) else list(names) for names in (rows, columns))
    check_choice("interval", interval, ("range", "half", "none"))
    words.check_unique(frame, down + across, value)
    printed, tops = frame[value].round(1), [False] * len(frame)
    if best:
        rest = [frame[name] for name in down + across if name != check_choice("best", best, down)]
        tops = printed.eq(printed.groupby(rest or printed.isna(), dropna=False).transform("max"))
    body: dict[tuple, dict[tuple, Entry]] = {}
    for record, top in zip(frame.to_dict("records"), tops, strict=True):
        row, head = (tuple(_label(name, record[name]) for name in names) for names in (down, across))
        body.setdefault(row, {})[head] = _number(record, value, interval if value == "accuracy" else "none", top)
    heads = list(dict.fromkeys(head for line in body.values() for head in line))
    titles = (" / ".join(entry.text for entry in head) or words.UNITS.get(value, value) for head in heads)
    lines = tuple((*row, *(line.get(head, Entry()) for head in heads)) for row, line in body.items())
    notes = (note,) * bool(note) + words.notes(frame, down + across, value)
    return Table((*down, *titles), lines, len(down), f"{caption} ({words.scale_of(frame)})", notes)


def comparison(frame: pd.DataFrame, results: pd.DataFrame, caption: str = "Paper and this run") -> Table:
    """Put the numbers of `compare` side by side: paper, reference run at scale full (`reference`, if known), this run.

    `results`, the frame of `evaluate` that was compared, supplies scale and notes. A printed number that is not from
    the paper itself is followed by its grade. `attacker` and `setting` are shown where they tell rows apart.
    """
    down = [name for name in ("method", "attack", "printed_eps", "eps", "dataset") if name in frame]
    down += ["attacker"] * (frame.get("attacker", pd.Series()).replace("none", pd.NA).nunique() > 1)
    down += ["setting"] * bool("setting" in frame and frame.duplicated(down).any())
    titles = {"printed_eps": "eps (paper)", "eps": "eps (this run)"}
    heads = [titles.get(name, name) for name in down] + ["paper (%)", "reference (%, full)", "this run (%)"]
    lines = []
    for record in frame.to_dict("records"):
        exact = "" if pd.isna(record["printed"]) else f"{record['printed']:.2f}".removesuffix("0")
        printed = Entry(words.text_of("printed", exact) + _mark(record.get("grade")), exact)
        reference = _number({"reference": record.get("reference")}, "reference")
        labels = (_label(name, record[name]) for name in down)
        lines.append((*labels, printed, reference, _number(record, "ours", "range")))
    caption = f"{caption} ({words.scale_of(results)})"
    return Table(tuple(heads), tuple(lines), len(down), caption, words.notes(results, down))


def verdicts(frame: pd.DataFrame, scale: str | None = None, caption: str = "Claims under test") -> Table:
    """List claims (id, statement, printed, verdict, evidence), each verdict as a symbol and in words."""
    names = ["id", "statement", "printed", "verdict", "evidence"]
    if (frame["printed"].fillna("") == "").all():  # claims of our own, printed nowhere
        names.remove("printed")
    lines = []
    for record in frame.to_dict("records"):
        word = record["verdict"]
        kind = check_choice("verdict", next((kind for kind in VERDICTS if word.startswith(kind)), word), VERDICTS)
        printed = f"{record['printed']}{_mark(record.get('mark'))}"
        shown = record | {"verdict": f"{VERDICTS[kind]} {word}", "printed": printed}
        lines.append(tuple(_label(name, shown[name]) for name in names))
    return Table(tuple(names), tuple(lines), 1, f"{caption} ({words.scale_of(frame, scale)})")


def _label(name: str, value: object) -> Entry:
    return Entry(words.text_of(name, value), "" if pd.isna(value) else value)


def _mark(origin: object) -> str:
    """Say where a printed number was found, if not in the paper itself."""
    return "" if pd.isna(origin) or origin in ("primary", "paper", "") else f" ({origin})"


def _number(record: dict, value: str, interval: str = "none", best: bool = False) -> Entry:
    """Write a number with its interval (half its width, or its ends) and the mark of an old result."""
    number, low, high = record.get(value), record.get("low", np.nan), record.get("high", np.nan)
    text = f"{number:,}" if isinstance(number, int) else f"{number or 0:,.1f}"
    if interval != "none" and not pd.isna(low + high):
        text += f" ± {(high - low) / 2:.1f}" if interval == "half" else f" [{low:.1f}, {high:.1f}]"
    marks = f" {words.STALE}" * (record.get("stale") in (True,))
    marks += f" {words.FLAGGED}" * (value == "accuracy" and bool(words.flags_of(record.get("flags"))))
    return Entry() if pd.isna(number) else Entry(text + marks, number, best)


def _html(tag: tuple[str, str], entry: Entry) -> str:
    text = f"<strong>{escape(entry.text)}</strong>" if entry.best else escape(entry.text)
    return f'<{tag[0]}{tag[1]} data-sort="{escape(str(entry.sort))}">{text}</{tag[0]}>'
