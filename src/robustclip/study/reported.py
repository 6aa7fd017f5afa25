"""The numbers papers print. The schema is described in assets/reported/README.md."""

from collections.abc import Mapping
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
    papers, collections = table["paper"].unique(), table["file"].unique()
    return sorted({*papers, *collections} - {name.lower() for name in papers}, key=str.lower)


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


def named(frame: pd.DataFrame, methods: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The frame with a column `method`: the defense of a defended row, else the model, in the paper's words."""
    names = frame["defense"].where(frame["defense"] != "none", frame["model"])
    return frame.assign(method=[(methods or {}).get(name, name) for name in names])
