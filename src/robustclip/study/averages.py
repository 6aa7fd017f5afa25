"""Averages over roles, as papers print them below a table: equal weight per role, one n for all of them."""

from collections.abc import Mapping, Sequence
from functools import cache

import pandas as pd

from robustclip.data.sources import facts
from robustclip.study import shipped
from robustclip.study.evaluate import outcomes
from robustclip.study.statistics import macro
from robustclip.study.store import Where

SAME = ["scale", "model", "task", "metric", "attack", "attacker", "defense", "eps", "n"]


def averages(frame: pd.DataFrame, sets: Mapping[str, Sequence[str]], store: Where = None) -> pd.DataFrame:
    """Accuracy over the roles of each of the `sets`, with the interval of `macro` over seeds and images.

    Rows in the shape of `evaluate`, with `n` images of each role, or all of a set that has fewer, and the kind of their
    `interval`. Cells that differ in role and seed alone are averaged, so that all have the same n: the largest that all
    roles of the set and all seeds were measured on. What lacks a role has no row.
    """
    rows, known = [], {}
    for title, roles in sets.items():
        own = frame[frame["role"].isin(roles)].drop_duplicates([*SAME, "role", "seed"], keep="last")
        for _, part in own.groupby(SAME[:-1], sort=False):
            if not (by_role := _of_one_size(part, set(roles))):
                continue
            for row in (row for one in by_role for row in one.to_dict("records") if row["key"] not in known):
                known[row["key"]] = outcomes(row, store)
            value, low, high = macro([[known[key] for key in one["key"]] for one in by_role])
            whole = pd.concat(by_role)
            shared = {"n": whole["n"].max(), "seed": whole["seed"].min(), "stale": bool(whole["stale"].any())}
            several = {"source": "", "distinct": float("nan")} if len(by_role) > 1 else {}
            told = {
                "role": title,
                "dataset": title,
                "accuracy": value,
                "low": low,
                "high": high,
                "interval": "bootstrap",
            }
            rows.append(part.iloc[0].to_dict() | shared | several | told)
    return pd.DataFrame(rows, columns=[*frame.columns, "interval"])


def _of_one_size(part: pd.DataFrame, roles: set[str]) -> list[pd.DataFrame]:
    """The rows of each role, by seed, at the largest n that all were measured on; [] if there is none."""
    for n in sorted(part["n"].unique(), reverse=True):
        fits = part[[row["n"] == n or (row["n"] < n and _whole(row)) for row in part.to_dict("records")]]
        by_role = [one.sort_values("seed") for _, one in fits.groupby("role")]
        if len(by_role) == len(roles) and all(len(one) == len(by_role[0]) for one in by_role):
            return by_role
    return []


def _whole(row: dict) -> bool:
    """Whether a row of `evaluate` tells of all images that its set has."""
    rows, digest = _end(row["scale"], row["role"], "parquet" if ":" in row["source"] else row["source"])
    return (rows, digest) == (row["n"], row["data"])


@cache
def _end(scale: str, role: str, source: str) -> tuple[int | None, str]:
    """How many images a set has, None without end, and its digest; as shipped, else of the set itself."""
    try:
        found = shipped.known(scale)["data"].get(f"{role}/{source}") or facts(role, source)
    except FileNotFoundError:
        return None, ""
    return found["rows"], found["digest"]
