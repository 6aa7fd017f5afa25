"""What is learned around a CLIP's towers: context vectors, a frame for pictures, a transform of text features.

The first two are parameters beside the network's own, `token_embedding.context` and `visual.frame`; the third is the
module `clip.text_transform`. So digests, copies and gradients know them. The file `prompt.safetensors` keeps them next
to a CLIP's weights, which stay plain open_clip.
"""

import torch
from torch import Tensor, nn

from robustclip.checks import check_integer

LEARNED = ("token_embedding.context", "visual.frame", "visual.frame_mask")
OF_TEXTS = "text_transform."


def learned(network: nn.Module) -> dict[str, Tensor]:
    """The learned prompts of a network, by name; empty for a plain one."""
    return {name: value for name, value in network.state_dict().items() if name in LEARNED}


def attach(network: nn.Module, prompts: dict[str, Tensor]) -> None:
    """Give a network prompts that `learned` found in another one."""
    if "token_embedding.context" in prompts:
        _attach_context(network, prompts["token_embedding.context"])
    if "visual.frame" in prompts:
        _attach_frame(network, prompts["visual.frame"], prompts["visual.frame_mask"])


def add_context(clip: nn.Module, vectors: int, seed: int = 0) -> nn.Module:
    """Put learnable vectors between the start token and the words of every text; they start small and random."""
    network = clip.network
    longest = getattr(network, "context_length", None) or network.positional_embedding.shape[0]
    check_integer("vectors", vectors, 1, longest - 2)
    random = torch.Generator().manual_seed(seed)
    context = 0.02 * torch.randn(vectors, network.token_embedding.embedding_dim, generator=random)
    _attach_context(network, context.to(network.token_embedding.weight))
    return clip


def add_frame(clip: nn.Module, width: int, seed: int = 0) -> nn.Module:
    """Add a learnable frame of `width` pixels to every picture, after its normalisation; nothing happens inside it."""
    height, length = clip.image_size
    check_integer("width", width, 1, min(height, length) // 2)
    random = torch.Generator().manual_seed(seed)
    mask = torch.ones(height, length)
    mask[width:-width, width:-width] = 0
    frame = 0.02 * torch.randn(3, height, length, generator=random) * mask
    _attach_frame(clip.network, frame.to(clip.device), mask.to(clip.device))
    return clip


class LinearMap(nn.Module):
    """u -> u A, for a matrix A (d, d) that all texts share."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix, requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        """(n, d) features to (n, d)."""
        return features @ self.matrix


class Expansion(nn.Module):
    """Multiplies the angle theta of a unit feature u to a unit centre c by a factor, within the plane of the two.

    u -> cos(factor theta) c + sin(factor theta) (u - cos(theta) c) / sin(theta), Li et al. (2024), LAAT.
    """

    def __init__(self, centre: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", centre)
        self.register_buffer("factor", torch.as_tensor(factor, dtype=centre.dtype))

    def forward(self, features: Tensor) -> Tensor:
        """(n, d) unit features to (n, d)."""
        cosine = features @ self.centre[:, None]
        across = features - cosine * self.centre
        sine = across.norm(dim=1, keepdim=True)
        angle = self.factor * torch.atan2(sine, cosine)
        return angle.cos() * self.centre + angle.sin() * across / sine.clamp(min=1e-12)


TRANSFORMS = {"matrix": LinearMap, "centre": Expansion}  # by a tensor that only this kind has


def transform_state(transform: nn.Module | None) -> dict[str, Tensor]:
    """The tensors of a text transform, under the names by which they are stored; it must be one of TRANSFORMS."""
    if transform is None:
        return {}
    if type(transform) not in TRANSFORMS.values():
        kinds = " or ".join(kind.__name__ for kind in TRANSFORMS.values())
        raise ValueError(f"text_transform={transform!r} cannot be stored; give a {kinds} of robustclip.prompts")
    return {OF_TEXTS + name: value for name, value in transform.state_dict().items()}


def transform_from(stored: dict[str, Tensor]) -> nn.Module | None:
    """The text transform among stored tensors, None if there is none."""
    own = {name.removeprefix(OF_TEXTS): value for name, value in stored.items() if name.startswith(OF_TEXTS)}
    return next((kind(**own) for key, kind in TRANSFORMS.items() if key in own), None)


def make_room(tokens: Tensor, network: nn.Module) -> Tensor:
    """Tokens (k, length) with places for the context after the start token; texts too long for it are an error.

    The places hold the text's first word, an ordinary token, so that towers that look for the end token find it. Only
    padding makes room, and one more place of it must stay: a lone end token looks like padding.
    """
    vectors = len(getattr(getattr(network, "token_embedding", None), "context", ()))
    if not vectors:
        return tokens
    if (tokens[:, -vectors - 1 :] != tokens[:, -1:]).any():
        raise ValueError(f"a text is too long for {vectors} context vectors; use shorter prompts or fewer vectors")
    return torch.cat([tokens[:, :1], tokens[:, 1:2].expand(-1, vectors), tokens[:, 1:-vectors]], 1)


def _attach_context(network: nn.Module, context: Tensor) -> None:
    network.token_embedding.register_parameter("context", nn.Parameter(context, requires_grad=False))
    network.token_embedding.register_forward_hook(_with_context)


def _attach_frame(network: nn.Module, frame: Tensor, mask: Tensor) -> None:
    network.visual.register_buffer("frame_mask", mask)
    network.visual.register_parameter("frame", nn.Parameter(frame, requires_grad=False))
    network.visual.register_forward_pre_hook(_with_frame)


def _with_context(embedding: nn.Module, _: tuple, embedded: Tensor) -> Tensor:
    context = embedding.context.to(embedded).expand(len(embedded), -1, -1)
    return torch.cat([embedded[:, :1], context, embedded[:, 1 + context.shape[1] :]], 1)


def _with_frame(visual: nn.Module, arguments: tuple[Tensor]) -> Tensor:
    return arguments[0] + (visual.frame * visual.frame_mask).to(arguments[0])
