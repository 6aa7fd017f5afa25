"""The recipes by the names that tables give them: `named_recipe("TeCoA", eps=1 / 255, epochs=10)`."""

from typing import Any

from robustclip.attacks.text import BertAttack
from robustclip.checks import check_choice
from robustclip.training.anchored import LAAT, TIMA
from robustclip.training.guided import FARE, PMGAFT, TGAZSR
from robustclip.training.recipes import VP, AdvPT, MMCoA, Recipe, Standard, TeCoA

RECIPES: dict[str, tuple[type[Recipe], dict[str, Any]]] = {
    "FT-standard": (Standard, {}),
    "FT-contrastive": (Standard, {"contrastive": True}),
    "TeCoA": (TeCoA, {}),
    "TeCoA-both": (TeCoA, {"trains": "both"}),  # the text tower learns, too
    "MMCoA": (MMCoA, {}),
    "MMCoA-partial": (MMCoA, {"trains": "image"}),
    "MMCoA-image-term": (MMCoA, {"text_weight": 0}),
    "MMCoA-text-term": (MMCoA, {"image_weight": 0}),
    "MMCoA-leak": (MMCoA, {"leak": True}),
    "MMCoA-decay": (MMCoA, {"weight_decay": 0.2}),
    "MMCoA-L2": (MMCoA, {"weight_decay": 0.2, "optimizer": "adam"}),  # the decay inside Adam's gradient, as released
    "MMCoA-sampler": (MMCoA, {"sampler": "released"}),
    "MMCoA-aligned": (MMCoA, {"text": BertAttack()}),
    "FT-adversarial": (MMCoA, {"text_weight": 0, "trains": "image"}),  # against the batch, as TGA-ZSR's FT-Adv
    "PMG-AFT": (PMGAFT, {}),
    "PMG-AFT-released": (
        PMGAFT,
        {"temperature": 1.0, "normalisation": "imagenet", "reduction": "sum"},
    ),
    "TGA-ZSR": (TGAZSR, {}),
    "TGA-ZSR-released": (TGAZSR, {"unit": "places"}),
    "FARE": (FARE, {}),
    "FARE-l1": (FARE, {"distance": "l1"}),
    "LAAT": (LAAT, {}),
    "LAAT-raw": (LAAT, {"anchors": "raw", "smoothness": 0.0}),  # A-CE alone
    "LAAT-expanded": (LAAT, {"smoothness": 0.0}),
    "TIMA-margin": (TIMA, {"distil_images": 0.0, "energy": 0.0, "distil_texts": 0.0}),
    "TIMA-distant": (TIMA, {"distil_images": 0.0, "energy": 0.0, "distil_texts": 0.0, "widened": "distant"}),
    "TIMA-distilled": (TIMA, {"margin": 0.0, "energy": 0.0, "distil_texts": 0.0}),
    "TIMA-energy": (TIMA, {"margin": 0.0, "distil_images": 0.0}),
    "TIMA": (TIMA, {}),
    "AdvPT": (AdvPT, {}),
    "VP": (VP, {}),
}


def named_recipe(name: str, **settings: Any) -> Recipe:
    """The recipe called `name` with flat settings, as `Recipe.of` takes them."""
    kind, own = RECIPES[check_choice("recipe", name, RECIPES)]
    return kind.of(**own | settings)
