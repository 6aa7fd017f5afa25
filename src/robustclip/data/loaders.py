"""Image data sets that are opened, but not decoded before their rows are asked for: local parquet files, and digits.

Parquet comes in Hugging Face's layout: a folder per set with `test.parquet` (or `test-00000-of-00002.parquet` ...),
`train.parquet` and `classes.json`. `tools/to_parquet.py` makes such folders of what the authors of a set publish.

The training part of photographs is divided by content, so that no picture is in two parts whatever the order or name of
its row: a CLIP is pretrained on one, fine-tuned on another.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor

from robustclip.checks import check_labels
from robustclip.files import file_digest
from robustclip.progress import progress

Raw = bytes | np.ndarray  # an image before decoding: its encoded bytes, or (height, width, 3) pixels
LARGEST = 64_000_000  # pixels of an image that is still decoded: 192 MB
COLUMNS = (
    "rows with `image` (a struct of bytes and path) and `label` (a whole number, the place in classes.json) or "
    "`captions` (a list of at least one text)"
)


@dataclass(frozen=True)
class Table:
    """One split of a data set, opened but not decoded."""

    name: str  # "digits", "parquet:scenes15", or "paper:SUN397" for the papers' own as `tools/to_parquet.py` writes it
    labels: np.ndarray  # (n,) int64
    names: tuple[str, ...]  # of the classes; () where the images have captions
    fetch: Callable[[np.ndarray], Sequence[Raw]]  # rows -> undecoded images
    facts: tuple[str, ...]  # digests of what is in the images' files
    captions: tuple[tuple[str, ...], ...] | None = None  # per image
    place: Callable[[int], str] = "row {}".format  # where a row lies, for messages

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def original(self) -> bool:
        """Whether this is the papers' own data set."""
        return self.name.startswith("paper:")

    def digest(self, *more: str) -> str:
        """Identify the content: labels, names and files, but neither where these lie nor their dates."""
        digest = hashlib.sha256(self.labels.astype("<i8").tobytes())
        digest.update(json.dumps([self.names, self.facts, self.captions, more]).encode())
        return digest.hexdigest()[:16]

    def only(self, rows: np.ndarray) -> "Table":
        """Some of the rows."""
        texts = self.captions and tuple(self.captions[row] for row in rows)
        fetch, place = lambda some: self.fetch(rows[some]), lambda row: self.place(rows[row])
        return replace(self, labels=self.labels[rows], fetch=fetch, place=place, captions=texts)

    @contextmanager
    def image(self, row: int, raw: Raw) -> Iterator[Image.Image]:
        """One image, looked into but not decoded; an error about it names its file and row."""
        try:
            image = Image.fromarray(raw) if isinstance(raw, np.ndarray) else Image.open(io.BytesIO(raw))
            if image.width * image.height > LARGEST:
                raise OSError(f"{image.width} x {image.height} pixels; {LARGEST:,} in all are allowed")
            yield image
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            where = f"{self.place(row)} of {self.name}"
            raise OSError(f"cannot decode {where} ({error}); fetch or make the file again") from error

    def short_side(self) -> int:
        """Pixels of the shorter side of the first image."""
        with self.image(0, self.fetch(np.zeros(1, int))[0]) as image:
            return min(image.size)

    def decode(self, rows: np.ndarray, resize: int, crop: int) -> Tensor:
        """RGB images, resized and cropped, on all processors: float32 (n, 3, crop, crop) in [0, 1]."""
        raws, images = self.fetch(rows), np.empty((len(rows), 3, crop, crop), np.float32)

        def fill(number: int) -> None:
            with self.image(int(rows[number]), raws[number]) as image:
                pixels = np.asarray(fit(image.convert("RGB"), resize, crop))
            np.divide(pixels.transpose(2, 0, 1), np.float32(255), out=images[number])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(progress(pool.map(fill, range(len(rows))), f"decoding {self.name}", len(rows), "image"))
        return torch.from_numpy(images)


def fit(image: Image.Image, resize: int, crop: int) -> Image.Image:
    """Bring the short side to `resize` pixels (bilinear), then cut out the central square of `crop` pixels.

    Of a long thin image only the middle is resized, so that it costs no more memory than another.
    """
    short = min(image.size)
    image = _middle(image, *(min(side, 8 * short) for side in image.size))
    if short != resize:
        image = image.resize([resize * side // short for side in image.size], Image.Resampling.BILINEAR)
    return _middle(image, crop, crop)


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


# --- parquet ----------------------------------------------------------------------------------------------------------


def open_parquet(folder: Path, split: str) -> Table:
    """Open a split's file or all its shards; only the row groups needed are read later."""
    paths = _files(folder, split)
    parts, columns = zip(*map(_opened, paths), strict=True)
    values = pa.chunked_array([chunk for column in columns for chunk in column.chunks])
    groups = [(place, group) for place, part in enumerate(parts) for group in range(part.num_row_groups)]
    ends = np.cumsum([parts[place].metadata.row_group(group).num_rows for place, group in groups])

    def fetch(rows: np.ndarray) -> list[bytes]:
        home, raws = np.searchsorted(ends, rows, side="right"), [b""] * len(rows)
        for number in np.unique(home):
            place, group = groups[number]
            with _reading(paths[place]):
                encoded = parts[place].read_row_group(group, ["image.bytes"]).column(0).combine_chunks().field("bytes")
            for row in np.flatnonzero(home == number):
                raws[row] = encoded[int(rows[row] - ends[number] + len(encoded))].as_py() or b""
        return raws

    def place(row: int) -> str:
        return f"row {row}, in {paths[groups[np.searchsorted(ends, row, side='right')][0]].name}"

    made = [json.loads((part.metadata.metadata or {}).get(b"robustclip", b"{}")) for part in parts]
    name = f"paper:{made[0]['data']}" if made[0] else f"parquet:{folder.name}"
    facts = tuple(one.get("sha256") or file_digest(path) for one, path in zip(made, paths, strict=True))
    if pa.types.is_list(values.type):
        return Table(name, np.arange(len(values)), (), fetch, facts, tuple(map(tuple, values.to_pylist())), place)
    labels, names = values.to_numpy().astype(np.int64), class_names(folder)
    check_labels(torch.from_numpy(labels), len(names))
    return Table(name, labels, names, fetch, facts, place=place)


def divided(folder: Path, split: str, held_back: float) -> Table:
    """A part of photographs: the test part as it is, of the training part those whose place lies in the split's range.

    A picture's place in [0, 1) is read off the sha256 of its bytes. Up to `held_back` it is kept from pretraining: four
    fifths of that are to fine-tune on ("train"), the rest is for "validation". What is also a test image is in no part.
    """
    tested = open_parquet(folder, "test")
    if split == "test":
        return tested
    whole, middle = open_parquet(folder, "train"), 0.8 * held_back
    low, high = {"train": (0, middle), "validation": (middle, held_back), "pretraining": (held_back, 1)}[split]
    seen, digests = set(contents(folder, "test")), contents(folder, "train")
    places = np.array([int.from_bytes(digest[:4], "big") for digest in digests]) / 2**32
    fresh = np.array([digest not in seen for digest in digests])
    rule = f"sha256 in [{low}, {high}), not in test"
    part = whole.only(np.flatnonzero((low <= places) & (places < high) & fresh))
    return replace(part, facts=(*whole.facts, *tested.facts, rule))


def is_original(folder: Path) -> bool:
    """Whether `tools/to_parquet.py` made the folder's first file of the papers' own set."""
    for path in sorted(folder.rglob("*.parquet"))[:1]:
        with _reading(path):
            return b"robustclip" in (parquet.read_metadata(path).metadata or {})
    return False


def contents(folder: Path, split: str) -> list[bytes]:
    """The sha256 of the bytes of each image of a split."""
    return [digest for path in _files(folder, split) for digest in _contents(path, path.stat().st_mtime_ns)]


@lru_cache(maxsize=64)
def _contents(path: Path, changed: int) -> list[bytes]:
    """`contents` of one file; `changed` makes a new file a new one."""
    with _reading(path):
        chunks = parquet.read_table(path, columns=["image"]).column(0).chunks
    return [hashlib.sha256(raw.as_buffer() or b"").digest() for chunk in chunks for raw in chunk.field("bytes")]


def _files(folder: Path, split: str) -> list[Path]:
    """The file of a split, or its shards, all of which must be there."""
    patterns = (f"{split}.parquet", f"{split}-*-of-*.parquet", f"data/{split}-*-of-*.parquet")
    found = next((paths for pattern in patterns if (paths := sorted(folder.glob(pattern)))), [])
    if not found:
        raise FileNotFoundError(f"no {' or '.join(patterns)}")
    if (shards := re.search(r"-of-(\d+)", found[0].name)) and len(found) != int(shards[1]):
        raise FileNotFoundError(f"{len(found)} of {int(shards[1])} files like {found[0].name}")
    return found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"cannot read {path.name} in {path.parent} ({error}); fetch or make it again") from error


def _opened(path: Path) -> tuple[parquet.ParquetFile, pa.ChunkedArray]:
    """A file and its labels or captions, both checked."""
    with _reading(path):
        part = parquet.ParquetFile(path, page_checksum_verification=True)
        types = {field.name: field.type for field in part.schema_arrow}
        target, right = ("captions", pa.types.is_list) if "captions" in types else ("label", pa.types.is_integer)
        image, values = types.get("image", pa.null()), part.read([target])
    good = pa.types.is_struct(image) and image.get_field_index("bytes") >= 0 and target in types and len(values)
    good = good and right(types[target]) and not values.column(0).null_count
    if not good or (target == "captions" and not all(values.column(0).to_pylist())):
        shown = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        raise ValueError(f"{path} has {len(values)} rows of {shown}, some perhaps empty; it needs {COLUMNS}")
    return part, values.column(0)


def class_names(folder: Path) -> tuple[str, ...]:
    """The names listed in a set's `classes.json`."""
    path, listed = folder / "classes.json", 'a list of the names in label order, such as ["cat", "dog"]'
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read class names from {path} ({error}); write {listed}") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"{path} is no list of class names: {str(names)[:60]}; write {listed}")
    return tuple(names)


# --- digits, and the order of rows ------------------------------------------------------------------------------------


def digits(split: str) -> Table:
    """The handwritten digits of scikit-learn, 8 x 8 pixels enlarged to 32 x 32 without inventing values.

    They come without a split: of a fixed shuffle 597 are for training, 200 for validation, the last 1,000 for testing.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    part = {"train": slice(597), "validation": slice(597, 797), "test": slice(797, None)}[split]
    rows = shuffled("digits", len(bunch.target))[part]
    gray = (bunch.images[rows] * (255 / 16)).round().astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    pixels, names = np.stack([gray] * 3, axis=-1), tuple(map(str, bunch.target_names))
    facts = (hashlib.sha256(pixels[:16].tobytes()).hexdigest(),)
    return Table("digits", bunch.target[rows].astype(np.int64), names, lambda rows: pixels[rows], facts)


def shuffled(name: str, rows: int) -> np.ndarray:
    """A fixed order of `rows` rows that depends on `name` only, so that the first n of a sorted set are a fair sample.

    Sorting raw PCG64 output gives the same order under every version of numpy.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return np.argsort(np.random.PCG64(seed).random_raw(rows), kind="stable")
