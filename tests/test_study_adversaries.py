"""Prompts and both attacked in a grid, and audits whose flags stay with the results."""

from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch

from robustclip import models
from robustclip.attacks import PGD, SepAttack
from robustclip.attacks.base import Target, predictions
from robustclip.attacks.text import TextAttack
from robustclip.audit import CHECKS
from robustclip.component import component
from robustclip.data.sources import load_samples
from robustclip.defenses.base import as_defense
from robustclip.models import ZeroShotClassifier
from robustclip.study import Store, audit_cell, evaluate, grid, outcomes, over_seeds
from study_fakes import Darken, FakeClip, Step


@component
class Rotate(TextAttack):
    """Every class gets the prompt of the next one; counts how often it is asked."""

    calls = 0

    def __call__(self, clip, prompts):
        type(self).calls += 1
        return [*prompts[1:], prompts[0]]


@component
class Peek(TextAttack):
    """Rotates the prompts if the held-out images it asked for have as many labels as images, else does nothing."""

    images: int = 7

    def __call__(self, clip, prompts, images, labels):
        assert images.shape == (self.images, 3, 32, 32)
        train = load_samples("cifar10", split="train", n=self.images)
        assert torch.equal(images, train.images)
        assert torch.equal(labels, train.labels)
        return [*prompts[1:], prompts[0]]


@pytest.fixture(scope="module")
def clip():
    return models.load(device="cpu")


def cells(clip, attacks, **options):
    return grid("quick", {"clip": clip}, **({"roles": ["cifar10"], "n": 12} | options), attacks=attacks)


def predicted(classifier, images):
    with torch.no_grad():
        return classifier(images).argmax(1)


@pytest.mark.parametrize("attack", [Rotate(), Peek()], ids=repr)
def test_attacked_prompts_classify_clean_images(tmp_path, attack):
    row = evaluate(cells(FakeClip(), {"text": attack}), tmp_path).iloc[0]
    samples = load_samples("cifar10", n=12)
    rotated = [*samples.prompts[1:], samples.prompts[0]]
    expected = predicted(ZeroShotClassifier(FakeClip(), rotated), samples.images) == samples.labels
    assert outcomes(row, tmp_path).tolist() == expected.tolist()
    assert row["eps"] == 0
    assert row["flags"] == "", "no image was attacked"
    assert (row["distinct"], row["prompts"]) == (10, 10)


@component
class Merge(TextAttack):
    """All texts but the first become one."""

    def __call__(self, clip, prompts):
        return [prompts[0], *["same"] * (len(prompts) - 1)]


def test_distinct_texts_are_counted_beside_every_text_number(tmp_path):
    """Also where captions are attacked, and as a mean over seeds; what no text attack saw has no count."""
    frame = evaluate(cells(FakeClip(), {"clean": None, "merged": Merge(), "image": Step(eps=0.01)}), tmp_path)
    assert frame["distinct"].fillna(0).tolist() == [0, 2, 0]
    assert frame["prompts"].fillna(0).tolist() == [0, 10, 0]
    merged = frame[frame["attack"] == "merged"]
    several = pd.concat([merged, merged.assign(seed=1, distinct=4)])
    assert over_seeds(several, tmp_path)["distinct"].item() == 3

    options = {"roles": ["coco"], "task": "retrieve", "n": 6}
    retrieved = evaluate(cells(models.load(device="cpu"), {"merged": Merge(), "clean": None}, **options), tmp_path)
    assert retrieved.drop_duplicates("attack")["distinct"].fillna(0).tolist() == [2, 0]
    assert retrieved["prompts"].iloc[0] == len(set(load_samples("coco", n=6).captions))


def test_prompts_are_attacked_once_for_all_batches(tmp_path):
    Rotate.calls = 0
    whole = evaluate(cells(FakeClip(), {"text": Rotate()}), tmp_path / "a").iloc[0]
    parts = evaluate(cells(FakeClip(), {"text": Rotate()}), tmp_path / "b", batch_size=5).iloc[0]
    assert Rotate.calls == 2
    assert outcomes(whole, tmp_path / "a").tolist() == outcomes(parts, tmp_path / "b").tolist()


@pytest.mark.parametrize("reading", ["released", "attacked", "worst"])
@pytest.mark.parametrize("attacker", ["blind", "aware"])
def test_an_image_stands_if_it_stands_in_every_pair(tmp_path, clip, reading, attacker):
    """By hand: the defense stands before the scoring classifier, and before the attacked one if the attacker knows."""
    attack, defense = SepAttack(image=PGD(eps=2 / 255, steps=2), text=Rotate(), reading=reading), Darken(factor=0.8)
    options = {"defenses": {"dark": defense}, "attackers": [attacker]}
    row = evaluate(cells(clip, {"both": attack}, **options), tmp_path, batch_size=6).iloc[0]
    samples = load_samples("cifar10", n=12)

    def defended(classes):
        return as_defense(defense)(ZeroShotClassifier(clip, classes))

    target = Target(clip, samples.classes, as_defense(defense) if attacker == "aware" else None)
    pairs = attack.pairs(target, samples.images, samples.labels)
    stands = [predictions(pair, samples.labels, defended) == samples.labels for pair in pairs]
    assert len(pairs) == (3 if reading == "worst" else 1)
    assert outcomes(row, tmp_path).tolist() == torch.stack(stands).all(0).tolist()
    assert row["eps"] == 2 / 255


def test_a_blind_attack_on_a_defense_is_flagged_for_nothing(tmp_path):
    attacks, defenses = {"clean": None, "Step": Step()}, {"none": None, "dark": Darken()}
    rows = evaluate(cells(FakeClip(), attacks, defenses=defenses, attackers=["blind", "aware"]), tmp_path)
    flags = {(row["attack"], row["defense"], row["attacker"]): row["flags"] for _, row in rows.iterrows()}
    assert flags == {
        ("clean", "none", "none"): "", ("clean", "dark", "none"): "",
        ("Step", "none", "blind"): "not audited", ("Step", "none", "aware"): "not audited",
        ("Step", "dark", "blind"): "blind; not audited", ("Step", "dark", "aware"): "not audited",
    }  # fmt: skip


@component
class Hidden:
    """A defense without gradients: rounded pixels."""

    levels: int = 8

    def __call__(self, classifier):
        return lambda images: classifier((images * self.levels).round() / self.levels)


@pytest.mark.slow
def test_flags_are_stored_with_the_result(tmp_path, clip):
    """The audit catches rounding; a later call reads the flags, and only a larger audit replaces them."""
    chosen = cells(clip, {"PGD": PGD(eps=2 / 255, steps=3)}, defenses={"rounding": Hidden()}, attackers=["aware"])
    assert evaluate(chosen, tmp_path)["flags"].tolist() == ["not audited"]
    first = evaluate(chosen, tmp_path, audit=2).iloc[0]
    assert "gradients" in first["flags"].split("; ")
    (record,) = Store(tmp_path).records("quick")
    assert "; ".join(record["flags"]) == first["flags"]
    assert record["audited"] == 2
    assert evaluate(chosen, tmp_path).iloc[0]["flags"] == first["flags"]
    evaluate(chosen, tmp_path, audit=1)
    assert Store(tmp_path).records("quick") == [record]
    evaluate(chosen, tmp_path, audit=3)
    (record,) = Store(tmp_path).records("quick")
    assert record["audited"] == 3


def test_an_audit_of_one_cell(tmp_path, clip):
    (cell,) = cells(clip, {"PGD": PGD(eps=2 / 255, steps=3)}, n=3)
    found = audit_cell(cell, tmp_path, device="cpu")
    assert [finding.check for finding in found.findings] == list(CHECKS)
    (record,) = Store(tmp_path).records("quick")
    assert record["flags"] == list(found.flags)
    assert record["audited"] == 3


def test_there_is_nothing_to_audit_without_an_attack_on_images(tmp_path):
    clean, text = cells(FakeClip(), {"clean": None, "text": Rotate()})
    for cell in (clean, text):
        with pytest.raises(ValueError, match="changes no images; audit an attack on images"):
            audit_cell(cell, tmp_path)
    assert evaluate([clean, text], tmp_path, audit=5)["flags"].tolist() == ["", ""]


def test_audit_must_be_a_count(tmp_path):
    with pytest.raises(ValueError, match=r"audit=-1 is not allowed"):
        evaluate(cells(FakeClip(), {"clean": None}), tmp_path, audit=-1)


def test_an_audit_beside_a_plain_run_keeps_its_flags(tmp_path):
    chosen = cells(FakeClip(), {"PGD": PGD(eps=2 / 255, steps=2)}, n=4)
    for turn in range(5):
        with ThreadPoolExecutor(2) as pool:
            audited = pool.submit(evaluate, chosen, tmp_path / str(turn), "cpu", None, 4)
            plain = pool.submit(evaluate, chosen, tmp_path / str(turn), "cpu", 1)
            assert audited.result()["accuracy"].equals(plain.result()["accuracy"])
        (record,) = Store(tmp_path / str(turn)).records("quick")
        assert record["audited"] == 4
