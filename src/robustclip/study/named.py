"""The attacks that go by names in papers and tables, as a scale plays them.

"PGD-100", "CW-10"                     steps up the cross-entropy or the margin; the number may be played by another one
"APGD-CE", "APGD-DLR", "APGD-T", "Square", "AutoAttack"
"BERT-Attack"                          on prompts, as MMCoA released it; "BERT-Attack-aligned" as first published
"BERT-Attack-labels"                   chosen to raise the loss on held-out images
"Synonyms"                             the same search among synonyms, so that the meaning is kept
"PGD-100+BERT-Attack"                  both, without interaction; ":attacked" or ":worst" appended for other readings
"Co-Attack", "SGA"
"""

import re
from collections.abc import Callable, Mapping

from robustclip.attacks import (
    APGD,
    FGSM,
    PGD,
    SGA,
    AutoAttack,
    BertAttack,
    CoAttack,
    LabelAwareBertAttack,
    SepAttack,
    Square,
    SynonymAttack,
    UniformNoise,
)  # fmt: skip

STANDARD = 100  # steps of AutoAttack's parts and of the papers' Co-Attack
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
        return IMAGES[name](eps, steps.get(name, STANDARD), seed)
    elif match := re.fullmatch(r"(PGD|CW)-([1-9]\d*)", name):
        return STEPPED[match[1]](eps, steps.get(name, steps.get(f"PGD-{match[2]}", int(match[2]))), seed)
    raise ValueError(f"unknown attack {name!r}; choose one of: {', '.join(NAMES)} (or PGD-k, CW-k for k steps)")
