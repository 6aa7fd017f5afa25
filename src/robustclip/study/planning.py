"""Say beforehand what measuring a grid would cost; nothing is measured, stored or downloaded."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from robustclip import models
from robustclip.data.roles import role
from robustclip.models import Clip
from robustclip.study.bench import Bench, device_name, timed
from robustclip.study.cells import Cell
from robustclip.study.store import Store, Where


def plan(cells: Iterable[Cell], store: Where = None, device: str = "auto") -> pd.DataFrame:
    """What measuring the cells from nothing would take at most; no data set or remote model is touched.

    `forward` and `backward` are image passes if no image breaks early. `seconds` come from stored results of the same
    model and device (`estimate` = "records"), else from trying a local model for half a second ("measured"), else from
    the scale's assumed speed ("assumed"). `megabytes` to download, if nothing is here yet, stand on the first cell of
    each data set.
    """
    bench, store, seen, speeds, rows = Bench(device), Store(store), set(), {}, []
    for cell in cells:
        if cell.model not in speeds:
            speeds[cell.model] = _speed(cell, bench, store)
        speed, estimate = speeds[cell.model]
        forward, backward = passes(cell)
        rows.append(cell.describe() | {
            "forward": forward, "backward": backward, "seconds": (forward + backward) / speed, "estimate": estimate,
            "megabytes": role(cell.role).paper.get("bytes", math.nan) / 1e6
            if cell.scale.name == "paper" and cell.role not in seen else 0.0,
        })  # fmt: skip
        seen.add(cell.role)
    return pd.DataFrame(rows)


def passes(cell: Cell) -> tuple[int, int]:
    """Image passes at most: those of the answers, and those of the attack on what it sees.

    One answer of a defense takes (F, B) passes; each backward pass of an aware attack goes back through its F, too.
    """
    size = role(cell.role).paper.get("test_images", cell.n) if cell.scale.name == "paper" else cell.n
    n, classes = min(cell.n, size), len(role(cell.role).classes or "1")
    answer = cell.defense.passes(classes) if cell.defense else (1, 0)
    forward, backward, pairs = 0, 0, 1
    if cell.attack is not None:
        (forward, backward), pairs = cell.attack.passes(classes), cell.attack.pairs_made
    ahead, behind = answer if cell.attacker == "aware" and cell.defense else (1, 0)
    attack = forward * ahead, forward * behind + backward * ahead
    return n * (attack[0] + pairs * answer[0]), n * (attack[1] + pairs * answer[1])


def _speed(cell: Cell, bench: Bench, store: Store) -> tuple[float, str]:
    """Image passes a second of the cell's model on this device, and how we know."""
    known = [(entry["forward"] + entry["backward"], entry["seconds"]) for entry in store.records(cell.scale.name)
             if entry["cell"]["model"] == cell.model and entry["device"] == device_name(bench.device)]  # fmt: skip
    if known and np.sum(known, axis=0)[0]:
        count, seconds = np.sum(known, axis=0)
        return count / max(seconds, 1e-3), "records"
    base = getattr(cell.spec, "base", cell.spec)  # of a model yet to be trained
    if not isinstance(base, str) or base in models.EMBEDDED or Path(base).expanduser().is_dir():
        return _try(bench.clip(base), bench.device), "measured"
    return (cell.scale.assumed_speed, "assumed") if cell.scale.assumed_speed else (math.nan, "unknown")


def _try(clip: Clip, device: torch.device) -> float:
    """Image passes a second of forward and backward through the image tower on gray pictures, after one to warm up."""
    place, side = getattr(clip, "device", device), getattr(clip, "image_size", (32, 32))
    images, spent = torch.full((32, 3, *side), 0.5, device=place, requires_grad=True), np.zeros(3)
    for turn in range(100):
        _, cost = timed(lambda: torch.autograd.grad(clip.encode_images(images).sum(), images)[0])
        spent += cost if turn else 0
        if spent[0] > 0.5:
            break
    return 64 * turn / spent[0]
