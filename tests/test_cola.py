"""COLA against loops over images, classes, views and texts."""

import math

import ot
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustclip.attacks.aware import aims_against, told
from robustclip.attacks.losses import cross_entropy
from robustclip.classes import Classes
from robustclip.component import component, identity
from robustclip.data.describing import class_texts
from robustclip.data.roles import tinyworld_samples
from robustclip.defenses.base import undefended
from robustclip.defenses.cola import COLA, subspace
from robustclip.defenses.views import TTE, Mirrored, Views
from robustclip.models import ZeroShotClassifier, count_passes

MEANS = {"projection": "off", "solver": "independent", "view_weights": "uniform", "text_weights": "uniform"}
FEW = Classes(
    ["red star", "blue fish", "green tree"],
    ["a photo of a red star", "a photo of a blue fish", "a photo of a green tree"],
    [
        ["a star", "a red thing", "a ruby star"],
        ["a fish", "a blue thing", "an azure trout"],
        ["a tree", "a pine", "wood"],
    ],
)
FOUR = {"texts": 4}
STEP = 1e-3  # of finite differences


@pytest.fixture(scope="module")
def few(clip):
    return ZeroShotClassifier(clip, FEW)


# --- by hand ----------------------------------------------------------------------------------------------------------


def entropy_by_hand(logits):
    shares = [math.exp(one - max(logits)) for one in logits]
    shares = [one / sum(shares) for one in shares]
    return -sum(one * math.log(one) for one in shares if one)


def softmax_by_hand(values):
    shares = [math.exp(one - max(values)) for one in values]
    return [one / sum(shares) for one in shares]


def texts_by_hand(defense, plain):
    told_of = plain.classes.descriptions or [()] * len(plain.classes)
    rows = zip(plain.classes.names, plain.classes.prompts, told_of, strict=True)
    texts = [plain.clip.text_features(class_texts(name, prompt, defense.texts, own)) for name, prompt, own in rows]
    return torch.stack(texts).double()


def projection_by_hand(defense, texts):
    if defense.projection == "off":
        return torch.eye(texts.shape[-1], dtype=torch.float64)
    rows = texts.flatten(0, 1)
    left = torch.linalg.svd((rows - rows.mean(0) if defense.centred else rows).T, full_matrices=False)
    kept = min(defense.dimensions or texts.shape[-1] // 2, int((left.S / left.S[0]).gt(1e-5).sum()))
    return left.U[:, :kept] @ left.U[:, :kept].T


def view_weights_by_hand(defense, views, means, scale):
    if defense.view_weights == "uniform":
        return [1 / len(views)] * len(views)
    sign = 1 if defense.view_weights == "printed" else -1
    surprises = [entropy_by_hand([scale * float(view @ mean) for mean in means]) for view in views]
    return softmax_by_hand([sign * one / defense.view_temperature for one in surprises])


def text_weights_by_hand(defense, image, own, means, scale, place):
    if defense.text_weights == "uniform":
        return [1 / len(own)] * len(own)
    logits, surprises = [scale * float(image @ mean) for mean in means], []
    for text in own:
        replaced = [*logits]
        replaced[place] = scale * float(image @ text)
        surprises.append(entropy_by_hand(replaced))
    return softmax_by_hand([-one / defense.text_temperature for one in surprises])


def plan_by_hand(defense, cost, a, b):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    if defense.solver == "independent":
        return a[:, None] * b
    if defense.solver == "exact":
        return torch.from_numpy(ot.emd((a / a.sum()).numpy(), (b / b.sum()).numpy(), cost.numpy()))
    g = torch.zeros_like(b)
    for _ in range(defense.sweeps):
        f = defense.smoothing * (a.log() - ((g - cost) / defense.smoothing).logsumexp(1))
        g = defense.smoothing * (b.log() - ((f[:, None] - cost) / defense.smoothing).logsumexp(0))
    return ((f[:, None] + g - cost) / defense.smoothing).exp()


def logits_by_hand(defense, plain, image, draw=0):
    clip, scale = plain.clip, float(plain.clip.logit_scale)
    views = F.normalize(clip.encode_images(torch.cat(defense.crops.seen(image[None], draw))).double(), dim=1)
    texts = texts_by_hand(defense, plain)
    means, projection = texts.mean(1), projection_by_hand(defense, texts)
    a, answers = view_weights_by_hand(defense, views, means, scale), []
    for place, own in enumerate(texts):
        b = text_weights_by_hand(defense, views[0], own, means, scale, place)
        cost = torch.tensor(
            [[1 - float(F.cosine_similarity(projection @ view, text, dim=0)) for text in own] for view in views],
            dtype=torch.float64,
        )
        answers.append(-scale * float((plan_by_hand(defense, cost, a, b) * cost).sum()))
    return torch.tensor(answers)


@pytest.mark.parametrize(
    "defense",
    [
        COLA(**FOUR, dimensions=5),
        COLA(**FOUR),
        COLA(**FOUR, dimensions=5, centred=True),
        COLA(**FOUR, solver="exact", dimensions=7),
        COLA(**FOUR, solver="independent", projection="off"),
        COLA(**FOUR, smoothing=0.02, sweeps=60, view_weights="printed", view_temperature=0.3),
        COLA(**FOUR, view_weights="uniform", text_temperature=0.1, solver="exact", projection="off"),
        COLA(**FOUR, text_weights="uniform", crops=Views(count=3, area=(0.4, 1), seed=5)),
        COLA(texts=7, crops=TTE(count=1), dimensions=12),
    ],
    ids=repr,
)
def test_answers_are_those_of_loops(few, images, defense):
    found = defense(few).at(3)(images)
    expected = torch.stack([logits_by_hand(defense, few, image, draw=3) for image in images])
    torch.testing.assert_close(found, expected.to(found), rtol=1e-3, atol=2e-3)


def test_defaults_are_those_of_the_paper(classifier, images):
    defense = COLA()
    assert (defense.crops, defense.texts, defense.smoothing, defense.text_temperature) == (Views(count=5), 50, 0.1, 0.5)
    expected = logits_by_hand(defense, classifier, images[0])
    torch.testing.assert_close(defense(classifier)(images[:1])[0], expected.float(), rtol=1e-3, atol=2e-3)


def test_means_alone_are_the_mean_cosine_to_the_mean_text(classifier, images):
    defense = COLA(**MEANS, texts=10)
    means = texts_by_hand(defense, classifier).mean(1).float()
    views = torch.stack([classifier.clip.encode_images(view) for view in Views(count=5).seen(images, 2)])
    expected = classifier.clip.logit_scale * (views @ means.T).mean(0)
    found = defense(classifier).at(2)(images)
    torch.testing.assert_close(found + classifier.clip.logit_scale, expected, rtol=1e-4, atol=1e-3)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["confident", "printed", "uniform"])
def test_weights_of_views_sum_to_one_and_are_those_of_their_entropies(clip, few, images, kind):
    defense, texts = COLA(**FOUR, view_weights=kind), texts_by_hand(COLA(**FOUR), few).float()
    features = defense.features(few, images, 1)
    weights = defense.weights_of_views(features, texts.mean(1), clip.logit_scale)
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    for row, views in zip(weights, features, strict=True):
        expected = view_weights_by_hand(defense, views.double(), texts.mean(1).double(), float(clip.logit_scale))
        torch.testing.assert_close(row, torch.tensor(expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_weights_of_texts_replace_one_logit(scale):
    """Against looking at every replacement, also where one class or one text is far ahead of all others."""
    generator = torch.Generator().manual_seed(3)
    texts = F.normalize(torch.randn(6, 5, 8, generator=generator), dim=2)
    image = F.normalize(torch.cat([torch.randn(3, 8, generator=generator), texts[1, :2]]), dim=1)
    defense = COLA(texts=5)
    found = defense.weights_of_texts(image, texts, texts.mean(1), torch.tensor(scale), slice(2, 5))
    assert found.shape == (5, 3, 5)
    torch.testing.assert_close(found.sum(2), torch.ones(5, 3))
    for row, one in enumerate(image.double()):
        for place in (2, 3, 4):
            means, own = texts.double().mean(1), texts[place].double()
            expected = text_weights_by_hand(defense, one, own, means, scale, place)
            torch.testing.assert_close(found[row, place - 2], torch.tensor(expected), rtol=1e-3, atol=1e-4)


# --- the subspace -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("kept", [1, 5, 16])
def test_the_subspace_is_that_of_the_singular_vectors(centred, kept):
    texts = torch.randn(40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    basis = subspace(texts, kept, centred)
    assert basis.shape == (16, kept)
    torch.testing.assert_close(basis.T @ basis, torch.eye(kept, dtype=torch.float64))
    vectors = torch.linalg.svd((texts - texts.mean(0) if centred else texts).T, full_matrices=False).U[:, :kept]
    torch.testing.assert_close(basis @ basis.T, vectors @ vectors.T)


def test_no_more_directions_than_texts_have():
    texts = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    assert subspace(texts, 16).shape == (16, 6)
    assert subspace(texts, 16, centred=True).shape == (16, 5)
    torch.testing.assert_close(subspace(texts, 16) @ subspace(texts, 16).T @ texts.T, texts.T, rtol=1e-4, atol=1e-5)
    assert subspace(torch.cat([texts, texts[:2] + texts[2:4]]), 16).shape == (16, 6)


@pytest.mark.parametrize("projection", ["texts", "random"])
def test_half_the_width_is_kept_unless_told_otherwise(classifier, projection):
    for dimensions, kept in ((0, 32), (20, 20)):
        basis = COLA(projection=projection, texts=10, dimensions=dimensions).basis(classifier)
        assert basis.shape == (64, kept)
        torch.testing.assert_close(basis.T @ basis, torch.eye(kept), rtol=1e-4, atol=1e-5)


def test_random_subspaces_belong_to_the_seed(classifier):
    bases = [COLA(projection="random", texts=4, seed=seed).basis(classifier) for seed in (0, 0, 1)]
    assert torch.equal(bases[0], bases[1])
    assert (bases[0] - bases[2]).abs().max() > 0.1
    projected = COLA(texts=4).basis(classifier)
    assert (bases[0] @ bases[0].T - projected @ projected.T).abs().max() > 0.1


def test_subspaces_of_other_settings_are_others(classifier, few):
    found = [
        COLA(texts=4).basis(classifier), COLA(texts=4, centred=True).basis(classifier),
        COLA(texts=5).basis(classifier), COLA(texts=4).basis(few),
    ]  # fmt: skip
    projections = [one @ one.T for one in found]
    for place, one in enumerate(projections):
        assert all((one - other).abs().max() > 1e-3 for other in projections[place + 1 :])
    assert torch.equal(COLA(texts=4).basis(classifier), found[0])


@pytest.mark.parametrize("solver", ["sinkhorn", "exact", "independent"])
@pytest.mark.parametrize("view_weights", ["confident", "printed"])
def test_with_one_view_a_projection_on_all_texts_decides_nothing(clip, solver, view_weights):
    """cos(Pi x, z) = cos(x, z) / rho for texts in the subspace, with one rho for all classes."""
    many = tinyworld_samples("cifar10", "test", 40)[0].float() / 255
    plain = ZeroShotClassifier(clip, FEW)
    settings = {"texts": 4, "crops": Views(count=1), "solver": solver, "view_weights": view_weights}
    on, off = (COLA(**settings, dimensions=64, projection=kind) for kind in ("texts", "off"))
    assert torch.equal(on(plain)(many).argmax(1), off(plain)(many).argmax(1))
    basis = on.basis(plain)
    assert basis.shape == (64, 12)
    rho = (clip.encode_images(many) @ basis).norm(dim=1, keepdim=True)
    assert (rho < 0.95).any()
    torch.testing.assert_close(
        (1 - on.distances(plain, many, 0)) * rho, 1 - off.distances(plain, many, 0), rtol=1e-3, atol=1e-4
    )


def test_projected_cosines_are_those_to_projected_texts(few, images):
    """cos(Pi x, z) = <x, Pi z> / rho, whatever the subspace."""
    defense = COLA(**FOUR | MEANS | {"projection": "texts"}, dimensions=5, crops=Views(count=1))
    texts, features = texts_by_hand(defense, few), few.clip.encode_images(images).double()
    projection = projection_by_hand(defense, texts)
    rho = (features @ projection).norm(dim=1, keepdim=True)
    expected = 1 - (features @ (texts.mean(1) @ projection).T) / rho
    torch.testing.assert_close(defense.distances(few, images, 0), expected.float(), rtol=1e-4, atol=1e-5)


# --- orders and draws -------------------------------------------------------------------------------------------------


@component
class Turned(Views):
    """The same views in another order."""

    def seen(self, images, draw):
        return super().seen(images, draw)[::-1]


@pytest.mark.parametrize("solver", ["sinkhorn", "exact", "independent"])
def test_views_may_come_in_any_order(few, images, solver):
    settings = {"texts": 4, "text_weights": "uniform", "solver": solver}
    found, expected = (COLA(crops=crops(count=5), **settings)(few)(images) for crops in (Turned, Views))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_classes_may_come_in_any_order(clip, few, images):
    order = [2, 0, 1]
    parts = [[part[place] for place in order] for part in (FEW.names, FEW.prompts, FEW.descriptions)]
    found = COLA(**FOUR)(ZeroShotClassifier(clip, Classes(*parts)))(images)
    torch.testing.assert_close(found, COLA(**FOUR)(few)(images)[:, order], rtol=1e-4, atol=1e-3)


def test_texts_may_come_in_any_order(clip, few, images):
    turned = [texts[::-1] for texts in FEW.descriptions]
    other = ZeroShotClassifier(clip, Classes(FEW.names, FEW.prompts, turned))
    torch.testing.assert_close(COLA(**FOUR)(other)(images), COLA(**FOUR)(few)(images), rtol=1e-4, atol=1e-3)


def test_answers_do_not_depend_on_the_batch_nor_on_the_order(few, images):
    for defense in (COLA(**FOUR), COLA(**FOUR, solver="exact")):
        defended = defense(few).at(2)
        whole, order = defended(images), torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(torch.cat([defended(one) for one in images.split(1)]), whole, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(defended(images[order]), whole[order], rtol=1e-4, atol=1e-3)


def test_classes_in_parts_are_the_same(few, images, monkeypatch):
    whole = COLA(**FOUR)(few)(images)
    monkeypatch.setattr("robustclip.defenses.cola.TOGETHER", 1)
    torch.testing.assert_close(COLA(**FOUR)(few)(images), whole, rtol=1e-4, atol=1e-3)


def test_draws_differ_and_repeat(few, images):
    defended = COLA(**FOUR)(few)
    first = defended(images)
    assert torch.equal(defended.at(0)(images), first)
    assert (defended.at(1)(images) - first).abs().max() > 0.01
    seeded = COLA(**FOUR, crops=Views(count=5, seed=1))(few)
    assert (seeded(images) - first).abs().max() > 0.01


def test_passes_are_those_declared_and_no_weight_changes(clip, few, images):
    before = clip._fingerprint()
    for defense, expected in (
        (COLA(**FOUR), 5),
        (COLA(**FOUR, crops=Views(count=1)), 1),
        (COLA(**FOUR, crops=TTE()), 10),
    ):
        defense(few)(images)  # texts are read once
        with count_passes() as passes, torch.no_grad():
            defense(few)(images)
        assert (passes.forward, passes.backward) == (4 * expected, 0)
        assert defense.passes(3) == (expected, 0)
    assert clip._fingerprint() == before


# --- what an attacker sees --------------------------------------------------------------------------------------------


class Known(nn.Module):
    """A CLIP whose image tower is one matrix."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrix = torch.randn(3 * 4 * 4, 6, generator=generator)
        self.logit_scale, self.device = torch.tensor(8.0), torch.device("cpu")

    def encode_images(self, images):
        return F.normalize(images.flatten(1) @ self.matrix, dim=1)

    def text_features(self, texts):
        seeds = [sum(map(ord, text)) for text in texts]
        rows = [torch.randn(6, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return F.normalize(torch.stack(rows), dim=1)

    def remembered(self, key, compute):
        return compute()


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "independent"},
        {"solver": "independent", "projection": "off", "view_weights": "printed", "text_temperature": 0.2},
        {"solver": "exact", "view_weights": "uniform", "text_weights": "uniform"},
    ],
    ids=str,
)
def test_gradients_are_those_of_differences(settings):
    """Of the loss that an attacker climbs, along random directions; the views are fixed ones."""
    plain, labels = ZeroShotClassifier(Known(), FEW), torch.tensor([0, 1, 2])
    defense = COLA(texts=4, dimensions=4, crops=Mirrored(), **settings)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 4, 4, generator=generator).requires_grad_()
    loss = lambda points: cross_entropy(defense.logits(plain, points, 0), labels).float()  # noqa: E731
    (gradient,) = torch.autograd.grad(loss(images).sum(), images)
    for _ in range(4):
        direction = torch.randn(images.shape, generator=generator)
        with torch.no_grad():
            expected = (loss(images + STEP * direction) - loss(images - STEP * direction)) / (2 * STEP)
        found = (gradient * direction).flatten(1).sum(1)
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)


def test_gradients_reach_only_the_own_image(few, images):
    pixels = images.clone().requires_grad_()
    logits = COLA(**FOUR)(few).for_attack()(pixels)
    gradient = torch.autograd.grad(logits[1].max(), pixels)[0].flatten(1).norm(dim=1)
    assert gradient.isfinite().all()
    assert gradient.nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_an_even_image_has_an_answer_and_a_slope(few, value):
    pixels = torch.full((1, 3, 32, 32), value, requires_grad=True)
    logits = COLA(**FOUR)(few)(pixels)
    assert logits.isfinite().all()
    assert torch.autograd.grad(logits.sum(), pixels)[0].isfinite().all()


def test_attackers_are_told_the_views(clip, few, images):
    defense = COLA(**FOUR)
    assert list(aims_against(defense(few))) == ["plain", "smooth", "answer", "margin", "views"]
    means = texts_by_hand(defense, few).mean(1).float()
    expected = [clip.logit_scale * clip.encode_images(view) @ means.T for view in Views(count=5).seen(images, 4)]
    torch.testing.assert_close(told(defense(few).at(4), "views", images), torch.stack(expected), rtol=1e-4, atol=1e-3)


def test_it_stands_before_other_defenses(few, images):
    found = COLA(**FOUR)(Mirrored()(few))(images)
    assert found.shape == (4, 3)
    assert undefended(COLA(**FOUR)(Mirrored()(few))) is few
    assert (found - COLA(**FOUR)(few)(images)).abs().max() > 1e-3


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("texts", 0),
        ("dimensions", -1),
        ("sweeps", 0),
        ("smoothing", 0),
        ("view_temperature", 0),
        ("text_temperature", -1),
    ],
)
def test_bad_numbers_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        COLA(**{field: value})


@pytest.mark.parametrize("field", ["projection", "solver", "view_weights", "text_weights"])
def test_bad_words_are_named(field):
    with pytest.raises(ValueError, match=f"unknown {field} 'other'; choose one of"):
        COLA(**{field: "other"})


def test_identities_tell_settings_apart():
    found = [COLA(), COLA(**MEANS), COLA(dimensions=32), COLA(crops=Views(count=4)), COLA(centred=True), COLA(seed=1)]
    assert len({str(identity(one)) for one in found}) == len(found)
    assert eval(repr(COLA(crops=TTE(), texts=7))) == COLA(crops=TTE(), texts=7)
