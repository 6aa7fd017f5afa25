"""Train an embedded model from nothing and write its model card: `python tools/pretrain.py tinyworld-clip`.

An interrupted run goes on where it stopped when the same command is given again. Training is deterministic on one
machine; another machine or library version may change the last bits. The models of photographs need ROBUSTCLIP_DATA.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import drawings
import language
import photographs
import pretraining
from adversary import Adversary
from drawings import Drawings
from photographs import Photographs
from robustclip import models
from robustclip.attacks import PGD, UniformNoise
from robustclip.attacks.fast import Fast
from robustclip.data.sources import Samples, load_samples
from robustclip.study import Scale, scale, wilson
from robustclip.training import Pictures, Recipe, Standard, TeCoA, train

ROOT = Path(__file__).parents[1]
ASSETS, RUNS = ROOT / "src" / "robustclip" / "assets", ROOT / "runs" / "pretraining"
OUTSIDE = ROOT / "runs" / "ground-up"  # where models go that do not travel with the package
SOURCES = ("cifar10", "cifar100", "tinyimagenet")

CLIP_CARD = """# {name}

A small CLIP trained from scratch on {seen}. {purpose}

- Image tower: open_clip's modified residual network, {image_parameters:,} parameters, pictures resized to {size} px.
- Text tower: two transformer layers, {text_parameters:,} parameters, {words:,} word pieces, {context} tokens.
- Data: {data}
- Objective: CLIP's symmetric loss; {objective}
- Optimiser: AdamW, {steps:,} steps up to a learning rate of {peak:g}, {images:,} pictures in all, bfloat16 autocast,
  {seconds:,} s on {device}.
- Command: `python tools/pretrain.py {name}`. Weights digest: `{digest}`.
- Load: `open_clip.create_model_and_transforms("local-dir:...")` or `robustclip.models.load("{name}")`.

Zero-shot accuracy in percent on 1,000 test pictures a role (all where there are fewer), 95 % Wilson intervals; attacked
at eps = {eps:g}/255 by one run of PGD-20 on the undefended model. Retraining on the same machine repeats the run;
elsewhere the last bits may differ, and the intervals say what to expect.

| role | classes | pictures | clean | uniform noise | PGD-20 |
|---|---|---|---|---|---|
{rows}

Can it learn more, and be made robust? Trials of fine-tuning on the training pictures that it has not seen: FT-standard
on each role by itself ({standard[updates]:,} updates, learning rate {standard[rate]:g}); TeCoA on `tinyimagenet` (image
tower only, PGD-2 at eps = {eps:g}/255, {robust[updates]:,} updates, learning rate {robust[rate]:g}), judged there and
zero-shot on other roles; {batch_size} pictures an update, same test pictures.

| role | model | clean | PGD-20 |
|---|---|---|---|
{trial}

Limits: {limits} Not robust to adversarial perturbations, on purpose: it is the undefended model. {terms}
"""

MLM_CARD = """# {name}

A small BERT masked language model over {seen}. Text attacks use it to propose words.

- Architecture: BERT, {layers} layers of width {width}, {parameters:,} parameters; the vocabulary of {clip}.
- Data: {sentences:,} sentences; 15 % of the words are to be guessed, half of them masked.
- Optimiser: AdamW, peak learning rate 2e-3, {steps:,} batches of 256, {seconds:,} s on {device}.
- Command: `python tools/pretrain.py {name}`.
- Load: `AutoModelForMaskedLM.from_pretrained(folder)`.

Held-out sentences, every word hidden in turn ({trials:,} words): the hidden word is the first guess in {top1} and among
the first ten guesses in {top10} (percent, 95 % Wilson intervals). {terms}
"""

MIT = "License: MIT, as the project."
RESEARCH = (
    "Terms: for research. The weights are the project's, but the photographs belong to others, and several of their "
    "sets allow non-commercial research only; the appendix of the book lists the terms of each."
)


class Trials(NamedTuple):
    """Fine-tuning that the card of a CLIP reports."""

    standard: dict  # settings of FT-standard
    robust: dict  # of TeCoA
    zero_shot: tuple[str, ...]  # roles on which TeCoA is judged besides the sources


TRIALS = Trials({"updates": 400, "rate": 1e-3}, {"updates": 800, "rate": 2e-3}, ("caltech101",))


@dataclass(frozen=True)
class Grown:
    """A CLIP that is robust from the ground up, as its scale's table [training.ground-up] wants it.

    It does not travel with the package; the book has its results.
    """

    scale: str
    title: str  # in that table
    pictures: Callable[[Path], pretraining.Stream]

    @property
    def adversary(self) -> Adversary:
        """Who attacks what it learns from."""
        there = scale(self.scale)
        own = there.training["ground-up"][self.title]
        return Adversary(there.reference_eps, own["attack_steps"], own["language"])

    @property
    def steps(self) -> int:
        """Of training."""
        return scale(self.scale).training["ground-up"][self.title]["steps"]

    def train(self, folder: Path, steps: int) -> dict:
        """Train it, or go on."""
        return pretraining.train_clip(folder, self.pictures(folder), steps, adversary=self.adversary)

    def card(self, name: str, folder: Path, run: dict) -> str:
        """What it is, without measured numbers: these stand in the book."""
        digest = models.load(str(folder), device="cpu").digest
        told = (
            f"{run['steps']:,} steps, {run['images']:,} pictures attacked by {self.adversary!r}, {run['seconds']:,} s"
        )
        return f"# {name}\n\nRobust from the ground up: {told}.\nWeights digest: `{digest}`.\n"


@dataclass(frozen=True)
class Model:
    """How an embedded model is made, and what its card says that cannot be measured."""

    train: Callable[[Path, int], dict]
    steps: int
    scale: str
    facts: dict[str, str]  # with places for measured numbers
    counts: Callable[[], dict[str, int]] = dict  # of what it has seen
    trials: Trials = TRIALS
    spoken: language.Language | None = None

    def card(self, name: str, folder: Path, run: dict) -> str:
        """The model card, every number measured on the model in `folder`."""
        if self.spoken:
            return MLM_CARD.format(name=name, **self.facts, **run, **mlm_facts(folder, self.spoken))
        numbers = {**run, **clip_facts(folder, scale(self.scale), self.trials), **self.counts()}
        said = {key: text.format(**numbers) for key, text in self.facts.items()}
        return CLIP_CARD.format(name=name, **said, **numbers)


MODELS = {
    "tinyworld-clip": Model(
        lambda folder, steps: pretraining.train_clip(folder, Drawings(folder), steps),
        drawings.STEPS,
        "full",
        {
            "seen": "Tinyworld, the world that `robustclip` draws by code",
            "purpose": "It makes the experiments of the book run in seconds on a laptop, and knows no photographs.",
            "objective": "a caption that fits several pictures of the batch spreads its target over them.",
            "data": "every picture drawn once, of any strength of nuisances; no held-out color-shape pair occurs.",
            "limits": "drawings of a few objects, English of {words:,} word pieces.",
            "terms": MIT,
        },
    ),
    "photo-clip": Model(
        lambda folder, steps: pretraining.train_clip(folder, Photographs(folder), steps),
        photographs.STEPS,
        "photo",
        {
            "seen": "photographs of {sets} public data sets",
            "purpose": "It lets the book measure on real photographs what a laptop can measure.",
            "data": "the pre-training part of each set, again and again in random crops, with captions made of class "
            "names, synonyms, more general words and definitions.",
            "objective": "captions that are true of a picture, but not said about its class, are no choice for it. A "
            "linear classifier of all classes on the image features, dropped afterwards, adds its own loss.",
            "limits": "small pictures of {classes:,} classes; all it knows comes from {photographs:,} photographs and "
            "from words about their classes.",
            "terms": RESEARCH,
        },
        photographs.counts,
        Trials(  # with the rates that did best on the validation parts
            {"updates": 400, "rate": 5e-4},
            {"updates": 800, "rate": 8e-4},
            ("stl10", "sun397", "pets", "eurosat", "caltech101"),
        ),
    ),
    "tinyworld-mlm": Model(
        lambda folder, steps: language.train_mlm(folder, language.TINYWORLD, steps),
        1500,
        "full",
        {"seen": "the captions of Tinyworld", "clip": "tinyworld-clip", "terms": MIT},
        spoken=language.TINYWORLD,
    ),
    "photo-mlm": Model(
        lambda folder, steps: language.train_mlm(folder, language.PHOTO, steps),
        1800,
        "photo",
        {
            "seen": "captions of photographs, class names in prompts, and what WordNet says about them",
            "clip": "photo-clip",
            "terms": RESEARCH,
        },
        spoken=language.PHOTO,
    ),
}
GROWN = {
    "tinyworld-robust": Grown("full", "images", Drawings),
    "tinyworld-robust-both": Grown("full", "images and captions", Drawings),
    "photo-robust": Grown("photo", "images", Photographs),
}


# --- what the cards say -----------------------------------------------------------------------------------------------


def interval(correct: int, n: int) -> str:
    """An accuracy with its interval, "93.0 [91.2, 94.4]"."""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*wilson(correct, n))


def measured(clip: models.Clip, samples: Samples, attacks: tuple) -> Iterator[str]:
    """Accuracy on test pictures after each attack."""
    classifier = models.ZeroShotClassifier(clip, samples.classes)
    for attack in attacks:
        right = 0
        for images, labels in zip(samples.images.split(250), samples.labels.split(250), strict=True):
            with torch.no_grad():
                right += (classifier(attack(classifier, images, labels)).argmax(1) == labels).sum().item()
        yield interval(right, len(samples))


def pgd_20(eps: float) -> Fast:
    """PGD-20 with gradients in bfloat16, judged in float32."""
    return Fast(attack=PGD(eps=eps, steps=20), precision="bfloat16")


def clip_facts(folder: Path, chosen: Scale, trials: Trials) -> dict:
    """Sizes, accuracies and trials."""
    clip, eps = models.load(str(folder), device="cpu"), chosen.reference_eps
    network = clip.network
    image_parameters = sum(weight.numel() for weight in network.visual.parameters())
    tests = {name: load_samples(name, chosen.source, "test", 1000) for name in chosen.roles}
    plain = Standard.of(eps=0.0, **trials.standard)
    hardened = TeCoA.of(eps=eps, **trials.robust, attack_steps=2, precision="bfloat16")
    shown = {name: tests[name] for name in (*SOURCES, *trials.zero_shot)}
    return {
        "image_parameters": image_parameters,
        "text_parameters": sum(weight.numel() for weight in network.parameters()) - image_parameters - 1,
        "words": network.vocab_size,
        "context": network.context_length,
        "size": clip.image_size[0],
        "digest": clip.digest,
        "eps": eps * 255,
        "rows": "\n".join(zero_shot_rows(clip, eps, tests)),
        "trial": "\n".join(trial_rows(clip, chosen.source, shown, plain, hardened)),
        "standard": trials.standard,
        "robust": trials.robust,
        "batch_size": hardened.optimisation.batch_size,
    }


def zero_shot_rows(clip: models.Clip, eps: float, tests: dict[str, Samples]) -> Iterator[str]:
    """One line per role with classes."""
    attacks = (UniformNoise(eps=0), UniformNoise(eps=eps), pgd_20(eps))
    for name, samples in tests.items():
        if samples.captions is None:
            sizes = [name, f"{len(samples.classes):,}", f"{len(samples):,}"]
            yield f"| {' | '.join([*sizes, *measured(clip, samples, attacks)])} |"


def trial_rows(
    clip: models.Clip, source: str, tests: dict[str, Samples], standard: Recipe, robust: Recipe
) -> Iterator[str]:
    """One line per role and model: as it is, made robust on one role, fine-tuned on clean pictures of that role."""
    attacks = (UniformNoise(eps=0), pgd_20(robust.eps))
    pictures = 20_000 if source == "tinyworld" else None  # all that there are
    tuned = train(robust, clip, Pictures.of("tinyimagenet", source, pictures)).clip
    for name, samples in tests.items():
        compared = {"undefended": clip, "TeCoA on tinyimagenet": tuned}
        if name in SOURCES:
            compared["FT-standard"] = train(standard, clip, Pictures.of(name, source, pictures)).clip
        for title, model in compared.items():
            yield f"| {' | '.join([name, title, *measured(model, samples, attacks)])} |"


def mlm_facts(folder: Path, spoken: language.Language) -> dict:
    """Sizes and how well it guesses."""
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(folder)
    top = {best: language.mlm_accuracy(folder, spoken, best=best) for best in (1, 10)}
    return {
        "layers": model.config.num_hidden_layers,
        "width": model.config.hidden_size,
        "parameters": model.num_parameters(),
        "trials": top[1][1],
        "top1": interval(*top[1]),
        "top10": interval(*top[10]),
    }


# --- the command ------------------------------------------------------------------------------------------------------


def make(name: str, out: Path, steps: int | None = None) -> None:
    """Train into a folder of its own, going on where an interrupted run stopped, then replace the model in `out`."""
    work, model = RUNS / name, (MODELS | GROWN)[name]
    work.mkdir(parents=True, exist_ok=True)
    run = model.train(work, steps or model.steps)
    (work / "training.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    shutil.copytree(work, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
    shutil.rmtree(work)


def main() -> None:
    """Train the models that are named, then measure each and write its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = MODELS | GROWN
    parser.add_argument("models", nargs="+", choices=every, metavar="MODEL", help=" or ".join(every))
    parser.add_argument(
        "--out", type=Path, help="folder of the models (default: the package's own, runs/ground-up for robust ones)"
    )
    parser.add_argument("--steps", type=int, help="steps of training (default: those of the embedded model)")
    parser.add_argument("--card", action="store_true", help="only measure the model that is there and rewrite its card")
    arguments = parser.parse_args()
    for name in arguments.models:
        folder = (arguments.out or (ASSETS if name in MODELS else OUTSIDE)) / name
        if not arguments.card:
            make(name, folder, arguments.steps)
        run = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        (folder / "README.md").write_text(every[name].card(name, folder, run), encoding="utf-8")


if __name__ == "__main__":
    main()
