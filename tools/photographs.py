"""What the CLIP of photographs learns from: the part of the training images that nothing else uses, and captions.

A caption says a class name, a synonym, a more general word or a definition (WordNet's) in one of many templates. It is
true of the images of all classes that the word covers, "a photo of a dog" of every breed in every set.
"""

import random
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from english import write_photo_tokenizer
from pretraining import SIZE, Step, text_tower, tokenize
from robustclip.data import lexicon, sources
from robustclip.data.loaders import Table
from robustclip.data.roles import role, role_names
from robustclip.data.tinyworld import generator, randint, uniform

STORED = 64  # pixels per side of what larger pictures are cut from
STEPS = 13_500  # of training
SMALLEST = 0.8  # side of the smallest crop
CLASSES, EACH = 64, 4  # classes of a step, with one caption each, and pictures of each class
# How often a set's classes come up, in percent.
SHARES = {
    "tinyimagenet": 40, "cifar100": 17, "cifar10": 11, "caltech101": 13, "flowers102": 4, "sun397": 3, "stl10": 2,
    "food101": 2.5, "eurosat": 2, "dtd": 2, "pets": 1, "busi": 0.6, "kneexray": 0.7, "covid": 0.8, "btmri": 0.4,
}  # fmt: skip
# How often a caption says the name, a synonym, a more general word, the definition.
SAYS = {"name": 0.8, "synonym": 0.07, "hypernym": 0.06, "gloss": 0.07}
TEMPLATES = (
    "a photo of a {}", "a photo of the {}", "this is a photo of a {}", "a picture of a {}", "an image of a {}", "a {}",
    "the {}", "one {}", "a close photo of a {}", "a cropped photo of a {}", "a blurry photo of a {}", "there is a {}",
    "a bright photo of a {}", "a dark photo of a {}", "a good photo of a {}", "a bad photo of a {}", "my {}",
    "a low resolution photo of a {}", "a black and white photo of a {}", "a photo of a small {}", "look at this {}",
    "a photo of a large {}", "a photo of many {}", "a photo of one {}", "a photo of a {} outside", "here is a {}",
    "a photo of a {} taken at home", "a snapshot of a {}", "a photograph of a {}", "we saw a {} today", "{}",
    "this picture shows a {}", "an old photo of a {}", "a nice {} in the picture", "a photo of a clean {}",
)  # fmt: skip
OWN_TEMPLATES = {
    "dtd": ("a surface with a {} texture", "a {} texture", "a {} surface", "a close photo of something {}"),
    "eurosat": ("a satellite photo of {}", "a centered photo of {}", "{} seen from above", "an aerial photo of {}"),
    "sun397": ("a photo of a {}", "a place: {}", "a black and white photo of a {}", "the view of a {}"),
    "busi": ("an ultrasound image of the breast, {}", "a {} ultrasound scan", "a photo of a {}"),
    "kneexray": ("an x-ray of a knee with {}", "a knee x-ray, {}", "a photo of a {}"),
    "covid": ("a chest x-ray with {}", "an x-ray of the chest, {}", "a photo of a {}"),
    "btmri": ("a brain scan with {}", "an mri of a brain, {}", "a photo of a {}"),
}  # fmt: skip
FOLLOWED = 0.35  # of the captions use the papers' own template for the set


@dataclass(frozen=True)
class Album:
    """The pre-training part of one set, in memory."""

    role: str
    images: Tensor  # (n, 3, side, side) uint8
    labels: np.ndarray
    names: tuple[str, ...]


def albums() -> list[Album]:
    """The pre-training part of every set, without images that look like a test image of any set."""
    seen = {mark for name in role_names() if role(name).photo.get("pixels") for mark in pictures(name, "test")[2]}
    found = []
    for name in SHARES:
        table, images, marks = pictures(name, "pretraining")
        fresh = np.array([mark not in seen for mark in marks])
        found.append(Album(name, images[torch.from_numpy(fresh)], table.labels[fresh], table.names))
        print(f"{name}: {fresh.sum():,} images; {(~fresh).sum()} left out that look like test images", flush=True)
    return found


def pictures(name: str, split: str) -> tuple[Table, Tensor, list]:
    """A part of a set: its table, its images, larger than they are seen to leave room for crops, their fingerprints."""
    table, side = sources.table_of(name, "parquet", split), role(name).photo["pixels"]
    side = side if side < SIZE else STORED
    parts = np.array_split(np.arange(len(table)), -(-len(table) // 2000))
    images = torch.cat([(table.decode(rows, side, side) * 255).round().byte() for rows in parts])
    return table, images, fingerprints(images)


def counts() -> dict[str, int]:
    """How many sets, classes of all of them together, and photographs, look-alikes of test images included."""
    tables = [sources.table_of(name, "parquet", "pretraining") for name in SHARES]
    names = set(chain.from_iterable(table.names for table in tables))
    return {"sets": len(tables), "classes": len(names), "photographs": sum(map(len, tables))}


def fingerprints(images: Tensor) -> list[int]:
    """64 bits per image that survive small changes: whether it gets lighter from one of 8 x 9 places to the next."""
    gray = F.interpolate(images.float().mean(1, keepdim=True), (8, 9), mode="area")[:, 0]
    bits = (gray[:, :, 1:] > gray[:, :, :-1]).flatten(1).numpy()
    return [int.from_bytes(row.tobytes(), "big") for row in np.packbits(bits, 1)]


class Captioner:
    """Says captions about classes, and knows of which classes each is true."""

    def __init__(self, classes: list[tuple[str, str]]) -> None:
        self.classes = classes  # role and name
        self.entries = [lexicon.entry(name, role(of).photo["data"]) for of, name in classes]
        covered = [{entry.name, *entry.synonyms, *entry.hypernyms} for entry in self.entries]
        subjects = sorted(set().union(*covered))
        self.true_of = {subject: torch.tensor([subject in words for words in covered]) for subject in subjects}

    def caption(self, number: int, random: random.Random) -> tuple[str, Tensor]:
        """One caption about a class, and (classes,) whether it is true of each."""
        of, entry = self.classes[number][0], self.entries[number]
        texts = {"name": (entry.name,), "synonym": entry.synonyms, "hypernym": entry.hypernyms, "gloss": ()}
        texts["gloss"] = (entry.gloss, f"{entry.name}: {entry.gloss}") if entry.gloss else ()
        kinds = [kind for kind in SAYS if texts[kind]]
        kind = random.choices(kinds, [SAYS[kind] for kind in kinds])[0]
        said = random.choice(texts[kind])
        if kind == "gloss":
            return said, self.true_of[entry.name]
        return self._template(of, random).format(said), self.true_of[said]

    def _template(self, of: str, random: random.Random) -> str:
        if random.random() < FOLLOWED:
            return role(of).paper["template"]
        return random.choice(OWN_TEMPLATES.get(of, TEMPLATES))


def augmented(images: Tensor, random: torch.Generator) -> Tensor:
    """(n, 3, SIZE, SIZE) uint8: random crops from SMALLEST to 1.1 of a picture's side, mirrored, stretched, lit."""
    n = len(images)
    zoom = uniform(random, SMALLEST, 1.1, (n, 1)) * uniform(random, 0.92, 1.08, (n, 2))
    centre = uniform(random, -1, 1, (n, 2)) * (1 - zoom).abs().clamp(min=0.08)
    mirrored = 1 - 2 * randint(random, 2, (n,))
    turn = torch.zeros(n, 2, 3)
    turn[:, 0, 0], turn[:, 1, 1], turn[:, :, 2] = zoom[:, 0] * mirrored, zoom[:, 1], centre
    grid = F.affine_grid(turn, [n, 3, SIZE, SIZE], align_corners=False)
    pixels = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    middle = pixels.mean((2, 3), keepdim=True)
    contrast, light = uniform(random, 0.75, 1.25, (n, 1, 1, 1)), uniform(random, 0.8, 1.2, (n, 1, 1, 1))
    tint = uniform(random, 0.95, 1.05, (n, 3, 1, 1))
    return (((pixels - middle) * contrast + middle) * light * tint).round().clamp(0, 255).byte()


class Photographs(torch.utils.data.Dataset):
    """Steps of 256 pictures, four of each of 64 classes drawn by the shares of their sets, and a caption per class."""

    smoothing = 0.1

    def __init__(self, folder: Path) -> None:
        self.tokenizer = write_photo_tokenizer(folder)
        self.albums = albums()
        everything = [(album, label) for album in self.albums for label in range(len(album.names))]
        self.rows = [np.flatnonzero(album.labels == label) for album, label in everything]
        self.captioner = Captioner([(album.role, album.names[label]) for album, label in everything])
        weights = [SHARES[album.role] / len(album.names) for album, _ in everything]
        self.weights = torch.tensor(weights) * torch.tensor([len(rows) > 0 for rows in self.rows])
        self.homes = [number for number, album in enumerate(self.albums) for _ in album.names]
        self.name = f"photographs, {sum(map(len, self.rows)):,} of them, {CLASSES * EACH} a step"
        self.kinds = len(everything)
        self.text, self.pictures = text_tower("photo", self.tokenizer, width=96), CLASSES * EACH

    def __getitem__(self, step: int) -> Step:
        random_words, random_numbers = random.Random(step), generator("photographs", step)
        chosen = torch.multinomial(self.weights, CLASSES, replacement=True, generator=random_numbers).tolist()
        said = [self.captioner.caption(number, random_words) for number in chosen]
        shown = [number for number in chosen for _ in range(EACH)]
        fits = torch.stack([true for _, true in said], 1)[shown].float()
        meant = (torch.tensor(shown)[:, None] == torch.tensor(chosen)).float()
        images = self._images(shown, random_words, random_numbers)
        tokens = tokenize(self.tokenizer, [text for text, _ in said])
        return Step(images, tokens, fits, meant, torch.tensor(shown))

    def _images(self, shown: list[int], random_rows: random.Random, random_numbers: torch.Generator) -> Tensor:
        """A random picture of each class, pictures of one size cut together."""
        found = [self.albums[self.homes[number]].images[random_rows.choice(self.rows[number])] for number in shown]
        images = torch.empty(len(shown), 3, SIZE, SIZE, dtype=torch.uint8)
        for side in sorted({picture.shape[-1] for picture in found}):
            places = [place for place, picture in enumerate(found) if picture.shape[-1] == side]
            images[places] = augmented(torch.stack([found[place] for place in places]), random_numbers)
        return images
