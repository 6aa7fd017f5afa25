"""CLIPure: what its steps compute, what their derivative is, and who can break it."""

import math
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
from torch.nn import functional as F

import prior as tool
from robustclip import models
from robustclip.attacks import PGD, UniformNoise
from robustclip.attacks.aware import Aware, aims_against
from robustclip.classes import Classes
from robustclip.data.roles import tinyworld_samples
from robustclip.defenses.clipure import (
    DESCRIBED,
    PRIORS,
    RELEASED,
    CLIPure,
    CLIPureDiff,
    blank_text,
    closed_form,
    load_prior,
)
from robustclip.defenses.views import Mirrored
from robustclip.models import Clip, ZeroShotClassifier
from robustclip.study.provenance import digests

EPS = 6 / 255
SETTINGS = [(30, 10), (30, 9), (30, 11), (1, 10), (0.3, 10), (0.1, 10), (0.03, 10), (0.01, 3), (2, 1)]


@pytest.fixture(scope="module")
def samples():
    images, labels, *_ = tinyworld_samples("cifar10", "test", 40)
    return images.float() / 255, labels


@pytest.fixture(scope="module")
def images(samples):
    return samples[0][:6]


def unit_rows(n, seed=0, size=64):
    rows = torch.randn(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=1)


def climbed(feature, blank, step_size, steps, momentum=0.0):
    """One feature by autograd on the cosine, as the equation has it."""
    velocity = torch.zeros_like(feature)
    for _ in range(steps):
        point = feature.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cosine_similarity(point, blank, dim=0), point)
        velocity = momentum * velocity + (1 - momentum) * gradient / gradient.norm()
        feature = feature + step_size * velocity
        feature = feature / feature.norm()
    return feature


def by_cosine(blank):
    return lambda features, step: blank - (features @ blank)[:, None] * features


def accuracy(classifier, images, labels):
    with torch.no_grad():
        return (classifier(images).argmax(1) == labels).float().mean().item()


# --- the steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step_size", "steps"), SETTINGS)
def test_closed_form_and_steps_agree_with_autograd(step_size, steps):
    features, blank = unit_rows(8), unit_rows(1, 1)[0]
    expected = torch.stack([climbed(feature, blank, step_size, steps) for feature in features])
    torch.testing.assert_close(closed_form(features, 3 * blank, step_size, steps), expected, rtol=0, atol=1e-9)
    moved = CLIPure(step_size=step_size, steps=steps).purified(features, by_cosine(blank))
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_momentum(momentum):
    features, blank = unit_rows(8), unit_rows(1, 1)[0]
    expected = torch.stack([climbed(feature, blank, 0.3, 10, momentum) for feature in features])
    moved = CLIPure(step_size=0.3, momentum=momentum).purified(features, by_cosine(blank))
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("step_size", "steps"), [(0.03, 10), (0.1, 10), (0.01, 3)])
def test_every_step_turns_by_the_arc_tangent(clip, samples, step_size, steps):
    features, blank = clip.encode_images(samples[0]).double(), blank_text(clip).double()
    turned = steps * math.atan(step_size)
    assert (features @ blank).arccos().min() > turned
    moved = CLIPure(step_size=step_size, steps=steps).purified(features, by_cosine(blank))
    torch.testing.assert_close((features * moved).sum(1), torch.full((40,), math.cos(turned)).double())


def test_an_even_number_of_large_steps_returns_unless_the_blank_text_is_too_far():
    features, blank = unit_rows(200), unit_rows(1, 1)[0]
    near = (features @ blank).arccos() < math.atan(30)
    assert 20 < near.sum() < 180
    cosines = (features * CLIPure().purified(features, by_cosine(blank))).sum(1)
    assert cosines[near].min() > 1 - 1e-12
    assert cosines[~near].max() < -0.9, "beyond, features end on the other side"


@pytest.mark.parametrize("blank", ["templates", "phrase"])
def test_released_step_size_changes_no_prediction_if_the_number_of_steps_is_even(classifier, samples, blank):
    images, labels = samples
    plain = classifier(images).argmax(1)
    for steps in (8, 10, 12):
        assert torch.equal(CLIPure(steps=steps, blank=blank)(classifier)(images).argmax(1), plain)
    for steps in (9, 11):
        assert accuracy(CLIPure(steps=steps, blank=blank)(classifier), images, labels) < 0.4
    assert torch.equal(RELEASED(classifier)(images).argmax(1), plain)
    assert accuracy(classifier, images, labels) > 0.8


def test_logits_weigh_the_image_against_what_all_images_share(clip, classifier, images):
    """logit_y is a <u_0, z_y> + b <t, z_y>."""
    logits = DESCRIBED(classifier)(images)
    own, common = clip.encode_images(images) @ classifier.text_features.T, classifier.text_features @ blank_text(clip)
    for row, mine in zip(logits, own, strict=True):
        parts = torch.stack([mine, common], 1)
        weights = torch.linalg.lstsq(parts, row[:, None]).solution
        torch.testing.assert_close((parts @ weights)[:, 0], row, rtol=1e-4, atol=1e-3)


def test_answers_are_those_of_the_closed_form(clip, classifier, images):
    moved = closed_form(clip.encode_images(images), blank_text(clip), 0.1, 10)
    torch.testing.assert_close(
        DESCRIBED(classifier)(images), clip.logit_scale * moved @ classifier.text_features.T, rtol=1e-4, atol=1e-3
    )


def test_blank_texts(clip):
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    phrase, templates = blank_text(clip, "phrase"), blank_text(clip, "templates")
    torch.testing.assert_close(phrase, clip.text_features(["a photo of a."])[0])
    assert phrase.norm().item() == pytest.approx(1)
    assert templates.norm().item() == pytest.approx(1)
    assert 0.5 < phrase @ templates < 0.95
    texts = [template("thing").replace("thing", "") for template in OPENAI_IMAGENET_TEMPLATES]
    torch.testing.assert_close(templates, F.normalize(sum(clip.encode_texts([text])[0] for text in texts), dim=0))
    assert len(set(texts)) > 70


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_norm_of_its_own_knows_no_neighbours(classifier, images):
    defended = DESCRIBED(classifier)
    alone = torch.cat([defended(image[None]) for image in images])
    torch.testing.assert_close(defended(images), alone, rtol=1e-4, atol=1e-3)


def test_a_norm_of_the_batch_does():
    features, blank = unit_rows(6), unit_rows(1, 1)[0]
    whole, pairs = (CLIPure(step_size=0.3, norm="batch", batch=size) for size in (0, 2))
    moved = pairs.purified(features, by_cosine(blank))
    parts = [whole.purified(part, by_cosine(blank)) for part in features.split(2)]
    torch.testing.assert_close(moved, torch.cat(parts))
    assert (whole.purified(features, by_cosine(blank)) - moved).abs().max() > 0.01
    assert (pairs.purified(features[1:], by_cosine(blank)) - moved[1:]).abs().max() > 0.01
    single = [closed_form(feature[None], blank, 0.3, 10) for feature in features]
    torch.testing.assert_close(
        torch.cat([whole.purified(feature[None], by_cosine(blank)) for feature in features]), torch.cat(single)
    )


def test_one_step_with_a_norm_of_the_batch_by_hand():
    features, blank = unit_rows(3), unit_rows(1, 1)[0]
    gradient = blank - (features @ blank)[:, None] * features
    moved = CLIPure(steps=1, step_size=2, norm="batch").purified(features, by_cosine(blank))
    torch.testing.assert_close(moved, F.normalize(features + 2 * gradient / gradient.norm(), dim=1))


# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step_size", "steps"), [(0.1, 10), (0.03, 10), (30, 10), (1, 3)])
def test_exact_derivative(step_size, steps):
    features, blank = unit_rows(2, size=6).requires_grad_(), unit_rows(1, 1, size=6)[0]
    defense = CLIPure(step_size=step_size, steps=steps)
    assert torch.autograd.gradcheck(lambda points: defense.purified(points, by_cosine(blank)), features, atol=1e-4)
    upper = unit_rows(2, 2, size=6)
    through, closed = (
        torch.autograd.grad((moved * upper).sum(), features)[0]
        for moved in (
            defense.purified(features, by_cosine(blank)),
            closed_form(F.normalize(features, dim=1), blank, step_size, steps),
        )
    )
    along = lambda slope: slope - (slope * features).sum(1, keepdim=True) * features  # noqa: E731  on the sphere
    torch.testing.assert_close(along(through), along(closed), rtol=1e-6, atol=1e-9)


def test_exact_derivative_keeps_its_size_and_the_released_one_vanishes(clip, classifier, images):
    features = clip.encode_images(images).requires_grad_()
    upper, largest = unit_rows(6, 3).float(), {}
    for backward in ("exact", "detached"):
        moved = CLIPure(backward=backward).purified(features, by_cosine(blank_text(clip)))
        largest[backward] = torch.autograd.grad((moved * upper).sum(), features)[0].norm(dim=1)
    assert largest["exact"].min() > 0.3
    assert largest["detached"].max() < 10 * (1 + 30**2) ** -5
    assert largest["detached"].min() > 0, "so that a sign still finds its way"


@pytest.mark.parametrize("norm", ["image", "batch"])
def test_in_half_precision_the_released_gradient_is_zero(classifier, images, norm):
    def gradient(classifier):
        pixels = images.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(classifier(pixels), torch.arange(6), reduction="sum"), pixels)[0]

    released = replace(RELEASED, norm=norm)
    assert not gradient(released(classifier)).any()
    assert gradient(replace(released, half=False)(classifier)).any()
    assert gradient(replace(released, backward="exact")(classifier)).abs().max() > 1e-3


def test_the_surrogate_of_constant_steps_is_the_classifier_inside(classifier, images):
    pixels, defended = images.clone().requires_grad_(), RELEASED(classifier)
    seen = defended.for_attack()
    assert torch.equal(seen(pixels), defended(images))
    slopes = [torch.autograd.grad(answer(pixels)[:, 0].sum(), pixels)[0] for answer in (seen, classifier)]
    assert torch.equal(*slopes)
    assert slopes[0].any()


def test_half_precision_rounds_the_feature_and_its_gradient(clip, classifier, images):
    answer = CLIPure(steps=0, half=True)(classifier)(images)
    rounded = F.normalize(clip.encode_images(images).half().float(), dim=1)
    assert torch.equal(answer, clip.logit_scale * rounded @ classifier.text_features.T)
    assert not torch.equal(answer, classifier(images))


def test_what_an_attacker_differentiates_of_an_exact_defense_is_itself(classifier, images):
    pixels, defended = images.clone().requires_grad_(), DESCRIBED(classifier)
    seen, own = (
        torch.autograd.grad(answer(pixels)[:, 0].sum(), pixels)[0] for answer in (defended.for_attack(), defended)
    )
    torch.testing.assert_close(seen, own)
    assert own.abs().max() > 1e-3


# --- attacks ----------------------------------------------------------------------------------------------------------


def test_released_attack_stays_at_its_random_start(classifier, samples):
    images, labels = samples
    defended = RELEASED(classifier)
    right = defended(images).argmax(1) == labels
    found = PGD(eps=EPS, steps=5)(defended, images, labels)
    assert torch.equal(found[right], UniformNoise(eps=EPS)(classifier, images, labels)[right])
    assert accuracy(defended, found, labels) > 0.8
    for attacked in (classifier, defended.for_attack()):  # transfer and BPDA
        found = PGD(eps=EPS, steps=10)(attacked, images, labels)
        assert accuracy(defended, found, labels) < 0.1


def test_who_knows_the_defense_breaks_it(classifier, samples):
    images, labels = samples
    for defense in (RELEASED, CLIPure(), replace(DESCRIBED, step_size=0.03)):
        defended = defense(classifier)
        attack = Aware(eps=EPS, steps=10, aims=("answer",))
        found = attack(defended.for_attack(), images[:20], labels[:20])
        assert accuracy(defended, images[:20], labels[:20]) > 0.7
        assert accuracy(defended, found, labels[:20]) < 0.15, defense


# --- the contract -----------------------------------------------------------------------------------------------------

BOTH = [DESCRIBED, CLIPureDiff(step_size=0.1)]


@pytest.mark.parametrize("defense", [CLIPure(steps=0), CLIPureDiff(steps=0)])
def test_no_steps_change_nothing(classifier, images, defense):
    assert torch.equal(defense(classifier)(images), classifier(images))


@pytest.mark.parametrize("defense", BOTH)
def test_classes_may_come_in_any_order(clip, classifier, images, defense):
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    names, prompts = ([known[place] for place in order] for known in (classifier.classes.names, classifier.prompts))
    other = ZeroShotClassifier(clip, Classes(names, prompts))
    torch.testing.assert_close(defense(other)(images), defense(classifier)(images)[:, order], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("defense", [*BOTH, RELEASED])
def test_passes_are_as_declared_and_weights_stay(clip, classifier, images, defense):
    digest = clip.digest
    with models.count_passes() as passes:
        defense(classifier)(images.clone().requires_grad_())
    assert (passes.forward / 6, passes.backward / 6) == defense.passes(10)
    clip._kept = ((), {})
    assert clip.digest == digest


def test_other_defenses_inside(clip, classifier, images):
    inside = Mirrored()(classifier)
    both = F.normalize((clip.encode_images(images) + clip.encode_images(images.flip(-1))) / 2, dim=1)
    moved = closed_form(both, blank_text(clip), 0.1, 10)
    defended = DESCRIBED(inside)
    expected = clip.logit_scale * moved @ classifier.text_features.T
    torch.testing.assert_close(defended(images), expected, rtol=1e-4, atol=1e-3)
    pixels = images.clone().requires_grad_()
    assert torch.autograd.grad(defended.for_attack()(pixels).sum(), pixels)[0].any()


def test_named_configurations_paste_back():
    for defense in (RELEASED, DESCRIBED, CLIPureDiff(times=(100, 500), prior="photo-clip")):
        assert eval(repr(defense)) == defense
    assert (RELEASED.steps, RELEASED.step_size, RELEASED.backward, RELEASED.half) == (10, 30, "detached", True)
    assert (DESCRIBED.steps, DESCRIBED.norm, DESCRIBED.backward, DESCRIBED.half) == (10, "image", "exact", False)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": -1}, {"steps": 1.5}, {"step_size": -1}, {"momentum": 2}, {"norm": "l2"}, {"batch": -1},
     {"backward": "none"}, {"blank": "empty"}],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CLIPure(**wrong)


@pytest.mark.parametrize("times", [(-1, 5), (5, 4), (900, 1000)])
def test_bad_times_are_named(times):
    with pytest.raises(ValueError, match="times="):
        CLIPureDiff(times=times)


def test_only_zero_shot_classifiers_have_features():
    with pytest.raises(ValueError, match="ZeroShotClassifier"):
        DESCRIBED(lambda images: images.mean((2, 3)))(torch.rand(2, 3, 8, 8))


# --- the diffusion prior ----------------------------------------------------------------------------------------------


def test_numbers_belong_to_an_image_and_a_draw(classifier, images):
    defended = CLIPureDiff()(classifier)
    assert CLIPureDiff.randomised
    assert not CLIPure.randomised
    whole = defended(images)
    assert torch.equal(whole, defended.at(0)(images))
    alone = torch.cat([defended(image[None]) for image in images])
    torch.testing.assert_close(whole, alone, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(whole.flip(0), defended(images.flip(0)), rtol=1e-3, atol=1e-2)
    assert (defended.at(1)(images) - whole).abs().amax(1).min() > 0.1
    assert (CLIPureDiff(seed=1)(classifier)(images) - whole).abs().amax(1).min() > 0.1


def test_every_step_takes_fresh_noise_at_one_time_of_the_image(clip, images):
    defense, seen = CLIPureDiff(steps=3, times=(5, 14)), []

    class Watched(torch.nn.Module):
        size = 64

        def loss(self, features, times, noise):
            seen.append((times, noise))
            return (features * noise).sum(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robustclip.defenses.clipure.load_prior", lambda *_: Watched())
        many = torch.cat([(images + shift / 100).clamp(0, 1) for shift in range(30)])
        features = clip.encode_images(many)
        moved = defense.purified(features, defense.slope(clip, many, 0))
    assert len(seen) == 3
    assert torch.equal(seen[0][0], seen[2][0])
    assert set(seen[0][0].tolist()) == set(range(5, 15))
    noise = torch.stack([noise for _, noise in seen])
    assert noise.mean().abs() < 0.02
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.05
    for one in noise:
        features = F.normalize(features - 30 * F.normalize(one, dim=1), dim=1)
    torch.testing.assert_close(moved, features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PRIORS)
def test_priors_know_features_from_other_directions(name, images):
    features = models.load(name, device="cpu").encode_images(images)
    assert files("robustclip").joinpath(PRIORS[name]).stat().st_size < 300_000
    other = unit_rows(6, 5).float()
    for times in ((0, 99), (450, 549), (900, 999)):
        own, random = (tool.mean_loss(load_prior(name), part.repeat(50, 1), times) for part in (features, other))
        assert own < random


def test_loss_of_a_prior_by_hand():
    prior, features, noise = load_prior("tinyworld-clip"), unit_rows(3).float(), unit_rows(3, 1).float()
    times = torch.tensor([0.0, 500.0, 999.0])
    for row, t in enumerate(times.tolist()):
        kept = math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        noisy = math.sqrt(kept) * 8 * features[row] + math.sqrt(1 - kept) * noise[row]
        guess = prior(noisy[None], times[row : row + 1])[0]
        expected = ((guess - 8 * features[row]) ** 2).mean()
        torch.testing.assert_close(prior.loss(features, times, noise)[row], expected, rtol=1e-4, atol=1e-5)


def test_steps_climb_the_likelihood(clip, images):
    defense = CLIPureDiff(steps=20, step_size=0.05, times=(300, 300))
    other = unit_rows(6, 5).float()
    moved = defense.purified(other, defense.slope(clip, images, 0))
    before, after = (tool.mean_loss(load_prior(clip.name), part.repeat(20, 1), (300, 300)) for part in (other, moved))
    assert after < 0.7 * before


@pytest.mark.parametrize("step_size", [0.1, 30])
def test_exact_derivative_through_the_prior(clip, images, step_size):
    prior, features = tool.train(unit_rows(40, size=5).float(), steps=5).double(), unit_rows(2, size=5)
    defense = CLIPureDiff(step_size=step_size, steps=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robustclip.defenses.clipure.load_prior", lambda *_: prior)
        slope = defense.slope(clip, images[:2].double(), 0)
        points = features.requires_grad_()
        assert torch.autograd.gradcheck(lambda points: defense.purified(points, slope), points, atol=1e-4)
        exact, held = (
            torch.autograd.grad(replace(defense, backward=kind).purified(points, slope)[:, 0].sum(), points)[0]
            for kind in ("exact", "detached")
        )
    assert (exact - held).abs().max() > 1e-3


@pytest.mark.parametrize(("released", "aim"), [({}, "answer"), ({"backward": "detached", "half": True}, "smooth")])
def test_aware_attacks_go_through_the_prior(classifier, samples, released, aim):
    images, labels = samples[0][:20], samples[1][:20]
    defended = CLIPureDiff(**released)(classifier)
    attack = Aware(eps=EPS, steps=10, draws=2, judged=2, aims=(aim,))
    found = attack(defended.for_attack(), images, labels)
    assert accuracy(defended.at(1_000_003), images, labels) > 0.6
    assert accuracy(defended.at(1_000_003), found, labels) < 0.3


def test_steps_are_unrolled_where_the_surrogate_is_not_exact(classifier, images):
    def open_to(**options):
        return {*aims_against(CLIPure(**options)(classifier).for_attack())}

    assert open_to() == {"plain", "answer", "margin"}
    assert open_to(backward="detached") == open_to(half=True) == {"plain", "answer", "margin", "smooth"}
    pixels = images.clone().requires_grad_()
    unrolled, exact = RELEASED.smooth(classifier, pixels, 0), replace(RELEASED, backward="exact", half=False)
    torch.testing.assert_close(unrolled, exact(classifier)(pixels))
    assert torch.autograd.grad(unrolled[:, 0].sum(), pixels)[0].any()


def test_released_attack_makes_little_of_the_prior(classifier, samples):
    images, labels = samples[0][:20], samples[1][:20]
    defended = CLIPureDiff(backward="detached", half=True)(classifier)
    found = PGD(eps=EPS, steps=5)(defended, images, labels)
    assert accuracy(defended.at(1_000_003), found, labels) > 0.6


def test_a_fine_tuned_clip_says_whose_prior_it_takes(clip, classifier, images):
    tuned = Clip(clip.network, clip.tokenizer, "elsewhere", clip.config)
    host = ZeroShotClassifier(tuned, classifier.classes)
    with pytest.raises(ValueError, match=r"'elsewhere' .* `python tools/prior.py .*prior=\.\.\."):
        CLIPureDiff()(host)(images)
    assert torch.equal(CLIPureDiff(prior=clip.name)(host)(images), CLIPureDiff()(classifier)(images))


def test_a_prior_of_another_size_is_an_error():
    with pytest.raises(ValueError, match="features of 5 numbers do not fit a prior of 64"):
        load_prior("tinyworld-clip").loss(unit_rows(2, size=5).float(), torch.zeros(2), torch.zeros(2, 5))


def test_weights_of_priors_are_part_of_the_provenance(monkeypatch):
    before = digests(CLIPureDiff())["robustclip.defenses.clipure:CLIPureDiff"]
    assert digests(CLIPureDiff())["robustclip.defenses.clipure:CLIPureDiff"] == before
    from robustclip.study import provenance

    monkeypatch.setattr(provenance, "file_digest", lambda path: f"other {path.name}")
    for known in (provenance._digest, provenance._dumps):
        known.cache_clear()
    assert digests(CLIPureDiff())["robustclip.defenses.clipure:CLIPureDiff"] != before
    for known in (provenance._digest, provenance._dumps):
        known.cache_clear()


def test_training_repeats_and_learns():
    features = F.normalize(unit_rows(500, size=8).abs(), dim=1).float()
    first, second = (tool.train(features, steps=60) for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert tool.mean_loss(first, features) < 0.6 * tool.mean_loss(tool.train(features, steps=1), features)
