"""Load any CLIP and classify with it. Nothing else in the package knows open_clip.

The name says where a model comes from:

    clip = load("tinyworld-clip")                  # an embedded model
    clip = load("photo-clip")                      # the other one, which knows photographs
    clip = load("ViT-B-32/openai")                 # an open_clip architecture and pretrained tag
    clip = load("hf-hub:timm/ViT-B-16-SigLIP")     # a model hub id
    clip = load("runs/checkpoints/tecoa")          # a folder in open_clip's format, as `save` writes it
    classifier = zero_shot(clip, role("cifar10"))  # images in [0, 1] -> logits
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files
from inspect import getclosurevars
from itertools import chain
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip import _torchvision, hub
from robustclip.checks import check_choice, check_folder, check_logits, check_pixels
from robustclip.classes import Classes
from robustclip.data.roles import Role
from robustclip.prompts import attach, learned, make_room, transform_from, transform_state

_torchvision.prepare()

EMBEDDED = ("tinyworld-clip", "photo-clip")
WEIGHTS, CONFIG, PROMPTS = "open_clip_model.safetensors", "open_clip_config.json", "prompt.safetensors"
PLAIN = re.compile(r"([!-%'-~]+( [!-%'-~]+)*)?")  # ASCII without "&" (entities), words between single blanks
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """The device to compute on: "auto" takes a GPU when there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.empty(0, device=name)
        probe.cpu()  # which "meta" cannot do
        return probe.device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot compute on device {name!r} ({reason}); use auto, cpu, or cuda with a GPU") from error


@dataclass(eq=False)
class Passes:
    """Images that went through the image towers: forward, and backward down to their pixels."""

    forward: int = 0
    backward: int = 0


_counting: list[Passes] = []


@contextmanager
def count_passes() -> Iterator[Passes]:
    """Count the images that pass any Clip's image tower meanwhile: `with count_passes() as passes: ...`."""
    passes = Passes()
    _counting.append(passes)
    try:
        yield passes
    finally:
        _counting.remove(passes)


def uncount(forward: int) -> None:
    """Take back images that passed only to fill a batch, and whose answer nobody used."""
    for passes in _counting:
        passes.forward -= forward


def _counted(images: Tensor) -> Tensor:
    """The images, counted now and when a gradient reaches them."""
    if not _counting:
        return images
    for passes in _counting:
        passes.forward += len(images)
    if images.requires_grad and torch.is_grad_enabled():
        images = images.view_as(images)
        images.register_hook(_count_backward)
    return images


def _count_backward(gradient: Tensor) -> None:
    for passes in _counting:
        passes.backward += len(gradient)


class Clip(nn.Module):
    """A CLIP over pixels: resize and normalisation happen inside, features are unit rows."""

    def __init__(self, network: nn.Module, tokenizer, name: str, config: dict | None = None) -> None:
        super().__init__()
        self.network, self.tokenizer, self.name = network, tokenizer, name
        self.config = config  # open_clip's "model_cfg", from which `save` describes the network
        size = network.visual.image_size
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        preprocess = network.visual.preprocess_cfg
        self.interpolation = preprocess["interpolation"]
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(preprocess[key]).view(3, 1, 1), persistent=False)
        self.register_module("text_transform", None)  # one of `prompts.TRANSFORMS`, applied to unit text features
        self._kept: tuple[tuple, dict] = ((), {})
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.mean.device

    @property
    def logit_scale(self) -> Tensor:
        """The inverse temperature exp(s) that multiplies cosines."""
        return self.network.logit_scale.exp()

    def remembered(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute()` returned when last asked for by this key; forgotten as soon as a weight moves or changes."""
        weights = chain(self.parameters(), self.buffers())
        state = tuple((weight.data_ptr(), weight._version) for weight in weights)
        if self._kept[0] != state:
            self._kept = (state, {})
        known = self._kept[1]
        if key not in known:
            known[key] = compute()
        return known[key]

    @property
    def digest(self) -> str:
        """Short fingerprint of all weights, independent of device and of where they were loaded from."""
        return self.remembered("digest", self._fingerprint)

    def _fingerprint(self) -> str:
        fingerprint = hashlib.sha256()
        for name, value in sorted((self.network.state_dict() | transform_state(self.text_transform)).items()):
            fingerprint.update(name.encode())
            fingerprint.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return fingerprint.hexdigest()[:16]

    def preprocess(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] to what the image tower expects."""
        if tuple(images.shape[-2:]) != self.image_size:
            images = F.interpolate(images, size=self.image_size, mode=self.interpolation, antialias=False)
        pixels = (images - self.mean) / self.std
        return pixels.to(self.network.logit_scale.dtype).contiguous(memory_format=torch.channels_last)

    def encode_images(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) pixels in [0, 1] to (n, d) unit features, differentiable down to the pixels."""
        return F.normalize(self.raw_images(images), dim=-1)

    def raw_images(self, images: Tensor) -> Tensor:
        """As `encode_images`, before they are scaled to unit length."""
        return self._embed(_counted(images)).float()

    def _embed(self, images: Tensor) -> Tensor:
        return self.network.encode_image(self.preprocess(images))

    def image_tokens(self, images: Tensor) -> Tensor:
        """(n, places, d) features of the places of a picture, row by row, projected into the space of its feature."""
        return self.raw_and_tokens(images)[1]

    def raw_and_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What `raw_images` and `image_tokens` return, from one pass.

        The places of a transformer go where its class token goes, those of a ModifiedResNet through the values of its
        attention pooling, whose weighted means its features are.
        """
        visual, seen = self.network.visual, []
        attnpool = getattr(visual, "attnpool", None)
        pool = getattr(attnpool, "pool", attnpool)  # the fast twin packs it
        if hasattr(pool, "v_proj"):
            hook = attnpool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        elif type(visual).__name__ == "VisionTransformer" and visual.attn_pool is None:
            hook = visual.transformer.register_forward_hook(lambda _, __, output: seen.append(output))
        else:
            raise ValueError(
                f"the image tower {type(visual).__name__} has no tokens; give a plain ViT or ModifiedResNet"
            )
        with hook:
            raw = self.raw_images(images)
        seen = seen[0][: len(images)]  # the fast twin fills batches up
        if pool is not None:
            places = seen.flatten(2).mT + pool.positional_embedding[1:]
            return raw, pool.c_proj(pool.v_proj(places)).float()
        places = visual.ln_post(seen[:, 1:])
        return raw, (places if visual.proj is None else places @ visual.proj).float()

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """k texts to (k, d) unit features; gradients reach the text tower where its weights ask for them."""
        tokens = make_room(tokenize(self.tokenizer, texts).to(self.device), self.network)
        first = _reads_first(self.network)
        features = _read_first(self.network, tokens) if first else self.network.encode_text(tokens)
        features = F.normalize(features.float(), dim=-1)
        return features if self.text_transform is None else F.normalize(self.text_transform(features), dim=-1)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """As `encode_texts`, without gradients and computed once per set of texts."""
        parts = [tuple(texts[i : i + 512]) for i in range(0, len(texts), 512)]
        return self.remembered(("texts", *parts), lambda: torch.cat([self.encode_texts(part) for part in parts]))


def tokenize(tokenizer, texts: Sequence[str]) -> Tensor:
    """(k, length) tokens of k texts, as open_clip's tokenizers give them.

    Those of BERT's kind clean each text, which plain texts do not need, and never look beyond a blank: of many plain
    texts each distinct word is read once. That takes a quarter of the time.
    """
    from open_clip.tokenizer import HFTokenizer, get_clean_fn
    from transformers import BertTokenizerFast

    usual = isinstance(tokenizer, HFTokenizer) and tokenizer.clean_fn is get_clean_fn("whitespace")
    usual = usual and not tokenizer.tokenizer_mode and isinstance(words := tokenizer.tokenizer, BertTokenizerFast)
    if not usual or tokenizer.strip_sep_token or not all(map(PLAIN.fullmatch, texts)):
        return tokenizer(list(texts))
    known = dict.fromkeys(chain.from_iterable(text.split(" ") for text in texts))
    known.update(zip(known, words([*known], add_special_tokens=False)["input_ids"], strict=True))
    length, first, last = tokenizer.context_length, words.cls_token_id, words.sep_token_id
    rows = [[first, *chain.from_iterable(map(known.get, text.split(" ")))][: length - 1] for text in texts]
    return torch.tensor([[*row, last, *[words.pad_token_id] * (length - 1 - len(row))] for row in rows])


def _reads_first(network: nn.Module) -> bool:
    """Whether this is a text tower of ordinary blocks that takes its features from the first token and masks none."""
    known = getattr(network, "text_pool_type", None) == "first" and isinstance(network.text_projection, nn.Parameter)
    blocks = network.transformer.resblocks if known and network.attn_mask is None else ()
    return bool(blocks) and type(blocks[-1]).__name__ == "ResidualAttentionBlock"


def _read_first(network: nn.Module, tokens: Tensor) -> Tensor:
    """As `encode_text`, but the last block computes the one position that is used."""
    *blocks, last = network.transformer.resblocks
    x = network.token_embedding(tokens) + network.positional_embedding
    for block in blocks:
        x = block(x)
    keys = last.ln_1(x)
    first = x[:, :1] + last.ls_1(last.attention(keys[:, :1], keys, keys))
    first = first + last.ls_2(last.mlp(last.ln_2(first)))
    return network.ln_final(first[:, 0]) @ network.text_projection


class ZeroShotClassifier(nn.Module):
    """p(y = i | x) proportional to exp(s cos(I(x), T_i)): logits are scaled cosines to the class prompts."""

    def __init__(self, clip: Clip, classes: Classes | Sequence[str], text_features: Tensor | None = None) -> None:
        """`classes` may be a plain list of prompts, which then are the names as well; their features may be given."""
        super().__init__()
        self.classes = classes if isinstance(classes, Classes) else Classes(classes, classes)
        self.clip, self.training = clip, clip.training
        known = clip.text_features(self.prompts) if text_features is None else text_features
        self.register_buffer("text_features", known, persistent=False)

    @classmethod
    def of_axes(cls, clip: Clip) -> "ZeroShotClassifier":
        """The same with the axes of feature space for classes: logits s u, from which unit features u can be read."""
        known = clip.text_features([""])
        axes = torch.eye(known.shape[1], device=known.device)
        return cls(clip, [f"axis {number}" for number in range(len(axes))], axes)

    @property
    def prompts(self) -> tuple[str, ...]:
        """One text per class."""
        return self.classes.prompts

    @property
    def description_features(self) -> list[Tensor]:
        """For each class the unit features (m, d) of its descriptions, or of its prompt where it has none."""
        own, groups = [*self.text_features[:, None]], self.classes.descriptions
        if not any(groups):
            return own
        parts = self.clip.text_features([*chain(*groups)]).split([len(group) for group in groups])
        return [part if len(part) else prompt for part, prompt in zip(parts, own, strict=True)]

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) pixels in [0, 1] to (n, classes) logits."""
        features = self.clip.encode_images(check_pixels(images))
        return self.clip.logit_scale.float() * features @ self.text_features.T.to(features.dtype)


def zero_shot(clip: Clip, role: Role) -> ZeroShotClassifier:
    """The zero-shot classifier of a role: its class names in its prompt template."""
    return ZeroShotClassifier(clip, role.classes)


def load(name: str | os.PathLike = EMBEDDED[0], device: str = "auto", precision: str = "float32") -> Clip:
    """Load a CLIP by embedded name, "architecture/pretrained" of open_clip, "hf-hub:id" or local folder.

    Only names that point to the network download anything, and every file of the hub is verified (`hub.fetch`).
    """
    import open_clip

    check_choice("precision", precision, PRECISIONS)
    name, target = os.path.expanduser(os.fspath(name)), pick_device(device)  # noqa: PTH111 leaves "~nobody" as it is
    if name in EMBEDDED:
        with as_file(files("robustclip").joinpath(f"assets/{name}")) as folder:
            clip = _load_folder(folder, name)
    elif name.startswith("hf-hub:"):
        clip = _load_remote(name, None)
    elif name.count("/") == 1 and not Path(name).exists() and name.split("/")[0] in open_clip.list_models():
        clip = _load_remote(*name.split("/"))
    else:
        clip = _load_folder(Path(name), name)
    clip.network.to(PRECISIONS[precision])  # pixel statistics stay exact
    return clip.to(target, memory_format=torch.channels_last)


def save(clip: Clip, folder: Path | str) -> Path:
    """Write a CLIP, wherever it was loaded from, as a folder that `load` and open_clip itself can read."""
    from open_clip.tokenizer import HFTokenizer
    from safetensors.torch import save_file

    if clip.config is None:
        raise ValueError(f"{clip.name!r} has no config to be written; make it with `load`, or give Clip its model_cfg")
    transform = transform_state(clip.text_transform)
    weights = clip.network.state_dict() | transform
    weights = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    own = {key: weights.pop(key) for key in [*learned(clip.network), *transform]}
    needed = sum(value.nbytes for value in weights.values()) / 1e6
    folder = check_folder(Path(folder), needed + 1)
    config = {"model_cfg": clip.config, "preprocess_cfg": clip.network.visual.preprocess_cfg}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if isinstance(clip.tokenizer, HFTokenizer):  # the other kinds are part of open_clip
        clip.tokenizer.tokenizer.save_pretrained(folder)
    (folder / PROMPTS).unlink(missing_ok=True)
    for name, tensors in ((PROMPTS, own), (WEIGHTS, weights)):
        if tensors:
            save_file(tensors, folder / f"{name}.tmp")
            (folder / f"{name}.tmp").replace(folder / name)
    return folder


def _load_folder(folder: Path, name: str) -> Clip:
    """A CLIP from a local folder in open_clip's format, and its learned prompts if there are any."""
    import open_clip
    from safetensors.torch import load_file

    for needed in (CONFIG, WEIGHTS):
        if not (folder / needed).is_file():
            raise FileNotFoundError(
                f"no CLIP called {name!r}: {str(folder / needed)!r} does not exist. Give {' or '.join(EMBEDDED)}, "
                "a folder in open_clip's format, 'ViT-B-32/openai' or another pair of open_clip's, or 'hf-hub:...'"
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
        network = open_clip.create_model(f"local-dir:{folder}")
        own = load_file(folder / PROMPTS) if (folder / PROMPTS).is_file() else {}
        attach(network, own)
        clip = Clip(network, open_clip.get_tokenizer(f"local-dir:{folder}"), name, config)
        clip.text_transform = transform_from(own)
        return clip
    except Exception as error:
        raise ValueError(f"cannot read the CLIP in {str(folder)!r}: {error}; restore or retrain it") from error


def _load_remote(architecture: str, pretrained: str | None) -> Clip:
    """A CLIP of the hub, or of another place that open_clip fetches from; what the cache holds is not fetched again."""
    import open_clip

    hub.fetch(f"{architecture}/{pretrained}" if pretrained else architecture)

    tags = open_clip.list_pretrained_tags_by_model(architecture) if pretrained else []
    if pretrained and pretrained not in tags:
        raise ValueError(
            f"open_clip knows no {architecture!r} weights {pretrained!r}; choose one of: {', '.join(tags)}"
        )
    name = f"{architecture}/{pretrained}" if pretrained else architecture
    quick = bool(pretrained) and open_clip.get_pretrained_cfg(architecture, pretrained).get("quick_gelu", False)
    try:
        network = open_clip.create_model(
            architecture, pretrained=pretrained, force_quick_gelu=quick, require_pretrained=True
        )
        config = open_clip.get_model_config(architecture) | ({"quick_gelu": True} if quick else {})
        return Clip(network, open_clip.get_tokenizer(architecture), name, config)
    except Exception as error:
        raise OSError(
            f"could not fetch {name!r} ({type(error).__name__}: {error}). It is downloaded once, 0.6 GB for a ViT-B; "
            "connect to the network, or put a copy in the hub's cache, or give a local folder instead"
        ) from error


def modules_of(classifier: Callable) -> list[nn.Module]:
    """A module itself; of any other callable the modules that it closes over, is bound to, names or keeps."""
    found, queue, seen = [], [classifier], set()
    while queue:
        held = queue.pop()
        if id(held) not in seen and isinstance(held, nn.Module):
            found.append(held)
        elif id(held) not in seen:
            queue += _held_by(held)
        seen.add(id(held))
    return found


def _held_by(function: Any) -> list:
    if isinstance(function, partial):
        return [function.func, *function.args, *function.keywords.values()]
    if isinstance(function, MethodType):
        return [function.__self__]
    if not isinstance(function, FunctionType):
        kept = vars(function).values() if callable(function) and hasattr(function, "__dict__") else ()
        return [part for part in kept if isinstance(part, nn.Module)]
    names = getclosurevars(function)
    return [] if function.__module__.startswith("torch.") else [*names.nonlocals.values(), *names.globals.values()]


def logits_of(classifier: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The checked logits (n, classes) of any classifier; images of a dtype that it does not take are a ValueError."""
    try:
        return check_logits(classifier(images), len(images))
    except RuntimeError as error:
        own = {weight.dtype for module in modules_of(classifier) for weight in module.parameters()}
        if not own or images.dtype in own:
            raise
        remedy = (
            f"its weights are {' or '.join(sorted(map(str, own)))}: convert the images or the model with .to(dtype)"
        )
        raise ValueError(f"the classifier does not take images of {images.dtype} ({error}); {remedy}") from error
