"""Shipped results: what was measured elsewhere and travels with the package, read after the local store.

    results/<scale>/cells.parquet       every record, its answers picture by picture included
    results/<scale>/models.parquet      what the training of each model took, and its first losses
    results/<scale>/artifacts.parquet   small arrays that figures need
    results/<scale>/known.json          digests of data and models, so that cells can be named without them
    results/<scale>/confirmed.json      old digests of code that a sample of cells showed to be as good as the new ones
    results/<scale>/verdicts/           what the pages found

`export` writes them, never a hand. ROBUSTCLIP_FRESH=1 ignores them, ROBUSTCLIP_RESULTS names another folder.
"""

import json
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from robustclip.data.sources import facts as data_facts
from robustclip.files import write_whole
from robustclip.study.provenance import ROOT
from robustclip.study.scales import Scale
from robustclip.study.store import Store, digest_of

CELLS, MODELS, ARTIFACTS, KNOWN, CONFIRMED = (
    *("cells.parquet", "models.parquet", "artifacts.parquet"),
    *("known.json", "confirmed.json"),
)
ANSWERS = pa.map_(pa.string(), pa.list_(pa.int32()))  # of a cell, by name


def shipped_folder() -> Path | None:
    """Where shipped results lie: in the installed package, or in the clone it was installed from; None without any."""
    places = [ROOT / "results", ROOT.parent.parent / "results"]
    if own := os.environ.get("ROBUSTCLIP_RESULTS"):
        places = [Path(own).expanduser()]
    return next((place for place in places if place.is_dir()), None)


def destination() -> Path:
    """Where results are shipped to: where shipped ones lie, or would."""
    return shipped_folder() or Path(os.environ.get("ROBUSTCLIP_RESULTS") or "results").expanduser()


def _file(scale: str, name: str) -> Path | None:
    folder = None if os.environ.get("ROBUSTCLIP_FRESH") == "1" else shipped_folder()
    return folder / scale / name if folder and (folder / scale / name).is_file() else None


def shipped(scale: str, key: str) -> dict | None:
    """The shipped record of a cell, if there is one."""
    path = _file(scale, CELLS)
    return _cells(path, path.stat().st_mtime_ns).get(key) if path else None


def shipped_records(scale: str) -> list[dict]:
    """All shipped records of a scale."""
    path = _file(scale, CELLS)
    return list(_cells(path, path.stat().st_mtime_ns).values()) if path else []


def shipped_models(scale: str) -> pd.DataFrame:
    """What the training of the scale's models took: the facts of `training.json`, one row each."""
    path = _file(scale, MODELS)
    return pd.DataFrame(_models(path, path.stat().st_mtime_ns) if path else [])


def shipped_arrays(scale: str, key: str) -> dict[str, np.ndarray] | None:
    """The arrays of an artifact, if it was shipped."""
    path = _file(scale, ARTIFACTS)
    rows = _artifacts(path, path.stat().st_mtime_ns).get(key) if path else None
    return rows and _arrays(rows)


def shipped_artifacts(scale: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of all shipped artifacts, by key."""
    path = _file(scale, ARTIFACTS)
    return {key: _arrays(rows) for key, rows in _artifacts(path, path.stat().st_mtime_ns).items()} if path else {}


def _arrays(rows: list[dict]) -> dict[str, np.ndarray]:
    """What some rows of the file hold, by name."""
    return {row["name"]: np.frombuffer(row["data"], row["dtype"]).reshape(row["shape"]).copy() for row in rows}


def known(scale: str) -> dict[str, dict]:
    """What is known of data ("role/split" -> facts) and models (name -> digest) that may not be at hand."""
    path = _file(scale, KNOWN)
    return _json_of(path, path.stat().st_mtime_ns) if path else {"data": {}, "models": {}}


def facts_of(scale: Scale, role: str) -> dict:
    """What names the images of a role at a scale, as `data.sources.facts` tells; as shipped if they are not here."""
    try:
        return data_facts(role, scale.source)
    except FileNotFoundError:
        shipped_facts = known(scale.name)["data"]
        if (place := f"{role}/{scale.source}") not in shipped_facts:
            raise
        return shipped_facts[place]


def confirmed(scale: str) -> dict[str, dict[str, dict]]:
    """Component -> old digest -> the new one that gives equal answers, and how that was found out."""
    path = _file(scale, CONFIRMED)
    return _json_of(path, path.stat().st_mtime_ns) if path else {}


@lru_cache(maxsize=8)
def _json_of(path: Path, changed: int) -> dict:
    """What a JSON file holds, not to be changed by who reads it; `changed` makes a new file a new one."""
    return json.loads(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=4)
def _models(path: Path, changed: int) -> list[dict]:
    """The facts of every model of a file, not to be changed by who reads them."""
    return [json.loads(text) for text in parquet.read_table(path)["facts"].to_pylist()]


@lru_cache(maxsize=4)
def _artifacts(path: Path, changed: int) -> dict[str, list[dict]]:
    """The rows of a file by their key, their numbers still as bytes."""
    found: dict[str, list[dict]] = {}
    for row in parquet.read_table(path).to_pylist():
        found.setdefault(row["key"], []).append(row)
    return found


@lru_cache(maxsize=4)
def _cells(path: Path, changed: int) -> dict[str, dict]:
    """Every record of a file by its key; `changed` makes a new file a new one."""
    table = parquet.read_table(path)
    found = {}
    for facts, answers in zip(table["facts"].to_pylist(), table["answers"].to_pylist(), strict=True):
        record = json.loads(facts) | {"answers": dict(answers)}
        if record["digest"] != digest_of(record):
            raise OSError(f"{str(path)!r} is damaged: the record {record['key']!r} does not fit its digest; restore it")
        found[record["key"]] = record
    return found


# --- writing ----------------------------------------------------------------------------------------------------------


def write_cells(folder: Path, records: Iterable[dict]) -> Path:
    """Write records in columns: those that people look for, the rest as JSON, and the answers."""
    rows = sorted(records, key=lambda record: record["key"])
    shown = ("model", "role", "task", "attack", "attacker", "defense", "eps", "n", "seed")
    columns = {name: [row["cell"][name] for row in rows] for name in shown}
    columns |= {"key": [row["key"] for row in rows], "facts": [_json(row, "answers") for row in rows]}
    table = pa.table(columns | {"answers": pa.array([list(row["answers"].items()) for row in rows], ANSWERS)})
    return _write(folder / CELLS, table)


def write_models(folder: Path, facts: Iterable[dict]) -> Path:
    """Write the facts of trained models."""
    rows = sorted(facts, key=lambda one: one["digest"])
    names = ("model", "scale", "role", "digest")
    return _write(folder / MODELS, pa.table({name: [row[name] for row in rows] for name in names}
                                            | {"facts": [_json(row) for row in rows]}))  # fmt: skip


def write_arrays(folder: Path, artifacts: dict[str, dict[str, np.ndarray]]) -> Path:
    """Write small arrays by the key of their artifact."""
    rows = [{"key": key, "name": name, "dtype": str(array.dtype), "shape": list(array.shape), "data": array.tobytes()}
            for key, arrays in sorted(artifacts.items()) for name, array in sorted(arrays.items())]  # fmt: skip
    kinds = {"key": pa.string(), "name": pa.string(), "dtype": pa.string(), "shape": pa.list_(pa.int32()),
             "data": pa.binary()}  # fmt: skip
    return _write(folder / ARTIFACTS, pa.Table.from_pylist(rows, pa.schema(list(kinds.items()))))


def write_json(folder: Path, name: str, content: Any) -> Path:
    """Write one of the JSON files."""
    return write_whole(folder / name, json.dumps(content, indent=1, sort_keys=True) + "\n")


def merged(stores: Sequence[Store], scale: str, old: Iterable[dict]) -> dict[str, dict]:
    """The newest record of each key, of several stores and of what is shipped already."""
    found: dict[str, dict] = {}
    for record in [*old, *(record for store in stores for record in store.records(scale))]:
        before = found.get(record["key"])
        if before is None or record["date"] >= before["date"]:
            found[record["key"]] = record
    return found


def _json(row: dict, *without: str) -> str:
    return json.dumps({name: value for name, value in row.items() if name not in without}, sort_keys=True)


def _write(path: Path, table: pa.Table) -> Path:
    parquet.write_table(table, canvas := BytesIO(), compression="zstd", compression_level=19)
    return write_whole(path, canvas.getvalue())
