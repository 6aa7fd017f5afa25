"""Retrieval: ranks against a plain loop, fair ties, and recall as cells with keys, resume, staleness and export."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robustclip import models
from robustclip.attacks.base import Retriever
from robustclip.attacks.gradient import PGD, FeaturePGD
from robustclip.attacks.multimodal import CoAttack, SepAttack
from robustclip.attacks.text import BertAttack, TextAttack
from robustclip.component import component
from robustclip.data.sources import load_samples
from robustclip.study import evaluate, export, grid, outcomes, reference, tasks
from robustclip.study.statistics import wilson
from robustclip.study.tasks import FIRST, captions_of, ranks

WAYS = ("image-to-text", "text-to-image")
METRICS = [f"R@{k} {way}" for way in WAYS for k in FIRST]


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


@given(gallery=galleries())
@settings(max_examples=150, deadline=None)
def test_ranks_are_those_of_a_plain_loop(gallery):
    """Ties, several captions, every k up to more than the set; whole numbers, so that no score is rounded."""
    images, texts = gallery
    captions = [(owner, text) for owner, group in enumerate(texts) for text in group]
    own = [{place for place, (owner, _) in enumerate(captions) if owner == row} for row in range(len(images))]
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    found = ranks(PlainClip(), as_images(images), as_texts(texts))
    for k in range(1, 13):
        to_text = [
            found_first([dot(image, text) for _, text in captions], own[row], k) for row, image in enumerate(images)
        ]
        to_image = [found_first([dot(image, text) for image in images], {owner}, k) for owner, text in captions]
        assert (found["image-to-text"] < k).tolist() == to_text
        assert (found["text-to-image"] < k).tolist() == to_image


@pytest.mark.parametrize("each", [1, 3])
def test_a_model_that_sees_nothing_gets_the_recall_of_a_draw_by_lot(each):
    """All scores are equal: image-to-text min(k, all) of the captions, text-to-image k of n images."""
    images, captions = as_images([[1, 1, 1]] * 12), as_texts([[[0, 1, 0]] * each] * 12)
    found = ranks(PlainClip(), images, captions)
    for k in (1, 3, 6, 36):
        assert (found["text-to-image"] < k).mean() == pytest.approx(min(k, 12) / 12)
        assert (found["image-to-text"] < k).mean() == pytest.approx(math.ceil(min(k, 12 * each) / each) / 12)


def test_a_model_that_sees_everything_ranks_the_right_one_first():
    features = torch.eye(3).long()
    found = ranks(PlainClip(), as_images(features), as_texts(features[:, None]))
    assert {way: places.tolist() for way, places in found.items()} == {way: [0, 0, 0] for way in WAYS}


def test_equal_captions_tie_exactly():
    """Images with the same caption: each finds the copy that is listed first."""
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
    images, texts = (torch.randint(-4, 5, shape, generator=generator) for shape in ((11, 3), (11, 2, 3)))
    attack = SepAttack(image=PGD(eps=0.1, steps=2), text=Turn())
    found = []
    for size in (128, 4, 1):
        monkeypatch.setattr(tasks, "BATCH", size)
        attacked = attack.on_captions(PlainClip(), as_images(images), as_texts(texts))
        found.append({way: places.tolist() for way, places in ranks(PlainClip(), *attacked).items()})
    assert found[0] == found[1] == found[2]


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


# --- cells ------------------------------------------------------------------------------------------------------------


def cells(attacks=None, n=24, **options):
    """Retrieval on the embedded model and its captions."""
    attacks = attacks or {"clean": None, "both": CoAttack(eps=8 / 255, steps=2)}
    return grid("quick", roles=["coco"], attacks=attacks, n=n, task="retrieve", **options)


def by_hand(attack=None, n=24):
    """Ranks without the engine."""
    clip, samples = models.load(device="cpu"), load_samples("coco", n=n)
    images, captions = samples.images, captions_of(samples)
    return ranks(clip, *(attack.on_captions(clip, images, captions) if attack else (images, captions)))


def test_recalls_are_those_computed_by_hand(tmp_path):
    places = {"clean": by_hand(), "both": by_hand(CoAttack(eps=8 / 255, steps=2))}
    results = evaluate(cells(), tmp_path)
    assert results["metric"].tolist() == 2 * METRICS
    assert set(results["task"]) == {"retrieve"}
    for _, row in results.iterrows():
        place, way = row["metric"].removeprefix("R@").split(" ")
        expected = places[row["attack"]][way] < int(place)
        assert outcomes(row, tmp_path).tolist() == expected.tolist()
        assert (row["accuracy"], row["low"], row["high"]) == wilson(int(expected.sum()), len(expected))
        assert row["n"] == len(expected) == 24
    assert results["accuracy"].nunique() > 4


def test_recall_grows_with_k_and_falls_under_every_kind_of_attack(tmp_path):
    attacks = {
        "clean": None,
        "feature": FeaturePGD(eps=8 / 255, steps=4),
        "loss": PGD(eps=8 / 255, steps=4),
        "text": BertAttack(),
        "both": CoAttack(eps=8 / 255, steps=4),
    }
    results = evaluate(cells(attacks, n=32), tmp_path)
    recall = results.pivot(index="attack", columns="metric", values="accuracy")
    for way in WAYS:
        assert (recall[[f"R@{k} {way}" for k in FIRST]].diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
        for name in list(attacks)[1:]:
            ours, clean = (recall.loc[one, [f"R@{k} {way}" for k in FIRST]].sum() for one in (name, "clean"))
            assert ours < clean, (name, way)


def test_several_captions_give_more_queries_in_one_direction(tmp_path, monkeypatch):
    def three_each(role, source, n=None, **_):
        samples = load_samples(role, source, n=n)
        return replace(samples, captions=tuple(text for text in samples.captions for _ in range(3)))

    monkeypatch.setattr("robustclip.study.bench.load_samples", three_each)
    results = evaluate(cells({"clean": None}, n=8), tmp_path).set_index("metric")
    assert results["n"][METRICS].tolist() == [8] * 3 + [24] * 3


def test_the_key_names_everything_that_a_recall_depends_on(tmp_path):
    """Other images, attacks, tasks: other cells; other names: the same."""
    one = {"both": CoAttack(eps=8 / 255, steps=2)}
    variants = [cells(one), cells(one, n=25), cells(one, seeds=[1]), cells(one, eps=["4/255"]),
                cells({"both": CoAttack(eps=8 / 255, steps=2, weight=1)}), cells({"both": None})]  # fmt: skip
    keys = [evaluate(variant, tmp_path)["key"].unique().item() for variant in variants]
    assert len(set(keys)) == len(variants)
    renamed = evaluate(cells({"another name": CoAttack(eps=8 / 255, steps=2)}), tmp_path)
    assert renamed["key"].unique().item() == keys[0]
    assert set(renamed["origin"]) == {"stored"}


def counting(monkeypatch) -> list:
    """How many images each call of the engine's `ranks` is given."""
    asked, real = [], tasks.ranks
    monkeypatch.setattr(
        tasks, "ranks", lambda clip, images, captions: asked.append(len(images)) or real(clip, images, captions)
    )
    return asked


def test_what_is_finished_is_not_measured_again(tmp_path, monkeypatch):
    asked = counting(monkeypatch)
    first = evaluate(cells({"clean": None}), tmp_path)
    assert asked == [24]  # all at once, however small the batches
    whole = evaluate(cells(), tmp_path, batch_size=5)
    assert asked == [24, 24]
    assert whole["origin"].tolist() == ["stored"] * 6 + ["measured"] * 6
    again = evaluate(cells(), tmp_path)
    assert asked == [24, 24]
    columns = ["metric", "accuracy", "key", "seconds"]
    pd.testing.assert_frame_equal(again[columns], whole[columns])
    pd.testing.assert_frame_equal(first[columns], whole[:6][columns])


def test_recalls_of_other_code_are_stale_and_measured_again_where_the_scale_says_so(tmp_path, monkeypatch):
    asked = counting(monkeypatch)
    (cell,) = cells({"clean": None}, n=12)
    evaluate([cell], tmp_path)
    (path,) = (tmp_path / "quick").glob("*.json")
    record = json.loads(path.read_text(encoding="utf8"))
    code = record["provenance"]
    evaluate([cell], tmp_path)
    assert len(asked) == 1
    from robustclip.study.bench import Bench

    assert any("Retrieve" in name for name in code)
    monkeypatch.setattr(Bench, "provenance", lambda self, cell, task: code | {next(iter(code)): "0" * 16})
    kept = replace(cell, scale=replace(cell.scale, recompute_stale=False))
    assert evaluate([kept], tmp_path)["stale"].all()
    assert len(asked) == 1
    assert not evaluate([cell], tmp_path)["stale"].any()
    assert len(asked) == 2


def test_recalls_travel_with_every_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTCLIP_RESULTS", str(tmp_path / "results"))
    results = evaluate(cells(n=12), tmp_path / "runs")
    (tmp_path / "results").mkdir()
    export("quick", [tmp_path / "runs"], tmp_path / "results")
    asked = counting(monkeypatch)
    shipped = evaluate(cells(n=12), tmp_path / "empty")
    assert not asked
    assert set(shipped["origin"]) == {"shipped"}
    pd.testing.assert_frame_equal(results.drop(columns="origin"), shipped.drop(columns="origin"))
    for row in results.to_dict("records"):
        assert np.array_equal(outcomes(row, tmp_path / "empty"), outcomes(row, tmp_path / "runs"))
    place = ["attack", "metric"]
    pd.testing.assert_series_equal(
        reference("quick").set_index(place)["accuracy"].sort_index(), results.set_index(place)["accuracy"].sort_index()
    )


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (["1 0 0", "0 1 0"], "captions must be 2 lists"),
        ([["1 0 0"]], "captions must be 2 lists"),
        ([["1 0 0"], []], "one text or more"),
        ([["1 0 0"], ["nan 1 0"]], "NaN or infinity"),
    ],
)
def test_bad_input(captions, message):
    with pytest.raises(ValueError, match=message):
        ranks(PlainClip(), as_images([[1, 0, 0], [0, 1, 0]]), captions)


def test_captions_of_samples():
    samples = load_samples("coco", n=4)
    six = replace(samples, captions=tuple("abcdefgh"))
    assert captions_of(six) == [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]]
    with pytest.raises(ValueError, match="has no captions"):
        captions_of(load_samples("cifar10", n=4))
