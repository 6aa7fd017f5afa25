"""Faster twins of classifiers, for gradients with respect to pixels and nothing else.

    twin = fast(clip)                                # the same model, its image tower in bfloat16
    classifier = fast_classifier(zero_shot(clip, role("cifar10")))
    classifier = twin_of(resnet)                     # of any module that convolves pixels

The image tower is copied once: weights cast, batch norms folded into the convolution before them, attention packed.
Text features, cosines and logits stay what they were, in float32. The original is not touched.
"""

import copy
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from robustclip.checks import check_choice
from robustclip.models import PRECISIONS, Clip, ZeroShotClassifier


def fast(clip: Clip, precision: str = "bfloat16") -> Clip:
    """The twin of `clip`, kept until a weight of `clip` changes; "float32" is exact up to rounding.

    Modules it does not know are cast and otherwise left as they are; without a convolution over pixels nothing is cast.
    """
    check_choice("precision", precision, PRECISIONS)
    return clip.remembered(("fast", precision), lambda: _twin(clip, PRECISIONS[precision]))


def fast_classifier(classifier: ZeroShotClassifier, precision: str = "bfloat16") -> ZeroShotClassifier:
    """The same prompts and the same text features on the twin of the classifier's CLIP."""
    return _sharing(ZeroShotClassifier, classifier, clip=fast(classifier.clip, precision))


def twin_of(classifier: Callable[[Tensor], Tensor], images: Tensor, precision: str = "bfloat16") -> nn.Module | None:
    """A faster twin of a zero-shot classifier or any module that convolves pixels; None where none takes the images.

    Nothing says that a module still computes the same: judge what is found on its twin by the original.
    """
    if type(classifier) is ZeroShotClassifier:
        return fast_classifier(classifier, precision)
    modules = list(classifier.modules()) if isinstance(classifier, nn.Module) else []
    if not any(map(_sees_pixels, modules)) or any(isinstance(module, Clip) for module in modules):
        return None
    twin = _Cast(classifier, PRECISIONS[precision])
    try:
        with torch.no_grad():
            twin(images[:1])
    except RuntimeError:  # it mixes precisions
        return None
    return twin


class _Cast(nn.Module):
    """A copy of any module, cast as the tower of a CLIP is."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.training = _tower(module, dtype), False

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) pixels in [0, 1] to (n, classes) logits in float32."""
        return self.module(images.contiguous(memory_format=torch.channels_last)).float()


def _sees_pixels(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and module.in_channels == 3


def _twin(clip: Clip, dtype: torch.dtype) -> Clip:
    tower = _tower(clip.network.visual, dtype)
    twin = _sharing(_Twin, clip, network=_sharing(type(clip.network), clip.network, visual=tower))
    twin._kept = ((), {})
    return twin


class _Twin(Clip):
    def preprocess(self, images: Tensor) -> Tensor:
        """Normalise, then resize: the two commute, as resizing weights sum to one, and small images cost less."""
        pixels = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if tuple(pixels.shape[-2:]) == self.image_size:
            return pixels
        return F.interpolate(pixels, size=self.image_size, mode=self.interpolation, antialias=False)

    def _embed(self, images: Tensor) -> Tensor:
        """Features of a batch that was filled up with black pictures to one of few sizes."""
        filled = F.pad(images, (0, 0, 0, 0, 0, 0, 0, self._size(images) - len(images)))
        return super()._embed(filled)[: len(images)]

    def _size(self, images: Tensor) -> int:
        """At least two images, as products with one row round differently; with convolutions on a CPU, few sizes.

        There every new batch size has new kernels made, which takes longer than to use them, and broken images leave
        all the time. One of (8, 16, ..., 64, 96, 128, ..., 512, 576, ...) costs a little more work instead.
        """
        n = max(1, len(images))
        if images.is_cuda or not any(isinstance(module, nn.Conv2d) for module in self.network.visual.modules()):
            return max(n, 2)
        step = 8 if n <= 64 else max(32, 1 << (n - 1).bit_length() - 4)
        return -(-n // step) * step


def _sharing(kind: type[nn.Module], module: nn.Module, **children: nn.Module) -> nn.Module:
    """A module of class `kind` that shares everything with `module` but these children."""
    other = kind.__new__(kind)
    other.__dict__ = {**vars(module), "_modules": {**module._modules, **children}, "training": False}
    return other


@torch.no_grad()
def _tower(visual: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of an image tower that takes float32 pixels and computes in `dtype`."""
    tower = copy.deepcopy(visual).eval().requires_grad_(False)
    for module in list(tower.modules()):
        _fold(module)
    modules = dict(tower.named_modules())
    first = {name: copy.deepcopy(module).float() for name, module in modules.items() if _sees_pixels(module)}
    tower.to(dtype=dtype if first else None, memory_format=torch.channels_last)
    for name, module in modules.items():
        if name in first:
            tower.set_submodule(name, _over_pixels(first[name], dtype))
        elif type(module).__name__ in PACKED:
            tower.set_submodule(name, PACKED[type(module).__name__](module))
    return tower


def _fold(module: nn.Module) -> None:
    """Batch norms that follow a convolution become part of it, in modules that run their children in order."""
    if type(module).__name__ not in ("Sequential", "ModifiedResNet", "Bottleneck"):
        return
    children = list(module.named_children())
    for (name, first), (norm_name, norm) in itertools.pairwise(children):
        if type(first) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
            setattr(module, name, fuse_conv_bn_eval(first, norm))
            setattr(module, norm_name, nn.Identity())


def _over_pixels(convolution: nn.Conv2d, dtype: torch.dtype) -> nn.Module:
    """The module that pixels enter by."""
    side = convolution.kernel_size
    patches = side == convolution.stride and side[0] > 1 and convolution.padding == (0, 0)
    return _Patches(convolution, dtype) if patches else _Pixels(convolution, dtype)


class _Pixels(nn.Module):
    """The first convolution in float32, as rounded pixels would hide small steps; its result in `dtype`."""

    def __init__(self, convolution: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.convolution, self.dtype = convolution, dtype

    def forward(self, pixels: Tensor) -> Tensor:
        return self.convolution(pixels).to(self.dtype)


class _Patches(nn.Module):
    """A convolution over patches that do not overlap, as one matrix product: its slow backward pass goes away."""

    def __init__(self, convolution: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.side, self.bias = convolution.kernel_size, convolution.bias
        self.weight = nn.Parameter(convolution.weight.flatten(1).to(dtype), requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        n, channels, height, width = pixels.shape
        rows, columns = height // self.side[0], width // self.side[1]
        pixels = pixels[..., : rows * self.side[0], : columns * self.side[1]]
        patches = pixels.reshape(n, channels, rows, self.side[0], columns, self.side[1]).permute(0, 2, 4, 1, 3, 5)
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(patches.flatten(3).to(self.weight.dtype), self.weight, bias).permute(0, 3, 1, 2)


class _PackedAttention(nn.Module):
    """`nn.MultiheadAttention` from a sequence to itself without its copies of the packed projection."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options) -> tuple[Tensor, None]:
        own = self.attention
        masked = any(options.get(name) is not None for name in ("attn_mask", "key_padding_mask"))
        known = own.batch_first and own.in_proj_weight is not None and own.bias_k is None and not own.add_zero_attn
        if masked or not known or query is not key or key is not value or options.get("need_weights", True):
            return own(query, key, value, **options)
        n, length, width = query.shape
        packed = F.linear(query, own.in_proj_weight, own.in_proj_bias)
        packed = packed.view(n, length, 3, own.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = _attend(packed).transpose(1, 2).reshape(n, length, width)
        return own.out_proj(mixed), None


def _attend(packed: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V for the stacked (3, n, heads, length, d); on CPUs, half precision goes by hand.

    The fused kernel has no fast backward pass there: five times slower at length 50, three times at 197.
    """
    if packed.is_cuda or packed.dtype == torch.float32:
        return F.scaled_dot_product_attention(*packed)
    query, key, value = packed.flatten(1, 2)
    weights = (torch.bmm(query, key.mT) * key.shape[-1] ** -0.5).softmax(-1)
    return torch.bmm(weights, value).view(packed.shape[1:])


class _PackedPool(nn.Module):
    """open_clip's `AttentionPool2d` for the one query whose answer it returns, the mean of all places."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.weight = nn.Parameter(torch.cat([pool.k_proj.weight, pool.v_proj.weight]), requires_grad=False)
        self.bias = nn.Parameter(torch.cat([pool.k_proj.bias, pool.v_proj.bias]), requires_grad=False)

    def forward(self, maps: Tensor) -> Tensor:
        places, heads = maps.flatten(2).mT, self.pool.num_heads
        mean = places.mean(1) + self.pool.positional_embedding[0]
        tokens = torch.cat([mean[:, None], places + self.pool.positional_embedding[1:]], 1)
        n, length, width = tokens.shape
        query = self.pool.q_proj(mean).view(n, 1, heads, -1) * (width // heads) ** -0.5
        key, value = F.linear(tokens, self.weight, self.bias).view(n, length, 2, heads, -1).unbind(2)
        weights = (query * key).sum(-1, keepdim=True).softmax(1)
        return self.pool.c_proj((weights * value).sum(1).flatten(1))


PACKED = {"MultiheadAttention": _PackedAttention, "AttentionPool2d": _PackedPool}
