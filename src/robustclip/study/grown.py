"""CLIPs that learned against an attacker from the first step on, instead of being fine-tuned against one.

`tools/pretrain.py` trains them. Their weights do not travel with the package, what was measured on them does, so that
tables know them by what makes them.
"""

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path

import numpy as np

from robustclip.study.exchange import artifact
from robustclip.study.scales import Scale

PLACE = "ROBUSTCLIP_GROUND_UP"  # names the folder of their weights
FACTS = ("steps", "images", "seconds")  # of a training


class Grown(os.PathLike):
    """One of them; as a path it is the folder of its weights, a FileNotFoundError where nobody has trained it here."""

    def __init__(self, scale: Scale, name: str, settings: dict) -> None:
        self.scale, self.name, self.base = scale, name, scale.model("clip")
        self.identity = {"grown": name, "instead of": self.base, "eps": scale.reference_eps} | settings

    @cached_property
    def digest(self) -> str:
        """Names the model in keys of results."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:24]

    def provenance(self) -> dict[str, str]:
        """Nothing of this package: it is made outside."""
        return {}

    @property
    def folder(self) -> Path:
        """Where its weights lie, or would."""
        return Path(os.environ.get(PLACE) or "runs/ground-up").expanduser() / self.name

    def __fspath__(self) -> str:
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"the weights of {self.name} are not in {str(self.folder)!r}; train them with `python "
                f"tools/pretrain.py {self.name}`, or let {PLACE} name the folder that they lie in"
            )
        return str(self.folder)

    def facts(self) -> dict[str, int] | None:
        """Steps, pictures and seconds of its training, None where they are not known."""

        def read() -> dict[str, np.ndarray]:
            told = json.loads(Path(self, "training.json").read_text(encoding="utf-8"))
            return {name: np.array(told[name]) for name in FACTS}

        known = not self.folder.is_dir()
        found = artifact(self.scale, f"ground-up/{self.name}", self.identity, read, only_known=known)
        return found and {name: value.item() for name, value in found.items()}


def grown(scale: Scale) -> dict[str, Grown]:
    """The models of a scale by what its table [training.ground-up] calls them; none where it has no such table."""
    own = scale.training.get("ground-up", {})
    return {title: Grown(scale, made["name"], made) for title, made in own.items()}
