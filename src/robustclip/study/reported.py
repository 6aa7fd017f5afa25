"""The numbers papers print, and ours next to them. The schema is described in assets/reported/README.md."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

import pandas as pd

from robustclip.checks import check_choice
from robustclip.study.scales import parse_eps


@cache
def _everything() -> pd.DataFrame:
    """All files in one table, with the name of the file in `file`."""
    folder, parts = files("robustclip").joinpath("assets/reported"), []
    for name in sorted(path.name for path in folder.iterdir() if path.name.endswith(".csv")):
        with folder.joinpath(name).open(encoding="utf-8", newline="") as text:
            part = pd.read_csv(text, dtype=str, keep_default_na=False)
        parts.append(part.assign(file=name.removesuffix(".csv"), value=part["value"].astype(float)))
    table = pd.concat(parts, ignore_index=True)
    budgets = [parse_eps(text) if text else float("nan") for text in table["eps"]]
    table.insert(table.columns.get_loc("eps") + 1, "eps_value", budgets)
    return table


def reported_papers() -> list[str]:
    """Names that `reported` takes: papers, and the files that collect several."""
    table = _everything()
    return sorted({*table["paper"], *table["file"]} - {name.lower() for name in table["paper"]}, key=str.lower)


def reported(paper: str, table: str | int | None = None) -> pd.DataFrame:
    """What a paper prints, in all its tables or one: `reported("mmcoa", "I")`. Upper and lower case do not matter.

    Values are as printed, also where they look wrong. `eps` is the printed text, `eps_value` the number (NaN if empty).
    """
    everything = _everything()
    check_choice("paper", paper.lower(), [name.lower() for name in reported_papers()])
    rows = everything[(everything["paper"].str.lower() == paper.lower()) | (everything["file"] == paper.lower())]
    if table is not None:
        check_choice(f"table of {paper}", str(table), rows["table"].unique())
        rows = rows[rows["table"] == str(table)]
    return rows.drop(columns="file").reset_index(drop=True)


def compare(
    ours: pd.DataFrame,
    printed: pd.DataFrame,
    on: Sequence[str] = ("method", "attack", "dataset"),
    methods: Mapping[str, str] | None = None,
    references: Mapping[str, pd.DataFrame] | None = None,
) -> pd.DataFrame:
    """Printed accuracies and ours side by side, with `difference` = ours - printed in points.

    `methods` translates our names into the paper's, as in {"clip": "CLIP"}: a defended row goes by its defense, another
    by its model. Rows that only one side has are kept. To compare per budget, add "eps" to `on`. `references` are
    shipped frames by name, such as {"full": reference("full")}: what they hold of the same names, on the most images,
    becomes the columns `full`, `full n`, `full low`, `full high`.
    """
    on, mine = list(on), named(ours, methods)
    theirs = printed[printed["metric"] == "accuracy"]
    budgets = theirs["eps_value"].mask(theirs["attack"] == "clean", 0.0)
    theirs = theirs.assign(eps=budgets, printed_eps=theirs["eps"], printed=theirs["value"], place=range(len(theirs)))
    for column in on:
        check_choice("column in `on`", column, [name for name in mine.columns if name in theirs.columns])
    mine = mine.rename(columns={"accuracy": "ours"})
    if (twice := mine.duplicated(on)).any():
        row = mine.loc[twice, on].iloc[0].to_dict()
        raise ValueError(f"ours has several rows for {row}; select one, or add the column that differs to `on`")
    extra = [name for name in ("source", "played_by", "n", "distinct", "eps", "attacker", "stale") if name not in on]
    joined = theirs[[*on, "setting", "printed_eps", "printed", "grade", "place"]].merge(
        mine[[*on, "ours", "low", "high", *extra]], on=on, how="outer"
    )
    joined.insert(joined.columns.get_loc("high") + 1, "difference", joined["ours"] - joined["printed"])
    for name, frame in (references or {}).items():
        best = named(frame, methods).sort_values("n").drop_duplicates(on, keep="last").set_index(on)
        found = best.rename(columns={"accuracy": name, **{part: f"{name} {part}" for part in ("n", "low", "high")}})
        joined = joined.join(found[[name, f"{name} n", f"{name} low", f"{name} high"]], on=on)
    return joined.sort_values("place", kind="stable", ignore_index=True).drop(columns="place")


def named(frame: pd.DataFrame, methods: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The frame with a column `method`: the defense of a defended row, else the model, in the paper's words."""
    names = frame["defense"].where(frame["defense"] != "none", frame["model"])
    return frame.assign(method=[(methods or {}).get(name, name) for name in names])
