"""Tables: semantic HTML that needs no script, and the same as Markdown where HTML is not shown."""

import json
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import numpy as np
import pandas as pd

from robustclip.checks import check_choice
from robustclip.report import words
from robustclip.report.markup import Block, folded, marked, paragraphs
from robustclip.study.reported import named
from robustclip.study.scales import scale as scale_named
from robustclip.study.scales import scale_names

SETTINGS = ["task", "metric", "attack", "attacker", "defense", "seed"]
CELL = ["model", "role", *SETTINGS]  # the same at two scales: the same experiment


class Field(NamedTuple):
    """One place in a table: what is read, what a script sorts by, whether it is the best, muted lines below.

    `html` is shown instead of the text where a place holds more than text.
    """

    text: str = words.MISSING
    sort: object = ""
    best: bool = False
    small: tuple[str, ...] = ()
    html: str = ""


@dataclass(frozen=True, repr=False)
class HtmlTable:
    """A finished table: the first `labels` columns name the row, `note` stands below, `notes` are folded.

    `filters` are heads of columns that a page gives a select box, to show only the rows with one of their values.
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[Field, ...], ...]
    labels: int
    caption: str
    notes: tuple[str, ...] = ()
    note: str = ""
    filters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for head in self.filters:
            check_choice("filters", head, self.heads)

    def _repr_html_(self) -> str:
        """Return plain HTML; "dataframe" is the class that notebook and book themes color in light and dark."""
        chosen = {head: " data-filter" * (head in self.filters) for head in self.heads}
        heads = "".join(f'<th scope="col"{chosen[head]}>{escape(head)}</th>' for head in self.heads)
        caption = f"<caption>{escape(self.caption)}</caption>\n" * bool(self.caption)
        body = "\n".join(f"<tr>{''.join(map(self._place, range(len(row)), row))}</tr>" for row in self.rows)
        below = paragraphs(filter(None, self.note.splitlines()), "note")
        return (
            '<div class="robustclip-table-wrap">\n<table class="robustclip-table dataframe">\n'
            f"{caption}<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n"
            f"</table>\n</div>\n{below}{folded('Data, attack, audit', paragraphs(self.notes, 'note'))}"
        )

    def _place(self, column: int, field: Field) -> str:
        tag, scope = ("th", ' scope="row"') if column < self.labels else ("td", "")
        text = field.html or marked(field.text)
        text = f"<strong>{text}</strong>" if field.best else text
        text += "".join(f" <small>{marked(line)}</small>" for line in field.small)
        label = escape(self.heads[column])
        return f'<{tag}{scope} data-label="{label}" data-sort="{escape(str(field.sort))}">{text}</{tag}>'

    def __repr__(self) -> str:
        body = [[", ".join([f"**{it.text}**" if it.best else it.text, *it.small]) for it in row] for row in self.rows]
        lines = [[text.replace("|", "\\|") for text in line] for line in (self.heads, *body)]
        widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        grid = "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)
        return "\n\n".join(filter(None, [self.caption, grid, self.note.strip(), *self.notes]))


def listing(
    frame: pd.DataFrame, caption: str = "", labels: int = 1, note: str = "", filters: Sequence[str] = ()
) -> HtmlTable:
    """Show any frame as it is, in the style of the book; the first `labels` columns name the row.

    The columns `filters` get select boxes.
    """
    lines = [tuple(map(label, frame.columns, row)) for row in frame.itertuples(index=False)]
    return HtmlTable(tuple(map(str, frame.columns)), tuple(lines), labels, caption, note=note, filters=tuple(filters))


def downloads(frame: pd.DataFrame, name: str) -> Block:
    """Links that save a frame as `name`.csv and `name`.json; both files are in the page itself.

    The JSON is a list of objects, one per row; what is missing or empty in a row is left out.
    """
    rows = json.loads(frame.to_json(orient="records"))
    told = [{column: value for column, value in row.items() if value not in (None, "")} for row in rows]
    files = {"csv": frame.to_csv(index=False), "json": json.dumps(told, ensure_ascii=False)}
    kinds = {"csv": "text/csv", "json": "application/json"}
    links = " ".join(
        f'<a download="{escape(name)}.{end}" '
        f'href="data:{kinds[end]};charset=utf-8;base64,{b64encode(text.encode()).decode()}">{end.upper()}</a>'
        for end, text in files.items()
    )
    html = f'<p class="robustclip-note">All {len(frame)} rows: <span class="robustclip-save">{links}</span></p>'
    return Block(html, f"{name}.csv and {name}.json, {len(frame)} rows, are links on the page.")


def settings(
    told: Mapping[tuple[str, str], tuple[str, str]],
    here: Mapping[str, Mapping[tuple[str, str], str]],
    caption: str = "Every setting",
) -> HtmlTable:
    """Put what a paper and its code say of each (part, setting) beside what it is at each scale, once where it is one.

    `here` maps scales to all that `told` names.
    """
    lines = [(*key, *said, _said_once({scale: own[key] for scale, own in here.items()})) for key, said in told.items()]
    return listing(pd.DataFrame(lines, columns=["part", "setting", "paper", "code", "here"]), caption, labels=2)


def table(
    frame: pd.DataFrame,
    rows: str | Sequence[str] = ("model", "attack"),
    columns: str | Sequence[str] = "dataset",
    value: str = "accuracy",
    interval: str = "range",
    best: str | None = None,
    caption: str = "Results",
    note: str = "",
) -> HtmlTable:
    """Pivot a frame of `evaluate`: one `value` for each combination of `rows` and `columns`; two are an error.

    `interval` is "range" (83.0 [79.1, 86.4]), "half" (83.0 ± 3.6), "below" (a line of its own, with n) or "none".
    `best="model"` prints the highest of the models in bold, for each column and combination of the other rows.
    """
    down, across = ([names] if isinstance(names, str) else list(names) for names in (rows, columns))
    check_choice("interval", interval, ("range", "half", "below", "none"))
    words.check_unique(frame, down + across, value)
    body: dict[tuple, dict[tuple, Field]] = {}
    for record in frame.to_dict("records"):
        row, head = (tuple(label(name, record[name]) for name in names) for names in (down, across))
        body.setdefault(row, {})[head] = number(record, value, interval if value == "accuracy" else "none")
    heads = list(dict.fromkeys(head for line in body.values() for head in line))
    titles = (" / ".join(field.text for field in head) or words.UNITS.get(value, value) for head in heads)
    lines = [(*row, *(line.get(head, Field()) for head in heads)) for row, line in body.items()]
    lines = _with_best(lines, down, check_choice("best", best, down)) if best else lines
    notes, below = words.notes(frame, down + across, value), f"{note}\n{words.played(frame)}"
    return HtmlTable((*down, *titles), tuple(lines), len(down), f"{caption} ({words.scale_of(frame)})", notes, below)


def comparison(
    printed: pd.DataFrame,
    run: pd.DataFrame,
    references: Mapping[str, pd.DataFrame] | None = None,
    on: Sequence[str] = ("method", "attack", "dataset"),
    methods: Mapping[str, str] | None = None,
    best: str | None = None,
    caption: str = "Paper and measurements",
    note: str = "",
    unit: str = "%",
) -> HtmlTable:
    """Put paper, references and this run side by side, one column per number, with n and interval below each.

    `printed` comes from `reported`, `run` from `evaluate`, `references` maps scales to their shipped results; of those
    the cells of this run are taken, at the same multiple of their scale's budget (at equal eps if `on` names eps), on
    the most images; in rows that this run has not, what was measured there in the same way. `methods` translates our
    names into the paper's. "due" is what this run has and a reference has not. A printed number that is not from the
    paper itself is followed by its grade. `best="method"`: the highest of the methods in bold.
    """
    on, run = list(on), _usual(named(run, methods))
    if "metric" not in on:
        printed, run = printed[printed["metric"] == "accuracy"], run[run["metric"] == "accuracy"]
    eps, here = (
        printed["eps_value"].mask(printed["attack"] == "clean", 0.0),
        f"this run ({', '.join(set(run['scale']))})",
    )
    theirs = printed.assign(accuracy=printed["value"], printed_eps=printed["eps"], eps=eps)
    known = {name: named(frame, methods) for name, frame in (references or {}).items()}
    rest = theirs[~_among(theirs, run, on)]
    measured = {name: pd.concat([_same_cells(frame, run, on), _other_cells(frame, run, rest, on)])
                for name, frame in known.items()}  # fmt: skip
    measured = {words.WORLDS.get(name, name): frame for name, frame in measured.items()} | {here: run}
    columns = {head: _places(frame, on, number) for head, frame in measured.items()}
    columns = {"paper": _places(theirs, on, _printed)} | columns
    rows, due = dict.fromkeys([*columns["paper"], *columns[here]]), dict.fromkeys(columns[here], Field(words.DUE))
    missing = dict.fromkeys(columns, due) | {"paper": {}}
    lines = [
        (*map(label, on, key), *(found.get(key, missing[head].get(key, Field())) for head, found in columns.items()))
        for key in rows
    ]
    lines = _with_best(lines, on, check_choice("best", best, on)) if best else lines
    said = {head: frame for head, frame in measured.items() if len(frame)}
    heads = [head + _shared_n(said.get(head, theirs)) for head in columns]
    notes = tuple(f"{head}: {' '.join(words.notes(frame, on))}" for head, frame in said.items())
    below = [note, *(f"{head}: {played}" for head, frame in said.items() if (played := words.played(frame)))]
    return HtmlTable((*on, *heads), tuple(lines), len(on), f"{caption}, in {unit}", notes, "\n".join(below))


def counterparts(references: Mapping[str, pd.DataFrame], run: pd.DataFrame) -> pd.DataFrame:
    """The cells of `run` as the first of some scales has them, for charts to be drawn from; no rows if none has any."""
    found = (_same_cells(frame, _usual(run), []) for frame in references.values())
    return next((frame for frame in found if len(frame)), run[:0])


def label(name: str, value: object) -> Field:
    """The place of a value that names its row."""
    return Field(words.text_of(name, value), "" if pd.isna(value) else value)


def number(record: Mapping, value: str = "accuracy", interval: str = "below") -> Field:
    """Write a number with its interval (its ends, half its width, or in lines below with n) and its marks."""
    found, low, high = record.get(value), record.get("low", np.nan), record.get("high", np.nan)
    if pd.isna(found):
        return Field()
    text, ends = f"{found:,}" if isinstance(found, int) else f"{found:,.1f}", f"[{low:.1f}, {high:.1f}]"
    below = [(low + high, ends), (record.get("n"), "n = {:,.0f}")]
    small = [line.format(known) for known, line in below if interval == "below" and not pd.isna(known)]
    small += [distinct(record)] if value == "accuracy" else []
    if not pd.isna(low + high):
        text += {"half": f" ± {(high - low) / 2:.1f}", "range": f" {ends}"}.get(interval, "")
    text += f" {words.STALE}" * (record.get("stale") in (True,))
    text += f" {words.FLAGGED}" * (value == "accuracy" and bool(words.flags_of(record.get("flags"))))
    return Field(text, found, small=tuple(filter(None, small)))


def distinct(record: Mapping) -> str:
    """How many different texts a text attack left: those that coincide cap the accuracy."""
    left, among = record.get("distinct"), record.get("prompts")
    if pd.isna(left):
        return ""
    return f"{left:.0f} distinct texts" if pd.isna(among) else f"{left:.0f} of {among:.0f} texts distinct"


def grade_of(origin: object) -> str:
    """Say where a printed number was found, if not in the paper itself."""
    return "" if pd.isna(origin) or origin in ("primary", "paper", "") else f"({origin})"


def _said_once(values: Mapping[str, str]) -> str:
    """A setting at all scales: each value with the scales that have it, if there are several."""
    groups: dict[str, list[str]] = {}
    for scale, value in values.items():
        groups.setdefault(value, []).append(words.WORLDS.get(scale, scale))
    return "; ".join(value + f" ({', '.join(worlds)})" * (len(groups) > 1) for value, worlds in groups.items())


def _usual(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the budget of each cell in units of the usual one of its scale."""
    usual = frame["scale"].map({name: _usual_eps(name, frame) for name in frame["scale"].unique()})
    return frame.assign(multiple=(frame["eps"].fillna(0) / usual).round(3))


def _usual_eps(scale: str, frame: pd.DataFrame) -> float:
    """The reference eps of a scale; of one's own, which only its file knows, the most frequent budget."""
    if scale in scale_names():
        return scale_named(scale).reference_eps
    budgets = frame.loc[(frame["scale"] == scale) & (frame["eps"] > 0), "eps"]
    return budgets.mode().iloc[0] if len(budgets) else 1.0


def _same_cells(frame: pd.DataFrame, run: pd.DataFrame, on: list[str]) -> pd.DataFrame:
    """The cells of a reference that this run measures too, each on the most images that are known."""
    if frame.empty:
        return run[:0]
    same = [*CELL, "eps" if "eps" in on else "multiple"]
    kept = _usual(frame).merge(run[same].drop_duplicates(), on=same)
    return kept.sort_values("n", ascending=False).drop_duplicates([*same, "dataset"])


def _other_cells(frame: pd.DataFrame, run: pd.DataFrame, rest: pd.DataFrame, on: list[str]) -> pd.DataFrame:
    """The cells of a reference in rows that this run has not, say of a set that its world lacks; one cell a row."""
    if frame.empty:
        return run[:0]
    same = [*SETTINGS, "eps" if "eps" in on else "multiple"]
    kept = _usual(frame).merge(run[same].drop_duplicates(), on=same)
    kept = kept[_among(kept, rest, on)].sort_values("n", ascending=False).drop_duplicates([*CELL, *on])
    return kept[~kept.duplicated(on, keep=False)]


def _among(frame: pd.DataFrame, others: pd.DataFrame, on: list[str]) -> np.ndarray:
    """Which rows of a frame have the same names as a row of another."""
    names = set(others[on].itertuples(index=False, name=None))
    return np.array([key in names for key in frame[on].itertuples(index=False, name=None)], dtype=bool)


def _shared_n(frame: pd.DataFrame) -> str:
    """The number of images if it is the same behind a whole column: then it stands in the head."""
    return f", n = {frame['n'].iloc[0]:,.0f}" if "n" in frame and frame["n"].nunique() == 1 else ""


def _places(frame: pd.DataFrame, on: list[str], place: Callable[[dict], Field]) -> dict[tuple, Field]:
    """The places of a column by what names their rows."""
    words.check_unique(frame, on, "accuracy")
    records = frame.drop(columns="n" if _shared_n(frame) else []).to_dict("records")
    return dict(zip(frame[on].itertuples(index=False, name=None), map(place, records), strict=True))


def _printed(row: Mapping) -> Field:
    """A number as a paper prints it, with its budget, and its grade if it is not from the paper itself."""
    below = (f"eps {row['printed_eps']}" * bool(row["printed_eps"]), grade_of(row.get("grade")))
    return Field(f"{row['value']:.2f}".removesuffix("0"), row["value"], small=tuple(filter(None, below)))


def _with_best(lines: list[tuple[Field, ...]], down: list[str], best: str) -> list[tuple[Field, ...]]:
    """Mark the highest number of each column, as it is printed, among rows whose names differ in `best` only."""
    count, place = len(down), down.index(best)
    rivals = [" / ".join(field.text for field in (*line[:place], *line[place + 1 : count])) for line in lines]
    shown = pd.DataFrame(
        [
            [np.nan if it.sort == "" else float(it.text.split()[0].replace(",", "")) for it in line[count:]]
            for line in lines
        ]
    )
    tops = shown.eq(shown.groupby(rivals).transform("max")).to_numpy()
    return [
        (*line[:count], *(field._replace(best=bool(top)) for field, top in zip(line[count:], row, strict=True)))
        for line, row in zip(lines, tops, strict=True)
    ]
