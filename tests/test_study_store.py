"""The store: whole files or none, resume, and files it cannot use."""

import json
import os
import shutil
from collections import namedtuple

import pytest

from robustclip.study import Store, code_digest, versions
from robustclip.study import store as engine

CELL = {"scale": "quick", "model": "clip", "role": "cifar10", "attack": "FGSM", "attacker": "blind", "defense": "none"}
RECORD = {"cell": CELL | {"eps": 0.1, "n": 3, "seed": 0}, "correct": "011", "code": "c0de", "date": "2026-01-01"}
BATCHES = [
    {"code": "c0de", "cell": CELL, "start": start, "predicted": [1, 2], "cost": [0, 2, 0]} for start in (0, 2, 4)
]


@pytest.fixture
def entry(tmp_path):
    return Store(tmp_path).entry("quick", "abc")


def test_a_record_comes_back_as_written(entry):
    assert entry.read() is None
    written = entry.write(RECORD)
    assert entry.read() == written
    assert {name: written[name] for name in RECORD} == RECORD
    assert [path.name for path in entry.path.parent.iterdir()] == ["abc.json"]


def test_batches_come_back_without_the_torn_last_line(entry):
    assert entry.resume("c0de") == []
    for batch in BATCHES:
        entry.append(batch)
    whole = entry.part.read_bytes()
    for torn in range(len(whole) - len(json.dumps(BATCHES[2])), len(whole)):
        entry.part.write_bytes(whole[:torn])
        assert entry.batches("c0de") == BATCHES[:2]
    assert entry.resume("c0de") == BATCHES[:2]
    entry.append(BATCHES[2])
    assert entry.batches("c0de") == BATCHES


def test_batches_of_other_code_or_after_a_gap_do_not_count(entry):
    entry.resume("c0de")
    for batch in (BATCHES[0], BATCHES[0], BATCHES[2], BATCHES[1] | {"code": "other"}):
        entry.append(batch)
    assert entry.batches("c0de") == BATCHES[:1]
    assert entry.batches("other") == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[: len(text) // 2], "it is not JSON"),
        (lambda text: "", "it is not JSON"),
        (lambda text: "\0" * 10, "it is not JSON"),
        (lambda text: "[1, 2]", "not written by this store"),
        (lambda text: '{"accuracy": 1}', "not written by this store"),
        (lambda text: text.replace('"abc"', '"abd"'), "belongs to the cell 'abd'"),
        (lambda text: text.replace('"011"', '"111"'), "changed or damaged"),
    ],
)
def test_an_unusable_result_is_named_and_kept(entry, spoil, message):
    entry.write(RECORD)
    spoiled = spoil(entry.path.read_text())
    entry.path.write_text(spoiled)
    with pytest.raises(OSError, match=message) as error:
        entry.read()
    assert f"mv {entry.path} {entry.path}.bad" in str(error.value)
    assert entry.path.read_text() == spoiled


@pytest.mark.parametrize("line", ["junk", "[]", '{"code": "c0de"}', "7"])
def test_an_unusable_partial_result_is_named_and_kept(entry, line):
    entry.resume("c0de")
    entry.part.write_text(line + "\n")
    with pytest.raises(OSError, match=r"cannot use .*part.jsonl.*mv "):
        entry.resume("c0de")
    assert entry.part.read_text() == line + "\n"


def test_a_failed_write_leaves_the_old_result(entry, monkeypatch):
    old = entry.write(RECORD)

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        entry.write(RECORD | {"correct": "000"})
    assert entry.read() == old


def test_too_little_disk_is_said_before_writing(entry, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 10**5))
    with pytest.raises(OSError, match=r"only 0.1 MB free .*1 MB needed"):
        entry.write(RECORD)
    assert not entry.path.exists()


def test_an_unwritable_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="as a folder"):
        Store(tmp_path / "file").entry("quick", "abc").write(RECORD)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match="not writable; choose another"):
        Store(tmp_path / "runs").entry("quick", "abc").resume("c0de")


def test_the_environment_names_the_folder(monkeypatch, tmp_path):
    assert str(Store().root) == os.environ.get("ROBUSTCLIP_RUNS", "runs")
    monkeypatch.setenv("ROBUSTCLIP_RUNS", str(tmp_path))
    assert Store().root == tmp_path
    assert Store.of(None).root == tmp_path
    assert repr(Store.of("x")) != repr(Store.of("y"))


def test_status_tells_done_stale_partial_and_corrupt(tmp_path):
    store = Store(tmp_path)
    assert store.status().empty
    store.entry("quick", "a-done").write(RECORD | {"code": code_digest()})
    store.entry("quick", "b-stale").write(RECORD)
    store.entry("quick", "c-corrupt").path.write_text("{")
    for key, code in (("d-partial", code_digest()), ("e-old", "0ld")):
        store.entry("full", key).resume("")
        store.entry("full", key).append(BATCHES[0] | {"code": code})
    found = store.status().set_index("file").rename(index=lambda name: name.split("/")[-1].split(".")[0])
    assert found["state"].to_dict() == {
        "a-done": "done",
        "b-stale": "stale",
        "c-corrupt": "corrupt",
        "d-partial": "partial",
        "e-old": "partial",
    }
    assert found.loc["a-done", ["role", "eps", "done"]].tolist() == ["cifar10", 0.1, 3]
    assert found.loc["d-partial", ["role", "done"]].tolist() == ["cifar10", 2]
    assert found.loc["e-old", "done"] == 0
    assert "mv " in found.loc["c-corrupt", "problem"]
    assert set(found.loc[["a-done", "b-stale", "d-partial"], "problem"]) == {""}


def test_the_code_digest_follows_the_source(tmp_path, monkeypatch):
    def digest():
        return engine.code_digest.__wrapped__()

    monkeypatch.setattr(engine, "files", lambda name: tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "models.py").write_text("a = 1\n")
    (tmp_path / "data" / "x.py").write_text("b = 1\n")
    before = digest()
    (tmp_path / "cli.py").write_text("not measured\n")
    (tmp_path / "models.py").write_bytes(b"a = 1\r\n")
    assert digest() == before
    (tmp_path / "data" / "x.py").write_text("b = 2\n")
    assert digest() != before


def test_provenance_is_there_in_a_clone_and_absent_without_git(monkeypatch):
    assert {"python", "torch"} <= set(versions())
    commit = engine.commit.__wrapped__
    assert len(commit()) in (0, 40)
    monkeypatch.setenv("PATH", "")
    assert commit() == ""
