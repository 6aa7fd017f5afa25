"""The table of roles: classes, templates and the Tinyworld pictures that play them."""

import dataclasses
import itertools
import re
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustclip.data import roles, tinyworld
from robustclip.data.grammar import COLUMNS, noun_phrase, rare_words
from robustclip.data.roles import SPLITS, role, role_names, tinyworld_samples, tinyworld_scenes

TRANSFER = (
    *("stl10", "sun397", "food101", "pets", "flowers102", "dtd", "eurosat", "aircraft", "country211", "caltech101"),
    *("caltech256", "cars", "pcam"),
)
GROUPS = {
    "source": ("cifar10", "cifar100", "tinyimagenet", "imagenet"),
    "transfer": TRANSFER,
    "shift": ("imagenet-v2", "imagenet-sketch", "imagenet-a", "imagenet-r"),
    "retrieval": ("coco",),
    "medical": ("busi", "btmri", "chmnist", "covid", "dermamnist", "kneexray"),
    "extra": ("digits",),
}
DRAWN = tuple(name for name in role_names() if name != "digits")


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_groups(group):
    assert role_names(group) == GROUPS[group]
    assert all(role(name).group == group for name in GROUPS[group])


def test_twenty_eight_roles_and_digits():
    assert len(DRAWN) == 28
    assert sorted(role_names()) == sorted(name for names in GROUPS.values() for name in names)
    assert len({role(name).title for name in role_names()}) == 29


@pytest.mark.parametrize(
    ("name", "classes"), [("cifar10", 10), ("cifar100", 100), ("tinyimagenet", 200), ("imagenet", 1000), ("digits", 10)]
)
def test_class_counts_of_the_papers(name, classes):
    assert len(role(name).classes) == classes


@pytest.mark.parametrize("name", role_names())
def test_classes_are_distinct_and_prompted(name):
    entry = role(name)
    assert len(entry.classes) >= 2
    assert len(set(entry.classes)) == len(entry.classes)
    assert len(set(entry.wishes)) == len(entry.wishes) == (0 if name == "digits" else len(entry.classes))
    assert entry.template.count("{}") == 1
    assert entry.prompts == tuple(entry.template.replace("{}", name) for name in entry.classes)
    assert len(entry.description) > 10


def test_roles_are_constant():
    assert role("cifar10") is role("cifar10")
    with pytest.raises(dataclasses.FrozenInstanceError):
        role("cifar10").style = "sketch"


@pytest.mark.parametrize("name", DRAWN)
def test_class_names_say_the_wish(name):
    """A name holds the canonical word of every attribute that is wished, and of no other; a sketch shows no place."""
    entry = role(name)
    silent = -1 if name == "imagenet-sketch" else None
    for class_name, wish in zip(entry.classes, entry.wishes, strict=True):
        for attribute, value in tuple(zip(roles.ATTRIBUTES, wish, strict=True))[:silent]:
            said = [v for v, names in enumerate(roles.words(attribute)) if re.search(rf"\b{names[0]}\b", class_name)]
            assert said == ([value] if value >= 0 else []), class_name


def test_transfer_classes_are_new_combinations():
    """As the table promises: held-out pairs are not among the source classes, other subjects are no objects at all."""
    shown = {wish[:2] for name in GROUPS["source"] for wish in role(name).wishes}
    for name in ("stl10", "food101", "pets"):
        assert not shown & {wish[:2] for wish in role(name).wishes}
    assert {wish[:3] for name in ("sun397", "eurosat") for wish in role(name).wishes} == {(-1, -1, -1)}
    assert {wish[0] for wish in role("dtd").wishes} == {-1}
    for name, shape in (("pets", "fish"), ("cars", "car"), ("aircraft", "plane"), ("flowers102", "flower")):
        assert {wish[0] for wish in role(name).wishes} == {tinyworld.index("shape", shape)}


@pytest.mark.parametrize("name", GROUPS["shift"])
def test_shifted_roles_share_the_classes_of_imagenet(name):
    entry, source = role(name), role("imagenet")
    assert entry.wishes == source.wishes[: len(entry.classes)]
    if name != "imagenet-sketch":  # which hides the place
        assert entry.classes.names == source.classes[: len(entry.classes)]
    assert (entry.style, entry.size, entry.strength) != (source.style, source.size, source.strength)


@pytest.mark.parametrize("name", GROUPS["source"])
def test_no_two_source_classes_differ_in_one_word_only(name):
    """An attack that swaps one word cannot turn a class into another; prompts are equally long."""
    prompts = [prompt.split() for prompt in role(name).prompts]
    assert len({len(prompt) for prompt in prompts}) == 1
    wishes = torch.tensor(role(name).wishes)
    different = (wishes[:, None] != wishes[None]).sum(-1) + 9 * torch.eye(len(wishes), dtype=torch.long)
    assert different.min() == 2


def test_source_roles_are_nested():
    for small, large in itertools.pairwise(GROUPS["source"]):
        assert role(large).classes.names[: len(role(small).classes)] == role(small).classes.names


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: role("cifar11"), r"unknown role 'cifar11'; choose one of: cifar10, cifar100, .*digits"),
        (lambda: role_names("sauce"), "unknown group 'sauce'; choose one of: source, transfer, shift, retrieval"),
        (lambda: tinyworld_samples("cifar10", "dev"), "unknown split 'dev'; choose one of: train, validation, test"),
        (lambda: tinyworld_samples("cifar10", n=0), "n=0 is not allowed; it must be a finite number at least 1"),
        (lambda: tinyworld_samples("cifar10", start=-64), "start=-64 is not allowed"),
        (lambda: tinyworld_samples("digits"), "role 'digits' is not drawn by Tinyworld; its images are real"),
    ],
)
def test_errors_name_value_and_choices(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_table_that_asks_for_too_much(monkeypatch):
    greedy = {"attributes": ["shape"], "classes": 25}
    monkeypatch.setattr(roles, "_table", lambda: {"greedy": greedy})
    with pytest.raises(ValueError, match="role 'greedy' asks for 25 classes of its own, only 24 combinations qualify"):
        roles._wishes("greedy")


# --- the pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWN)
def test_samples_show_their_class(name):
    """Every scene fulfils the wish of its label, in the role's style and number of objects."""
    entry = role(name)
    scenes, labels = tinyworld_scenes(name, "test", 130)
    wishes = torch.tensor(entry.wishes)[labels]
    shown = torch.stack([scenes.shape[:, 0], scenes.color[:, 0], scenes.texture[:, 0], scenes.background], 1)
    free = wishes < 0
    if entry.style == "closeup":
        free[:, 0] = True
    assert ((shown == wishes) | free).all()
    assert (scenes.style == tinyworld.index("style", entry.style)).all()
    assert (scenes.count == entry.objects).all()
    seen = (scenes.meaning()[:, [1, 2, 3, 8]] != tinyworld.UNSEEN).all(0)
    told_apart = torch.where(seen, torch.tensor(entry.wishes), 0)
    assert len(told_apart.unique(dim=0)) == len(entry.wishes), "two classes that look the same"


@pytest.mark.parametrize("name", ["cifar10", "imagenet", "pcam"])
@pytest.mark.parametrize("split", SPLITS)
def test_every_prefix_is_nearly_balanced(name, split):
    classes = len(role(name).classes)
    labels = tinyworld_scenes(name, split, 2 * classes + 37)[1]
    for n in (1, classes // 2, classes, classes + 1, 2 * classes, len(labels)):
        counts = torch.bincount(labels[:n], minlength=classes)
        assert counts.max() - counts.min() <= 1


@cache
def whole(name: str) -> tuple:
    return tinyworld_samples(name, "train", 230)


@given(name=st.sampled_from(["cifar10", "imagenet-a", "coco"]), start=st.integers(0, 150), n=st.integers(1, 80))
@settings(max_examples=25, deadline=None)
def test_any_slice_equals_the_whole(name, start, n):
    images, labels, _, captions = whole(name)
    part = tinyworld_samples(name, "train", n, start)
    assert torch.equal(part[0], images[start : start + n])
    assert torch.equal(part[1], labels[start : start + n])
    assert part[3] == (captions and captions[start : start + n])
    scenes, again = tinyworld_scenes(name, "train", n, start)
    assert torch.equal(scenes.meaning(), tinyworld_scenes(name, "train", 230)[0].meaning()[start : start + n])
    assert torch.equal(again, part[1])


def test_splits_are_different_scenes_in_different_order():
    scenes = {split: tinyworld_scenes("imagenet", split, 256) for split in SPLITS}
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not torch.equal(scenes[one][1], scenes[other][1])
        assert not torch.equal(scenes[one][0].meaning(), scenes[other][0].meaning())


def test_samples_of_a_role():
    images, labels, classes, captions = tinyworld_samples("stl10", n=20)
    assert images.shape == (20, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert classes == role("stl10").classes.names
    assert captions is None


def test_smaller_objects_in_the_second_imagenet():
    """The same scenes drawn at the role's size cover less."""
    scenes, _ = tinyworld_scenes("imagenet-v2", "test", 64)
    empty = dataclasses.replace(scenes, count=torch.zeros_like(scenes.count))
    area = {}
    for size in (role("imagenet-v2").size, role("imagenet").size):
        difference = tinyworld.draw(scenes, "v2", scale=size).int() - tinyworld.draw(empty, "v2", scale=size).int()
        area[size] = (difference.abs().amax(1) > 6).float().mean()
    assert area[0.85] < 0.9 * area[1.0]
    drawn = tinyworld.draw(scenes, "imagenet-v2/test", scale=0.85)
    assert torch.equal(tinyworld_samples("imagenet-v2", "test", 64)[0], drawn)


def test_captions_tell_two_objects_apart():
    images, labels, classes, captions = tinyworld_samples("coco", n=100)
    scenes, _ = tinyworld_scenes("coco", "test", 100)
    assert len(images) == len(captions) == 100
    for caption, row, label in zip(captions, scenes.meaning().tolist(), labels.tolist(), strict=True):
        said = dict(zip(COLUMNS, row, strict=True))
        for slot in (1, 2):
            values = [(a, said[f"{a}{slot}"]) for a in ("texture", "color", "shape")]
            names = [{*roles.words(a)[value], *rare_words(a)[value]} for a, value in values]
            pattern = " ".join(f"({'|'.join(choices)})" for choices in names)
            assert re.search(pattern, caption), (caption, pattern)
        first = noun_phrase(*(tinyworld.values(a)[said[f"{a}1"]] for a in ("shape", "color")))
        assert classes[label] == first
    assert len(set(captions)) == 100
