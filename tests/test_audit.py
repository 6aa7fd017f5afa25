"""The audit: each broken classifier or attack sets off the checks made for it, healthy ones pass them all."""

import math
import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustclip import models
from robustclip.attacks import (
    FGSM,
    PGD,
    SGA,
    AutoAttack,
    BertAttack,
    CoAttack,
    Fast,
    FeaturePGD,
    SepAttack,
    UniformNoise,
)
from robustclip.attacks.base import Target
from robustclip.attacks.text import TextAttack
from robustclip.audit import CHECKS, Case, audit
from robustclip.component import component
from robustclip.data.roles import role, tinyworld_samples
from robustclip.defenses import broken
from robustclip.models import ZeroShotClassifier

EPS = 4 / 255
PASSIVE = PGD(eps=0.02, step_size=0, start="image")  # never moves


class Templates(nn.Module):
    """Compares pictures with the mean picture of each class: fast, and so smooth that PGD-20 finds all there is."""

    def __init__(self, images, labels):
        super().__init__()
        pooled = F.adaptive_avg_pool2d(images, 8).flatten(1) - 0.5
        means = torch.stack([pooled[labels == label].mean(0) for label in range(10)])
        self.compare = nn.Linear(192, 10, bias=False)
        self.compare.weight.data = F.normalize(means - means.mean(0), dim=1)

    def forward(self, images):
        return 30 * self.compare(F.normalize(F.adaptive_avg_pool2d(images, 8).flatten(1) - 0.5, dim=1))


class Linear(nn.Module):
    """Logits (0, w (x - 1/2)): an l_inf attacker wins exactly where eps sum |w| exceeds |w (x - 1/2)|."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(48, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        rise = (images.flatten(1) - 0.5) @ self.weight
        return torch.stack([torch.zeros_like(rise), rise], 1)

    def within_reach(self, images, eps):
        with torch.no_grad():
            return self(images)[:, 1].abs() < eps * self.weight.abs().sum()


def predicted(classifier, images):
    with torch.no_grad():
        return classifier(images).argmax(1)


def answers(classifier, images):
    with torch.no_grad():
        return classifier(images)


def only(name, *arguments, **options):
    """The finding of one check."""
    (finding,) = audit(*arguments, checks=[name], **options).findings
    return finding


@pytest.fixture(scope="module")
def templates():
    """The healthy classifier of most tests, and 24 images that it gets right."""
    images, labels, _, _ = tinyworld_samples("stl10", "train", 640)
    classifier = Templates(images.float() / 255, labels).eval()
    images, labels, _, _ = tinyworld_samples("stl10", "test", 400)
    images = images.float() / 255
    right = predicted(classifier, images) == labels
    return classifier, images[right][:24], labels[right][:24]


@pytest.fixture(scope="module")
def tiny():
    """A linear classifier and images inside the pixel bounds, so that everything has a closed form."""
    classifier = Linear()
    images = torch.rand(60, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    return classifier, images, predicted(classifier, images)


@pytest.fixture(scope="module")
def embedded():
    images, labels, _, _ = tinyworld_samples("cifar10", "test", 4)
    return models.zero_shot(models.load(device="cpu"), role("cifar10")), images.float() / 255, labels


# --- what is caught, and what passes ----------------------------------------------------------------------------------

CLASSIFIERS = [
    (broken.Quantised(), {"gradients", "loss-path", "large-budget", "transfer", "square"}),
    (broken.Saturated(scale=1e6), {"gradients", "loss-path", "large-budget", "transfer", "square"}),
    (broken.Noisy(), {"random-output", "more-restarts"}),
    (broken.OptimisedAtTestTime(steps=1), {"inference-work"}),
    (broken.Detached(), {"loss-path", "large-budget", "transfer", "square"}),
    (broken.Planted(period=EPS), {"square"}),
    (broken.BatchCentred(), {"neighbours"}),
    (broken.Offset(), {"precision"}),
    (broken.SquareRooted(), {"gradients", "transfer", "square"}),
]
ATTACKS = [
    (PGD(eps=EPS, steps=1), {"more-steps"}),
    (PGD(eps=EPS, step_size=EPS / 1000), {"single-step", "large-budget", "transfer", "square"}),
    (broken.ForgetfulPGD(eps=EPS), {"single-step", "large-budget", "transfer", "square"}),
    (broken.ForgetfulPGD(eps=EPS, real_eps=2 * EPS), {"budget"}),
    (UniformNoise(eps=EPS), {"large-budget", "transfer", "square"}),
]
HEALTHY = [PGD(eps=EPS), PGD(eps=EPS, loss="margin", restarts=2), PGD(eps=0.5, norm="l2")]


@pytest.mark.parametrize(("defense", "caught_by"), CLASSIFIERS, ids=[repr(defense) for defense, _ in CLASSIFIERS])
def test_broken_classifiers_are_caught(templates, defense, caught_by):
    classifier, images, labels = templates
    found = audit(defense(classifier), PGD(eps=EPS), images, labels, surrogate=classifier, checks=sorted(caught_by))
    assert found.flags == tuple(sorted(caught_by))


@pytest.mark.parametrize(("attack", "caught_by"), ATTACKS, ids=[repr(attack) for attack, _ in ATTACKS])
def test_broken_attacks_are_caught(templates, attack, caught_by):
    assert audit(templates[0], attack, *templates[1:], checks=sorted(caught_by)).flags == tuple(sorted(caught_by))


@pytest.mark.parametrize("attack", HEALTHY, ids=repr)
def test_a_converged_attack_on_a_smooth_classifier_passes(templates, attack):
    found = audit(templates[0], attack, *templates[1:])
    assert [finding.flagged for finding in found.findings] == [False] * len(CHECKS)


@pytest.mark.parametrize("attack", [PGD(eps=0.02, steps=5), PGD(eps=0.1, norm="l2")], ids=repr)
def test_the_linear_classifier_passes(tiny, attack):
    """PGD finds the optimum there, so no rival can find more."""
    assert [finding.flagged for finding in audit(tiny[0], attack, *tiny[1:]).findings] == [False] * len(CHECKS)


def test_the_embedded_clip_passes(embedded):
    found = audit(embedded[0], PGD(eps=1 / 255), *embedded[1:])
    assert [finding.flagged for finding in found.findings] == [False] * len(CHECKS)


def test_every_check_has_something_that_it_catches():
    caught = set().union(*(names for _, names in CLASSIFIERS + ATTACKS))
    assert set(CHECKS) - caught == {"noise"}  # which the next test sets off


def test_noise_is_a_rival_of_an_attack_that_stands_still(tiny):
    """Near the boundary each draw breaks about half; PGD breaks all, and leaves nothing to noise."""
    classifier, images, _ = tiny
    near = 0.5 + 0.01 * (images - 0.5)
    labels = predicted(classifier, near)
    assert only("noise", classifier, PASSIVE, near, labels).value > 90
    assert only("noise", classifier, PGD(eps=0.02), near, labels).value == 0


# --- numbers with a closed form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["single-step", "transfer"])
@pytest.mark.parametrize("eps", [0.01, 0.02, 0.05])
def test_rivals_break_what_lies_within_reach(tiny, name, eps):
    """One gradient step, and examples made on the same classifier, are optimal for a linear one."""
    classifier, images, labels = tiny
    attack = PGD(eps=eps, step_size=0, start="image")
    share = 100 * classifier.within_reach(images, eps).double().mean().item()
    found = only(name, classifier, attack, images, labels, surrogate=classifier)
    assert found.value == pytest.approx(share)
    assert 0 < share < 100
    assert found.flagged
    assert f"broke {round(0.6 * share)} of 60 images" in found.text


def test_one_image_of_two_hundred_is_half_a_point_and_no_flag(tiny):
    """More than half a point is what counts: two of 200 images, one of 199."""
    classifier, images, labels = tiny
    near, far = classifier.within_reach(images, 0.05), ~classifier.within_reach(images, 0.1)
    one, other = near.nonzero()[:2, 0], far.nonzero()[:, 0]
    for hits, n, flagged in ((1, 200, False), (2, 200, True), (1, 199, True)):
        rows = torch.cat([one[:hits], other.repeat(200)[: n - hits]])
        found = only("single-step", classifier, PGD(eps=0.05, step_size=0, start="image"), images[rows], labels[rows])
        assert found.value == pytest.approx(100 * hits / n)
        assert found.flagged is flagged


@pytest.mark.parametrize("dead", [0, 3, 4, 60])
def test_dead_gradients_are_counted(tiny, dead):
    """5 % of 60 images are three."""
    classifier, images, labels = tiny
    brightness = images.mean((1, 2, 3))
    limit = brightness.sort().values[dead - 1] if dead else -1

    def partly(images):
        logits = classifier(images)
        return torch.where(images.detach().mean((1, 2, 3))[:, None] <= limit, logits.detach(), logits)

    found = only("gradients", partly, PGD(eps=0.02, steps=2), images, labels)
    assert found.value == pytest.approx(100 * dead / 60)
    assert found.flagged is (dead > 3)


def test_a_saturated_softmax_is_told_from_a_flat_classifier(templates):
    classifier, images, labels = templates
    saturated = only("gradients", broken.Saturated(scale=1e6)(classifier), PGD(eps=EPS), images, labels)
    flat = only("gradients", broken.Quantised()(classifier), PGD(eps=EPS), images, labels)
    assert "on 24 of 24 images, the margin of the logits on 0: the softmax saturates" in saturated.text
    assert "on 24 of 24 images, the margin of the logits on 24." in flat.text


def test_a_large_budget_is_compared_with_the_best_constant_guess(tiny):
    classifier, images, labels = tiny
    found = only("large-budget", classifier, broken.ForgetfulPGD(eps=0.02, real_eps=0.0), images, labels)
    assert found.value == 100
    assert found.limit == pytest.approx(100 * max(labels.bincount()).item() / 60)
    assert found.flagged
    assert only("large-budget", classifier, PGD(eps=0.02, steps=5), images, labels).value == 0


@pytest.mark.parametrize("turn", [0.5, 3])
def test_small_changes_by_company_are_measured(tiny, turn):
    """A batch that shifts one logit by `turn` percent of the median spread; two percent are the limit."""
    classifier, images, labels = tiny
    with torch.no_grad():
        spread = classifier(images)[:, 1].abs().median().item()

    def social(images):
        return classifier(images) + (len(images) > 1) * turn / 100 * spread * torch.tensor([0.0, 1.0])

    found = only("neighbours", social, PGD(eps=0.02, steps=2), images, labels)
    assert found.value == pytest.approx(turn / 100, rel=0.05)  # of the spread in company
    assert found.flagged is (turn > 2)


def test_work_at_inference_is_seen_through_no_grad(tiny):
    """Gradients switched on and off again, in a nested model, count; nested no_grad does not."""
    classifier, images, labels = tiny

    def quiet(images):
        with torch.no_grad():
            return classifier(images)

    class Busy(nn.Module):
        def forward(self, images):
            with torch.enable_grad():
                images * 1
            return classifier(images)

    assert only("inference-work", quiet, UniformNoise(eps=0.02), images, labels).value == 0
    assert only("inference-work", nn.Sequential(Busy()), UniformNoise(eps=0.02), images, labels).value >= 1


# --- checks that cannot be run ----------------------------------------------------------------------------------------

NOT_RUN = [
    (UniformNoise(eps=EPS), {"single-step", "loss-path", "more-steps"}),
    (FGSM(eps=EPS), {"single-step", "loss-path", "more-steps", "more-restarts"}),
    (PGD(eps=EPS, target_class=3), {"noise", "single-step", "large-budget", "transfer", "square"}),
    (
        lambda classifier, images, labels: images,
        set(CHECKS) - {"random-output", "inference-work", "precision", "gradients", "neighbours", "budget"},
    ),
]


@pytest.mark.parametrize(("attack", "names"), NOT_RUN, ids=["noise", "fgsm", "targeted", "function"])
def test_what_does_not_apply_is_said(templates, attack, names):
    found = audit(templates[0], attack, *templates[1:])
    assert {finding.check for finding in found.findings if finding.flagged is None} == names
    for finding in found.findings:
        assert (finding.flagged is None) == finding.text.startswith("Not run: ") == math.isnan(finding.value)


def test_the_attack_inside_a_wrapper_is_audited(tiny):
    """Its norm, its steps, its seed: on a classifier without a fast twin nothing differs."""
    attack = PGD(eps=0.1, norm="l2", steps=2, seed=3)
    assert audit(tiny[0], Fast(attack=attack), *tiny[1:]) == audit(tiny[0], attack, *tiny[1:])


def test_several_attacks_in_turn_have_no_path(tiny):
    attack = AutoAttack(eps=0.02, parts=("apgd-ce", "square"), steps=5, queries=10)
    found = audit(tiny[0], attack, *tiny[1:])
    assert found.flags == ()
    assert [finding.check for finding in found.findings if finding.flagged is None] == ["loss-path"]


def test_a_label_free_attack_is_judged_by_its_outcome(embedded):
    found = audit(embedded[0], FeaturePGD(eps=2 / 255, steps=3), *embedded[1:], checks=["single-step", "loss-path"])
    assert found.findings[0].flagged is not None
    assert found.findings[1].flagged is None  # it asks the encoder, not the classifier


@pytest.mark.parametrize(
    "blind",
    [lambda logits: logits.detach(), lambda logits: logits * torch.tensor(1.0).sqrt() + 0 * (logits - logits).sqrt()],
)
def test_without_gradients_the_attack_cannot_run_and_that_is_a_flag(tiny, blind):
    classifier, images, labels = tiny
    found = audit(lambda images: blind(classifier(images)), PGD(eps=0.02), images, labels, surrogate=classifier)
    findings = {finding.check: finding for finding in found.findings}
    assert findings["gradients"].flagged
    assert "gradient" in findings["gradients"].text
    assert findings["more-steps"].flagged is findings["large-budget"].flagged is None
    reach = classifier.within_reach(images, 0.02).double().mean().item()
    assert findings["transfer"].value == pytest.approx(100 * reach)


def test_a_function_needs_a_surrogate_and_a_defense_has_one_inside(templates, embedded):
    classifier, images, labels = templates
    assert only("transfer", classifier.forward, PGD(eps=EPS), images, labels).flagged is None
    assert only("transfer", classifier.forward, PGD(eps=EPS), images, labels, surrogate=classifier).flagged is False
    found = only("transfer", broken.Quantised()(embedded[0]), PGD(eps=2 / 255), *embedded[1:])
    assert found.flagged
    assert "made on the undefended classifier" in found.text


# --- what an attack returns, and unusual models -----------------------------------------------------------------------


@component
class Spoiling:
    """An attack within a budget that spoils its first two images."""

    spoil: float
    eps: float = 0.02

    def __call__(self, classifier, images, labels):
        found = images.clone()
        found[:2, 0, 0, 0] = self.spoil
        return found


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (math.nan, "2 returned images hold NaN or infinity, 0 leave [0, 1], 0 leave the budget"),
        (math.inf, "2 returned images hold NaN or infinity"),
        (1.5, "0 returned images hold NaN or infinity, 2 leave [0, 1], 2 leave the budget"),
        (0.999, "0 leave [0, 1], 2 leave the budget"),
    ],
)
def test_what_is_returned_must_be_images_within_the_budget(tiny, spoil, words):
    found = audit(tiny[0], Spoiling(spoil=spoil), *tiny[1:], checks=["budget", "random-output", "precision"])
    assert found.flags == ("budget",)
    assert found.findings[0].value == pytest.approx(100 * 2 / 60)
    assert words in found.findings[0].text


@pytest.mark.parametrize("attack", [PGD(eps=0.02, steps=3), PGD(eps=0.1, norm="l2", steps=3)], ids=repr)
def test_honest_attacks_keep_their_budget(tiny, attack):
    assert only("budget", tiny[0], attack, *tiny[1:]).value == 0
    assert only("budget", tiny[0], lambda _, images, labels: images * 0, *tiny[1:]).flagged is False, "none declared"


def test_a_compiled_model_is_audited_as_the_model_itself(tiny):
    classifier, images, labels = tiny
    compiled = torch.compile(classifier, backend="eager")
    attack = PGD(eps=0.02, steps=3)
    assert audit(compiled, attack, images, labels) == audit(classifier, attack, images, labels)


class Viewing(nn.Module):
    """Flattens by `view`, which needs contiguous images."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images.view(len(images), -1).view(images.shape))


def test_the_layout_of_images_does_not_matter(tiny):
    classifier, images, labels = tiny
    attack, checks = PGD(eps=0.02, steps=3), [name for name in CHECKS if name != "square"]
    expected = audit(classifier, attack, images, labels, checks=checks)
    for other in (images.to(memory_format=torch.channels_last), images.transpose(2, 3).contiguous().transpose(2, 3)):
        assert not other.is_contiguous()
        assert audit(Viewing(classifier), attack, other, labels, checks=checks) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_are_audited_over_float32_pixels(tiny, dtype):
    classifier, images, labels = tiny
    half = Linear()
    half.weight.data = half.weight.data.to(dtype)
    found = audit(half, PGD(eps=0.02, steps=3), images.to(dtype), labels, surrogate=classifier)
    findings = {one.check: one for one in found.findings}
    assert findings["precision"].text == "Not run: the classifier computes in half precision anyway."
    assert findings["gradients"].flagged is findings["budget"].flagged is False
    assert found.findings[0].value < 0.1
    with pytest.raises(ValueError, match=f"does not take images of torch.float32 .*its weights are {dtype}"[:50]):
        audit(half, PGD(eps=0.02, steps=3), images, labels)


def test_inference_mode_around_an_audit_changes_nothing(tiny):
    attack = PGD(eps=0.02, steps=3)
    with torch.inference_mode():
        found = audit(tiny[0], attack, tiny[1].clone(), tiny[2].clone())
    assert found == audit(tiny[0], attack, *tiny[1:])


def test_a_function_over_a_model_in_training_mode_leaves_its_statistics(tiny):
    model = nn.Sequential(nn.BatchNorm2d(3), tiny[0]).train()
    before = model[0].running_mean.clone()
    found = audit(
        lambda images: model(images), PGD(eps=0.02, steps=2), *tiny[1:], checks=["random-output", "neighbours"]
    )
    assert found.flags == ()
    assert torch.equal(model[0].running_mean, before)
    assert model[0].training


# --- attacks on images and texts --------------------------------------------------------------------------------------


@component
class Swap(TextAttack):
    """Swaps the last two prompts."""

    def __call__(self, clip, prompts):
        return [*prompts[:-2], prompts[-1], prompts[-2]]


def test_the_image_attack_of_a_sep_attack_is_audited(embedded):
    attack, checks = PGD(eps=1 / 255, steps=2), ["budget", "single-step", "precision"]
    for reading in ("released", "worst"):
        found = audit(embedded[0], SepAttack(image=attack, text=Swap(), reading=reading), *embedded[1:], checks=checks)
        assert found == audit(embedded[0], attack, *embedded[1:], checks=checks)


@pytest.mark.parametrize("defense", [None, broken.Saturated(scale=2.0)], ids=["plain", "defended"])
def test_co_attack_is_audited_on_the_prompts_that_it_attacked(embedded, defense):
    plain, images, labels = embedded
    classifier = defense(plain) if defense else plain
    attack = CoAttack(eps=1 / 255, steps=2, text=Swap())
    case = Case(classifier, attack, images, labels, 0, 64, None)
    swapped = ZeroShotClassifier(plain.clip, plain.classes.with_prompts(Swap()(None, plain.prompts)))
    target = Target(plain.clip, plain.classes, defense)
    assert torch.equal(case.clean, answers(defense(swapped) if defense else swapped, images))
    assert not torch.equal(case.clean, answers(classifier, images))
    torch.testing.assert_close(case.attacked, attack.pairs(target, images, labels)[0].images)
    found = audit(classifier, attack, images, labels)
    assert {one.check for one in found.findings if one.flagged is None} == {"loss-path"}
    assert "budget" not in found.flags


def test_texts_of_their_own_have_no_rival(embedded):
    plain, images, labels = embedded
    attack = SGA(eps=1 / 255, steps=1, scales=(1.0,), text=BertAttack())
    found = audit(plain, attack, images, labels)
    said = {one.text for one in found.findings if one.flagged is None and one.check != "loss-path"}
    assert "Not run: each image is scored with a text of its own, which no rival faces." in said
    applied = {one.check for one in found.findings if one.flagged is not None}
    assert applied == {"random-output", "inference-work", "precision", "gradients", "neighbours", "budget"}


# --- side effects, seeds, batches -------------------------------------------------------------------------------------


def test_nothing_is_touched(templates):
    classifier, images, labels = templates
    classifier = nn.Sequential(nn.BatchNorm2d(3), classifier).train().requires_grad_(True)
    weights = {name: value.clone() for name, value in classifier.state_dict().items()}
    pixels, classes = images.clone(), labels.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    audit(broken.Noisy()(classifier), PGD(eps=EPS, steps=3), images, labels)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # noqa: NPY002
    assert all(torch.equal(value, weights[name]) for name, value in classifier.state_dict().items())
    assert all(module.training for module in classifier.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in classifier.parameters())
    assert torch.equal(images, pixels)
    assert torch.equal(labels, classes)
    assert not images.requires_grad


def test_the_seed_decides_and_not_the_company_of_checks(templates):
    """A random classifier, from another global state, in other checks' company."""
    classifier, images, labels = broken.Noisy(deviation=0.5)(templates[0]), *templates[1:]
    names = ("random-output", "noise", "single-step", "more-restarts")
    first = audit(classifier, PGD(eps=EPS, steps=3), images, labels, checks=names)
    torch.rand(5)
    assert audit(classifier, PGD(eps=EPS, steps=3), images, labels, checks=names) == first
    assert only("single-step", classifier, PGD(eps=EPS, steps=3), images, labels) == first.findings[2]
    assert audit(classifier, PGD(eps=EPS, steps=3), images, labels, checks=names, seed=1) != first


def test_batches_do_not_matter(templates):
    names = [name for name in CHECKS if name != "square"]
    found = [audit(templates[0], PGD(eps=EPS, steps=3), *templates[1:], checks=names, batch_size=k) for k in (7, 64)]
    values = [[finding.value for finding in one.findings] for one in found]
    assert found[0].flags == found[1].flags
    assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_the_table_has_one_row_per_check_in_the_order_asked(tiny):
    found = audit(tiny[0], UniformNoise(eps=0.02), *tiny[1:], checks=["more-steps", "gradients"])
    frame = found.frame()
    assert list(frame.columns) == ["check", "flagged", "value", "limit", "text"]
    assert frame["check"].tolist() == ["more-steps", "gradients"]
    assert frame["flagged"].tolist() == [None, False]
    assert audit(tiny[0], UniformNoise(eps=0.02), *tiny[1:], checks=[]).frame().empty


@component
class Words:
    """Stands for an attack on texts."""

    changes_images = False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checks": ["gradient"]}, "unknown check 'gradient'; choose one of: random-output"),
        ({"seed": -1}, "seed=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"images": torch.zeros(0, 3, 4, 4)}, "images is empty"),
        ({"images": torch.zeros(60, 3, 4, 4, dtype=torch.uint8)}, "divide bytes by 255"),
        ({"labels": torch.zeros(60)}, "labels must be integers"),
        ({"labels": torch.full((60,), 2)}, "label 2 is out of range"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "got 3 labels for 60 images"),
        ({"classifier": lambda images: images.flatten(1) * math.nan}, "gives NaN logits"),
        ({"attack": PGD(eps=0.02, target_class=9)}, "target_class=9 is out of range"),
        ({"classifier": lambda images: (images.flatten(1),)}, "must return logits of shape (60, classes), got a tuple"),
        ({"classifier": lambda images: images.sum((1, 2, 3))}, "got shape (60,)"),
        ({"classifier": lambda images: images[:, 0]}, "got shape (60, 4, 4)"),
        ({"classifier": lambda images: images.flatten(1)[:7]}, "got shape (7, 48)"),
        ({"images": np.zeros((60, 3, 4, 4))}, "images must be a torch.Tensor, got ndarray"),
        ({"images": torch.zeros(60, 3, 4, 4, dtype=torch.float64)}, "does not take images of torch.float64"),
        ({"labels": torch.zeros(60, dtype=torch.bool)}, "labels must be integers of shape (n,), got torch.bool"),
        ({"attack": lambda _, images, labels: images[:, :, :2]}, "attack returned (60, 3, 2, 4) for images of shape"),
        ({"attack": lambda _, images, labels: images[:5]}, "attack returned (5, 3, 4, 4) for images of shape (60,"),
        ({"attack": lambda _, images, labels: images.numpy()}, "attack returned a ndarray for images"),
        ({"attack": lambda _, images, labels: None}, "attack returned a NoneType for images"),
        ({"attack": Words()}, "attack=Words() changes no images; audit one that does"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(tiny, change, words):
    classifier, images, labels = tiny
    given = {"classifier": classifier, "attack": PGD(eps=0.02), "images": images, "labels": labels} | change
    with pytest.raises(ValueError, match=re.escape(words)):
        audit(given.pop("classifier"), given.pop("attack"), given.pop("images"), given.pop("labels"), **given)


# --- the broken classifiers are what they say -------------------------------------------------------------------------


@pytest.mark.parametrize("defense", [broken.Saturated(), broken.Offset(), broken.SquareRooted()], ids=repr)
def test_harmless_to_decisions(templates, defense):
    classifier, images, _ = templates
    assert torch.equal(predicted(defense(classifier), images), predicted(classifier, images))


def test_planted_examples_lie_in_every_budget(templates):
    """Brighten to the middle of the next shell, less than a period away: the class changes; beside it, it does not."""
    classifier, images, _ = templates
    defense, images = broken.Planted(period=EPS), images * 0.9
    away = ((0.5 - images.mean((1, 2, 3)) / EPS) % 1 * EPS).view(-1, 1, 1, 1)
    assert away.max() <= EPS
    planted, beside = images + away, images + away + EPS * defense.width
    assert (predicted(defense(classifier), planted) != predicted(classifier, planted)).all()
    assert torch.equal(predicted(defense(classifier), beside), predicted(classifier, beside))


def test_detached_blurs_and_its_gradient_points_away(templates):
    """Against the true slope of the blurred image's loss."""
    classifier, images, labels = templates
    images = images.clone().requires_grad_()
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    truth, told = classifier(blurred), broken.Detached()(classifier)(images)
    torch.testing.assert_close(told, truth, rtol=1e-4, atol=1e-4)
    slopes = [torch.autograd.grad(F.cross_entropy(logits, labels), images)[0].flatten(1) for logits in (truth, told)]
    assert (F.cosine_similarity(*slopes) < 0).all()


@component
class Idle:
    """An attack without settings that returns its input."""

    def __call__(self, classifier, images, labels):
        return images


def test_an_attack_of_another_family_gets_the_checks_that_need_no_settings(templates):
    found = audit(templates[0], Idle(), *templates[1:])
    assert found.flags == ()
    assert sum(finding.flagged is None for finding in found.findings) == 8
