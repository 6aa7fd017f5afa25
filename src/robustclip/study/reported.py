"""The numbers papers print, and ours next to them. The schema is described in assets/reported/README.md."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import pandas as pd

from robustclip.checks import check_choice
from robustclip.study.scales import parse_eps

SAME = ["model", "role", "attack", "attacker", "defense", "eps", "seed"]  # what makes cells of two scales the same


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


def reference(scale: str = "full", folder: str | Path = "results") -> pd.DataFrame:
    """The committed results of a scale, as `export` wrote them, in the shape of `evaluate`."""
    paths = sorted((Path(folder) / scale).glob("*.csv"))
    if not paths:
        place = str(Path(folder) / scale)
        raise FileNotFoundError(f"no results in {place!r}; write them with `robustclip export --scale {scale}`")
    return pd.concat([pd.read_csv(path, engine="python") for path in paths], ignore_index=True)


def compare(
    ours: pd.DataFrame,
    printed: pd.DataFrame,
    on: Sequence[str] = ("method", "attack", "dataset"),
    methods: Mapping[str, str] | None = None,
    committed: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Printed accuracies and ours side by side, with `difference` = ours - printed in points.

    `methods` translates our names into the paper's, as in {"clip": "CLIP"}: a defended row goes by its defense, another
    by its model. Rows that only one side has are kept. To compare per budget, add "eps" to `on`. `committed` is a frame
    of `reference`; the accuracy of the same cell there, on the most images, becomes the column `reference`.
    """
    on, names = list(on), ours["defense"].where(ours["defense"] != "none", ours["model"])
    mine = ours.assign(method=names.map(lambda name: (methods or {}).get(name, name)))
    committed = ours.iloc[:0] if committed is None else committed
    best = committed.sort_values("n").drop_duplicates(SAME, keep="last").rename(columns={"accuracy": "reference"})
    mine = mine.merge(best[[*SAME, "reference"]], on=SAME, how="left").rename(columns={"accuracy": "ours"})
    theirs = printed[printed["metric"] == "accuracy"]
    budgets = theirs["eps_value"].mask(theirs["attack"] == "clean", 0.0)
    theirs = theirs.assign(eps=budgets, printed_eps=theirs["eps"], printed=theirs["value"], place=range(len(theirs)))
    for column in on:
        check_choice("column in `on`", column, [name for name in mine.columns if name in theirs.columns])
    if (twice := mine.duplicated(on)).any():
        row = mine.loc[twice, on].iloc[0].to_dict()
        raise ValueError(f"ours has several rows for {row}; select one, or add the column that differs to `on`")
    extra = [name for name in ("source", "n", "eps", "attacker", "stale") if name not in on]
    joined = theirs[[*on, "setting", "printed_eps", "printed", "grade", "place"]].merge(
        mine[[*on, "reference", "ours", "low", "high", *extra]], on=on, how="outer"
    )
    joined.insert(joined.columns.get_loc("high") + 1, "difference", joined["ours"] - joined["printed"])
    return joined.sort_values("place", kind="stable", ignore_index=True).drop(columns="place")
