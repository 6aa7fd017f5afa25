"""The tool that turns the papers' data sets into parquet: every official format, written here in small; downloads."""

import gzip
import hashlib
import io
import json
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from scipy.io import savemat

import official
import to_parquet
from hub import full_disk, serving
from official import DATASETS
from robustclip import _torchvision
from robustclip.data import roles
from robustclip.data.sources import Samples, facts, load_samples

COLORS = ((230, 30, 30), (30, 230, 30), (30, 30, 230), (230, 230, 30))


@pytest.fixture(autouse=True)
def _small_sets(monkeypatch, tmp_path):
    """No set has the size of its original here, and nothing is anybody else's."""
    monkeypatch.setenv("ROBUSTCLIP_DATA", str(tmp_path / "data"))
    for name, options in DATASETS.items():
        parts = {split: {**options[split], "count": None} for split in roles.SPLITS if split in options}
        monkeypatch.setitem(DATASETS, name, options | parts)


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


def converted(role: str, tmp_path: Path, *splits: str) -> Samples:
    """All test images of a role's set after its conversion."""
    to_parquet.convert(role, tmp_path / "downloads", tmp_path / "data", splits or ("test",))
    return load_samples(role, "parquet", (splits or ("test",))[0], n=None)


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
    features = {"label": {"names": ["AM General Hummer SUV 2000", "Audi S5 Coupe 2012"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for number in range(2):
        rows = [{"bytes": encoded(label), "path": None} for label in (0, 1)]
        table = pa.table({"image": rows, "label": [0, 1]}).replace_schema_metadata(metadata)
        path = root / f"stanford_cars/data/test-{number:05d}-of-00002.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, path)


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
    build(tmp_path / "downloads")
    samples = converted(role, tmp_path)
    assert samples.images.shape[1:] == (3, size, size)
    images = samples.images
    if role == "stl10":
        assert images[:, :, :, 0].abs().max() == 0  # transposed back
        images = images[:, :, :, 1:]
    found = {(color, samples.classes[label]) for color, label in zip(colors(images), samples.labels, strict=True)}
    assert found == {(color, name) for color, name in enumerate(classes) if name}
    assert samples.prompts[samples.classes.names.index(next(filter(None, classes)))] == prompt
    assert samples.source == facts(role, "parquet")["source"] == f"paper:{roles.role(role).paper['data']}"


def test_small_pictures_of_the_papers_are_enlarged_as_they_did(tmp_path):
    write_image(tmp_path / "downloads/eurosat/2750/River/River_1.jpg", 2, (64, 64))
    write_image(tmp_path / "downloads/eurosat/2750/Forest/Forest_1.jpg", 1, (64, 64))
    assert converted("eurosat", tmp_path).images.shape == (2, 3, 224, 224)


def test_every_class_folder_of_country211_has_a_name():
    names = DATASETS["country211"]["rename"]
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

    PAPER[role][0](tmp_path / "downloads")
    theirs = getattr(datasets, dataset)(tmp_path / "downloads", **options)
    transform = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()])
    pairs = [(transform(image), label) for image, label in theirs]
    ours = converted(role, tmp_path)
    names = theirs.categories if role == "caltech101" else ours.classes  # where torchvision sorts capitals first
    assert Counter((thumbnail(image), names[label]) for image, label in pairs) == Counter(
        (thumbnail(image), ours.classes[label]) for image, label in zip(ours.images, ours.labels, strict=True)
    )


def thumbnail(image: torch.Tensor) -> tuple[float, ...]:
    return tuple(image[:, ::60, ::60].flatten().tolist())


def test_training_splits(tmp_path):
    files = ("test_batch.bin", *(f"data_batch_{i}.bin" for i in range(1, 6)))
    cifar("cifar-10-batches-bin", "batches.meta.txt", "a\nb\n", files, 1, (0, 1))(tmp_path / "downloads")
    counts = to_parquet.convert("cifar10", tmp_path / "downloads", tmp_path / "data")
    assert list(counts.items()) == [("test", 2), ("train", 10)]
    assert len(load_samples("cifar10", "parquet", "train", n=None)) == 10
    tree("tiny-imagenet-200/train/{name}/images/{name}_{number}.JPEG", "n01443537")(tmp_path / "downloads")
    assert converted("tinyimagenet", tmp_path, "train").classes.names == ("goldfish",)


def test_coco_keeps_captions_with_their_images(tmp_path):
    entries = []
    for color, count in enumerate((5, 6)):
        write_image(tmp_path / f"downloads/coco/val2014/{color}.jpg", color)
        sentences = [{"raw": f"color {color}, caption {number} "} for number in range(count)]
        entries.append({"filepath": "val2014", "filename": f"{color}.jpg", "split": "test", "sentences": sentences})
    entries.append({"filepath": "val2014", "filename": "none.jpg", "split": "train", "sentences": []})
    write(tmp_path / "downloads/coco/dataset_coco.json", json.dumps({"images": entries}))
    samples = converted("coco", tmp_path)
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
        converted("pcam", tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=arrays))
    with pytest.raises(FileNotFoundError, match=r"no file .*test_x.h5"):
        converted("pcam", tmp_path)
    options, place = DATASETS["pcam"]["test"], tmp_path / "downloads/pcam"
    place.mkdir(parents=True)
    pixels = np.broadcast_to(np.array(COLORS[:2], dtype=np.uint8)[:, None, None], (2, 96, 96, 3))
    with (place / options["images"]).open("wb") as file:
        np.savez(file, x=pixels)
    with (place / options["labels"]).open("wb") as file:
        np.savez(file, y=np.array([0, 1], dtype=np.uint8).reshape(2, 1, 1, 1))
    samples = converted("pcam", tmp_path)
    assert samples.images.shape == (2, 3, 224, 224)
    assert samples.labels.tolist() == colors(samples.images)
    assert list(samples.prompts) == roles.role("pcam").paper["prompts"]  # with the papers' typing error


def test_the_table_of_sources_fits_that_of_the_papers():
    table = official.tomllib.loads(Path(official.__file__).with_name("datasets.toml").read_text(encoding="utf-8"))
    assert {*table, "digits"} == set(roles.role_names())
    for name, source in table.items():
        paper = roles.role(name).paper
        assert source["test"]["count"] == paper["test_images"]
        if "train_images" in paper:
            assert source["train"]["count"] == paper["train_images"]
        assert source["layout"] in official.LAYOUTS
        assert {"site": "manual", "archives": "archive", "hub": "hub"}[
            next(key for key in ("site", "archives", "hub") if key in source)
        ] == paper["source"]
        archives = source.get("archives", ())
        assert all(one["url"].startswith("https://") for one in archives)
        assert all(len(one.get("sha256", "")) == 64 or len(one["md5"]) == 32 for one in archives)
        if all("bytes" in one for one in archives) and archives:
            assert sum(one["bytes"] for one in archives) == paper["bytes"]


# --- what is written, and when ----------------------------------------------------------------------------------------


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    PAPER["cifar10"][0](tmp_path / "downloads")
    to_png, calls = to_parquet._encoded, []

    def break_off(table, rows):
        yield from to_png(table, rows[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(to_parquet, "_encoded", break_off)
    with pytest.raises(KeyboardInterrupt):
        converted("cifar10", tmp_path)
    assert [path.name for path in (tmp_path / "data/cifar10").iterdir()] == ["classes.json"]
    monkeypatch.setattr(to_parquet, "_encoded", lambda *parts: calls.append(1) or to_png(*parts))
    before = converted("cifar10", tmp_path).digest
    assert converted("cifar10", tmp_path).digest == before
    assert len(calls) == 1  # there already
    (tmp_path / "data/cifar10/test.parquet").unlink()
    assert converted("cifar10", tmp_path).digest == before


def test_a_part_never_passes_for_the_whole(tmp_path, monkeypatch):
    PAPER["cifar10"][0](tmp_path / "downloads")
    converted("cifar10", tmp_path)
    monkeypatch.setitem(DATASETS["cifar10"], "test", DATASETS["cifar10"]["test"] | {"count": 10_000})
    with pytest.raises(ValueError, match=r"test.parquet has 2 images of 10000; delete it"):
        converted("cifar10", tmp_path)
    (tmp_path / "data/cifar10/test.parquet").unlink()
    with pytest.raises(ValueError, match=r"cifar-10-batches-bin has 2 images of 10000; delete it"):
        converted("cifar10", tmp_path)


def test_what_can_be_wrong_with_originals(tmp_path):
    PAPER["cifar10"][0](tmp_path / "downloads")
    path = tmp_path / "downloads/cifar-10-batches-bin/test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match=r"test_batch.bin has 6145 bytes, not a multiple of 3073"):
        converted("cifar10", tmp_path)
    food(tmp_path / "downloads")
    (tmp_path / "downloads/food-101/images/tacos/2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*2.jpg"):
        converted("food101", tmp_path)
    tree("imagenet-a/{name}/{number}.jpg", "n01498041", "n00000000")(tmp_path / "downloads")
    with pytest.raises(ValueError, match="imagenet-a has no class 'n00000000'"):
        converted("imagenet-a", tmp_path)
    PAPER["cars"][0](tmp_path / "downloads")
    next((tmp_path / "downloads").rglob("test-00001*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 files .* not all there are"):
        converted("cars", tmp_path)
    write(tmp_path / "data/stl10/classes.json", '["cat"]')
    stl(tmp_path / "downloads")
    with pytest.raises(ValueError, match="lists other classes"):
        converted("stl10", tmp_path)
    with pytest.raises(ValueError, match="unknown split of eurosat 'train'; choose one of: test"):
        converted("eurosat", tmp_path, "train")


# --- downloads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Address of a server of this machine for the files in `tmp_path / "served"`."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(to_parquet, "SCHEME", "http")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder)) as running:
        thread = Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture
def archive(monkeypatch, server, tmp_path):
    """An archive of CIFAR-10 on that server, and its line in the table."""
    PAPER["cifar10"][0](tmp_path / "made")
    path = tmp_path / "served/cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        file.add(tmp_path / "made/cifar-10-batches-bin", "cifar-10-batches-bin")
    entry = {"url": f"{server}/{path.name}", "bytes": path.stat().st_size, "sha256": to_parquet.file_digest(path)}
    monkeypatch.setitem(DATASETS["cifar10"], "archives", [entry])
    return entry


def run(tmp_path: Path, *more: str) -> int:
    folders = ["--from", str(tmp_path / "downloads"), "--to", str(tmp_path / "data"), "--split", "test"]
    return to_parquet.main([*folders, *more])


def test_nothing_is_downloaded_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(to_parquet, "download", lambda *_: pytest.fail("downloaded"))
    assert run(tmp_path, "cifar10") == 1
    assert "cifar10 is not in" in (said := capsys.readouterr().err)
    assert "--download fetch it" in said


def test_download(tmp_path, archive, capsys):
    assert run(tmp_path, "cifar10", "--download") == 0
    assert "2 test" in capsys.readouterr().out
    samples = load_samples("cifar10", "parquet")
    assert samples.labels.tolist() == colors(samples.images)
    assert run(tmp_path, "cifar10") == 0  # nothing left to do


def test_an_interrupted_download_goes_on(tmp_path, archive, monkeypatch):
    """The server here sends all again, as one may that cannot go on in the middle."""
    part = tmp_path / "downloads/cifar-10-binary.tar.gz.part"
    part.parent.mkdir()
    part.write_bytes((tmp_path / "served/cifar-10-binary.tar.gz").read_bytes()[:100])
    assert run(tmp_path, "cifar10", "--download") == 0
    assert not part.exists()


def test_a_server_that_goes_on_in_the_middle(tmp_path, monkeypatch):
    asked = []

    class Answer(io.BytesIO):
        status = 206

    def build(handler):
        return SimpleNamespace(open=lambda request, timeout: asked.append(request.headers) or Answer(b"world"))

    monkeypatch.setattr(to_parquet.urllib.request, "build_opener", build)
    (tmp_path / "x.part").write_bytes(b"hello ")
    entry = {"url": "https://nowhere/x", "bytes": 11, "sha256": hashlib.sha256(b"hello world").hexdigest()}
    assert to_parquet.fetch(entry, tmp_path).read_bytes() == b"hello world"
    assert asked == [{"Range": "bytes=6-"}]


def test_truncated_and_other_files_are_refused(tmp_path, archive, capsys):
    path = tmp_path / "served/cifar-10-binary.tar.gz"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-9], "broke off after"),
        (whole[:-1] + b"?", "has checksum"),
        (whole * 2, "is longer"),
    ):
        path.write_bytes(content)
        assert run(tmp_path, "cifar10", "--download") == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "data/cifar10/test.parquet").exists()
        assert not (tmp_path / "downloads/cifar-10-batches-bin").exists()
    path.write_bytes(whole)
    assert run(tmp_path, "cifar10", "--download") == 0


def test_what_goes_wrong_on_the_way_is_one_line_and_made_good(tmp_path, archive, capsys, monkeypatch):
    """Against a server that goes on in the middle."""
    whole = (tmp_path / "served/cifar-10-binary.tar.gz").read_bytes()
    (tmp_path / "hub/files").mkdir(parents=True)
    (tmp_path / "hub/files/cifar-10-binary.tar.gz").write_bytes(whole)
    with serving(tmp_path / "hub") as hub:
        archive["url"] = f"{hub.url}/files/cifar-10-binary.tar.gz"
        for fault, message in (
            (503, f"{archive['url']} answers 503 (Service Unavailable); try again later"),
            (404, f"{archive['url']} answers 404 (Not Found); try again later, or get it by hand"),
            ("cut", f"broke off after {len(whole) // 2} of {len(whole)} bytes; run the same command again to go on"),
        ):
            hub.faults["cifar-10-binary.tar.gz"] = [fault]
            assert run(tmp_path, "cifar10", "--download") == 1
            said = capsys.readouterr().err
            assert message in said
            assert said.count("\n") == 1
            assert not (tmp_path / "data/cifar10/test.parquet").exists()
        with full_disk(len(whole) - 10):
            assert run(tmp_path, "cifar10", "--download") == 1
        assert "(File too large); make some room, then run the same command again" in capsys.readouterr().err
        assert run(tmp_path, "cifar10", "--download") == 0
        assert hub.ranges[0] == f"bytes={len(whole) // 2}-"
    archive["url"] = archive["url"].replace("cifar-10", "other")
    with pytest.raises(OSError, match=r"no connection to http://127.*run the same command again"):
        to_parquet.fetch(archive, tmp_path)


def test_only_https_and_no_way_around_it(tmp_path, monkeypatch, archive):
    monkeypatch.setattr(to_parquet, "SCHEME", "https")
    with pytest.raises(ValueError, match="is not https"):
        to_parquet.fetch(archive, tmp_path)
    with pytest.raises(ValueError, match="is not https"):
        to_parquet._SameScheme().redirect_request(None, None, 302, "", {}, "http://nowhere/x")


@pytest.mark.parametrize("name", ["../../outside.txt", "{root}/outside.txt", "link/outside.txt"])
def test_an_archive_cannot_write_outside_of_its_folder(name, tmp_path):
    path, into = tmp_path / "x.tar", tmp_path / "deep/into"
    with tarfile.open(path, "w") as file:
        if name.startswith("link"):
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
            file.addfile(link)
        member = tarfile.TarInfo(name.format(root=tmp_path))
        member.size = 4
        file.addfile(member, io.BytesIO(b"evil"))
    with suppress(OSError):
        to_parquet.unpack([path], into)
    assert not [found for found in tmp_path.rglob("outside.txt") if into not in found.parents]


def test_a_cut_archive_leaves_nothing(tmp_path):
    PAPER["stl10"][0](tmp_path / "made")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as file:
        file.add(tmp_path / "made/stl10_binary", "stl10_binary")
    whole = (tmp_path / "x.tar.gz").read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "x.zip").write_bytes(b"PK")
    for name in ("x.tar.gz", "x.zip"):
        with pytest.raises(OSError, match=rf"cannot unpack .*{name}.*fetch it again"):
            to_parquet.unpack([tmp_path / name], tmp_path / "into")
        assert not list((tmp_path / "into").iterdir())


def test_archives_of_every_kind(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w:gz") as packed:
            packed.addfile(tarfile.TarInfo("pictures/1.png"))
        file.writestr("set/b.tar.gz", inner.getvalue())
    (tmp_path / "c.h5.gz").write_bytes(gzip.compress(b"rows"))
    write(tmp_path / "d.mat", "matrix")
    names = ("a.zip", "c.h5.gz", "d.mat")
    to_parquet.unpack([tmp_path / name for name in names], tmp_path / "into", "set/b.tar.gz")
    assert {path.name for path in (tmp_path / "into").iterdir()} == {"set", "pictures", "c.h5", "d.mat"}
    assert (tmp_path / "into/c.h5").read_bytes() == b"rows"
    with pytest.raises(OSError, match="is there already, but not complete; delete it"):
        to_parquet.unpack([tmp_path / "d.mat"], tmp_path / "into")


def test_a_full_disk_is_noticed_before_the_download(monkeypatch, tmp_path):
    monkeypatch.setitem(roles.role("cifar10").paper, "bytes", 10**18)
    with pytest.raises(OSError, match="MB needed"):
        to_parquet.download("cifar10", tmp_path)


def test_sets_that_only_their_owners_hand_out(tmp_path, capsys):
    assert run(tmp_path, "imagenet", "--download") == 1
    assert "get it from https://image-net.org" in capsys.readouterr().err


def test_download_from_the_hub(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("robustclip.hub.fetch_dataset", lambda *asked: calls.append(asked))
    to_parquet.download("cars", tmp_path)
    patterns = ["data/train-*.parquet", "data/test-*.parquet"]
    place = "tanganke/stanford_cars", DATASETS["cars"]["revision"], patterns, tmp_path / DATASETS["cars"]["folder"]
    assert calls == [place]


def test_command(tmp_path, capsys):
    PAPER["cifar10"][0](tmp_path / "downloads")
    assert run(tmp_path, "cifar10") == 0
    assert to_parquet.main(["--list", "--to", str(tmp_path / "data")]) == 0
    listed = capsys.readouterr().out
    assert "train test*" in listed
    assert "by hand: https://image-net.org" in listed
    assert run(tmp_path, "cifar11") == 1
    assert "unknown role 'cifar11'; choose one of: cifar10" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        to_parquet.main([])
    assert "name at least one role" in capsys.readouterr().err


# --- small copies for scale photo -------------------------------------------------------------------------------------


def test_photographs_are_small_and_play_their_role_by_the_rule_of_photographs(tmp_path):
    PAPER["cifar10"][0](tmp_path / "downloads")
    PAPER["tinyimagenet"][0](tmp_path / "downloads")
    for role, folder, size in (("cifar10", "cifar10", 32), ("tinyimagenet", "tiny-imagenet", 48)):
        to_parquet.convert(role, tmp_path / "downloads", tmp_path / "data", ["test"], photo=True)
        samples = load_samples(role, "parquet")
        assert samples.source == f"parquet:{folder}"
        assert samples.images.shape[1:] == (3, size, size)
    encoded = parquet.read_table(tmp_path / "data/tiny-imagenet/test.parquet")["image"][0].as_py()["bytes"]
    assert Image.open(io.BytesIO(encoded)).size == (96, 96)
    assert set(colors(load_samples("cifar10", "parquet", n=None).images)) == {0, 1}


def test_half_of_a_set_without_a_training_part_is_for_training(tmp_path):
    for number in range(30):
        write_image(tmp_path / f"downloads/eurosat/2750/River/River_{number}.jpg", 0, (200 + number, 200))
    counts = to_parquet.convert("eurosat", tmp_path / "downloads", tmp_path / "data", photo=True)
    assert counts == {"test": 15, "train": 15}
    parts = [parquet.read_table(tmp_path / f"data/eurosat/{split}.parquet")["image"] for split in counts]
    places = [image["path"] for part in parts for image in part.to_pylist()]
    assert sorted(places) == sorted(f"River_{number}.jpg" for number in range(30))


def test_roles_that_another_set_plays_are_not_made_of_the_papers(tmp_path, capsys):
    assert to_parquet.main(["sun397", "--from", str(tmp_path), "--to", str(tmp_path), "--photo"]) == 1
    assert "no part of the papers' set plays sun397 at scale photo; the data cards say" in capsys.readouterr().err
