"""Attacks: on images `(classifier, images, labels) -> images`, on texts `(clip, texts) -> texts`, and on both."""

from robustclip.attacks.adaptive import bpda, replace_backward
from robustclip.attacks.apgd import APGD
from robustclip.attacks.autoattack import AutoAttack
from robustclip.attacks.aware import Aware
from robustclip.attacks.fast import Fast
from robustclip.attacks.from_textattack import FromTextAttack
from robustclip.attacks.from_torchattacks import FromTorchattacks, adapt
from robustclip.attacks.gradient import FGSM, PGD, FeaturePGD, UniformNoise
from robustclip.attacks.multimodal import SGA, CoAttack, SepAttack
from robustclip.attacks.square import Square
from robustclip.attacks.text import BertAttack, LabelAwareBertAttack, SynonymAttack

__all__ = [
    "APGD", "FGSM", "PGD", "SGA", "AutoAttack", "Aware", "BertAttack", "CoAttack", "Fast", "FeaturePGD",
    "FromTextAttack", "FromTorchattacks", "LabelAwareBertAttack", "SepAttack", "Square", "SynonymAttack",
    "UniformNoise", "adapt", "bpda", "replace_backward",
]  # fmt: skip
