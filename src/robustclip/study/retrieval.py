"""Retrieval: recall from image to text and from text to image, clean and under attack."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain, product
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from robustclip.attacks.base import Captions, check_captions
from robustclip.checks import check_images, check_integer
from robustclip.data.sources import Samples
from robustclip.progress import progress
from robustclip.study.statistics import wilson

BATCH = 128  # images that are encoded, attacked and ranked together
Ranks = dict[str, np.ndarray]  # direction -> how many answers stand before the right one, for each query


def captions_of(samples: Samples) -> Captions:
    """The captions of each image."""
    if samples.captions is None:
        raise ValueError(f"{samples!r} has no captions; load the role 'coco'")
    return np.reshape(samples.captions, (len(samples), -1)).tolist()


def recalls(clip: Any, images: Tensor, captions: Captions, ks: Sequence[int] = (1, 5, 10)) -> pd.DataFrame:
    """Recall in percent with its 95 % Wilson interval, one row per direction and k; `n` counts the queries.

    Image-to-text, an image is a hit if any of its captions is among the first k of all captions, as on MSCOCO;
    text-to-image, each caption asks for its image. Equal scores stand in the order of the set, which neither side can
    profit from: a model that maps everything to one point gets the recall of a draw by lot.
    """
    return attacked_recalls(clip, {"clean": None}, images, captions, ks).drop(columns=["attack", "drop", "broken"])


def attacked_recalls(
    clip: Any, attacks: Mapping[str, Any], images: Tensor, captions: Captions, ks: Sequence[int] = (1, 5, 10)
) -> pd.DataFrame:
    """As `recalls`, for each attack by name: multimodal, on images, on texts, or None for clean data.

    Both success rates in use, in percent: `drop` is clean minus attacked recall (Co-Attack's), `broken` the share of
    the clean hits that are lost (SGA's; NaN without any). Image attacks that need labels aim at recall@1 of the image.
    """
    clean, rows = ranks(clip, images, captions), []
    for name, attack in progress(attacks.items(), "retrieval", unit="attack"):
        after = clean if attack is None else ranks(clip, *attack.on_captions(clip, images, captions))
        for direction, k in product(clean, ks):
            before, hits = (found[direction] < check_integer("k", k, 1) for found in (clean, after))
            recall, low, high = wilson(int(hits.sum()), len(hits))
            row = {"attack": name, "direction": direction, "k": k, "recall": recall, "low": low, "high": high}
            rows.append(row | {"n": len(hits)} | _success(before, hits))
    return pd.DataFrame(rows)


def _success(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """The absolute drop in points, and the share of the hits that are lost, in percent."""
    lost = 100 * float((~after[before]).mean()) if before.any() else math.nan
    return {"drop": 100 * float(before.mean() - after.mean()), "broken": lost}


def ranks(clip: Any, images: Tensor, captions: Captions) -> Ranks:
    """How many captions stand before the image's first one, and how many images before the caption's."""
    check_captions(captions, len(check_images(images)))
    texts = {text: place for place, text in enumerate(dict.fromkeys(chain(*captions)))}
    places = torch.tensor([texts[text] for text in chain(*captions)], device=images.device)  # equal texts tie exactly
    text_features, sizes = clip.text_features(list(texts)), [len(group) for group in captions]
    with torch.no_grad():
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
