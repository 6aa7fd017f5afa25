"""Averages over roles, as papers print them below a table: equal weight per role, one n for all of them."""

from collections.abc import Mapping, Sequence

import pandas as pd

from robustclip.study.evaluate import outcomes
from robustclip.study.statistics import macro
from robustclip.study.store import Where

SAME = ["scale", "model", "task", "metric", "attack", "attacker", "defense", "eps", "n"]


def averages(frame: pd.DataFrame, sets: Mapping[str, Sequence[str]], store: Where = None) -> pd.DataFrame:
    """Accuracy over the roles of each of the `sets`, with the interval of `macro` over seeds and images.

    Rows in the shape of `evaluate`, with `n` images of each role, and the kind of their `interval`.
    Cells that differ in role and seed alone are averaged, so that all have the same n: the largest that all roles of
    the set and all seeds were measured on. What lacks a role has no row.
    """
    rows, known = [], {}
    for title, roles in sets.items():
        own = frame[frame["role"].isin(roles)].drop_duplicates([*SAME, "role", "seed"], keep="last")
        for _, part in own.groupby(SAME, sort=False):
            by_role = [one.sort_values("seed") for _, one in part.groupby("role")]
            if len(by_role) < len(set(roles)) or any(len(one) != len(by_role[0]) for one in by_role):
                continue
            for row in part[~part["key"].isin(known)].to_dict("records"):
                known[row["key"]] = outcomes(row, store)
            value, low, high = macro([[known[key] for key in one["key"]] for one in by_role])
            first = part.iloc[0].to_dict() | {"seed": part["seed"].min(), "stale": bool(part["stale"].any())}
            several = {"source": "", "distinct": float("nan"), "prompts": float("nan")} if len(by_role) > 1 else {}
            told = {
                "role": title,
                "dataset": title,
                "accuracy": value,
                "low": low,
                "high": high,
                "interval": "bootstrap",
            }
            rows.append(first | several | told)
    found = pd.DataFrame(rows, columns=[*frame.columns, "interval"]).sort_values("n", ascending=False, kind="stable")
    return found.drop_duplicates([*SAME[:-1], "role"]).sort_index(ignore_index=True)
