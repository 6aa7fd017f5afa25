"""Results that travel: export what was measured, measure it again, confirm that a change of code changed no answer."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save

from robustclip.checks import check_folder
from robustclip.component import identity
from robustclip.data.sources import facts as data_facts
from robustclip.files import changing, write_whole
from robustclip.progress import progress
from robustclip.study import shipped as files
from robustclip.study.bench import TRAINED
from robustclip.study.cells import Cell
from robustclip.study.evaluate import evaluate, is_stale, is_trained, newest
from robustclip.study.preflight import prepare
from robustclip.study.provenance import current, digests
from robustclip.study.scales import Scale
from robustclip.study.store import Store, Where
from robustclip.study.then import answers_then, losses_then
from robustclip.study.trained import FACTS, Tuned, read_facts, retrace

SAMPLE, MOST = 3, 12  # cells that are measured again for each component that changed, at least and at most
FIELDS = ["model", "role", "task", "attack", "attacker", "defense", "eps", "n", "seed"]


def artifact(
    scale: Scale, name: str, parts: Any, compute: Callable[[], dict[str, np.ndarray]], code: Sequence[Any] = (),
    store: Where = None, only_known: bool = False,
) -> dict[str, np.ndarray] | None:  # fmt: skip
    """Small arrays that a figure needs: stored, shipped, or else computed now and stored; with `only_known` else None.

    They are named by `name`, by `parts` (components and plain values they depend on) and by the `code` that makes them.
    """
    told = json.dumps([name, identity(parts), digests(*code)], sort_keys=True)
    key = sha256(told.encode()).hexdigest()[:32]
    path = Store(store).root / scale.name / "artifacts" / f"{key}.safetensors"
    if path.is_file():
        return {name: tensor.numpy() for name, tensor in load_file(path).items()}
    if (found := files.shipped_arrays(scale.name, key)) is None and not only_known:
        found = {name: np.ascontiguousarray(array).copy() for name, array in compute().items()}  # none shares memory
        write_whole(path, save({name: torch.from_numpy(array) for name, array in found.items()}))
    return found


def export(
    scale: str, stores: Sequence[Where] = (None,), folder: str | Path | None = None, fresh: bool = False
) -> pd.DataFrame:
    """Write what some stores hold of a scale to `folder/scale`, next to what is shipped there already.

    Of each cell the newest record counts; `fresh` forgets what is shipped. Returns one row per file: what it holds, how
    much of it, its bytes.
    """
    target = Path(folder or files.destination()) / scale
    with changing(target):
        return _merge(scale, [Store(one) for one in stores], target, fresh)


def _merge(scale: str, stores: Sequence[Store], target: Path, fresh: bool) -> pd.DataFrame:
    """`export`, while nobody else changes the folder."""
    old = [] if fresh else files.shipped_records(scale)
    cells = list(files.merged(stores, scale, old).values())
    trained = [] if fresh else files.shipped_models(scale).to_dict("records")
    trained += [facts for store in stores for facts in _trained(store, scale)]
    arrays = {} if fresh else files.shipped_artifacts(scale)
    arrays |= {path.stem: {name: tensor.numpy() for name, tensor in load_file(path).items()}
              for store in stores for path in (store.root / scale / "artifacts").glob("*.safetensors")}  # fmt: skip
    pages = [page for store in stores for page in (store.root / scale / "verdicts").rglob("*.*")]
    if not (cells or trained or arrays or pages):
        places = ", ".join(str(store.root / scale) for store in stores)
        raise ValueError(f"nothing to export of scale {scale!r} in {places}; measure some cells, or name another store")
    check_folder(target)
    written = [("cells", len(cells), files.write_cells(target, cells))]
    written.append(
        ("models", len(trained), files.write_models(target, {one["digest"]: one for one in trained}.values()))
    )
    if arrays:
        written.append(("artifacts", len(arrays), files.write_arrays(target, arrays)))
    written.append(("known", len(cells), files.write_json(target, files.KNOWN, _known(cells))))
    for page in pages:
        place = target / "verdicts" / page.parent.name / page.name
        shutil.copyfile(page, check_folder(place.parent) / page.name)
        written.append((f"verdicts of {page.parent.name}/{page.stem}", 1, place))
    rows = [(what, count, str(path), path.stat().st_size) for what, count, path in written]
    return pd.DataFrame(rows, columns=["what", "count", "file", "bytes"])


def _trained(store: Store, scale: str) -> list[dict]:
    paths = sorted((store.root / scale / "models").glob(f"*/{FACTS}"))
    return [read_facts(path.parent) for path in paths]


def _known(cells: Iterable[dict]) -> dict:
    """Facts of the data that cells are of, and digests of the models that go by a name."""
    found = {"data": {}, "models": {}}
    for record in cells:
        made = record["made_by"]
        if made is None:
            continue
        cell = Cell.again(made)
        place = (cell.role, cell.scale.source)
        if cell.scale.source != "tinyworld" and "/".join(place) not in found["data"]:  # which can always be drawn
            found["data"]["/".join(place)] = data_facts(*place)
        if isinstance(cell.spec, str):
            found["models"][cell.spec] = record["checkpoint"]
    return found


def reproduce(
    scale: str, shard: tuple[int, int] = (1, 1), store: Where = None, device: str = "auto", count: int | None = None
) -> pd.DataFrame:
    """Measure shipped cells again, into the store, and compare all answers: one row per cell, `flips` differ.

    `shard` = (i, n) takes the i-th of n parts; `count` a random sample of so many. What the store holds is not measured
    again. Cells made of a notebook's own parts are left to their notebook.
    """
    records = [record for record in files.shipped_records(scale) if record["made_by"] is not None]
    records = records[shard[0] - 1 :: shard[1]]
    if count is not None:
        picks = np.random.default_rng().permutation(len(records))[:count]
        records = [records[place] for place in sorted(picks)]
    if not records:
        raise ValueError(
            f"nothing is shipped of scale {scale!r}; measure it first, with the notebooks or `robustclip run`"
        )
    prepare([Cell.again(record["made_by"]) for record in records], store, shipped=False)
    return _again(records, store, device)


def _again(records: Sequence[dict], store: Where, device: str) -> pd.DataFrame:
    """Measure the cells of some records and compare their answers."""
    order = sorted(
        records, key=lambda record: (record["cell"]["role"], record["cell"]["model"], record["cell"]["attack"])
    )
    rows = []
    for record in progress(order, "again", unit="cell"):
        cell = Cell.again(record["made_by"])
        now = evaluate([cell], store, device, fresh=True).iloc[0]
        answers = Store(store).cell(cell.scale.name, now["key"]).read()["answers"]
        found = differing(record["answers"], answers) if now["key"] == record["key"] else None
        rows.append({name: record["cell"][name] for name in FIELDS} | {"key": record["key"], "flips": found})
    return pd.DataFrame(rows)


def differing(before: Mapping[str, Sequence], now: Mapping[str, Sequence]) -> int:
    """How many answers of a cell differ from those it had before."""
    return sum(one != other for name, own in before.items() for one, other in zip(own, now[name], strict=True))


# --- confirming -------------------------------------------------------------------------------------------------------


def confirm(scale: str, store: Where = None, device: str = "auto", folder: str | Path | None = None) -> pd.DataFrame:
    """Measure a sample of the stale shipped cells again; where every answer is equal, map old digests of code to new.

    At least three cells for each component that changed, of every kind of attack that used it the cheapest, and the
    first updates of one training per recipe. One flip, and all cells with that change are due again; but processors
    round in their own ways, so a cell with flips is compared with what the code of its commit answers on this machine.
    The map is kept in `confirmed.json` with what it rests on. One row per component: old, new, how many cells, flips,
    confirmed.
    """
    stale = [record for record in files.shipped_records(scale) if is_stale(record)]
    changes: dict[tuple[str, str, str], list[dict]] = {}
    for record in stale:
        for name, old, new in _changed(record):
            changes.setdefault((name, old, new), []).append(record)
    evidence = {change: sample(records) for change, records in changes.items() if not change[0].startswith(TRAINED)}
    picked = {record["key"]: record for records in evidence.values() for record in records}
    again = Store(Store(store).root / "confirm" / datetime.now(UTC).strftime("%Y%m%d-%H%M%S"))
    flips = dict(_again(list(picked.values()), again, device).set_index("key")["flips"]) if picked else {}
    for key, then in answers_then([record for key, record in picked.items() if flips[key]], again).items():
        flips[key] = differing(then, again.cell(scale, key).read()["answers"])
    rows = [_row(change, [flips[record["key"]] for record in records]) for change, records in evidence.items()]
    rows += [_row(change, retraced) for change, retraced in _retraced(scale, changes).items()]
    found = pd.DataFrame(rows, columns=["component", "old", "new", "cells", "flips", "confirmed"])
    target, date = Path(folder or files.destination()) / scale, datetime.now(UTC).isoformat(timespec="seconds")
    with changing(target):
        maps = deepcopy(files.confirmed(scale))
        for row in found[found["confirmed"]].itertuples():
            maps.setdefault(row.component, {})[row.old] = {"new": row.new, "checked": row.cells, "date": date}
        files.write_json(target, files.CONFIRMED, maps)
    return found


def _changed(record: dict) -> list[tuple[str, str, str]]:
    """Components of a record whose code is another now, and not confirmed yet."""
    found, maps = [], files.confirmed(record["cell"]["scale"])
    for name, old in record["provenance"].items():
        new = current(name.removeprefix(TRAINED))
        if new is not None and newest(old, maps.get(name, {})) != new:
            found.append((name, old, new))
    return found


def sample(records: Sequence[dict]) -> list[dict]:
    """Records that can be measured again, without training if possible: the cheapest of every kind of attack."""
    able = [record for record in records if record["made_by"] is not None]
    able.sort(key=lambda record: (is_trained(record), record["forward"] + record["backward"], record["key"]))
    kinds: dict[tuple, dict] = {}
    for record in able:
        kinds.setdefault((record["cell"]["task"], record["cell"]["played_by"].partition("(")[0]), record)
    chosen = list(kinds.values())[:MOST]
    rest = [record for record in able if record not in chosen]
    return chosen + rest[: max(0, SAMPLE - len(chosen))]


def _row(change: tuple[str, str, str], flips: Sequence[int | None]) -> dict:
    """What the evidence for one change says: None where a cell has another name now."""
    good = len(flips) > 0 and change[2] != "gone" and all(count == 0 for count in flips)
    told = dict(zip(("component", "old", "new"), change, strict=True))
    return told | {
        "cells": len(flips),
        "flips": sum(1 if count is None else count for count in flips),
        "confirmed": good,
    }


def _retraced(scale: str, changes: dict) -> dict[tuple[str, str, str], list[int]]:
    """For each change of code that trains, whether the first updates of one training are others now."""
    found, seen = {}, {}
    facts = {one["digest"]: one for one in files.shipped_models(scale).to_dict("records")}
    for change, records in changes.items():
        made = records[0]["made_by"]
        model = Cell.again(made).spec if change[0].startswith(TRAINED) else None
        if model is not None and model.digest in facts:
            if model.digest not in seen:
                seen[model.digest] = int(not _trains_alike(model, facts[model.digest], made))
            found[change] = [seen[model.digest]]
    return found


def _trains_alike(model: Tuned, facts: dict, made: dict) -> bool:
    """Whether the first losses are those of the facts, or else those that the code of that time has here."""
    return retrace(model, facts["first_losses"]) or retrace(model, losses_then(made, facts, len(facts["first_losses"])))
