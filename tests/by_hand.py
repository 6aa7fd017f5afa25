"""What loops over one image (3, h, w) at a time share, when they check defenses that take whole batches."""

import torch


def project(image, delta, radius):
    """The nearest change inside the radius that keeps the image in [0, 1]."""
    return delta.clamp(-radius, radius).maximum(-image).minimum(1 - image)


def noise_by_hand(defense, image, draw, part="start"):
    """The noise that a defense starts from."""
    return project(image, defense.radius * defense.noise(image[None], draw, part)[0], defense.radius)


def normal_by_hand(uniform):
    """Uniform noise in [-1, 1] through the quantiles of the normal distribution."""
    return torch.special.ndtri((uniform.clamp(-1 + 1e-6, 1 - 1e-6) + 1) / 2)
