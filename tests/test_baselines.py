"""The contract that views, baselines, counterattacks, SCC and anchors keep, and the baselines against plain loops."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from by_hand import noise_by_hand, project
from robustclip import models
from robustclip.attacks.aware import Aware, told
from robustclip.component import identity, rebuild, settings
from robustclip.data.roles import tinyworld_samples
from robustclip.defenses.anchors import NoiseAnchor
from robustclip.defenses.base import SCORING_DRAW
from robustclip.defenses.baselines import AntiAdversary, Hedge, LowPass, RandomNoise
from robustclip.defenses.consistency import SelfConsistency
from robustclip.defenses.counterattack import Counterattack
from robustclip.defenses.views import TTE, Mirrored, Views

DEFENSES = {
    "views": Views(count=3),
    "views, features": Views(count=3, average="features"),
    "TTE": TTE(count=2),
    "mirrored": Mirrored(),
    "RN": RandomNoise(),
    "anti-adversary": AntiAdversary(),
    "HD": Hedge(steps=2),
    "low pass": LowPass(),
    "TTC": Counterattack(),
    "DOC": Counterattack(steps=2, momentum=0.9, orthogonal=0.5, drift="cosine", drift_draws=2, sharpness=5),
    "MAC": Counterattack(steps=2, mirrored=True, drift="mirror", threshold=0.98, sharpness=70),
    "SCC": SelfConsistency(steps=1),
    "anchor": NoiseAnchor(copies=3),
}
HALF_OPEN = Counterattack(threshold=0.0245)  # between the scores of the images below
PARTLY = {
    "TTC, some gates closed": HALF_OPEN,
    "SCC, some gates closed": SelfConsistency(warmup=HALF_OPEN, gated=True, steps=1),
}
# More steps than fit into the radius.
CORRECTIONS = {
    "RN": RandomNoise(),
    "anti-adversary": AntiAdversary(steps=6),
    "HD": Hedge(steps=6, radius=2 / 255),
    "TTC": Counterattack(steps=6, beta=None),
    "DOC": Counterattack(steps=3, step_size=3 / 255, momentum=0.9, orthogonal=0.5, beta=None),
    "MAC": Counterattack(steps=3, step_size=4 / 255, radius=8 / 255, mirrored=True, beta=None),
    "SCC": SelfConsistency(steps=4, count=2, radius=2 / 255),
    "SCC from zero": SelfConsistency(steps=5, count=2, start="zero"),
}
NOTHING_DONE = [
    Views(count=1), Views(count=1, average="features"), RandomNoise(radius=0), AntiAdversary(steps=0),
    AntiAdversary(radius=0), Hedge(steps=2, radius=0), LowPass(radius=1e4), Counterattack(radius=0),
    Counterattack(threshold=1e-9, closed="nothing"), NoiseAnchor(step=0, copies=2),
    SelfConsistency(warmup=Counterattack(radius=0), radius=0, count=1),
    SelfConsistency(warmup=Counterattack(radius=0), steps=0, count=1),
]  # fmt: skip


def every(defenses):
    return pytest.mark.parametrize("defense", defenses.values(), ids=defenses)


def colours(images):
    """A classifier that is no CLIP: which colour is there most of."""
    return 10 * images.mean((2, 3))


# --- the contract: an image and a draw decide the answer --------------------------------------------------------------


@every(DEFENSES | PARTLY)
def test_an_answer_belongs_to_its_image_alone(exact, images, defense):
    defended, pixels = defense(exact).at(2), images[:3].double()
    whole = defended(pixels)
    alone = torch.cat([defended(one) for one in pixels.split(1)])
    backwards = torch.cat([defended(part) for part in pixels.flip(0).split(2)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-9)
    torch.testing.assert_close(backwards.flip(0), whole, rtol=0, atol=1e-9)


def test_of_these_images_some_gates_are_open_and_some_are_closed(exact, images):
    opened = HALF_OPEN.gate(exact, images[:3].double(), 2) > 0
    assert 0 < opened.sum() < 3


@every(DEFENSES)
def test_a_draw_repeats(classifier, images, defense):
    defended = defense(classifier)
    assert torch.equal(defended.at(7)(images), defended.at(7)(images))


@every(DEFENSES)
def test_another_draw_answers_otherwise_only_if_that_is_declared(classifier, images, defense):
    defended = defense(classifier)
    assert torch.equal(defended.at(7)(images), defended(images)) is not defense.randomised


@every({name: defense for name, defense in DEFENSES.items() if defense.randomised})
def test_another_seed_answers_otherwise(classifier, images, defense):
    assert not torch.equal(replace(defense, seed=1)(classifier)(images), defense(classifier)(images))


@every(DEFENSES)
def test_no_images_have_no_answers(classifier, defense):
    assert defense(classifier)(torch.zeros(0, 3, 32, 32)).shape == (0, 10)


# --- the contract: what is left as it was -----------------------------------------------------------------------------


@every(DEFENSES)
def test_the_clip_stays_as_it_is(classifier, images, defense):
    before = classifier.clip._fingerprint()
    defense(classifier)(images)
    assert classifier.clip._fingerprint() == before
    assert not any(weight.requires_grad or weight.grad is not None for weight in classifier.parameters())


@every(DEFENSES)
def test_images_stay_as_they_are(classifier, images, defense):
    pixels = images.clone()
    defense(classifier)(pixels)
    assert torch.equal(pixels, images)
    assert not pixels.requires_grad


@every(DEFENSES)
def test_answers_are_the_same_without_gradients(exact, images, defense):
    defended, pixels = defense(exact), images[:2].double()
    with torch.no_grad():
        found = defended(pixels)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(found, defended(pixels), rtol=0, atol=1e-9)
    assert torch.is_grad_enabled()
    assert not found.requires_grad


# --- the contract: gradients ------------------------------------------------------------------------------------------


@every(DEFENSES)
def test_the_gradient_of_an_answer_reaches_its_image_only(classifier, images, defense):
    pixels = images.clone().requires_grad_()
    answer = defense(classifier).for_attack()(pixels)[1].max()
    reached = torch.autograd.grad(answer, pixels)[0].flatten(1).norm(dim=1)
    assert reached.nonzero().flatten().tolist() == [1]


@every(CORRECTIONS)
def test_the_gradient_of_a_corrected_answer_holds_the_correction_constant(exact, images, defense):
    """BPDA with the identity, through the views where there are some."""
    pixels = images[:2].double().requires_grad_()
    (found,) = torch.autograd.grad(defense(exact)(pixels)[:, 0].sum(), pixels)
    moved = pixels + defense.correction(exact, pixels.detach(), 0)
    twice = getattr(defense, "mirrored", False) or getattr(defense, "count", 1) == 2
    answers = (exact(moved) + exact(moved.flip(3))) / 2 if twice else exact(moved)
    (expected,) = torch.autograd.grad(answers[:, 0].sum(), pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


# --- the contract: sizes ----------------------------------------------------------------------------------------------


@every(CORRECTIONS)
def test_corrections_fill_the_radius_and_stay_in_it(classifier, images, defense):
    found = defense.correction(classifier, images, 0).abs().amax((1, 2, 3))
    torch.testing.assert_close(found, torch.full((4,), defense.radius), rtol=0.01, atol=0)
    assert found.max() < defense.radius + 1e-7


@every(CORRECTIONS)
def test_corrected_images_are_images(classifier, images, defense):
    extreme = ((images - 0.5) * 4).add(0.5).clamp(0, 1)
    moved = extreme + defense.correction(classifier, extreme, 0)
    assert (extreme == 0).any()
    assert (extreme == 1).any()
    assert moved.min() > -1e-6
    assert moved.max() < 1 + 1e-6


@pytest.mark.parametrize("defense", NOTHING_DONE, ids=repr)
def test_where_nothing_is_done_the_answer_is_the_classifiers(classifier, images, defense):
    torch.testing.assert_close(defense(classifier)(images), classifier(images), rtol=0, atol=1e-3)


# --- the contract: costs and settings ---------------------------------------------------------------------------------


@every(DEFENSES)
def test_passes_are_as_declared(classifier, images, defense):
    with models.count_passes() as passes:
        defense(classifier)(images)
    assert (passes.forward / 4, passes.backward / 4) == defense.passes(10)


@every(DEFENSES)
def test_behind_a_defense_of_two_passes_they_double(classifier, images, defense):
    """Nothing goes round the defense inside."""
    with models.count_passes() as passes:
        defense(Mirrored()(classifier))(images)
    assert (passes.forward / 8, passes.backward / 8) == defense.passes(10)


@every(DEFENSES | PARTLY)
def test_settings_make_the_defense_again(defense):
    assert rebuild(settings(defense)) == defense


def test_identities_tell_defenses_apart():
    found = [*DEFENSES.values(), *PARTLY.values(), *CORRECTIONS.values(), *NOTHING_DONE]
    assert len({str(identity(one)) for one in found}) == len({repr(one) for one in found})


@pytest.mark.parametrize(
    "defense",
    [Views(count=3), TTE(), Mirrored(), RandomNoise(), AntiAdversary(), Hedge(steps=2), LowPass(), Counterattack()],
    ids=repr,
)
def test_a_classifier_may_be_of_any_kind(images, defense):
    answers = defense(colours)(images)
    assert answers.shape == (4, 3)
    torch.testing.assert_close(answers, colours(images), rtol=0, atol=1)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (RandomNoise, "radius", -0.1),
        (RandomNoise, "radius", 4),
        (AntiAdversary, "steps", -1),
        (AntiAdversary, "step_size", 2),
        (Hedge, "steps", 1.5),
        (Hedge, "radius", 4),
        (LowPass, "radius", 0),
    ],
)
def test_bad_settings_are_named(kind, field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        kind(**{field: value})


# --- the baselines against loops --------------------------------------------------------------------------------------


def gradient(loss, image, delta):
    point = delta.clone().requires_grad_()
    return torch.autograd.grad(loss((image + point)[None]), point)[0]


def strengthened(defense, classifier, image):
    """Anti-adversary, as its equation has it."""
    decided, delta = classifier(image[None])[0].argmax(), torch.zeros_like(image)
    for _ in range(defense.steps):
        slope = gradient(lambda moved: -classifier(moved)[0].softmax(0)[decided].log(), image, delta)
        delta = delta - defense.step_size * slope.sign()
        delta = delta if defense.radius is None else project(image, delta, defense.radius)
    return delta


def together(logits):
    """sum_c CE(s, c), one class at a time."""
    return sum(F.cross_entropy(logits, torch.tensor([name])) for name in range(logits.shape[1]))


def hedged(defense, classifier, image, draw):
    """HD, as its equation has it."""
    delta = noise_by_hand(defense, image, draw)
    for _ in range(defense.steps):
        slope = gradient(lambda moved: together(classifier(moved)), image, delta)
        delta = project(image, delta + defense.step_size * slope.sign(), defense.radius)
    return delta


@pytest.mark.parametrize("radius", [4 / 255, 0.3])
def test_rn_adds_noise_of_its_radius_and_cuts_it(exact, images, radius):
    defense, pixels = RandomNoise(radius=radius), images.double()
    moved = torch.stack([image + noise_by_hand(defense, image, 3) for image in pixels])
    torch.testing.assert_close(defense(exact).at(3)(pixels), exact(moved), rtol=0, atol=1e-9)


def test_rn_is_uniform():
    grey = torch.full((1, 3, 64, 64), 0.5)
    delta = RandomNoise(radius=0.1).correction(colours, grey, 0).flatten()
    shares = torch.histc(delta, 10, -0.1, 0.1) / len(delta)
    torch.testing.assert_close(shares, torch.full((10,), 0.1), rtol=0, atol=0.015)


@pytest.mark.parametrize(
    "defense",
    [AntiAdversary(), AntiAdversary(steps=5, radius=2 / 255), AntiAdversary(radius=None, step_size=0.15)],
    ids=repr,
)
def test_anti_adversary_is_the_loop(exact, images, defense):
    pixels = images[:2].double()
    expected = torch.stack([strengthened(defense, exact, image) for image in pixels])
    torch.testing.assert_close(defense.correction(exact, pixels, 0), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(defense(exact)(pixels), exact(pixels + expected), rtol=0, atol=1e-9)


def test_anti_adversary_gives_all_its_steps_to_the_colour_ahead():
    reddish = torch.tensor([0.5, 0.45, 0.4]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    delta = AntiAdversary(steps=3).correction(colours, reddish, 0)
    expected = torch.tensor([3, -3, -3]).view(1, 3, 1, 1) / 255
    torch.testing.assert_close(delta, expected.expand_as(delta), rtol=0, atol=1e-6)


def test_anti_adversary_holds_on_to_its_first_decision():
    """The first step overshoots, so that the other class is ahead; the second one goes back."""

    def wavy(images):
        mean = images.mean((1, 2, 3))
        return torch.stack([torch.cos(40 * mean), 0 * mean], 1)

    grey = torch.full((1, 3, 4, 4), 0.5)
    once, twice = (AntiAdversary(steps=steps, step_size=0.1, radius=None).correction(wavy, grey, 0) for steps in (1, 2))
    assert wavy(grey).argmax() == 0
    assert wavy(grey + once).argmax() == 1
    torch.testing.assert_close(twice, torch.zeros_like(grey), rtol=0, atol=1e-6)


def test_anti_adversary_makes_every_decision_surer(classifier, images):
    plain, found = classifier(images).softmax(1), AntiAdversary()(classifier)(images).softmax(1)
    assert torch.equal(found.argmax(1), plain.argmax(1))
    assert (found.amax(1) > plain.amax(1)).all()


def test_attackers_are_told_the_decision_that_anti_adversary_strengthens(classifier, images):
    assert torch.equal(told(AntiAdversary()(classifier), "guess", images), classifier(images))


@pytest.mark.parametrize("defense", [Hedge(steps=3), Hedge(steps=4, step_size=2 / 255, radius=3 / 255)], ids=repr)
def test_hedge_is_the_loop(exact, images, defense):
    pixels = images[:2].double()
    expected = torch.stack([hedged(defense, exact, image, 4) for image in pixels])
    torch.testing.assert_close(defense.correction(exact, pixels, 4), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(defense(exact).at(4)(pixels), exact(pixels + expected), rtol=0, atol=1e-9)


def test_hedge_without_steps_is_random_noise(classifier, images):
    assert torch.equal(Hedge(steps=0)(classifier)(images), RandomNoise()(classifier)(images))


def test_hedge_raises_the_cross_entropies_together(classifier, images):
    for before, after in zip(classifier(images), Hedge(steps=5)(classifier)(images), strict=True):
        assert together(after[None]) > together(before[None])


def test_attackers_are_told_where_hedge_sets_out(classifier, images):
    hedge = Hedge(steps=3)
    start = RandomNoise()(classifier).at(7)(images)
    assert torch.equal(told(hedge(classifier).at(7), "guess", images), start)


@pytest.mark.slow
def test_hedge_is_attacked_best_where_it_sets_out(classifier):
    """The gradient at its end says little: that attack leaves more than one which goes deep into a wrong class."""
    pixels, labels = tinyworld_samples("cifar10", "test", 24)[:2]
    pixels, defended, left = pixels.float() / 255, Hedge(steps=8, step_size=6 / 255, radius=24 / 255)(classifier), {}
    for aim in ("answer", "guess"):
        attack = Aware(eps=6 / 255, steps=6, draws=1, judged=1, aims=(aim,))
        found = attack(defended.for_attack(), pixels, labels)
        left[aim] = int((defended.at(SCORING_DRAW)(found).argmax(1) == labels).sum())
    assert left["guess"] + 4 <= left["answer"]


# --- the low pass -----------------------------------------------------------------------------------------------------


def waves(side):
    places = torch.arange(side, dtype=torch.float64)
    return torch.exp(-2j * math.pi * torch.outer(places, places) / side)


def filtered(picture, kept):
    """F^-1(G F x) of one channel, with matrices of waves."""
    height, width = picture.shape
    spectrum = waves(height) @ picture.to(torch.complex128) @ waves(width)
    distances = [[math.hypot(min(i, height - i), min(j, width - j)) for j in range(width)] for i in range(height)]
    gain = torch.tensor([[kept(distance) for distance in row] for row in distances])
    return (waves(height).conj() @ (spectrum * gain) @ waves(width).conj()).real / (height * width)


KEPT = {
    "ideal": lambda radius: lambda distance: float(distance <= radius),
    "gaussian": lambda radius: lambda distance: math.exp(-(distance**2) / (2 * radius**2)),
    "butterworth": lambda radius: lambda distance: 1 / (1 + (distance / radius) ** 4),
}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 7), (6, 10)])
def test_a_low_pass_weighs_the_waves_of_each_channel(kind, height, width):
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).round()
    expected = torch.stack([filtered(channel, KEPT[kind](0.31 * width)) for channel in image]).clamp(0, 1)
    found = LowPass(radius=0.31, kind=kind).logits(lambda images: images, image[None], 0)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KEPT)
def test_a_low_pass_leaves_even_images(kind):
    grey = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(LowPass(kind=kind).logits(lambda images: images, grey, 0), grey)


def test_the_radius_of_a_low_pass_is_that_of_released_code():
    """40 of 224 pixels: a wave of 40 periods is kept to exp(-1/2)."""
    wave = 0.5 + 0.4 * torch.cos(2 * math.pi * 40 * torch.arange(224) / 224)
    found = LowPass().logits(lambda images: images, wave.expand(1, 3, 224, 224), 0)
    torch.testing.assert_close(found[0, 0, 0], 0.5 + math.exp(-0.5) * (wave - 0.5), rtol=0, atol=1e-5)


def test_a_low_pass_of_no_known_kind_is_an_error():
    with pytest.raises(ValueError, match="kind 'box'"):
        LowPass(kind="box")
