"""Hybrids: which candidates there are, on which images they are compared, and which one is chosen."""

import numpy as np
import pytest
import torch

from robustclip.data.sources import load_samples
from robustclip.study import Soup, grid, hybrids, scale
from study_fakes import Darken, FakeClip, Step


def right(*percent: int) -> np.ndarray:
    """Outcomes of ten images, so many percent of them right."""
    return np.arange(10) < percent[0] / 10


def found(**percent: tuple[int, int]) -> hybrids.Right:
    """Outcomes on two roles of a host behind a defense, by "host_defense"."""
    return {(*name.split("_"), role): right(value) for name, values in percent.items()
            for role, value in zip(("cifar10", "dtd"), values, strict=True)}  # fmt: skip


CLEAN = found(CLIP_none=(90, 70), TeCoA_none=(50, 60), half_none=(80, 70), half_TTE=(90, 60), Soup_none=(70, 80))


def one_cell(attacks, defense=None, n=12):
    defenses = {"own" if defense else "none": defense}
    (cell,) = grid("quick", {"fake": FakeClip()}, ["cifar10"], attacks, defenses, ("aware",), n=n)
    return cell


def test_the_hosts_are_clip_the_recipes_half_way_models_and_one_soup():
    for name in ("quick", "full"):
        there, plan = scale(name), hybrids.plan(scale(name))
        models = hybrids.hosts(there, device="cpu")
        first = [hybrids.GROUND_UP] * (name == "full")
        assert list(models) == ["CLIP", *plan.recipes, *(" ".join(part) for part in plan.parts), "Soup", *first]
        assert models["CLIP"] == there.model("clip")
        assert models["TeCoA half"] == models["TeCoA"].between(0.5)
        assert models["Soup"] == Soup("Soup", tuple(models[one] for one in plan.recipes))
        assert models["TeCoA"].recipe.seed == 0 != hybrids.hosts(there, seed=1)["TeCoA"].recipe.seed
        assert len({getattr(model, "digest", model) for model in models.values()}) == len(models)
        assert all(there.defense(one) for one in plan.defenses if one != "none")


def test_the_quick_plan_is_part_of_the_whole_one():
    quick, whole = hybrids.plan(scale("quick")), hybrids.plan(scale("photo"))
    for part, all_ in zip(quick, whole, strict=True):
        assert part <= all_ if isinstance(part, int) else set(part) <= set(all_)


def test_images_are_those_of_the_validation_part():
    bench, cell = hybrids.Held("cpu"), one_cell(["clean"])
    samples = bench.samples(cell)
    assert torch.equal(samples.images, load_samples("cifar10", split="validation", n=12).images)
    assert not torch.equal(samples.images, load_samples("cifar10", split="test", n=12).images)
    assert bench.samples(cell) is samples


def test_answers_are_those_of_the_defended_model_to_attacked_images():
    cell, defense = one_cell({"step": Step()}, Darken()), Darken()
    samples, clip = load_samples("cifar10", split="validation", n=12), FakeClip()
    texts = clip.encode_texts(samples.prompts)

    def classifier(images):
        return 20 * clip.encode_images(images) @ texts.T

    attacked = Step()(defense(classifier), samples.images, samples.labels)
    expected = (defense(classifier)(attacked).argmax(1) == samples.labels).numpy()
    answers = hybrids.answered(cell, hybrids.Held("cpu"))["right"]
    assert answers.tolist() == expected.astype(int).tolist()


def test_answers_are_stored_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTCLIP_RUNS", str(tmp_path))
    bench, cell = hybrids.Held("cpu"), one_cell(["clean"])
    assert hybrids.validated(cell, bench, only_known=True) is None
    first = hybrids.validated(cell, bench)
    assert first.dtype == bool
    assert first.shape == (12,)
    monkeypatch.setattr(hybrids, "load_samples", None)
    assert (hybrids.validated(cell, hybrids.Held("cpu"), only_known=True) == first).all()
    for other in (one_cell(["clean"], n=11), one_cell(["clean"], Darken()), one_cell({"step": Step()})):
        assert hybrids.validated(other, bench, only_known=True) is None


def test_what_cannot_be_named_without_its_data_is_not_known(monkeypatch):
    monkeypatch.delenv("ROBUSTCLIP_DATA", raising=False)
    monkeypatch.setenv("ROBUSTCLIP_FRESH", "1")
    model = hybrids.hosts(scale("photo"), device="cpu")["TeCoA"]
    (cell,) = grid("photo", {"TeCoA": model}, ["cifar10"], ["clean"], n=4)
    assert hybrids.validated(cell, hybrids.Held("cpu")) is None


def test_means_give_every_role_the_same_weight():
    parts = {("CLIP", "none", "cifar10"): right(100), ("CLIP", "none", "dtd"): np.zeros(30, bool)}
    assert hybrids.mean(parts, ("CLIP", "none")) == pytest.approx(50)
    assert hybrids.mean(parts, ("CLIP", "TTE")) is None


def test_the_price_is_in_points_below_clip_and_its_end_belongs_to_it():
    assert hybrids.mean(CLEAN, ("CLIP", "none")) == pytest.approx(80)
    cheap = [("CLIP", "none"), ("half", "none"), ("half", "TTE"), ("Soup", "none")]
    assert hybrids.within_price(CLEAN, 5.0) == cheap
    assert hybrids.within_price(CLEAN, 4.9) == cheap[:1]
    assert hybrids.within_price(CLEAN, 25.0) == [*cheap[:1], ("TeCoA", "none"), *cheap[1:]]


@pytest.mark.parametrize(
    ("aware", "best"),
    [
        ({"half_none": (20, 10), "half_TTE": (30, 20), "Soup_none": (40, 0)}, ("half", "TTE")),
        ({"half_none": (20, 10), "half_TTE": (10, 20), "Soup_none": (30, 0)}, ("half", "none")),  # of equals the first
        ({"half_none": (20, 10), "half_TTE": (10, 20), "TeCoA_none": (30, 10)}, ("TeCoA", "none")),
        ({"TeCoA_none": (20, 10), "half_TTE": (10, 20)}, ("half", "TTE")),  # of equals the better on clean images
    ],
)
def test_the_best_is_the_one_that_keeps_most(aware, best):
    known = found(**aware)
    candidates = list(dict.fromkeys(key[:2] for key in known))
    assert hybrids.best_of(CLEAN, known, candidates) == best
    assert hybrids.best_of(CLEAN, known, [*candidates, ("FARE", "TTE")]) is None
    assert hybrids.best_of(CLEAN, known, []) is None
