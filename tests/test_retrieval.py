"""Recall both ways against a plain loop, fair ties, and the two success rates of attacks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from robustclip.study.retrieval import attacked_recalls, captions_of, ranks, recalls
from torch import nn

from robustclip import models
from robustclip.attacks import PGD, FeaturePGD
from robustclip.attacks.base import Retriever
from robustclip.attacks.multimodal import CoAttack, SepAttack
from robustclip.attacks.text import BertAttack, TextAttack
from robustclip.component import component
from robustclip.data.sources import load_samples
from robustclip.study import retrieval
from robustclip.study.statistics import wilson


class PlainClip(nn.Module):
    """Features are what is given: the pixels of an image times 8 minus 4, and the numbers of a text."""

    logit_scale = torch.tensor(1.0)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) * 8 - 4

    def text_features(self, texts) -> torch.Tensor:
        return torch.tensor([[float(number) for number in text.split()] for text in texts])

    def remembered(self, key, compute):
        return compute()


@component
class Turn(TextAttack):
    """Negates every number of a text from the given place on."""

    first: int = 0

    def __call__(self, clip, prompts) -> list[str]:
        numbers = [text.split() for text in prompts]
        return [" ".join([*row[: self.first], *(str(-int(one)) for one in row[self.first :])]) for row in numbers]


def as_images(features) -> torch.Tensor:
    """Images whose features are these (n, 3) whole numbers from -4 to 4."""
    return (torch.as_tensor(features, dtype=torch.float32)[:, :, None, None] + 4) / 8


def as_texts(groups) -> list[list[str]]:
    return [[" ".join(str(int(number)) for number in feature) for feature in group] for group in groups]


@st.composite
def galleries(draw):
    """Few different features, so that scores tie often, and one to three captions per image."""
    n, values = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 4]))
    feature = st.tuples(*[st.integers(-values, values)] * 3)
    images = draw(st.lists(feature, min_size=n, max_size=n))
    texts = draw(st.lists(st.lists(feature, min_size=1, max_size=3), min_size=n, max_size=n))
    return images, texts


def found_first(scores: list[float], right: set[int], k: int) -> bool:
    """Whether a right answer is among the first k; Python's sort keeps the order of equal ones."""
    return bool(right & set(sorted(range(len(scores)), key=lambda place: -scores[place])[:k]))


@given(gallery=galleries(), k=st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_recall_is_that_of_a_plain_loop(gallery, k):
    """Ties, several captions, k larger than the set; whole numbers, so that no score is rounded."""
    images, texts = gallery
    captions = [(owner, text) for owner, group in enumerate(texts) for text in group]
    own = [{place for place, (owner, _) in enumerate(captions) if owner == row} for row in range(len(images))]
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    to_text = [found_first([dot(image, text) for _, text in captions], own[row], k) for row, image in enumerate(images)]
    to_image = [found_first([dot(image, text) for image in images], {owner}, k) for owner, text in captions]
    rows = recalls(PlainClip(), as_images(images), as_texts(texts), ks=[k]).to_dict("records")
    for row, direction, hits in zip(rows, ("image-to-text", "text-to-image"), (to_text, to_image), strict=True):
        estimate = wilson(sum(hits), len(hits))
        assert row == {
            "direction": direction, "k": k, "recall": estimate.value, "low": estimate.low, "high": estimate.high,
            "n": len(hits),
        }  # fmt: skip


@pytest.mark.parametrize("each", [1, 3])
def test_a_model_that_sees_nothing_gets_the_recall_of_a_draw_by_lot(each):
    """All scores are equal: image-to-text min(k, all) of the captions, text-to-image k of n images."""
    images, captions = as_images([[1, 1, 1]] * 12), as_texts([[[0, 1, 0]] * each] * 12)
    table = recalls(PlainClip(), images, captions, ks=(1, 3, 6, 36)).set_index(["direction", "k"])["recall"]
    for k in (1, 3, 6, 36):
        assert table["text-to-image", k] == pytest.approx(100 * min(k, 12) / 12)
        assert table["image-to-text", k] == pytest.approx(100 * math.ceil(min(k, 12 * each) / each) / 12)


def test_a_model_that_sees_everything_gets_100():
    features = torch.eye(3).long()
    table = recalls(PlainClip(), as_images(features), as_texts(features[:, None]))
    assert (table.recall == 100).all()
    assert list(table.columns) == ["direction", "k", "recall", "low", "high", "n"]
    assert table.k.tolist() == [1, 5, 10] * 2
    assert (table.n == 3).all()


def test_equal_captions_tie_exactly():
    """Two images with the same caption: image-to-text, each finds the copy that is listed first."""
    clip, generator = models.load(device="cpu"), torch.Generator().manual_seed(0)
    images = torch.rand(9, 3, 32, 32, generator=generator)
    captions = [["a red star"], ["a blue cup"], ["a red star"]] * 3
    first = ranks(clip, images, captions)["image-to-text"]
    with torch.no_grad():
        star, cup = (clip.encode_images(images) @ clip.text_features(["a red star", "a blue cup"]).T).T
    for row in range(9):
        own, other = (cup[row], star[row]) if row % 3 == 1 else (star[row], cup[row])
        before = [one for one in range(row) if captions[one] == captions[row]]
        others = [one for one in range(9) if captions[one] != captions[row]]
        assert first[row] == len(before) + len(others) * bool(other > own)


def test_batches_do_not_matter(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    images, texts = (
        torch.randint(-4, 5, (11, 3), generator=generator),
        torch.randint(-4, 5, (11, 2, 3), generator=generator),
    )
    attacks = {
        "image": FeaturePGD(eps=0.1, steps=2),
        "loss": PGD(eps=0.3, steps=2),
        "both": SepAttack(image=PGD(eps=0.1, steps=2), text=Turn()),
    }
    tables = []
    for size in (128, 4, 1):
        monkeypatch.setattr(retrieval, "BATCH", size)
        tables.append(attacked_recalls(PlainClip(), attacks, as_images(images), as_texts(texts)))
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


# --- attacks ----------------------------------------------------------------------------------------------------------


def test_both_success_rates_by_hand():
    """Five pairs; turning the last two numbers of the texts loses two hits of four at k = 1 and finds one."""
    images = [[0, 4, 0], [0, -4, 0], [4, 0, 0], [-4, 0, 0], [1, 0, 3]]
    texts = [[[0, 1, 0]], [[0, -1, 0]], [[1, 0, 0]], [[-1, 0, 0]], [[0, 1, -1]]]
    clip, pictures, captions = PlainClip(), as_images(images), as_texts(texts)
    before = ranks(clip, pictures, captions)["text-to-image"]
    assert (before < 1).tolist() == [True, True, True, True, False]
    table = attacked_recalls(clip, {"none": None, "text": Turn(first=1)}, pictures, captions, ks=[1])
    table = table.set_index(["attack", "direction"])
    row = table.loc["text", "text-to-image"]
    after = np.array([False, False, True, True, False])
    texts_after = [[0, -1, 0], [0, 1, 0], [1, 0, 0], [-1, 0, 0], [0, -1, 1]]
    scores = np.array(texts_after) @ np.array(images).T
    assert (scores.argmax(1) == np.arange(5)).tolist() == after.tolist()
    assert (row.recall, row["drop"], row.broken, row.n) == (40, 40, 50, 5)
    for direction in ("image-to-text", "text-to-image"):
        clean = table.loc["none", direction]
        assert (clean["drop"], clean.broken) == (0, 0)
        assert clean.recall == recalls(clip, pictures, captions, [1]).set_index("direction").recall[direction]


def test_lost_and_found_hits_count_apart():
    """One hit lost, one found: no drop, but half of the hits are broken; without any hit there is no share."""
    assert retrieval._success(np.array([True, True, False]), np.array([True, False, True])) == {"drop": 0, "broken": 50}
    assert math.isnan(retrieval._success(np.array([False]), np.array([True]))["broken"])


def test_the_retriever_is_recall_at_one():
    """Its accuracy on any images, and so what image attacks with labels lower."""
    clip, generator = PlainClip(), torch.Generator().manual_seed(3)
    images, texts = (torch.randint(-4, 5, shape, generator=generator) for shape in ((40, 3), (40, 3, 3)))
    texts[::2, 0] = images[::2]
    captions = [group[: 1 + row % 3] for row, group in enumerate(as_texts(texts))]
    scores = Retriever(clip, captions)(as_images(images))
    assert scores.shape == (40, 40)
    first = ranks(clip, as_images(images), captions)["image-to-text"] < 1
    assert (scores.argmax(1) == torch.arange(40)).tolist() == first.tolist()
    assert 3 < first.sum() < 20


def test_every_kind_of_attack_in_one_table():
    """On the embedded model and its captions; recall grows with k, attacks lower it, the image is what they change."""
    clip, samples = models.load(device="cpu"), load_samples("coco", n=32)
    captions = captions_of(samples)
    assert captions == [[caption] for caption in samples.captions]
    attacks = {
        "none": None,
        "feature": FeaturePGD(eps=8 / 255, steps=4),
        "loss": PGD(eps=8 / 255, steps=4),
        "text": BertAttack(),
        "both": CoAttack(eps=8 / 255, steps=4),
    }
    table = attacked_recalls(clip, attacks, samples.images, captions)
    assert table.attack.unique().tolist() == list(attacks)
    assert len(table) == 5 * 2 * 3
    recall = table.pivot(index=["attack", "direction"], columns="k", values="recall")
    assert (recall.diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
    for name in list(attacks)[1:]:
        assert (recall.loc[name].sum(axis=1) < recall.loc["none"].sum(axis=1)).all(), name
    clean = recalls(clip, samples.images, captions).pivot(index="direction", columns="k", values="recall")
    assert recall.loc["none"].equals(clean)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("captions", "ks", "message"),
    [
        (["1 0 0", "0 1 0"], [1], "captions must be 2 lists"),
        ([["1 0 0"]], [1], "captions must be 2 lists"),
        ([["1 0 0"], []], [1], "one text or more"),
        ([["1 0 0"], ["0 1 0"]], [0], "k=0 "),
        ([["1 0 0"], ["0 1 0"]], [1.5], "k=1.5 "),
        ([["1 0 0"], ["nan 1 0"]], [1], "NaN or infinity"),
    ],
)
def test_bad_input(captions, ks, message):
    with pytest.raises(ValueError, match=message):
        recalls(PlainClip(), as_images([[1, 0, 0], [0, 1, 0]]), captions, ks)


def test_captions_of_samples():
    samples = load_samples("coco", n=4)
    six = replace(samples, captions=tuple("abcdefgh"))
    assert captions_of(six) == [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]]
    with pytest.raises(ValueError, match="has no captions"):
        captions_of(load_samples("cifar10", n=4))
