"""The grids of the pages on defenses at test time, which share their cells: attacked images are made once for all.

cells = blind(scale("photo"), ["TTC", "COLA"])      # clean and attacked by who does not know them
cells = aware(scale("photo"), ["TTC", "COLA"])      # attacked by who does
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from robustclip.defenses.base import Defense
from robustclip.study.cells import Cell, grid
from robustclip.study.finetuning import tuned
from robustclip.study.reported import reported
from robustclip.study.scales import Scale
from robustclip.study.trained import Tuned

ROLES = ("cifar10", "caltech101", "stl10", "pets")  # of the tables with every attack
AWARE_ROLES = ROLES
BEHIND_HOSTS = ("none", "RN", "Mirror", "TTE", "TTC", "TTC-open", "SCC", "COLA")
USUAL = ("clean", "PGD-10:last")
ATTACKS = (*USUAL, "CW-10:last", "AutoAttack", "label-free", "PGD-10:target")
SIZES = {"Ensemble": "views", "TPT": "views", "R-TPT": "views", "MTA": "views"}  # 64 passes and more
PRECISION = "float32"  # of gradients: that of half precision is another one on every kind of processor
Defenses = Sequence[str] | Mapping[str, Defense | None]  # names that the scale knows, or name -> defense
PRINTED = (  # who prints, in which table, on which mean of sets, the numbers of which defenses
    *(("scc", "1", "avg16", name) for name in ("none", "RN", "Anti-adversary", "HD", "TTC", "DOC", "SCC")),
    ("ttc", "1", "avg16", "TTE"),
    ("BaP", "2", "avg16", "LPF"),
    *(("T-VSS", "1", "avg8", name) for name in ("Ensemble", "MTA", "TPT", "R-TPT")),
    ("MAC", "main", "avg10", "MAC"),
    *(("MAC", "adaptive", "avg10", name) for name in ("MAC", "TTC")),
    ("cola", "7", "avg9", "COLA"),
    ("clipure", "abstract", "CIFAR10", "CLIPure-released"),
)
THEIRS = {"none": "CLIP", "CLIPure-released": "CLIPure best variant"}  # our names in these tables
WHOSE = {"T-VSS": "backbone=RN50"}  # settings of which rows are taken


def blind(
    scale: Scale, defenses: Defenses, roles: Sequence[str] = ROLES, attacks: Sequence[str] = ATTACKS,
    models: Mapping[str, Any] | Sequence[str] = ("clip",), **more: Any,
) -> list[Cell]:  # fmt: skip
    """Clean images, and images attacked by somebody who knows the classifier but not its defense."""
    return _cells(scale, defenses, roles, attacks, models, "blind", "testtime/blind", **more)


def aware(
    scale: Scale, defenses: Defenses, roles: Sequence[str] = AWARE_ROLES, attacks: Sequence[str] = ("aware",),
    models: Mapping[str, Any] | Sequence[str] = ("clip",), **more: Any,
) -> list[Cell]:  # fmt: skip
    """Images attacked by somebody who knows the defense."""
    return _cells(scale, defenses, roles, attacks, models, "aware", "testtime/aware", **more)


def hosts(scale: Scale, device: str = "auto") -> dict[str, Tuned]:
    """Adversarially fine-tuned CLIPs behind which defenses are put, trained when a cell that is missing needs them."""
    return tuned(scale, ["TeCoA"], device=device)


def _cells(
    scale: Scale, defenses: Defenses, roles: Sequence[str], attacks: Sequence[str], models: Any, attacker: str,
    table: str, n: int = 0, **more: Any,
) -> list[Cell]:  # fmt: skip
    """The cells role by role; dear defenses get fewer images."""
    found, known = [], dict(defenses) if isinstance(defenses, Mapping) else {}
    for size in dict.fromkeys(SIZES.get(name, "") for name in defenses):
        same = [name for name in defenses if SIZES.get(name, "") == size]
        own = {name: known[name] if name in known else scale.defense(name) for name in same}
        found += grid(
            scale, models, [name for name in roles if name in scale.roles], attacks, own, (attacker,),
            n=scale.size(f"{table}{' ' * bool(size)}{size}", n), precision=PRECISION, **more,
        )  # fmt: skip
    return found


def printed() -> pd.DataFrame:
    """Accuracies that papers print for defenses, in the shape of `reported`, with our names in the column `defense`."""
    parts = []
    for paper, table, sets, name in PRINTED:
        rows = reported(paper, table)
        same = (rows["method"] == THEIRS.get(name, name)) & (rows["dataset"] == sets) & (rows["metric"] == "accuracy")
        parts.append(rows[same & rows["setting"].str.startswith(WHOSE.get(paper, ""))].assign(defense=name))
    return pd.concat(parts, ignore_index=True)
