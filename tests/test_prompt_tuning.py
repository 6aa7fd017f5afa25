"""TPT and R-TPT against one image at a time, one step at a time, with a text tower walked through by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustclip import models
from robustclip.attacks.aware import aims_against, told
from robustclip.component import identity
from robustclip.defenses import prompt_tuning
from robustclip.defenses.base import features_of
from robustclip.defenses.prompt_tuning import RTPT, TPT, encode_moved, first_slopes, pulled_back, truncated
from robustclip.defenses.views import Views
from robustclip.fast import fast_classifier
from robustclip.models import ZeroShotClassifier, count_passes
from robustclip.prompts import add_context

SMALL = {"count": 12, "confident": 0.25, "seed": 3}
TUNED = {"count": 12, "confident": 0.25, "seed": 3, "step_size": 0.02}  # where a step makes a difference
NEAR = {"rtol": 1e-4, "atol": 1e-3}


# --- by hand ----------------------------------------------------------------------------------------------------------


def texts_by_hand(clip, prompts, move):
    """Look tokens up, move the first words, walk through the whole text tower, read the first token."""
    network = clip.network
    table = network.token_embedding.weight[models.tokenize(clip.tokenizer, prompts)]
    words = table[:, 1 : 1 + len(move)] + move
    rows = torch.cat([table[:, :1], words, table[:, 1 + len(move) :]], 1) + network.positional_embedding
    for block in network.transformer.resblocks:
        rows = block(rows)
    return F.normalize(network.ln_final(rows[:, 0]) @ network.text_projection, dim=-1)


def entropy_by_hand(logits):
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def tuned_by_hand(defense, classifier, features):
    """Text features for one image with features (views, d), by autograd and torch's AdamW."""
    clip, scale = classifier.clip, classifier.clip.logit_scale
    move = nn.Parameter(torch.zeros(defense.vectors, clip.network.token_embedding.embedding_dim))
    optimizer = torch.optim.AdamW([move], lr=defense.step_size)
    first = entropy_by_hand(scale * features @ classifier.text_features.T)
    chosen = first.sort().indices[: int(defense.confident * len(features))]
    for _ in range(defense.steps):
        logits = scale * features[chosen] @ texts_by_hand(clip, classifier.prompts, move).T
        mean = logits.softmax(1).mean(0)
        pointwise = isinstance(defense, RTPT)
        loss = entropy_by_hand(logits).mean() if pointwise else -(mean * mean.log()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return texts_by_hand(clip, classifier.prompts, move.detach()).detach()


def weights_by_hand(defense, features):
    found = []
    for own, view in enumerate(features):
        cosines = sorted((float(view @ other) for place, other in enumerate(features) if place != own), reverse=True)
        found.append(sum(cosines[: defense.neighbours]) / len(cosines[: defense.neighbours]))
    return torch.softmax(torch.tensor(found) / defense.temperature, 0)


def views_of(defense, image, draw):
    return torch.cat(Views(count=defense.count, area=defense.area, seed=defense.seed).seen(image[None], draw))


def answer_by_hand(defense, classifier, image, draw=0):
    """Logits (classes,) of one image."""
    features = classifier.clip.encode_images(views_of(defense, image, draw))
    texts = tuned_by_hand(defense, classifier, features.detach())
    logits = classifier.clip.logit_scale * features @ texts.T
    return weights_by_hand(defense, features) @ logits if isinstance(defense, RTPT) else logits[0]


# --- the answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", [TPT, RTPT])
def test_answers_are_those_of_one_image_and_step_at_a_time(classifier, images, kind, steps):
    defense = kind(steps=steps, **TUNED)
    expected = torch.stack([answer_by_hand(defense, classifier, image, draw=5) for image in images])
    found = defense(classifier).at(5)(images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    untuned = kind(**{**TUNED, "steps": 0})(classifier).at(5)(images)
    assert (found - untuned).abs().max() > 0.1


def test_defaults_are_those_of_the_papers(classifier, images):
    expected = torch.stack([answer_by_hand(RTPT(), classifier, image) for image in images[:1]])
    torch.testing.assert_close(RTPT()(classifier)(images[:1]), expected, rtol=1e-3, atol=1e-3)
    assert (TPT().count, TPT().vectors, TPT().steps, TPT().step_size) == (64, 4, 1, 5e-3)
    features = F.normalize(torch.randn(64, 1, 64, generator=torch.Generator().manual_seed(0)), dim=2)
    assert TPT().confident_views(classifier, features).shape == (6, 1, 64)


def test_a_step_from_zero_has_one_length_in_each_coordinate(classifier, images):
    """AdamW's first step is the step size times the sign of the slope, whatever the slope's size."""
    defense = TPT(**SMALL)
    features = defense.features(classifier, images, 0)
    move = torch.zeros(4, 64, requires_grad=True)
    kept = defense.confident_views(classifier, features)[:, 0]
    logits = classifier.clip.logit_scale * kept @ texts_by_hand(classifier.clip, classifier.prompts, move).T
    mean = logits.softmax(1).mean(0)
    slope = torch.autograd.grad(-(mean * mean.log()).sum(), move)[0]
    texts = texts_by_hand(classifier.clip, classifier.prompts, -defense.step_size * slope.sign())
    torch.testing.assert_close(defense.tuned(classifier, features)[0], texts, rtol=1e-3, atol=1e-4)


def test_tuning_lowers_the_loss(classifier, images):
    for defense in (TPT(**SMALL), RTPT(**SMALL)):
        features = defense.features(classifier, images, 0).detach()
        kept = defense.confident_views(classifier, features)
        losses = [
            defense.loss(classifier.clip.logit_scale * torch.einsum("vnd,nkd->vnk", kept, texts))
            for texts in (classifier.text_features.expand(len(images), -1, -1), defense.tuned(classifier, features))
        ]
        assert (losses[1] < losses[0]).all()


def test_the_most_confident_views_are_kept(classifier):
    """Views between two texts are unsure, views on a text are sure; each image has its own."""
    texts = classifier.text_features
    unsure = F.normalize(texts[0] + texts[1], dim=0)
    features = unsure.repeat(4, 2, 1)
    features[2, 0], features[0, 1] = texts[5], texts[7]
    kept = TPT(count=4, confident=0.3).confident_views(classifier, features)
    torch.testing.assert_close(kept, torch.stack([texts[5], texts[7]])[None])
    assert TPT(count=4, confident=0).confident_views(classifier, features).shape == (1, 2, 64)


def test_without_steps_tpt_is_plain_clip(classifier, images):
    torch.testing.assert_close(TPT(steps=0, **SMALL)(classifier)(images), classifier(images))


def test_without_steps_rtpt_is_a_weighted_ensemble(classifier, images):
    defense = RTPT(steps=0, neighbours=3, temperature=0.1, **SMALL)
    for found, image in zip(defense(classifier)(images), images, strict=True):
        views = views_of(defense, image, 0)
        expected = weights_by_hand(defense, classifier.clip.encode_images(views)) @ classifier(views)
        torch.testing.assert_close(found, expected)
    assert (defense(classifier)(images) - Views(count=12, seed=3)(classifier)(images)).abs().max() > 0.01


def test_views_that_look_like_others_have_the_say():
    features = F.normalize(torch.randn(8, 2, 16, generator=torch.Generator().manual_seed(1)), dim=2)
    features[2:5, 1] = features[2, 1]
    weights = RTPT(count=8, neighbours=2).reliability(features)
    torch.testing.assert_close(weights.sum(0), torch.ones(2))
    torch.testing.assert_close(weights[2:5, 1], torch.full((3,), 1 / 3))
    assert weights[2:5, 0].sum() < 0.999


@pytest.mark.parametrize("defense", [TPT(**TUNED), RTPT(**TUNED)])
def test_answers_do_not_depend_on_the_batch_nor_on_the_order(classifier, images, defense):
    whole = defense(classifier)(images)
    torch.testing.assert_close(torch.cat([defense(classifier)(one) for one in images.split(1)]), whole, **NEAR)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(defense(classifier)(images[order]), whole[order], **NEAR)


@pytest.mark.parametrize("defense", [TPT(**TUNED), RTPT(**TUNED)])
def test_classes_may_come_in_any_order(clip, classifier, images, defense):
    order = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    other = ZeroShotClassifier(clip, [classifier.prompts[place] for place in order.tolist()])
    torch.testing.assert_close(defense(other)(images), defense(classifier)(images)[:, order], **NEAR)


def test_draws_differ_and_prompts_start_anew(classifier, images):
    defended = RTPT(**SMALL)(classifier)
    first = defended(images)
    assert (defended.at(1)(images) - first).abs().max() > 1e-3
    assert torch.equal(defended(images), first)


# --- the prompts ------------------------------------------------------------------------------------------------------


def test_texts_are_the_classifiers_own_where_nothing_moves(clip, classifier):
    still = encode_moved(clip, classifier.prompts, torch.zeros(10, 4, 64))
    torch.testing.assert_close(still, classifier.text_features)


def test_what_moves_is_a_learned_context_where_there_is_one(clip):
    tuned = add_context(copy.deepcopy(clip), 3, seed=1)
    moves = torch.randn(3, 64, generator=torch.Generator().manual_seed(4)) / 50
    found = encode_moved(tuned, ["a red fish", "a tree"], moves.expand(2, -1, -1))
    tuned.network.token_embedding.context += moves
    torch.testing.assert_close(found, tuned.encode_texts(["a red fish", "a tree"]))


def test_slopes_at_the_start_are_those_of_a_walk_by_hand(clip):
    prompts, cotangent = ["a red fish", "a tree", "two moons"], torch.randn(3, 64)
    move = torch.zeros(2, 64, requires_grad=True)
    expected = torch.autograd.grad((texts_by_hand(clip, prompts, move) * cotangent).sum(), move)[0]
    found = torch.einsum("kd,kdvw->vw", cotangent, first_slopes(clip, prompts, 2))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(pulled_back(clip, prompts, torch.zeros(1, 2, 64), cotangent[None])[0], expected, **NEAR)


def test_slopes_belong_to_the_weights(clip):
    changed = copy.deepcopy(clip)
    before = first_slopes(changed, ["a tree"], 2)
    assert first_slopes(changed, ["a tree"], 2) is before
    changed.network.token_embedding.weight.mul_(1.5)
    assert (first_slopes(changed, ["a tree"], 2) - before).abs().max() > 1e-3


def test_few_texts_at_once_make_no_difference(classifier, images, monkeypatch):
    defense = TPT(steps=2, **TUNED)
    whole = defense(classifier)(images)
    monkeypatch.setattr(prompt_tuning, "TEXTS_AT_ONCE", 7)
    again = ZeroShotClassifier(copy.deepcopy(classifier.clip), classifier.classes)
    torch.testing.assert_close(defense(again)(images), whole, **NEAR)


def test_the_clip_is_left_as_it_was(clip, classifier, images):
    before = copy.deepcopy(clip)
    RTPT(steps=2, **SMALL)(classifier)(images.clone().requires_grad_()).sum().backward()
    assert before._fingerprint() == clip._fingerprint()
    assert not clip.network.token_embedding._forward_hooks
    assert all(weight.grad is None and not weight.requires_grad for weight in clip.parameters())


# --- callers and attackers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TPT, RTPT])
def test_callers_without_gradients_get_the_same(classifier, images, kind):
    with torch.no_grad():
        found = kind(**TUNED)(classifier)(images)
    assert not found.requires_grad
    torch.testing.assert_close(found, kind(**TUNED)(classifier)(images), **NEAR)


@pytest.mark.parametrize("kind", [TPT, RTPT])
def test_gradients_are_exact_with_the_prompts_held_constant(classifier, images, kind):
    """Views, weights and logits of one image as plain functions of its pixels, with prompts that are none."""
    defense = kind(neighbours=4, temperature=0.05, **TUNED) if kind is RTPT else kind(**TUNED)
    pixels, goal = images[:2].clone().requires_grad_(), torch.randn(10, generator=torch.Generator().manual_seed(6))
    found = torch.autograd.grad((defense(classifier).for_attack()(pixels) @ goal).sum(), pixels)[0]
    for row, image in enumerate(images[:2]):
        image = image.clone().requires_grad_()
        features = classifier.clip.encode_images(views_of(defense, image, 0))
        texts = tuned_by_hand(defense, classifier, features.detach())
        logits = classifier.clip.logit_scale * features @ texts.T
        if kind is RTPT:
            cosines = features @ features.T - 10 * torch.eye(len(features))
            weights = (cosines.sort(1, descending=True).values[:, :4].mean(1) / 0.05).softmax(0)
        answer = weights @ logits if kind is RTPT else logits[0]
        expected = torch.autograd.grad(answer @ goal, image)[0]
        assert F.cosine_similarity(found[row].flatten(), expected.flatten(), dim=0) > 0.9999
        torch.testing.assert_close(found[row].norm(), expected.norm(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("kind", [TPT, RTPT])
def test_attackers_are_told_the_views(classifier, images, kind):
    defense = kind(**TUNED)
    assert list(aims_against(defense(classifier))) == ["plain", "answer", "margin", "views"]
    pixels = images.clone().requires_grad_()
    views = told(defense(classifier), "views", pixels)
    assert views.shape == (12, 4, 10)
    assert torch.autograd.grad(views[7, 2].sum(), pixels)[0].flatten(1).norm(dim=1).nonzero().flatten().tolist() == [2]


def test_the_answer_of_rtpt_is_made_of_its_views(classifier, images):
    defense = RTPT(**TUNED)
    weights = defense.reliability(defense.features(classifier, images, 0))
    expected = (weights[..., None] * defense.views(classifier, images, 0)).sum(0)
    torch.testing.assert_close(defense(classifier)(images), expected, **NEAR)


@pytest.mark.parametrize(("kind", "backward"), [(TPT, 4), (RTPT, 48)])
def test_passes_are_those_declared(classifier, images, kind, backward):
    """Of TPT an attacker's gradient needs one view only."""
    defense = kind(**SMALL)
    with count_passes() as passes, torch.no_grad():
        defense(classifier)(images)
    assert (passes.forward, passes.backward) == tuple(4 * number for number in defense.passes(10)) == (48, 0)
    with count_passes() as passes:
        defense(classifier)(images.clone().requires_grad_()).sum().backward()
    assert (passes.forward, passes.backward) == (48, backward)


def test_images_are_cut_to_eight_bits(classifier, images):
    levels = torch.arange(256).float().div(255).expand(1, 3, 2, 256)
    assert torch.equal(truncated(levels), levels)
    assert torch.equal(truncated((levels + 0.9 / 255).clamp(max=1)), levels)
    between = (images + 0.6 / 255).clamp(0, 1)
    cut, plain = RTPT(truncate=True, **SMALL), RTPT(**SMALL)
    torch.testing.assert_close(cut(classifier)(between), plain(classifier)(images))
    assert (plain(classifier)(between) - plain(classifier)(images)).abs().max() > 1e-2
    pixels, known = between.clone().requires_grad_(), images.clone().requires_grad_()
    slopes = [torch.autograd.grad(one(classifier)(x)[:, 0].sum(), x)[0] for one, x in ((cut, pixels), (plain, known))]
    torch.testing.assert_close(*slopes)


# --- what they are put before -----------------------------------------------------------------------------------------


def test_features_that_are_left(clip, classifier, images):
    """Axes of feature space are no prompts: TPT leaves the features alone, R-TPT their weighted mean."""
    torch.testing.assert_close(features_of(TPT(**SMALL)(classifier))(images), clip.encode_images(images))
    defense = RTPT(**SMALL)
    found = features_of(defense(classifier))(images)
    for row, image in enumerate(images):
        features = clip.encode_images(views_of(defense, image, 0))
        expected = F.normalize(weights_by_hand(defense, features) @ features, dim=0)
        torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-4)


def test_the_fast_twin_is_tuned_likewise(classifier, images):
    twin = fast_classifier(classifier, "float32")
    torch.testing.assert_close(TPT(**TUNED)(twin)(images), TPT(**TUNED)(classifier)(images), rtol=1e-2, atol=2e-2)


def test_behind_another_defense_the_views_pass_that_one(classifier, images):
    inner = Views(count=3)(classifier)
    found = TPT(steps=0, **SMALL)(inner)(images)
    features = features_of(inner)(images)
    torch.testing.assert_close(found, classifier.clip.logit_scale * features @ classifier.text_features.T)


def test_other_classifiers_are_refused(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 10))
    with pytest.raises(ValueError, match="a Sequential has neither image features nor prompts"):
        RTPT(**SMALL)(model)(images)


def test_text_towers_without_word_embeddings_are_refused(clip):
    strange = copy.deepcopy(clip)
    strange.network.token_embedding = None
    with pytest.raises(ValueError, match="a CLIP has no token_embedding whose words could be tuned; give a plain CLIP"):
        first_slopes(strange, ["a tree"], 2)


@pytest.mark.parametrize("kind", [TPT, RTPT])
@pytest.mark.parametrize(
    ("field", "value"),
    [("count", 1), ("count", 2.5), ("area", (0.5, 2)), ("vectors", 0), ("steps", -1), ("step_size", -1),
     ("confident", 1.5)],
)  # fmt: skip
def test_bad_settings_are_named(kind, field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        kind(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("neighbours", 0), ("temperature", 0)])
def test_bad_settings_of_rtpt_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value} is not allowed"):
        RTPT(**{field: value})


def test_more_vectors_than_places_are_refused(classifier, images):
    with pytest.raises(ValueError, match="vectors=32 is not allowed; it must be a finite number between 1 and 31"):
        TPT(vectors=32, **SMALL)(classifier)(images)


def test_identities_tell_settings_apart():
    found = [TPT(), RTPT(), RTPT(truncate=True), RTPT(steps=0), TPT(steps=0), RTPT(area=[0.5, 1])]
    assert len({str(identity(one)) for one in found}) == len(found)
    assert repr(RTPT(truncate=True, area=[0.5, 1])) == "RTPT(area=(0.5, 1), truncate=True)"
