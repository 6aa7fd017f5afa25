"""Train an embedded model from nothing and write its model card: `python tools/pretrain.py clip` (or `mlm`).

On two CPU cores the CLIP takes about 20 minutes and the language model two. Training is deterministic on one machine;
another machine or library version may change the last bits.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

import drawings
import language
import pretraining
from robustclip import models
from robustclip.attacks import PGD, UniformNoise
from robustclip.data.roles import role, tinyworld_samples
from robustclip.study import scale, wilson
from robustclip.training import Pictures, TeCoA, train

ASSETS = Path(__file__).parents[1] / "src" / "robustclip" / "assets"
STEPS = {"clip": 5000, "mlm": 2000}
TRAIN = {
    "clip": lambda folder, steps: pretraining.train_clip(folder, drawings.Drawings(folder), steps),
    "mlm": language.train_tinyworld_mlm,
}
ROLES = ("cifar10", "cifar100", "tinyimagenet", "imagenet", "stl10", "caltech101", "imagenet-sketch", "imagenet-a")

CLIP_CARD = """# tinyworld-clip

A small CLIP trained from scratch on Tinyworld, the world that `robustclip` draws by code. It exists to make the
experiments of the book run in seconds on a laptop; it knows nothing about photographs.

- Image tower: open_clip's modified residual network, {image_parameters:,} parameters, pictures resized to 48 px.
- Text tower: two transformer layers, {text_parameters:,} parameters, {words} word pieces, {context} tokens.
- Data: {images:,} pictures with one caption each, every picture drawn once; no held-out color-shape pair occurs.
- Objective: CLIP's symmetric loss; a caption that fits several pictures of the batch spreads its target over them.
- Optimiser: AdamW, peak learning rate 2e-3, {steps:,} batches of 256, bfloat16 autocast, {seconds:,} s on {device}.
- Command: `python tools/pretrain.py clip`. Weights digest: `{digest}`.
- Load: `open_clip.create_model_and_transforms("local-dir:...")` or `robustclip.models.load("tinyworld-clip")`.

Zero-shot accuracy in percent on 1,000 test pictures a role, 95 % Wilson intervals; attacked at eps = {eps:g}/255 by one
run of PGD-20 on the undefended model. Retraining on the same machine repeats the run; elsewhere the last bits may
differ, and the intervals say what to expect.

| role | classes | clean | uniform noise | PGD-20 |
|---|---|---|---|---|
{rows}

Can it be made robust? A trial of adversarial fine-tuning (image tower only, {trial_steps} updates of {trial_batch}
pictures, PGD-{trial_attack} at eps = {eps:g}/255), on the same test pictures:

| role | model | clean | PGD-20 |
|---|---|---|---|
{trial}

Limits: single objects on ten backgrounds, 24 shapes, 12 colors, 6 textures, English of about 300 words. Not robust to
adversarial perturbations, on purpose: it is the undefended model. License: MIT, as the project.
"""

MLM_CARD = """# tinyworld-mlm

A small BERT masked language model over the captions of Tinyworld. Text attacks use it to propose words.

- Architecture: BERT, {layers} layers of width {width}, {parameters:,} parameters; the vocabulary of tinyworld-clip.
- Data: {sentences:,} captions; 15 % of the words hidden as in BERT.
- Optimiser: AdamW, peak learning rate 2e-3, {steps:,} batches of 256, {seconds:,} s on {device}.
- Command: `python tools/pretrain.py mlm`.
- Load: `AutoModelForMaskedLM.from_pretrained(folder)`.

Held-out sentences, every word hidden in turn ({trials:,} words): the hidden word is the first guess in {top1} and among
the first ten guesses in {top10} (percent, 95 % Wilson intervals). License: MIT, as the project.
"""


def interval(correct: int, n: int) -> str:
    """An accuracy with its interval, "93.0 [91.2, 94.4]"."""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*wilson(correct, n))


def measured(clip: models.Clip, name: str, attacks: tuple) -> list[str]:
    """Accuracy on 1,000 test pictures of a role after each attack."""
    classifier = models.zero_shot(clip, role(name))
    pixels, labels, _, _ = tinyworld_samples(name, "test", 1000)
    images, cells = pixels.float() / 255, []
    for attack in attacks:
        with torch.no_grad():
            right = (classifier(attack(classifier, images, labels)).argmax(1) == labels).sum().item()
        cells.append(interval(right, len(labels)))
    return cells


def clip_rows(clip: models.Clip, eps: float) -> str:
    """One line per role of the card's table."""
    attacks = (UniformNoise(eps=0), UniformNoise(eps=eps), PGD(eps=eps, steps=20))
    rows = ([name, str(len(role(name).classes)), *measured(clip, name, attacks)] for name in ROLES)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def trial_rows(clip: models.Clip, recipe: TeCoA) -> str:
    """Two lines per role of the trial: the undefended model, then the tuned one."""
    rows, attacks = [], (UniformNoise(eps=0), PGD(eps=recipe.eps, steps=20))
    for name in ("cifar10", "cifar100"):
        tuned = train(recipe, clip, Pictures.of(name, n=8000)).clip
        rows += [
            [name, title, *measured(model, name, attacks)] for title, model in (("undefended", clip), ("tuned", tuned))
        ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def card(kind: str, folder: Path, run: dict, eps: float) -> str:
    """The model card, every number measured on the model in `folder`."""
    if kind == "mlm":
        from transformers import AutoModelForMaskedLM

        model = AutoModelForMaskedLM.from_pretrained(folder)
        top = {best: language.mlm_accuracy(folder, language.TINYWORLD, best=best) for best in (1, 10)}
        return MLM_CARD.format(
            layers=model.config.num_hidden_layers,
            width=model.config.hidden_size,
            parameters=model.num_parameters(),
            trials=top[1][1],
            top1=interval(*top[1]),
            top10=interval(*top[10]),
            **run,
        )
    clip = models.load(str(folder), device="cpu")
    network = clip.network
    recipe = TeCoA(eps=eps)
    image_parameters = sum(weight.numel() for weight in network.visual.parameters())
    return CLIP_CARD.format(
        image_parameters=image_parameters,
        text_parameters=sum(weight.numel() for weight in network.parameters()) - image_parameters - 1,
        words=network.vocab_size,
        context=drawings.CONTEXT,
        digest=clip.digest,
        eps=eps * 255,
        rows=clip_rows(clip, eps),
        trial=trial_rows(clip, recipe),
        trial_steps=recipe.optimisation.updates,
        trial_batch=recipe.optimisation.batch_size,
        trial_attack=recipe.attack.steps,
        **run,
    )


def main() -> None:
    """Train into a temporary folder and replace the embedded model, then measure it and write its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=STEPS)
    parser.add_argument("--out", type=Path, help="folder to write (default: the embedded model)")
    parser.add_argument("--steps", type=int, help="batches of 256 (default: those of the embedded model)")
    parser.add_argument("--card", action="store_true", help="only measure the model that is there and rewrite its card")
    arguments = parser.parse_args()
    out = arguments.out or ASSETS / f"tinyworld-{arguments.model}"
    if not arguments.card:
        with tempfile.TemporaryDirectory() as scratch:
            steps = arguments.steps or STEPS[arguments.model]
            run = TRAIN[arguments.model](Path(scratch), steps)
            (Path(scratch) / "training.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
            shutil.copytree(scratch, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
    run = json.loads((out / "training.json").read_text(encoding="utf-8"))
    (out / "README.md").write_text(card(arguments.model, out, run, scale("full").reference_eps), encoding="utf-8")


if __name__ == "__main__":
    main()
