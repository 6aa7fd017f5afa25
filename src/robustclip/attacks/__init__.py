"""Attacks on images `(classifier, images, labels) -> images` and on texts `(clip, texts) -> texts`."""

from robustclip.attacks.gradient import FGSM, PGD, FeaturePGD, UniformNoise

__all__ = ["FGSM", "PGD", "FeaturePGD", "UniformNoise"]
