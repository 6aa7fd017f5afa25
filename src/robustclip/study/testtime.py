"""The grids of the pages on defenses at test time, which share their cells: attacked images are made once for all.

cells = blind(scale("photo"), ["TTC", "COLA"])      # clean and attacked by who does not know them
cells = aware(scale("photo"), ["TTC", "COLA"])      # attacked by who does
"""

from collections.abc import Mapping, Sequence
from typing import Any

from robustclip.study.cells import Cell, grid
from robustclip.study.finetuning import tuned
from robustclip.study.scales import Scale
from robustclip.study.trained import Tuned

ROLES = ("cifar10", "caltech101", "stl10", "pets")  # of the tables with every attack
AWARE_ROLES = ROLES
BEHIND_HOSTS = ("none", "RN", "Mirror", "TTE", "TTC", "TTC-open", "SCC", "COLA")
USUAL = ("clean", "PGD-10:last")
ATTACKS = (*USUAL, "CW-10:last", "AutoAttack", "label-free", "PGD-10:target")
SIZES = {"Ensemble": "views", "TPT": "views", "R-TPT": "views", "MTA": "views"}  # 64 passes and more
PRECISION = "float32"  # of gradients: that of half precision is another one on every kind of processor


def blind(
    scale: Scale, defenses: Sequence[str], roles: Sequence[str] = ROLES, attacks: Sequence[str] = ATTACKS,
    models: Mapping[str, Any] | Sequence[str] = ("clip",), **more: Any,
) -> list[Cell]:  # fmt: skip
    """Clean images, and images attacked by somebody who knows the classifier but not its defense."""
    return _cells(scale, defenses, roles, attacks, models, "blind", "testtime/blind", **more)


def aware(
    scale: Scale, defenses: Sequence[str], roles: Sequence[str] = AWARE_ROLES, attacks: Sequence[str] = ("aware",),
    models: Mapping[str, Any] | Sequence[str] = ("clip",), **more: Any,
) -> list[Cell]:  # fmt: skip
    """Images attacked by somebody who knows the defense."""
    return _cells(scale, defenses, roles, attacks, models, "aware", "testtime/aware", **more)


def hosts(scale: Scale, device: str = "auto") -> dict[str, Tuned]:
    """Adversarially fine-tuned CLIPs behind which defenses are put, trained when a cell that is missing needs them."""
    return tuned(scale, ["TeCoA"], device=device)


def _cells(
    scale: Scale, defenses: Sequence[str], roles: Sequence[str], attacks: Sequence[str], models: Any, attacker: str,
    table: str, n: int = 0, **more: Any,
) -> list[Cell]:  # fmt: skip
    """The cells role by role; dear defenses get fewer images."""
    found = []
    for size in dict.fromkeys(SIZES.get(name, "") for name in defenses):
        own = {name: scale.defense(name) for name in defenses if SIZES.get(name, "") == size}
        found += grid(
            scale, models, [name for name in roles if name in scale.roles], attacks, own, (attacker,),
            n=scale.size(f"{table}{' ' * bool(size)}{size}", n), precision=PRECISION, **more,
        )  # fmt: skip
    return found
