"""Read image data sets as their authors publish them; which is where and how is in `datasets.toml`.

A reader takes a folder and the options of one split and returns a `Table`. No format needs unpickling: CIFAR is read
from its binary version.
"""

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pyarrow import parquet

from robustclip import _torchvision

Raw = Path | bytes | np.ndarray  # an image: its file, its encoded bytes, or (height, width, 3) pixels
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
DATASETS: dict[str, dict] = tomllib.loads(Path(__file__).with_name("datasets.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Table:
    """One split of a data set, opened."""

    labels: np.ndarray  # (n,) of integers
    names: tuple[str, ...]  # of the classes, as the data set writes them
    fetch: Callable[[np.ndarray], Iterable[Raw]]  # rows -> images
    captions: list[list[str]] | None = None  # per image

    def __len__(self) -> int:
        return len(self.labels)


def read(role: str, downloads: Path, split: str) -> Table:
    """Open a split of the data set behind a role, with its class names as the papers put them into a prompt."""
    options = DATASETS[role] | DATASETS[role][split]
    table = LAYOUTS[options["layout"]](downloads / options["folder"], options)
    return Table(table.labels, class_names(role, table.names), table.fetch, table.captions)


def class_names(role: str, names: Sequence[str]) -> tuple[str, ...]:
    """Class names as the papers put them into a prompt, from names as the data set writes them."""
    options = DATASETS[role]
    known = _imagenet_names() if options.get("names") == "imagenet" else options.get("rename")
    if not known:
        return tuple(_reworded(name, options) for name in names)
    if strange := [name for name in names if name not in known]:
        raise ValueError(f"{role} has no class {strange[0]!r}; remove what does not belong to the data set")
    return tuple(known[name] for name in names)


def _reworded(name: str, options: dict) -> str:
    name = name.lower() if options.get("lower", True) else name
    for pattern, replacement in options.get("names", [["[-_/]", " "]]):
        name = re.sub(pattern, replacement, name)
    return name


def _imagenet_names() -> dict[str, str]:
    """The curated ImageNet names, by WordNet id and by class number."""
    _torchvision.prepare()
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    ids = ImageNetInfo().label_names()
    return dict(zip([*ids, *map(str, range(len(ids)))], IMAGENET_CLASSNAMES * 2, strict=True))


# --- images in files --------------------------------------------------------------------------------------------------


def _text(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _below(folder: Path, under: str) -> Iterable[str]:
    """Paths of all images below `folder / under`, relative to `folder`, sorted."""
    paths = (path for path in (folder / under).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _of_files(folder: Path, images: Sequence[str], labels: Sequence[int], names: Sequence[str], captions=None) -> Table:
    """A table of one file per image; all files must exist."""
    paths = [folder / image for image in images]
    if missing := next((path for path in paths if not path.is_file()), None):
        raise FileNotFoundError(f"no file {missing}")
    return Table(np.array(labels), tuple(names), lambda rows: [paths[row] for row in rows], captions)


def _files(folder: Path, options: dict) -> Table:
    """Images named in a text file, or found below a folder; a regular expression picks path and class."""
    lines = _text(folder / options["list"]) if "list" in options else _below(folder, options["under"])
    found = [match for line in lines if (match := re.fullmatch(options["line"], line))]
    if not found:
        raise FileNotFoundError(f"no images in {folder / (options.get('list') or options['under'])}")
    known = {match["name"] for match in found}  # "0", "1", "10" by number, others by name, whatever their capitals
    names = sorted(known, key=lambda name: (int(name) if name.isdigit() else 0, name.lower()))
    number = {name: label for label, name in enumerate(names)}
    images = [options.get("image", "{image}").format(image=match["image"]) for match in found]
    return _of_files(folder, images, [number[match["name"]] for match in found], names)


def _splits(folder: Path, options: dict) -> Table:
    """A JSON file with rows [path, label, class name] per split."""
    splits = json.loads((folder / options["list"]).read_text(encoding="utf-8"))
    names = {label: name for rows in splits.values() for _, label, name in rows}
    images, labels, _ = zip(*splits[options["name"]], strict=True)
    return _of_files(folder / options["under"], images, labels, [names[label] for label in sorted(names)])


def _flowers(folder: Path, options: dict) -> Table:
    """Flowers102: labels and split in two MATLAB files, names as listed by torchvision."""
    from scipy.io import loadmat

    _torchvision.prepare()
    from torchvision.datasets import Flowers102

    labels = loadmat(folder / "imagelabels.mat")["labels"].ravel().astype(int) - 1
    ids = loadmat(folder / "setid.mat")[options["name"]].ravel().astype(int)
    return _of_files(folder, [f"jpg/image_{i:05d}.jpg" for i in ids], labels[ids - 1], Flowers102.classes)


def _coco(folder: Path, options: dict) -> Table:
    """MSCOCO 2014 with Karpathy's split file."""
    entries = json.loads((folder / "dataset_coco.json").read_text(encoding="utf-8"))["images"]
    entries = [entry for entry in entries if entry["split"] == options["name"]]
    captions = [[sentence["raw"].strip() for sentence in entry["sentences"]] for entry in entries]
    images = [f"{entry['filepath']}/{entry['filename']}" for entry in entries]
    return _of_files(folder, images, range(len(images)), (), captions)


# --- images in arrays -------------------------------------------------------------------------------------------------


def _of_pixels(pixels: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Table:
    """A table of decoded images (n, height, width, 3)."""
    return Table(labels.astype(np.int64), tuple(names), lambda rows: (np.array(pixels[row]) for row in rows))


def _bytes(path: Path, record: int) -> np.ndarray:
    """A binary file as rows of `record` bytes, not read before they are used."""
    if (size := path.stat().st_size) == 0 or size % record:
        raise OSError(f"{path.name} has {size} bytes, not a multiple of {record}: it was cut short; fetch it again")
    return np.memmap(path, np.uint8, "r").reshape(-1, record)


def _cifar(folder: Path, options: dict) -> Table:
    """CIFAR's binary version: records of label bytes (the last one counts) and 3 x 32 x 32 pixels."""
    before = options["label_bytes"]
    records = np.concatenate([_bytes(folder / name, before + 3072) for name in options["files"]])
    pixels = records[:, before:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _of_pixels(pixels, records[:, before - 1], _text(folder / options["names_file"]))


def _stl10(folder: Path, options: dict) -> Table:
    """STL-10: pixels column by column, labels from 1."""
    images, labels = (folder / f"{options['name']}_{part}.bin" for part in "Xy")
    pixels = _bytes(images, 3 * 96 * 96).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    return _of_pixels(pixels, _bytes(labels, 1).ravel() - 1, _text(folder / "class_names.txt"))


def _pcam(folder: Path, options: dict) -> Table:
    """PatchCamelyon: two HDF5 files."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError("PatchCamelyon comes as HDF5, which needs h5py; pip install h5py") from error
    images, labels = (folder / options[part] for part in ("images", "labels"))
    if missing := next((path for path in (images, labels) if not path.is_file()), None):
        raise FileNotFoundError(f"no file {missing}")
    return _of_pixels(h5py.File(images)["x"], h5py.File(labels)["y"][:].ravel(), ("0", "1"))


def _parquet(folder: Path, options: dict) -> Table:
    """A data set of the Hugging Face hub: all shards, with class names in the schema."""
    paths = sorted(folder.glob(options["files"]))
    if not paths or len(paths) != int(re.search(r"-of-(\d+)", paths[0].name)[1]):
        raise FileNotFoundError(f"{len(paths)} files {options['files']} in {folder}, not all there are")
    whole = parquet.read_table(paths, columns=["image", "label"])
    features = json.loads(whole.schema.metadata[b"huggingface"])["info"]["features"]
    images = whole.column("image")
    fetch = lambda rows: (images[int(row)].as_py()["bytes"] for row in rows)  # noqa: E731
    return Table(whole.column("label").to_numpy(), tuple(features["label"]["names"]), fetch)


_READERS = (_cifar, _coco, _files, _flowers, _parquet, _pcam, _splits, _stl10)
LAYOUTS: dict[str, Callable[[Path, dict], Table]] = {reader.__name__[1:]: reader for reader in _READERS}
