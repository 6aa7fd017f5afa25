"""Input checks, the progress helper, and the bridge to torchvision: what they let through and what they say."""

import importlib.util
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustclip import _torchvision, checks
from robustclip.progress import progress


def images(value: float = 0.5, n: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.full((n, channels, 4, 4), value)


def spoiled(value: float) -> torch.Tensor:
    """Good images but for a single number."""
    batch = images()
    batch[1, 2, 3, 3] = value
    return batch


# --- images and labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("good", [images(0.0), images(1.0), images(n=0), images().half(), images().double()])
def test_good_images_come_back_untouched(good):
    assert checks.check_images(good) is good


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (images()[0], r"shape \(n, 3, height, width\), got \(3, 4, 4\)"),
        (images(channels=1), r"got \(2, 1, 4, 4\)"),
        ((images() * 255).byte(), r"torch\.uint8; divide bytes by 255"),
        (spoiled(math.nan), "NaN"),
        (spoiled(math.inf), "infinity"),
        (spoiled(1.5), r"\[0\.5, 1\.5\]; normalisation belongs in the model"),
        (spoiled(-0.25), r"\[-0\.25, 0\.5\]"),
        (images().numpy(), r"must be a torch\.Tensor, got ndarray; use torch\.as_tensor"),
    ],
)
def test_bad_images_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        checks.check_images(bad)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_good_labels_come_back(dtype):
    labels = torch.tensor([0, 2, 1], dtype=dtype)
    assert checks.check_labels(labels, classes=3, images=3) is labels


def test_no_labels_for_no_images():
    assert len(checks.check_labels(torch.zeros(0, dtype=torch.long), classes=3, images=0)) == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([0, 3]), "label 3 is out of range; this classifier has classes 0 to 2"),
        (torch.tensor([0, -1]), "label -1 is out of range"),
        (torch.tensor([0.0, 1.0]), r"integers of shape \(n,\), got torch\.float32"),
        (torch.tensor([[0, 1]]), r"of shape \(1, 2\)"),
        (torch.tensor([0]), "got 1 labels for 2 images"),
        (torch.tensor([True, False]), r"integers of shape \(n,\), got torch\.bool"),
        (np.array([0, 1]), r"must be a torch\.Tensor, got ndarray; use torch\.as_tensor"),
        ([0, 1], "got list"),
    ],
)
def test_bad_labels_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        checks.check_labels(bad, classes=3, images=2)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ((torch.zeros(2, 3),), r"must return logits of shape \(2, classes\), got a tuple; wrap it, as in lambda"),
        (torch.zeros(2), r"of shape \(2, classes\), got shape \(2,\)"),
        (torch.zeros(2, 3, 1), r"got shape \(2, 3, 1\)"),
        (torch.zeros(3, 3), r"got shape \(3, 3\)"),
    ],
)
def test_what_is_no_table_of_logits_is_named(logits, message):
    good = torch.zeros(2, 3)
    assert checks.check_logits(good, 2) is good
    with pytest.raises(ValueError, match=message):
        checks.check_logits(logits, 2)


# --- numbers and choices ----------------------------------------------------------------------------------------------


@given(st.floats(allow_nan=True), st.floats(-10, 10), st.floats(0, 10))
def test_range_accepts_exactly_the_range(value, low, width):
    if low <= value <= low + width:
        assert checks.check_range("eps", value, low, low + width) == value
    else:
        with pytest.raises(ValueError, match="eps="):
            checks.check_range("eps", value, low, low + width)


@pytest.mark.parametrize("value", ["0.1", None, True, math.nan, math.inf, [0.1], torch.tensor(0.1)])
def test_range_refuses_what_is_not_a_finite_number(value):
    with pytest.raises(ValueError, match=r"eps=.* is not allowed; it must be a finite number at least 0"):
        checks.check_range("eps", value, 0)


def test_range_names_both_ends():
    with pytest.raises(ValueError, match=r"eps=8 is not allowed; it must be a finite number between 0 and 1"):
        checks.check_range("eps", 8, 0, 1)


def test_integers_are_whole():
    assert checks.check_integer("steps", 3, 1) == 3
    with pytest.raises(ValueError, match=r"steps=2\.5 is not allowed; it must be a whole number, such as 2"):
        checks.check_integer("steps", 2.5, 1)
    with pytest.raises(ValueError, match=r"steps=0 is not allowed; it must be a finite number at least 1"):
        checks.check_integer("steps", 0, 1)


@pytest.mark.parametrize("steps", [np.int64(2), np.uint8(2), 2])
def test_numpy_numbers_become_plain_ones(steps):
    found = checks.check_integer("steps", steps, 1)
    assert (found, type(found)) == (2, int)
    for value in (np.float64(0.1), np.float32(0.5)):
        assert type(checks.check_range("eps", value, 0)) is float
    assert type(checks.check_range("eps", np.int32(1), 0)) is int
    for wrong in (np.bool_(True), np.float64("nan"), np.int64(-1)):
        with pytest.raises(ValueError, match="eps="):
            checks.check_range("eps", wrong, 0)


def test_choice_lists_the_choices():
    assert checks.check_choice("norm", "l2", {"linf": 1, "l2": 2}) == "l2"
    with pytest.raises(ValueError, match="unknown norm 'l3'; choose one of: linf, l2"):
        checks.check_choice("norm", "l3", ["linf", "l2"])


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folder_is_made(tmp_path):
    assert checks.check_folder(tmp_path / "a" / "b").is_dir()
    assert checks.check_folder(str(tmp_path / "a")) == tmp_path / "a"


@pytest.mark.parametrize("below", ["taken", "taken/inside"])
def test_folder_in_the_place_of_a_file(tmp_path, below):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match=r"cannot use .*taken.* as a folder .*; choose another one"):
        checks.check_folder(tmp_path / below)


def test_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(OSError, match="is not writable; choose another one or change its permissions"):
        checks.check_folder(tmp_path)


def test_folder_on_a_full_disk(tmp_path):
    with pytest.raises(OSError, match=r"only [0-9.]+ MB free for .*, 1e\+12 MB needed"):
        checks.check_folder(tmp_path, free_megabytes=1e12)


# --- progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wish", "terminal", "shown"), [("1", False, True), ("0", True, False), (None, False, False)])
def test_progress_yields_everything_and_shows_when_wanted(monkeypatch, capsys, wish, terminal, shown):
    monkeypatch.delenv("ROBUSTCLIP_PROGRESS", raising=False)
    if wish:
        monkeypatch.setenv("ROBUSTCLIP_PROGRESS", wish)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    assert list(progress(range(3), "counting sheep")) == [0, 1, 2]
    assert ("counting sheep" in capsys.readouterr().err) == shown


# --- torchvision ------------------------------------------------------------------------------------------------------


def test_torchvision_imports_after_prepare():
    _torchvision.prepare()
    _torchvision.prepare()  # twice is once
    from torchvision.ops import misc

    assert torch.ops.torchvision.nms is not None
    assert len(_torchvision._declared) <= 1
    assert misc.FrozenBatchNorm2d(3)(torch.zeros(1, 3, 2, 2)).shape == (1, 3, 2, 2)


def test_binary_that_cannot_load(tmp_path, monkeypatch):
    place = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: place)
    assert not _torchvision._binary_loads(), "no binary at all"
    (tmp_path / f"_C{_torchvision.importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    assert not _torchvision._binary_loads(), "a binary of another torch"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _torchvision._binary_loads(), "no torchvision: nothing to repair"


def test_prepare_leaves_working_operators_alone(monkeypatch):
    monkeypatch.setattr(_torchvision, "_declared", [])
    monkeypatch.setattr(_torchvision.torch.ops, "torchvision", SimpleNamespace(), raising=False)
    monkeypatch.setattr(_torchvision, "_binary_loads", lambda: True)
    _torchvision.prepare()
    assert _torchvision._declared == []
