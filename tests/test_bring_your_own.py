"""Bring your own: any classifier over pixels, by every attack, by every defense that needs no CLIP, and by the audit.

All models are small and random. What is asked of each pair is what must hold of any: images in range and ball, of the
same shape and type, some of which fall; and a model, a process and images that are left as they were.
"""

import random
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from elsewhere import Elsewhere
from robustclip.attacks import APGD, FGSM, PGD, AutoAttack, Aware, Fast, FeaturePGD, FromTorchattacks, Square
from robustclip.attacks import UniformNoise as Noise
from robustclip.attacks.base import ImageAdversary, frozen
from robustclip.audit import CHECKS, audit
from robustclip.component import digest_of
from robustclip.data.sources import load_samples
from robustclip.models import Clip, ZeroShotClassifier
from robustclip.study.named import DEFENSES, named_defense

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's compilers, about each other
CLASSES, IMAGES, EPS = 5, 4, 0.2
PREPROCESS = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


# --- models -----------------------------------------------------------------------------------------------------------


@cache
def pictures() -> Tensor:
    return load_samples("cifar10", n=IMAGES).images


def told_apart(model: nn.Module) -> nn.Module:
    """The same model with statistics of the pictures in its norms, and a head that tells the pictures apart."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.train()(pictures())
        head = [module for module in model.eval().modules() if isinstance(module, nn.Linear)][-1]
        head.weight /= model(pictures()).std(0).mean()
        head.bias -= model(pictures()).mean(0)
    return model


def convolutions() -> nn.Module:
    begin = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    return told_apart(nn.Sequential(*begin, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 5)))


def of_torchvision() -> nn.Module:
    import torchvision

    return told_apart(torchvision.models.mobilenet_v2(num_classes=CLASSES, width_mult=0.1))


def of_timm(name: str, **settings) -> nn.Module:
    import timm

    return told_apart(timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings))


def vit() -> nn.Module:
    return of_timm("test_vit", img_size=32, patch_size=8)


def zero_shot(network: nn.Module) -> ZeroShotClassifier:
    import open_clip

    network.visual.preprocess_cfg = PREPROCESS
    clip = Clip(network, open_clip.get_tokenizer("ViT-B-32"), "random")
    return with_own_texts(clip)


def with_own_texts(clip: Clip) -> ZeroShotClassifier:
    """A classifier whose texts are the features of the pictures, and of none: random texts tell no pictures apart."""
    seen = clip.raw_images(pictures().to(clip.logit_scale.dtype))
    texts = nn.functional.normalize(torch.cat([seen, -seen.mean(0, keepdim=True)]))
    return ZeroShotClassifier(clip, ["a cat", "a dog", "a ship", "a red square", "nothing"], texts)


def clip() -> ZeroShotClassifier:
    import open_clip

    tower = {"image_size": 32, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16}
    return zero_shot(open_clip.model.CLIP(16, tower, TEXT))


def siglip() -> ZeroShotClassifier:
    """As open_clip builds SigLIP: a timm tower with a pooler, a text tower without a mask, a bias beside the scale."""
    import open_clip

    tower = {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"}
    words = TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    scale = {"init_logit_scale": 2.3, "init_logit_bias": -10.0}
    return zero_shot(open_clip.model.CustomTextCLIP(64, tower, words, **scale))


def clip_in_double() -> ZeroShotClassifier:
    return with_own_texts(clip().clip.double())


class Half(nn.Module):
    """A model in half precision that casts the images itself."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype))


def function():
    model = convolutions()
    return lambda images: model(images)


def channels_last() -> nn.Module:
    return convolutions().to(memory_format=torch.channels_last)


MODELS = {
    "convolutions": convolutions,
    "a function": function,
    "torchvision": of_torchvision,
    "timm's ResNet": lambda: of_timm("test_resnet"),
    "timm's ViT": vit,
    "open_clip": clip,
    "SigLIP": siglip,
    "open_clip in float64": clip_in_double,
    "scripted": lambda: torch.jit.script(convolutions()),
    "traced": lambda: torch.jit.trace(convolutions(), pictures()[:2]),
    "compiled": lambda: torch.compile(convolutions(), backend="eager", dynamic=True),
    "float64": lambda: convolutions().double(),
    "float16 inside": lambda: Half(convolutions(), torch.float16),
    "bfloat16 inside": lambda: Half(convolutions(), torch.bfloat16),
    "channels last": channels_last,
    "in training mode": lambda: convolutions().train(),
    "on another device": convolutions,
}
CLIPS = ("open_clip", "SigLIP", "open_clip in float64")
MODES = {"on another device": Elsewhere}  # in which the model is used


def images_for(name: str) -> Tensor:
    """The pictures as a model takes them."""
    images = pictures().double() if name in ("float64", "open_clip in float64") else pictures().clone()
    return images.contiguous(memory_format=torch.channels_last) if name == "channels last" else images


@cache
def built(name: str):
    """A model, images that it takes, and what it says of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]()
    images = images_for(name)
    return model, images, decisions(model, images)


def decisions(model, images: Tensor) -> Tensor:
    with torch.no_grad(), frozen(model):
        return model(images).argmax(1)


def state(model) -> list:
    """All that an attack has to leave alone."""
    drawn = np.random.get_state()[1].tolist()  # noqa: NPY002
    found = [torch.get_rng_state().tolist(), drawn, random.getstate(), torch.is_grad_enabled()]
    if isinstance(model, nn.Module):
        tensors = [*model.named_parameters(), *model.named_buffers()]
        found += [(name, digest_of(value), value.requires_grad, value.grad) for name, value in tensors]
        found += [module.training for module in model.modules()]
    return found


# --- attacks ----------------------------------------------------------------------------------------------------------

ATTACKS = {
    "uniform noise": Noise(eps=EPS),
    "FGSM": FGSM(eps=EPS),
    "PGD": PGD(eps=EPS, steps=3),
    "PGD in l2": PGD(eps=6.0, steps=3, norm="l2", restarts=2),
    "CW, targeted": PGD(eps=EPS, steps=3, loss="margin", targets=2),
    "label-free": FeaturePGD(eps=EPS, steps=4),
    "APGD": APGD(eps=EPS, steps=5),
    "APGD-T": APGD(eps=EPS, steps=4, loss="dlr", targets=2),
    "Square": Square(eps=EPS, queries=60),
    "AutoAttack": AutoAttack(eps=EPS, steps=2, queries=10),
    "fast": Fast(attack=PGD(eps=EPS, steps=3)),
    "aware": Aware(eps=EPS, steps=3),
    "FAB": FromTorchattacks(name="FAB", eps=EPS, settings={"steps": 3}),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", MODELS)
def test_attack(name, attack):
    model, images, labels = built(name)
    before, pixels, attack = state(model), images.clone(), ATTACKS[attack]
    with MODES.get(name, nullcontext)():
        found = attack(model, images, labels)
    assert state(model) == before
    assert torch.equal(images, pixels)
    assert (found.shape, found.dtype, found.device) == (images.shape, images.dtype, images.device)
    assert not found.requires_grad
    assert 0 <= found.min() <= found.max() <= 1
    change = (found - images).flatten(1)
    size = change.norm(dim=1) if getattr(attack.inner, "norm", "linf") == "l2" else change.abs().amax(1)
    assert size.max() <= attack.eps + 1e-5
    assert size.max() > 0
    if not isinstance(attack, Noise):
        assert (decisions(model, found) != labels).any()


def test_no_attack_on_images_is_left_out():
    kinds, queue = set(), [ImageAdversary]
    while queue:
        queue += (kind := queue.pop()).__subclasses__()
        kinds |= {kind} if kind.__module__.startswith("robustclip.attacks.") and not kind.__subclasses__() else set()
    assert {kind.__name__ for kind in kinds} <= {type(attack).__name__ for attack in ATTACKS.values()} | {"OwnAttack"}


# --- defenses ---------------------------------------------------------------------------------------------------------

# Those that need no CLIP: one of each kind for all models, the others of these kinds for one.
KINDS = ("RN", "Mirror", "TTE", "Views-5", "Anti-adversary", "HD", "LPF", "Smoothing", "TTC", "SCC-spatial")
OTHERS = (
    *("TTE-released", "Ensemble", "TTC-open", "TTC-calibrated", "TTC-reversed", "TTC-zero", "TTC-pixels", "DOC"),
    *("DOC-open", "DOC-reversed", "MAC", "SCC-neither"),
)
OF_CLIPS = [name for name in DEFENSES if name not in KINDS + OTHERS]
KNOWN = {"keep": 0.1, "reverse": 0.25, "cosine": 0.025}


def little(name: str):
    """A defense with little work to do."""
    found = named_defense(name, 4 / 255, KNOWN)
    limits = {"count": 2, "copies": 2, "steps": 1, "texts": 2, "vectors": 1}
    return replace(found, **{field: most for field, most in limits.items() if getattr(found, field, 0) > most})


def defended_is_sound(name: str, defense: str) -> None:
    """An answer for each image, the same again, and a step of an attacker who knows it; nothing else has changed."""
    model, images, _ = built(name)
    if defense in OF_CLIPS and name in CLIPS:  # which may tune the prompts
        model = ZeroShotClassifier(model.clip, model.classes)
    before = state(model)
    with MODES.get(name, nullcontext)():
        defended = little(defense)(model).at(1)
        with torch.no_grad():
            answers, again = defended(images), defended(images)
        found = FGSM(eps=EPS)(defended.for_attack(), images, answers.argmax(1))
    assert answers.shape == (IMAGES, CLASSES)
    assert torch.equal(answers, again)
    assert answers.isfinite().all()
    assert found.dtype == images.dtype
    assert 0 < (found - images).abs().max() <= EPS + 1e-5
    assert state(model) == before


TRAINING = "in training mode"  # there its own statistics depend on the batch and change: no defense can mend that
NO_PRIOR, NO_WORDS = (
    r"the CLIP 'random' has no diffusion prior.*: give prior=",
    "whose words could be tuned; give a plain",
)
REFUSED = {("open_clip", "CLIPure-Diff"): NO_PRIOR, ("SigLIP", "CLIPure-Diff"): NO_PRIOR}
REFUSED |= {("SigLIP", defense): NO_WORDS for defense in ("TPT", "R-TPT")}
NO_CLIP = [(name, kind) for name in MODELS if name != TRAINING for kind in KINDS]


@pytest.mark.parametrize(("name", "defense"), [*NO_CLIP, *(("convolutions", other) for other in OTHERS)])
def test_defenses_that_need_no_clip(name, defense):
    defended_is_sound(name, defense)


@pytest.mark.parametrize("defense", OF_CLIPS)
@pytest.mark.parametrize("name", ["open_clip", "SigLIP"])
def test_defenses_that_need_a_clip_take_any(name, defense):
    if remedy := REFUSED.get((name, defense)):
        with pytest.raises(ValueError, match=remedy):
            defended_is_sound(name, defense)
    else:
        defended_is_sound(name, defense)


@pytest.mark.parametrize("defense", OF_CLIPS)
def test_defenses_that_need_a_clip_say_so(defense):
    with pytest.raises(ValueError, match="a function has neither image features nor prompts to attack"):
        defended_is_sound("a function", defense)


# --- the audit --------------------------------------------------------------------------------------------------------

AUTOCAST = "`audit.precision` runs a model in float16 under autocast to bfloat16, which torch refuses"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.xfail(reason=AUTOCAST, strict=True)] * (name == "float16 inside"))
             for name in MODELS],
)  # fmt: skip
def test_audit(name, monkeypatch):
    """All checks run, and a good attack raises no flag of the kind that says the attack itself is broken."""
    monkeypatch.setattr("robustclip.audit.QUERIES", 20)
    model, images, labels = built(name)
    before = state(model)
    with MODES.get(name, nullcontext)():
        report = audit(model, PGD(eps=EPS, steps=3), images, labels)
    assert state(model) == before
    assert [finding.check for finding in report.findings] == list(CHECKS)
    assert not {"budget", "random-output", "inference-work", "gradients"} & set(report.flags)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_in_half_precision_are_refused_by_attacks_and_taken_by_the_audit(dtype):
    _, images, labels = built("convolutions")
    with torch.random.fork_rng():
        half = convolutions().to(dtype)
    with pytest.raises(ValueError, match="too coarse for a budget to be kept"):
        PGD(eps=EPS)(half, images.to(dtype), labels)
    with pytest.raises(ValueError, match=r"does not take images of torch.float32 .*\.to\(dtype\)"):
        PGD(eps=EPS)(half, images, labels)
    report = audit(half, PGD(eps=EPS, steps=2), images.to(dtype), labels, checks=("budget", "gradients"))
    assert report.flags == ()


# --- other states of a model ------------------------------------------------------------------------------------------


def test_a_frozen_script():
    """It has neither weights that ask for gradients nor a mode."""
    script, images = torch.jit.freeze(built("scripted")[0].eval()), pictures()
    labels = script(images).argmax(1)
    assert (script(FGSM(eps=EPS)(script, images, labels)).argmax(1) != labels).any()


def test_a_zero_shot_classifier_cast_to_float64():
    model, images = clip(), pictures()
    expected = model(images)
    assert torch.allclose(model.double()(images.double()).float(), expected, atol=1e-3)
