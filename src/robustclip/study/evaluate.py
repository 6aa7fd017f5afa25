"""Measure cells: adversarial images, accuracy, cost, provenance; and say beforehand what that would cost."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from robustclip.attacks.base import predictions
from robustclip.audit import Audit
from robustclip.audit import audit as run_audit
from robustclip.checks import check_folder, check_images, check_integer, check_range
from robustclip.classes import Classes
from robustclip.progress import progress
from robustclip.study.bench import Bench, device_name
from robustclip.study.cells import Cell
from robustclip.study.statistics import wilson
from robustclip.study.store import Entry, Store, Where, code_digest, commit, versions
from robustclip.study.trained import FACTS, read_facts

COLUMNS = [
    *("scale", "model", "role", "dataset", "source", "attack", "played_by", "attacker", "defense", "eps", "n", "seed"),
    *("accuracy", "low", "high", "flags", "seconds", "forward", "backward", "stale"),
    *("checkpoint", "data", "code", "device", "date", "commit", "key"),
]


def evaluate(
    cells: Iterable[Cell], store: Where = None, device: str = "auto", batch_size: int | None = None, audit: int = 0
) -> pd.DataFrame:
    """Measure every cell that the store does not hold yet; one tidy row per cell, in the order given.

    `accuracy`, `low`, `high` are percent with the 95 % Wilson interval; `seconds`, `forward`, `backward` are what the
    cell costs alone; `stale` marks results of other code, which scales with `recompute_stale` measure again.
    `audit` = n also audits every image attack on the first n images; `flags` says what the audit found, or that there
    was none, and whether the attacker was blind to a defense.
    """
    check_integer("audit", audit, 0)
    cells, store, bench = list(cells), Store.of(store), Bench(device)
    if batch_size is not None:
        check_range("batch_size", batch_size, 1)
    roles = list(dict.fromkeys((cell.role, cell.n) for cell in cells))
    order = sorted(range(len(cells)), key=lambda place: roles.index((cells[place].role, cells[place].n)))
    rows = {}
    for place in progress(order, "cells", unit="cell"):
        cell = cells[place]
        entry = store.entry(cell.scale.name, bench.key(cell))
        record = entry.read()
        if record is None or (record["code"] != code_digest() and cell.scale.recompute_stale):
            record = _measure(cell, bench, entry, batch_size or cell.scale.batch_size)
        if record.get("audited", audit if _silent(cell) else 0) < audit:
            record = _keep(_audit(cell, bench, audit), entry, audit)
        entry.part.unlink(missing_ok=True)  # a kill right after the last rename leaves it
        rows[place] = _row(cell.describe(), record)
    return pd.DataFrame([rows[place] for place in range(len(cells))], columns=COLUMNS)


def audit_cell(cell: Cell, store: Where = None, device: str = "auto") -> Audit:
    """Measure one attacked cell if the store does not hold it, audit it on all its images, keep the flags with it."""
    if _silent(cell):
        raise ValueError(f"attack {cell.attack_name!r} changes no images; audit an attack on images, such as PGD-100")
    evaluate([cell], store, device)
    bench = Bench(device)
    found = _audit(cell, bench, cell.n)
    _keep(found, Store.of(store).entry(cell.scale.name, bench.key(cell)), cell.n)
    return found


def outcomes(row: Mapping[str, Any], store: Where = None) -> np.ndarray:
    """Per-image outcomes (n,) bool of one row of `evaluate`, for paired tests on the same images."""
    record = Store.of(store).entry(row["scale"], row["key"]).read()
    if record is None:
        raise FileNotFoundError(f"no result {row['key']!r} in {Store.of(store)!r}; evaluate its cell first")
    return np.array([outcome == "1" for outcome in record["correct"]])


def export(scale: str, store: Where = None, folder: str | Path = "results") -> list[Path]:
    """Write all results of a scale as tidy CSV files with provenance, one per role: `folder/scale/role.csv`.

    What pages found goes to `verdicts`, what fine-tuning cost to `training.csv` below the folder `models`.
    """
    rows = pd.DataFrame([_row(entry["cell"], entry) for entry in Store.of(store).records(scale)], columns=COLUMNS)
    written = []
    for name, table in rows.groupby("role"):
        written.append(check_folder(Path(folder) / scale) / f"{name}.csv")
        table.sort_values(COLUMNS[:12], kind="stable").to_csv(written[-1], index=False, lineterminator="\n")
    for path in sorted((Store.of(store).root / scale / "verdicts").glob("*/*.csv")):
        written.append(check_folder(Path(folder) / scale / "verdicts" / path.parent.name) / path.name)
        shutil.copyfile(path, written[-1])
    facts = sorted((Store.of(store).root / scale / "models").glob(f"*/{FACTS}"))
    if facts:
        written.append(check_folder(Path(folder) / scale / "models") / "training.csv")
        table = pd.DataFrame([read_facts(path.parent) for path in facts]).drop(columns=["losses", "versions"])
        table.sort_values(["role", "model", "seed", "recipe"]).to_csv(written[-1], index=False, lineterminator="\n")
    return written


def _measure(cell: Cell, bench: Bench, entry: Entry, batch_size: int) -> dict:
    """Run a cell batch by batch from where an interrupted run stopped, and store its record."""
    done = entry.resume(code_digest())
    first, n = sum(len(batch["predicted"]) for batch in done), len(bench.samples(cell).labels)
    for start in progress(range(first, n, batch_size), f"{cell.model} {cell.role} {cell.attack_name}", unit="batch"):
        predicted, cost = _batch(cell, bench, slice(start, start + batch_size))
        batch = {"code": code_digest(), "cell": cell.describe(), "start": start, "predicted": predicted, "cost": cost}
        entry.append(batch)
        done.append(batch)
    return entry.write(_record(cell, bench, done))


def _batch(cell: Cell, bench: Bench, rows: slice) -> tuple[list[int], list[float]]:
    """Predicted labels of one batch after the attack, and what attack and prediction cost.

    Where the attacker offers several pairs of images and prompts, a wrong prediction for any of them counts.
    """
    clip, build = bench.clip(cell.spec), bench.builder(cell.defense)
    pairs, spent = bench.pairs(cell, rows)
    labels = bench.batch(cell, rows)[1]
    for pair in pairs:
        check_images(pair.images)

    def checked(classes: Classes) -> Callable[[Tensor], Tensor]:
        return lambda images: _finite(build(clip, classes)(images), cell.model)

    predicted, scoring = clip.timed(lambda: [predictions(pair, labels, checked) for pair in pairs])
    worst = predicted[0]
    for other in predicted[1:]:
        worst = torch.where(worst == labels, other, worst)
    return worst.tolist(), (spent + scoring).round(4).tolist()


def _finite(logits: Tensor, model: str) -> Tensor:
    """The logits, if they are numbers."""
    if not torch.isfinite(logits).all():
        raise ValueError(f"model {model!r} gives NaN or infinite logits; restore or retrain its checkpoint")
    return logits


def _audit(cell: Cell, bench: Bench, images: int) -> Audit:
    """Audit the classifier that the attacker of a cell sees, on its first images."""
    clip, prompts, batch = bench.clip(cell.spec).inner, bench.prompts(cell), bench.batch(cell, slice(0, images))
    build, base = bench.seen(cell), bench.builder(None)(clip, prompts)
    rival = base if build.defense else None  # examples made on the undefended classifier may transfer
    return run_audit(build(clip, prompts), cell.attack, *batch, seed=cell.seed, surrogate=rival)


def _keep(found: Audit, entry: Entry, images: int) -> dict:
    """Store the flags with the result."""
    return entry.write(entry.read() | {"flags": list(found.flags), "audited": images})


def _record(cell: Cell, bench: Bench, batches: list[dict]) -> dict:
    """What the store keeps of a finished cell."""
    samples, predicted = bench.samples(cell), [label for batch in batches for label in batch["predicted"]]
    hits = (guess == label for guess, label in zip(predicted, samples.labels.tolist(), strict=True))
    seconds, forward, backward = np.sum([batch["cost"] for batch in batches], axis=0).tolist()
    return {
        "cell": cell.describe() | {"source": samples.source},
        "correct": "".join("01"[hit] for hit in hits),
        "predicted": predicted,
        "changes_images": cell.attack is not None and cell.attack.changes_images,
        "seconds": round(seconds, 3),
        "forward": int(forward),
        "backward": int(backward),
        "checkpoint": bench.clip(cell.spec).digest,
        "data": samples.digest,
        "prompts": hashlib.sha256(json.dumps(bench.prompts(cell)).encode()).hexdigest()[:16],
        "code": code_digest(),
        "commit": commit(),
        "versions": versions(),
        "device": device_name(bench.place(cell)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _row(cell: dict, record: dict) -> dict:
    """One row of the table of results."""
    n, stale = len(record["correct"]), record["code"] != code_digest()
    accuracy, low, high = wilson(record["correct"].count("1"), n)
    kept = {name: record[name] for name in COLUMNS if name in record} | {"source": record["cell"]["source"]}
    computed = {"n": n, "accuracy": accuracy, "low": low, "high": high, "flags": _flags(record), "stale": stale}
    return cell | kept | computed


def _flags(record: dict) -> str:
    """The audit's verdict in words; empty where no image was attacked."""
    cell = record["cell"]
    if not record.get("changes_images", cell["played_by"]):
        return ""
    found = ["blind"] * (cell["attacker"] == "blind" and bool(cell["defended_by"]))
    found += record.get("flags", ["not audited"])
    return "; ".join(found) or "passed"


def _silent(cell: Cell) -> bool:
    """Whether the audit has nothing to run on: no attack, or one that rewrites prompts."""
    return cell.attack is None or cell.attack.changes_texts
