"""What is proved of a smoothed classifier: certificates that the page on proofs makes and the leaderboard reads.

They are kept as small arrays, named by the classifier and the noise, so that neither needs votes or weights for them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from robustclip.defenses.smoothing import certify, votes
from robustclip.models import load
from robustclip.study.exchange import artifact
from robustclip.study.scales import Scale
from robustclip.study.store import Where

ALPHA = 0.001  # the chance that the statement about one image is wrong
MIDDLE = 4  # the deviation of the noise and the L2 radius that sentences are about, in units of the reference budget


def identity_of(model: Any) -> list | None:
    """What names a classifier; None where neither its pictures nor results of it are at hand."""
    if isinstance(model, str):
        return [load(model, "cpu").digest]
    try:
        return [model.digest, model.provenance() if getattr(model, "recompute", False) else {}]
    except FileNotFoundError:
        return None


def certificates(
    scale: Scale,
    model: Any,
    units: int,
    counted: Callable[[], dict[str, np.ndarray]] | None = None,
    store: Where = None,
) -> dict[str, np.ndarray] | None:
    """Labels, certified classes and radii in units (n,) of a model behind noise of so many units; None if not known.

    `counted` gives the labels and the votes that select and estimate, from which they are made where nobody has.
    """
    if (named := identity_of(model)) is None:
        return None

    def certified() -> dict[str, np.ndarray]:
        one = counted()
        classes, radii = certify(one["select"], one["estimate"], 1.0, ALPHA)  # radii per deviation
        return {"labels": one["labels"], "classes": classes, "radii": units * radii}

    about = [named, scale.source, scale.reference_eps, units, ALPHA]
    return artifact(scale, "certificates", about, certified, [certify, votes], store, only_known=counted is None)


def proved(found: dict[str, np.ndarray], radius: float) -> np.ndarray:
    """Whether each image is certified right at least so far, (n,)."""
    return (found["classes"] == found["labels"]) & (found["radii"] >= radius)
