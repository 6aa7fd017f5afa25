"""`robustclip audit --classifier`: a model that has nothing to do with the book, on pictures of a folder."""

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import nn
from typer.testing import CliRunner

from robustclip.attacks import PGD
from robustclip.audit import CHECKS
from robustclip.cli import app
from robustclip.study import foreign

SIDE, EACH = 12, 6
MODULE = """
import torch
from torch import nn


class Colors(nn.Module):
    # red, green or blue: a linear classifier of the mean color
    def __init__(self, scale=8.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images):
        return self.scale * images.mean((2, 3))[:, [2, 1, 0]]


def build():
    return Colors()


def double():
    return Colors().double()


def half():
    return Colors().half()


def masked():
    model = Colors(1e6)  # its softmax has no slope left
    return lambda images: model(images)


def two():
    return lambda images: Colors()(images)[:, :2]


def wrong():
    return lambda images: Colors()(images).argmax(1)


def fails():
    raise RuntimeError("no weights here")


def needs(path):
    return Colors()


def no_model():
    return 3


made = Colors()
number = 7
"""


def picture(label: int, row: int, size: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    """Noise with a little more of one color; classes are named so that blue comes first, then green, then red."""
    random = np.random.default_rng(10 * label + row)
    pixels = random.integers(90, 140, (size[1], size[0], 3))
    pixels[..., 2 - label] += 25
    return pixels.astype(np.uint8)


def encoded(pixels: np.ndarray) -> bytes:
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module, and with pictures in a folder per class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("robustclip.audit.QUERIES", 20)
    (tmp_path / "foreign_models.py").write_text(MODULE)
    for label, name in enumerate(("blue", "green", "red")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for row in range(EACH):
            (tmp_path / "pictures" / name / f"{row}.png").write_bytes(encoded(picture(label, row)))
    (tmp_path / "pictures" / ".hidden").mkdir()
    (tmp_path / "pictures" / "blue" / "notes.txt").write_text("no picture")
    yield tmp_path
    sys.modules.pop("foreign_models", None)


@pytest.fixture
def call(here):
    return lambda *arguments: CliRunner().invoke(app, ["audit", *arguments], prog_name="robustclip")


# --- the reader -------------------------------------------------------------------------------------------------------


def test_pictures_are_read_as_they_are_and_labelled_by_their_folder(here):
    samples = foreign.pictures(here / "pictures", n=100)
    assert samples.images.shape == (3 * EACH, 3, SIDE, SIDE)
    assert list(samples.classes) == ["blue", "green", "red"]
    assert samples.labels.bincount().tolist() == [EACH] * 3
    true = {picture(label, row).tobytes(): label for label in range(3) for row in range(EACH)}
    for image, label in zip(samples.images, samples.labels.tolist(), strict=True):
        pixels = (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        assert true.pop(pixels.tobytes()) == label
    assert not true


def test_small_samples_are_part_of_larger_ones_and_mixed(here):
    few, many = (foreign.pictures(here / "pictures", n=n) for n in (8, 16))
    assert torch.equal(few.images, many.images[:8])
    assert len(few.labels.unique()) > 1


def test_sizes_have_to_agree_unless_one_is_asked_for(here):
    (here / "pictures" / "red" / "0.png").write_bytes(encoded(picture(2, 0, (20, 16))))
    with pytest.raises(
        ValueError, match=r"different sizes, .*12 x 12.*; bring them to one with --size, such as --size 1"
    ):
        foreign.pictures(here / "pictures")
    assert foreign.pictures(here / "pictures", size=8).images.shape == (3 * EACH, 3, 8, 8)


def test_a_folder_of_parquet_files_is_read_too(here):
    (folder := here / "set").mkdir()
    rows = [(encoded(picture(label, row)), label) for label in range(3) for row in range(EACH)]
    images = pa.array([{"bytes": raw, "path": None} for raw, _ in rows])
    table = pa.table({"image": images, "label": pa.array([label for _, label in rows])})
    parquet.write_table(table, folder / "test.parquet")
    (folder / "classes.json").write_text('["blue", "green", "red"]')
    there, plain = foreign.pictures(folder), foreign.pictures(here / "pictures")
    assert torch.equal(there.images, plain.images)
    assert torch.equal(there.labels, plain.labels)
    assert tuple(there.classes) == tuple(plain.classes)
    (folder / "test.parquet").rename(folder / "validation.parquet")
    with pytest.raises(FileNotFoundError, match=r"has parquet files, but no test\.parquet"):
        foreign.pictures(folder)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda root: (root / "empty").mkdir(), r"class 'empty' in .* has no picture"),
        (
            lambda root: (root / "red" / "x.png").write_bytes(b"no picture"),
            r"cannot decode red/x.png of folder:pictures",
        ),
        (lambda root: [path.unlink() for path in (root / "red").iterdir()], r"class 'red' in .* has no picture"),
    ],
)
def test_damaged_folders_are_named(here, harm, message):
    harm(here / "pictures")
    with pytest.raises((ValueError, OSError), match=message):
        foreign.pictures(here / "pictures")


def test_a_folder_without_classes_is_none(here):
    with pytest.raises(
        ValueError, match=r"has 0 folders and no test\.parquet; give a folder with one folder per class"
    ):
        foreign.pictures(here / "pictures" / "red")


# --- the command ------------------------------------------------------------------------------------------------------

ASKED = ("--data", "pictures", "--attack", "PGD-5", "--eps", "16/255")


def test_the_audit_of_a_foreign_classifier(call):
    shown = call("--classifier", "foreign_models:build", *ASKED)
    lines = shown.stdout.splitlines()
    assert lines[0].startswith(f"right on 100.0 % [82.4, 100.0] of {3 * EACH} images, under PGD(eps=0.0627")
    assert [line[6:].split()[0] for line in lines[1:]] == list(CHECKS)
    told = json.loads(call("--classifier", "foreign_models:build", *ASKED, "--json").stdout)
    assert [finding["check"] for finding in told["findings"]] == list(CHECKS)
    assert (told["n"], told["clean"]["value"]) == (3 * EACH, 100)
    assert told["flags"] == [line.split()[1] for line in lines if line.startswith("FLAG")]
    assert shown.exit_code == (1 if told["flags"] else 0)


def test_robustness_that_is_none_is_flagged_with_exit_code_1(call):
    done = call("--classifier", "foreign_models:masked", *ASKED, "--json")
    assert done.exit_code == 1
    assert "gradients" in json.loads(done.stdout)["flags"]


@pytest.mark.parametrize("name", ["double", "half", "made", "Colors"])
def test_other_types_instances_and_classes_are_taken(call, name):
    told = json.loads(call("--classifier", f"foreign_models:{name}", *ASKED, "--json", "--n", "6").stdout)
    assert (told["n"], told["clean"]["value"]) == (6, 100)
    assert told["attacked"]["value"] < 100


def test_what_the_audit_says_is_what_the_attack_does(here):
    classifier, samples = foreign.build("foreign_models:build", "cpu"), foreign.pictures(here / "pictures")
    found = foreign.audited(classifier, samples, PGD(eps=16 / 255, steps=5))
    attacked = PGD(eps=16 / 255, steps=5)(classifier, samples.images, samples.labels)
    stands = (classifier(attacked).argmax(1) == samples.labels).float().mean().item()
    assert found.attacked.value == pytest.approx(100 * stands)
    assert isinstance(classifier, nn.Module)


def test_labels_in_another_order_are_noticed(call, here):
    for old, new in (("blue", "x"), ("red", "blue"), ("x", "red")):
        (here / "pictures" / old).rename(here / "pictures" / new)
    done = call("--classifier", "foreign_models:build", *ASKED)
    assert "are the classes in the order of the logits?" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--classifier", "gone:build"], 2, "--classifier 'gone:build': no module 'gone' here; name a .py file"),
        (["--classifier", "foreign_models:gone"], 2, "module 'foreign_models' has no 'gone'; it defines"),
        (["--classifier", "foreign_models"], 2, "is no module:Name"),
        (["--classifier", "foreign_models:number"], 2, "is of type int, not callable"),
        (["--classifier", "foreign_models:fails"], 2, "calling it failed: RuntimeError: no weights here"),
        (["--classifier", "foreign_models:needs"], 2, "missing 1 required positional argument: 'path'"),
        (["--classifier", "foreign_models:no_model"], 2, "returns a int; return what takes pixels in [0, 1]"),
        (["--classifier", "foreign_models:two"], 1, "gives 2 logits, and folder:pictures has 3 classes (blue, green"),
        (["--classifier", "foreign_models:wrong"], 1, "the classifier fails on pictures of 3 x 12 x 12: ValueError"),
        (["--classifier", "foreign_models:build", "--data", "gone"], 2, "no folder 'gone'; give one"),
        (["--classifier", "foreign_models:build", "--attack", "BERT-Attack"], 2, "is none on images alone"),
        (["--classifier", "foreign_models:build", "--attack", "PDG"], 2, "unknown attack 'PDG'"),
        (["--classifier", "foreign_models:build", "--eps", "2"], 2, "eps=2.0 is not allowed"),
        (["--classifier", "foreign_models:build", "--size", "9999"], 2, "size=9999 is not allowed"),
        (["--classifier", "foreign_models:build", "--role", "dtd"], 2, "--role is for models of the book"),
        (["--classifier", "foreign_models:build", "--device", "abacus"], 2, "cannot compute on device 'abacus'"),
        ([], 2, "give --classifier and --data at least"),
    ],
)
def test_what_is_wrong_is_one_line(call, arguments, code, message):
    more = () if "--data" in arguments else ("--data", "pictures")
    done = call(*arguments, *more)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
