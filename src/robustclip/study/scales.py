"""Scales: data files that say which models, images and budgets play the papers' roles.

scale("quick").attack("PGD-100")        # the attack that plays PGD-100 at this scale
scale("course.toml")                    # a scale of your own; copy one from assets/scales and change it
"""

import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from robustclip.checks import check_choice, check_integer, check_range
from robustclip.data.roles import role, role_names
from robustclip.data.sources import SOURCES
from robustclip.defenses.base import Defense
from robustclip.models import PRECISIONS
from robustclip.study.named import NAMES, named_attack, named_defense
from robustclip.training.named import named_recipe
from robustclip.training.recipes import Recipe

KINDS = {  # of the values of a scale file, and how to say them
    "source": (str, "a text"), "world": (str, "a text"), "precision": (str, "a text"),
    "reference_eps": ((str, int, float), "a number, or a text like 8/255"), "assumed_speed": ((int, float), "a number"),
    "images": (int, "a whole number"), "batch_size": (int, "a whole number"), "seeds": (int, "a whole number"),
    "recompute_stale": (bool, "true or false"), "roles": (list, "a list of texts"),
    "models": (dict, "a table of texts"), "role_images": (dict, "a table of whole numbers"),
    "steps": (dict, "a table of whole numbers"), "sizes": (dict, "a table of whole numbers"),
    "defenses": (dict, "a table of numbers"), "training": (dict, "a table of settings"),
}  # fmt: skip
INSIDE = {"models": str, "roles": str, "role_images": int, "steps": int, "sizes": int, "defenses": (int, float)}
EVIDENCE = ("photo", "full")  # scales whose shipped results stand beside a run, the weightiest first
WORLDS = ("tinyworld", "photo", "paper")  # drawings, photographs, the papers' own sets


def parse_eps(text: str | float) -> float:
    """A budget as the papers write it, "8/255", or as a decimal number, to the nearest float."""
    try:
        return float(Fraction(str(text)))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"eps={text!r} is not a number; write it like 8/255 or 0.03") from error


def scale_names() -> tuple[str, ...]:
    """Names of the scales that come with the package."""
    found = files("robustclip").joinpath("assets/scales").iterdir()
    return tuple(sorted(path.name.removesuffix(".toml") for path in found if path.name.endswith(".toml")))


@dataclass(frozen=True, repr=False)
class Scale:
    """One column of the project: the same notebooks with other models, images and budgets."""

    name: str
    file: str  # of a scale of one's own; "" for those of the package
    source: str
    reference_eps: float
    images: int
    batch_size: int
    recompute_stale: bool
    models: dict[str, str] = field(hash=False)
    world: str
    roles: tuple[str, ...]
    role_images: dict[str, int] = field(hash=False)
    steps: dict[str, int] = field(hash=False)
    training: dict = field(hash=False)  # settings of all recipes, and in tables of their own those of single ones
    sizes: dict[str, int] = field(default_factory=dict, hash=False)  # images of a table, by "page/table"
    defenses: dict[str, float] = field(default_factory=dict, hash=False)  # thresholds, by `tools/calibrate.py`
    seeds: int = 1  # of training, where a table does not say otherwise
    precision: str = "float32"  # of the gradients of attacks; what they find is judged in float32
    assumed_speed: float | None = None  # image passes a second, for plans before anything was measured

    def __post_init__(self) -> None:
        check_choice("source", self.source.partition(":")[0], SOURCES)
        check_choice("world", self.world, WORLDS)
        check_range("reference_eps", self.reference_eps, 0, 1)
        for name in self.roles:
            check_choice("role", name, role_names())
        for name in self.role_images:
            check_choice(f"role in role_images of scale {self.name}", name, self.roles)
        for name in self.steps:
            if name not in NAMES and not named_attack(name, 0, {}):
                raise ValueError(f"steps of scale {self.name!r} name {name!r}, which has no steps")
        check_choice("precision", self.precision, PRECISIONS)
        if not isinstance(self.recompute_stale, bool):
            raise ValueError(f"recompute_stale={self.recompute_stale!r} of scale {self.name!r} is not allowed; write "
                             "true or false")  # fmt: skip
        limits = {"images": self.images, "batch_size": self.batch_size, "seeds": self.seeds}
        for name, value in (limits | self.role_images | self.steps | self.sizes).items():
            check_integer(f"{name} of scale {self.name}", value, 1)

    def __repr__(self) -> str:
        return f"scale({self.place!r})"

    def model(self, name: str) -> str:
        """What `models.load` takes for the model called `name`; ${VARIABLE:-default} is filled in."""
        check_choice(f"model at scale {self.name}", name, self.models)
        return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: os.environ.get(m[1]) or m[2], self.models[name])

    @property
    def place(self) -> str:
        """What `scale` takes to find it again."""
        return self.file or self.name

    def role_names(self, group: str | None = None) -> tuple[str, ...]:
        """The scale's roles, or those of one group: a source without a training part in this world is none there."""
        role_names(group)  # which knows all groups
        return tuple(name for name in self.roles if group in (None, self.group_of(name)))

    def group_of(self, name: str) -> str:
        """The group of a role in this world."""
        entry = role(name)
        return entry.photo.get("group", entry.group) if self.world == "photo" else entry.group

    def hides(self, name: str) -> bool:
        """Whether the terms of the role's images forbid pages to show them."""
        return self.world != "tinyworld" and not role(name).photo.get("show", False)

    @property
    def missing(self) -> dict[str, str]:
        """The roles that no set plays in this world, and why."""
        return _missing(self.world)

    def images_of(self, name: str) -> int:
        """How many images the role `name` is measured on."""
        check_choice(f"role at scale {self.name}", name, self.roles)
        return self.role_images.get(name, self.images)

    def size(self, table: str, n: int = 0) -> int:
        """How many images a table is measured on: `n` if it is not 0, else what the scale says for it."""
        return n or self.sizes.get(table) or self.images

    def recipe(self, name: str, **settings: Any) -> Recipe:
        """The recipe of adversarial fine-tuning called `name`, at the reference eps unless told otherwise."""
        own = {key: value for key, value in self.training.items() if key != "pictures" and not isinstance(value, dict)}
        own |= {"eps": self.reference_eps} | self.training.get(name, {}) | settings
        own |= {key: parse_eps(own[key]) for key in ("eps", "step_size") if own.get(key) is not None}
        try:
            return named_recipe(name, **own)
        except TypeError as error:
            raise ValueError(f"[training] of scale {self.name!r} does not fit {name}: {error}") from error

    def defense(self, name: str) -> Defense | None:
        """The defense called `name`, its pixels in units of the reference eps; None for "none"."""
        lexicon = "tinyworld" if self.world == "tinyworld" else "wordnet"
        return named_defense(name, self.reference_eps, self.defenses, lexicon)

    def attack(self, name: str, eps: str | float | None = None, seed: int = 0) -> Callable | None:
        """The attack that plays `name` here, at the reference eps unless told otherwise; None for "clean"."""
        budget = check_range("eps", self.reference_eps if eps is None else parse_eps(eps), 0, 1)
        return named_attack(name, budget, self.steps, seed)


def scale(name: str | Scale) -> Scale:
    """The scale called `name`, or the one in the file `name` if it ends in .toml."""
    if isinstance(name, Scale):
        return name
    if name.endswith(".toml"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no file {name!r}; give one that exists or one of: {', '.join(scale_names())}")
    else:
        check_choice("scale", name, scale_names())
        path = files("robustclip").joinpath(f"assets/scales/{name}.toml")
    try:
        return _read(path.read_text(encoding="utf-8"), Path(name).stem, str(path) if name.endswith(".toml") else "")
    except UnicodeDecodeError as error:
        raise ValueError(f"scale {name!r} is not a text file ({error.reason}); give a TOML file") from error


def main_source(there: Scale) -> str:
    """The source of most classes, which models for sets that they never saw learn from: ImageNet in the papers."""
    return max(there.role_names("source"), key=lambda name: len(role(name).classes))


def training_seeds(there: Scale, table: str) -> int:
    """How many training seeds a table has: `"page/table seeds"` of the scale's sizes, where that is not the usual."""
    return there.sizes.get(f"{table} seeds", there.seeds)


@cache
def _missing(world: str) -> dict[str, str]:
    """The roles that no set plays in a world, and why."""
    found = {name: role(name).photo.get("missing") for name in role_names() if world == "photo"}
    return {name: why for name, why in found.items() if why}


def _check_kind(scale: str, key: str, value: Any) -> None:
    """A value of a scale file has to be what it is for: a number where a number is read."""
    kind, said = KINDS[key]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    kinds = [(value, kind), *[(one, INSIDE[key]) for one in inside if key in INSIDE]]
    if not all(isinstance(one, kind) and (kind is bool or not isinstance(one, bool)) for one, kind in kinds):
        raise ValueError(f"{key}={repr(value)[:60]} of scale {scale!r} is not allowed; write {said}")


@lru_cache(maxsize=32)
def _read(text: str, name: str, file: str = "") -> Scale:
    """Build a scale from TOML; a missing or unknown key is named."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"scale {name!r} is not valid TOML: {error}") from error
    needed = {"source", "reference_eps", "images", "batch_size", "recompute_stale", "models"}
    optional = {"world", "roles", "role_images", "steps", "training", "sizes", "defenses", "seeds", "precision",
                "assumed_speed"}  # fmt: skip
    if wrong := needed ^ (table.keys() - optional):
        raise ValueError(f"scale {name!r} has wrong keys ({', '.join(sorted(wrong))} missing or unknown); it needs "
                         f"{', '.join(sorted(needed))} and may have {', '.join(sorted(optional))}")  # fmt: skip
    for key, value in table.items():
        _check_kind(name, key, value)
    world = table.pop("world", WORLDS[0])
    roles = table.pop("roles", [one for one in role_names() if one not in _missing(world)])
    eps = parse_eps(table.pop("reference_eps"))
    defaults = {key: table.pop(key, {}) for key in ("role_images", "steps", "training")}
    return Scale(name=name, file=file, world=world, reference_eps=eps, roles=tuple(roles), **defaults, **table)
