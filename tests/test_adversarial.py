"""Adversarial fine-tuning: it teaches, it leaves the original alone, and its inner maximum keeps the budget."""

import pytest
import torch

from robustclip import models
from robustclip.attacks import PGD
from robustclip.data.roles import role, tinyworld_samples
from robustclip.training.adversarial import AdversarialFineTuning, inner_maximum

EPS = 8 / 255


@pytest.fixture(scope="module")
def clip():
    return models.load(device="cpu")


@pytest.fixture(scope="module")
def tuned(clip):
    images, labels, _, _ = tinyworld_samples("cifar10", "train", 1280)
    recipe = AdversarialFineTuning(eps=EPS, steps=60, batch_size=64, attack_steps=2)
    return recipe(clip, images, labels, role("cifar10").prompts)


def robust_hits(clip):
    images, labels, _, _ = tinyworld_samples("cifar10", "test", 100)
    images, classifier = images.float() / 255, models.zero_shot(clip, role("cifar10"))
    with torch.no_grad():
        return (classifier(PGD(eps=EPS, steps=5)(classifier, images, labels)).argmax(1) == labels).sum().item()


def test_a_few_updates_already_help_under_attack(clip, tuned):
    assert robust_hits(tuned) >= robust_hits(clip) + 10


def test_the_original_is_untouched_and_the_copy_is_ready_for_use(clip, tuned):
    assert clip.digest == models.load(device="cpu").digest != tuned.digest
    assert not tuned.training
    assert not any(module.training for module in tuned.modules())
    assert not any(weight.requires_grad for weight in tuned.parameters())


def test_the_text_tower_stays_as_it_was(clip, tuned):
    prompts = role("cifar10").prompts
    torch.testing.assert_close(tuned.encode_texts(prompts), clip.encode_texts(prompts), rtol=0, atol=0)


def test_logits_do_not_depend_on_neighbors(tuned):
    images = tinyworld_samples("cifar10", "test", 8)[0].float() / 255
    classifier = models.zero_shot(tuned, role("cifar10"))
    with torch.no_grad():
        together, alone = classifier(images), torch.cat([classifier(images[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-3)


def test_same_seed_same_weights(clip):
    images, labels, _, _ = tinyworld_samples("cifar10", "train", 64)
    recipe = AdversarialFineTuning(eps=EPS, steps=2, batch_size=16, attack_steps=1)
    first, second = (recipe(clip, images, labels, role("cifar10").prompts).digest for _ in range(2))
    assert first == second


def test_bytes_and_floats_train_the_same(clip):
    images, labels, _, _ = tinyworld_samples("cifar10", "train", 32)
    recipe = AdversarialFineTuning(eps=EPS, steps=1, batch_size=8, attack_steps=1)
    prompts = role("cifar10").prompts
    assert recipe(clip, images, labels, prompts).digest == recipe(clip, images.float() / 255, labels, prompts).digest


def test_the_inner_maximum_raises_the_loss_within_the_budget(clip):
    pixels, labels, _, _ = tinyworld_samples("cifar10", "test", 32)
    images, classifier = pixels.float() / 255, models.zero_shot(clip, role("cifar10"))
    attacked = inner_maximum(classifier, images, labels, EPS, 3, torch.zeros_like(images))
    assert (attacked - images).abs().max() <= EPS + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    loss = [torch.nn.functional.cross_entropy(classifier(batch), labels) for batch in (images, attacked)]
    assert loss[1] > loss[0] + 1


@pytest.mark.parametrize("wrong", [{"eps": -0.1}, {"eps": 2}, {"steps": 0}, {"attack_steps": 0}, {"batch_size": 0}])
def test_wrong_settings_are_named(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        AdversarialFineTuning(**({"eps": EPS} | wrong))
