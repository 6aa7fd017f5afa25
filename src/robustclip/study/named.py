"""The attacks and defenses that go by names in papers and tables, as a scale plays them.

"PGD-100", "CW-10"                     steps up the cross-entropy or the margin; the number may be played by another one
"APGD-CE", "APGD-DLR", "APGD-T", "Square", "AutoAttack"
"BERT-Attack"                          on prompts, as MMCoA released it; "BERT-Attack-aligned" as first published
"BERT-Attack-labels"                   chosen to raise the loss on held-out images
"Synonyms"                             the same search among synonyms, so that the meaning is kept
"PGD-10:last", "CW-10:last"            as the test-time papers attack: steps of length eps to the end, come what may
"PGD-10:target"                        the same towards the runner-up class; "label-free": away from the image's feature
"aware"                                the attacker who knows the defense; "aware:smooth" and so on, with one aim
"PGD-100+BERT-Attack"                  both, without interaction; ":attacked" or ":worst" appended for other readings
"Co-Attack", "SGA"

Defenses count pixels in units of the scale's reference budget, which is to its pictures what 1/255 is to the papers'.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from robustclip.attacks import (
    APGD,
    FGSM,
    PGD,
    SGA,
    AutoAttack,
    Aware,
    BertAttack,
    CoAttack,
    FeaturePGD,
    LabelAwareBertAttack,
    SepAttack,
    Square,
    SynonymAttack,
    UniformNoise,
)  # fmt: skip
from robustclip.checks import check_choice
from robustclip.defenses.anchors import NoiseAnchor
from robustclip.defenses.base import Defense
from robustclip.defenses.baselines import AntiAdversary, Hedge, LowPass, RandomNoise
from robustclip.defenses.clipure import DESCRIBED, RELEASED, CLIPureDiff
from robustclip.defenses.cola import COLA
from robustclip.defenses.consistency import SelfConsistency
from robustclip.defenses.counterattack import Counterattack
from robustclip.defenses.mean_shift import MTA
from robustclip.defenses.prompt_tuning import RTPT, TPT
from robustclip.defenses.smoothing import Smoothing
from robustclip.defenses.views import TTE, Mirrored, Views

STANDARD = 100  # steps of AutoAttack's parts and of the papers' Co-Attack
AWARE = 50  # steps of the attacker who knows the defense
QUERIES = 50  # of Square for each step of APGD, as in AutoAttack

# name -> (eps, steps, seed) -> attack; steps are the scale's for that name, else the standard ones
IMAGES: dict[str, Callable[[float, int, int], Callable]] = {
    "noise": lambda eps, steps, seed: UniformNoise(eps=eps, seed=seed),
    "FGSM": lambda eps, steps, seed: FGSM(eps=eps),
    "APGD-CE": lambda eps, steps, seed: APGD(eps=eps, steps=steps, seed=seed),
    "APGD-DLR": lambda eps, steps, seed: APGD(eps=eps, steps=steps, seed=seed, loss="dlr"),
    "APGD-T": lambda eps, steps, seed: APGD(eps=eps, steps=steps, seed=seed, loss="dlr", targets=9),
    "Square": lambda eps, steps, seed: Square(eps=eps, queries=QUERIES * steps, seed=seed),
    "AutoAttack": lambda eps, steps, seed: AutoAttack(eps=eps, steps=steps, queries=QUERIES * steps, seed=seed),
    "Co-Attack": lambda eps, steps, seed: CoAttack(eps=eps, steps=steps, seed=seed, text=TEXTS["BERT-Attack"]),
    "label-free": lambda eps, steps, seed: FeaturePGD(eps=eps, steps=10, seed=seed),
    "aware": lambda eps, steps, seed: Aware(eps=eps, steps=steps, seed=seed),
    "SGA": lambda eps, steps, seed: SGA(eps=eps, steps=min(steps, 10), seed=seed),
}
STEPPED: dict[str, Callable[[float, int, int], Callable]] = {
    "PGD": lambda eps, steps, seed: PGD(eps=eps, steps=steps, seed=seed),
    "CW": lambda eps, steps, seed: PGD(eps=eps, steps=steps, seed=seed, loss="margin"),
}
TEXTS: dict[str, Callable] = {
    "BERT-Attack": BertAttack(offset="shifted", end_token=False),
    "BERT-Attack-aligned": BertAttack(),
    "BERT-Attack-labels": LabelAwareBertAttack(),
    "Synonyms": SynonymAttack(),
}
NAMES = ("clean", *IMAGES, "PGD-10", "PGD-100", "CW-10", *TEXTS, "PGD-100+BERT-Attack", "PGD-100+BERT-Attack:worst")


def named_attack(name: str, eps: float, steps: Mapping[str, int], seed: int = 0) -> Callable | None:
    """The attack called `name`; `steps` says how many play a name. None for "clean"."""
    images, plus, rest = name.partition("+")
    if plus:
        texts, _, reading = rest.partition(":")
        if texts in TEXTS and images != "clean":
            image = named_attack(images, eps, steps, seed)
            return SepAttack(image=image, text=TEXTS[texts], reading=reading or "released")
    elif name == "clean":
        return None
    elif name in TEXTS:
        return TEXTS[name]
    elif name in IMAGES:
        return IMAGES[name](eps, steps.get(name, AWARE if name == "aware" else STANDARD), seed)
    elif match := re.fullmatch(r"(PGD|CW)-([1-9]\d*)", name):
        return STEPPED[match[1]](eps, steps.get(name, steps.get(f"PGD-{match[2]}", int(match[2]))), seed)
    elif match := re.fullmatch(r"(PGD|CW)-([1-9]\d*):(last|target)", name):
        loss = "ce" if match[1] == "PGD" else "margin"
        return PGD(
            eps=eps, steps=int(match[2]), step_size=eps, keep="last", stop=False, loss=loss, seed=seed,
            targets=int(match[3] == "target"),
        )  # fmt: skip
    elif name.startswith("aware:"):
        return Aware(eps=eps, steps=steps.get("aware", AWARE), aims=(name.removeprefix("aware:"),), seed=seed)
    raise ValueError(f"unknown attack {name!r}; choose one of: {', '.join(NAMES)} (or PGD-k, CW-k for k steps)")


# --- defenses ---------------------------------------------------------------------------------------------------------


def _counterattack(unit: float, **settings: object) -> Counterattack:
    return Counterattack(**{"step_size": unit, "radius": 4 * unit} | settings)


def _consistency(unit: float, **settings: object) -> SelfConsistency:
    gate = {name: settings.pop(name) for name in ("threshold", "reverse") if name in settings}
    return SelfConsistency(**{"warmup": _counterattack(unit, **gate), "step_size": unit, "radius": 4 * unit} | settings)


def _doc(unit: float, **settings: object) -> Counterattack:
    own = {"steps": 4, "step_size": 3 * unit, "beta": None, "drift": "cosine", "drift_draws": 4, "sharpness": 5.0}
    return _counterattack(unit, **own | {"momentum": 0.9, "orthogonal": 0.5} | settings)


PLAIN = {"projection": "off", "solver": "independent", "view_weights": "uniform", "text_weights": "uniform"}
# name -> (unit, thresholds of the world) -> defense; a unit is 1/255 at the papers' scale
DEFENSES: dict[str, Callable[[float, Mapping[str, float]], Defense]] = {
    "RN": lambda unit, known: RandomNoise(radius=4 * unit),
    "Mirror": lambda unit, known: Mirrored(),
    "TTE": lambda unit, known: TTE(),
    "TTE-released": lambda unit, known: TTE(released=True),
    "Views-5": lambda unit, known: Views(count=5),
    "Ensemble": lambda unit, known: Views(),
    "Anti-adversary": lambda unit, known: AntiAdversary(step_size=unit, radius=4 * unit),
    "HD": lambda unit, known: Hedge(step_size=unit, radius=4 * unit),
    "LPF": lambda unit, known: LowPass(),
    "TTC": lambda unit, known: _counterattack(unit),
    "TTC-open": lambda unit, known: _counterattack(unit, threshold=None),
    "TTC-calibrated": lambda unit, known: _counterattack(unit, threshold=known["keep"]),
    "TTC-reversed": lambda unit, known: _counterattack(unit, threshold=known["reverse"], reverse=True),
    "TTC-zero": lambda unit, known: _counterattack(unit, threshold=known["keep"], closed="nothing"),
    "TTC-pixels": lambda unit, known: Counterattack(),
    "DOC": lambda unit, known: _doc(unit, threshold=known["cosine"]),
    "DOC-open": lambda unit, known: _doc(unit, threshold=None),
    "DOC-reversed": lambda unit, known: _doc(unit, threshold=known["cosine"], reverse=True),
    "MAC": lambda unit, known: _counterattack(
        unit, steps=4, step_size=2 * unit, radius=8 * unit, beta=None, drift="mirror", threshold=0.7, sharpness=70.0,
        mirrored=True,
    ),
    "SCC": lambda unit, known: _consistency(unit),
    "SCC-zero": lambda unit, known: _consistency(unit, start="zero"),
    "SCC-calibrated": lambda unit, known: _consistency(unit, threshold=known["keep"], gated=True),
    "SCC-open": lambda unit, known: _consistency(unit, threshold=None),
    "SCC-reversed": lambda unit, known: _consistency(unit, threshold=known["reverse"], reverse=True, gated=True),
    "SCC-neither": lambda unit, known: _consistency(unit, steps=0, count=1),
    "SCC-semantic": lambda unit, known: _consistency(unit, count=1),
    "SCC-spatial": lambda unit, known: _consistency(unit, steps=0),
    "CLIPure-released": lambda unit, known: RELEASED,
    "CLIPure": lambda unit, known: replace(DESCRIBED, step_size=0.03),
    "CLIPure-0.1": lambda unit, known: DESCRIBED,
    "CLIPure-Diff": lambda unit, known: CLIPureDiff(),
    "TPT": lambda unit, known: TPT(),
    "R-TPT": lambda unit, known: RTPT(),
    "MTA": lambda unit, known: MTA(),
    "Noise anchor": lambda unit, known: NoiseAnchor(deviation=8 * unit),
    "Smoothing": lambda unit, known: Smoothing(deviation=4 * unit, copies=32),
    "COLA": lambda unit, known: COLA(),
    "COLA-no-projection": lambda unit, known: COLA(projection="off"),
    "COLA-random": lambda unit, known: COLA(projection="random"),
    "COLA-independent": lambda unit, known: COLA(solver="independent"),
    "COLA-means": lambda unit, known: COLA(**PLAIN),
    "COLA-one-view": lambda unit, known: COLA(crops=Views(count=1), **PLAIN),
    "COLA-printed": lambda unit, known: COLA(view_weights="printed"),
}  # fmt: skip


def named_defense(name: str, unit: float, thresholds: Mapping[str, float], lexicon: str = "wordnet") -> Defense | None:
    """The defense called `name`, its pixels in units, its words from a lexicon; None for "none".

    `thresholds` are those of the world, which `tools/calibrate.py` measures on training images.
    """
    if name == "none":
        return None
    try:
        found = DEFENSES[check_choice("defense", name, DEFENSES)](unit, thresholds)
        return replace(found, lexicon=lexicon) if hasattr(found, "lexicon") else found
    except KeyError as error:
        raise ValueError(
            f"{name} needs [defenses] {error} in the scale's file; measure it with tools/calibrate.py"
        ) from None
