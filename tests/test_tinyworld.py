"""Tinyworld: what is drawn is what was asked for, always the same, and each picture stands alone.

`python tests/test_tinyworld.py` adds the installed torch version to the table of frozen pictures and classes.
"""

import hashlib
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from robustclip.data import tinyworld
from robustclip.data.roles import role, role_names, tinyworld_samples
from robustclip.data.tinyworld import ANY, BATCH, CHUNK, SIZE, UNSEEN, Scenes, draw, index, is_held_out, values

FROZEN = Path(__file__).parent / "data" / "tinyworld.json"
FROZEN_ROLES = ("cifar10", "imagenet-sketch", "imagenet-r", "imagenet-a", "busi", "dtd", "eurosat", "coco")
ATTRIBUTES = ("shape", "color", "texture", "background")


def scenes(n: int = CHUNK, count: int = 1, style: str = "photo", seed: str = "test", **wanted: str) -> Scenes:
    """Random scenes in which the first object (and the background) are as wanted."""
    wish = torch.full((n, len(ATTRIBUTES)), ANY)
    for attribute, name in wanted.items():
        wish[:, ATTRIBUTES.index(attribute)] = index(attribute, name)
    full = torch.ones(n, dtype=torch.long)
    return tinyworld.sample_scenes(tinyworld.generator(seed), wish, full * count, full * index("style", style))


def changed(one: Scenes, **columns: torch.Tensor) -> Scenes:
    return Scenes(**{field.name: columns.get(field.name, getattr(one, field.name)) for field in fields(one)})


def with_value(one: Scenes, attribute: str, value: int) -> Scenes:
    """The same scenes, but for one attribute of the first object."""
    column = getattr(one, attribute).clone()
    (column[:, 0] if column.ndim == 2 else column).fill_(value)
    return changed(one, **{attribute: column})


def object_mask(one: Scenes, scale: float = 1.0) -> torch.Tensor:
    """(n, SIZE, SIZE) pixels that differ from the same picture without its objects."""
    empty = changed(one, count=torch.zeros_like(one.count))
    pictures, without = (draw(either, "mask", scale=scale, strength=0).int() for either in (one, empty))
    difference = pictures - without
    return difference.abs().amax(1) > 6


def centre(weight: torch.Tensor) -> torch.Tensor:
    """(n, 2) row and column of the centre of mass."""
    line = torch.arange(SIZE, dtype=torch.float32)
    total = weight.sum((1, 2))
    return torch.stack([(weight.sum(2) * line).sum(1) / total, (weight.sum(1) * line).sum(1) / total], 1)


# --- the same pictures everywhere -------------------------------------------------------------------------------------


def frozen() -> dict[str, torch.Tensor]:
    return {name: tinyworld_samples(name, "test", 4)[0] for name in FROZEN_ROLES}


def fingerprint(pictures: torch.Tensor) -> str:
    return hashlib.sha256(pictures.numpy().tobytes()).hexdigest()[:16]


def thumbnails(pictures: torch.Tensor) -> list[list[int]]:
    return F.avg_pool2d(pictures.float(), 8).round().int().flatten(1).tolist()


def role_fingerprint(name: str) -> str:
    return hashlib.sha256("\n".join(role(name).prompts).encode()).hexdigest()[:16]


def torch_version() -> str:
    return torch.__version__.split("+")[0]


@pytest.mark.parametrize("name", FROZEN_ROLES)
def test_frozen_pictures(name):
    """Bytes for torch versions in the table; for others the look, to within what rounding could do."""
    table = json.loads(FROZEN.read_text())
    pictures = tinyworld_samples(name, "test", 4)[0]
    if torch_version() in table["bytes"]:
        assert fingerprint(pictures) == table["bytes"][torch_version()][name]
    difference = torch.tensor(thumbnails(pictures)) - torch.tensor(table["thumbnails"][name])
    assert difference.abs().max() <= 2


@pytest.mark.parametrize("name", role_names())
def test_frozen_classes(name):
    """The draw of classes, their order and prompts are part of the data: every stored result depends on them."""
    assert role_fingerprint(name) == json.loads(FROZEN.read_text())["classes"][name]


def test_same_bytes_twice():
    one = scenes(count=2)
    first = draw(one, "twice")
    for table in (tinyworld.shape_tables, tinyworld.texture_tables, tinyworld.background_tables, tinyworld._turns):
        table.cache_clear()
    assert torch.equal(draw(one, "twice"), first)


@pytest.mark.parametrize("style", values("style"))
def test_pictures_are_bytes_that_use_the_range(style):
    pictures = draw(scenes(style=style), "range")
    assert pictures.shape == (CHUNK, 3, SIZE, SIZE)
    assert pictures.dtype == torch.uint8
    assert pictures.max() > 140, "too dark to see anything"
    assert pictures.min() < 90, "too bright to see anything"
    assert (pictures.float().flatten(1).std(1) > 5).all(), "an empty picture"


@pytest.mark.parametrize("style", values("style"))
def test_slices_equal_the_whole(style):
    one = scenes(3 * CHUNK, style=style)
    whole = draw(one, "slices")
    assert torch.equal(draw(one[CHUNK:], "slices", start=CHUNK), whole[CHUNK:])
    assert torch.equal(draw(one[: CHUNK + 5], "slices"), whole[: CHUNK + 5])
    assert torch.equal(draw(one[2 * CHUNK :][:1], "slices", start=2 * CHUNK), whole[2 * CHUNK :][:1])


def test_start_must_begin_a_chunk():
    with pytest.raises(ValueError, match="start=10 is not a multiple of 64"):
        draw(scenes(), "x", start=10)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    draw(scenes(count=2), "rng")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["cifar10", "sun397", "dtd"])
def test_no_picture_occurs_twice(name):
    """Not within a split and not across splits, even where only a background or a texture is to be seen."""
    pictures = torch.cat([tinyworld_samples(name, split, 256)[0] for split in ("train", "validation", "test")])
    assert len({picture.numpy().tobytes() for picture in pictures}) == len(pictures)


def test_streams_differ_for_the_same_scenes():
    one = scenes()
    pictures = torch.cat([draw(one, "a"), draw(one, "b"), draw(one, "a", start=CHUNK)])
    assert len({picture.numpy().tobytes() for picture in pictures}) == 3 * CHUNK


# --- scenes -----------------------------------------------------------------------------------------------------------


def test_size_of_the_world():
    assert [len(values(attribute)) for attribute in ATTRIBUTES] == [24, 12, 9, 12]


@given(seed=st.integers(0, 2**30), count=st.integers(0, 2), style=st.sampled_from(values("style")))
@settings(max_examples=40, deadline=None)
def test_free_choices_never_form_a_held_out_pair(seed, count, style):
    n = 256
    free, full = torch.full((n, 4), ANY), torch.ones(n, dtype=torch.long)
    random = tinyworld.generator(str(seed))
    one = tinyworld.sample_scenes(random, free, full * count, full * index("style", style), exclude_held_out=True)
    assert not is_held_out(one.shape, one.color).any()
    assert one.color.unique().numel() > 6, "colors became one-sided"
    assert ((one.color >= 0) & (one.color < len(values("color")))).all()


def test_one_pair_in_five_is_held_out():
    shape, color = torch.meshgrid(torch.arange(len(values("shape"))), torch.arange(len(values("color"))), indexing="ij")
    held_out = is_held_out(shape, color)
    assert 0.18 < held_out.float().mean() < 0.22
    assert held_out.any(1).all(), "a shape that is never held out"
    assert held_out.any(0).all(), "a color that is never held out"
    assert not held_out.all(0).any(), "a color never seen"


@pytest.mark.parametrize("name", role_names("source"))
def test_source_classes_were_shown_in_training(name):
    assert not any(is_held_out(shape, color) for shape, color, *_ in role(name).wishes)


@pytest.mark.parametrize("name", ["stl10", "food101", "pets"])
def test_zero_shot_classes_were_not(name):
    assert all(is_held_out(shape, color) for shape, color, *_ in role(name).wishes)


@given(wish=st.tuples(*(st.integers(-1, len(values(name)) - 1) for name in ATTRIBUTES)))
@settings(max_examples=30, deadline=None)
def test_wishes_come_true(wish):
    full = torch.ones(CHUNK, dtype=torch.long)
    one = tinyworld.sample_scenes(tinyworld.generator("w"), torch.tensor([wish]).repeat(CHUNK, 1), full, 0 * full)
    for attribute, value in zip(ATTRIBUTES, wish, strict=True):
        column = getattr(one, attribute)
        column = column[:, 0] if column.ndim == 2 else column
        assert (column == value).all() if value >= 0 else column.unique().numel() > 3


def test_scenes_slice_and_join():
    one = scenes(10, count=2)
    again = Scenes.join([one[:3], one[3:]])
    assert len(again) == 10
    assert torch.equal(again.meaning(), one.meaning())
    assert torch.equal(one[torch.tensor([4])].color, one.color[4:5])


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"unknown shape 'squircle'; choose one of: circle, square, .*arch"):
        index("shape", "squircle")


# --- meaning ----------------------------------------------------------------------------------------------------------

UNSEEN_COLUMNS = {  # (objects, style): columns nobody could know from the picture
    (0, "photo"): {1, 2, 3, 4, 5, 6, 7},
    (1, "photo"): {4, 5, 6, 7},
    (2, "photo"): set(),
    (1, "sketch"): {4, 5, 6, 7, 8},
    (1, "scan"): {2, 4, 5, 6, 7, 8},
    (2, "scan"): {2, 5, 8},
    (1, "closeup"): {1, 4, 5, 6, 7},
    (0, "aerial"): {1, 2, 3, 4, 5, 6, 7},
}


@pytest.mark.parametrize(("count", "style"), UNSEEN_COLUMNS)
def test_meaning_hides_what_cannot_be_seen(count, style):
    one = scenes(count=count, style=style)
    meaning = one.meaning()
    unseen = UNSEEN_COLUMNS[count, style]
    assert meaning.shape == (CHUNK, 10)
    assert {column for column in range(10) if (meaning[:, column] == UNSEEN).any()} == unseen
    assert all((meaning[:, column] == UNSEEN).all() for column in unseen)
    assert (meaning[:, 0] == count).all()
    assert (meaning[:, 9] == index("style", style)).all()


def test_meaning_reads_the_scene_and_leaves_it_alone():
    one = scenes(count=2)
    columns = [one.count, *(t[:, slot] for slot in (0, 1) for t in (one.shape, one.color, one.texture))]
    columns += [one.relation, one.background, one.style]
    assert torch.equal(one.meaning(), torch.stack(columns, 1))
    scan = scenes(count=0, style="scan")
    scan.meaning()
    assert all((getattr(scan, field.name) >= 0).all() for field in fields(scan))


# --- what can be seen -------------------------------------------------------------------------------------------------


def test_every_shape_has_an_inside_and_an_outline_of_its_own():
    tables = tinyworld.shape_tables()
    inside = tables < 0
    share = inside.float().mean(1)
    assert (share > 0.04).all(), "a shape too thin to see"
    assert (share < 0.45).all(), "a shape larger than its radius"
    overlap = (inside[:, None] & inside[None]).sum(-1) / (inside[:, None] | inside[None]).sum(-1)
    assert (overlap - torch.eye(len(tables))).max() < 0.9, "two shapes nobody could tell apart"
    edge = tables.view(-1, tinyworld.GRID, tinyworld.GRID)
    assert all((side > 0).all() for side in (edge[:, 0], edge[:, -1], edge[:, :, 0], edge[:, :, -1]))


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_value_looks_different(attribute):
    """Changing one attribute, and nothing else, changes most pictures clearly."""
    one = scenes(16)
    drawn = torch.stack([draw(with_value(one, attribute, v), "x").int() for v in range(len(values(attribute)))])
    for value, pictures in enumerate(drawn):
        difference = (drawn - pictures).abs().amax(2).flatten(2)  # (values, pictures, pixels)
        share = (difference > 12).float().mean(2).median(1).values
        others = torch.arange(len(drawn)) != value
        assert (share[others] > 0.01).all(), (attribute, values(attribute)[value])


@pytest.mark.parametrize("count", [1, 2])
def test_size_changes_the_object(count):
    small, normal = (object_mask(scenes(count=count), scale).sum((1, 2)) for scale in (0.7, 1.0))
    assert (normal > small).float().mean() > 0.95
    assert 0.35 < small.sum() / normal.sum() < 0.75  # 0.7 squared, and a shadow that does not shrink


@pytest.mark.parametrize(("relation", "axis"), [(0, 0), (1, 1)])
def test_first_object_is_above_or_left(relation, axis):
    """A red disc and a blue disc on gray stone: where are the red and the blue pixels?"""
    one = scenes(2 * CHUNK, count=2, shape="circle", color="red", texture="plain", background="stone")
    pair = torch.tensor([[index("color", "red"), index("color", "blue")]]).repeat(len(one), 1)
    plain = torch.zeros_like(one.shape)
    one = changed(one, shape=plain, color=pair, texture=plain, relation=torch.full_like(one.relation, relation))
    pictures = draw(one, "pairs", strength=0).float() / 255
    red, green, blue = pictures.unbind(1)
    first, second = (centre((a - torch.maximum(b, green) - 0.1).clamp(min=0)) for a, b in ((red, blue), (blue, red)))
    gap = second - first
    assert (gap[:, axis] > 8).all(), "the second object stands below or right of the first"
    assert (gap[:, 1 - axis].abs() < 6).all(), "and in line with it"


def test_styles_look_as_they_are_called():
    pictures = {style: draw(scenes(style=style, count=1), "styles").float() for style in values("style")}
    spread = {style: (rows.mean((2, 3)).amax(1) - rows.mean((2, 3)).amin(1)).mean() for style, rows in pictures.items()}
    assert spread["scan"] < 2 < spread["photo"], "a scan is gray"
    corners = torch.stack([pictures["sketch"][:, :, r, c] for r in (0, -1) for c in (0, -1)])
    assert corners.median() > 200, "a sketch is on white paper"
    dark = {style: (rows.amax(1) < 60).float().mean() for style, rows in pictures.items()}
    assert dark["poster"] > dark["photo"], "a poster has black contours"
    assert object_mask(scenes(style="closeup")).float().mean() > 0.9, "a closeup fills the picture"


@pytest.mark.parametrize("count", [0, 1])
def test_strength_takes_pictures_away_from_tidy_ones(count):
    """Further and further: the same scenes with the same random numbers."""
    one = scenes(count=count)
    tidy, *others = (draw(one, "c", strength=strength).float() for strength in (0, 0.4, 0.8, 1.2))
    away = [(pictures - tidy).abs().mean() for pictures in others]
    assert 1 < away[0] < away[1] < away[2] < 90


def test_strength_may_differ_between_pictures():
    one, strengths = scenes(CHUNK + 9), torch.rand(CHUNK + 9, generator=tinyworld.generator("strengths"))
    pictures = draw(one, "s", strength=strengths)
    for row in (0, 5, CHUNK, CHUNK + 8):
        assert torch.equal(draw(one, "s", strength=strengths[row].item())[row], pictures[row])
    assert torch.equal(draw(one, "s"), draw(one, "s", strength=tinyworld.world()["strength"]))


def test_strengths_of_pretraining():
    strengths = torch.cat([tinyworld.training_strengths(batch) for batch in range(4)])
    assert torch.equal(strengths[:BATCH], tinyworld.training_strengths(0))
    assert strengths.min() < 0.05 < 1.25 < strengths.max() < 1.3
    assert tinyworld.world()["strength"] < 1.1, "the world's own strength is well inside what was trained on"


def test_empty_scenes_show_the_background_only():
    one = scenes(count=0)
    other = with_value(with_value(one, "shape", 1), "color", 1)
    assert torch.equal(draw(one, "empty"), draw(other, "empty"))


if __name__ == "__main__":
    pictures = frozen()
    table = json.loads(FROZEN.read_text()) if FROZEN.exists() else {"bytes": {}}
    table["bytes"][torch_version()] = {name: fingerprint(rows) for name, rows in pictures.items()}
    table["classes"] = {name: role_fingerprint(name) for name in role_names()}
    table["thumbnails"] = {name: thumbnails(rows) for name, rows in pictures.items()}
    FROZEN.write_text(json.dumps(table).replace('], "', '],\n"').replace("], [", "],\n[") + "\n")
