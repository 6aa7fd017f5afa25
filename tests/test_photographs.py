"""What the CLIP of photographs learns from: captions that are true, crops, marks of images that look alike."""

import random

import numpy as np
import pytest
import torch

import photographs
from photographs import SAYS, SHARES, SIZE, Album, Captioner, Photographs, augmented, fingerprints
from pretraining import CONTEXT
from robustclip.data import lexicon
from robustclip.data.roles import role

CLASSES = [("cifar10", "cat"), ("tinyimagenet", "tabby cat"), ("cifar10", "automobile"), ("stl10", "car"),
           ("dtd", "banded")]  # fmt: skip
NAMES = [name for _, name in CLASSES]


def said(number: int, times: int = 400) -> dict[str, list[str]]:
    """Captions about one class, with the classes of which they are true."""
    captioner, choose = Captioner(CLASSES), random.Random(0)
    pairs = [captioner.caption(number, choose) for _ in range(times)]
    return {text: [name for name, true in zip(NAMES, trues, strict=True) if true] for text, trues in pairs}


def test_a_name_is_true_of_every_class_that_it_covers():
    cat, tabby = said(0)["This is a photo of a cat"], said(1)["This is a photo of a tabby cat"]
    assert cat == ["cat", "tabby cat"], "a tabby cat is a cat"
    assert tabby == ["tabby cat"], "and not every cat is one"


def test_two_names_of_one_thing_are_true_of_both():
    for number, name in ((2, "automobile"), (3, "car")):
        assert said(number)[f"This is a photo of a {name}"] == ["automobile", "car"]


def test_every_caption_is_true_of_its_own_class():
    for number, name in enumerate(NAMES):
        assert all(name in true for true in said(number, 50).values())


def test_captions_say_names_synonyms_kinds_and_definitions():
    texts, entry = list(said(1, 2000)), lexicon.entry("tabby cat", "tiny-imagenet")
    for needed in (entry.name, *entry.synonyms, *entry.hypernyms, entry.gloss):
        assert any(needed in text for text in texts), needed
    assert sum(SAYS.values()) == pytest.approx(1)


def test_captions_follow_the_papers_template():
    template = role("dtd").paper["template"]
    assert template.format("banded") in said(4)


@pytest.mark.parametrize("side", [32, 64])
def test_crops_keep_size_and_colors(side):
    images = torch.full((6, 3, side, side), 128, dtype=torch.uint8)
    images[:, 0] = 200
    cut = augmented(images, torch.Generator().manual_seed(0))
    assert cut.shape == (6, 3, SIZE, SIZE)
    assert cut.dtype == torch.uint8
    assert (cut[:, 0].float() > cut[:, 1].float() + 20).all(), "a reddish picture stays reddish up to its border"


def test_crops_are_random_mirrored_and_repeatable():
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(200, 3, 64, 64)
    one, again = (augmented(ramp, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, again)
    rises = one[:, 0, 24, 36].float() > one[:, 0, 24, 12].float()
    assert 70 < rises.sum() < 130, "about half are mirrored"
    span = one.float().amax((1, 2, 3)) - one.float().amin((1, 2, 3))
    assert span.std() > 5, "and some are cut smaller than others"


def test_marks_survive_small_changes_and_tell_images_apart():
    images = torch.randint(0, 256, (50, 3, 8, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = images.repeat_interleave(6, 2).repeat_interleave(6, 3)[:, :, :48, :48] // 2
    marks = fingerprints(images)
    assert len(set(marks)) == 50
    assert fingerprints(images + 40) == marks, "lighter"
    assert all(0 <= mark < 2**64 for mark in marks)


# --- the stream -------------------------------------------------------------------------------------------------------


@pytest.fixture
def stream(monkeypatch, tmp_path):
    """A stream over two small sets; the red channel of a picture tells its class."""
    pictures = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    labels = np.repeat([0, 1], 10)
    pictures[:, 0] = torch.from_numpy(60 + 120 * labels).byte()[:, None, None]
    albums = [
        Album("cifar10", pictures, labels, ("cat", "ship")),
        Album("stl10", pictures.repeat(1, 1, 2, 2), labels, ("cat", "car")),
    ]
    monkeypatch.setattr(photographs, "albums", lambda: albums)
    monkeypatch.setattr(photographs, "write_photo_tokenizer", tokenizer)
    return Photographs(tmp_path)


def tokenizer(folder):
    """Letters only."""
    from pretraining import write_vocabulary

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "ship", "car", "a", "photo", "of"]
    return write_vocabulary(folder, words)


def test_a_step_pairs_pictures_with_what_is_true_of_them(stream):
    images, tokens, fits, meant, kinds = stream[0]
    assert images.shape == (photographs.CLASSES * photographs.EACH, 3, SIZE, SIZE)
    assert tokens.shape == (photographs.CLASSES, CONTEXT)
    assert fits.shape == (len(images), len(tokens))
    own = torch.arange(len(images)) // photographs.EACH
    assert (fits[torch.arange(len(images)), own] == 1).all(), "each picture's own caption fits it"
    assert (meant[torch.arange(len(images)), own] == 1).all(), "and is meant for it"
    assert (meant <= fits).all()
    assert kinds.shape == (len(images),)
    assert stream.kinds == 4 > kinds.max()
    assert torch.equal(kinds[:, None] == kinds[own * photographs.EACH], meant[:, own] == 1), "said about one kind"
    assert (meant < fits).any(), "a cat of another set"
    ships = tokens.eq(stream.tokenizer.convert_tokens_to_ids("ship")).any(1)
    bright = images[:, 0].float().mean((1, 2)) > 120
    assert ships.any()
    assert (fits[~bright][:, ships] == 0).all(), "and no dark picture is of a ship"


def test_steps_repeat_and_differ(stream):
    assert all(torch.equal(*pair) for pair in zip(stream[3], stream[3], strict=True))
    assert not torch.equal(stream[3].images, stream[4].images)


def test_shares_cover_whole(stream):
    assert sum(SHARES.values()) == pytest.approx(100)
    by_set = [stream.weights[:2].sum(), stream.weights[2:].sum()]
    assert by_set[0] / by_set[1] == pytest.approx(SHARES["cifar10"] / SHARES["stl10"])


def test_what_looks_like_a_test_image_stays_out(monkeypatch):
    """Of two training images, one is a lighter copy of a test image."""
    noise = torch.randint(0, 256, (3, 3, 48, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8) // 2
    copied = torch.stack([noise[0] + 40, noise[2]])

    class Listed:
        labels, names = np.array([1, 0]), ("cat", "ship")

    parts = {"test": noise[:2], "pretraining": copied}
    monkeypatch.setattr(photographs, "pictures", lambda name, split: (Listed, parts[split], fingerprints(parts[split])))
    for album in photographs.albums():
        assert torch.equal(album.images, copied[1:])
        assert album.labels.tolist() == [0]
