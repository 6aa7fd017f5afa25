"""Nothing makes a tensor without saying where: what runs on a CPU here would run on a GPU.

Tensors that are made without a device land on the device "meta", while all others are on the CPU: where the two meet,
or a number is asked of the former, torch raises an error or computes something else. So no GPU is needed to find what
one would complain of, but for what comes from numpy.
"""

import copy
import inspect
import pkgutil
from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch

import elsewhere
import robustclip
from elsewhere import ON_THE_CPU, Elsewhere
from robustclip import models
from robustclip.attacks import APGD, FGSM, PGD, Aware, Fast, FromTorchattacks, Square
from robustclip.attacks.aware import AIMS, JUDGED_FROM
from robustclip.attacks.base import Adversary, OwnAttack, Target, predictions
from robustclip.attacks.from_textattack import FromTextAttack, ReferenceBertAttack
from robustclip.audit import audit
from robustclip.data.sources import load_samples
from robustclip.defenses import broken, clipure
from robustclip.defenses.base import Defense, OwnDefense
from robustclip.models import Clip, ZeroShotClassifier
from robustclip.study import evaluate, grid
from robustclip.study.named import DEFENSES, IMAGES, STEPPED, TEXTS, named_attack, named_defense
from robustclip.study.tasks import TASK
from robustclip.training import Pictures, train
from robustclip.training.named import RECIPES
from robustclip.training.recipes import Recipe, WithoutText

EPS = 6 / 255
SOURCE = Path(robustclip.__file__).parent

BY_OTHERS = {  # attacks that are not run here, and why
    FromTextAttack: "TextAttack changes words on the CPU; `TextFeatures`, which it asks, is run here",
    ReferenceBertAttack: "as above; TextAttack moves the language model to a device of its choice",
}


@pytest.fixture(scope="module", autouse=True)
def nothing_remembered():
    """What other tests of this process have loaded is loaded again here."""
    clipure._read.cache_clear()


def same_elsewhere(work) -> None:
    """`work()` gives the same tensors, on the CPU, when tensors without a device are elsewhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with Elsewhere():
            found = work()
        torch.manual_seed(0)
        for one, other in zip(found, work(), strict=True):
            assert one.device.type == "cpu"
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# --- what there is to run ---------------------------------------------------------------------------------------------


@cache
def classes_of(kind: type) -> set[type]:
    """The classes of the package that are of a kind, can be made and are public."""
    for module in pkgutil.walk_packages([str(SOURCE)], "robustclip."):
        import_module(module.name)
    found, queue = set(), [kind]
    while queue:
        queue += (one := queue.pop()).__subclasses__()
        if one.__module__.startswith("robustclip.") and not inspect.isabstract(one):
            found.add(one)
    return found


def parts_of(component) -> set[type]:
    """The class of a component and of all that it is made of."""
    own = [getattr(component, entry.name) for entry in fields(component)] if is_dataclass(component) else []
    return {type(component)}.union(*map(parts_of, own)) if is_dataclass(component) else set()


def less(component, **limits: int):
    """The same component doing less: no amount of work above its limit, in its parts, too."""
    own = {entry.name: getattr(component, entry.name) for entry in fields(component) if entry.init}
    changed = {name: min(own[name], most) for name, most in limits.items() if name in own}
    changed |= {name: less(part, **limits) for name, part in own.items() if is_dataclass(part)}
    return replace(component, **changed)


STEPS = dict.fromkeys([*IMAGES, "PGD-2", "CW-2"], 2)
STEP_NAMES = [f"{name}-2{more}" for name in STEPPED for more in ("", ":last", ":target")]
BOTH_NAMES = [f"PGD-2+{name}:worst" for name in TEXTS if not TEXTS[name].images]
AIM_NAMES = [f"aware:{aim}" for aim, part in AIMS.items() if part is None]
ATTACKS = {name: less(named_attack(name, EPS, STEPS), queries=20)
           for name in (*IMAGES, *STEP_NAMES, *TEXTS, *BOTH_NAMES, *AIM_NAMES)}  # fmt: skip
ATTACKS |= {
    "in low precision": Fast(attack=PGD(eps=EPS, steps=2)),
    "several draws": PGD(eps=EPS, steps=2, draws=2, start="image", restarts=2, momentum=0.5),
    "Square in l2": Square(eps=1.0, queries=20, norm="l2"),
    "APGD in l2": APGD(eps=1.0, steps=3, norm="l2"),
    "FAB": FromTorchattacks(name="FAB", eps=EPS, settings={"steps": 2, "multi_targeted": True}),
    "forgetful": broken.ForgetfulPGD(eps=EPS, steps=2),
    "somebody's own": OwnAttack(attack=FGSM(eps=EPS)),
}
KNOWN = {"keep": 0.1, "reverse": 0.25, "cosine": 0.025}
LITTLE = {"steps": 1, "count": 2, "copies": 2, "texts": 3, "drift_draws": 1, "rounds": 1, "vectors": 1}
PLANTED = [kind for kind in classes_of(Defense) if kind.__module__ == broken.__name__]
PLANTED = {kind.__name__: kind(period=0.1) if kind is broken.Planted else kind() for kind in sorted(PLANTED, key=str)}
DEFENDED = {name: less(named_defense(name, 1 / 255, KNOWN, "tinyworld"), **LITTLE) for name in DEFENSES} | PLANTED
DEFENDED |= {"somebody's own": OwnDefense(defense=DEFENDED["RN"])}


@pytest.fixture(scope="module")
def small():
    """The embedded CLIP with a small random image tower."""
    import open_clip

    known = models.load(device="cpu")
    tower = {"image_size": 16, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16}
    words = {"context_length": 4, "vocab_size": 4, "width": 8, "heads": 1, "layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        visual = open_clip.model.CLIP(64, tower, words).visual
    visual.preprocess_cfg, known.network.visual = known.network.visual.preprocess_cfg, visual
    return Clip(known.network, known.tokenizer, known.name)


@pytest.fixture(scope="module")
def samples():
    return load_samples("cifar10", n=4)


@pytest.fixture
def target(small, samples):
    """What attackers face, without anything that an earlier test left in memory; and its own decisions as labels."""
    clip, held_out = copy.deepcopy(small), load_samples("cifar10", split="train", n=20)
    return Target(clip, samples.classes, None, lambda n: (held_out.images[:n], held_out.labels[:n]))


@pytest.fixture
def labels(target, samples):
    """What the classifier says of the images, so that there is something to attack."""
    return target.classifier()(samples.images).argmax(1)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(target, samples, labels, name):
    def work():
        pairs = ATTACKS[name].pairs(target, samples.images, labels)
        return [pair.images for pair in pairs] + [predictions(pair, labels, target.classifier) for pair in pairs]

    same_elsewhere(work)


@pytest.mark.parametrize("name", DEFENDED)
def test_defenses_and_who_knows_them(target, samples, name):
    """The answer, and one step of the attacker who knows, for each aim that the defense leaves open."""
    defended, images = DEFENDED[name](ZeroShotClassifier(target.clip, target.classes)), samples.images[:1]
    attack = Aware(eps=EPS, steps=1, draws=1, judged=1, aims=("plain",) if name == "SquareRooted" else ())

    same_elsewhere(lambda: [defended.at(3)(images)])
    with Elsewhere():
        labels = defended.at(JUDGED_FROM)(images).argmax(1)  # so that there is something to attack
        found = attack(defended.for_attack(), images, labels)
    assert 0 < (found - images).abs().max() <= EPS + 1e-6


def test_who_knows_has_nothing_to_do_where_all_is_broken(target, samples, labels):
    defended = DEFENDED["RN"](ZeroShotClassifier(target.clip, target.classes))
    found = Aware(eps=EPS, steps=1)(defended.for_attack(), samples.images, (labels + 1) % len(target.classes))
    assert torch.equal(found, samples.images)


EVERY_RECIPE = RECIPES | {"without text": (WithoutText, {})}


@pytest.mark.parametrize("name", EVERY_RECIPE)
def test_recipes(small, name):
    """One update, on freshly fetched pictures."""
    kind, own = EVERY_RECIPE[name]
    recipe = kind.of(eps=EPS, updates=1, batch_size=4, attack_steps=1, **own)
    pictures, clip = Pictures.of("cifar10", n=20), copy.deepcopy(small)

    def work():
        run = train(recipe, clip, pictures)
        assert all(weight.isfinite().all() and weight.device.type == "cpu" for weight in run.clip.parameters())
        return [torch.tensor(run.losses, device="cpu")]

    same_elsewhere(work)


CELLS = {"classify": ("cifar10", ("clean", "PGD-2")), "retrieve": ("coco", ("clean", "Co-Attack"))}


@pytest.mark.parametrize("task", TASK)
def test_tasks(small, tmp_path, task):
    role, attacks = CELLS[task]
    cells = grid(
        "quick", {"clip": small}, [role], {name: named_attack(name, EPS, STEPS) for name in attacks}, n=4, task=task
    )
    with Elsewhere():
        found = evaluate(cells, tmp_path / "elsewhere", "cpu")
    plain = evaluate(cells, tmp_path / "here", "cpu")
    assert found["accuracy"].tolist() == plain["accuracy"].tolist()


def test_audit(target, samples, labels, monkeypatch):
    monkeypatch.setattr(import_module("robustclip.audit"), "QUERIES", 10)
    classifier, attack = ZeroShotClassifier(target.clip, target.classes), PGD(eps=EPS, steps=1)
    with Elsewhere():
        report = audit(classifier, attack, samples.images[:2], labels[:2])
    plain = audit(classifier, attack, samples.images[:2], labels[:2])
    assert report.frame()["flagged"].tolist() == plain.frame()["flagged"].tolist()


# --- whether this says anything ---------------------------------------------------------------------------------------


def test_nothing_is_left_out():
    run = set.union(*map(parts_of, [*ATTACKS.values(), *DEFENDED.values()]))
    run |= {base for kind in run for base in kind.__mro__}  # what others are made from is run with them
    assert classes_of(Adversary) | classes_of(Defense) <= run | BY_OTHERS.keys()
    assert classes_of(Recipe) <= {kind for kind, _ in EVERY_RECIPE.values()}
    assert CELLS.keys() == TASK.keys()


UNPLACED = {
    "sum": lambda images: images + torch.zeros(images.shape),
    "index": lambda images: images[torch.arange(2)] + 0,
    "module": lambda images: torch.nn.Linear(32, 2)(images),
}


@pytest.mark.parametrize("what", UNPLACED)
def test_a_tensor_without_a_device_is_found(what, samples, monkeypatch):
    """In a defense, in an attack's noise that is not moved, and in a module that is made on the way."""
    monkeypatch.setattr(elsewhere, "WATCHED", (*elsewhere.WATCHED, __name__))
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        same_elsewhere(lambda: [UNPLACED[what](samples.images)])


def test_a_tensor_that_says_where_it_is_is_not(samples, monkeypatch):
    monkeypatch.setattr(elsewhere, "WATCHED", (*elsewhere.WATCHED, __name__))
    images = samples.images
    same_elsewhere(lambda: [images + torch.zeros_like(images), torch.zeros(2, device=images.device)])


@pytest.mark.slow
def test_no_excuse_is_needless(request):
    """After all others: what is listed in `ON_THE_CPU` was met."""
    if len(request.session.items) < len(ATTACKS) + len(DEFENDED) + len(EVERY_RECIPE):
        pytest.skip("some of the tests were not run")
    assert Elsewhere.excused == set(ON_THE_CPU)
