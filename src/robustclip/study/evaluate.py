"""Measure cells: adversarial images, accuracy, cost, provenance; and say beforehand what that would cost."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from robustclip import models
from robustclip.attacks import UniformNoise
from robustclip.checks import check_folder, check_images, check_labels, check_range
from robustclip.data.roles import role
from robustclip.data.sources import Samples, load_samples
from robustclip.progress import progress
from robustclip.study.cells import Cell
from robustclip.study.statistics import wilson
from robustclip.study.store import Entry, Store, code_digest, commit, versions

COLUMNS = [
    *("scale", "model", "role", "dataset", "source", "attack", "played_by", "attacker", "defense", "eps", "n", "seed"),
    *("accuracy", "low", "high", "seconds", "forward", "backward", "stale"),
    *("checkpoint", "data", "code", "device", "date", "commit", "key"),
]
Where = Store | str | Path | None  # of results: a store, its folder, or the default one


class CountingClip(nn.Module):
    """A CLIP that counts the images passing forward and backward through its image tower, and is otherwise the same."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.inner = clip
        self.forward_images = self.backward_images = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def encode_images(self, images: Tensor) -> Tensor:
        """Features of the wrapped CLIP; counts the images, and again when their gradient arrives."""
        self.forward_images += len(images)
        if images.requires_grad and torch.is_grad_enabled():
            images = images.view_as(images)
            images.register_hook(self._count_backward)
        return self.inner.encode_images(images)

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward_images += len(gradient)

    def timed(self, work: Callable[[], Tensor]) -> tuple[Tensor, np.ndarray]:
        """The result of `work()` and its cost: seconds, images forward, images backward."""
        before = np.array([time.perf_counter(), self.forward_images, self.backward_images])
        result = work()
        if result.is_cuda:
            torch.cuda.synchronize()
        return result, np.array([time.perf_counter(), self.forward_images, self.backward_images]) - before


class Bench:
    """Models, samples and blind adversarial images of one call to `evaluate`, each made once."""

    def __init__(self, device: str) -> None:
        self.device = models.pick_device(device)
        self._clips: dict[Any, CountingClip] = {}
        self._samples: dict[tuple, Samples] = {}
        self._blind: dict[tuple, dict[int, tuple[Tensor, np.ndarray]]] = {}

    def clip(self, spec: Any) -> CountingClip:
        """The CLIP of a cell: objects are taken as they are, names and folders are loaded."""
        name = str(spec) if isinstance(spec, str | Path) else spec
        if name not in self._clips:
            self._clips[name] = CountingClip(models.load(name, str(self.device)) if isinstance(name, str) else spec)
        return self._clips[name]

    def place(self, cell: Cell) -> torch.device:
        """Where the cell's images go: to its CLIP, which stays where it is."""
        return torch.device(getattr(self.clip(cell.spec), "device", self.device))

    def samples(self, cell: Cell) -> Samples:
        """The images of a cell; only those of the latest role are kept."""
        name = (cell.role, cell.scale.source, cell.n)
        if name not in self._samples:
            self._samples = {name: load_samples(cell.role, source=cell.scale.source, n=cell.n)}
        return self._samples[name]

    def prompts(self, cell: Cell) -> list[str]:
        """One prompt per class: the data's own, or from the cell's template."""
        samples = self.samples(cell)
        return [cell.template.format(name) for name in samples.classes] if cell.template else list(samples.prompts)

    def key(self, cell: Cell) -> str:
        """The name of the cell's result."""
        return cell.key(self.clip(cell.spec).digest, self.samples(cell).digest, self.prompts(cell))

    def blind(self, cell: Cell) -> dict[int, tuple[Tensor, np.ndarray]]:
        """Blind adversarial images and their cost by batch, for the next defense that faces the same attack."""
        name = (self.clip(cell.spec), self.samples(cell).digest, cell.template, repr(cell.attack))
        if name not in self._blind:
            self._blind = {name: {}}
        return self._blind[name]


# --- measuring --------------------------------------------------------------------------------------------------------


def evaluate(
    cells: Iterable[Cell], store: Where = None, device: str = "auto", batch_size: int | None = None
) -> pd.DataFrame:
    """Measure every cell that the store does not hold yet; one tidy row per cell, in the order given.

    `accuracy`, `low`, `high` are percent with the 95 % Wilson interval; `seconds`, `forward`, `backward` are what the
    cell costs alone; `stale` marks results of other code, which scales with `recompute_stale` measure again.
    """
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
        entry.part.unlink(missing_ok=True)  # a kill right after the last rename leaves it
        rows[place] = _row(cell.describe(), record)
    return pd.DataFrame([rows[place] for place in range(len(cells))], columns=COLUMNS)


def outcomes(row: Mapping[str, Any], store: Where = None) -> np.ndarray:
    """Per-image outcomes (n,) bool of one row of `evaluate`, for paired tests on the same images."""
    record = Store.of(store).entry(row["scale"], row["key"]).read()
    if record is None:
        raise FileNotFoundError(f"no result {row['key']!r} in {Store.of(store)!r}; evaluate its cell first")
    return np.array([outcome == "1" for outcome in record["correct"]])


def export(scale: str, store: Where = None, folder: str | Path = "results") -> list[Path]:
    """Write all results of a scale as tidy CSV files with provenance, one per role: `folder/scale/role.csv`."""
    rows = pd.DataFrame([_row(entry["cell"], entry) for entry in Store.of(store).records(scale)], columns=COLUMNS)
    written = []
    for name, table in rows.groupby("role"):
        written.append(check_folder(Path(folder) / scale) / f"{name}.csv")
        table.sort_values(COLUMNS[:12], kind="stable").to_csv(written[-1], index=False, lineterminator="\n")
    return written


def _measure(cell: Cell, bench: Bench, entry: Entry, batch_size: int) -> dict:
    """Run a cell batch by batch from where an interrupted run stopped, and store its record."""
    base = models.ZeroShotClassifier(bench.clip(cell.spec), bench.prompts(cell))
    defended = cell.defense(base) if cell.defense else base
    done = entry.resume(code_digest())
    first, n = sum(len(batch["predicted"]) for batch in done), len(bench.samples(cell).labels)
    for start in progress(range(first, n, batch_size), f"{cell.model} {cell.role} {cell.attack_name}", unit="batch"):
        predicted, cost = _batch(cell, bench, base, defended, slice(start, start + batch_size))
        batch = {"code": code_digest(), "cell": cell.describe(), "start": start, "predicted": predicted, "cost": cost}
        entry.append(batch)
        done.append(batch)
    return entry.write(_record(cell, bench, done))


def _batch(cell: Cell, bench: Bench, base: nn.Module, defended: Callable, rows: slice) -> tuple[list[int], list[float]]:
    """Predicted labels of one batch after the attack, and what attack and prediction cost."""
    clip, samples, spent = bench.clip(cell.spec), bench.samples(cell), np.zeros(3)
    images = check_images(samples.images[rows]).to(bench.place(cell))
    labels = check_labels(samples.labels[rows], len(base.prompts), len(images)).to(images.device)
    if cell.attack and cell.attacker == "aware":
        images, spent = clip.timed(lambda: cell.attack(defended, images, labels))
    elif cell.attack:
        known = bench.blind(cell)
        place = (rows.start, len(images))
        if place not in known:
            known[place] = clip.timed(lambda: cell.attack(base, images, labels))
        images, spent = known[place]
    with torch.no_grad():
        logits, scoring = clip.timed(lambda: defended(check_images(images)))
    if not torch.isfinite(logits).all():
        raise ValueError(f"model {cell.model!r} gives NaN or infinite logits; restore or retrain its checkpoint")
    return logits.argmax(1).tolist(), (spent + scoring).round(4).tolist()


def _record(cell: Cell, bench: Bench, batches: list[dict]) -> dict:
    """What the store keeps of a finished cell."""
    samples, predicted = bench.samples(cell), [label for batch in batches for label in batch["predicted"]]
    hits = (guess == label for guess, label in zip(predicted, samples.labels.tolist(), strict=True))
    seconds, forward, backward = np.sum([batch["cost"] for batch in batches], axis=0).tolist()
    return {
        "cell": cell.describe() | {"source": samples.source},
        "correct": "".join("01"[hit] for hit in hits),
        "predicted": predicted,
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
    return cell | kept | {"n": n, "accuracy": accuracy, "low": low, "high": high, "stale": stale}


def device_name(device: torch.device) -> str:
    """What results say they were measured on: "NVIDIA H100", "cpu (2 threads)"."""
    cuda = device.type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else f"{device.type} ({torch.get_num_threads()} threads)"


# --- planning ---------------------------------------------------------------------------------------------------------


def plan(cells: Iterable[Cell], store: Where = None, device: str = "auto") -> pd.DataFrame:
    """What measuring the cells from nothing would take at most; no data set or remote model is touched.

    `forward` and `backward` are image passes if no image breaks early and a defense costs one pass. `seconds` come from
    stored results of the same model and device (`estimate` = "records"), else from trying a local model for half a
    second ("measured"), else from the scale's assumed speed ("assumed"). `megabytes` to download, if nothing is here
    yet, stand on the first cell of each data set.
    """
    bench, store, seen, speeds, rows = Bench(device), Store.of(store), set(), {}, []
    for cell in cells:
        if cell.model not in speeds:
            speeds[cell.model] = _speed(cell, bench, store)
        speed, estimate = speeds[cell.model]
        forward, backward = _passes(cell)
        rows.append(cell.describe() | {
            "forward": forward, "backward": backward, "seconds": (forward + backward) / speed, "estimate": estimate,
            "megabytes": 0.0 if cell.role in seen or cell.scale.source != "paper" else _megabytes(cell.role),
        })  # fmt: skip
        seen.add(cell.role)
    return pd.DataFrame(rows)


def _megabytes(name: str) -> float:
    """Size of the download of a role's data set, NaN if unknown."""
    return role(name).paper.get("bytes", math.nan) / 1e6


def _passes(cell: Cell) -> tuple[int, int]:
    """Image passes at most: one to score, one to see which images stand, then the steps of the attack."""
    size = role(cell.role).paper.get("test_images", cell.n) if cell.scale.source == "paper" else cell.n
    n, restarts, steps = min(cell.n, size), getattr(cell.attack, "restarts", 1), getattr(cell.attack, "steps", None)
    if cell.attack is None or isinstance(cell.attack, UniformNoise):
        return n * (2 if cell.attack else 1), 0
    return (n * (2 + restarts * (steps + 1)), n * restarts * steps) if steps else (3 * n, n)


def _speed(cell: Cell, bench: Bench, store: Store) -> tuple[float, str]:
    """Image passes a second of the cell's model on this device, and how we know."""
    known = [(entry["forward"] + entry["backward"], entry["seconds"]) for entry in store.records(cell.scale.name)
             if entry["cell"]["model"] == cell.model and entry["device"] == device_name(bench.device)]  # fmt: skip
    if known:
        passes, seconds = np.sum(known, axis=0)
        return passes / max(seconds, 1e-3), "records"
    if not isinstance(cell.spec, str) or cell.spec == models.EMBEDDED or Path(cell.spec).expanduser().is_dir():
        return _try(bench.clip(cell.spec), bench.place(cell)), "measured"
    return (cell.scale.assumed_speed, "assumed") if cell.scale.assumed_speed else (math.nan, "unknown")


def _try(clip: CountingClip, device: torch.device) -> float:
    """Image passes a second of forward and backward through the image tower on gray pictures, after one to warm up."""
    images = torch.full((32, 3, *getattr(clip, "image_size", (32, 32))), 0.5, device=device, requires_grad=True)
    spent = np.zeros(3)
    for turn in range(100):
        _, cost = clip.timed(lambda: torch.autograd.grad(clip.encode_images(images).sum(), images)[0])
        spent += cost if turn else 0
        if spent[0] > 0.5:
            break
    return (spent[1] + spent[2]) / spent[0]
