"""Averages over roles, as papers print them below a table: equal weight per role, one n for all of them."""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from operator import itemgetter

import pandas as pd

from robustclip.data.sources import facts
from robustclip.study import shipped
from robustclip.study.evaluate import outcomes
from robustclip.study.statistics import macro
from robustclip.study.store import Where

SAME = ["scale", "model", "task", "metric", "attack", "attacker", "defense", "eps"]


def averages(frame: pd.DataFrame, sets: Mapping[str, Sequence[str]], store: Where = None) -> pd.DataFrame:
    """Accuracy over the roles of each of the `sets`, with the interval of `macro` over seeds and images.

    Rows in the shape of `evaluate`, with `n` images of each role, or all of a set that has fewer, and the kind of their
    `interval`. Cells that differ in role and seed alone are averaged, so that all have the same n: the largest that all
    roles of the set and all seeds were measured on. What lacks a role has no row.
    """
    measured, found, known = frame.to_dict("records"), [], {}
    for title, roles in sets.items():
        alike: dict[tuple, dict[tuple, dict]] = {}  # rows that differ in n, role and seed alone; the last of equals
        for row in measured:
            if row["role"] in roles:
                own = alike.setdefault(tuple(row[name] for name in SAME), {})
                own[row["n"], row["role"], row["seed"]] = row
        for part in alike.values():
            if not (by_role := _of_one_size(list(part.values()), set(roles))):
                continue
            whole = [row for one in by_role for row in one]
            known |= {row["key"]: outcomes(row, store) for row in whole if row["key"] not in known}
            value, low, high = macro([[known[row["key"]] for row in one] for one in by_role])
            told = {"n": max(row["n"] for row in whole), "seed": min(row["seed"] for row in whole)}
            told |= {"stale": any(row["stale"] for row in whole), "role": title, "dataset": title}
            told |= {"accuracy": value, "low": low, "high": high, "interval": "bootstrap"}
            several = {"source": "", "distinct": float("nan")} if len(by_role) > 1 else {}
            found.append(next(iter(part.values())) | several | told)
    return pd.DataFrame(found, columns=[*frame.columns, "interval"])


def _of_one_size(part: list[dict], roles: set[str]) -> list[list[dict]]:
    """The rows of each role, by seed, at the largest n that all were measured on; [] if there is none."""
    for n in sorted({row["n"] for row in part}, reverse=True):
        fits = sorted((row for row in part if row["n"] == n or (row["n"] < n and _whole(row))), key=_place)
        by_role = [list(one) for _, one in groupby(fits, key=itemgetter("role"))]
        if len(by_role) == len(roles) and all(len(one) == len(by_role[0]) for one in by_role):
            return by_role
    return []


def _place(row: dict) -> tuple[str, int]:
    return row["role"], row["seed"]


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
