"""The table of roles: which data set of the papers each stands for, and the Tinyworld set that plays it."""

import hashlib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import product

import numpy as np
import torch
from torch import Tensor

from robustclip.checks import check_choice, check_integer
from robustclip.data import tinyworld
from robustclip.data.grammar import Speaker, noun_phrase, words
from robustclip.data.tinyworld import ANY

ATTRIBUTES = ("shape", "color", "texture", "background")  # columns of a wish, as `sample_scenes` reads them
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Role:
    """A data set of the papers under the name the book uses for it at every scale."""

    name: str
    title: str  # as the printed numbers call it
    group: str
    description: str
    template: str
    classes: tuple[str, ...]
    wishes: tuple[tuple[int, ...], ...] = field(repr=False)  # per class: shape, color, texture, background or ANY
    style: str = "photo"
    objects: int = 1
    size: float = 1.0
    paper: dict = field(default_factory=dict, repr=False, hash=False)

    @property
    def prompts(self) -> list[str]:
        """One prompt per class, from the role's template."""
        return [self.template.format(name) for name in self.classes]


def _table(name: str) -> dict:
    return tomllib.loads(files("robustclip").joinpath(f"assets/{name}.toml").read_text(encoding="utf-8"))


@cache
def _entries() -> dict[str, dict]:
    return _table("roles")


def role_names(group: str | None = None) -> tuple[str, ...]:
    """Names of all roles, or of one group: source, transfer, shift, medical, retrieval, extra."""
    if group is None:
        return tuple(_entries())
    check_choice("group", group, dict.fromkeys(entry["group"] for entry in _entries().values()))
    return tuple(name for name, entry in _entries().items() if entry["group"] == group)


def _combinations(entry: dict) -> Iterator[tuple[int, ...]]:
    """Every wish an entry allows, in table order."""
    options = []
    for attribute in ATTRIBUTES:
        named = entry.get("among", {}).get(attribute, tinyworld.values(attribute))
        options.append([tinyworld.index(attribute, n) for n in named] if attribute in entry["attributes"] else [ANY])
    pairs = entry.get("pairs", "any")
    for wish in product(*options):
        if pairs == "any" or tinyworld.is_held_out(wish[0], wish[1]) == (pairs == "held-out"):
            yield wish


def _wishes(name: str) -> tuple[tuple[int, ...], ...]:
    """The role's classes: a fixed random draw from the combinations that qualify."""
    entry = _entries()[name]
    if "like" in entry:
        return _wishes(entry["like"])[: entry["classes"]]
    found = list(_combinations(entry))
    if len(found) < entry["classes"]:
        raise ValueError(f"role {name!r} asks for {entry['classes']} classes, only {len(found)} combinations qualify")
    seed = int.from_bytes(hashlib.sha256(f"classes/{name}".encode()).digest()[:4], "big")
    return tuple(found[place] for place in np.random.default_rng(seed).permutation(len(found))[: entry["classes"]])


def _class_name(wish: tuple[int, ...]) -> str:
    """Such as "striped red star", "striped" (texture alone), "red thing in the snow", or the bare name of a place."""
    shape, color, texture, background = (
        words(attribute)[value][0] if value >= 0 else None for attribute, value in zip(ATTRIBUTES, wish, strict=True)
    )
    if shape is None and color is None:
        return texture or background
    if shape is None and background is None:
        return f"{texture} {color}"
    place = ""
    if background is not None:
        entry = list(tinyworld.world()["backgrounds"].values())[wish[3]]
        place = f" {entry['preposition']} {background}"
    return noun_phrase(shape, color, texture) + place


@cache
def role(name: str) -> Role:
    """The role called `name`; an unknown name is an error that lists them all."""
    check_choice("role", name, _entries())
    entry = _entries()[name]
    wishes = () if "names" in entry else _wishes(name)
    same = ("title", "group", "description", "template", "style", "objects", "size")
    return Role(
        name=name,
        classes=tuple(entry.get("names") or map(_class_name, wishes)),
        wishes=wishes,
        paper=_table("paper-roles").get(name, {}),
        **{key: entry[key] for key in same if key in entry},
    )


def tinyworld_scenes(name: str, split: str, n: int, start: int = 0) -> tuple[tinyworld.Scenes, Tensor]:
    """Scenes `start:start + n` of a role's split and their labels; classes come in random order, evenly."""
    entry = role(name)
    check_choice("split", split, SPLITS)
    check_integer("n", n, 1)
    check_integer("start", start, 0)
    if not entry.wishes:
        raise ValueError(f"role {name!r} is not drawn by Tinyworld; its images are real, use `load_samples`")
    wishes = torch.tensor(entry.wishes)
    style = tinyworld.index("style", entry.style)
    chunk, first = tinyworld.CHUNK, start // tinyworld.CHUNK
    parts, labels = [], []
    for number in range(first, -(-(start + n) // chunk)):
        random = tinyworld.generator(f"{name}/{split}", number)
        label = _labels(name, split, number * chunk, len(wishes))
        full = torch.full((chunk,), 1)
        parts.append(
            tinyworld.sample_scenes(random, wishes[label], full * entry.objects, full * style, entry.objects == 2)
        )
        labels.append(label)
    rows = slice(start - first * chunk, start - first * chunk + n)
    return tinyworld.Scenes.join(parts)[rows], torch.cat(labels)[rows]


def _labels(name: str, split: str, first: int, classes: int) -> Tensor:
    """Labels of one chunk: consecutive permutations of all classes, so that every prefix is nearly balanced."""
    positions = torch.arange(first, first + tinyworld.CHUNK)
    rounds = {r: torch.randperm(classes, generator=tinyworld.generator(f"labels/{name}/{split}", r))
              for r in (positions // classes).unique().tolist()}  # fmt: skip
    return torch.stack([rounds[p // classes][p % classes] for p in positions.tolist()])


def tinyworld_samples(
    name: str, split: str = "test", n: int = 1000, start: int = 0
) -> tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...] | None]:
    """Pictures of a role drawn by Tinyworld: uint8 images, labels, class names, and captions for retrieval roles."""
    entry = role(name)
    before = start % tinyworld.CHUNK
    scenes, labels = tinyworld_scenes(name, split, n + before, start - before)
    images = tinyworld.draw(scenes, f"{name}/{split}", start - before, entry.size)[before:]
    captions = None
    if entry.objects == 2:
        meanings = scenes[before:].meaning().tolist()
        speakers = (Speaker(f"{name}/{split}/{start + i}", facts=0, complete=True) for i in range(n))
        captions = tuple(speaker.caption(row)[0] for speaker, row in zip(speakers, meanings, strict=True))
    return images, labels[before:], entry.classes, captions
