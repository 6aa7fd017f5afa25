"""Adversarial fine-tuning: losses as released, exact resumption, one model from several processes, orders, settings."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import weakref
from collections import Counter
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from robustclip import models
from robustclip.attacks import PGD, BertAttack
from robustclip.data.roles import role, tinyworld_samples
from robustclip.training import (
    FARE,
    LAAT,
    PMGAFT,
    TGAZSR,
    TIMA,
    VP,
    AdvPT,
    Batch,
    Diverged,
    InnerAttack,
    MMCoA,
    Order,
    Pictures,
    Standard,
    TeCoA,
    WithoutText,
    checkpoint,
    contrast,
    interpolate,
    named_recipe,
    parallel,
    train,
)  # fmt: skip
from robustclip.training.checkpoint import CHECKPOINT
from robustclip.training.inner import cross_entropy
from robustclip.training.loop import Run
from robustclip.training.named import RECIPES
from robustclip.training.optimisation import SCHEDULES

EPS = 8 / 255
SMALL = {"eps": EPS, "updates": 2, "batch_size": 8, "attack_steps": 1}


@pytest.fixture(scope="module")
def clip():
    return models.load(device="cpu")


@pytest.fixture(scope="module")
def pictures():
    return Pictures.of("cifar10", n=300)


def vector(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def batch_of(clip, images, labels, prompts, recipe=None, noise=None, eps=EPS):
    return Batch(recipe or MMCoA.of(**SMALL), clip, images, labels, prompts, noise, eps)


# --- losses -----------------------------------------------------------------------------------------------------------


def both_directions(logits):
    """The loss as released: one row per picture and per text, the row number is the target."""
    rows = torch.arange(len(logits))
    return F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)


@pytest.mark.parametrize("labels", [[4], [3, 3, 3], [0, 1, 2, 3], [5, 1, 5, 5, 0, 1, 9, 9, 5, 2, 2, 0]])
def test_contrast_is_the_loss_with_one_row_per_picture(clip, labels):
    labels, random = torch.tensor(labels), torch.Generator().manual_seed(len(labels))
    batch = batch_of(clip, torch.zeros(len(labels), 3, 32, 32), labels, role("cifar10").prompts)
    images, texts = (F.normalize(torch.randn(n, 16, generator=random).double()) for n in (len(labels), 10))
    images, texts = images.requires_grad_(), texts[batch.present].requires_grad_()
    ours = contrast(batch, images, texts)
    places = [sorted(set(labels.tolist())).index(label) for label in labels.tolist()]
    naive = both_directions(clip.logit_scale.double() * images @ texts[places].T)
    torch.testing.assert_close(ours, naive, rtol=1e-6, atol=1e-9)
    for own, other in zip(torch.autograd.grad(ours, (images, texts)), torch.autograd.grad(naive, (images, texts)),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


def naive_mmcoa(run, batch, attack):
    """MMCoA's loss row by row: every picture brings its own prompt and its own attacked prompt."""
    clip, prompts = run.clip, [batch.prompts[label] for label in batch.labels.tolist()]
    attacked = [attack(clip, [prompt])[0] for prompt in prompts]

    def logits(images, texts):
        return clip.logit_scale * clip.encode_images(images) @ clip.encode_texts(texts).T

    image_term = both_directions(logits(batch.attacked_images, prompts))
    return 0.5 * image_term + 0.5 * both_directions(logits(batch.images, attacked)), attacked


def test_one_text_attack_per_class_is_one_per_picture(clip, pictures):
    run = Run(MMCoA.of(**(SMALL | {"batch_size": 16})), clip, pictures)
    batch = run.batch()
    assert max(Counter(batch.labels.tolist()).values()) > 1, "no class twice: nothing to compare"
    loss = run.recipe.loss(batch)
    naive, attacked = naive_mmcoa(run, batch, BertAttack(offset="shifted", end_token=False))
    assert [batch.attacked_prompts[place] for place in batch.places.tolist()] == attacked
    assert attacked != [batch.prompts[label] for label in batch.labels.tolist()]
    torch.testing.assert_close(loss, naive, rtol=1e-5, atol=1e-5)
    own, other = (vector(torch.autograd.grad(value, run.weights)) for value in (loss, naive))
    assert (own - other).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (TeCoA.of(**SMALL), lambda run, b: class_loss(run.clip, b, b.attacked_images)),
        (Standard.of(**SMALL), lambda run, b: class_loss(run.clip, b, b.images)),
        (MMCoA.of(**SMALL, image_weight=0), lambda run, b: 0.5 * text_term(run.clip, b)),
    ],
    ids=["TeCoA", "FT-standard", "text-term"],
)
def test_losses_are_their_formulas(clip, pictures, recipe, expected):
    run = Run(recipe, clip, pictures)
    batch = run.batch()
    torch.testing.assert_close(recipe.loss(batch), expected(run, batch), rtol=1e-5, atol=1e-5)


def class_loss(clip, batch, images):
    return F.cross_entropy(clip.logit_scale * clip.encode_images(images) @ clip.encode_texts(batch.prompts).T,
                           batch.labels)  # fmt: skip


def text_term(clip, batch):
    texts = [batch.attacked_prompts[place] for place in batch.places.tolist()]
    return both_directions(clip.logit_scale * clip.encode_images(batch.images) @ clip.encode_texts(texts).T)


# --- the inner maximum ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attacked(clip):
    images, labels, _, _ = tinyworld_samples("cifar10", "test", 24)
    images = images.float() / 255
    images[0, :, :16], images[0, :, 16:] = 0, 1  # at both ends of the pixel range
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    recipe = TeCoA.of(eps=EPS, attack_steps=3)
    return batch_of(clip, images, labels, role("cifar10").prompts, recipe, noise)


def test_the_inner_maximum_raises_the_loss_within_the_budget(clip, attacked):
    batch = attacked
    found = batch.recipe.attack(batch)
    assert (found - batch.images).abs().max() <= EPS + 1e-6
    assert (found - batch.images).abs().max() > 0.99 * EPS
    assert found.min() >= 0
    assert found.max() <= 1
    assert not found.requires_grad
    start = (batch.images + EPS * batch.noise).clamp(0, 1)
    losses = [class_loss(clip, batch, images).item() for images in (batch.images, start, found)]
    assert losses[2] > losses[0] + 1
    assert losses[2] > losses[1] + 1


def test_the_inner_maximum_is_sign_ascent_on_the_plain_model(clip, attacked):
    """On the float32 twin rounding flips hardly a sign of the first step, and the later ones climb as high."""
    batch, attack = attacked, attacked.recipe.attack
    points = start = (batch.images + EPS * batch.noise).clamp(0, 1)
    for step in range(3):
        points.requires_grad_()
        (slope,) = torch.autograd.grad(class_loss(clip, batch, points), points)
        moved = points.detach() + 2 * EPS / 3 * slope.sign()
        points = torch.max(torch.min(moved, batch.images + EPS), batch.images - EPS).clamp(0, 1)
        if not step:
            ours = InnerAttack(steps=1, step_size=2 * EPS / 3)(batch)
            assert ((ours - points).abs() > 1e-5).float().mean() < 5e-4
            assert (ours - start).abs().max() > 0.01
    ours, plain = (class_loss(clip, batch, images).item() for images in (attack(batch), points))
    assert ours == pytest.approx(plain, rel=0.02)


def test_the_attack_of_low_precision_is_about_as_strong(clip, attacked):
    found = (InnerAttack(precision=precision)(attacked) for precision in ("float32", "bfloat16"))
    strong, weak = (class_loss(clip, attacked, images).item() for images in found)
    assert weak > 0.9 * strong


# --- one update, by hand ----------------------------------------------------------------------------------------------


def one_update(recipe, clip, pictures):
    """Weights before and after the first update, the batch, and the gradient that the loss alone has."""
    run = Run(recipe, clip, pictures)
    batch = run.batch()
    gradient = torch.autograd.grad(class_loss(run.clip, batch, batch.attacked_images), run.weights)
    before = vector(run.weights)
    for weight in run.weights:
        weight.grad = None
    run.update()
    return before, vector(run.weights), batch, vector(gradient), run


@pytest.mark.parametrize("trains", ["image", "both"])
def test_no_weight_gradient_comes_from_the_attack(clip, pictures, trains):
    """The step of plain gradient descent is the gradient of the loss, in both towers where both learn."""
    recipe = TeCoA.of(**SMALL, trains=trains, optimizer="sgd", rate=1.0, schedule="constant", weight_decay=0.0)
    before, after, _, gradient, run = one_update(recipe, clip, pictures)
    assert (before - after - gradient).norm() <= 1e-4 * gradient.norm()
    texts = [weight.grad.norm() for name, weight in run.clip.network.named_parameters()
             if weight.requires_grad and not name.startswith("visual.")]  # fmt: skip
    assert bool(texts) == (trains == "both")
    assert all(norm > 0 for norm in texts if norm.numel())


def test_the_leak_adds_the_gradients_of_the_steps(clip, pictures):
    """With it the step is the gradient of loss + sum_k CE(x + delta_k) over the points where the attack looked."""
    settings = SMALL | {"attack_steps": 2, "optimizer": "sgd", "rate": 1.0, "schedule": "constant", "weight_decay": 0.0}
    run = Run(TeCoA.of(**settings, leak=True), clip, pictures)
    batch, before = run.batch(), vector(run.weights)
    points, total = (batch.images + batch.eps * batch.noise).clamp(0, 1), 0
    for _ in range(2):
        points.requires_grad_()
        loss = class_loss(run.clip, batch, points)
        *slopes, slope = torch.autograd.grad(loss, [*run.weights, points])
        total = total + vector(slopes)
        moved = points.detach() + batch.eps * slope.sign()
        points = torch.max(torch.min(moved, batch.images + batch.eps), batch.images - batch.eps).clamp(0, 1)
    total = total + vector(torch.autograd.grad(class_loss(run.clip, batch, points), run.weights))
    run.update()
    assert (before - vector(run.weights) - total).norm() <= 1e-3 * total.norm()


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_weight_decay_is_decoupled_or_inside_the_gradient(clip, pictures, optimizer):
    rate, decay = 0.01, 0.5
    recipe = TeCoA.of(**SMALL, optimizer=optimizer, rate=rate, weight_decay=decay, schedule="constant")
    before, after, _, gradient, _ = one_update(recipe, clip, pictures)
    inside = gradient + decay * before
    expected = {
        "adamw": (1 - rate * decay) * before - rate * gradient / (gradient.abs() + 1e-6),
        "adam": before - rate * inside / (inside.abs() + 1e-6),
        "sgd": before - rate * inside,
    }[optimizer]
    clear = gradient.abs().minimum(inside.abs()) > 1e-3  # of smaller ones Adam keeps a sign that is rounding
    assert clear.float().mean() > 0.3
    torch.testing.assert_close(after[clear], expected[clear], rtol=1e-3, atol=1e-5)


def test_the_gradient_is_clipped(clip, pictures):
    recipe = TeCoA.of(**SMALL, optimizer="sgd", rate=1.0, schedule="constant", weight_decay=0.0, clip_norm=0.25)
    before, after, _, gradient, _ = one_update(recipe, clip, pictures)
    assert gradient.norm() > 1
    torch.testing.assert_close(before - after, 0.25 * gradient / gradient.norm(), rtol=1e-2, atol=1e-6)


# --- what learns ------------------------------------------------------------------------------------------------------


def changed(clip, tuned):
    before, after = clip.network.state_dict(), tuned.network.state_dict()
    return {name for name, value in after.items() if name not in before or not torch.equal(value, before[name])}


@pytest.mark.parametrize(
    ("name", "image", "text", "prompt"),
    [
        ("FT-standard", True, True, set()), ("FT-contrastive", True, True, set()), ("TeCoA", True, False, set()),
        ("TeCoA-both", True, True, set()), ("MMCoA", True, True, set()), ("MMCoA-partial", True, False, set()),
        ("AdvPT", False, False, {"token_embedding.context"}), ("VP", False, False, {"visual.frame"}),
    ],
)  # fmt: skip
def test_which_weights_move(clip, pictures, name, image, text, prompt):
    start = clip.digest
    tuned = train(named_recipe(name, **(SMALL | {"updates": 1})), clip, pictures).clip
    moved = changed(clip, tuned) - {"visual.frame_mask"}
    learned = {"token_embedding.context", "visual.frame"}
    assert moved & learned == prompt
    assert any(name.startswith("visual.") for name in moved - learned) == image
    assert any(not name.startswith("visual.") for name in moved - learned) == text
    assert "logit_scale" not in moved
    assert not any("running" in name for name in moved)
    assert clip.digest == start
    assert not any(module.training for module in tuned.modules())
    assert not any(weight.requires_grad for weight in tuned.parameters())


def test_all_named_recipes_paste_back():
    from robustclip import training

    for name in RECIPES:
        recipe = named_recipe(name, eps=EPS)
        assert eval(repr(recipe), vars(training) | {"BertAttack": BertAttack}) == recipe
    assert len({repr(named_recipe(name, eps=EPS)) for name in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize("rule", ["frozen", "clamped", "free"])
def test_logit_scale(clip, pictures, rule):
    """From just below ln 100 a large step leads above it, where only "free" may stay."""
    hot = models.load(device="cpu")
    hot.network.logit_scale.data.fill_(math.log(100) - 1e-3)
    recipe = Standard.of(**(SMALL | {"updates": 1}), logit_scale=rule, rate=0.1, schedule="constant")
    scale = train(recipe, hot, pictures).clip.network.logit_scale.item()
    free = Standard.of(**(SMALL | {"updates": 1}), logit_scale="free", rate=0.1, schedule="constant")
    moved = train(free, hot, pictures).clip.network.logit_scale.item()
    assert moved != pytest.approx(math.log(100) - 1e-3, abs=0.05)
    expected = {"frozen": math.log(100) - 1e-3, "clamped": min(moved, math.log(100)), "free": moved}[rule]
    assert scale == pytest.approx(expected, abs=1e-6)


# --- schedules --------------------------------------------------------------------------------------------------------


def test_the_rate_rises_and_falls_once():
    recipe = TeCoA.of(eps=EPS, rate=0.5)
    rates = [recipe.optimisation.rate_at(update, 1000) for update in range(1000)]
    assert rates[0] == pytest.approx(0.5 / 25)
    assert rates[100] == pytest.approx(0.5 * (1 + 1 / 25) / 2)  # half way up
    assert max(rates) == rates[200] == pytest.approx(0.5)
    assert rates[600] == pytest.approx(0.5 * (1 + 1e-4) / 2)
    assert SCHEDULES["one-cycle"](1.0) == pytest.approx(1e-4)
    assert rates[:201] == sorted(rates[:201])
    assert rates[200:] == sorted(rates[200:], reverse=True)
    assert {TeCoA.of(eps=EPS, schedule="constant").optimisation.rate_at(update, 9) for update in range(9)} == {2e-3}


def test_the_budget_grows_and_the_optimizer_gets_the_rate(clip, pictures):
    recipe = TeCoA.of(eps=0.1, warm_up=0.5)
    assert [recipe.attack.eps_at(0.1, update, 8) for update in range(8)] == pytest.approx(
        [0.025, 0.05, 0.075] + 5 * [0.1]
    )
    assert InnerAttack(warm_up=0.0).eps_at(0.1, 0, 8) == 0.1
    run = Run(Standard.of(**SMALL, rate=0.01), clip, pictures)
    run.update()
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / 25)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 600), ({"epochs": 1}, 4), ({"epochs": 0.5}, 2), ({"epochs": 1000}, 3750),
        ({"epochs": 1000, "updates": 7}, 7), ({"epochs": 1, "updates": 7}, 4), ({"updates": 7}, 7),
    ],
)  # fmt: skip
def test_updates_follow_epochs_or_are_fixed(settings, expected):
    assert TeCoA.of(eps=EPS, batch_size=80, **settings).optimisation.updates_on(300) == expected


def test_updates_follow_the_shots(clip, pictures):
    """Twelve times the shots are twelve times the updates of as many epochs; a fixed number stays."""

    def updates(shots, **how):
        return Run(TeCoA.of(eps=EPS, batch_size=10, shots=shots, **how), clip, pictures).updates

    assert [updates(shots, epochs=3) for shots in (1, 2, 12)] == [3, 6, 36]
    assert [updates(shots, updates=5) for shots in (1, 2, 12)] == [5, 5, 5]


# --- other objectives of the attack -----------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.9, 1.0])
def test_embeddings_are_attacked_with_momentum(clip, attacked, momentum):
    """v <- sign(m v + sign(slope)), x' <- x' + step v, as FARE has it, against plain steps by hand.

    Below m = 1 the new sign always outweighs the old one: FARE's 0.9 changes nothing where slopes are not zero.
    """
    points, velocity = (attacked.images + EPS * attacked.noise).clamp(0, 1), 0
    clean = clip.raw_images(attacked.images)
    for _ in range(3):
        points.requires_grad_()
        (slope,) = torch.autograd.grad((clip.raw_images(points) - clean).square().sum(), points)
        velocity = (momentum * velocity + slope.sign()).sign()
        moved = points.detach() + EPS / 2 * velocity
        points = torch.max(torch.min(moved, attacked.images + EPS), attacked.images - EPS).clamp(0, 1)
    ours = InnerAttack(objective="embeddings", momentum=momentum, step_size=EPS / 2)(attacked)
    without = InnerAttack(objective="embeddings", step_size=EPS / 2)(attacked)
    assert ((ours - points).abs() > 1e-5).float().mean() < 0.02
    assert (((without - points).abs() > 1e-5).float().mean() > 0.1) == (momentum == 1)


def test_the_original_is_attacked_whatever_the_tuned_model(clip, attacked):
    """And by an objective of one's own: the same as the named one."""
    student = interpolate(clip, clip, 0.5)
    for weight in student.network.visual.parameters():
        weight.data.mul_(1.1)
    batch = Batch(
        attacked.recipe, student, attacked.images, attacked.labels, attacked.prompts, attacked.noise, EPS, clip
    )
    found = InnerAttack(model="original")(batch)
    assert torch.equal(found, InnerAttack()(attacked))
    assert not torch.equal(found, InnerAttack()(batch))
    assert torch.equal(InnerAttack(objective=cross_entropy)(batch), InnerAttack()(batch))


def test_starts_and_what_is_kept(clip, attacked):
    above = InnerAttack(steps=0, start="one-sided")(attacked)
    assert (above >= attacked.images).all()
    assert torch.equal(above, (attacked.images + EPS * attacked.noise.abs()).clamp(0, 1))
    harsh = {"objective": "features", "steps": 4, "step_size": 2 * EPS}  # overshoots, so that the last is not the best
    distances = [1 - (clip.encode_images(InnerAttack(**harsh, keep=keep)(attacked))
                      * clip.encode_images(attacked.images)).sum(1) for keep in ("last", "best")]  # fmt: skip
    assert (distances[1] >= distances[0] - 1e-5).all()
    assert (distances[1] > distances[0] + 1e-5).any()


@pytest.mark.parametrize("name", [*RECIPES, "WithoutText"])
def test_passes_are_those_of_an_update(clip, pictures, name):
    """Of the counted backward passes only those that reach pixels; the loss's own reach weights alone."""
    make = partial(named_recipe, name) if name in RECIPES else WithoutText.of
    recipe = make(**(SMALL | {"attack_steps": 2}))
    run = Run(recipe, clip, pictures)
    with models.count_passes() as counted:
        run.recipe.loss(run.batch()).backward()
    attack = recipe.attack.passes()[1] if recipe.passes()[1] > 1 and "text-term" not in name else 0
    assert counted.forward == 8 * recipe.passes()[0]
    assert counted.backward == 8 * attack


# --- order ------------------------------------------------------------------------------------------------------------

LABELS = torch.tensor([0] * 7 + [1] * 5 + [2] * 6)[torch.randperm(18, generator=torch.Generator().manual_seed(0))]


def epochs_of(order, epochs):
    rows = torch.cat([order.rows(update) for update in range(-(-epochs * len(order) // order.batch_size))])
    return [rows[at * len(order) : (at + 1) * len(order)].tolist() for at in range(epochs)]


@pytest.mark.parametrize("batch_size", [1, 4, 9, 40])
def test_the_fixed_subset_comes_once_an_epoch(batch_size):
    order = Order(LABELS, batch_size, 4, "fixed", 3)
    first, second, third = epochs_of(order, 3)
    assert sorted(first) == sorted(second) == sorted(third)
    assert len(set(first)) == 12
    assert Counter(LABELS[first].tolist()) == {0: 4, 1: 4, 2: 4}
    assert first != second
    assert sorted(epochs_of(Order(LABELS, batch_size, None, "fixed", 3), 1)[0]) == list(range(18))


def test_the_released_sampler_goes_through_the_lists():
    order = Order(LABELS, 5, 2, "released", 3)
    epochs = epochs_of(order, 8)
    assert all(LABELS[epoch].tolist() == [0, 0, 1, 1, 2, 2] for epoch in epochs)
    for label, size in enumerate((7, 5, 6)):
        seen = [row for epoch in epochs for row in epoch if LABELS[row] == label]
        assert len(set(seen[:size])) == size, "a picture came again before the list was used up"
        assert seen[size:] == (seen[:size] * 4)[: len(seen) - size]


@pytest.mark.parametrize("sampler", ["fixed", "released"])
def test_an_order_does_not_remember_every_epoch(sampler):
    order, drawn = Order(LABELS, 4, 3, sampler, 1), []
    for update in range(30):
        drawn.append(weakref.ref(order._epoch(update)))
    assert sum(epoch() is not None for epoch in drawn) <= 2


@pytest.mark.parametrize("sampler", ["fixed", "released"])
def test_batches_depend_on_seed_and_number_only(sampler):
    forward = [Order(LABELS, 4, 3, sampler, 1).rows(update).tolist() for update in range(6)]
    order = Order(LABELS, 4, 3, sampler, 1)
    assert [order.rows(update).tolist() for update in reversed(range(6))] == forward[::-1]
    assert [Order(LABELS, 4, 3, sampler, 2).rows(update).tolist() for update in range(6)] != forward


def test_too_many_shots_name_the_smallest_class():
    with pytest.raises(ValueError, match=r"smallest class has 5 pictures\)=6 .* between 1 and 5"):
        Order(LABELS, 4, 6, "fixed", 0)


def test_pictures_are_those_of_the_role(pictures):
    images, labels, _, _ = tinyworld_samples("cifar10", "train", 300)
    rows = torch.tensor([7, 0, 250])
    torch.testing.assert_close(pictures.fetch(rows), images[rows].float() / 255, rtol=0, atol=1e-7)
    assert pictures.labels.tolist() == labels.tolist()
    assert pictures.prompts == tuple(role("cifar10").prompts)
    assert pictures.digest != Pictures.of("cifar10", n=200).digest


# --- interruptions ----------------------------------------------------------------------------------------------------

LONGER = SMALL | {"updates": 4}
CASES = {
    "MMCoA": MMCoA.of(**LONGER, clip_norm=1.0, logit_scale="clamped"),
    "L2": TeCoA.of(**LONGER, trains="both", optimizer="adam", weight_decay=0.2),
    "leak-sgd": TeCoA.of(**LONGER, leak=True, optimizer="sgd", rate=1e-3, logit_scale="free"),
    "released": Standard.of(**LONGER, sampler="released", shots=3, contrastive=True),
    "AdvPT": AdvPT.of(**LONGER, rate=0.1),
    "VP": VP.of(**LONGER, rate=0.1),
    "PMG-AFT": PMGAFT.of(**LONGER, optimizer="sgd", rate=1e-3),
    "TGA-ZSR": TGAZSR.of(**LONGER),
    "FARE": FARE.of(**LONGER, rate=1e-4),
    "LAAT": LAAT.of(**LONGER),
    "TIMA": TIMA.of(**LONGER),
}
ELSEWHERE = """
import os, sys, pathlib, warnings
warnings.simplefilter("error")
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_training as tests
from robustclip.training import checkpoint
from robustclip.training.optimisation import Optimisation
from robustclip.training.parallel import joined, world

clip, pictures = tests.models.load(device="cpu"), tests.Pictures.of("cifar10", n=300)
folder = pathlib.Path(sys.argv[2])
exec(tests.KILLED)
exec(tests.TOGETHER_THERE)
"""
KILLED = """
at_update, after_bytes, save = Optimisation.rate_at, 5000, checkpoint.save_file

def rate_at(optimisation, update, updates):
    if update == 3:
        os.kill(os.getpid(), 9)  # the gradient is there, the step is not: between two checkpoints
    return at_update(optimisation, update, updates)

def torn(tensors, path, about):
    save(tensors, path, about)
    if os.path.exists(path.parent / checkpoint.CHECKPOINT):
        os.truncate(path, after_bytes)
        os.kill(os.getpid(), 9)  # in the middle of writing the second checkpoint

for name, recipe in tests.CASES.items():
    child = os.fork()
    if not child:
        if name == "VP":
            checkpoint.save_file = torn
        else:
            Optimisation.rate_at = rate_at
        tests.train(recipe, clip, pictures, folder / "killed" / name, every=1 if name == "VP" else 2)
    assert os.waitpid(child, 0)[1] == 9, name
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, root):
    """Folders of runs that were killed without a warning (`killed`), and of what two processes made (`together`).

    One process imports everything and forks itself for all of them.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "together").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, str(root / "tests"), str(folder), port],
                          capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def done_in(folder):
    with safe_open(folder / CHECKPOINT, "pt") as file:
        return json.loads(file.metadata()["run"])["done"]


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_goes_on_bit_for_bit(clip, pictures, elsewhere, name):
    killed = elsewhere / "killed"
    assert done_in(killed / name) == (1 if name == "VP" else 2)
    random = torch.get_rng_state()
    straight = train(CASES[name], clip, pictures)
    run = train(CASES[name], clip, pictures, killed / name, every=3)
    assert run.losses == straight.losses
    assert len(run.losses) == 4
    assert not changed(straight.clip, run.clip)
    assert run.clip.digest == straight.clip.digest != clip.digest
    assert done_in(killed / name) == 4
    assert torch.equal(random, torch.get_rng_state())


@pytest.fixture(scope="module")
def finished(clip, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(Standard.of(**SMALL), clip, pictures, folder)
    return folder


def test_a_checkpoint_of_another_run_is_an_error_that_says_what_differs(clip, pictures, finished):
    for recipe, model, other, what in (
        (Standard.of(**SMALL, rate=1.0), clip, pictures, "recipe"),
        (Standard.of(**SMALL), clip, Pictures.of("cifar10", n=200), "pictures"),
        (Standard.of(**SMALL), interpolate(clip, clip, 0.5).half().float(), pictures, "model"),
    ):
        with pytest.raises(ValueError, match=rf"another run \({what} differ\); choose another folder"):
            train(recipe, model, other, finished)
    assert done_in(finished) == 2


@pytest.mark.parametrize("left", [0, 100, -1])
def test_a_torn_checkpoint_is_an_error(clip, pictures, finished, tmp_path, left):
    whole = (finished / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(whole[:left])
    with pytest.raises(ValueError, match=f"{CHECKPOINT} is no checkpoint, or a torn one"):
        train(Standard.of(**SMALL), clip, pictures, tmp_path)


def rewritten(path, change):
    """The checkpoint after a change of its tensors, with a digest that fits."""
    with safe_open(path, "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, about | {"digest": checkpoint._digest(tensors, about["run"])})


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7, 0.9, 0.99])
def test_one_flipped_bit_in_a_checkpoint_is_an_error(clip, pictures, finished, tmp_path, place):
    whole = bytearray((finished / CHECKPOINT).read_bytes())
    whole[int(place * len(whole))] ^= 1
    (tmp_path / CHECKPOINT).write_bytes(whole)
    with pytest.raises(ValueError, match=f"{CHECKPOINT} is no checkpoint.*changed or damaged.*delete it"):
        train(Standard.of(**SMALL), clip, pictures, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("weights/35"), "weights/35 is missing, it should be"),
        (lambda tensors: tensors.pop("random/cpu"), "random/cpu is missing"),
        (
            lambda tensors: tensors.update({"weights/3": tensors["weights/3"][:1].clone()}),
            "weights/3 is .* it should be",
        ),
        (lambda tensors: tensors.update({"optimizer/3/exp_avg": torch.zeros(1)}), "optimizer/3/exp_avg is .*1"),
        (
            lambda tensors: tensors.update({"optimizer/999/exp_avg": torch.zeros(1)}),
            "optimizer/999/exp_avg is .*unknown",
        ),
    ],
    ids=["no weight", "no random state", "narrow weight", "narrow moment", "moment of nothing"],
)
def test_a_checkpoint_that_does_not_fit_is_an_error(clip, pictures, finished, tmp_path, change, message):
    shutil.copy(finished / CHECKPOINT, tmp_path)
    rewritten(tmp_path / CHECKPOINT, change)
    with pytest.raises(ValueError, match=f"does not fit this run: {message}"):
        train(Standard.of(**SMALL), clip, pictures, tmp_path)


def test_a_loss_that_is_not_finite_stops_and_the_checkpoint_stays(clip, pictures, tmp_path):
    recipe = Standard.of(**(SMALL | {"updates": 3}))
    poisoned = Pictures(pictures.labels, pictures.classes, pictures.digest,
                        lambda rows: pictures.fetch(rows) / (rows != int(bad))[:, None, None, None])  # fmt: skip
    rows = Order(pictures.labels, 8, None, "fixed", 0).rows(2)
    bad = rows[5]
    with pytest.raises(Diverged) as caught:
        train(recipe, clip, poisoned, tmp_path, every=1)
    for part in ("update 2 of 3", str(rows.tolist()), str(tmp_path / CHECKPOINT), "of update 2", "clip_norm"):
        assert part in str(caught.value)
    run = train(recipe, clip, pictures, tmp_path)
    assert len(run.losses) == 3
    assert run.clip.digest == train(recipe, clip, pictures).clip.digest


def test_models_on_the_way(clip, pictures, tmp_path):
    tuned = train(Standard.of(**(SMALL | {"updates": 4})), clip, pictures, tmp_path, stages=2).clip
    half = models.load(tmp_path / "stage-1", device="cpu")
    assert len({clip.digest, half.digest, tuned.digest}) == 3
    assert not (tmp_path / "stage-2").exists()


# --- several processes ------------------------------------------------------------------------------------------------


def test_a_batch_must_split_evenly(monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: (1, 3))
    assert parallel.share(12) == slice(4, 8)
    with pytest.raises(ValueError, match=r"batch_size=8 cannot be shared evenly by 3 processes; choose a multiple"):
        parallel.share(8)


SHARED = {"eps": EPS, "updates": 2, "batch_size": 8, "optimizer": "sgd", "rate": 1e-3, "schedule": "constant"}
# Without steps of the attack only the order of sums differs. A step takes signs of slopes: rounding flips about one
# pixel in 10^5, worth 0.3 % of the gradient here, and the second update doubles that and more.
TOGETHER = {
    "MMCoA-noise": (MMCoA.of(**SHARED, attack_steps=0, logit_scale="free"), 1e-4),
    "TeCoA": (TeCoA.of(**(SHARED | {"updates": 1}), attack_steps=2), 0.05),
    "leak": (MMCoA.of(**(SHARED | {"updates": 1}), attack_steps=2, leak=True), 0.05),
    "released": (Standard.of(**SHARED, contrastive=True, sampler="released", shots=3), 1e-4),
    **{kind.__name__: (kind.of(**SHARED, attack_steps=0), 1e-4) for kind in (PMGAFT, TGAZSR, LAAT, TIMA)},
    # Its loss grows fivefold with an update, and what rounding moved with it: the second one is left out.
    "FARE": (FARE.of(**(SHARED | {"rate": 1e-6, "updates": 1}), attack_steps=0), 1e-4),
}
TOGETHER_THERE = """
child = os.fork()
os.environ |= {"WORLD_SIZE": "2", "RANK": str(int(not child)), "LOCAL_RANK": str(int(not child)),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[3]}
with joined():
    assert world() == (int(not child), 2)
    for name, (recipe, _) in tests.TOGETHER.items():
        run = tests.train(recipe, clip, pictures)
        found = {"weights": run.clip.network.state_dict(), "losses": run.losses}
        torch.save(found, folder / "together" / f"{name}-{world()[0]}")
assert world() == (0, 1)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_train_the_same_model(clip, pictures, elsewhere, name):
    recipe, tolerance = TOGETHER[name]
    run = train(recipe, clip, pictures)
    first, second = (torch.load(elsewhere / "together" / f"{name}-{rank}") for rank in (0, 1))
    assert first["losses"] == pytest.approx(run.losses, rel=max(1e-5, tolerance / 10))
    weights, start = run.clip.network.state_dict(), Run(recipe, clip, pictures).clip.network.state_dict()
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in weights)
    moved, other = (vector(state[key] - start[key] for key in start) for state in (weights, first["weights"]))
    assert moved.norm() > 0
    assert (moved - other).norm() <= tolerance * moved.norm()


# --- what training brings ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(clip):
    return train(TeCoA.of(eps=EPS, updates=60, batch_size=48, attack_steps=1), clip,
                 Pictures.of("cifar10", n=1280))  # fmt: skip


def robust_hits(clip):
    images, labels, _, _ = tinyworld_samples("cifar10", "test", 100)
    images, classifier = images.float() / 255, models.zero_shot(clip, role("cifar10"))
    with torch.no_grad():
        return (classifier(PGD(eps=EPS, steps=5)(classifier, images, labels)).argmax(1) == labels).sum().item()


def test_a_few_updates_already_help_under_attack(clip, tuned):
    losses = tuned.losses
    assert sum(losses[-10:]) < sum(losses[15:25])
    assert robust_hits(tuned.clip) >= robust_hits(clip) + 10


def test_the_text_tower_stays_as_it_was(clip, tuned):
    prompts = role("cifar10").prompts
    assert torch.equal(tuned.clip.encode_texts(prompts), clip.encode_texts(prompts))
    assert clip.digest == models.load(device="cpu").digest != tuned.clip.digest


def test_logits_do_not_depend_on_neighbors(tuned):
    images = tinyworld_samples("cifar10", "test", 8)[0].float() / 255
    classifier = models.zero_shot(tuned.clip, role("cifar10"))
    with torch.no_grad():
        together, alone = classifier(images), torch.cat([classifier(images[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-3)


def test_same_seed_same_weights(clip, pictures):
    first, second, other = (train(MMCoA.of(**SMALL, seed=seed), clip, pictures).clip.digest for seed in (3, 3, 4))
    assert first == second != other


# --- interpolation ----------------------------------------------------------------------------------------------------


def test_interpolation_is_linear_between_its_ends(clip, tuned):
    second = tuned.clip
    assert interpolate(clip, second, 0).digest == clip.digest
    assert interpolate(clip, second, 1).digest == second.digest
    start, end, part = (vector(one.network.parameters()) for one in (clip, second, interpolate(clip, second, 0.3)))
    torch.testing.assert_close(part, start + 0.3 * (end - start))
    with pytest.raises(ValueError, match=r"weight=1.5 .* between 0 and 1"):
        interpolate(clip, second, 1.5)


def test_interpolation_needs_one_architecture(clip, pictures):
    framed = train(VP.of(**(SMALL | {"updates": 1})), clip, pictures).clip
    with pytest.raises(ValueError, match=r"differ in 'visual.frame'; give one architecture"):
        interpolate(clip, framed, 0.5)
    mapped = train(TIMA.of(**(SMALL | {"updates": 1})), clip, pictures).clip
    with pytest.raises(ValueError, match=r"differ in 'text_transform.matrix'; give one architecture"):
        interpolate(clip, mapped, 0.5)
    texts, ends = role("cifar10").prompts, interpolate(mapped, mapped, 0.5)
    torch.testing.assert_close(ends.encode_texts(texts), mapped.encode_texts(texts))


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (TeCoA, {"eps": -0.1}, "eps=-0.1 .* between 0 and 1"),
        (TeCoA, {"eps": 2}, "eps=2 .* between 0 and 1"),
        (TeCoA, {"eps": math.nan}, "eps=nan"),
        (TeCoA, {"updates": 0}, "updates=0 .* at least 1"),
        (TeCoA, {"batch_size": 2.5}, "batch_size=2.5 .* whole number"),
        (TeCoA, {"attack_steps": -1}, "attack_steps=-1 .* at least 0"),
        (TeCoA, {"shots": 0}, "shots=0 .* at least 1"),
        (TeCoA, {"epochs": 0}, "epochs=0"),
        (TeCoA, {"step_size": -1}, "step_size=-1"),
        (TeCoA, {"clip_norm": 0}, "clip_norm=0"),
        (TeCoA, {"warm_up": 1.5}, "warm_up=1.5 .* between 0 and 1"),
        (TeCoA, {"rate": -1}, "rate=-1"),
        (TeCoA, {"weight_decay": math.inf}, "weight_decay=inf"),
        (TeCoA, {"seed": -1}, "seed=-1"),
        (TeCoA, {"sampler": "none"}, "unknown sampler 'none'; choose one of: fixed, released"),
        (TeCoA, {"precision": "int8"}, "unknown precision 'int8'"),
        (TeCoA, {"optimizer": "lion"}, "unknown optimizer 'lion'; choose one of: adamw, adam, sgd"),
        (TeCoA, {"schedule": "linear"}, "unknown schedule 'linear'"),
        (TeCoA, {"trains": "all"}, "unknown trains 'all'; choose one of: image, text, both, prompt"),
        (TeCoA, {"logit_scale": "fixed"}, "unknown logit_scale 'fixed'; choose one of: frozen, clamped, free"),
        (MMCoA, {"image_weight": -1}, "image_weight=-1"),
        (MMCoA, {"image_weight": 0, "text_weight": 0}, r"image_weight \+ text_weight=0"),
    ],
)
def test_wrong_settings_are_named(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind.of(**({"eps": EPS} | wrong))


def test_a_recipe_that_trains_nothing_or_is_unknown_is_an_error(clip, pictures):
    with pytest.raises(ValueError, match=r"trains no weight of 'tinyworld-clip'"):
        train(TeCoA.of(**SMALL, trains="prompt"), clip, pictures)
    with pytest.raises(ValueError, match=r"unknown recipe 'TeCoa'; choose one of: FT-standard"):
        named_recipe("TeCoa", eps=EPS)
