"""Data sources: local parquet, digits, Tinyworld, and the one call that reads them all."""

import dataclasses
import hashlib
import io
import json
import os
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from robustclip import _torchvision
from robustclip.classes import Classes
from robustclip.data import loaders, roles
from robustclip.data.sources import Samples, facts, load_samples

COLORS = ((230, 30, 30), (30, 230, 30), (30, 30, 230), (230, 230, 30))
NAMES = ["red", "green", "blue", "yellow"]


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch):
    """Not the user's data."""
    monkeypatch.delenv("ROBUSTCLIP_DATA", raising=False)


def encoded(color: int, size=(24, 24), form="PNG", mode="RGB") -> bytes:
    Image.new("RGB", size, COLORS[color]).convert(mode).save(buffer := io.BytesIO(), form)
    return buffer.getvalue()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def colors(images: torch.Tensor) -> list[int]:
    """Which of COLORS fills each image."""
    means = images.mean((2, 3)) * 255
    distances = (means[:, None] - torch.tensor(COLORS, dtype=torch.float32)).abs().amax(2)
    assert distances.amin(1).max() < 4
    return distances.argmin(1).tolist()


def check(samples: Samples, size: int) -> None:
    assert samples.images.dtype == torch.float32
    assert samples.images.shape[1:] == (3, size, size)
    assert 0 <= samples.images.min() <= samples.images.max() <= 1
    assert samples.labels.dtype == torch.int64
    assert 0 <= samples.labels.min() <= samples.labels.max() < len(samples.classes)
    assert len(samples.classes) == len(samples.prompts)


# --- local parquet ----------------------------------------------------------------------------------------------------


def write_parquet(path: Path, labels: list, images: list[bytes] | None = None, columns=("image", "label")) -> None:
    """Hugging Face layout, three rows a group; images show their label's color unless given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = images or [encoded(label) for label in labels]
    rows = [{"bytes": image, "path": f"{place}.png"} for place, image in enumerate(images)]
    parquet.write_table(pa.table({columns[0]: rows, columns[1]: labels}), path, row_group_size=3)


def write_shards(folder: Path, labels: list[int], shards: int, split: str = "test") -> None:
    for number in range(shards):
        write_parquet(folder / f"{split}-{number:05d}-of-{shards:05d}.parquet", labels[number::shards])


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """A set of four classes, sorted by class."""
    monkeypatch.setenv("ROBUSTCLIP_DATA", str(tmp_path))
    place = tmp_path / "cifar10"
    write_parquet(place / "test.parquet", sorted([0, 1, 2, 3] * 10))
    write(place / "classes.json", json.dumps(NAMES))
    return place


def test_parquet(folder):
    samples = load_samples("cifar10", "parquet")
    check(samples, 32)
    assert len(samples) == 40
    assert colors(samples.images) == samples.labels.tolist()
    assert samples.classes.names == tuple(NAMES)
    assert samples.prompts[0] == "This is a photo of a red"
    assert samples.source == "parquet:cifar10"
    assert set(load_samples("cifar10", "parquet", n=16).labels.tolist()) == {0, 1, 2, 3}  # though sorted by class


@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 50), start=st.integers(0, 39))
def test_any_rows_are_rows_of_the_whole(n, start):
    """Rows across shards and row groups keep their labels, and every selection is a slice of one fixed order."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as temporary:
        patch.setenv("ROBUSTCLIP_DATA", temporary)
        write_shards(Path(temporary, "scenes15", "data"), [0, 1, 2, 3] * 10, 2)
        write(Path(temporary, "scenes15", "classes.json"), json.dumps(NAMES))
        whole = load_samples("sun397", "parquet", n=None)
        part = load_samples("sun397", "parquet", n=n, start=start)
    assert colors(part.images) == part.labels.tolist()
    assert torch.equal(part.labels, whole.labels[start : start + n])
    assert part.digest == whole.digest
    assert part.source == "parquet:scenes15"


def test_a_folder_of_the_roles_name_goes_before_that_of_the_photographs(folder, tmp_path):
    folder.rename(tmp_path / "scenes15")
    assert load_samples("sun397", "parquet", n=2).source == "parquet:scenes15"
    write_parquet(tmp_path / "sun397/test.parquet", [0])
    write(tmp_path / "sun397/classes.json", '["abbey"]')
    assert load_samples("sun397", "parquet").classes.names == ("abbey",)


def test_digest_follows_the_content(folder, tmp_path):
    before = load_samples("cifar10", "parquet").digest
    assert load_samples("cifar10", "parquet", n=3).digest == before
    (tmp_path / "moved").mkdir()
    folder.rename(tmp_path / "moved/cifar10")
    os.utime(tmp_path / "moved/cifar10/test.parquet", (0, 0))
    assert load_samples("cifar10", f"parquet:{tmp_path / 'moved/cifar10'}").digest == before
    assert load_samples("stl10", "parquet:moved/cifar10").digest != before  # another role
    path = tmp_path / "moved/cifar10/test.parquet"
    whole, place = path.read_bytes(), path.read_bytes().index(b"IDAT") + 8
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])  # not a byte longer
    assert facts("cifar10", "parquet:moved/cifar10")["digest"] != before


@pytest.mark.parametrize("role", ["cifar10", "coco"])
def test_facts_are_those_of_the_samples(role):
    samples, told = load_samples(role, n=3), facts(role)
    assert told == {
        "source": samples.source,
        "digest": samples.digest,
        "names": samples.classes.names,
        "prompts": samples.prompts,
        "rows": None,
    }
    assert facts("digits", split="train")["rows"] == 597
    assert facts("digits")["names"] == roles.role("digits").classes.names


def test_facts_of_parquet_decode_nothing(folder, monkeypatch):
    samples = load_samples("cifar10", "parquet")
    write_parquet(folder / "train.parquet", [["a"], ["b", "c"]], [b"", b""], columns=("image", "captions"))
    monkeypatch.setattr(loaders.Table, "image", lambda *_: pytest.fail("looked into an image"))
    told = facts("cifar10", "parquet")
    assert (told["source"], told["digest"], told["rows"]) == (samples.source, samples.digest, 40)
    assert (told["names"], told["prompts"]) == (samples.classes.names, samples.prompts)
    assert facts("coco", "parquet:cifar10", "train") | {"digest": ""} == {
        "source": "parquet:cifar10", "digest": "", "names": (), "prompts": (), "rows": 2,
    }  # fmt: skip


def test_images_of_many_sizes_and_modes_become_alike(folder):
    images = [
        encoded(0, (40, 30)),
        encoded(1, (20, 90)),
        encoded(2, (30, 30), mode="RGB", form="JPEG"),
        encoded(3, (300, 50), "PNG"),
    ]
    write_parquet(folder / "test.parquet", [0, 1, 2, 3], images)
    samples = load_samples("stl10", "parquet:cifar10")
    assert samples.images.shape == (4, 3, 30, 30)
    assert colors(samples.images) == samples.labels.tolist()
    write_parquet(folder / "test.parquet", [0, 1], [encoded(0, (400, 300)), encoded(1, (260, 500))])
    assert load_samples("pets", "parquet:cifar10").images.shape == (2, 3, 224, 224)
    write_parquet(folder / "test.parquet", [0, 1], [encoded(0, mode="L"), encoded(1, mode="P")])
    gray = load_samples("stl10", "parquet:cifar10").images
    assert gray.shape == (2, 3, 24, 24)


def test_captions(folder):
    captions = [[f"{color} first", f"{color} second"] + ["third"] * (color == 1) for color in range(3)]
    images = [encoded(color) for color in range(3)]
    write_parquet(folder / "test.parquet", captions, images, columns=("image", "captions"))
    samples = load_samples("coco", "parquet:cifar10", n=2)
    assert [int(caption[0]) for caption in samples.captions[::2]] == colors(samples.images)
    assert samples.prompts == samples.captions[::2]
    assert len(samples.captions) == 4


def test_same_rows_as_the_datasets_library(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    write_shards(folder / "data", [0, 1, 2, 3] * 5, 2)
    (folder / "test.parquet").unlink()
    theirs = datasets.load_dataset(
        "parquet", data_files={"test": str(folder / "data/test-*")}, split="test", cache_dir=str(tmp_path / "cache")
    ).cast_column("image", datasets.Image())
    order = loaders.shuffled("stl10", len(theirs))
    ours = load_samples("stl10", "parquet:cifar10")
    for row, image, label in zip(order, ours.images, ours.labels, strict=True):
        assert label == theirs[int(row)]["label"]
        assert np.array_equal((image * 255).numpy().round(), np.asarray(theirs[int(row)]["image"]).transpose(2, 0, 1))


# --- photographs, whose training part is divided by content -----------------------------------------------------------

PARTS = ("train", "validation", "pretraining", "test")


def pixel(red: int, green: int) -> bytes:
    Image.new("RGB", (8, 8), (red, green, 0)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def content(samples: Samples) -> list[tuple[int, int]]:
    """Red and green of every image, which tell it from all others."""
    return [tuple(pair) for pair in (samples.images[:, :2, 0, 0] * 255).round().int().tolist()]


@pytest.fixture
def photographs(monkeypatch, tmp_path) -> Path:
    """A set in which ten training images are test images, and ten come twice."""
    monkeypatch.setenv("ROBUSTCLIP_DATA", str(tmp_path))
    train = [pixel(0, green) for green in range(200)] + [pixel(1, green) for green in range(200)]
    train += train[100:110]
    test = [pixel(0, green) for green in range(10)] + [pixel(2, green) for green in range(30)]
    write_parquet(tmp_path / "cifar10/train.parquet", [place % 2 for place in range(len(train))], train)
    write_parquet(tmp_path / "cifar10/test.parquet", [0] * len(test), test)
    write(tmp_path / "cifar10/classes.json", '["even", "odd"]')
    return tmp_path / "cifar10"


def test_no_photograph_is_in_two_parts(photographs):
    found = {split: content(load_samples("cifar10", "parquet", split, n=None)) for split in PARTS}
    known = [set(part) for part in found.values()]
    assert len(set.union(*known)) == sum(map(len, known)) == 400 + 30
    assert {(0, green) for green in range(10)} <= known[3]
    assert sum(map(len, found.values())) == 400 + 30 + 10  # a picture that comes twice is in one part, twice
    counts = {split: len(part) / 390 for split, part in found.items()}
    assert 0.32 < counts["train"] < 0.48
    assert 0.05 < counts["validation"] < 0.15
    assert 0.42 < counts["pretraining"] < 0.58


def test_a_photograph_is_in_the_part_that_its_content_says(photographs):
    for split, low, high in (("train", 0, 0.4), ("validation", 0.4, 0.5), ("pretraining", 0.5, 1)):
        for red, green in content(load_samples("cifar10", "parquet", split, n=None)):
            assert low <= int(hashlib.sha256(pixel(red, green)).hexdigest()[:8], 16) / 2**32 < high
    before = [content(load_samples("cifar10", "parquet", split, n=None)) for split in PARTS]
    whole = parquet.read_table(photographs / "train.parquet")
    parquet.write_table(whole.take(np.arange(len(whole))[::-1]), photographs / "train.parquet")
    after = [content(load_samples("cifar10", "parquet", split, n=None)) for split in PARTS]
    assert [set(part) for part in after] == [set(part) for part in before]  # whatever the order of the rows


def test_labels_and_captions_stay_with_photographs_in_every_part(photographs):
    train = load_samples("cifar10", "parquet", "train", n=None)
    assert train.labels.tolist() == [green % 2 for _, green in content(train)]
    table = loaders.open_parquet(photographs, "train")
    texts = tuple((f"text {row}",) for row in range(len(table)))
    part = dataclasses.replace(table, captions=texts).only(np.array([7, 3]))
    assert (part.captions, part.place(1), len(part)) == ((("text 7",), ("text 3",)), table.place(3), 2)


def test_the_digest_of_a_part_names_its_rule(photographs, monkeypatch):
    parts = {split: facts("cifar10", "parquet", split)["digest"] for split in PARTS}
    assert len(set(parts.values())) == 4
    assert facts("cifar10", "parquet", "train")["rows"] == len(load_samples("cifar10", "parquet", "train", n=None))
    for setting, value in (("held_back", 0.25), ("pixels", 48)):
        with monkeypatch.context() as patch:
            patch.setitem(roles.role("cifar10").photo, setting, value)
            assert facts("cifar10", "parquet", "train")["digest"] != parts["train"]
    write_parquet(photographs / "test.parquet", [0], [pixel(9, 9)])
    assert facts("cifar10", "parquet", "pretraining")["digest"] != parts["pretraining"]


def test_facts_of_photographs_read_each_file_once(photographs, monkeypatch):
    monkeypatch.setattr(loaders.Table, "image", lambda *_: pytest.fail("looked into an image"))
    reads, read = [], parquet.read_table
    monkeypatch.setattr(parquet, "read_table", lambda path, **options: reads.append(path.name) or read(path, **options))
    for split in PARTS * 2:
        facts("cifar10", "parquet", split)
    assert sorted(reads) == ["test.parquet", "train.parquet"]


def test_the_table_of_photographs_is_complete():
    entries = {name: roles.role(name).photo for name in roles.role_names()}
    folders = [entry["data"] for entry in entries.values() if "missing" not in entry]
    assert len(set(folders)) == len(folders)
    for name, entry in entries.items():
        needed = {"data", "title", "original", "pixels", "origin", "terms", "show", "limits"}
        assert set(entry) - {"held_back", "group"} == ({"missing"} if "missing" in entry else needed), name
        assert 0 <= entry.get("held_back", 0) < 1
        trained = (entry.get("group") or roles.role(name).group) == "source"
        assert not trained or entry["held_back"] >= 0.5, name
    known = roles._table("photo-roles")
    assert set(known) == set(entries)


def test_photographs_have_the_size_of_their_role(folder, tmp_path):
    folder.rename(tmp_path / "pets")
    assert load_samples("pets", "parquet", n=2).images.shape == (2, 3, 48, 48)
    write_parquet(tmp_path / "pets/test.parquet", [0], [encoded(0, (300, 200))])
    assert load_samples("pets", "parquet").images.shape == (1, 3, 48, 48)


# --- what can be wrong with it ----------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A gray picture of any size in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 1) * height) if width * height < 10**6 else b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "classes", ['{"0": "red", "1": "green"}', "[null, null]", '"ab"', "[]", '["red", " "]', "[0, 1]"]
)
def test_class_names_are_a_list_of_names(folder, classes):
    write(folder / "classes.json", classes)
    with pytest.raises(
        ValueError, match=r"classes.json is no list of class names: .*write a list of the names in label"
    ):
        load_samples("cifar10", "parquet")


def test_class_names_that_are_not_there_or_no_json(folder):
    write(folder / "classes.json", '["red",')
    with pytest.raises(ValueError, match=r"cannot read class names from .*cifar10/classes.json.*write a list"):
        load_samples("cifar10", "parquet")
    (folder / "classes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"cannot read class names from .*cifar10/classes.json.*write a list"):
        load_samples("cifar10", "parquet")
    (folder / "classes.json").unlink()
    with pytest.raises(ValueError, match=r"cannot read class names from .*cifar10/classes.json .*write a list"):
        load_samples("cifar10", "parquet")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0.5, 1.0]}, r"train.parquet has 2 rows of image .*label \(double\).*a whole number"),
        ({"label": [0, None]}, r"has 2 rows of .*some perhaps empty"),
        ({"label": ["0", "1"]}, r"label \(string\)"),
        ({"label": [0, 1], "image": [b"1", b"2"]}, r"image \(binary\).*a struct of bytes and path"),
        ({"label": [0, 1], "image": [{"path": "a"}] * 2}, r"image \(struct<path: string>\)"),
        ({"labels": [0, 1]}, r"labels \(int64\).* `label`"),
        ({"captions": [["a"], []]}, r"captions .*a list of at least one text"),
        ({"captions": ["a", "b"]}, r"captions \(string\)"),
        ({"label": pa.array([], pa.int64()), "image": pa.array([], pa.struct([("bytes", pa.binary())]))}, "has 0 rows"),
        ({"label": [0, 7]}, "label 7 is out of range"),
        ({"label": [-1, 0]}, "label -1 is out of range"),
    ],
)
def test_columns_of_another_kind_are_refused(folder, columns, message):
    image = [{"bytes": encoded(0), "path": "a"}] * 2
    parquet.write_table(pa.table({"image": image} | columns), folder / "train.parquet")
    for call in (load_samples, facts):
        with pytest.raises(ValueError, match=message):
            call("cifar10", "parquet", "train")


def test_damaged_files_are_named(folder):
    write_parquet(folder / "train.parquet", [0, 0], [encoded(0), encoded(0)[:40]])
    with pytest.raises(OSError, match=r"cannot decode row 1, in train.parquet of parquet:cifar10 .*fetch or make"):
        load_samples("stl10", "parquet:cifar10", "train")
    write_parquet(folder / "train.parquet", [0, 0], [b"", encoded(0)])
    with pytest.raises(OSError, match=r"cannot decode row 0, in train.parquet of parquet:cifar10"):
        load_samples("stl10", "parquet:cifar10", "train")
    (folder / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(OSError, match=r"cannot read train.parquet.*fetch or make it again"):
        load_samples("cifar10", "parquet", "train")
    (folder / "train.parquet").unlink()
    write_shards(folder, [0, 1, 2, 3], 2, "train")
    (folder / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 files like train-00000-of-00002.parquet in .*cifar10"):
        load_samples("cifar10", "parquet", "train")


def test_long_thin_images_cost_little(folder):
    """One pixel high and 3,000 wide, its short side would become 224: 600,000 pixels of which a square is kept."""
    sizes, resize = [], Image.Image.resize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", lambda self, size, *more: sizes.append(size) or resize(self, size, *more))
        assert loaders.fit(Image.open(io.BytesIO(png(1, 3000))), 256, 224).size == (224, 224)
    assert max(map(max, sizes)) <= 8 * 256


@pytest.mark.parametrize("size", [(9_000, 9_000), (30_000, 30_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_too_large_to_decode_are_named(folder, size):
    write_parquet(folder / "test.parquet", [0], [png(*size)])
    with pytest.raises(OSError, match=r"cannot decode row 0, in test.parquet of parquet:cifar10 .*pixels"):
        load_samples("cifar10", "parquet")


@pytest.mark.parametrize("root", ["", "~nosuch", "/no/such/folder"])
def test_a_folder_that_is_not_there(monkeypatch, root):
    monkeypatch.setenv("ROBUSTCLIP_DATA", root)
    message = r"needs a folder sun397 or scenes15 .*ROBUSTCLIP_DATA names .*paper and photo.*tools/to_parquet.py sun397"
    with pytest.raises(FileNotFoundError, match=message):
        load_samples("sun397", "parquet")
    with pytest.raises(FileNotFoundError, match=r"needs a folder ~nosuch below"):
        load_samples("sun397", "parquet:~nosuch")


def test_a_split_that_is_not_there(folder):
    message = r"role 'stl10' needs split 'validation': no validation.parquet or .* in .*cifar10"
    with pytest.raises(FileNotFoundError, match=message):
        load_samples("stl10", "parquet:cifar10", "validation")
    with pytest.raises(FileNotFoundError, match=r"role 'cifar10' needs split 'validation': no train.parquet or .*"):
        load_samples("cifar10", "parquet", "validation")


# --- Tinyworld, digits and the call itself ----------------------------------------------------------------------------


def test_tinyworld():
    samples = load_samples("cifar10", n=100)
    check(samples, 32)
    role = roles.role("cifar10")
    assert samples.classes == role.classes
    assert samples.prompts == role.prompts
    later = load_samples("cifar10", n=30, start=70)
    assert torch.equal(later.images, samples.images[70:])
    assert torch.equal(later.labels, samples.labels[70:])
    assert later.digest == samples.digest != load_samples("cifar10", split="train", n=1).digest
    assert "images" not in repr(samples)
    assert len(load_samples("coco", n=3).captions) == 3


def test_digits_come_in_three_parts_without_overlap():
    parts = {split: load_samples("digits", "digits", split, n=None) for split in roles.SPLITS}
    assert [len(parts[split]) for split in ("train", "validation", "test")] == [597, 200, 1000]
    check(parts["test"], 32)
    assert parts["test"].prompts[3].endswith("three")
    assert torch.equal(parts["test"].images[:, :, ::4, ::4], parts["test"].images[:, :, 3::4, 3::4])
    seen = [set(map(bytes, (part.images[:, 0] * 255).byte().numpy().reshape(len(part), -1))) for part in parts.values()]
    assert len(set.union(*seen)) == sum(map(len, seen))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"role": "cifar11"}, "unknown role 'cifar11'; choose one of: cifar10"),
        ({"source": "web"}, "unknown source 'web'; choose one of: tinyworld, digits, parquet"),
        ({"split": "val"}, "unknown split 'val'; choose one of: train, validation, test$"),
        ({"split": "pretraining"}, "unknown split 'pretraining'; choose one of: train, validation, test$"),
        ({"split": "val", "source": "parquet"}, "choose one of: train, validation, test, pretraining$"),
        ({"n": 0}, "n=0 is not allowed; it must be a finite number at least 1"),
        ({"n": 2.0}, "n=2.0 is not allowed; it must be a whole number, such as 2"),
        ({"n": True}, "n=True is not allowed"),
        ({"start": -1}, "start=-1 is not allowed; it must be a finite number at least 0"),
        ({"start": None}, "start=None is not allowed"),
        ({"n": None}, "n=None is not allowed for source 'tinyworld'"),
        ({"source": "digits"}, "source 'digits' plays the role 'digits' only, not 'cifar10'"),
        ({"role": "digits", "start": 1000}, "start=1000 is out of range; split 'test' of digits has 1,000 rows"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_samples(**{"role": "cifar10"} | arguments)


def test_samples_check_themselves():
    images, labels, one = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), Classes(("a",), ("a",))
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        Samples(images + 2, labels, one, "x", "y")
    with pytest.raises(ValueError, match="label 1 is out of range"):
        Samples(images, labels + 1, one, "x", "y")
    with pytest.raises(ValueError, match="got 3 captions for 2 images"):
        Samples(images, labels, one, "x", "y", ("1", "2", "3"))


@settings(max_examples=40, deadline=None)
@given(width=st.integers(20, 90), height=st.integers(20, 90), seed=st.integers(0, 99))
def test_resize_and_crop_as_torchvision(width, height, seed):
    _torchvision.prepare()
    from torchvision import transforms

    image = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))
    theirs = transforms.Compose([transforms.Resize(37), transforms.CenterCrop(32)])(image)
    assert np.array_equal(np.asarray(loaders.fit(image, 37, 32)), np.asarray(theirs))


# --- real photographs, where there are any ----------------------------------------------------------------------------

PHOTOGRAPHS = os.environ.get("ROBUSTCLIP_DATA", "")


needs_photographs = pytest.mark.skipif(
    not Path(PHOTOGRAPHS or "/nowhere").is_dir(), reason="ROBUSTCLIP_DATA names no folder"
)


@needs_photographs
@pytest.mark.parametrize("role", [name for name in roles.role_names() if roles.role(name).group != "extra"])
def test_photographs(role, monkeypatch):
    monkeypatch.setenv("ROBUSTCLIP_DATA", PHOTOGRAPHS)
    place = roles.role(role).photo.get("data", "")
    if not place or not Path(PHOTOGRAPHS, place).is_dir():
        pytest.skip("no photographs play this role")
    samples = load_samples(role, "parquet", n=24)
    check(samples, roles.role(role).photo["pixels"])
    assert samples.source == f"parquet:{place}"
    assert len(samples) == 24
    assert samples.images.std((1, 2, 3)).min() > 0.01
    assert len(set(samples.labels.tolist())) > 1


@needs_photographs
def test_parts_of_all_photographs_are_disjoint():
    """Byte for byte: no picture in two parts of a set, no test picture of any set in what any model is trained on."""
    found: dict[str, dict[str, set[bytes]]] = {split: {} for split in PARTS}
    for entry in map(roles.role, roles.role_names()):
        folder = Path(PHOTOGRAPHS, entry.photo.get("data", "missing"))
        for split in PARTS if "held_back" in entry.photo else ("test",):
            if folder.is_dir() and entry.name != "digits":
                table = loaders.divided(folder, split, entry.photo.get("held_back", 1))
                raws = table.fetch(np.arange(len(table)))
                found[split][entry.name] = {hashlib.sha256(raw).digest() for raw in raws}
    assert len(found["test"]) > 0
    tested = set.union(*found["test"].values())
    for role in found["train"]:
        parts = [found[split][role] for split in PARTS]
        assert len(set.union(*parts)) == sum(map(len, parts)), role
        assert not tested & set.union(*parts[:3]), role
