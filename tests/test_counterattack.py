"""TTC and its relatives against loops over one image at a time."""

import inspect
import math
import re

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from by_hand import noise_by_hand, project
from robustclip import models
from robustclip.attacks.aware import aims_against
from robustclip.data.roles import role
from robustclip.defenses import counterattack
from robustclip.defenses.baselines import RandomNoise
from robustclip.defenses.counterattack import Counterattack

MIDDLE = {"relative": 0.0245, "cosine": 2.7e-4, "mirror": 0.97}  # between the scores of the images below


# --- the methods by hand, one image (3, h, w) and one step at a time --------------------------------------------------


def gradient(distance, delta):
    point = delta.clone().requires_grad_()
    return torch.autograd.grad(distance(point), point)[0]


def average(defense, deltas):
    weights = [math.exp(defense.beta * step) for step in range(len(deltas))]
    return sum(weight * delta for weight, delta in zip(weights, deltas, strict=True)) / sum(weights)


def relative_score(clip, image, noise):
    here, there = clip.raw_images(torch.stack([image, image + noise]))
    return ((there - here).norm() / here.norm()).item()


def ttc(defense, classifier, image, draw, turn=torch.sign):
    """What images behind an open gate get."""
    encode = classifier.clip.raw_images
    place, deltas = encode(image[None]), [noise_by_hand(defense, image, draw)]
    for _ in range(defense.steps):
        slope = gradient(lambda delta: (encode((image + delta)[None]) - place).square().sum(), deltas[-1])
        deltas.append(project(image, deltas[-1] + defense.step_size * turn(slope), defense.radius))
    return deltas[-1] if defense.beta is None else average(defense, deltas)


def doc(defense, classifier, image, draw):
    """Momentum, a random orthogonal part, a soft gate on the cosine drift."""
    encode = classifier.clip.raw_images
    place, noise = encode(image[None]), noise_by_hand(defense, image, draw)
    deltas, velocity = [noise], torch.zeros_like(image)
    for step in range(defense.steps):
        slope = gradient(lambda delta: (encode((image + delta)[None]) - place).square().sum(), deltas[-1])
        unit = slope / slope.norm()
        random = defense.noise(image[None], draw, f"orthogonal {step}")[0]
        random = random - (random * unit).sum() * unit
        velocity = defense.momentum * velocity + (1 - defense.momentum) * (
            unit + defense.orthogonal * random / random.norm()
        )
        deltas.append(project(image, deltas[-1] + defense.step_size * velocity.sign(), defense.radius))
    copies = [noise, *(noise_by_hand(defense, image, draw, part) for part in range(1, defense.drift_draws))]
    cosines = [F.cosine_similarity(encode((image + copy)[None]), place).item() for copy in copies]
    score = 1 - sum(cosines) / len(cosines)
    share = 1 / (1 + math.exp(-defense.sharpness * (defense.threshold - score) / defense.threshold))
    return score, share * average(defense, deltas) + (1 - share) * noise


def mac(defense, classifier, image, draw):
    """Image and mirror image moved by one delta, a soft gate on the cosine between them."""
    encode, mirror = classifier.clip.raw_images, image.flip(2)
    place, other, noise = encode(image[None]), encode(mirror[None]), noise_by_hand(defense, image, draw)
    deltas = [noise]
    for _ in range(defense.steps):
        slope = gradient(
            lambda delta: (
                (encode((image + delta)[None]) - place).square().sum()
                + (encode((mirror + delta.flip(2))[None]) - other).square().sum()
            ),
            deltas[-1],
        )
        deltas.append(project(image, deltas[-1] + defense.step_size * slope.sign(), defense.radius))
    score = F.cosine_similarity(place, other).item()
    share = 1 / (1 + math.exp(-defense.sharpness * (defense.threshold - score) / defense.threshold))
    return score, share * average(defense, deltas) + (1 - share) * noise


def each(function, defense, classifier, images, draw):
    return [function(defense, classifier, image, draw) for image in images]


# --- TTC --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "defense",
    [Counterattack(), Counterattack(threshold=None), Counterattack(threshold=None, beta=None, seed=3),
     Counterattack(threshold=0.001, reverse=True), Counterattack(steps=4, step_size=3 / 255, beta=0.7)],
    ids=repr,
)  # fmt: skip
def test_images_behind_open_gates_get_the_counterattack(exact, images, defense):
    pixels = images[:2].double()
    expected = torch.stack(each(ttc, defense, exact, pixels, 7))
    torch.testing.assert_close(defense.correction(exact, pixels, 7), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(defense(exact).at(7)(pixels), exact(pixels + expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("closed", ["noise", "nothing"])
@pytest.mark.parametrize("reverse", [False, True])
def test_each_image_has_a_gate_of_its_own(exact, images, closed, reverse):
    """An open one where the score is below the threshold; above it in reverse."""
    pixels, defense = images.double(), Counterattack(threshold=MIDDLE["relative"], closed=closed, reverse=reverse)
    expected, opened = [], []
    for image in pixels:
        noise = noise_by_hand(defense, image, 0)
        score = relative_score(exact.clip, image, noise)
        opened.append(score > MIDDLE["relative"] if reverse else score < MIDDLE["relative"])
        shut = noise if closed == "noise" else 0 * noise
        expected.append(ttc(defense, exact, image, 0) if opened[-1] else shut)
    assert 0 < sum(opened) < len(opened)
    torch.testing.assert_close(defense.correction(exact, pixels, 0), torch.stack(expected), rtol=0, atol=1e-9)


def test_scores_are_those_of_the_noise_that_starts(exact, images):
    pixels, defense = images.double(), Counterattack()
    expected = [relative_score(exact.clip, image, noise_by_hand(defense, image, 4)) for image in pixels]
    torch.testing.assert_close(defense.score(exact, pixels, 4), torch.tensor(expected).double())


def test_scores_are_averaged_over_draws(exact, images):
    pixels, defense = images.double(), Counterattack(drift_draws=3)
    noises = [[noise_by_hand(defense, image, 4, part) for part in ("start", 1, 2)] for image in pixels]
    expected = [sum(relative_score(exact.clip, image, noise) for noise in own) / 3
                for image, own in zip(pixels, noises, strict=True)]  # fmt: skip
    torch.testing.assert_close(defense.score(exact, pixels, 4), torch.tensor(expected).double())


@pytest.mark.parametrize("sign", [1, -1])
def test_a_gate_says_how_far_it_is_open_in_thresholds(classifier, images, sign):
    defense = Counterattack(threshold=MIDDLE["relative"], reverse=sign < 0)
    expected = sign * (1 - defense.score(classifier, images, 0) / defense.threshold)
    torch.testing.assert_close(defense.gate(classifier, images, 0), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "defense",
    [Counterattack(steps=0, threshold=None), Counterattack(steps=0, threshold=None, beta=None),
     Counterattack(threshold=1e-9), Counterattack(steps=0, threshold=None, closed="nothing")],
    ids=["no steps", "no steps, last delta", "all gates closed", "no steps, open gates"],
)  # fmt: skip
def test_what_is_not_counterattacked_is_random_noise(classifier, images, defense):
    for draw in (0, 5):
        expected = RandomNoise().correction(classifier, images, draw)
        assert torch.equal(defense.correction(classifier, images, draw), expected)


def test_steps_lead_farther_away_than_noise(classifier, images):
    place = classifier.clip.raw_images(images)
    moved = [images + Counterattack(steps=steps).correction(classifier, images, 0) for steps in (0, 1, 2, 4)]
    distances = torch.stack([(classifier.clip.raw_images(one) - place).norm(dim=1) for one in moved])
    assert (distances.diff(dim=0) > 0).all()


@pytest.mark.parametrize(
    "defense",
    [
        Counterattack(steps=0),
        Counterattack(steps=0, threshold=None, mirrored=True),
        Counterattack(drift_draws=3),
        Counterattack(drift="mirror", drift_draws=3, reverse=True),
        Counterattack(original="tinyworld-clip", mirrored=True),
    ],
    ids=repr,
)
def test_passes_through_open_gates_are_as_declared(classifier, images, defense):
    with models.count_passes() as passes:
        defense(classifier)(images)
    assert (passes.forward / 4, passes.backward / 4) == defense.passes(10)


def test_closed_gates_spare_the_steps(classifier, images):
    defense = Counterattack(threshold=MIDDLE["relative"])
    opened = (defense.gate(classifier, images, 0) > 0).sum().item()
    with models.count_passes() as passes:
        defense(classifier)(images)
    assert (passes.forward, passes.backward) == (3 * len(images) + 2 * opened, 2 * opened)


def test_a_counterattack_moves_the_answers_of_what_is_no_clip():
    """Where features are mean colours, all steps go where the noise began to lead."""
    grey = torch.full((2, 3, 8, 8), 0.5) + torch.tensor([0, 0.1]).view(2, 1, 1, 1)
    defense = Counterattack(threshold=None, beta=None, steps=3)
    start = defense.start(grey, 0)
    expected = (start + 3 / 255 * start.mean((2, 3), keepdim=True).sign()).clamp(-4 / 255, 4 / 255)
    found = defense.correction(lambda images: images.mean((2, 3)), grey, 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# --- fine-tuned hosts -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned():
    """A CLIP whose weights went elsewhere."""
    clip = models.load(device="cpu")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for weight in clip.network.visual.parameters():
            weight.mul_(1 + 0.1 * torch.randn(weight.shape, generator=generator))
    return models.zero_shot(clip, role("cifar10"))


def test_of_a_fine_tuned_host_the_original_scores(classifier, tuned, images):
    defense = Counterattack(original="tinyworld-clip")
    expected = Counterattack().score(classifier, images, 0)
    torch.testing.assert_close(defense.score(tuned, images, 0), expected)
    assert (Counterattack().score(tuned, images, 0) - expected).abs().max() > 1e-3


def test_of_a_fine_tuned_host_the_host_is_counterattacked(tuned, images):
    expected = Counterattack(threshold=None).correction(tuned, images, 0)
    assert torch.equal(Counterattack(original="tinyworld-clip").correction(tuned, images, 0), expected)


def test_what_is_no_clip_has_no_original(images):
    with pytest.raises(ValueError, match="it is no ZeroShotClassifier"):
        Counterattack(original="tinyworld-clip")(lambda images: images.mean((2, 3)))(images)


# --- relatives --------------------------------------------------------------------------------------------------------


DOC = {"steps": 3, "step_size": 3 / 255, "drift": "cosine", "threshold": MIDDLE["cosine"], "sharpness": 5}
MAC = {"radius": 8 / 255, "mirrored": True, "drift": "mirror", "threshold": MIDDLE["mirror"], "sharpness": 70}


@pytest.mark.parametrize(
    "bent",
    [{"momentum": 0.9, "orthogonal": 0.5, "drift_draws": 3}, {"momentum": 0.5, "orthogonal": 0}, {"orthogonal": 2}],
    ids=str,
)
def test_doc_is_the_loop(exact, images, bent):
    pixels, defense = images[:2].double(), Counterattack(**DOC, **bent)
    scores, expected = zip(*each(doc, defense, exact, pixels, 2), strict=True)
    torch.testing.assert_close(defense.score(exact, pixels, 2), torch.tensor(scores).double())
    torch.testing.assert_close(defense.correction(exact, pixels, 2), torch.stack(expected), rtol=0, atol=1e-9)


def test_mac_is_the_loop(exact, images):
    pixels, defense = images[:2].double(), Counterattack(**MAC)
    scores, expected = zip(*each(mac, defense, exact, pixels, 2), strict=True)
    torch.testing.assert_close(defense.score(exact, pixels, 2), torch.tensor(scores).double())
    torch.testing.assert_close(defense.correction(exact, pixels, 2), torch.stack(expected), rtol=0, atol=1e-9)


def test_mac_averages_the_answers_to_image_and_mirror_image(classifier, images):
    defense = Counterattack(**MAC)
    moved = images + defense.correction(classifier, images, 0)
    expected = (classifier(moved) + classifier(moved.flip(3))) / 2
    torch.testing.assert_close(defense(classifier)(images), expected, rtol=0, atol=1e-4)


def test_without_a_threshold_everything_is_counterattacked_fully(classifier, images):
    soft = Counterattack(threshold=None, sharpness=5)
    expected = Counterattack(threshold=None).correction(classifier, images, 0)
    torch.testing.assert_close(soft.correction(classifier, images, 0), expected, rtol=0, atol=1e-6)


def test_the_calls_of_the_docstring_work(classifier, images):
    calls = re.findall(r"^(Counterattack\(.*?\))(?: |$)", inspect.getdoc(counterattack), re.MULTILINE)
    assert len(calls) == 4
    for call in calls:
        assert eval(call, vars(counterattack))(classifier)(images).shape == (4, 10)


# --- what an attacker differentiates ----------------------------------------------------------------------------------


def soft(slope):
    return torch.tanh(slope / slope.abs().mean())


def slopes(function, pixels):
    """The derivative along one direction: by autograd, and by differences too small for float32, which keys noise."""
    direction = torch.randint(2, pixels.shape, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    ahead, behind, point = pixels + 5e-9 * direction, pixels - 5e-9 * direction, pixels.clone().requires_grad_()
    assert torch.equal(ahead.float(), behind.float())
    with sdpa_kernel(SDPBackend.MATH):
        (exact,) = torch.autograd.grad(function(point), point)
        return (exact * direction).sum(), (function(ahead) - function(behind)).detach() / 1e-8


@pytest.fixture(scope="module")
def grey(images):
    """Images of little contrast, so that no pixel is cut at black or white."""
    return (images[:2] / 2 + 0.25).double()


def test_smooth_steps_are_the_loop_with_tanh(exact, grey):
    defense = Counterattack()
    with sdpa_kernel(SDPBackend.MATH):
        moved = torch.stack([image + ttc(defense, exact, image, 3, soft) for image in grey])
        torch.testing.assert_close(defense.smooth(exact, grey, 3), exact(moved), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "defense",
    [Counterattack(), Counterattack(steps=3, momentum=0.9, orthogonal=0.5, mirrored=True), Counterattack(steps=0)],
    ids=repr,
)
def test_smooth_steps_have_the_derivative_of_differences(exact, grey, defense):
    found, expected = slopes(lambda pixels: defense.smooth(exact, pixels, 0)[:, 0].sum(), grey)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("drift", MIDDLE)
def test_gates_have_the_derivative_of_differences(exact, grey, drift):
    defense = Counterattack(drift=drift, drift_draws=2)
    found, expected = slopes(lambda pixels: defense.gate(exact, pixels, 0).sum(), grey)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_the_soft_gate_has_a_slope(exact, images):
    """The answer follows the share w(x) with its own gradient; only the steps are held constant."""
    defense, pixels = Counterattack(sharpness=5, threshold=0.03, steps=4), images.double().requires_grad_()
    (found,) = torch.autograd.grad(defense.logits(exact, pixels, 0)[:, 0].sum(), pixels)
    start, moved = defense.start(pixels, 0), Counterattack(threshold=None, steps=4).correction(exact, pixels, 0)
    share = torch.sigmoid(5 * (1 - defense.score(exact, pixels, 0) / 0.03))[:, None, None, None]
    answer = exact(pixels + share * moved + (1 - share) * start)
    (expected,) = torch.autograd.grad(answer[:, 0].sum(), pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_attackers_are_told_steps_and_gate(classifier):
    assert list(aims_against(Counterattack()(classifier))) == ["plain", "smooth", "answer", "margin", "gate"]


def test_without_a_threshold_there_is_no_gate_to_tell(classifier):
    assert list(aims_against(Counterattack(threshold=None)(classifier))) == ["plain", "smooth", "answer", "margin"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", -1),
        ("step_size", 2),
        ("radius", -1),
        ("beta", -1),
        ("threshold", 0),
        ("sharpness", -1),
        ("drift_draws", 0),
        ("momentum", 1.5),
        ("orthogonal", -1),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        Counterattack(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("closed", "zero"), ("drift", "absolute")])
def test_what_is_not_to_be_chosen_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} '{value}'"):
        Counterattack(**{field: value})
