"""Randomness that belongs to an image: the same alone or in a batch, in any order and at any batch size."""

import hashlib
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


def own_noise(images: Tensor, seed: int, shape: Sequence[int] | None = None) -> Tensor:
    """Uniform noise in [-1, 1], each image's drawn from a generator seeded by its own bytes and `seed`.

    One number per pixel, or (n, *shape).
    """
    noise = torch.empty(images.shape if shape is None else (len(images), *shape))
    for row, image in zip(noise, images.detach().float().cpu(), strict=True):
        own = zlib.crc32(image.contiguous().numpy().tobytes(), seed & 0xFFFFFFFF)
        row.uniform_(-1, 1, generator=torch.Generator().manual_seed((seed << 32) + own))
    return noise.to(images)


def draw_seed(*parts: int | str) -> int:
    """A seed in [0, 2^31) for `own_noise` from several parts, such as (seed, draw, "crop"): all combinations differ."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def normal(noise: Tensor) -> Tensor:
    """Uniform noise in [-1, 1] turned into normal noise of deviation 1."""
    return 2**0.5 * torch.erfinv(noise.clamp(-1 + 1e-6, 1 - 1e-6))
