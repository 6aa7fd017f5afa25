"""The oldest defenses against loops over one image at a time."""

import torch

from robustclip.defenses.baselines import Hedge, LowPass


def test_no_images_have_no_answers():
    for defense in (LowPass(), Hedge()):
        assert defense.logits(lambda images: images.mean((2, 3)), torch.zeros(0, 3, 8, 8), 0).shape == (0, 3)
