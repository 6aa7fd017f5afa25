"""Data sources: every official on-disk format, written here in small, and the one call that reads them all."""

import io
import json
import os
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from scipy.io import savemat

from robustclip import _torchvision
from robustclip.classes import Classes
from robustclip.data import loaders, roles, sources
from robustclip.data.sources import Samples, load_samples

COLORS = ((230, 30, 30), (30, 230, 30), (30, 30, 230), (230, 230, 30))


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch, tmp_path):
    """Neither the user's data nor the network."""
    for name in ("ROBUSTCLIP_DATA", "ROBUSTCLIP_DOWNLOAD", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ROBUSTCLIP_TORCHVISION", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def write_image(path: Path, color: int, size: tuple[int, int] = (300, 260)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLORS[color]).save(path, quality=95)


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


# --- the papers' data, in the layouts of their authors ----------------------------------------------------------------


def tree(pattern: str, *names: str) -> Callable[[Path], None]:
    """Image folders; `pattern` has places for class name and number."""

    def build(root: Path) -> None:
        for color, name in enumerate(names):
            for number in range(1, 3):
                write_image(root / pattern.format(name=name, label=color + 1, number=number), color)

    return build


def listed(image: str, text: str, line: str, *names: str) -> Callable[[Path], None]:
    """Images listed in a text file."""

    def build(root: Path) -> None:
        lines = []
        for color, name in enumerate(names):
            for number in range(1, 3):
                place = {"name": name, "label": color + 1, "number": number}
                write_image(root / image.format(**place), color)
                lines.append(line.format(**place))
        write(root / text, "\n".join(lines) + "\n")

    return build


def food(root: Path) -> None:
    listed("food-101/images/{name}/{number}.jpg", "food-101/meta/test.txt", "{name}/{number}", "apple_pie", "tacos")(
        root
    )
    names = {name: [f"{name}/1", f"{name}/2"] for name in ("apple_pie", "tacos")}
    write(root / "food-101/meta/test.json", json.dumps(names))


def aircraft(root: Path) -> None:
    folder = "fgvc-aircraft-2013b/data"
    image, line = f"{folder}/images/00{{label}}{{number}}.jpg", "00{label}{number} {name}"
    listed(image, f"{folder}/images_variant_test.txt", line, "707-320", "A330-200")(root)
    write(root / f"{folder}/variants.txt", "707-320\nA330-200\n")


def sun(root: Path) -> None:
    tree("SUN397/{name}/sun_a{number}.jpg", "a/abbey", "a/apse/indoor")(root)
    write(root / "SUN397/ClassName.txt", "/a/abbey\n/a/apse/indoor\n")


def caltech(root: Path) -> None:
    tree("caltech101/101_ObjectCategories/{name}/image_000{number}.jpg", "BACKGROUND_Google", "Faces", "anchor")(root)


def tiny(root: Path) -> None:
    line = "val_{label}{number}.JPEG\t{name}\t0\t32\t44\t62"
    image = "tiny-imagenet-200/val/images/val_{label}{number}.JPEG"
    listed(image, "tiny-imagenet-200/val/val_annotations.txt", line, "n01443537", "n07749582")(root)


def flowers(root: Path) -> None:
    folder = root / "flowers-102"
    for number, color in enumerate((0, 1, 0), start=1):
        write_image(folder / f"jpg/image_{number:05d}.jpg", color)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 77, 1]], dtype=np.uint8)})
    savemat(folder / "setid.mat", {"tstid": np.array([[2, 3]]), "trnid": np.array([[1]]), "valid": np.array([[1]])})


def cifar(folder: str, names_file: str, names: str, files: tuple[str, ...], label_bytes: int, labels: tuple[int, ...]):
    """Binary records: label bytes, then the red, green and blue plane."""

    def build(root: Path) -> None:
        place = root / folder
        write(place / names_file, names)
        for name in files:
            records = []
            for color, label in enumerate(labels):
                plane = np.repeat(np.array(COLORS[color], dtype=np.uint8), 1024)
                records.append(np.concatenate([np.array([9] * (label_bytes - 1) + [label], dtype=np.uint8), plane]))
            np.concatenate(records).tofile(place / name)

    return build


def stl(root: Path) -> None:
    folder = root / "stl10_binary"
    write(folder / "class_names.txt", "airplane\nbird\n")
    images = np.broadcast_to(np.array(COLORS[:2], dtype=np.uint8)[:, :, None, None], (2, 3, 96, 96)).copy()
    images[:, :, 0, :] = 0  # first column, because pixels come column by column
    images.tofile(folder / "test_X.bin")
    np.array([1, 2], dtype=np.uint8).tofile(folder / "test_y.bin")


def medical(root: Path) -> None:
    rows = [["glioma tumor/1.png", 0, "glioma tumor"], ["normal brain/1.png", 1, "normal brain"]]
    for color, (path, _, _) in enumerate(rows):
        write_image(root / "BTMRI/BTMRI" / path, color)
    write(root / "BTMRI/split_BTMRI.json", json.dumps({"train": rows[:1], "val": rows[:1], "test": rows}))


def hub(root: Path) -> None:
    revision = roles.role("cars").paper["revision"]
    folder = root.parent / "hub/datasets--tanganke--stanford_cars/snapshots" / revision / "data"
    write_shards(folder, ["AM General Hummer SUV 2000", "Audi S5 Coupe 2012"], [0, 1, 1, 0], 2)


CLASSES_OF_CIFAR100 = "\n".join(["apple", "aquarium_fish", *map(str, range(98))]) + "\n\n"
PAPER = {  # role: (writer, classes, prompt of the first class, pixels)
    "cifar10": (
        cifar("cifar-10-batches-bin", "batches.meta.txt", "airplane\nautomobile\n\n", ("test_batch.bin",), 1, (0, 1)),
        ("airplane", "automobile"),
        "This is a photo of a airplane",
        32,
    ),
    "cifar100": (
        cifar("cifar-100-binary", "fine_label_names.txt", CLASSES_OF_CIFAR100, ("test.bin",), 2, (0, 1)),
        ("apple", "aquarium fish"),
        "This is a photo of a apple",
        32,
    ),
    "tinyimagenet": (tiny, ("goldfish", "lemon"), "This is a photo of a goldfish", 64),
    "imagenet": (
        tree("imagenet/val/{name}/ILSVRC2012_val_{number}.JPEG", "n01440764", "n03126707"),
        ("tench", "construction crane"),
        "This is a photo of a tench",
        224,
    ),
    "imagenet-v2": (
        tree("imagenetv2-matched-frequency-format-val/{name}/{number}.jpeg", "2", "10"),
        ("great white shark", "brambling"),
        "This is a photo of a great white shark",
        224,
    ),
    "imagenet-sketch": (
        tree("sketch/{name}/sketch_{number}.JPEG", "n01440764"),
        ("tench",),
        "This is a photo of a tench",
        224,
    ),
    "imagenet-a": (
        tree("imagenet-a/{name}/{number}.jpg", "n01498041"),
        ("stingray",),
        "This is a photo of a stingray",
        224,
    ),
    "imagenet-r": (
        tree("imagenet-r/{name}/art_{number}.jpg", "n01443537"),
        ("goldfish",),
        "This is a photo of a goldfish",
        224,
    ),
    "stl10": (stl, ("airplane", "bird"), "This is a photo of a airplane", 96),
    "sun397": (sun, ("abbey", "apse indoor"), "This is a photo of a abbey", 224),
    "food101": (food, ("apple pie", "tacos"), "A photo of apple pie, a type of food.", 224),
    "pets": (
        listed(
            "oxford-iiit-pet/images/{name}_{number}.jpg",
            "oxford-iiit-pet/annotations/test.txt",
            "{name}_{number} {label} 1 1",
            "Abyssinian",
            "american_bulldog",
        ),
        ("abyssinian", "american bulldog"),
        "A photo of a abyssinian, a type of pet.",
        224,
    ),
    "flowers102": (flowers, ("pink primrose", "passion flower"), "A photo of a pink primrose, a type of flower.", 224),
    "dtd": (
        listed(
            "dtd/dtd/images/{name}/{number}.jpg",
            "dtd/dtd/labels/test1.txt",
            "{name}/{number}.jpg",
            "banded",
            "polka-dotted",
        ),
        ("banded", "polka dotted"),
        "A surface with a banded texture.",
        224,
    ),
    "eurosat": (
        tree("eurosat/2750/{name}/{name}_{number}.jpg", "AnnualCrop", "SeaLake"),
        ("annual crop land", "a sea or a lake"),
        "A centered satellite photo of annual crop land.",
        224,
    ),
    "aircraft": (aircraft, ("boeing 707-320", "a330-200"), "A photo of a boeing 707-320, a type of aircraft.", 224),
    "country211": (
        tree("country211/test/{name}/{number}.jpg", "AD", "BO"),
        ("Andorra", "Bolivia, Plurinational State of"),
        "A photo I took in Andorra.",
        224,
    ),
    "caltech101": (caltech, (None, "Faces", "anchor"), "This is a photo of a Faces", 224),
    "caltech256": (
        tree("caltech256/256_ObjectCategories/{name}/00{label}_000{number}.jpg", "001.ak47", "002.sneaker-shoe-101"),
        ("ak47", "sneaker shoe"),
        "A photo of a ak47.",
        224,
    ),
    "cars": (hub, ("am general hummer suv", "audi s5 coupe"), "A photo of a am general hummer suv.", 224),
    "btmri": (medical, ("glioma tumor", "normal brain"), "a photo of a glioma tumor.", 224),
}


@pytest.mark.parametrize("role", PAPER)
def test_official_formats(role, tmp_path):
    build, classes, prompt, size = PAPER[role]
    build(tmp_path / "data")
    samples = load_samples(role, "paper", n=None)
    check(samples, size)
    if role == "stl10":
        assert samples.images[:, :, :, 0].abs().max() == 0  # transposed back
        samples = replace(samples, images=samples.images[:, :, :, 1:])
    found = {
        (color, samples.classes[label]) for color, label in zip(colors(samples.images), samples.labels, strict=True)
    }
    assert found == {(color, name) for color, name in enumerate(classes) if name}
    assert samples.prompts[samples.classes.index(next(filter(None, classes)))] == prompt
    assert samples.source == f"paper:{roles.role(role).paper['data']}"


def test_every_class_folder_of_country211_has_a_name():
    names = roles.role("country211").paper["rename"]
    assert len(names) == len(set(names.values())) == 211


@pytest.mark.parametrize(
    ("role", "dataset", "options"),
    [
        ("food101", "Food101", {"split": "test"}),
        ("pets", "OxfordIIITPet", {"split": "test"}),
        ("dtd", "DTD", {"split": "test"}),
        ("eurosat", "EuroSAT", {}),
        ("aircraft", "FGVCAircraft", {"split": "test"}),
        ("country211", "Country211", {"split": "test"}),
        ("caltech101", "Caltech101", {}),
        ("caltech256", "Caltech256", {}),
        ("sun397", "SUN397", {}),
    ],
)
def test_same_images_and_order_of_classes_as_torchvision(role, dataset, options, tmp_path):
    _torchvision.prepare()
    from torchvision import datasets, transforms

    PAPER[role][0](tmp_path / "data")
    theirs = getattr(datasets, dataset)(tmp_path / "data", **options)
    transform = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()])
    pairs = [(transform(image), label) for image, label in theirs]
    ours = load_samples(role, "paper", n=None)
    names = theirs.categories if role == "caltech101" else ours.classes  # where torchvision sorts capitals first
    assert Counter((thumbnail(image), names[label]) for image, label in pairs) == Counter(
        (thumbnail(image), ours.classes[label]) for image, label in zip(ours.images, ours.labels, strict=True)
    )


def thumbnail(image: torch.Tensor) -> tuple[float, ...]:
    return tuple(image[:, ::60, ::60].flatten().tolist())


def test_training_splits(tmp_path):
    build = cifar(
        "cifar-10-batches-bin",
        "batches.meta.txt",
        "a\nb\n",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        1,
        (0, 1),
    )
    build(tmp_path / "data")
    assert len(load_samples("cifar10", "paper", "train", n=None)) == 10
    tree("tiny-imagenet-200/train/{name}/images/{name}_{number}.JPEG", "n01443537")(tmp_path / "data")
    assert load_samples("tinyimagenet", "paper", "train").classes.names == ("goldfish",)


def test_coco_keeps_captions_with_their_images(tmp_path):
    entries = []
    for color, count in enumerate((5, 6)):
        write_image(tmp_path / f"data/coco/val2014/{color}.jpg", color)
        sentences = [{"raw": f"color {color}, caption {number} "} for number in range(count)]
        entries.append({"filepath": "val2014", "filename": f"{color}.jpg", "split": "test", "sentences": sentences})
    entries.append({"filepath": "val2014", "filename": "none.jpg", "split": "train", "sentences": []})
    write(tmp_path / "data/coco/dataset_coco.json", json.dumps({"images": entries}))
    samples = load_samples("coco", "paper")
    assert len(samples.captions) == 10
    assert [caption[:7] for caption in samples.captions[::5]] == [f"color {color}" for color in colors(samples.images)]
    assert samples.prompts == samples.classes.names == samples.captions[::5]
    assert samples.labels.tolist() == [0, 1]


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def test_pcam(tmp_path, monkeypatch):
    """With a stand-in for h5py, which is no requirement: a file that opens as a dictionary of arrays."""
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="pip install h5py"):
        load_samples("pcam", "paper")
    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=arrays))
    paper, place = roles.role("pcam").paper, tmp_path / "data/pcam"
    with pytest.raises(FileNotFoundError, match=r"PatchCamelyon \(0.8 GB\)"):
        load_samples("pcam", "paper")
    place.mkdir(parents=True)
    pixels = np.broadcast_to(np.array(COLORS[:2], dtype=np.uint8)[:, None, None], (2, 96, 96, 3))
    with (place / paper["test"]["images"]).open("wb") as file:
        np.savez(file, x=pixels)
    with (place / paper["test"]["labels"]).open("wb") as file:
        np.savez(file, y=np.array([0, 1], dtype=np.uint8).reshape(2, 1, 1, 1))
    samples = load_samples("pcam", "paper")
    check(samples, 224)
    assert samples.labels.tolist() == colors(samples.images)
    assert list(samples.prompts) == paper["prompts"]


def test_table_of_the_papers_data():
    _torchvision.prepare()
    from torchvision import datasets

    for name in roles.role_names():
        paper = roles.role(name).paper
        assert paper["mark"] in ("code", "paper", "reconstructed", "assumed")
        assert paper["test_images"] > 0
        assert paper["template"].format("dog").count("dog") == 1
        assert all(template.format("dog").count("dog") == 1 for template in paper.get("templates", {}).values())
        if paper["source"] == "scikit-learn":
            continue
        assert paper["layout"] in loaders.LAYOUTS
        assert "test" in paper
        assert {"torchvision": "torchvision", "archive": "url", "hub": "hub", "manual": "site"}[
            paper["source"]
        ] in paper
        assert paper["source"] == "manual" or paper["bytes"] > 0
        assert hasattr(datasets, paper.get("torchvision", "Food101"))


# --- downloads --------------------------------------------------------------------------------------------------------


def with_paper(monkeypatch, role: str, **changes) -> None:
    entry = roles.role(role)
    changed = replace(entry, paper=entry.paper | changes)
    monkeypatch.setattr(sources.roles, "role", lambda name: changed)


@pytest.fixture
def archive(monkeypatch, tmp_path):
    """Address of an archive of CIFAR-10 on a server of this machine."""
    PAPER["cifar10"][0](tmp_path / "made")
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as file:
        file.add(tmp_path / "made/cifar-10-batches-bin", "cifar-10-batches-bin")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
        server.shutdown()
        thread.join()


def test_nothing_is_downloaded_unasked(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "_download", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 \(0.17 GB\) is not in .*data.*ROBUSTCLIP_DOWNLOAD=1"):
        load_samples("cifar10", "paper")
    monkeypatch.setenv("ROBUSTCLIP_DOWNLOAD", "1")
    with pytest.raises(FileNotFoundError, match="pass download=True"):
        load_samples("cifar10", "paper", download=False)
    with pytest.raises(FileNotFoundError, match=r"ImageNet \(6.7 GB\).*get it from https://image-net.org"):
        load_samples("imagenet", "paper")
    with pytest.raises(FileNotFoundError, match=r"BUSI \(size unknown\).*BiomedCoOp"):
        load_samples("busi", "paper")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match=r"Stanford Cars \(0.99 GB\).*HF_HUB_OFFLINE forbids"):
        load_samples("cars", "paper")


@pytest.mark.filterwarnings("default::DeprecationWarning")  # torchvision unpacks without a filter
def test_download_of_an_archive(monkeypatch, archive, caplog):
    with_paper(monkeypatch, "cifar10", url=archive, md5=None)
    samples = load_samples("cifar10", "paper", download=True)
    assert samples.labels.tolist() == colors(samples.images)
    assert "downloading CIFAR-10 (0.17 GB) to" in caplog.text


def test_a_spoilt_download_is_refused(monkeypatch, archive):
    with_paper(monkeypatch, "cifar10", url=archive, md5="0" * 32)
    monkeypatch.setenv("ROBUSTCLIP_DOWNLOAD", "1")
    with pytest.raises(OSError, match=r"CIFAR-10 \(0.17 GB\) could not be downloaded.*corrupted.*check the connection"):
        load_samples("cifar10", "paper")


def test_a_full_disk_is_noticed_before_the_download(monkeypatch):
    with_paper(monkeypatch, "cifar10", bytes=10**18)
    with pytest.raises(OSError, match="MB needed"):
        load_samples("cifar10", "paper", download=True)


def test_download_through_torchvision(monkeypatch, tmp_path):
    _torchvision.prepare()
    from torchvision import datasets

    def fetch(root: Path, download: bool) -> None:
        assert download
        food(Path(root))

    monkeypatch.setattr(datasets, "Food101", fetch)
    assert len(load_samples("food101", "paper", download=True)) == 4


def test_a_broken_copy_is_noticed(tmp_path, monkeypatch, caplog):
    tree("imagenet-a/{name}/{number}.jpg", "n01498041", "n00000000")(tmp_path / "data")
    with pytest.raises(ValueError, match="ImageNet-A has no class 'n00000000'"):
        load_samples("imagenet-a", "paper")
    assert "ImageNet-A has 4 test images here, in the papers 7500" in caplog.text
    monkeypatch.setattr(sources, "_download", lambda *_: None)
    with pytest.raises(FileNotFoundError, match=r"Food-101 is incomplete after its download.*delete what is there"):
        load_samples("food101", "paper", download=True)


def test_download_from_the_hub(monkeypatch, tmp_path):
    calls = []

    def fetch(name: str, **options) -> str:
        calls.append((name, options["revision"], options["allow_patterns"]))
        if options["local_files_only"]:
            raise FileNotFoundError
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(OSError, match=r"Stanford Cars .* could not be downloaded .*no route to host.*another machine"):
        load_samples("cars", "paper", download=True)
    assert calls[-1] == ("tanganke/stanford_cars", roles.role("cars").paper["revision"], ["data/test-*.parquet"])


def test_an_incomplete_hub_copy_is_noticed(tmp_path):
    hub(tmp_path / "data")
    next((tmp_path / "hub").rglob("test-00001*")).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 files"):
        load_samples("cars", "paper")


# --- local parquet ----------------------------------------------------------------------------------------------------


def write_parquet(
    path: Path, labels: list, images: list[bytes] | None = None, names=None, columns=("image", "label")
) -> None:
    """Hugging Face layout, three rows a group; images show their label's color unless given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = images or [encoded(label) for label in labels]
    rows = [{"bytes": image, "path": f"{place}.png"} for place, image in enumerate(images)]
    table = pa.table({columns[0]: rows, columns[1]: labels})
    if names:
        features = {columns[1]: {"names": names, "_type": "ClassLabel"}, columns[0]: {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path, row_group_size=3)


def write_shards(folder: Path, names: list[str], labels: list[int], shards: int, split: str = "test") -> None:
    for number in range(shards):
        write_parquet(folder / f"{split}-{number:05d}-of-{shards:05d}.parquet", labels[number::shards], names=names)


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """A set of four classes, sorted by class."""
    monkeypatch.setenv("ROBUSTCLIP_DATA", str(tmp_path))
    place = tmp_path / "cifar10"
    write_parquet(place / "test.parquet", sorted([0, 1, 2, 3] * 10))
    write(place / "classes.json", '["red", "green", "blue", "yellow"]')
    return place


def test_parquet(folder):
    samples = load_samples("cifar10", "parquet")
    check(samples, 24)
    assert len(samples) == 40
    assert colors(samples.images) == samples.labels.tolist()
    assert samples.classes.names == ("red", "green", "blue", "yellow")
    assert samples.prompts[0] == "This is a photo of a red"
    assert samples.source == "parquet:cifar10"
    assert set(load_samples("cifar10", "parquet", n=16).labels.tolist()) == {0, 1, 2, 3}  # though sorted by class


@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 50), start=st.integers(0, 39))
def test_any_rows_are_rows_of_the_whole(n, start):
    """Rows across shards and row groups keep their labels, and every selection is a slice of one fixed order."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as temporary:
        patch.setenv("ROBUSTCLIP_DATA", temporary)
        write_shards(Path(temporary, "scenes15", "data"), list("abcd"), [0, 1, 2, 3] * 10, 2)
        whole = load_samples("sun397", "parquet", n=None)
        part = load_samples("sun397", "parquet", n=n, start=start)
    assert colors(part.images) == part.labels.tolist()
    assert torch.equal(part.labels, whole.labels[start : start + n])
    assert part.digest == whole.digest
    assert part.source == "parquet:scenes15"


def test_digest_follows_the_content(folder, tmp_path):
    before = load_samples("cifar10", "parquet").digest
    assert load_samples("cifar10", "parquet", n=3).digest == before
    folder.rename(tmp_path / "moved")
    os.utime(tmp_path / "moved/test.parquet", (0, 0))
    assert load_samples("cifar10", f"parquet:{tmp_path / 'moved'}").digest == before
    assert load_samples("stl10", "parquet:moved").digest != before  # another role
    write_parquet(tmp_path / "moved/test.parquet", sorted([0, 1, 2, 3] * 10), [encoded(0, (24, 25))] * 40)
    assert load_samples("cifar10", "parquet:moved").digest != before


def test_images_of_many_sizes_and_modes_become_alike(folder):
    images = [
        encoded(0, (40, 30)),
        encoded(1, (20, 90)),
        encoded(2, (30, 30), mode="RGB", form="JPEG"),
        encoded(3, (300, 50), "PNG"),
    ]
    write_parquet(folder / "test.parquet", [0, 1, 2, 3], images)
    assert load_samples("stl10", "parquet:cifar10").images.shape == (4, 3, 30, 30)
    assert (
        colors(load_samples("stl10", "parquet:cifar10").images)
        == load_samples("stl10", "parquet:cifar10").labels.tolist()
    )
    write_parquet(folder / "test.parquet", [0, 1], [encoded(0, (400, 300)), encoded(1, (260, 500))])
    assert load_samples("pets", "parquet:cifar10").images.shape == (2, 3, 224, 224)
    write_parquet(folder / "test.parquet", [0, 1], [encoded(0, mode="L"), encoded(1, mode="P")])
    gray = load_samples("cifar10", "parquet").images
    assert gray.shape == (2, 3, 24, 24)


def test_captions(folder):
    captions = [[f"{color} first", f"{color} second"] + ["third"] * (color == 1) for color in range(3)]
    write_parquet(
        folder / "test.parquet", captions, [encoded(color) for color in range(3)], columns=("image", "captions")
    )
    samples = load_samples("coco", "parquet:cifar10", n=2)
    assert [int(caption[0]) for caption in samples.captions[::2]] == colors(samples.images)
    assert samples.prompts == samples.captions[::2]
    assert len(samples.captions) == 4


def test_same_rows_as_the_datasets_library(folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    write_shards(folder / "data", ["red", "green", "blue", "yellow"], [0, 1, 2, 3] * 5, 2)
    (folder / "test.parquet").unlink()
    (folder / "classes.json").unlink()
    theirs = datasets.load_dataset(str(folder), split="test", cache_dir=str(tmp_path / "cache"))
    ours = load_samples("cifar10", "parquet")
    assert ours.classes.names == tuple(theirs.features["label"].names)
    order = loaders.shuffled("cifar10", len(theirs))
    for row, image, label in zip(order, ours.images, ours.labels, strict=True):
        assert label == theirs[int(row)]["label"]
        assert np.array_equal((image * 255).numpy().round(), np.asarray(theirs[int(row)]["image"]).transpose(2, 0, 1))


def test_what_can_be_wrong_with_parquet(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"split 'validation'.*a folder per data set with test.parquet"):
        load_samples("cifar10", "parquet", "validation")
    write_parquet(folder / "train.parquet", [0, 0], columns=("picture", "label"))
    with pytest.raises(ValueError, match=r"columns picture, label; it needs one of image, img"):
        load_samples("cifar10", "parquet", "train")
    write_parquet(folder / "train.parquet", [0, 7], [encoded(0)] * 2)
    with pytest.raises(ValueError, match="label 7 is out of range"):
        load_samples("cifar10", "parquet", "train")
    write_parquet(folder / "train.parquet", [0, 0], [encoded(0), encoded(0)[:40]])
    with pytest.raises(OSError, match="cannot decode a row of parquet:cifar10"):
        load_samples("cifar10", "parquet", "train")
    (folder / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(OSError, match=r"cannot read train.parquet.*fetch it again"):
        load_samples("cifar10", "parquet", "train")
    (folder / "classes.json").unlink()
    with pytest.raises(ValueError, match=r"no class names in cifar10; add classes\.json"):
        load_samples("cifar10", "parquet")
    monkeypatch.delenv("ROBUSTCLIP_DATA")
    with pytest.raises(FileNotFoundError, match=r"environment variable ROBUSTCLIP_DATA.*here scenes15"):
        load_samples("sun397", "parquet")


def test_spoilt_files_are_named(tmp_path):
    PAPER["cifar10"][0](tmp_path / "data")
    path = tmp_path / "data/cifar-10-batches-bin/test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match=r"test_batch.bin has 6145 bytes, not a multiple of 3073"):
        load_samples("cifar10", "paper")
    food(tmp_path / "data")
    (tmp_path / "data/food-101/images/tacos/2.jpg").write_bytes(b"")
    with pytest.raises(OSError, match=r"cannot decode 2.jpg of paper:Food-101"):
        load_samples("food101", "paper")
    (tmp_path / "data/food-101/images/tacos/2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"Food-101 \(5 GB\).*2.jpg"):
        load_samples("food101", "paper")


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
        ({"source": "web"}, "unknown source 'web'; choose one of: tinyworld, digits, parquet, paper"),
        ({"split": "val"}, "unknown split 'val'; choose one of: train, validation, test"),
        ({"n": 0}, "n=0 is not allowed; it must be a finite number at least 1"),
        ({"n": 2.0}, "n=2.0 is not allowed; it must be a whole number, such as 2"),
        ({"n": True}, "n=True is not allowed"),
        ({"start": -1}, "start=-1 is not allowed; it must be a finite number at least 0"),
        ({"start": None}, "start=None is not allowed"),
        ({"n": None}, "n=None is not allowed for source 'tinyworld'"),
        ({"source": "digits"}, "source 'digits' plays the role 'digits' only, not 'cifar10'"),
        ({"role": "digits", "start": 1000}, "start=1000 is out of range; split 'test' of digits has rows 0 to 999"),
        (
            {"role": "eurosat", "source": "paper", "split": "train"},
            "EuroSAT has no split 'train'.*whole data set.*choose test",
        ),
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


@pytest.mark.skipif(not Path(PHOTOGRAPHS or "/nowhere").is_dir(), reason="ROBUSTCLIP_DATA names no folder")
@pytest.mark.parametrize("role", [name for name in roles.role_names() if roles.role(name).group != "extra"])
def test_photographs(role, monkeypatch):
    monkeypatch.setenv("ROBUSTCLIP_DATA", PHOTOGRAPHS)
    place = roles.role(role).paper.get("stand_in", role)
    if not Path(PHOTOGRAPHS, place).is_dir():
        pytest.skip(f"no folder {place}")
    samples = load_samples(role, "parquet", n=24)
    check(samples, samples.images.shape[-1])
    assert samples.source == f"parquet:{place}"
    assert len(samples) == 24
    assert samples.images.std((1, 2, 3)).min() > 0.01
    assert len(set(samples.labels.tolist())) > 1
