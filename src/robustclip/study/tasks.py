"""Tasks: what a model is asked, what is kept of each answer, and how the answers are summed up.

classify    which class? Kept is the predicted one; right if it is the true one
retrieve    which caption, which image? Kept is how many answers stand before a right one; right among the first k
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from robustclip.attacks.base import Captions, check_captions, predictions
from robustclip.checks import check_images
from robustclip.classes import Classes
from robustclip.data.sources import Samples
from robustclip.models import Clip
from robustclip.study.bench import Bench
from robustclip.study.cells import Cell

BATCH = 128  # images that are encoded and ranked together
FIRST = (1, 5, 10)  # places that recall looks at
Answers = dict[str, list[int]]


class Classify:
    """Accuracy: the share of images whose true class comes first."""

    def batches(self, n: int, batch_size: int) -> Iterator[slice]:
        """The images that are attacked and judged together."""
        return (slice(start, min(start + batch_size, n)) for start in range(0, n, batch_size))

    def answer(self, cell: Cell, bench: Bench, rows: slice) -> Answers:
        """Predicted labels after the attack, and whether they are right.

        Where the attacker offers several pairs of images and prompts, a wrong prediction for any of them counts.
        """
        labels, build = bench.batch(cell, rows)[1], bench.judge(cell)

        def checked(classes: Classes) -> Callable[[Tensor], Tensor]:
            return lambda images: finite(build(classes)(images), cell.model)

        worst = None
        for pair in bench.pairs(cell, rows):
            check_images(pair.images)
            guess = predictions(pair, labels, checked)
            worst = guess if worst is None else torch.where(worst == labels, guess, worst)
        return {"predicted": worst.tolist(), "right": (worst == labels).int().tolist()}

    def hits(self, answers: Answers) -> dict[str, np.ndarray]:
        """Metric -> right or wrong (n,)."""
        return {"accuracy": np.array(answers["right"], dtype=bool)}


class Retrieve:
    """Recall: the share of queries with a right answer among the first k.

    Image-to-text, an image is a hit if any of its captions is among the first k of all captions, as on MSCOCO;
    text-to-image, each caption asks for its image. Equal scores stand in the order of the set, which neither side can
    profit from: a model that maps everything to one point gets the recall of a draw by lot.
    """

    def batches(self, n: int, batch_size: int) -> Iterator[slice]:
        """All at once: every image is ranked among all others."""
        return iter([slice(0, n)])

    def answer(self, cell: Cell, bench: Bench, rows: slice) -> Answers:
        """For each query of either direction, how many answers stand before the right one."""
        images, captions = bench.batch(cell, rows)[0], captions_of(bench.samples(cell))
        clip, before = bench.clip(cell.spec), list(chain(*captions))
        if cell.attack is not None:
            images, captions = cell.attack.on_captions(clip, images, captions)
        bench.count(cell, before, chain(*captions))
        return {name: found.tolist() for name, found in ranks(clip, images, captions).items()}

    def hits(self, answers: Answers) -> dict[str, np.ndarray]:
        """Metric -> right or wrong for each query, such as "R@1 image-to-text"."""
        return {f"R@{k} {name}": np.array(found) < k for name, found in answers.items() for k in FIRST}


TASK = {"classify": Classify(), "retrieve": Retrieve()}


def finite(logits: Tensor, model: str) -> Tensor:
    """The logits, if they are numbers."""
    if not torch.isfinite(logits).all():
        raise ValueError(f"model {model!r} gives NaN or infinite logits; restore or retrain its checkpoint")
    return logits


def captions_of(samples: Samples) -> Captions:
    """The captions of each image."""
    if samples.captions is None:
        raise ValueError(f"{samples!r} has no captions; load the role 'coco'")
    return np.reshape(samples.captions, (len(samples), -1)).tolist()


@torch.no_grad()
def ranks(clip: Clip, images: Tensor, captions: Captions) -> dict[str, np.ndarray]:
    """How many captions stand before the image's first one, and how many images before the caption's."""
    check_captions(captions, len(check_images(images)))
    texts = {text: place for place, text in enumerate(dict.fromkeys(chain(*captions)))}
    places = torch.tensor([texts[text] for text in chain(*captions)], device=images.device)  # equal texts tie exactly
    text_features, sizes = clip.text_features(list(texts)), [len(group) for group in captions]
    features = torch.cat([clip.encode_images(part) for part in images.split(BATCH)])
    if not (features.isfinite().all() and text_features.isfinite().all()):
        raise ValueError("the features contain NaN or infinity, which no recall can be told from; restore the model")
    owners = torch.tensor([row for row, size in enumerate(sizes) for _ in range(size)], device=images.device)
    of_images, of_texts = [], []
    for rows in torch.arange(len(owners), device=images.device).split(BATCH):
        of_images.append(_before((features[owners[rows]] @ text_features.T)[:, places], rows))
        of_texts.append(_before(text_features[places[rows]] @ features.T, owners[rows]))
    first = torch.stack([group.amin() for group in torch.cat(of_images).split(sizes)])
    return {"image-to-text": first.cpu().numpy(), "text-to-image": torch.cat(of_texts).cpu().numpy()}


def _before(scores: Tensor, targets: Tensor) -> Tensor:
    """How many columns stand before the target one (n,) in each row of (n, m) scores; equal ones in their order."""
    own = scores.gather(1, targets[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < targets[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(1)


def numbered(answers: Sequence[Answers]) -> Answers:
    """The answers of several batches, one after the other."""
    return {name: list(chain.from_iterable(part[name] for part in answers)) for name in answers[0]}
