"""Hybrids: a fine-tuned CLIP, or a mixture of several, behind a defense at test time; chosen on validation images.

found = measure("photo")        # candidates on validation images, then the best and its rivals on test images
found.best                      # ("Soup", "TTE")
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from robustclip.data.sources import Samples, load_samples
from robustclip.study import testtime
from robustclip.study.bench import Bench
from robustclip.study.cells import Cell
from robustclip.study.evaluate import evaluate, look_up
from robustclip.study.exchange import artifact
from robustclip.study.finetuning import tuned
from robustclip.study.named import DEFENSES
from robustclip.study.scales import Scale
from robustclip.study.scales import scale as find_scale
from robustclip.study.tasks import Classify
from robustclip.study.trained import Soup

PRICE = 5.0  # points of clean accuracy below CLIP that a hybrid may cost
Candidate = tuple[str, str]  # host, defense
Right = dict[tuple[str, str, str], np.ndarray]  # right or wrong by host, defense, role


class Plan(NamedTuple):
    """What takes part at a scale, and on how many validation images of each role."""

    recipes: tuple[str, ...] = ("TeCoA", "PMG-AFT", "FARE")
    halves: tuple[str, ...] = ("TeCoA", "PMG-AFT")
    defenses: tuple[str, ...] = ("none", "Mirror", "Views-5", "TTE", "COLA")
    roles: tuple[str, ...] = ("cifar10", "caltech101")
    tested: tuple[str, ...] = testtime.ROLES
    clean: int = 200
    aware: int = 32
    blind: tuple[str, ...] = ("clean", "PGD-10:last", "AutoAttack")  # conditions of test images, besides "aware"


QUICK = Plan(
    ("TeCoA", "FARE"), ("TeCoA",), ("none", "Mirror", "Views-5"), ("cifar10",), testtime.ROLES[:1], 10, 6,
    ("clean", "PGD-10:last"),
)  # fmt: skip


class Found(NamedTuple):
    """Answers to validation images, the candidates within the price, the best of all hybrids, and of those within it.

    A best one is None as long as not all that it is the best of are known. `tests` are rows of `evaluate`.
    """

    clean: Right
    aware: Right
    within: list[Candidate]
    best: Candidate | None
    dearest: Candidate | None
    tests: pd.DataFrame


def plan(scale: Scale) -> Plan:
    """What takes part at a scale."""
    return QUICK if scale.name == "quick" else Plan()


def hosts(scale: Scale, seed: int = 0, device: str = "auto") -> dict[str, Any]:
    """Models by name: CLIP, fine-tuned ones, some half-way from CLIP to these, and the soup of all fine-tuned ones."""
    recipes = tuned(scale, plan(scale).recipes, seed=seed, device=device)
    halves = {f"{name} half": recipes[name].between(0.5) for name in plan(scale).halves}
    return {"CLIP": scale.model("clip"), **recipes, **halves, "Soup": Soup("Soup", tuple(recipes.values()))}


def is_single(candidate: Candidate, recipes: Sequence[str]) -> bool:
    """Whether it is one method alone: a recipe without a defense, a defense on CLIP, or CLIP itself."""
    return candidate[0] == "CLIP" or (candidate[0] in recipes and candidate[1] == "none")


# --- validation images ------------------------------------------------------------------------------------------------


class Held(Bench):
    """A bench whose images are those of the validation parts."""

    def samples(self, cell: Cell) -> Samples:
        """The images of a cell; those of all roles are kept."""
        name = (cell.role, cell.scale.source, cell.n)
        if name not in self._samples:
            self._samples[name] = load_samples(cell.role, cell.scale.source, "validation", cell.n)
        return self._samples[name]


def answered(cell: Cell, bench: Held) -> dict[str, np.ndarray]:
    """Whether each validation image of a cell is right (n,), at a draw that its attacker never saw."""
    task = Classify()
    batches = task.batches(len(bench.samples(cell)), cell.scale.batch_size)
    return {"right": np.concatenate([task.answer(cell, bench, rows)["right"] for rows in batches]).astype(np.int8)}


def validated(cell: Cell, bench: Held, only_known: bool) -> np.ndarray | None:
    """As `answered`, from what is stored or shipped; None where it is not there and only what is known is wanted."""
    remade = cell.scale.recompute_stale and hasattr(cell.spec, "identity")
    try:
        about = [bench.key(cell), cell.spec.provenance() if remade else {}]
    except FileNotFoundError:  # neither its pictures nor results of it are at hand
        return None
    code = [answered, Held, cell.attack, cell.defense]
    found = artifact(
        cell.scale, "hybrids/validation", about, partial(answered, cell, bench), code, only_known=only_known
    )
    return None if found is None else found["right"].astype(bool)


def mean(found: Right, candidate: Candidate) -> float | None:
    """Accuracy in %, with equal weight per role; None of nothing."""
    parts = [right.mean() for key, right in found.items() if key[:2] == candidate]
    return 100 * float(np.mean(parts)) if parts else None


def within_price(clean: Right, price: float) -> list[Candidate]:
    """The candidates that cost at most so many points of clean accuracy below CLIP, in table order."""
    least = mean(clean, ("CLIP", "none")) - price
    return [one for one in dict.fromkeys(key[:2] for key in clean) if mean(clean, one) >= least - 1e-9]


def best_of(clean: Right, aware: Right, candidates: Iterable[Candidate]) -> Candidate | None:
    """The candidate that keeps most of the attacker who knows; of equals the better on clean images, or the first.

    None as long as one of them is not measured.
    """
    kept = {one: mean(aware, one) for one in candidates}
    if not kept or None in kept.values():
        return None
    return max(kept, key=lambda one: (kept[one], mean(clean, one)))


# --- the whole work ---------------------------------------------------------------------------------------------------


def measure(
    scale: str | Scale, price: float = PRICE, complete: bool = False, seed: int = 0, device: str = "auto",
    only_known: bool = False,
) -> Found:  # fmt: skip
    """Choose on validation images, then test the best hybrid, all hosts, and the defenses on CLIP that are known.

    What is stored or shipped is not measured again, with `only_known` nothing is. `complete` also attacks candidates
    beyond the price.
    """
    there = find_scale(scale)
    own, models, bench = plan(there), hosts(there, seed, device), Held(device)
    every = [(host, defense) for host in models for defense in own.defenses]

    def answers(cells_of: Any, candidates: Iterable[Candidate], size: int, attacks: Sequence[str]) -> Right:
        found = {}
        for host, defense in candidates:
            cells = cells_of(there, [defense], own.roles, attacks, {host: models[host]}, n=size, seeds=[seed])
            rights = [validated(cell, bench, only_known) for cell in cells]
            if all(right is not None for right in rights):
                found |= {(host, defense, cell.role): right for cell, right in zip(cells, rights, strict=True)}
        return found

    def rows(candidates: Iterable[Candidate]) -> list[pd.DataFrame]:
        look = look_up if only_known else evaluate
        return [look(test_cells(there, one, models[one[0]], seed), device=device) for one in candidates]

    clean = answers(testtime.blind, every, own.clean, ["clean"])
    if len(clean) < len(every) * len(own.roles):  # nothing can be chosen yet
        return Found(clean, {}, [], None, None, known_defenses(there, seed, device))
    within = within_price(clean, price)
    aware = answers(testtime.aware, within, own.aware, ["aware"])
    mixed = [one for one in every if not is_single(one, own.recipes)]
    best = best_of(clean, aware, [one for one in mixed if one in within])
    tests = rows([best] * (best is not None)) + rows((host, "none") for host in models if (host, "none") != best)
    if complete or only_known:
        aware |= answers(testtime.aware, [one for one in every if one not in within], own.aware, ["aware"])
    dearest = best_of(clean, aware, mixed)
    tests += rows([dearest] * (dearest not in (None, best) and dearest[1] != "none"))
    found = pd.concat([*tests, known_defenses(there, seed, device)])
    return Found(clean, aware, within, best, dearest, found.drop_duplicates("key", ignore_index=True))


def test_cells(there: Scale, candidate: Candidate, model: Any, seed: int) -> list[Cell]:
    """Clean test images of a candidate, attacked by who knows only its host, and by who knows the defense, too."""
    about = [there, [candidate[1]], plan(there).tested]
    more = {"models": {candidate[0]: model}, "n": there.size("testtime/aware"), "seeds": [seed]}
    return testtime.blind(*about, plan(there).blind, **more) + testtime.aware(*about, **more)


def known_defenses(there: Scale, seed: int = 0, device: str = "auto") -> pd.DataFrame:
    """What is known of all defenses on CLIP alone, in the cells of the pages on test time."""
    more = {"models": {"CLIP": there.model("clip")}, "seeds": [seed]}
    names = ["none", *DEFENSES]
    cells = testtime.blind(there, names, plan(there).tested, plan(there).blind, **more)
    return look_up(cells + testtime.aware(there, names, plan(there).tested, **more), device=device)
