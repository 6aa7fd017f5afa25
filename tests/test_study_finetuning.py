"""Answers of fine-tuned models, by model, attack, set and training, and their differences."""

import numpy as np
import pytest

from robustclip.study import scale
from robustclip.study.finetuning import gap, known_facts, mean, seeds_of, tuned

FOUND = {
    ("CLIP", "clean", "a"): {0: np.array([1, 1, 1, 0])},
    ("CLIP", "clean", "b"): {0: np.array([1, 0])},
    ("TeCoA", "clean", "a"): {0: np.array([1, 0, 0, 0]), 1: np.array([1, 1, 0, 0]), 2: np.array([0, 0, 0, 0])},
    ("TeCoA", "clean", "b"): {0: np.array([1, 0]), 1: np.array([0, 0])},
    ("FARE", "clean", "a"): {1: np.array([1, 1])},
}


def test_a_mean_is_over_sets_alike_and_over_trainings_known_on_all():
    assert seeds_of(FOUND, "TeCoA", "clean", ["a", "b"]) == {0, 1}
    assert mean(FOUND, "TeCoA", "clean", ["a", "b"]).value == pytest.approx(100 * (3 / 8 + 1 / 4) / 2)
    assert mean(FOUND, "FARE", "clean", ["a", "b"]) is None
    assert mean(FOUND, "FARE", "clean", []) is None


def test_a_difference_pairs_trainings_and_first_images():
    assert gap(FOUND, ("FARE", "clean"), ("TeCoA", "clean"), ["a"]).value == 0, "training 1, two images"
    assert gap(FOUND, ("FARE", "clean"), ("TeCoA", "clean"), ["b"]) is None


def test_what_was_trained_once_meets_every_training():
    found = gap(FOUND, ("CLIP", "clean"), ("TeCoA", "clean"), ["a"])
    assert found.value == pytest.approx(100 * (9 - 3) / 12)
    alone = gap(FOUND, ("FARE", "clean"), ("TeCoA", "clean"), ["a"], alone=("FARE",))
    assert alone.value == pytest.approx(100 * (2 - 1) / 2), "all three trainings, two images"


def test_facts_of_a_training_that_nobody_did_are_not_known(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTCLIP_RUNS", str(tmp_path))
    monkeypatch.setenv("ROBUSTCLIP_FRESH", "1")
    (model,) = tuned(scale("quick"), ["TeCoA"], seed=17).values()
    assert known_facts(model) == {}
