"""Say beforehand what measuring a grid would cost; nothing is measured, stored or downloaded."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from robustclip import models
from robustclip.data.roles import role
from robustclip.study.bench import Bench, CountingClip, device_name
from robustclip.study.cells import Cell
from robustclip.study.store import Store, Where


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
    """Image passes at most: one to score each pair, one to see which images stand, and those of the attack."""
    size = role(cell.role).paper.get("test_images", cell.n) if cell.scale.source == "paper" else cell.n
    n, classes = min(cell.n, size), len(role(cell.role).classes or "1")
    (forward, backward), pairs = (cell.attack.passes(classes), cell.attack.pairs_made) if cell.attack else ((0, 0), 1)
    return n * (pairs + forward), n * backward


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
