"""Attacks on images and texts at once: what they maximise, what they keep, and who wins an image."""

import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional as F

from robustclip import models
from robustclip.attacks import FGSM, PGD, FeaturePGD
from robustclip.attacks.base import Pair, Target, predictions
from robustclip.attacks.losses import LOSSES
from robustclip.attacks.multimodal import (
    SGA,
    CoAttack,
    MultimodalAttack,
    SepAttack,
    divergence,
    pooled,
)
from robustclip.attacks.text import BertAttack, LabelAwareBertAttack, TextAttack
from robustclip.classes import Classes
from robustclip.component import component
from robustclip.data.roles import role, tinyworld_samples
from robustclip.defenses.base import Defense
from robustclip.models import ZeroShotClassifier
from robustclip.randomness import own_noise

SIDE, DIMENSIONS = 6, 16
WORDS, MANY = ("crimson", "azure", "olive", "beige"), tuple(map(str, range(40)))
PROMPTS = ["a red star", "a blue disk", "a red ring", "a blue moon", "a red leaf", "a blue fish"]
CALLS = Counter()
CLASSES = Classes([prompt.split(" ", 1)[1] for prompt in PROMPTS], PROMPTS)


class TinyClip(nn.Module):
    """A linear image tower, and texts that are bags of words; like a CLIP in everything the attacks touch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(DIMENSIONS, 3 * SIDE * SIDE, generator=generator))
        self.scale, self.kept, self.seen = nn.Parameter(torch.tensor(20.0)), {}, []
        self.noise = nn.Dropout(0.5)

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.scale

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def remembered(self, key, compute):
        known = self.kept.setdefault(self.weight._version, {})
        return known[key] if key in known else known.setdefault(key, compute())

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(images.shape))
        pixels = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear") if images.shape[-1] != SIDE else images
        return F.normalize(self.noise((pixels.flatten(1) - 0.5).to(self.weight.dtype) @ self.weight.T), dim=-1)

    def encode_texts(self, texts) -> torch.Tensor:
        return F.normalize(
            torch.stack([sum(map(word_vector, text.split() or [""])) for text in texts]).to(self.weight), dim=-1
        )

    def text_features(self, texts) -> torch.Tensor:
        with torch.no_grad():
            return self.encode_texts(texts)


def word_vector(word: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
    return torch.randn(DIMENSIONS, generator=generator)


@component
class Swap(TextAttack):
    """Replaces the second word by the one of a short list that moves the text furthest, from itself or an image."""

    words: tuple[str, ...] = WORDS

    def __call__(self, clip, prompts) -> list[str]:
        CALLS["prompts"] += 1
        return self.against(clip, prompts, clip.text_features(prompts)) if len(prompts) else []

    def against(self, clip, texts, image_features) -> list[str]:
        return [min(self.options(text), key=lambda option: float(clip.text_features([option])[0] @ feature))
                for text, feature in zip(texts, image_features, strict=True)]  # fmt: skip

    def options(self, text: str) -> list[str]:
        first, _, *rest = text.split(" ")
        return [text, *(" ".join([first, word, *rest]) for word in self.words)]


SWAP = Swap()
ATTACKS = [
    SepAttack(image=PGD(eps=0.05, steps=4), text=SWAP),
    SepAttack(image=PGD(eps=0.05, steps=4, loss="margin", targets=2), text=SWAP, reading="attacked"),
    SepAttack(image=PGD(eps=0.05, steps=4, restarts=2), text=SWAP, reading="worst"),
    CoAttack(eps=0.05, steps=4, text=SWAP),
    CoAttack(eps=0.05, steps=4, text=SWAP, start="random", step_size=0.04, seed=3),
    SGA(eps=0.05, steps=3, text=SWAP),
]
table = pytest.mark.parametrize("attack", ATTACKS, ids=repr)


def tiny_clip(seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyClip:
    return TinyClip(seed).to(dtype).eval()


def tiny_images(n: int = 24, seed: int = 0, side: int = SIDE) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def some_classes(prompts: list[str]) -> Classes:
    return Classes(prompts, prompts)


def own_labels(clip, images: torch.Tensor) -> torch.Tensor:
    """What the clean classifier says, with every sixth label wrong."""
    with torch.no_grad():
        right = ZeroShotClassifier(clip, PROMPTS)(images).argmax(1)
    return torch.where(torch.arange(len(images)) % 6 == 5, (right + 1) % len(PROMPTS), right)


def some_captions(n: int) -> list[list[str]]:
    """One to three per image."""
    return [[f"the {color} thing {row}" for color in ("red", "old", "big")[: 1 + row % 3]] for row in range(n)]


def judged(pair: Pair, labels: torch.Tensor, clip, defense=None) -> torch.Tensor:
    """Predicted classes of a pair."""
    return predictions(pair, labels, Target(clip, pair.classes, defense).classifier)


def stands(attack, clip, images, labels, defense=None) -> torch.Tensor:
    """Per image, whether every pair is classified correctly."""
    pairs = attack.pairs(Target(clip, CLASSES, defense), images, labels)
    return torch.stack([judged(pair, labels, clip, defense) == labels for pair in pairs]).all(0)


def all_images(attack, clip, images, labels) -> list[torch.Tensor]:
    """All images that an attack makes, in classification and in retrieval."""
    found = [pair.images for pair in attack.pairs(Target(clip, CLASSES), images, labels)]
    return [*found, attack.on_captions(clip, images, some_captions(len(images)))[0]]


def changed(attack, **settings):
    """The attack with another setting of its image side."""
    if isinstance(attack, SepAttack):
        return replace(attack, image=replace(attack.image, **settings))
    return replace(attack, **settings)


# --- what every attack keeps ------------------------------------------------------------------------------------------


@given(
    attack=st.sampled_from(ATTACKS),
    eps=st.floats(0, 1),
    side=st.sampled_from([4, SIDE]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_the_budget_is_kept(attack, eps, side, seed):
    """To float32 rounding, from images that touch the pixel bounds, for labels right or wrong."""
    attack, clip = changed(attack, eps=eps), tiny_clip()
    images = tiny_images(6, seed, side).mul(1.4).sub(0.2).clamp(0, 1)
    assert attack.eps == eps
    for found in all_images(attack, clip, images, own_labels(clip, images)):
        assert (found - images).abs().max() <= eps * (1 + 1e-5) + 3e-7
        assert 0 <= found.min() <= found.max() <= 1
        assert found.dtype == images.dtype
        assert torch.isfinite(found).all()


@table
def test_zero_budget_gives_the_images_back_and_still_attacks_the_texts(attack):
    attack = changed(attack, eps=0)
    clip, images = tiny_clip(), tiny_images(7)
    assert all(torch.equal(found, images) for found in all_images(attack, clip, images, own_labels(clip, images)))
    assert attack.on_captions(clip, images, some_captions(7))[1] != some_captions(7)


@table
@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_state_are_left_as_they_were(attack, training):
    clip, images = tiny_clip().train(training), tiny_images().requires_grad_()
    clip.noise.train(not training)
    labels, captions = torch.arange(24) % 6, some_captions(24)
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    modes = [module.training for module in clip.modules()]
    rng, numpy_rng = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    pixels = images.detach().clone()

    pairs = attack.pairs(Target(clip, CLASSES), images, labels)
    found, _ = attack.on_captions(clip, images, captions)

    assert not found.requires_grad
    assert not any(pair.images.requires_grad for pair in pairs)
    assert torch.equal(images, pixels)
    assert images.grad is None
    assert captions == some_captions(24)
    assert all(weight.requires_grad and weight.grad is None for weight in clip.parameters())
    assert [module.training for module in clip.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in clip.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert (np.random.get_state()[1] == numpy_rng).all()  # noqa: NPY002


@table
def test_neighbors_do_not_matter(attack):
    """One by one and in another order every image fares the same; so do its texts."""
    clip, images = tiny_clip(dtype=torch.float64), tiny_images(9).double()
    labels, captions = own_labels(clip, images), some_captions(9)
    together = attack.pairs(Target(clip, CLASSES), images, labels)
    found, texts = attack.on_captions(clip, images, captions)
    for row in (4, 0, 8):
        only = slice(row, row + 1)
        alone = attack.pairs(Target(clip, CLASSES), images[only], labels[only])
        for one, many in zip(alone, together, strict=True):
            assert torch.allclose(one.images[0], many.images[row], atol=1e-12)
            assert one.classes == many.classes
            assert one.own == (many.own and many.own[only])
        image, text = attack.on_captions(clip, images[only], captions[only])
        assert torch.allclose(image[0], found[row], atol=1e-12)
        assert text == texts[only]


@table
def test_the_same_twice_and_another_with_another_seed(attack):
    clip, images = tiny_clip(), tiny_images(6)
    labels = own_labels(clip, images)
    other = changed(attack, seed=9)
    first, again, others = (all_images(one, clip, images, labels) for one in (attack, attack, other))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, others, strict=True))


@table
def test_empty_batches(attack):
    clip, nothing = tiny_clip(), tiny_images(0)
    (pair,) = attack.pairs(Target(clip, CLASSES), nothing, torch.zeros(0, dtype=torch.long))
    assert pair.images.shape == (0, 3, SIDE, SIDE)
    found, captions = attack.on_captions(clip, nothing, [])
    assert (len(found), captions) == (0, [])


@table
def test_representations_paste_back(attack):
    assert eval(repr(attack)) == attack


@pytest.mark.parametrize("attack", [SepAttack(image=PGD(eps=0.1)), CoAttack(eps=0.1), SGA(eps=0.1)], ids=repr)
def test_defaults_are_not_shown(attack):
    assert attack.text == BertAttack()
    assert "BertAttack" not in repr(attack)
    assert hash(attack) == hash(eval(repr(attack)))


def test_equal_labels_of_any_integer_type():
    clip, images = tiny_clip(), tiny_images(5)
    labels = own_labels(clip, images)
    for attack in ATTACKS:
        (*_, one), (*_, two) = (attack.pairs(Target(clip, CLASSES), images, kind) for kind in (labels, labels.int()))
        assert torch.equal(one.images, two.images)
        assert torch.equal(judged(one, labels, clip), judged(two, labels.int(), clip))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SepAttack(image=PGD(eps=0.1), reading="best"), "unknown reading 'best'.*released, attacked, worst"),
        (lambda: SepAttack(image=PGD(eps=0.1), text=LabelAwareBertAttack()), "LabelAware.*no labelled images"),
        (lambda: CoAttack(eps=0.1, text=str.upper), "text=.*give a text attack"),
        (lambda: SGA(eps=0.1, text=str.upper), "text=.*give a BertAttack"),
        (lambda: CoAttack(eps=2), "eps=2 .*between 0 and 1"),
        (lambda: CoAttack(eps=0.1, steps=0), "steps=0"),
        (lambda: CoAttack(eps=0.1, start="left"), "unknown start 'left'.*one-sided, random"),
        (lambda: CoAttack(eps=0.1, weight=-1), "weight=-1"),
        (lambda: SGA(eps=0.1, scales=()), "scales=0 "),
        (lambda: SGA(eps=0.1, scales=(1, 0)), "scales=0 "),
        (lambda: SGA(eps=0.1, noise=-0.1), "noise=-0.1"),
        (lambda: SGA(eps=0.1, seed=-1), "seed=-1"),
        (lambda: SGA(eps=0.1, step_size=-1), "step_size=-1"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@table
@pytest.mark.parametrize(
    ("images", "labels", "captions", "message"),
    [
        (tiny_images(3) * 2, [0, 0, 0], [["a b"]] * 3, r"\[0, 1\]"),
        (tiny_images(3), [0, 0], [["a b"]] * 2, "2 labels|3 lists"),
        (tiny_images(3), [0, 0, 6], [["a b"], [], ["a b"]], "0 to 5|one text or more"),
        (tiny_images(3), [0.0, 1.0, 2.0], ["a b", "a c", "a d"], "integers|3 lists"),
    ],
)
def test_bad_input(attack, images, labels, captions, message):
    with pytest.raises(ValueError, match=message):
        attack.pairs(Target(tiny_clip(), CLASSES), images, torch.tensor(labels))
    with pytest.raises(ValueError, match=message):
        attack.on_captions(tiny_clip(), images, captions)


@pytest.mark.parametrize("image", [FGSM(eps=0.1), PGD(eps=0.1, start="image")], ids=repr)
def test_retrieval_needs_an_ascent_that_needs_no_labels(image):
    with pytest.raises(ValueError, match="cannot attack without labels"):
        SepAttack(image=image, text=SWAP).on_captions(tiny_clip(), tiny_images(2), some_captions(2))


# --- scoring ----------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), n=st.integers(1, 12), classes=st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_own_texts_score_as_in_a_loop(seed, n, classes):
    """One classifier per image, in which only the true class's prompt is another; own texts may repeat or be clean."""
    clip, images = tiny_clip(seed % 7), tiny_images(n, seed)
    random = np.random.default_rng(seed)
    labels = torch.from_numpy(random.integers(0, classes, n))
    own = [str(random.choice([PROMPTS[label], "a crimson star", "a dull disk"])) for label in labels]
    expected = []
    for row in range(n):
        prompts = PROMPTS[:classes]
        prompts[labels[row]] = own[row]
        expected.append(int(ZeroShotClassifier(clip, prompts)(images[row : row + 1]).argmax(1)))
    assert judged(Pair(images, some_classes(PROMPTS[:classes]), own), labels, clip).tolist() == expected


def test_an_own_text_that_is_another_class_prompt_ties_with_it():
    """Whichever the label, the class listed first wins."""
    clip, images = tiny_clip(), tiny_images(40)
    labels = torch.arange(40) % 2
    own = [PROMPTS[1 - label] for label in labels]
    assert not judged(Pair(images, some_classes(PROMPTS[:2]), own), labels, clip).any()


def test_pairs_without_own_texts_are_scored_with_their_prompts():
    clip, images = tiny_clip(), tiny_images()
    logits = ZeroShotClassifier(clip, PROMPTS[::-1])(images)
    pair = Pair(images, some_classes(PROMPTS[::-1]))
    assert torch.equal(judged(pair, torch.zeros(24), clip), logits.argmax(1))
    dark = lambda classifier: lambda images: -classifier(images)  # noqa: E731
    assert torch.equal(judged(pair, torch.zeros(24), clip, dark), logits.argmin(1))


def test_a_prompt_set_is_attacked_once_per_model_and_attack():
    clip, images = tiny_clip(), tiny_images(4)
    labels = own_labels(clip, images)
    CALLS.clear()
    for attack in ATTACKS[:5] * 2:
        attack.pairs(Target(clip, CLASSES), images, labels)
    assert CALLS["prompts"] == 1
    replace(ATTACKS[3], text=Swap(words=("odd",))).pairs(Target(clip, CLASSES), images, labels)
    ATTACKS[3].pairs(Target(clip, some_classes(PROMPTS[:4])), images, labels % 4)
    assert CALLS["prompts"] == 3
    with torch.no_grad():
        clip.weight.mul_(2)
    ATTACKS[3].pairs(Target(clip, CLASSES), images, labels)
    assert CALLS["prompts"] == 4


# --- Sep-Attack -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("eps", [0.002, 0.01, 0.03])
def test_the_worst_reading_is_never_weaker(loss, eps):
    """Per image: than the other readings, than the image attack and the text attack alone, and than no attack."""
    clip, images = tiny_clip(3), tiny_images(120)
    labels = own_labels(clip, images)
    pgd = PGD(eps=eps, steps=5, loss=loss)
    worst, *others = (stands(SepAttack(image=pgd, text=SWAP, reading=reading), clip, images, labels)
                      for reading in ("worst", "released", "attacked"))  # fmt: skip
    classifier = ZeroShotClassifier(clip, PROMPTS)
    swapped = ZeroShotClassifier(clip, SWAP(clip, PROMPTS))
    with torch.no_grad():
        alone = [classifier(pgd(classifier, images, labels)), swapped(images), classifier(images)]
    for other in [*others, *(logits.argmax(1) == labels for logits in alone)]:
        assert (other | ~worst).all()
    if eps == 0.002:
        assert worst.sum() < min(int(other.sum()) for other in others), "the union is more than each"


@pytest.mark.parametrize("attack", [changed(attack, eps=0.01) for attack in ATTACKS[:3]], ids=repr)
def test_the_worst_reading_holds_the_three_pairs(attack):
    """Image alone, text alone, both; the third is the attack against the attacked prompts wherever that succeeds."""
    attack, clip, images = replace(attack, reading="worst"), tiny_clip(), tiny_images()
    labels, attacked = own_labels(clip, images), CLASSES.with_prompts(SWAP(clip, PROMPTS))
    alone, text, both = attack.pairs(Target(clip, CLASSES), images, labels)
    assert [pair.classes for pair in (alone, text, both)] == [CLASSES, attacked, attacked]
    assert torch.equal(text.images, images)
    aimed = attack.image(ZeroShotClassifier(clip, attacked), images, labels)
    fooled = judged(Pair(aimed, attacked), labels, clip) != labels
    assert fooled.any()
    assert torch.equal(both.images[fooled], aimed[fooled])
    assert torch.equal(both.images[~fooled], alone.images[~fooled])


@pytest.mark.parametrize(
    "attack",
    [
        PGD(eps=0.01, steps=6),
        PGD(eps=0.01, steps=6, restarts=3),
        PGD(eps=0.01, steps=6, loss="margin"),
        PGD(eps=0.1, steps=6, norm="l2"),
    ],
    ids=repr,
)
def test_without_a_stop_it_fools_wherever_it_does_with_one_and_climbs_higher(attack):
    clip, images = tiny_clip(), tiny_images(60)
    labels, classifier = own_labels(clip, images), ZeroShotClassifier(clip, PROMPTS)
    early, late = (run(classifier, images, labels) for run in (attack, attack.unstopped()))
    with torch.no_grad():
        first, last = classifier(early), classifier(late)
    fooled = first.argmax(1) != labels
    right = classifier(images).argmax(1) == labels
    assert (last.argmax(1) != labels)[fooled].all()
    assert (fooled & right).any()
    before, after = (LOSSES[attack.loss](logits, labels, None)[fooled & right] for logits in (first, last))
    assert (after >= before - 1e-5).all(), "the first success is one of the points to choose from"
    assert (after - before).mean() > 0.1
    assert not (late == images).flatten(1).all(1).any(), "images that were wrong before are attacked, too"


def test_without_a_stop_a_point_that_fools_is_preferred_to_one_of_higher_loss():
    """From p = (.45, .55, 0), where class 0 loses, to (.4, .3, .3), where it wins at a higher cross-entropy."""

    def classifier(points):
        t = ((points.flatten(1).mean(1) - 0.5) / 0.1)[:, None].clamp(0, 1)
        return (torch.tensor([0.45, 0.55, 1e-6]) + t * torch.tensor([-0.05, -0.25, 0.3])).log()

    images, labels = torch.full((2, 3, SIDE, SIDE), 0.5), torch.zeros(2, dtype=torch.long)
    assert classifier(images + 0.1).argmax(1).tolist() == [0, 0]
    found = PGD(eps=0.1, steps=20, start="image", stop=False)(classifier, images, labels)
    assert classifier(found).argmax(1).tolist() == [1, 1]
    assert (found - images).abs().max() > 0.03, "the last one that fools"


def test_other_image_attacks_run_as_they_are():
    clip, images = tiny_clip(), tiny_images()
    labels, classifier = own_labels(clip, images), ZeroShotClassifier(clip, PROMPTS)
    attack = SepAttack(image=FGSM(eps=0.01), text=SWAP)
    (pair,) = attack.pairs(Target(clip, CLASSES), images, labels)
    assert torch.equal(pair.images, attack.image(classifier, images, labels))


def test_in_retrieval_sep_attack_is_co_attack_without_texts():
    """Both maximise KL(softmax(u) || softmax(u')); with weight 0 Co-Attack does not look at its texts."""
    clip, images, captions = tiny_clip(), tiny_images(), some_captions(24)
    sep = SepAttack(image=PGD(eps=0.05, steps=5, step_size=0.02, seed=4), text=SWAP)
    co = CoAttack(eps=0.05, steps=5, step_size=0.02, seed=4, weight=0, start="random", text=SWAP)
    (one, texts), (two, others) = (attack.on_captions(clip, images, captions) for attack in (sep, co))
    assert torch.equal(one, two)
    assert texts == others
    assert [len(group) for group in texts] == [len(group) for group in captions]
    assert texts[5] == SWAP(clip, captions[5])


# --- Co-Attack --------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), dimensions=st.sampled_from([512, 768, 1024]), share=st.floats(-1, 1))
@settings(max_examples=60, deadline=None)
def test_the_divergence_of_unit_vectors_is_nearly_one_minus_cosine_over_d(seed, dimensions, share):
    """It is SciPy's entropy, half the variance of u - u' within 2 %, and so (1 - cos) / d where the means agree."""
    u, v = F.normalize(torch.randn(2, 50, dimensions, generator=torch.Generator().manual_seed(seed)).double(), dim=-1)
    v = F.normalize(share * u + (1 - abs(share)) * v, dim=-1)
    found = divergence(lambda points: v[points], ((1, u),), torch.arange(50), torch.arange(50))[0]
    assert torch.allclose(found, (u - v).var(1, unbiased=False) / 2, rtol=0.02, atol=1e-12)
    nearly = torch.isclose(found, (1 - (u * v).sum(1)) / dimensions, rtol=0.02, atol=1e-12)
    assert nearly.double().mean() >= 0.9
    truth = [stats.entropy(one.softmax(0), two.softmax(0)) for one, two in zip(u[:3], v[:3], strict=True)]
    np.testing.assert_allclose(found[:3], truth, rtol=1e-6, atol=1e-15)


def test_float32_features_are_compared_in_double_precision():
    """At an angle of 0.01 the divergence is 1e-7: in float32 a softmax would leave noise of it."""
    u = F.normalize(torch.randn(64, 512, generator=torch.Generator().manual_seed(1)).double(), dim=1)
    v = F.normalize(u + 0.01 * u.roll(1, 0), dim=1)
    rows = torch.arange(64)
    single = divergence(lambda points: v.float(), ((1, u.float().double()),), rows, rows)[0]
    assert torch.allclose(single, (1 - (u * v).sum(1)) / 512, rtol=0.02)


def test_the_mean_distribution_stands_for_several_captions():
    """mean_m KL(p_m || q) - KL(mean_m p_m || q) is the same for every q."""
    clip, captions = tiny_clip(), [["a red star", "a blue star", "the olive thing"], ["a red star"]]
    features = [clip.text_features(group).double() for group in captions]
    means = pooled(clip, captions, lambda texts: texts.softmax(1)).log()
    points = F.normalize(torch.randn(7, DIMENSIONS, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    for row, group in enumerate(features):
        apart = torch.stack([
            sum(F.kl_div(q.log_softmax(0), p.softmax(0), reduction="sum") for p in group) / len(group) for q in points
        ])  # fmt: skip
        joint = divergence(lambda where: points[where], ((1, means),), torch.arange(7), torch.full((7,), row))[0]
        assert torch.allclose(apart - joint, (apart - joint)[0].expand(7), atol=1e-12)


def plain_co_attack(clip, images, texts, labels, eps, steps, weight, start):
    """Co-Attack's image step written out again, one image at a time; of all iterates the best."""
    results = []
    for row, label in enumerate(labels.tolist()):
        image = images[row : row + 1]
        u, v = clip.encode_images(image).detach(), clip.text_features([texts[label]])
        noise = own_noise(image, 0)
        point = (image + eps * (noise.abs() if start == "one-sided" else noise)).clamp(0, 1)
        best, best_loss = None, -torch.inf
        for _ in range(steps + 1):
            point = point.detach().requires_grad_()
            features = clip.encode_images(point)
            away, toward = (F.kl_div(features.log_softmax(1), one.softmax(1), reduction="sum") for one in (u, v))
            loss = away + weight * toward
            if loss > best_loss:
                best, best_loss = point.detach(), loss.item()
            loss.backward()
            moved = point.detach() + 1.25 * eps / steps * point.grad.sign()
            point = torch.minimum(torch.maximum(moved, image - eps), image + eps).clamp(0, 1)
        results.append(best)
    return torch.cat(results)


@pytest.mark.parametrize("start", ["one-sided", "random"])
@pytest.mark.parametrize(("steps", "weight"), [(1, 3), (10, 3), (5, 0.5)])
def test_co_attack_is_what_its_equation_says(start, steps, weight):
    clip, images = tiny_clip(dtype=torch.float64), tiny_images(8).double()
    labels = torch.arange(8) % 6
    attack = CoAttack(eps=0.04, steps=steps, weight=weight, start=start, text=SWAP)
    (pair,) = attack.pairs(Target(clip, CLASSES), images, labels)
    attacked = SWAP(clip, PROMPTS)
    assert pair.classes.prompts == tuple(attacked)
    assert pair.own is None
    expected = plain_co_attack(clip, images, attacked, labels, 0.04, steps, weight, start)
    assert torch.allclose(pair.images, expected, atol=1e-9)


def test_co_attack_leaves_its_texts_and_itself():
    """The mean cosine to the attacked prompt falls most with a large weight, that to the clean image with weight 0."""
    clip, images = tiny_clip(), tiny_images()
    labels, cosines = own_labels(clip, images), {}
    for weight in (0, 3, 1000):
        (pair,) = CoAttack(eps=0.03, weight=weight, text=SWAP).pairs(Target(clip, CLASSES), images, labels)
        with torch.no_grad():
            features = clip.encode_images(pair.images)
            away = (features * clip.encode_images(images)).sum(1).mean()
            toward = (features * clip.text_features(pair.classes.prompts)[labels]).sum(1).mean()
        cosines[weight] = (away.item(), toward.item())
    assert cosines[0][0] < cosines[3][0] < cosines[1000][0] < 0.99
    assert cosines[0][1] > cosines[3][1] > cosines[1000][1]


def test_one_sided_starts_lie_above_the_image():
    images = tiny_images(40).mul(0.5).add(0.2)
    starts = {
        start: PGD(eps=0.1, seed=5, start=start).first_points(images) - images for start in ("one-sided", "random")
    }
    assert -1e-7 <= starts["one-sided"].min() < 1e-3
    assert 0.099 < starts["one-sided"].max() <= 0.1 + 1e-7
    assert starts["one-sided"].mean() == pytest.approx(0.05, abs=2e-3)
    assert starts["random"].min() < -0.099
    assert (PGD(eps=1, start="one-sided").first_points(images) <= 1).all()


# --- SGA --------------------------------------------------------------------------------------------------------------


def test_sga_without_scales_and_noise_is_an_ascent_away_from_its_texts():
    """max -cos(f_I(x'), v'), written with the linear tower's own gradient steps; the text first follows the image."""
    clip, images = tiny_clip(dtype=torch.float64), tiny_images(8).double()
    labels = torch.arange(8) % 6
    attack = SGA(eps=0.2, steps=6, scales=(1,), noise=0, text=Swap(words=MANY))
    (pair,) = attack.pairs(Target(clip, CLASSES), images, labels)
    clean = [PROMPTS[label] for label in labels]
    with torch.no_grad():
        first = attack.text.against(clip, clean, clip.encode_images(images))
        second = attack.text.against(clip, clean, clip.encode_images(pair.images))
    texts = clip.text_features(first)
    assert (pair.classes, pair.own) == (CLASSES, second)
    start = (images + 0.2 * own_noise(images, 0)).clamp(0, 1)
    point, best, highest = start, images.clone(), torch.full((8,), -torch.inf, dtype=torch.float64)
    for _ in range(7):
        point = point.detach().requires_grad_()
        losses = -(clip.encode_images(point) * texts).sum(1)
        better = losses.detach() > highest
        best[better], highest[better] = point.detach()[better], losses.detach()[better]
        (gradient,) = torch.autograd.grad(losses.sum(), point)
        point = (images + (point.detach() + 0.05 * gradient.sign() - images).clamp(-0.2, 0.2)).clamp(0, 1)
    assert torch.allclose(pair.images, best, atol=1e-9)


def test_the_last_texts_of_sga_are_those_against_the_attacked_image():
    clip, images, captions = tiny_clip(), tiny_images(12), [["the red thing", "an old one", "a wide road"]] * 12
    attack = SGA(eps=0.5, steps=5, scales=(1,), noise=0, text=Swap(words=MANY))
    found, texts = attack.on_captions(clip, images, captions)
    wanted, early = (
        [
            attack.text.against(clip, captions[0], feature.expand(3, -1))
            for feature in clip.encode_images(pictures).detach()
        ]
        for pictures in (found, images)
    )
    assert texts == wanted
    assert texts != early


def test_sga_sees_a_set_of_captions():
    """Their order and repetition do not matter; leaving one out does."""
    clip, images = tiny_clip(dtype=torch.float64), tiny_images(5).double()
    attack = SGA(eps=0.05, steps=3, text=SWAP)
    captions = [["the red thing", "an old one", "a wide road"]] * 5
    found, texts = attack.on_captions(clip, images, captions)
    for variant in ([group[::-1] for group in captions], [group * 2 for group in captions]):
        assert torch.allclose(attack.on_captions(clip, images, variant)[0], found, atol=1e-9)
    assert attack.on_captions(clip, images, [group[::-1] for group in captions])[1] == [group[::-1] for group in texts]
    assert not torch.allclose(attack.on_captions(clip, images, [group[:1] for group in captions])[0], found, atol=1e-3)


def test_sga_looks_at_all_scales():
    clip, images = tiny_clip(), tiny_images(3, side=8)
    SGA(eps=0.05, steps=2, text=SWAP).on_captions(clip, images, some_captions(3))
    sizes = Counter(shape[-1] for shape in clip.seen)
    assert sizes == {8: 2 + 3, 4: 3, 6: 3, 10: 3, 12: 3}, "two clean looks, and three turns of five scales"


def test_the_noise_of_sga_is_normal_and_new_in_each_turn():
    images, attack = torch.full((2, 3, 64, 64), 0.5), SGA(eps=0.1, text=SWAP)
    images[1, 0, 0, 0] = 0.6  # another image, other noise
    views = [[view - 0.5 for view in attack._views(images, images, turn)] for turn in (0, 1, 0)]
    assert [view.shape[-1] for view in views[0]] == [64, 32, 48, 80, 96]
    for view in views[0]:
        sample = view[0].flatten().double() / 0.05
        assert stats.kstest(sample[:4000].numpy(), "norm").pvalue > 1e-3
        assert not torch.equal(view[0], view[1])
    assert all(torch.equal(one, two) for one, two in zip(views[0], views[2], strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(views[0], views[1], strict=True))
    start = own_noise(images, 0)
    assert abs(np.corrcoef(start[0].flatten(), views[0][0][0].flatten())[0, 1]) < 0.05, "not the start again"


def test_the_image_of_sga_is_looked_at_with_this_noise(monkeypatch):
    """The clean image decides on it, not the point where the ascent is; and all views are images."""
    clip, attack, looks = tiny_clip(), SGA(eps=1e-6, steps=3, scales=(1, 0.5), text=SWAP), []
    images = tiny_images(4).mul(1.4).sub(0.2).clamp(0, 1)
    encode = clip.encode_images
    monkeypatch.setattr(clip, "encode_images", lambda views: looks.append(views.detach()) or encode(views))
    attack.on_captions(clip, images, some_captions(4))
    wanted = [view for turn in range(4) for view in attack._views(images, images, turn)]
    assert len(looks[1:-1]) == len(wanted) == 8
    for seen, view in zip(looks[1:-1], wanted, strict=True):
        assert torch.allclose(seen, view, atol=1e-5)
        assert 0 <= seen.min() <= seen.max() <= 1


# --- attackers who know a defense -------------------------------------------------------------------------------------


@component
class Mirrored(Defense):
    """Sees images mirrored and a little dark."""

    def logits(self, classifier, images, draw):
        return classifier(0.9 * images.flip(3))


def mirrored(classifier):
    """The same as a plain callable."""
    return lambda images: classifier(0.9 * images.flip(3))


@pytest.mark.parametrize("defense", [Mirrored(), mirrored], ids=["ours", "a callable"])
def test_the_features_seen_through_a_defense(defense):
    clip, images = tiny_clip(), tiny_images()
    assert Target(clip, CLASSES).features() == clip.encode_images
    seen = Target(clip, CLASSES, defense).features()
    assert torch.allclose(seen(images), clip.encode_images(0.9 * images.flip(3)), atol=1e-6)


@component
class SeveralTexts(Defense):
    """Asks the text tower itself for several texts per class, as methods with class descriptions do."""

    def logits(self, classifier, images, draw):
        texts = [f"{prompt} in the {place}" for prompt in classifier.prompts for place in ("snow", "night", "old sea")]
        features = classifier.clip.text_features(texts).unflatten(0, (-1, 3)).mean(1)
        features = features if classifier.prompts[0] == PROMPTS[0] else classifier.text_features
        return 20 * classifier.clip.encode_images(images) @ features.T


@pytest.mark.parametrize("attack", [CoAttack(eps=0.1, text=SWAP), SGA(eps=0.1, steps=2, text=SWAP)], ids=repr)
def test_aware_attacks_on_a_defense_with_several_texts_per_class(attack):
    clip, images = tiny_clip(), tiny_images()
    (pair,) = attack.pairs(Target(clip, CLASSES, SeveralTexts()), images, own_labels(clip, images))
    assert not torch.equal(pair.images, images)


@table
def test_attackers_who_know_the_defense_win_more(attack):
    clip, images = tiny_clip(5), tiny_images(90)
    with torch.no_grad():
        labels = mirrored(ZeroShotClassifier(clip, PROMPTS))(images).argmax(1)
    blind = attack.pairs(Target(clip, CLASSES), images, labels)
    unaware = torch.stack([judged(pair, labels, clip, Mirrored()) == labels for pair in blind]).all(0)
    aware = stands(attack, clip, images, labels, Mirrored())
    assert aware.sum() < unaware.sum()


# --- the embedded model -----------------------------------------------------------------------------------------------


def test_on_the_embedded_model():
    """With BERT-Attack on a real CLIP all attacks beat clean accuracy, and the worst reading beats each other one."""
    clip, entry = models.load(device="cpu"), role("cifar10")
    images, labels, _, _ = tinyworld_samples("cifar10", "test", 24)
    images, pgd = images.float() / 255, PGD(eps=2 / 255, steps=5)
    right = judged(Pair(images, entry.classes), labels, clip) == labels
    attacks = [
        *(SepAttack(image=pgd, reading=reading) for reading in ("released", "attacked", "worst")),
        CoAttack(eps=2 / 255, steps=5),
        SGA(eps=2 / 255, steps=3, scales=(1, 0.5)),
    ]
    standing = []
    for attack in attacks:
        pairs = attack.pairs(Target(clip, entry.classes), images, labels)
        standing.append(torch.stack([judged(pair, labels, clip) == labels for pair in pairs]).all(0))
        assert max(float((pair.images - images).abs().max()) for pair in pairs) <= 2 / 255 + 1e-6
    assert all(left.sum() < right.sum() for left in standing)
    assert (standing[0] | ~standing[2]).all()
    assert (standing[1] | ~standing[2]).all()
    assert (right | ~standing[2]).all()


def test_feature_attacks_serve_sep_attack():
    """They never stop early anyway, so that nothing changes when they run to the end."""
    clip, images = tiny_clip(), tiny_images(6)
    attack, labels = SepAttack(image=FeaturePGD(eps=0.05), text=SWAP), own_labels(clip, images)
    found, _ = attack.on_captions(clip, images, some_captions(6))
    assert not torch.equal(found, images)
    (pair,) = attack.pairs(Target(clip, CLASSES), images, labels)
    assert torch.equal(pair.images, attack.image(ZeroShotClassifier(clip, PROMPTS), images, labels))
    assert issubclass(SepAttack, MultimodalAttack)
