"""The table of roles: which data set of the papers each stands for, and the Tinyworld set that plays it."""

import hashlib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import product
from operator import mul

import numpy as np
import torch
from torch import Tensor

from robustclip.checks import check_choice, check_integer
from robustclip.classes import Classes
from robustclip.data import tinyworld
from robustclip.data.grammar import Speaker, article, located, noun_phrase, words
from robustclip.data.tinyworld import ANY, CHUNK

ATTRIBUTES = ("shape", "color", "texture", "background")  # columns of a wish, as `sample_scenes` reads them
SPLITS = ("train", "validation", "test")
Drawn = tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...] | None]  # images, labels, class names, captions


@dataclass(frozen=True)
class Role:
    """A data set of the papers under the name the book uses for it at every scale."""

    name: str
    title: str  # as the printed numbers call it
    group: str
    description: str
    template: str  # the papers' prompt, with {} for the name of a class
    classes: Classes
    wishes: tuple[tuple[int, ...], ...] = field(repr=False)  # per class: shape, color, texture, background or ANY
    style: str = "photo"
    objects: int = 1
    size: float = 1.0
    strength: float = 1.0  # how untidy its pictures are, in units of the world's own strength
    paper: dict = field(default_factory=dict, repr=False, hash=False)  # the papers' own set
    photo: dict = field(default_factory=dict, repr=False, hash=False)  # the photographs that play it

    @property
    def prompts(self) -> tuple[str, ...]:
        """One prompt per class, from the role's template."""
        return self.classes.prompts


@cache
def _table(name: str = "roles") -> dict[str, dict]:
    return tomllib.loads(files("robustclip").joinpath(f"assets/{name}.toml").read_text(encoding="utf-8"))


def role_names(group: str | None = None) -> tuple[str, ...]:
    """Names of all roles, or of one group: source, transfer, shift, medical, retrieval, extra."""
    if group is None:
        return tuple(_table())
    check_choice("group", group, dict.fromkeys(entry["group"] for entry in _table().values()))
    return tuple(name for name, entry in _table().items() if entry["group"] == group)


def _combinations(entry: dict) -> Iterator[tuple[int, ...]]:
    """Every wish an entry allows, in table order."""
    options = []
    for attribute in ATTRIBUTES:
        named = entry.get("among", {}).get(attribute, tinyworld.values(attribute))
        options.append([tinyworld.index(attribute, n) for n in named] if attribute in entry["attributes"] else [ANY])
    pairs = entry.get("pairs", "any")
    code = entry.get("code", [0] * len(ATTRIBUTES))
    for wish in product(*options):
        told_apart = sum(map(mul, code, wish)) % len(tinyworld.values("shape")) == 0
        if told_apart and pairs in ("any", "held-out" if tinyworld.is_held_out(wish[0], wish[1]) else "seen"):
            yield wish


def _wishes(name: str) -> tuple[tuple[int, ...], ...]:
    """The role's classes: those of the role it extends, then a fixed random draw from combinations that qualify."""
    entry = _table()[name]
    if "like" in entry:
        return _wishes(entry["like"])[: entry["classes"]]
    first = _wishes(entry["extends"]) if "extends" in entry else ()
    found = [wish for wish in _combinations(entry) if wish not in set(first)]
    more = entry["classes"] - len(first)
    if len(found) < more:
        raise ValueError(f"role {name!r} asks for {more} classes of its own, only {len(found)} combinations qualify")
    seed = int.from_bytes(hashlib.sha256(f"classes/{name}".encode()).digest()[:4], "big")
    return first + tuple(found[place] for place in np.random.default_rng(seed).permutation(len(found))[:more])


def _class_name(wish: tuple[int, ...], pattern: str | None) -> str:
    """Such as "striped red star in the snow", "striped" (texture alone), or what the pattern makes of the wish."""
    said = {name: words(name)[value][0] for name, value in zip(ATTRIBUTES, wish, strict=True) if value >= 0}
    if len(said) == 1 and not pattern:
        return next(iter(said.values()))
    where = located("", wish[3], said["background"])[1:] if "background" in said else ""
    thing = noun_phrase(*(said.get(name) for name in ATTRIBUTES[:3]))
    return (pattern or "{thing} {where}").format(thing=thing, a_thing=article(thing), where=where, **said).strip()


@cache
def role(name: str) -> Role:
    """The role called `name`; an unknown name is an error that lists them all."""
    entry = _table()[check_choice("role", name, _table())]
    real = {kind: _table(f"{kind}-roles").get(name, {}) for kind in ("paper", "photo")}
    wishes, template = () if "names" in entry else _wishes(name), real["paper"]["template"]
    names = tuple(entry.get("names") or (_class_name(wish, entry.get("called")) for wish in wishes))
    classes = Classes(names, tuple(map(template.format, names)))
    same = {key: entry[key] for key in entry if key in Role.__dataclass_fields__}
    return Role(name=name, template=template, wishes=wishes, **real, **same | {"classes": classes})


def tinyworld_scenes(name: str, split: str, n: int, start: int = 0) -> tuple[tinyworld.Scenes, Tensor]:
    """Scenes `start:start + n` of a role's split and their labels; classes come in random order, evenly."""
    entry = role(name)
    check_choice("split", split, SPLITS)
    check_integer("n", n, 1)
    check_integer("start", start, 0)
    if not entry.wishes:
        raise ValueError(f"role {name!r} is not drawn by Tinyworld; its images are real, use `load_samples`")
    chunks = range(start // CHUNK, -(-(start + n) // CHUNK))
    first, labels = chunks[0] * CHUNK, _labels(name, split, chunks, len(entry.wishes))
    count, style = (torch.full((CHUNK,), value) for value in (entry.objects, tinyworld.index("style", entry.style)))
    parts = []
    for number, wishes in zip(chunks, torch.tensor(entry.wishes)[labels].split(CHUNK), strict=True):
        random = tinyworld.generator(f"{name}/{split}", number)
        parts.append(tinyworld.sample_scenes(random, wishes, count, style, exclude_held_out=entry.objects == 2))
    rows = slice(start - first, start - first + n)
    return tinyworld.Scenes.join(parts)[rows], labels[rows]


def _labels(name: str, split: str, chunks: range, classes: int) -> Tensor:
    """Labels of some chunks: consecutive permutations of all classes, so that every prefix is nearly balanced."""
    first, stop = chunks.start * CHUNK, chunks.stop * CHUNK
    rounds = range(first // classes, -(-stop // classes))
    generators = (tinyworld.generator(f"labels/{name}/{split}", number) for number in rounds)
    labels = torch.cat([torch.randperm(classes, generator=one) for one in generators])
    return labels[first % classes :][: stop - first]


def tinyworld_samples(name: str, split: str = "test", n: int = 1000, start: int = 0) -> Drawn:
    """Pictures of a role drawn by Tinyworld: uint8 images, labels, class names, and captions for retrieval roles."""
    entry = role(name)
    before = start % CHUNK
    scenes, labels = tinyworld_scenes(name, split, n + before, start - before)
    strength = entry.strength * tinyworld.world()["strength"]
    images = tinyworld.draw(scenes, f"{name}/{split}", start - before, entry.size, strength)[before:]
    if entry.objects < 2:
        return images, labels[before:], entry.classes.names, None
    speakers = (Speaker(f"{name}/{split}/{start + i}", facts=0, complete=True) for i in range(n))
    rows = scenes[before:].meaning().tolist()
    captions = tuple(speaker.caption(row)[0] for speaker, row in zip(speakers, rows, strict=True))
    return images, labels[before:], entry.classes.names, captions
