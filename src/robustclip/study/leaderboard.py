"""The leaderboard: every model behind every defense, read by one protocol from what was measured.

frame = rows(scale("photo"))       # one line per entry, best worst case first

An entry is a host, which is a CLIP, and a defense at test time or "none". Its number is the accuracy that remains in
the **worst case**: right on the clean image and under every attack of the protocol, by who does not know the defense
and by who does. What lacks the attacker who knows has no worst case and stands behind all that have one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from robustclip.data.roles import role
from robustclip.defenses.base import Defense
from robustclip.defenses.smoothing import Smoothing
from robustclip.study import finetuning, hybrids, proofs, testtime
from robustclip.study.cells import Cell, grid
from robustclip.study.evaluate import look_up, outcomes
from robustclip.study.grown import grown
from robustclip.study.named import DEFENSES
from robustclip.study.reported import reported
from robustclip.study.scales import Scale
from robustclip.study.statistics import Estimate, macro, wilson
from robustclip.study.store import Where

SETS = tuple(name for name in testtime.ROLES if name in finetuning.STRONG_ROLES)  # on which all of it is measured
PGD, AUTO, AWARE = "PGD-10:last", "AutoAttack", "aware"
TEXT, BOTH = finetuning.TEXTS
CLEAN = ("clean", "none")
CONDITIONS = {  # by column: the attack and what the attacker knows
    "clean": CLEAN, "blind": (PGD, "blind"), "autoattack": (AUTO, "blind"), "aware": (AWARE, "aware"),
    "text": (TEXT, "blind"), "multimodal": (BOTH, "blind"),
}  # fmt: skip
SMOOTH = "Smoothing"  # of which something can be proved
DRAWS = 5  # of a random defense and of what attacks it
MARGIN = 5.0  # points by which a blind number may exceed the worst case
KINDS = ("CLIP", "fine-tuned", "mixed weights", "from the ground up", "defense", "hybrid")
NUMBERS = ("clean", "blind", "autoattack", "aware", "worst", "best_known", "text", "multimodal", "certified")
HEADS = {  # of columns
    "clean": "clean", "blind": "blind", "autoattack": "AutoAttack", "aware": "aware", "worst": "worst case",
    "best_known": "best known", "text": "text", "multimodal": "both", "certified": "certified",
}  # fmt: skip
Condition = tuple[str, str]
Rights = dict[Condition, dict[str, np.ndarray]]  # (attack, attacker) -> set -> right or wrong (n,)


class Protocol(NamedTuple):
    """What every entry of a scale is measured on; n counts images per set."""

    sets: tuple[str, ...]
    blind: int
    aware: int
    texts: int


def protocol(scale: Scale) -> Protocol:
    """The sets and sizes of a scale; the quick one has one set."""
    sets = tuple(name for name in SETS[: 1 if scale.name == "quick" else None] if name in scale.roles)
    blind = scale.size("testtime/blind")
    return Protocol(sets, blind, scale.size("testtime/aware"), scale.sizes.get("finetuning", blind))


def cells(
    scale: Scale, models: Mapping[str, Any], defenses: Mapping[str, Defense | None], n: int = 0
) -> list[Cell]:  # fmt: skip
    """The whole protocol for each model behind each defense; `n` images per set instead of the scale's sizes."""
    own = protocol(scale)
    found = testtime.blind(scale, defenses, own.sets, models=models, n=n)
    found += testtime.aware(scale, defenses, own.sets, models=models, n=n)
    found += grid(
        scale, models, own.sets, finetuning.TEXTS, defenses, n=n or own.texts, precision=testtime.PRECISION
    )  # fmt: skip
    same = {name: one for name, one in defenses.items() if one and not one.randomised}
    found += testtime.aware(scale, same, own.sets, (AUTO,), models, n=n)
    random = {name: one for name, one in defenses.items() if one and one.randomised}
    return found + testtime.blind(scale, random, own.sets, (PGD,), models, n=n, seeds=range(1, DRAWS))


@dataclass(frozen=True)
class Entry:
    """One line: what a host behind a defense got right, image by image, and what else is known of it."""

    scale: Scale
    model: str
    kind: str
    defense: str
    made: Defense | None
    rights: Rights
    draws: dict[str, set[int]] = field(default_factory=dict)  # set -> seeds of the blind PGD
    flags: tuple[str, ...] = ()  # of audits
    audited: bool = False
    passes: tuple[float, float] | None = None  # forward and backward, of one answer to a clean image
    certificates: dict[str, np.ndarray] | None = None

    @cached_property
    def sets(self) -> tuple[str, ...]:
        """The sets of the protocol."""
        return protocol(self.scale).sets

    def on(self, condition: Condition) -> list[np.ndarray] | None:
        """The outcomes on all sets; None if one is missing."""
        found = self.rights.get(condition, {})
        return [found[name] for name in self.sets] if self.sets and all(name in found for name in self.sets) else None

    @cached_property
    def attacks(self) -> list[Condition]:
        """Attacks on images that are known on all sets."""
        texts = (CONDITIONS["text"], CONDITIONS["multimodal"])
        return [one for one in self.rights if one != CLEAN and one not in texts and self.on(one)]

    @property
    def known_by_all(self) -> bool:
        """Whether somebody who knows all of it attacked it on all sets; what has no defense has nothing to hide."""
        last = [(AWARE, "aware")] if self.made else [(AWARE, "aware"), CONDITIONS["autoattack"]]
        return any(self.on(one) for one in last)

    def first(self, condition: Condition) -> list[np.ndarray]:
        """The outcomes on all sets, of the first images only: those that all attacks share."""
        return [part[:size] for part, size in zip(self.on(condition), self._sizes, strict=True)]

    @cached_property
    def _sizes(self) -> list[int]:
        """How many images of each set all attacks share."""
        return [min(len(self.rights[one][name]) for one in (CLEAN, *self.attacks)) for name in self.sets]

    @cached_property
    def union(self) -> list[np.ndarray] | None:
        """Right on the clean image and under every attack; None without a clean number or without any attack."""
        if not (self.on(CLEAN) and self.attacks):
            return None
        sides = [self.first(one) for one in (CLEAN, *self.attacks)]
        return [np.logical_and.reduce(parts) for parts in zip(*sides, strict=True)]

    @property
    def strongest(self) -> str:
        """The attack that alone leaves least."""
        if self.union is None:
            return ""
        attack, attacker = min(self.attacks, key=lambda one: np.mean([part.mean() for part in self.first(one)]))
        return attack if attacker == "aware" or not self.made else f"{attack}, blind"


def mean(parts: Sequence[np.ndarray] | None) -> Estimate | None:
    """Accuracy in % with equal weight per set: Wilson's interval of one set, that of `macro` of several."""
    if not parts:
        return None
    return wilson(int(parts[0].sum()), len(parts[0])) if len(parts) == 1 else macro(parts)


def fall(entry: Entry) -> Estimate | None:
    """Blind PGD minus what the union of all attacks leaves, in points, on the same images."""
    if entry.union is None or not entry.on(CONDITIONS["blind"]):
        return None
    return macro(entry.first(CONDITIONS["blind"]), entry.union)


def doubts(entry: Entry) -> dict[str, str]:
    """Why a number may be too good, in words, by what is wrong: audit, attacker, AutoAttack, blind, draws."""
    found = {"audit": f"audit flags: {', '.join(entry.flags)}"} if entry.flags else {}
    over = fall(entry) if entry.made else None
    if not entry.known_by_all:
        known = [role(name).title for name in entry.sets if name in entry.rights.get((AWARE, "aware"), {})]
        where = f"only on {', '.join(known)}" if known else "not"
        found["attacker"] = f"an attacker who knows it was {where} measured"
    elif not (entry.on(CONDITIONS["autoattack"]) or entry.on((AUTO, "aware"))):
        found["AutoAttack"] = "AutoAttack was not measured"
    if entry.known_by_all and over and over.low > MARGIN:
        found["blind"] = f"the blind number is {over.value:.0f} points [{over.low:.0f}, {over.high:.0f}] too high"
    if entry.made and entry.made.randomised and any(len(seen) < 2 for seen in entry.draws.values()):
        found["draws"] = "random, and judged at one draw"
    return found


def row(entry: Entry) -> dict[str, Any]:
    """An entry as a line of the table: each number with its interval and the images behind it."""
    on_defended = entry.on((AUTO, "aware"))
    parts = {name: entry.on(condition) for name, condition in CONDITIONS.items()}
    parts |= {"autoattack": on_defended or parts["autoattack"], "best_known": entry.union}
    parts |= {"worst": entry.union if entry.known_by_all else None}
    sure = entry.certificates and proofs.proved(entry.certificates, proofs.MIDDLE)
    parts |= {"certified": None if sure is None else [sure]}
    told: dict[str, Any] = {
        "scale": entry.scale.name, "world": entry.scale.world, "model": entry.model, "defense": entry.defense,
        "kind": entry.kind, "sets": ", ".join(role(name).title for name in entry.sets),
    }  # fmt: skip
    for name in NUMBERS:
        value, low, high = mean(parts[name]) or (None, None, None)
        told |= {name: value, f"{name}_low": low, f"{name}_high": high}
        told[f"{name}_n"] = sum(map(len, parts[name])) if parts[name] else 0
    told["autoattack_on"] = "model" if not entry.made else "defended" if on_defended else "host"
    forward, backward = entry.passes or (None, None)
    told |= {"forward": forward, "backward": backward, "strongest": entry.strongest, "attacks": len(entry.attacks)}
    told |= {"flags": ", ".join(entry.flags) or ("passed" if entry.audited else "not audited")}
    told |= dict(zip(("fall", "fall_low", "fall_high"), fall(entry) or (None,) * 3, strict=True))
    why = doubts(entry)
    return told | {"doubts": ", ".join(why), "unreliable": "; ".join(why.values()), **in_print(entry)}


def called(model: str, defense: str) -> str:
    """An entry in words."""
    return model if defense == "none" else f"{model} + {defense}"


def ranked(lines: Iterable[dict]) -> pd.DataFrame:
    """The lines by worst case, best first; those without one behind all others, without a rank."""
    frame = pd.DataFrame(list(lines))
    if frame.empty:
        return frame
    order = [frame["worst"].isna(), *(-frame[name].astype(float) for name in ("worst", "best_known", "clean"))]
    keys = pd.concat([part.rename(str(place)) for place, part in enumerate(order)], axis=1)
    frame = frame.loc[keys.sort_values(list(keys.columns), kind="stable", na_position="last").index]
    frame.insert(0, "rank", frame["worst"].rank(ascending=False, method="min").astype("Int64"))
    return frame.reset_index(drop=True)


def rows(scale: Scale, store: Where = None, device: str = "auto") -> pd.DataFrame:
    """The leaderboard of a scale, from what is stored or shipped; nothing is measured."""
    return ranked(map(row, entries(scale, store, device)))


def text(frame: pd.DataFrame) -> str:
    """The table for people, numbers in % with the interval of the worst case; "-" for what is not measured."""

    def number(one: dict, name: str) -> str:
        return "-" if pd.isna(one[name]) else f"{one[name]:.1f}"

    lines = []
    for one in frame.to_dict("records"):
        rank, worst = "-" if pd.isna(one["rank"]) else f"{one['rank']}", number(one, "worst")
        if worst != "-":
            worst += f" [{one['worst_low']:.1f}, {one['worst_high']:.1f}]"
        told = {"rank": rank, "model": one["model"], "defense": one["defense"]}
        told |= {HEADS[name]: number(one, name) for name in ("clean", "blind", "autoattack", "aware")}
        told |= {HEADS["worst"]: worst, "n": one["best_known_n"] or "-"}
        told |= {HEADS[name]: number(one, name) for name in ("best_known", "text", "multimodal", "certified")}
        passes = "-" if pd.isna(one["forward"]) else f"{one['forward']:.0f}/{one['backward']:.0f}"
        lines.append(told | {"passes": passes, "potentially unreliable": one["doubts"] or "-"})
    return pd.DataFrame(lines).to_string(index=False) if lines else "nothing is measured yet"


# --- what is known ----------------------------------------------------------------------------------------------------


def hosts(scale: Scale, device: str = "auto") -> dict[str, tuple[Any, str]]:
    """Models of the board by name, and of which kind each is."""
    recipes = finetuning.tuned(scale, (*finetuning.MAIN, *finetuning.VARIANTS), device=device)
    others, alone = (
        hybrids.hosts(scale, device=device),
        {f"ground-up, {name}": one for name, one in grown(scale).items()},
    )
    found = {"CLIP": (scale.model("clip"), "CLIP")}
    found |= {name: (one, "fine-tuned") for name, one in recipes.items()}
    mixed = {name: one for name, one in others.items() if name not in (*found, hybrids.GROUND_UP)}
    found |= {name: (one, "mixed weights") for name, one in mixed.items()}
    return found | {name: (one, "from the ground up") for name, one in alone.items()}


def entries(scale: Scale, store: Where = None, device: str = "auto") -> list[Entry]:
    """Every host behind every defense of which at least a clean number is known, or a certificate."""
    everybody = {name: about for name, about in hosts(scale, device).items() if _is_known(about[0])}
    made, few = _playable(scale, ("none", *DEFENSES)), ("none", *testtime.BEHIND_HOSTS, *hybrids.plan(scale).defenses)
    behind = {host: made if host == "CLIP" else {name: made[name] for name in few} for host in everybody}
    models, sets = {host: {host: spec} for host, (spec, _) in everybody.items()}, protocol(scale).sets
    sizes = [0, *map(scale.size, ("finetuning", "finetuning/strong", "testtime/aware"))]  # of all pages that measure it

    def blind(host: str, attacks: Sequence[str]) -> list[Cell]:
        own = behind[host]
        return [one for n in sizes for one in testtime.blind(scale, own, sets, attacks, models[host], n=n)]

    clean = look_up(_once(one for host in behind for one in blind(host, ["clean"])), store, device)
    known = set(zip(clean["model"], clean["defense"], strict=True))
    behind = {host: {name: one for name, one in own.items() if (host, name) in known} for host, own in behind.items()}
    more = [one for host in behind for one in blind(host, testtime.ATTACKS[1:])]
    more += [one for host, own in behind.items() if own for one in cells(scale, models[host], own)]
    frame = pd.concat([clean, look_up(_once(one for one in more if one.attack), store, device)], ignore_index=True)
    pairs = dict(list(frame.groupby(["model", "defense"], sort=False)))
    proven = [
        host for host, (spec, _) in everybody.items() if proofs.certificates(scale, spec, proofs.MIDDLE, store=store)
    ]
    pairs |= {(host, SMOOTH): frame[:0] for host in proven if (host, SMOOTH) not in pairs}
    return [
        read(scale, host, everybody[host], defense, made[defense], part, store)
        for (host, defense), part in pairs.items()
    ]


def _is_known(spec: Any) -> bool:
    """Whether results of a model can be told apart here: its pictures, or what was measured on it, are at hand."""
    return proofs.identity_of(spec) is not None


def _playable(scale: Scale, names: Iterable[str]) -> dict[str, Defense | None]:
    """Defenses by name, those that a scale can play."""
    found = {}
    for name in names:
        try:
            found[name] = scale.defense(name)
        except ValueError:  # a scale of one's own may lack a threshold
            continue
    return found


def _once(some: Iterable[Cell]) -> list[Cell]:
    """The cells without repetitions."""
    names = attrgetter("model", "defense_name", "role", "attack_name", "attacker", "n", "seed")
    return list({names(one): one for one in some}.values())


def read(
    scale: Scale, host: str, about: tuple[Any, str], defense: str, made: Defense | None, frame: pd.DataFrame,
    store: Where = None,
) -> Entry:  # fmt: skip
    """An entry from rows of `evaluate`: of each condition on each set the one with the most images counts."""
    rights, draws, flags, audited, passes = {}, {}, [], False, [] if made else [(1.0, 0.0)]
    for one in frame.sort_values("n", kind="stable").to_dict("records"):
        attack, attacker, at = one["attack"], one["attacker"], one["role"]
        if (attack, attacker) == (PGD, "blind"):
            draws.setdefault(at, set()).add(one["seed"])
        if one["seed"]:
            continue
        right = outcomes(one, store).astype(bool)
        rights.setdefault((attack, attacker), {})[at] = right
        found = [flag for flag in one["flags"].split("; ") if flag not in ("", "blind", "passed", "not audited")]
        flags, audited = flags + found, audited or (bool(one["flags"]) and "not audited" not in one["flags"])
        if attack == "clean" and made:  # the first clean cell of a model may count its training, too
            passes.append((one["forward"] / len(right), one["backward"] / len(right)))
    spec, kind = about
    if made:
        kind = "defense" if kind == "CLIP" else "hybrid"
    order = {one: rights[one] for one in sorted(rights)}
    sure = proofs.certificates(scale, spec, proofs.MIDDLE, store=store) if isinstance(made, Smoothing) else None
    return Entry(
        scale,
        host,
        kind,
        defense,
        made,
        order,
        draws,
        tuple(dict.fromkeys(flags)),
        audited,
        min(passes, default=None),
        sure,
    )


# --- what papers print ------------------------------------------------------------------------------------------------

TUNED = "tga-zsr", "1", "avg16t"  # where all recipes stand in one table
THEIRS = {"CLIP": "CLIP", "FT-adversarial": "FT-Adv"}  # our names there


@cache
def _printed() -> dict[tuple[str, str], tuple[float, str]]:
    """(host, defense) -> an accuracy under attack in print, the blind one of two, since that is what was claimed."""
    paper, table, sets = TUNED
    rows = reported(paper, table)
    rows = rows[(rows["dataset"] == sets) & (rows["metric"] == "accuracy")]
    ours = {THEIRS.get(name, name): name for name in finetuning.MAIN}
    tuned = rows[rows["method"].isin(ours)]
    parts = [tuned.assign(host=tuned["method"].map(ours), defense="none"), testtime.printed().assign(host="CLIP")]
    attacked = pd.concat(parts, ignore_index=True)
    attacked = attacked[attacked["attack"] != "clean"].sort_values("setting", key=_blind, kind="stable")
    return {(one.host, one.defense): (one.value, _of(one)) for one in attacked.itertuples()}


def _blind(settings: pd.Series) -> pd.Series:
    return ~settings.str.contains("attacker=aware")


def _of(one: Any) -> str:
    """Whose number it is, of which sets, model and attack, and by whom."""
    backbone = one.setting.partition("backbone=")[2].partition(";")[0]
    defended = "" if one.defense == "none" else "aware" if "attacker=aware" in one.setting else "blind"
    told = [one.paper, one.dataset, backbone, " ".join(filter(None, (one.attack, one.eps, defended)))]
    return ", ".join([*told, *[one.grade] * (one.grade not in ("primary", "paper"))])


def in_print(entry: Entry) -> dict[str, Any]:
    """What a paper prints for the method in its own setting, to be read beside ours and not compared with it."""
    value, of = _printed().get((entry.model, entry.defense), (None, ""))
    return {"reported": value, "reported_of": of}
