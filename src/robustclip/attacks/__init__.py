"""Attacks: frozen dataclasses `(classifier, images, labels) -> images`."""

from robustclip.attacks.image import FGSM, PGD, UniformNoise

__all__ = ["FGSM", "PGD", "UniformNoise"]
