"""Fine-tuned models of a scale: trained once, found again, described, and planned."""

import importlib
import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from robustclip import models
from robustclip.study import fine_tuned, plan_training, scale, training_facts
from robustclip.study.trained import FACTS, model_name
from robustclip.training.loop import CHECKPOINT, Run

module = importlib.import_module("robustclip.study.trained")  # the package has a function of this name
SMALL = """
source = "tinyworld"
reference_eps = "8/255"
images = 12
batch_size = 6
recompute_stale = false
[models]
clip = "tinyworld-clip"
[training]
pictures = 120
updates = 2
batch_size = 8
attack_steps = 1
[training.MMCoA]
rate = 1e-4
"""


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL)
    return scale(str(tmp_path / "small.toml"))


@pytest.fixture
def updates(monkeypatch):
    """Every update that is really computed leaves a mark here."""
    marks, update = [], Run.update
    monkeypatch.setattr(Run, "update", lambda run: (marks.append(run.done), update(run))[1])
    return marks


def test_names():
    assert model_name("MMCoA", "imagenet") == "MMCoA/imagenet"
    assert model_name("MMCoA", "imagenet", 5) == "MMCoA/imagenet-5"


def test_models_are_trained_once_and_described(small, tmp_path, updates):
    found = fine_tuned(small, ["TeCoA", "FT-standard"], "cifar10", [None, 3], store=tmp_path, device="cpu")
    assert list(found) == ["TeCoA/cifar10", "FT-standard/cifar10", "TeCoA/cifar10-3", "FT-standard/cifar10-3"]
    assert len(set(found.values())) == 4
    assert len(updates) == 8
    begin = time.perf_counter()
    assert fine_tuned(small, ["TeCoA", "FT-standard"], "cifar10", [None, 3], store=tmp_path, device="cpu") == found
    assert time.perf_counter() - begin < 2
    assert len(updates) == 8
    facts = training_facts(found.values())
    assert facts["model"].tolist() == list(found)
    for (_, fact), folder in zip(facts.iterrows(), found.values(), strict=True):
        clip = models.load(folder, device="cpu")
        assert fact["checkpoint"] == clip.digest != fact["base"]
        assert (fact["updates"], fact["batch_size"], fact["pictures"]) == (2, 8, 16)
        assert len(fact["losses"]) == 2
        assert fact["forward"] == fact["backward"] == 16 * (2 if "TeCoA" in fact["model"] else 1)
        assert 0 < fact["seconds"] <= fact["wall"] + 0.1
        assert not (Path(folder) / CHECKPOINT).exists()
    assert facts["per_epoch"].tolist() == [120, 120, 30, 30]
    assert facts["base"].unique().tolist() == [models.load(device="cpu").digest]


def test_settings_of_the_scale_reach_the_recipes(small, tmp_path, updates):
    """The scale's table, then the recipe's own one, then what the call says; another seed is another model."""
    recipe = small.recipe("MMCoA", seed=2, rate=3e-5)
    assert (recipe.rate, recipe.updates, recipe.seed, recipe.eps) == (3e-5, 2, 2, 8 / 255)
    assert small.recipe("MMCoA").rate == 1e-4
    assert small.recipe("TeCoA").rate != 1e-4
    folders = [
        fine_tuned(small, ["FT-standard"], "cifar10", seed=seed, store=tmp_path, device="cpu") for seed in (0, 1)
    ]
    assert folders[0] != folders[1]
    with pytest.raises(ValueError, match="does not fit TeCoA"):
        small.recipe("TeCoA", speed=3)


@pytest.mark.parametrize("recompute", [False, True])
def test_new_code_trains_anew_only_where_the_scale_says_so(small, tmp_path, updates, monkeypatch, recompute):
    small = replace(small, recompute_stale=recompute)
    first = fine_tuned(small, ["FT-standard"], "cifar10", store=tmp_path, device="cpu")
    monkeypatch.setattr(module, "code_digest", lambda: "another")
    second = fine_tuned(small, ["FT-standard"], "cifar10", store=tmp_path, device="cpu")
    assert (first != second) == recompute
    assert len(updates) == (4 if recompute else 2)


def test_an_interrupted_training_goes_on(small, tmp_path, updates, monkeypatch):
    train = module.train
    with monkeypatch.context() as patch:
        patch.setattr(module, "train", lambda *a, **k: train(*a, **k, every=1))
        patch.setattr(Run, "update", lambda run, update=Run.update: update(run) if not run.done else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fine_tuned(small, ["FT-standard"], "cifar10", store=tmp_path, device="cpu")
    assert updates == [0]
    found = fine_tuned(small, ["FT-standard"], "cifar10", store=tmp_path, device="cpu")["FT-standard/cifar10"]
    assert updates == [0, 1]
    straight = fine_tuned(small, ["FT-standard"], "cifar10", store=tmp_path / "other", device="cpu")
    assert models.load(found, device="cpu").digest == models.load(*straight.values(), device="cpu").digest


def _train(path, store, results):
    torch.set_num_threads(1)
    begin = time.time()
    update, marks = Run.update, []
    Run.update = lambda run: (marks.append(run.done), update(run))[1]
    found = fine_tuned(scale(path), ["FT-standard"], "cifar10", store=store, device="cpu")
    results.put((found["FT-standard/cifar10"], len(marks), begin))


def test_two_processes_that_ask_at_once_train_once(small, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    arguments = (str(tmp_path / "small.toml"), tmp_path / "runs", results)
    both = [context.Process(target=_train, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    (first, one, _), (second, two, _) = results.get(), results.get()
    for process in both:
        process.join()
    assert first == second
    assert sorted([one, two]) == [0, 2]
    assert json.loads((Path(first) / FACTS).read_text())["updates"] == 2


def test_stages_are_kept(small, tmp_path, updates):
    folder = Path(*fine_tuned(small, ["FT-standard"], "cifar10", store=tmp_path, device="cpu", stages=2).values())
    stage = models.load(folder / "stage-1", device="cpu")
    assert stage.digest != models.load(folder, device="cpu").digest
    fine_tuned(small, ["FT-standard"], "cifar10", store=tmp_path, device="cpu", stages=2)
    assert len(updates) == 2


def test_plans_count_the_passes_of_an_epoch(small):
    costs = plan_training(small, ["TeCoA", "MMCoA", "FT-standard", "AdvPT"], ["cifar10", "dtd"]).set_index(
        ["role", "recipe"]
    )
    assert costs.loc[("cifar10", "TeCoA"), ["pictures", "forward", "backward"]].tolist() == [120, 240, 240]
    assert costs.loc[("cifar10", "MMCoA"), ["forward", "backward"]].tolist() == [360, 360]
    assert costs.loc[("dtd", "FT-standard"), ["forward", "backward"]].tolist() == [120, 120]
    assert costs.loc[("dtd", "AdvPT"), ["forward", "backward"]].tolist() == [480, 240]
    assert costs["seconds"].isna().all()
    few = plan_training(small, ["TeCoA"], ["cifar10"], shots=5)
    assert few[["pictures", "updates"]].to_numpy().tolist() == [[50, 2]]
    paper = plan_training("paper", ["TeCoA"], ["imagenet"]).iloc[0]
    assert paper["pictures"] == 1_281_167
    assert paper["seconds"] == pytest.approx(1_281_167 * 6 / 1100)
    assert paper["updates"] == -(-10 * 1_281_167 // 256)


def test_a_scale_that_does_not_count_its_pictures_says_so():
    with pytest.raises(ValueError, match=r"scale 'photo' does not say how many pictures cifar10 has; give shots"):
        plan_training("photo", ["TeCoA"], ["cifar10"])
    assert plan_training("photo", ["TeCoA"], ["cifar10"], shots=2)["pictures"].tolist() == [20]
