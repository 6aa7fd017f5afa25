"""Open image data sets in the formats their authors publish; nothing is decoded before its row is asked for.

A reader takes a folder and the options of one split (see `assets/paper-roles.toml`) and returns a `Table`. No format
needs unpickling: CIFAR is read from its binary version.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robustclip import _torchvision
from robustclip.progress import progress

Raw = Path | bytes | np.ndarray  # an image before decoding: its file, its encoded bytes, or (height, width, 3) pixels
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Table:
    """One split of a data set, opened but not decoded."""

    labels: np.ndarray  # (n,) int64
    names: tuple[str, ...]  # of the classes, as the data set writes them
    fetch: Callable[[np.ndarray], Sequence[Raw]]  # rows -> undecoded images
    facts: tuple  # what identifies the content: sizes, names inside the data set, file footers
    captions: tuple[tuple[str, ...], ...] | None = None  # per image

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self, *more: str) -> str:
        """Identify the content, cheaply: labels, names and `facts`, but neither where the files lie nor their dates."""
        digest = hashlib.sha256(self.labels.astype("<i8").tobytes())
        digest.update(json.dumps([self.names, self.facts, self.captions, more]).encode())
        return digest.hexdigest()[:16]


# --- pixels -----------------------------------------------------------------------------------------------------------


def open_image(raw: Raw) -> Image.Image:
    """The image behind one `Raw`; files and bytes are only looked into, not decoded."""
    if isinstance(raw, np.ndarray):
        return Image.fromarray(raw)
    return Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw)


def fit(image: Image.Image, resize: int, crop: int) -> Image.Image:
    """Bring the short side to `resize` pixels (bilinear), then cut out the central square of `crop` pixels."""
    width, height = image.size
    short = min(width, height)
    if short != resize:
        width, height = resize * width // short, resize * height // short
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    return image if (width, height) == (crop, crop) else image.crop((left, top, left + crop, top + crop))


def decode(raws: Sequence[Raw], resize: int, crop: int, what: str = "images") -> Tensor:
    """Decode to RGB, resize and crop, on all processors: float32 (n, 3, crop, crop) in [0, 1]."""
    images = np.empty((len(raws), 3, crop, crop), np.float32)

    def fill(row: int) -> None:
        raw = raws[row]
        try:
            pixels = np.asarray(fit(open_image(raw).convert("RGB"), resize, crop))
        except OSError as error:
            place = raw.name if isinstance(raw, Path) else "a row"
            raise OSError(f"cannot decode {place} of {what} ({error}); fetch the data set again") from error
        np.divide(pixels.transpose(2, 0, 1), np.float32(255), out=images[row])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(progress(pool.map(fill, range(len(raws))), f"decoding {what}", len(raws), "image"))
    return torch.from_numpy(images)


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
    facts = tuple((image, path.stat().st_size) for image, path in zip(images, paths, strict=True))
    return Table(np.array(labels, dtype=np.int64), tuple(names), lambda rows: [paths[r] for r in rows], facts, captions)


def _files(folder: Path, options: dict) -> Table:
    """Images named in a text file, or found below a folder; a regular expression picks path and class."""
    lines = _text(folder / options["list"]) if "list" in options else _below(folder, options["under"])
    found = [match for line in lines if (match := re.fullmatch(options["line"], line))]
    if not found:
        raise FileNotFoundError(f"no images in {options.get('list') or options['under']!r}")
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
    captions = tuple(tuple(sentence["raw"].strip() for sentence in entry["sentences"]) for entry in entries)
    images = [f"{entry['filepath']}/{entry['filename']}" for entry in entries]
    return _of_files(folder, images, range(len(images)), (), captions)


# --- images in arrays -------------------------------------------------------------------------------------------------


def _of_pixels(pixels: np.ndarray, labels: np.ndarray, names: Sequence[str], files: Sequence[Path] = ()) -> Table:
    """A table of decoded images (n, height, width, 3)."""
    sample = hashlib.sha256(np.ascontiguousarray(pixels[:16])).hexdigest()
    facts = (sample, *((path.name, path.stat().st_size) for path in files))
    return Table(labels.astype(np.int64), tuple(names), lambda rows: [np.array(pixels[r]) for r in rows], facts)


def _bytes(path: Path, record: int) -> np.ndarray:
    """A binary file as rows of `record` bytes, not read before they are used."""
    if (size := path.stat().st_size) == 0 or size % record:
        raise OSError(f"{path.name} has {size} bytes, not a multiple of {record}: it was cut short; fetch it again")
    return np.memmap(path, np.uint8, "r").reshape(-1, record)


def _cifar(folder: Path, options: dict) -> Table:
    """CIFAR's binary version: records of label bytes (the last one counts) and 3 x 32 x 32 pixels."""
    before = options["label_bytes"]
    paths = [folder / name for name in options["files"]]
    records = np.concatenate([_bytes(path, before + 3072) for path in paths])
    pixels = records[:, before:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _of_pixels(pixels, records[:, before - 1], _text(folder / options["names_file"]), paths)


def _stl10(folder: Path, options: dict) -> Table:
    """STL-10: pixels column by column, labels from 1."""
    images, labels = (folder / f"{options['name']}_{part}.bin" for part in "Xy")
    pixels = _bytes(images, 3 * 96 * 96).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    return _of_pixels(pixels, _bytes(labels, 1).ravel() - 1, _text(folder / "class_names.txt"), (images, labels))


def _pcam(folder: Path, options: dict) -> Table:
    """PatchCamelyon: two HDF5 files."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError("PatchCamelyon comes as HDF5, which needs h5py; pip install h5py") from error
    paths = [folder / options[part] for part in ("images", "labels")]
    labels = h5py.File(paths[1])["y"][:].ravel()
    return _of_pixels(h5py.File(paths[0])["x"], labels, ("0", "1"), paths)


def digits(split: str) -> Table:
    """The handwritten digits of scikit-learn, 8 x 8 pixels enlarged to 32 x 32 without inventing values.

    They come without a split: of a fixed shuffle 597 are for training, 200 for validation, the last 1,000 for testing.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    part = {"train": slice(597), "validation": slice(597, 797), "test": slice(797, None)}[split]
    rows = shuffled("digits", len(bunch.target))[part]
    gray = (bunch.images[rows] * (255 / 16)).round().astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    return _of_pixels(np.stack([gray] * 3, axis=-1), bunch.target[rows], [str(name) for name in bunch.target_names])


# --- images in parquet ------------------------------------------------------------------------------------------------


def _parquet_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files of the first pattern that matches; every shard must be there."""
    found = next((paths for pattern in patterns if (paths := sorted(folder.glob(pattern)))), [])
    if not found:
        raise FileNotFoundError(f"no {' or '.join(patterns)} in {folder.name}")
    if (shards := re.search(r"-of-(\d+)", found[0].name)) and len(found) != int(shards[1]):
        raise FileNotFoundError(f"{len(found)} of {int(shards[1])} files {patterns[0]} in {folder.name}")
    return found


def _footer(path: Path) -> str:
    """Digest of a parquet file's footer, which holds the size and place of every column chunk."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(file.read(length)).hexdigest()


def _column(names: Sequence[str], wanted: Sequence[str], path: Path) -> str:
    for name in wanted:
        if name in names:
            return name
    raise ValueError(f"{path.name} has columns {', '.join(names)}; it needs one of {', '.join(wanted)}")


def _class_names(folder: Path, schema, label: str) -> tuple[str, ...]:
    """Names from `classes.json`, or from the features that `datasets` writes into the schema."""
    if (listed := folder / "classes.json").is_file():
        return tuple(json.loads(listed.read_text(encoding="utf-8")))
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(label, {}).get("names")
    if not names:
        raise ValueError(f"no class names in {folder.name}; add classes.json, a list of the names in label order")
    return tuple(names)


def _parquet(folder: Path, options: dict) -> Table:
    """Hugging Face layout: `image` {bytes, path} and `label` or `captions`; only the row groups needed are read."""
    from pyarrow import ArrowInvalid, parquet

    paths = _parquet_files(folder, options["files"])
    try:
        parts = [parquet.ParquetFile(path) for path in paths]
    except ArrowInvalid as error:
        raise OSError(f"cannot read {' or '.join(path.name for path in paths)} ({error}); fetch it again") from error
    schema = parts[0].schema_arrow
    image = _column(schema.names, ("image", "img"), paths[0])
    target = _column(schema.names, ("label", "fine_label", "captions"), paths[0])
    targets = [value for part in parts for value in part.read([target]).column(0).to_pylist()]
    groups = [(part, group) for part in parts for group in range(part.num_row_groups)]
    ends = np.cumsum([part.metadata.row_group(group).num_rows for part, group in groups])

    def fetch(rows: np.ndarray) -> list[bytes]:
        home, raws = np.searchsorted(ends, rows, side="right"), [b""] * len(rows)
        for number in np.unique(home):
            part, group = groups[number]
            encoded = part.read_row_group(group, [f"{image}.bytes"]).column(0).combine_chunks().field("bytes")
            first = ends[number] - len(encoded)
            for place in np.flatnonzero(home == number):
                raws[place] = encoded[int(rows[place] - first)].as_py() or b""
        return raws

    facts = tuple((path.stat().st_size, _footer(path)) for path in paths)
    if target == "captions":
        captions = tuple(tuple(value) for value in targets)
        return Table(np.arange(len(captions)), (), fetch, facts, captions)
    return Table(np.array(targets, dtype=np.int64), _class_names(folder, schema, target), fetch, facts)


_READERS = (_cifar, _coco, _files, _flowers, _parquet, _pcam, _splits, _stl10)
LAYOUTS: dict[str, Callable[[Path, dict], Table]] = {reader.__name__[1:]: reader for reader in _READERS}


def shuffled(name: str, rows: int) -> np.ndarray:
    """A fixed order of `rows` rows that depends on `name` only, so that the first n of a sorted set are a fair sample.

    Sorting raw PCG64 output gives the same order under every version of numpy.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return np.argsort(np.random.PCG64(seed).random_raw(rows), kind="stable")
