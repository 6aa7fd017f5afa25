"""Labeled images from anywhere behind one call: `load_samples(role, source, split, n)`; `facts` without decoding any.

    source       what plays the role
    tinyworld    pictures drawn by code (the default)
    digits       the handwritten digits of scikit-learn; always plays the role `digits`
    parquet      a folder of parquet files below ROBUSTCLIP_DATA, called like the role or, where there is none, as
                 assets/photo-roles.toml says; "parquet:FOLDER" takes another one

The photographs of that table have one more split, "pretraining", and come in its size; see `loaders.divided`.

Nothing is ever downloaded here; `tools/to_parquet.py` makes the folders of the papers' own data sets.
"""

import hashlib
import os
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustclip.checks import check_choice, check_images, check_integer, check_labels
from robustclip.classes import Classes
from robustclip.data import loaders, roles
from robustclip.data.loaders import Table
from robustclip.data.roles import SPLITS, Role

SOURCES = ("tinyworld", "digits", "parquet")


@dataclass(frozen=True, eq=False)
class Samples:
    """Labeled images, ready to classify.

    In a set with captions and no classes, each image is a class of its own, named by its first caption.
    """

    images: Tensor = field(repr=False)  # (n, 3, height, width) float32 in [0, 1]
    labels: Tensor = field(repr=False)  # (n,) int64
    classes: Classes = field(repr=False)
    source: str  # what played the role: "tinyworld", "parquet:scenes15", "paper:SUN397"
    digest: str  # revision of the data
    captions: tuple[str, ...] | None = field(default=None, repr=False)  # image i owns k from i * k on, k = len / n

    def __post_init__(self) -> None:
        check_images(self.images)
        check_labels(self.labels, len(self.classes), len(self.images))
        if self.captions is not None and (not len(self) or len(self.captions) % len(self)):
            raise ValueError(f"got {len(self.captions)} captions for {len(self)} images; give equally many per image")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def prompts(self) -> tuple[str, ...]:
        """One prompt per class."""
        return self.classes.prompts


def load_samples(
    role: str, source: str = "tinyworld", split: str = "test", n: int | None = 1000, start: int = 0
) -> Samples:
    """Rows `start:start + n` of a role's split, all from `start` on with n=None, fewer where the set ends before.

    Real sets are put in a fixed random order first, so that every n is a fair sample and smaller ones are nested.
    """
    table = table_of(role, source, split)
    check_integer("start", start, 0)
    if n is not None:
        check_integer("n", n, 1)
    if table is None:
        return _tinyworld(role, split, n, start)
    if start >= len(table):
        raise ValueError(f"start={start} is out of range; split {split!r} of {table.name} has {len(table):,} rows")
    order = np.arange(len(table)) if table.original else loaders.shuffled(role, len(table))
    rows = order[start:][:n]  # the papers' own sets are stored in random order
    images, labels, classes, captions = table.decode(rows, *_size(role, table)), table.labels[rows], None, None
    if table.captions is None:
        classes = _classes(role, table)
    else:
        count = min(map(len, table.captions))
        captions = tuple(caption for row in rows for caption in table.captions[row][:count])
        labels, classes = np.arange(len(rows)), Classes(captions[::count], captions[::count])
    return Samples(images, torch.from_numpy(labels), classes, table.name, table.digest(role, split), captions)


def facts(role: str, source: str = "tinyworld", split: str = "test") -> dict:
    """What names a role's images, as in `Samples` but without decoding any: source, digest, names, prompts, rows.

    Names and prompts are () where each image is a class of its own, rows None where a set has no end.
    """
    table = table_of(role, source, split)
    if table is None:
        classes, shown = roles.role(role).classes, ("tinyworld", _tinyworld_digest(role, split), None)
    else:
        classes = _classes(role, table) if table.captions is None else None
        shown = table.name, table.digest(role, split), len(table)
    texts = (classes.names, classes.prompts) if classes else ((), ())
    return dict(zip(("source", "digest", "rows", "names", "prompts"), (*shown, *texts), strict=True))


# --- Tinyworld --------------------------------------------------------------------------------------------------------


def _tinyworld(role: str, split: str, n: int | None, start: int) -> Samples:
    if n is None:
        raise ValueError("n=None is not allowed for source 'tinyworld', which draws without end; give a number")
    images, labels, _, captions = roles.tinyworld_samples(role, split, n, start)
    images, classes = images.float().div_(255), roles.role(role).classes
    return Samples(images, labels, classes, "tinyworld", _tinyworld_digest(role, split), captions)


@cache
def _tinyworld_digest(role: str, split: str) -> str:
    """Digest of a role's first drawn chunk: changes when the renderer, the classes or the captions change."""
    images, labels, classes, captions = roles.tinyworld_samples(role, split, 64, 0)
    digest = hashlib.sha256(images.numpy().tobytes())
    digest.update(repr([role, split, labels.tolist(), classes, captions]).encode())
    return digest.hexdigest()[:16]


# --- real images ------------------------------------------------------------------------------------------------------


def table_of(role: str, source: str, split: str) -> Table | None:
    """The set that plays a role, None if it is drawn."""
    entry, (kind, _, place) = roles.role(role), source.partition(":")
    check_choice("source", kind, SOURCES)
    check_choice("split", split, (*SPLITS, "pretraining") if kind == "parquet" and role != "digits" else SPLITS)
    if role == "digits":
        return loaders.digits(split)
    if kind == "digits":
        raise ValueError(f"source 'digits' plays the role 'digits' only, not {role!r}; take tinyworld or parquet")
    if kind == "tinyworld":
        return None
    folder = _folder(role, [place] if place else list(dict.fromkeys([role, entry.photo.get("data", role)])))
    try:
        return _opened(entry, folder, split)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"role {role!r} needs split {split!r}: {error} in {folder}") from error


def _opened(entry: Role, folder: Path, split: str) -> Table:
    """A split of the folder: of photographs by their rule, else a file of the name."""
    if folder.name != entry.photo.get("data") or loaders.is_original(folder):
        return loaders.open_parquet(folder, split)
    table = loaders.divided(folder, split, entry.photo.get("held_back", 1))
    return replace(table, facts=(*table.facts, f"{entry.photo['pixels']} pixels"))


def _folder(role: str, names: list[str]) -> Path:
    """The first folder that is there."""
    root = os.environ.get("ROBUSTCLIP_DATA", "")
    folders = [Path(*map(os.path.expanduser, (root, name))) for name in names]  # leaves "~nobody" as it is
    for folder in folders:
        if folder.is_dir() and (root or folder.is_absolute()):
            return folder
    raise FileNotFoundError(
        f"role {role!r} at source 'parquet' needs a folder {' or '.join(names)} below the one that the environment "
        f"variable ROBUSTCLIP_DATA names ({root or 'not set'}; scales paper and photo share it: set it for each run if "
        f"their sets lie apart); see `python tools/to_parquet.py {role}`, or give one as source='parquet:FOLDER'"
    )


def _classes(role: str, table: Table) -> Classes:
    """The set's own classes in the papers' prompt; whole prompts belong to the papers' own set."""
    entry = roles.role(role)
    if role == "digits":
        return entry.classes
    whole = entry.paper.get("prompts")
    return Classes(table.names, whole if whole and table.original else tuple(map(entry.template.format, table.names)))


def _size(role: str, table: Table) -> tuple[int, int]:
    """(resize, crop) of photographs and of the papers; other sets keep their size where that is smaller."""
    paper, photo = roles.role(role).paper, roles.role(role).photo
    if table.name == f"parquet:{photo.get('data')}":
        return photo["pixels"], photo["pixels"]
    resize, crop = paper.get("resize", 256), paper.get("pixels", 224)
    short = crop if table.original else table.short_side()
    return (resize, crop) if table.original or short > crop else (short, short)
