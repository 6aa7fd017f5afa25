"""Somebody's own model, defense or attack on the leaderboard: found by name, tried on two images, measured as all are.

    found = propose(scale("quick"), defense="my_module:MyDefense")
    frame, place = placed(rows(found.scale), measure(found, n=8))

What is wrong with it is a ValueError that names the value and the remedy.
"""

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from robustclip import models
from robustclip.attacks.base import Adversary, Target, as_attack
from robustclip.attacks.fast import at_precision
from robustclip.data.sources import load_samples
from robustclip.defenses.base import Defense, as_defense, redrawn
from robustclip.study import leaderboard, testtime
from robustclip.study.cells import Cell
from robustclip.study.evaluate import evaluate
from robustclip.study.leaderboard import Entry, mean
from robustclip.study.named import DEFENSES
from robustclip.study.scales import Scale
from robustclip.study.statistics import Estimate
from robustclip.study.store import Where

AUDITED = 16  # images that an audit looks at


@dataclass(frozen=True)
class Proposal:
    """What is to be measured: a model behind a defense, and an attack beside those of the protocol."""

    scale: Scale
    model: str
    spec: Any
    kind: str
    defense_name: str = "none"
    defense: Defense | None = None
    attack_name: str = ""
    attack: Adversary | None = None

    @property
    def own(self) -> bool:
        """Whether the model or the defense is none of the book's."""
        return self.kind == "own" or self.defense_name not in ("none", *DEFENSES)

    def cells(self, n: int = 0) -> tuple[list[Cell], list[Cell]]:
        """The protocol, and the own attack by who knows the defense.

        What is somebody's own is measured again after each change of its code, at every scale.
        """
        models, defenses = {self.model: self.spec}, {self.defense_name: self.defense}
        changing = replace(self.scale, recompute_stale=True)
        found = leaderboard.cells(changing if self.own else self.scale, models, defenses, n)
        sets, attacks = leaderboard.protocol(self.scale).sets, {self.attack_name: self.attack}
        return found, testtime.aware(changing, defenses, sets, attacks, models, n=n) if self.attack else []


# --- what somebody names ----------------------------------------------------------------------------------------------


def propose(
    scale: Scale, model: str = "clip", defense: str = "none", attack: str = "", device: str = "auto"
) -> Proposal:
    """What the options of `robustclip leaderboard` name, tried on two images."""
    found = Proposal(scale, *_model(scale, model, device), *_defense(scale, defense), *_attack(scale, attack))
    if found.own or found.attack:
        _try(found, device)
    return found


def _model(scale: Scale, name: str, device: str) -> tuple[str, Any, str]:
    """A model of the scale, one of the board, or what `models.load` takes; its name there and its kind."""
    if name in scale.models:
        return ("CLIP", scale.model(name), "CLIP") if name == "clip" else (name, scale.model(name), "own")
    if name in (board := leaderboard.hosts(scale, device)):
        return name, *board[name]
    return Path(name).name if Path(name).expanduser().is_dir() else name, name, "own"


def _defense(scale: Scale, text: str) -> tuple[str, Defense | None]:
    """A defense of the scale by name, or one of a module."""
    if ":" not in text:
        return text, scale.defense(text)
    name, value = named_object(text, "--defense")
    takes = ["classifier", "images", "draw"] if isinstance(value, Defense) else ["classifier"]
    _fits(value.logits if isinstance(value, Defense) else value, takes, f"--defense {text!r}")
    return name, as_defense(value)


def _attack(scale: Scale, text: str) -> tuple[str, Adversary | None]:
    """An attack of a module, at the scale's budget if it has one to set; none for ""."""
    if not text:
        return "", None
    name, value = text, None
    if ":" in text:
        name, value = named_object(text, "--attack", eps=scale.reference_eps)
        if not isinstance(value, Adversary):
            _fits(value, ["classifier", "images", "labels"], f"--attack {text!r}")
    attack = as_attack(value) if value else scale.attack(text)
    if attack is None or not attack.changes_images or attack.changes_texts:
        raise ValueError(
            f"--attack {text!r} is no attack on images alone, which the worst case is over; give one that is"
        )
    return name, at_precision(attack, testtime.PRECISION)


def named_object(text: str, option: str, **settings: Any) -> tuple[str, Any]:
    """The object called "module:Name", of this folder or of an installed package; a class is called without arguments.

    `settings` are given to a class that has fields of these names.
    """
    module, _, name = text.partition(":")
    if not (module and name):
        raise ValueError(f"{option} {text!r} is no module:Name; write it like my_module:MyDefense")
    found = getattr(_module(module, f"{option} {text!r}"), name, None)
    if found is None:
        own = [one for one, value in vars(sys.modules[module]).items() if getattr(value, "__module__", "") == module]
        has = f"it defines {', '.join(sorted(own))}" if own else "it defines nothing callable"
        raise ValueError(f"{option} {text!r}: module {module!r} has no {name!r}; {has}")
    if isinstance(found, type):
        found = _made(found, f"{option} {text!r}", settings)
    if not callable(found):
        raise ValueError(f"{option} {text!r} is of type {type(found).__name__}, not callable; give a class or function")
    return name, found


def _module(name: str, what: str) -> Any:
    """The module, looked for in the current folder first."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(
                f"{what}: no module {name!r} here; name a .py file of this folder, or an installed package"
            ) from error
        raise ValueError(f"{what}: {name!r} imports {error.name!r}, which is not installed") from error
    except Exception as error:
        raise ValueError(f"{what}: importing {name!r} failed: {_said(error)}; correct the module") from error


def _made(kind: type, what: str, settings: dict[str, Any]) -> Any:
    """An instance of a class, with the settings that it takes."""
    try:
        takes = inspect.signature(kind).parameters
        return kind(**{name: value for name, value in settings.items() if name in takes})
    except Exception as error:
        raise ValueError(
            f"{what}: {kind.__name__}() failed: {_said(error)}; give defaults, or name an instance in the module"
        ) from error


def _fits(function: Callable, takes: list[str], what: str) -> None:
    """A ValueError unless a function can be called with so many arguments."""
    try:
        inspect.signature(function).bind(*takes)
    except TypeError as error:
        wanted, own = ", ".join(takes), inspect.signature(function)
        raise ValueError(f"{what} takes {own}, and is called with ({wanted}): {error}; change its arguments") from error


def _said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _try(found: Proposal, device: str) -> None:
    """Two images through model and defense, as the answers count, and through the own attack."""
    samples = load_samples(leaderboard.protocol(found.scale).sets[0], source=found.scale.source, n=2)
    clip = models.load(os.fspath(found.spec), str(models.pick_device(device)))
    images, labels, classes = samples.images.to(clip.device), samples.labels.to(clip.device), samples.classes
    if found.defense:
        what, plain = f"defense {found.defense_name!r}", models.ZeroShotClassifier(clip, classes)
        with torch.no_grad():
            logits = _tried(what, lambda: redrawn(found.defense(plain), 1)(images))
        shape = tuple(getattr(logits, "shape", ()))
        if shape != (2, len(classes)) or not torch.isfinite(logits).all():
            raise ValueError(
                f"{what} answers {type(logits).__name__} {shape} to two images; give finite logits (images, classes), "
                f"here (2, {len(classes)})"
            )
    if found.attack:
        target = Target(clip, classes, found.defense)
        _tried(f"attack {found.attack_name!r}", lambda: found.attack.pairs(target, images, labels))


def _tried(what: str, work: Callable[[], Any]) -> Any:
    """What `work` gives; whatever goes wrong there is a ValueError."""
    try:
        return work()
    except Exception as error:
        raise ValueError(f"{what} fails on two images: {_said(error)}; correct it") from error


# --- its line ---------------------------------------------------------------------------------------------------------


def measure(found: Proposal, n: int = 0, store: Where = None, device: str = "auto") -> Entry:
    """The entry, measured where nobody has; what is somebody's own is audited under the attacker who knows."""
    usual, more = found.cells(n)
    frames = [evaluate(usual, store, device), evaluate(more, store, device)]
    if found.own:
        knows = [one for one in usual if one.attack_name == leaderboard.AWARE]
        frames.append(evaluate(knows, store, device, audit=min(AUDITED, *(one.n for one in knows))))
    frame = pd.concat([one for one in frames if len(one)], ignore_index=True)
    about = found.spec, found.kind
    entry = leaderboard.read(found.scale, found.model, about, found.defense_name, found.defense, frame, store)
    return replace(entry, kind="own") if found.own else entry


def placed(board: pd.DataFrame, entry: Entry) -> tuple[pd.DataFrame, int]:
    """The board with this entry in the place of one of the same name, and where it stands there."""
    others = []
    if len(board):
        twin = (board["model"] == entry.model) & (board["defense"] == entry.defense)
        others = board[~twin].drop(columns="rank").to_dict("records")
    frame = leaderboard.ranked([*others, leaderboard.row(entry)])
    place = (frame["model"] == entry.model) & (frame["defense"] == entry.defense)
    return frame, int(np.flatnonzero(place)[0])


def against(entry: Entry, attack: str) -> tuple[Estimate, Estimate, Estimate]:
    """What an attack by who knows leaves, and what all others leave without and with it, on the same first images."""
    own = (attack, "aware")
    alone = mean(entry.first(own))
    without = replace(entry, rights={one: part for one, part in entry.rights.items() if one != own})
    sizes = [len(part) for part in entry.first(own)]
    before = mean([part[:size] for part, size in zip(without.union, sizes, strict=True)])
    return alone, before, mean(entry.union)


def said(frame: pd.DataFrame, place: int, entry: Entry, attack: str = "") -> list[str]:
    """What a board says of one of its entries: where it stands, why that may be too good, what the own attack adds."""
    one, count = frame.iloc[place], frame["rank"].notna().sum()
    name = leaderboard.called(entry.model, entry.defense)
    stands = (
        f"has rank {one['rank']} of {count}" if pd.notna(one["rank"]) else f"has no rank beside {count} that have one"
    )
    strongest = f"; the strongest single attack is {entry.strongest}" * bool(entry.strongest)
    found = [f"{name} {stands} at scale {entry.scale.name}{strongest}; audit: {one['flags']}."]
    found.append(
        f"Potentially unreliable: {one['unreliable']}." if one["unreliable"] else "Nothing says it is unreliable."
    )
    if attack:
        alone, before, after = (f"{value:.1f} % [{low:.1f}, {high:.1f}]" for value, low, high in against(entry, attack))
        found.append(f"{attack} alone leaves {alone}; all other attacks {before}, with it {after}.")
    return found
