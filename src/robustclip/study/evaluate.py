"""Measure cells: what is neither stored nor shipped is attacked, judged, and kept with its provenance."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from robustclip.attacks.base import Target
from robustclip.audit import Audit
from robustclip.audit import audit as run_audit
from robustclip.checks import check_integer
from robustclip.progress import progress
from robustclip.study.bench import TRAINED, Bench, device_name
from robustclip.study.cells import Cell
from robustclip.study.provenance import commit, current, versions
from robustclip.study.shipped import confirmed, shipped, shipped_records
from robustclip.study.statistics import hierarchical, wilson
from robustclip.study.store import CellFiles, Store, Where
from robustclip.study.tasks import TASK, numbered

COLUMNS = [
    *("scale", "model", "role", "dataset", "source", "task", "attack", "played_by", "attacker", "defense", "eps"),
    *("n", "seed", "metric", "accuracy", "low", "high", "distinct", "prompts", "flags"),
    *("seconds", "forward", "backward"),
    *("stale", "origin", "checkpoint", "data", "device", "date", "commit", "key"),
]
SAME = ["scale", "model", "role", "task", "metric", "attack", "attacker", "defense", "eps", "n"]


def evaluate(
    cells: Iterable[Cell],
    store: Where = None,
    device: str = "auto",
    batch_size: int | None = None,
    audit: int = 0,
    fresh: bool = False,
) -> pd.DataFrame:
    """Measure every cell that neither the store nor the shipped results hold; tidy rows, in the order given.

    One row per cell and metric: `accuracy` is the percentage of images, or of queries, that are right, with its 95 %
    Wilson interval. `seconds`, `forward`, `backward` are what the cell costs alone. `distinct` counts the different
    texts that a text attack leaves of `prompts`. `stale` marks results of other code, which scales with
    `recompute_stale` measure again.
    `audit` = n also audits every image attack on the first n images; `flags` says what the audit found, or that there
    was none, and whether the attacker was blind to a defense. A cell that another process is measuring is waited for.
    `fresh` ignores what is shipped. `look_up` finds the same rows and measures nothing.
    """
    check_integer("audit", audit, 0)
    cells, store, bench = list(cells), Store(store), Bench(device)
    size = None if batch_size is None else check_integer("batch_size", batch_size, 1)
    roles = list(dict.fromkeys((cell.role, cell.n) for cell in cells))
    order = sorted(range(len(cells)), key=lambda place: roles.index((cells[place].role, cells[place].n)))
    rows: dict[int, list[dict]] = {}
    for wait in (False, True):  # cells that another process holds come last
        for place in progress([place for place in order if place not in rows], "cells", unit="cell"):
            found = _found(cells[place], bench, store, size, audit, wait, fresh)
            if found:
                rows[place] = _rows(cells[place].describe(), *found)
    return pd.DataFrame([row for place in range(len(cells)) for row in rows[place]], columns=COLUMNS)


def look_up(cells: Iterable[Cell], store: Where = None, device: str = "auto") -> pd.DataFrame:
    """The rows of `evaluate` for those cells that are stored or shipped, in the order given; nothing is measured.

    Cells of data that is neither here nor known from shipped results are left out, too.
    """
    rows, store, bench = [], Store(store), _Reader(device)
    for cell in cells:
        with suppress(FileNotFoundError):
            key, code = bench.key(cell), bench.provenance(cell, TASK[cell.task])
            if found := _known(cell, key, code, store.cell(cell.scale.name, key)):
                rows += _rows(cell.describe(), *found)
    return pd.DataFrame(rows, columns=COLUMNS)


class _Reader(Bench):
    """A bench that measures nothing, so that no weight moves: what names a model is found out once."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self._digests: dict[tuple[str, Any], tuple[Any, str | None]] = {}  # with the model, which has to live as long

    def digest(self, cell: Cell) -> str:
        """What names the cell's weights."""
        place = cell.scale.name, cell.spec if isinstance(cell.spec, str) else id(cell.spec)
        if place not in self._digests:
            try:
                self._digests[place] = cell.spec, super().digest(cell)
            except FileNotFoundError:
                self._digests[place] = cell.spec, None
        if (found := self._digests[place][1]) is None:
            raise FileNotFoundError(f"nothing is shipped of the model {cell.model!r} nor of what made it")
        return found


def _known(cell: Cell, key: str, code: dict, files: CellFiles, fresh: bool = False) -> tuple[dict, str, bool] | None:
    """The stored or the shipped record of a cell, which of them, and whether it is stale; what is not comes first."""
    travelled = None if fresh else shipped(cell.scale.name, key)
    candidates = [(files.read(), "stored"), (travelled, "shipped")]
    told = [(record, origin, is_stale(record, code)) for record, origin in candidates if record is not None]
    return min(told, key=lambda one: one[2], default=None)


def _found(
    cell: Cell, bench: Bench, store: Store, batch_size: int | None, audit: int, wait: bool, fresh: bool
) -> tuple[dict, str, bool] | None:
    """The record of a cell, where it is from, and whether it is stale; None if another process is measuring it."""
    key, code = bench.key(cell), bench.provenance(cell, TASK[cell.task])
    files = store.cell(cell.scale.name, key)
    known = partial(_known, cell, key, code, files, fresh)
    audit = audit if cell.attack is not None and cell.attack.changes_images else 0

    def enough(found: tuple[dict, str, bool] | None) -> bool:
        return bool(found) and found[0].get("audited", 0) >= audit and not (found[2] and cell.scale.recompute_stale)

    if enough(found := known()):
        files.tidy()
        return found
    with files.claimed(wait) as mine:
        if not mine:
            return None
        if enough(found := known()):  # another process was quicker
            return found
        if not found or (found[2] and cell.scale.recompute_stale):
            found = _measured(cell, bench, files, code, batch_size or cell.scale.batch_size), "measured", False
        if found[0].get("audited", 0) < audit:
            flags = list(_audited(cell, bench, audit).flags)
            found = files.write(found[0] | {"flags": flags, "audited": audit}), *found[1:]
    return found


def audit_cell(cell: Cell, store: Where = None, device: str = "auto") -> Audit:
    """Measure one attacked cell if nobody has, audit it on all its images, and keep the flags with it."""
    if cell.attack is None or not cell.attack.changes_images:
        raise ValueError(f"attack {cell.attack_name!r} changes no images; audit an attack on images, such as PGD-100")
    evaluate([cell], store, device)
    bench = Bench(device)
    found, files = _audited(cell, bench, cell.n), Store(store).cell(cell.scale.name, bench.key(cell))
    with files.claimed(wait=True):
        record = files.read() or shipped(cell.scale.name, bench.key(cell))
        files.write(record | {"flags": list(found.flags), "audited": cell.n})
    return found


def outcomes(row: Mapping[str, Any], store: Where = None) -> np.ndarray:
    """Right or wrong (n,) for each image, or query, of one row of `evaluate`: for paired tests on the same images."""
    record = Store(store).cell(row["scale"], row["key"]).read() or shipped(row["scale"], row["key"])
    if record is None:
        raise FileNotFoundError(f"no result {row['key']!r} in {Store(store)!r} nor shipped; evaluate its cell first")
    return TASK[record["cell"]["task"]].hits(record["answers"])[row["metric"]]


def judged(frame: pd.DataFrame, store: Where = None, **where: Any) -> np.ndarray:
    """Outcomes (seeds, images), in the order of seeds, of the rows of `evaluate` with these values in these columns.

    judged(results, model="clip", role="cifar10", attack="PGD-100")
    """
    for name, value in where.items():
        frame = frame[frame[name] == value]
    if frame.empty or frame["seed"].duplicated().any():
        raise ValueError(
            f"{len(frame)} results for {where}, seeds {frame['seed'].tolist()}; select one result per seed"
        )
    return np.stack([outcomes(row, store) for row in frame.sort_values("seed").to_dict("records")])


def over_seeds(frame: pd.DataFrame, store: Where = None) -> pd.DataFrame:
    """One row for cells that differ in their seed only: mean accuracy, its interval over seeds and images."""
    rows, columns = [], dict.fromkeys([*frame.columns, "interval"])
    for _, part in frame.groupby(SAME, sort=False, dropna=False):
        row = {"interval": "Wilson"} | part.iloc[0].to_dict()
        if len(part) > 1:
            found = hierarchical([outcomes(one, store) for one in part.to_dict("records")])
            row |= {"accuracy": found.value, "low": found.low, "high": found.high, "stale": part["stale"].any()}
            row |= {"distinct": part["distinct"].astype(float).mean(), "interval": f"bootstrap ({len(part)} seeds)"}
        rows.append(row)
    return pd.DataFrame(rows, columns=[*columns])


def reference(scale: str, tuned: Iterable[Any] | None = None) -> pd.DataFrame:
    """The shipped results of a scale in the shape of `evaluate`; no rows where nothing is shipped.

    With `tuned`, of fine-tuned models only those: others may have the same names and other settings.
    """
    records = shipped_records(scale)
    if tuned is not None:
        known = set(map(_digest_if_known, tuned))
        records = [record for record in records if record["checkpoint"] in known or not is_trained(record)]
    rows = [row for record in records for row in _rows(record["cell"], record, "shipped", is_stale(record))]
    return pd.DataFrame(rows, columns=COLUMNS)


def is_trained(record: dict) -> bool:
    """Whether the model of a record was fine-tuned for it."""
    return any(name.startswith(TRAINED) for name in record["provenance"])


def _digest_if_known(model: Any) -> str | None:
    """What names a model; None where its pictures are not at hand and nothing measured on it is shipped."""
    try:
        return model.digest
    except FileNotFoundError:
        return None


def is_stale(record: dict, code: Mapping[str, str] | None = None) -> bool:
    """Whether a record is of other code than today's, apart from changes that were confirmed to change no answer.

    Without `code`, the digests that its components have now, as far as they are of this package, are looked up.
    """
    maps, own = confirmed(record["cell"]["scale"]), record["provenance"]
    now = code or {name: current(name.removeprefix(TRAINED)) or digest for name, digest in own.items()}
    return set(now) != set(own) or any(newest(own[name], maps.get(name, {})) != now[name] for name in now)


def newest(digest: str, later: Mapping[str, dict]) -> str:
    """The digest that an old one was confirmed to equal, step by step."""
    seen = set()
    while digest in later and digest not in seen:
        seen.add(digest)
        digest = later[digest]["new"]
    return digest


def _measured(cell: Cell, bench: Bench, files: CellFiles, code: dict, batch_size: int) -> dict:
    """Run a cell batch by batch from where an interrupted run stopped, and store its record."""
    task, done, n = TASK[cell.task], files.resume(code), len(bench.samples(cell))
    todo = [rows for rows in task.batches(n, batch_size) if rows.start >= (done[-1]["stop"] if done else 0)]
    if done and (not todo or todo[0].start != done[-1]["stop"]):  # batches of another size
        todo = [slice(done[-1]["stop"] + rows.start, done[-1]["stop"] + rows.stop)
                for rows in task.batches(n - done[-1]["stop"], batch_size)]  # fmt: skip
    for rows in progress(todo, f"{cell.model} {cell.role} {cell.attack_name}", unit="batch"):
        answers, cost = bench.timed(lambda rows=rows: task.answer(cell, bench, rows))
        batch = {"provenance": code, "cell": cell.describe(), "start": rows.start, "stop": rows.stop}
        done.append(
            files.append(batch | {"answers": answers, "distinct": bench.distinct, "cost": cost.round(4).tolist()})
        )
    return files.write(_record(cell, bench, code, done))


def _audited(cell: Cell, bench: Bench, images: int) -> Audit:
    """Audit the classifier that the attacker of a cell sees, on its first images."""
    target = bench.target(cell)
    plain = Target(target.clip, target.classes).classifier() if target.defense else None  # its examples may transfer
    batch = bench.batch(cell, slice(0, images))
    return run_audit(target.classifier(), cell.attack, *batch, seed=cell.seed, surrogate=plain)


def _record(cell: Cell, bench: Bench, code: dict, batches: list[dict]) -> dict:
    """What the store keeps of a finished cell."""
    samples = bench.samples(cell)
    distinct, prompts = batches[-1]["distinct"] or (None, None)
    seconds, forward, backward = np.sum([batch["cost"] for batch in batches], axis=0).tolist()
    return {
        "cell": cell.describe() | {"source": samples.source, "n": len(samples)},
        "made_by": cell.made_by(),
        "answers": numbered([batch["answers"] for batch in batches]),
        "distinct": distinct,
        "prompts": prompts,
        "changes_images": cell.attack is not None and cell.attack.changes_images,
        "seconds": round(seconds, 3),
        "forward": int(forward),
        "backward": int(backward),
        "checkpoint": bench.digest(cell),
        "data": samples.digest,
        "classes": bench.classes(cell).digest,
        "provenance": code,
        "commit": commit(),
        "versions": versions(),
        "device": device_name(bench.place(cell)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _rows(cell: dict, record: dict, origin: str, stale: bool) -> list[dict]:
    """The rows of the table of results: one per metric."""
    kept = {name: record[name] for name in COLUMNS if name in record}
    told = {"source": record["cell"]["source"], "flags": _flags(record), "stale": stale, "origin": origin}
    rows = []
    for metric, hits in TASK[cell["task"]].hits(record["answers"]).items():
        accuracy, low, high = wilson(int(hits.sum()), len(hits))
        rows.append(
            cell | kept | told | {"n": len(hits), "metric": metric, "accuracy": accuracy, "low": low, "high": high}
        )
    return rows


def _flags(record: dict) -> str:
    """The audit's verdict in words; empty where no image was attacked."""
    cell = record["cell"]
    if not record["changes_images"]:
        return ""
    found = ["blind"] * (cell["attacker"] == "blind" and bool(cell["defended_by"]))
    found += record.get("flags", ["not audited"])
    return "; ".join(found) or "passed"
