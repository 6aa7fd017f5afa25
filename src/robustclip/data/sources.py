"""Labeled images from anywhere behind one call: `load_samples(role, source, split, n)`.

    source       what plays the role
    tinyworld    pictures drawn by code (the default)
    digits       the handwritten digits of scikit-learn; always plays the role `digits`
    parquet      files in Hugging Face's layout below the folder ROBUSTCLIP_DATA; "parquet:FOLDER" names another set
    paper        the papers' own data below the folder ROBUSTCLIP_TORCHVISION

Only `paper` ever downloads, and only with ROBUSTCLIP_DOWNLOAD=1 or `download=True`; HF_HUB_OFFLINE=1 forbids it.
"""

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustclip import _torchvision
from robustclip.checks import check_choice, check_folder, check_images, check_integer, check_labels
from robustclip.classes import Classes
from robustclip.data import loaders, roles
from robustclip.data.loaders import Table
from robustclip.data.roles import SPLITS, Role

SOURCES = ("tinyworld", "digits", "parquet", "paper")
ROOT = "~/.cache/robustclip"  # where the papers' data lies unless ROBUSTCLIP_TORCHVISION says otherwise
LAYOUT = "a folder per data set with test.parquet (or test-00000-of-00002.parquet ...), train.parquet and classes.json"

log = logging.getLogger(__name__)


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
    role: str, source: str = "tinyworld", split: str = "test", n: int | None = 1000, start: int = 0,
    download: bool | None = None,
) -> Samples:  # fmt: skip
    """Rows `start:start + n` of a role's split, all from `start` on with n=None, fewer where the set ends before.

    Real sets are put in a fixed random order first, so that every n is a fair sample and smaller ones are nested.
    `download` allows or forbids a download for source "paper"; None leaves that to ROBUSTCLIP_DOWNLOAD.
    """
    entry = roles.role(role)
    kind, _, place = source.partition(":")
    check_choice("source", kind, SOURCES)
    check_choice("split", split, SPLITS)
    check_integer("start", start, 0)
    if n is not None:
        check_integer("n", n, 1)
    if role == "digits":
        played = _Played(loaders.digits(split), "digits", entry.classes, entry.prompts, 32, 32)
        return _decoded(played, entry, split, n, start)
    if kind == "digits":
        raise ValueError(f"source 'digits' plays the role 'digits' only, not {role!r}; take tinyworld, parquet, paper")
    if kind == "tinyworld":
        return _tinyworld(entry, split, n, start)
    played = _parquet(entry, place, split) if kind == "parquet" else _paper(entry, split, download)
    return _decoded(played, entry, split, n, start)


@dataclass(frozen=True)
class _Played:
    """An opened data set in a role."""

    table: Table
    source: str
    classes: Sequence[str]
    prompts: Sequence[str]
    resize: int
    crop: int


def _decoded(played: _Played, entry: Role, split: str, n: int | None, start: int) -> Samples:
    """Decode the rows asked for."""
    table, classes, prompts = played.table, played.classes, played.prompts
    if start >= len(table):
        last = len(table) - 1
        raise ValueError(f"start={start} is out of range; split {split!r} of {played.source} has rows 0 to {last}")
    rows = loaders.shuffled(entry.name, len(table))[start:][:n]
    images = loaders.decode(table.fetch(rows), played.resize, played.crop, played.source)
    labels, captions = torch.from_numpy(table.labels[rows]), None
    if table.captions is not None:
        count = min(map(len, table.captions))
        captions = tuple(caption for row in rows for caption in table.captions[row][:count])
        labels, classes, prompts = torch.arange(len(rows)), captions[::count], captions[::count]
    digest = table.digest(entry.name, split)
    return Samples(images, labels, Classes(classes, prompts), played.source, digest, captions)


# --- Tinyworld --------------------------------------------------------------------------------------------------------


def _tinyworld(entry: Role, split: str, n: int | None, start: int) -> Samples:
    if n is None:
        raise ValueError("n=None is not allowed for source 'tinyworld', which draws without end; give a number")
    images, labels, _, captions = roles.tinyworld_samples(entry.name, split, n, start)
    digest = _tinyworld_digest(entry.name, split)
    return Samples(images.float().div_(255), labels, entry.classes, "tinyworld", digest, captions)


@cache
def _tinyworld_digest(role: str, split: str) -> str:
    """Digest of a role's first drawn chunk: changes when the renderer, the classes or the captions change."""
    images, labels, classes, captions = roles.tinyworld_samples(role, split, 64, 0)
    digest = hashlib.sha256(images.numpy().tobytes())
    digest.update(repr([role, split, labels.tolist(), classes, captions]).encode())
    return digest.hexdigest()[:16]


# --- local parquet ----------------------------------------------------------------------------------------------------


def _parquet(entry: Role, place: str, split: str) -> _Played:
    """A set with its own classes in the role's prompt. Images keep their size where that is at most the role's."""
    folder = _parquet_folder(entry, place)
    patterns = [f"{split}.parquet", f"{split}-*-of-*.parquet", f"data/{split}-*-of-*.parquet"]
    try:
        table = loaders.LAYOUTS["parquet"](folder, {"files": patterns})
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"role {entry.name!r} at source 'parquet' needs split {split!r}: {error} (looked in {folder}); expected "
            f"{LAYOUT}; source='parquet:FOLDER' lets another set play the role"
        ) from error
    short, size = min(loaders.open_image(table.fetch(np.zeros(1, int))[0]).size), _size(entry)
    size = (short, short) if short <= size[1] else size
    template = entry.paper.get("template", entry.template)
    return _Played(table, f"parquet:{folder.name}", table.names, [*map(template.format, table.names)], *size)


def _parquet_folder(entry: Role, place: str) -> Path:
    """The folder that `place` names, or the one that plays the role."""
    folder = Path(place or entry.paper.get("stand_in", entry.name)).expanduser()
    if folder.is_absolute():
        return folder
    root = os.environ.get("ROBUSTCLIP_DATA")
    if not root:
        raise FileNotFoundError(
            f"role {entry.name!r} at source 'parquet' needs the environment variable ROBUSTCLIP_DATA: {LAYOUT}, "
            f"here {folder}; or give the folder itself, as in source='parquet:/data/{folder}'"
        )
    return Path(root).expanduser() / folder


def _size(entry: Role) -> tuple[int, int]:
    """(resize, crop) of the papers' preprocessing."""
    return entry.paper.get("resize", 256), entry.paper.get("pixels", 224)


# --- the papers' own data ---------------------------------------------------------------------------------------------


def _paper(entry: Role, split: str, download: bool | None) -> _Played:
    """The set the papers used, with their class names and prompts; fetched first where that is allowed."""
    paper = entry.paper
    if split not in paper:
        have = " or ".join(name for name in SPLITS if name in paper)
        raise ValueError(f"{paper['data']} has no split {split!r}, the papers test on: {paper['split']}; choose {have}")
    table = _paper_table(paper, split, download)
    if split == "test" and len(table) != paper["test_images"]:
        log.warning("%s has %d test images here, in the papers %d", paper["data"], len(table), paper["test_images"])
    classes = class_names(paper, table.names)
    prompts = paper.get("prompts") or [paper["template"].format(name) for name in classes]
    return _Played(table, f"paper:{paper['data']}", classes, prompts, *_size(entry))


def _paper_table(paper: dict, split: str, download: bool | None) -> Table:
    """Open a split; where files are missing, fetch them first."""
    options, read = paper | paper[split], loaders.LAYOUTS[paper["layout"]]
    try:
        return read(_paper_folder(paper), options)
    except FileNotFoundError as missing:
        _fetch(paper, options, missing, download)
    try:
        return read(_paper_folder(paper), options)
    except FileNotFoundError as missing:
        what = f"{paper['data']} is incomplete after its download: {missing}"
        raise FileNotFoundError(f"{what}; delete what is there and try again") from missing


def class_names(paper: dict, names: Sequence[str]) -> tuple[str, ...]:
    """Class names as the papers put them into a prompt, from names as the data set writes them."""
    known = _imagenet_names() if paper.get("names") == "imagenet" else paper.get("rename")
    if not known:
        return tuple(_reworded(name, paper) for name in names)
    if strange := [name for name in names if name not in known]:
        raise ValueError(f"{paper['data']} has no class {strange[0]!r}; remove what does not belong to the data set")
    return tuple(known[name] for name in names)


def _reworded(name: str, paper: dict) -> str:
    name = name.lower() if paper.get("lower", True) else name
    for pattern, replacement in paper.get("names", [["[-_/]", " "]]):
        name = re.sub(pattern, replacement, name)
    return name


def _imagenet_names() -> dict[str, str]:
    """The curated ImageNet names, by WordNet id and by class number."""
    _torchvision.prepare()
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    ids = ImageNetInfo().label_names()
    return dict(zip([*ids, *map(str, range(len(ids)))], IMAGENET_CLASSNAMES * 2, strict=True))


def _root() -> Path:
    return Path(os.environ.get("ROBUSTCLIP_TORCHVISION") or ROOT).expanduser()


def _paper_folder(paper: dict) -> Path:
    if "hub" not in paper:
        return _root() / paper["folder"]
    try:
        return _hub_folder(paper, ["*"], local_files_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no copy of {paper['hub']} at revision {paper['revision']}") from None


def _hub_folder(paper: dict, files: list[str], local_files_only: bool = False) -> Path:
    """The local copy of a data set of the Hugging Face hub at its pinned revision."""
    from huggingface_hub import snapshot_download

    place = {"repo_type": "dataset", "revision": paper["revision"], "cache_dir": os.environ.get("HF_HUB_CACHE")}
    return Path(snapshot_download(paper["hub"], allow_patterns=files, local_files_only=local_files_only, **place))


def _fetch(paper: dict, options: dict, missing: Exception, download: bool | None) -> None:
    """Download a data set if that is allowed; otherwise say what is missing, how large it is and how to get it."""
    size = f"{paper['bytes'] / 1e9:.2g} GB" if "bytes" in paper else "size unknown"
    place = "the Hugging Face cache (HF_HUB_CACHE)" if "hub" in paper else f"{_root()} (ROBUSTCLIP_TORCHVISION)"
    what, absent = f"{paper['data']} ({size})", f"{paper['data']} ({size}) is not in {place}: {missing}"
    if paper["source"] == "manual":
        raise FileNotFoundError(f"{absent}; get it from {paper['site']}, put it into {paper['folder']} there")
    if not (os.environ.get("ROBUSTCLIP_DOWNLOAD") == "1" if download is None else download):
        raise FileNotFoundError(f"{absent}; put it there, or set ROBUSTCLIP_DOWNLOAD=1 or pass download=True")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise OSError(f"{absent}; HF_HUB_OFFLINE forbids its download: unset it, or copy the set there")
    log.warning("downloading %s to %s", what, place)
    try:
        _download(paper, options)
    except (OSError, RuntimeError) as error:
        remedy = "check the connection and the free disk space, or copy the set there from another machine"
        raise OSError(f"{what} could not be downloaded to {place} ({error}); {remedy}") from error


def _download(paper: dict, options: dict) -> None:
    """Fetch and unpack one data set, with the progress bars of the library that does it."""
    if "hub" in paper:
        _hub_folder(paper, options["files"])
        return
    _torchvision.prepare()
    from torchvision import datasets

    root = check_folder(_root(), free_megabytes=2 * paper["bytes"] / 1e6)  # the archive and what it holds
    if "torchvision" in paper:
        getattr(datasets, paper["torchvision"])(root, download=True, **paper.get("options", {}))
    else:
        datasets.utils.download_and_extract_archive(paper["url"], str(root), md5=paper.get("md5"))
