"""The fast twin computes what the original computes, and attacks on it are judged by the original."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from robustclip import models, study
from robustclip.attacks import (
    FGSM,
    PGD,
    SGA,
    BertAttack,
    CoAttack,
    FeaturePGD,
    SepAttack,
    Square,
    UniformNoise,
)
from robustclip.attacks import fast as fast_attack
from robustclip.attacks.fast import Fast, at_precision
from robustclip.data.roles import role, tinyworld_samples
from robustclip.defenses.broken import Saturated
from robustclip.fast import fast, fast_classifier, twin_of
from robustclip.models import Clip, ZeroShotClassifier

EPS = 6 / 255
TEXT = {"context_length": 6, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1}
TOWERS = {
    "vit": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "head_width": 16},
    "vit with uneven patches": {"image_size": 20, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
    "vit with its own attention": {"image_size": 16, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16,
                                   "qk_norm": True},
    "vit with a pooler across": {"image_size": 16, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16,
                                 "attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2},
    "resnet": {"image_size": 32, "layers": [1, 2, 1, 1], "width": 8, "head_width": 64},
    "resnet with four places": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 4, "head_width": 32},
}  # fmt: skip
table = pytest.mark.parametrize("name", TOWERS)


class Pixels(nn.Module):
    """An image tower of nothing but its own: no convolution at all."""

    image_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(192, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        return images.flatten(1).tanh() @ self.weight


def words(texts):
    """A tokenizer for tests: six numbers that depend on the text."""
    return torch.tensor([[sum(text.encode()) * (i + 3) % 39 + 1 for i in range(6)] for text in texts])


def random_clip(name: str, visual: nn.Module | None = None) -> Clip:
    """A small random CLIP; statistics of batch norms and all weights are far from where they start."""
    import open_clip

    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = open_clip.model.CLIP(16, TOWERS[name], TEXT)
        for module in network.visual.modules():
            if isinstance(module, nn.BatchNorm2d):
                for value in (module.weight, module.running_var):
                    nn.init.uniform_(value, 0.5, 1.5)
                for value in (module.bias, module.running_mean):
                    nn.init.normal_(value, std=0.3)
    network.visual = visual or network.visual
    network.visual.preprocess_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "interpolation": "bicubic"}
    return Clip(network, words, name).to(memory_format=torch.channels_last)


def random_classifier(name: str) -> ZeroShotClassifier:
    return ZeroShotClassifier(random_clip(name), ["a red star", "a blue disc", "striped", "nothing at all"])


def some_images(n: int, side: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def slope(classifier, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of a loss that is not symmetric in the classes."""
    points = images.clone().requires_grad_()
    logits = classifier(points)
    labels = torch.arange(len(images)) % logits.shape[1]
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), points)
    return logits.detach(), gradient


def error(ours: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The length of the difference for every image, relative to the truth."""
    return (ours - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)


def standing(classifier, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return classifier(images).argmax(1) == labels


@pytest.fixture(scope="module")
def embedded():
    """The embedded model on ten classes, with images right and wrong."""
    classifier = models.zero_shot(models.load(device="cpu"), role("cifar10"))
    images, labels, _, _ = tinyworld_samples("cifar10", "test", 48)
    return classifier, images[:32].float() / 255, labels[:32]


# --- the twin ---------------------------------------------------------------------------------------------------------


@table
@pytest.mark.parametrize("side", [24, 32])
def test_float32_twin_is_the_original(name, side):
    """Logits and gradients agree to rounding for towers it knows, knows in part, and has to resize for."""
    classifier, images = random_classifier(name), some_images(5, side)
    truth, ours = slope(classifier, images), slope(fast_classifier(classifier, "float32"), images)
    assert error(ours[0], truth[0]).max() < 1e-4
    assert error(ours[1], truth[1]).max() < 1e-4


def test_float32_twin_of_the_embedded_model(embedded):
    classifier, images, _ = embedded
    truth, ours = slope(classifier, images), slope(fast_classifier(classifier, "float32"), images)
    assert error(ours[0], truth[0]).max() < 1e-5
    # A unit within rounding of zero may switch sides, and the gradient of its image with it; rare and small.
    assert error(ours[1], truth[1]).quantile(0.9) < 1e-4
    assert error(ours[1], truth[1]).max() < 2e-2


@table
def test_bfloat16_twin_is_close(name):
    classifier, images = random_classifier(name), some_images(8)
    truth, ours = slope(classifier, images), slope(fast_classifier(classifier), images)
    assert error(ours[0], truth[0]).max() < 0.03
    assert F.cosine_similarity(ours[1].flatten(1), truth[1].flatten(1)).min() > 0.93


def test_bfloat16_twin_of_the_embedded_model(embedded):
    classifier, images, _ = embedded
    truth, ours = slope(classifier, images), slope(fast_classifier(classifier), images)
    assert (ours[0] - truth[0]).abs().max() < 0.3  # logits run to 40
    assert F.cosine_similarity(ours[1].flatten(1), truth[1].flatten(1)).min() > 0.93


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_an_image_does_not_depend_on_its_neighbors(name, precision):
    """One alone, in pairs, in uneven parts: the same logits and the same gradient."""
    twin, images = fast_classifier(random_classifier(name), precision), some_images(11)
    whole = slope(twin, images)[0]
    tolerance = 1e-5 if precision == "float32" else 1e-4
    for size in (1, 2, 5, 9):
        parts = torch.cat([slope(twin, part)[0] for part in images.split(size)])
        assert torch.allclose(parts, whole, rtol=0, atol=tolerance)


def test_few_batch_sizes():
    """Never fewer images than asked for, at most 31 more (an eighth of more than 512), and 14 sizes up to 256."""
    twin = fast(random_clip("resnet"), "float32")
    sizes = [twin._size(torch.empty(n, 3, 1, 1)) for n in range(1, 1001)]
    assert all(n <= size <= n + max(31, n / 8) for n, size in enumerate(sizes, 1))
    assert len(set(sizes[:256])) == 14
    assert fast(random_clip("vit"))._size(torch.empty(33, 3, 1, 1)) == 33


def test_no_images(embedded):
    assert fast_classifier(embedded[0])(torch.empty(0, 3, 32, 32)).shape == (0, 10)


def test_a_tower_without_convolutions_is_left_in_float32():
    clip = random_clip("vit", Pixels())
    images = some_images(3, 8)
    assert torch.equal(fast(clip).encode_images(images), clip.encode_images(images))


def test_masked_attention_stays_with_torch():
    """A mask, or attention to another sequence, gets the answer of the module it replaces."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)
    from robustclip.fast import _PackedAttention

    own, other = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.full((5, 5), -torch.inf).triu(1)
    packed = _PackedAttention(attention)
    for inputs, options in (((own, own, own), {"attn_mask": mask}), ((own, other, other), {}), ((own, own, own), {})):
        ours, truth = (module(*inputs, need_weights=False, **options)[0] for module in (packed, attention))
        assert torch.allclose(ours, truth, atol=1e-6)


# --- the original -----------------------------------------------------------------------------------------------------


def test_original_is_untouched():
    """Weights, what asks for gradients, modes and fingerprint; text features are the very same tensor."""
    clip = random_clip("resnet")
    clip.network.visual.requires_grad_(True)
    clip.network.visual.train()
    clip.network.token_embedding.requires_grad_(True)
    classifier = ZeroShotClassifier(clip, ["one", "two"])
    asking = {name: weight.requires_grad for name, weight in clip.named_parameters()}
    modes = {name: module.training for name, module in clip.named_modules()}
    weights, digest = copy.deepcopy(clip.state_dict()), clip.digest
    twin = fast_classifier(classifier)
    Fast(attack=PGD(eps=EPS, steps=2))(classifier, some_images(4), torch.tensor([0, 1, 0, 1]))
    assert twin.text_features is classifier.text_features
    assert twin.prompts == classifier.prompts
    assert {name: weight.requires_grad for name, weight in clip.named_parameters()} == asking
    assert {name: module.training for name, module in clip.named_modules()} == modes
    assert all(torch.equal(value, weights[name]) for name, value in clip.state_dict().items())
    assert clip.digest == digest
    assert not any(weight.requires_grad for weight in twin.clip.network.visual.parameters())
    assert twin.clip.network.transformer is clip.network.transformer  # texts need no copy


def test_twin_follows_the_weights():
    """The same object while nothing changes, a new one that is right as soon as a weight does."""
    classifier, images = random_classifier("vit"), some_images(3)
    clip, before = classifier.clip, fast(classifier.clip, "float32")
    assert fast(clip, "float32") is before
    assert fast(clip, "bfloat16") is not before
    clip.network.visual.proj.mul_(-1)
    after = fast_classifier(classifier, "float32")
    assert after.clip is not before
    assert error(after(images), classifier(images)).max() < 1e-4
    assert fast(copy.deepcopy(clip), "float32") is not after.clip


def test_unknown_precision():
    with pytest.raises(ValueError, match=r"unknown precision 'int8'.*bfloat16"):
        fast(random_clip("vit"), "int8")
    with pytest.raises(ValueError, match=r"unknown precision 'int8'.*bfloat16"):
        Fast(attack=PGD(eps=EPS), precision="int8")


# --- attacks on the twin ----------------------------------------------------------------------------------------------


class Wrong(nn.Module):
    """A twin whose logits are `twist`ed."""

    def __init__(self, classifier: ZeroShotClassifier, twist) -> None:
        super().__init__()
        self.classifier, self.twist = classifier, twist

    def forward(self, images):
        return self.twist(self.classifier(images))


WRONG = {
    "always fooled": lambda logits: -logits,
    "fooled by another class": lambda logits: logits.roll(1, 1),
    "sees nothing": lambda logits: 0 * logits,
    "never fooled": lambda logits: logits - 2 * logits.detach() + 1000 * F.one_hot(logits.argmax(1), 10),
    "coarse": lambda logits: logits + (logits.detach() / 4).round() * 4 - logits.detach(),
}


@pytest.mark.parametrize("twist", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_twin_neither_overstates_nor_hides(embedded, monkeypatch, twist):
    """However wrong its logits, what stands after the attack is what stands after the attack in float32."""
    classifier, images, labels = embedded
    monkeypatch.setattr(fast_attack, "twin_of", lambda original, images, precision: Wrong(original, twist))
    attack = PGD(eps=2 / 255, steps=3)
    truth = standing(classifier, attack(classifier, images, labels), labels)
    ours = Fast(attack=attack)(classifier, images, labels)
    assert 0 < truth.sum() < len(truth)  # otherwise nothing is shown
    assert (standing(classifier, ours, labels) <= truth).all()
    assert (ours - images).abs().max() <= attack.eps + 1e-6


@pytest.mark.parametrize(
    "attack", [PGD(eps=2 / 255, steps=5), FGSM(eps=2 / 255), PGD(eps=1 / 255, loss="margin")], ids=repr
)
def test_as_strong_as_the_attack_inside(embedded, attack):
    """Scored in float32, within one image of 32 of the attack without a twin."""
    classifier, images, labels = embedded
    truth = standing(classifier, attack(classifier, images, labels), labels).sum()
    ours = Fast(attack=attack)(classifier, images, labels)
    assert standing(classifier, ours, labels).sum() <= truth + 1
    assert (ours - images).abs().max() <= attack.eps + 1e-6
    assert ours.dtype == images.dtype


@settings(max_examples=5, deadline=None)
@given(order=st.permutations(range(6)), size=st.integers(1, 6))
def test_independent_of_batches(order, size):
    """Alone, together, in any order: the same adversarial images."""
    classifier, images = random_classifier("vit"), some_images(6)
    labels = classifier(images).argmax(1)
    attack = Fast(attack=PGD(eps=EPS, steps=2))
    whole = attack(classifier, images, labels)
    order = torch.tensor(order)
    parts = [attack(classifier, images[rows], labels[rows]) for rows in order.split(size)]
    assert (torch.cat(parts) - whole[order]).abs().max() < 1e-6


def test_other_classifiers_are_attacked_directly(embedded):
    """A function, or a user's own kind of zero-shot classifier, has no twin that would be the same."""
    classifier, images, labels = embedded
    images, labels, attack = images[:4], labels[:4], PGD(eps=EPS, steps=2)

    class Defended(ZeroShotClassifier):
        def forward(self, images):
            return super().forward(images.round(decimals=1) + images - images.detach())

    defended = Defended(classifier.clip, classifier.prompts)
    for other in (defended, lambda images: classifier(images).flip(1)):
        expected = attack(other, images, labels)
        assert torch.equal(Fast(attack=attack)(other, images, labels), expected)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_twin_stands_behind_the_same_defense(embedded, monkeypatch, precision):
    """What fools is judged by the defended classifier in float32."""
    plain, images, labels = embedded
    attack, made = PGD(eps=2 / 255, steps=4), []
    monkeypatch.setattr(fast_attack, "twin_of", lambda *given: made.append(given) or twin_of(*given))
    for defended in (Saturated(scale=2.0)(plain), Saturated(scale=2.0)(plain).for_attack()):
        found = Fast(attack=attack, precision=precision)(defended, images, labels)
        direct = attack(defended, images, labels)
        with torch.no_grad():
            fallen, expected = ((defended(one).argmax(1) != labels).sum() for one in (found, direct))
        assert abs(fallen - expected) <= 2
        assert expected > 5
        assert ((found - images).abs() <= 2 / 255 + 1e-6).all()
    assert made[0][0] is plain
    assert made[0][2] == precision


class Convolving(nn.Module):
    """A small network of a user's own: pixels are normalised, convolved, and looked at by a linear head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.first, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
            self.second, self.head = nn.Conv2d(16, 32, 3, 2, 1), nn.Linear(32 * 16, 10)
            nn.init.uniform_(self.norm.running_var, 0.5, 1.5)

    def forward(self, images):
        x = F.relu(self.norm(self.first((images - 0.5) / 0.25)))
        return 5 * self.head(F.adaptive_avg_pool2d(F.relu(self.second(x)), 4).flatten(1))


@pytest.mark.parametrize("attack", [PGD(eps=0.01, steps=5), Square(eps=0.02, queries=80)], ids=repr)
def test_any_module_that_convolves_pixels_has_a_twin(attack):
    """In bfloat16 it is close, the original stays as it was, and what falls does so in float32."""
    network, images = Convolving().train(), some_images(48, 16)
    weights = copy.deepcopy(network.state_dict())
    network.eval()
    twin = twin_of(network, images)
    truth, ours = slope(network, images), slope(twin, images)
    assert not torch.equal(ours[0], truth[0])
    assert error(ours[0], truth[0]).max() < 0.05
    assert F.cosine_similarity(ours[1].flatten(1), truth[1].flatten(1)).min() > 0.9
    labels = truth[0].argmax(1)
    expected = standing(network, attack(network, images, labels), labels).sum()
    found = Fast(attack=attack)(network.train(), images, labels)
    assert network.training
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    left = standing(network.eval(), found, labels).sum()
    assert 0 < expected < 48
    assert abs(left - expected) <= 2
    assert (found - images).abs().max() <= attack.eps + 1e-6


def test_modules_without_a_twin():
    """No pixels are convolved, precisions are mixed by hand, or it is no module."""

    class Mixing(Convolving):
        def forward(self, images):
            return F.linear(self.first(images).float().mean((2, 3)), self.head.weight[:, :16])

    images = some_images(2, 16)
    for other in (nn.Flatten(), Mixing(), lambda images: images.flatten(1)):
        assert twin_of(other, images) is None
    labels, attack = Mixing()(images).argmax(1), PGD(eps=EPS, steps=2)
    assert torch.equal(Fast(attack=attack)(mixing := Mixing(), images, labels), attack(mixing, images, labels))


def test_tokens_of_the_twin(embedded):
    images = embedded[1][:3]
    for clip in (embedded[0].clip, random_clip("vit")):
        raw, tokens = clip.raw_and_tokens(images)
        fast_raw, fast_tokens = fast(clip, "float32").raw_and_tokens(images)
        torch.testing.assert_close(fast_raw, raw, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(fast_tokens, tokens, rtol=1e-3, atol=1e-3)


def test_edges(embedded):
    """No image, no budget, an attack without labels, and an attack without gradients."""
    classifier, images, labels = embedded
    assert Fast(attack=PGD(eps=EPS))(classifier, images[:0], labels[:0]).shape == (0, 3, 32, 32)
    assert torch.equal(Fast(attack=PGD(eps=0))(classifier, images, labels), images)
    noisy = UniformNoise(eps=EPS)
    assert torch.equal(Fast(attack=noisy)(classifier, images, labels), noisy(classifier, images, labels))
    turned = Fast(attack=FeaturePGD(eps=EPS, steps=2))(classifier, images[:4], labels[:4])
    assert (turned - images[:4]).abs().max() > 0


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_attacks_at_a_precision(precision):
    """Image attacks go into `Fast`, also those in others; what follows features or texts stays, and so does `Fast`."""
    pgd, told = PGD(eps=EPS), precision != "float32"
    wanted = Fast(attack=pgd, precision=precision) if told else pgd
    assert at_precision(pgd, precision) == wanted
    assert at_precision(SepAttack(image=pgd), precision) == SepAttack(image=wanted)
    for other in (CoAttack(eps=EPS), SGA(eps=EPS), BertAttack(), Fast(attack=pgd, precision="float16")):
        assert at_precision(other, precision) == other
    assert at_precision(SepAttack(image=pgd), precision).inner == pgd


def test_cells_measure_fast_attacks(tmp_path):
    """The engine counts the passes of the twin, and what stands is what stands in float32."""
    attacks = {"plain": PGD(eps=2 / 255, steps=3), "fast": Fast(attack=PGD(eps=2 / 255, steps=3))}
    rows = study.evaluate(study.grid("quick", ["clip"], ["cifar10"], attacks, n=12), tmp_path, device="cpu")
    assert rows["played_by"].str.startswith("Fast").tolist() == [False, True]
    assert rows["forward"][1] > rows["forward"][0] > 24
    assert abs(rows["accuracy"][0] - rows["accuracy"][1]) < 10


def test_settings():
    attack = Fast(attack=PGD(eps=EPS, steps=7))
    assert attack.eps == EPS
    assert eval(repr(attack)) == attack
    assert replace(attack, precision="float32") != attack
    with pytest.raises(ValueError, match=r"give one of robustclip\.attacks"):
        Fast(attack="pgd")
