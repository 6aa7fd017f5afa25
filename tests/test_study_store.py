"""The store: whole files or none, resume, and files it cannot use."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest

from robustclip import files
from robustclip.study import Store, provenance, versions
from robustclip.study.store import signed

CELL = {"scale": "quick", "model": "clip", "role": "cifar10", "attack": "FGSM", "attacker": "blind", "defense": "none"}
CODE = {"robustclip.attacks.gradient:FGSM": "c0de"}
ANSWERS = {"predicted": [1, 2, 0], "right": [0, 1, 1]}
RECORD = {"cell": CELL | {"eps": 0.1, "n": 3, "seed": 0}, "answers": ANSWERS, "provenance": CODE, "date": "2026-01-01"}
BATCHES = [
    {"provenance": CODE, "cell": CELL, "start": start, "stop": start + 2, "answers": {"predicted": [1, 2]}}
    for start in (0, 2, 4)
]
SIGNED = [signed(batch) for batch in BATCHES]


@pytest.fixture
def cell(tmp_path):
    return Store(tmp_path).cell("quick", "abc")


def test_a_record_comes_back_as_written(cell):
    assert cell.read() is None
    written = cell.write(RECORD)
    assert cell.read() == written
    assert {name: written[name] for name in RECORD} == RECORD
    assert [path.name for path in cell.path.parent.iterdir()] == ["abc.json"]


def test_batches_come_back_without_the_torn_last_line(cell):
    assert cell.resume(CODE) == []
    for batch in BATCHES:
        cell.append(batch)
    whole = cell.part.read_bytes()
    for torn in range(len(whole) - len(json.dumps(SIGNED[2])), len(whole)):
        cell.part.write_bytes(whole[:torn])
        assert cell.parts(CODE) == SIGNED[:2]
    assert cell.resume(CODE) == SIGNED[:2]
    cell.append(BATCHES[2])
    assert cell.parts(CODE) == SIGNED


def test_batches_of_other_code_or_after_a_gap_do_not_count(cell):
    cell.resume(CODE)
    for batch in (BATCHES[0], BATCHES[0], BATCHES[2], BATCHES[1] | {"provenance": {}}):
        cell.append(batch)
    assert cell.parts(CODE) == SIGNED[:1]
    assert cell.parts({"other": "code"}) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[: len(text) // 2], "it is not JSON"),
        (lambda text: "", "it is not JSON"),
        (lambda text: "\0" * 10, "it is not JSON"),
        (lambda text: "[1, 2]", "not written by this store"),
        (lambda text: '{"accuracy": 1}', "not written by this store"),
        (lambda text: text.replace('"abc"', '"abd"'), "belongs to the cell 'abd'"),
        (lambda text: text.replace("[0, 1, 1]", "[1, 1, 1]"), "changed or damaged"),
    ],
)
def test_an_unusable_result_is_named_and_kept(cell, spoil, message):
    cell.write(RECORD)
    spoiled = spoil(cell.path.read_text())
    cell.path.write_text(spoiled)
    with pytest.raises(OSError, match=message) as error:
        cell.read()
    assert f"mv {cell.path} {cell.path}.bad" in str(error.value)
    assert cell.path.read_text() == spoiled


def damaged(batch):
    return json.dumps(signed(batch) | {"answers": {"predicted": [1, 1]}})


@pytest.mark.parametrize(
    "line", ["junk", "[]", '{"code": "c0de"}', '{"code": "c0de", "start": 0}', "7", damaged(BATCHES[0])]
)
def test_an_unusable_partial_result_is_named_and_kept(cell, line):
    cell.resume(CODE)
    cell.part.write_text(line + "\n")
    with pytest.raises(OSError, match=r"cannot use .*part.jsonl.*mv "):
        cell.resume(CODE)
    assert cell.part.read_text() == line + "\n"


def test_a_failed_write_leaves_the_old_result(cell, monkeypatch):
    old = cell.write(RECORD)

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        cell.write(RECORD | {"date": "2027-01-01"})
    assert cell.read() == old


def test_too_little_disk_is_said_before_writing(cell, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 10**5))
    with pytest.raises(OSError, match=r"only 0.1 MB free .*1 MB needed"):
        cell.write(RECORD)
    assert not cell.path.exists()


def test_an_unwritable_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="as a folder"):
        Store(tmp_path / "file").cell("quick", "abc").write(RECORD)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match="not writable; choose another"):
        Store(tmp_path / "runs").cell("quick", "abc").resume(CODE)


def test_the_environment_names_the_folder(monkeypatch, tmp_path):
    assert str(Store().root) == os.environ.get("ROBUSTCLIP_RUNS", "runs")
    monkeypatch.setenv("ROBUSTCLIP_RUNS", str(tmp_path))
    assert Store().root == tmp_path
    assert Store(Store(None)).root == tmp_path
    assert repr(Store("x")) == "Store('x')"


def is_old(record):
    return record["provenance"] != CODE


def test_status_tells_done_stale_partial_and_corrupt(tmp_path):
    store = Store(tmp_path)
    assert store.status(is_old).empty
    store.cell("quick", "a-done").write(RECORD)
    store.cell("quick", "b-stale").write(RECORD | {"provenance": {}})
    store.cell("quick", "c-corrupt").path.write_text("{")
    store.cell("quick", "d-strange").write({"date": "2026-01-01"})
    for key, batch in (("e-partial", BATCHES[0]), ("f-gap", BATCHES[1])):
        store.cell("full", key).resume({})
        store.cell("full", key).append(batch)
    found = store.status(is_old).set_index("file").rename(index=lambda name: name.split("/")[-1].split(".")[0])
    assert found["state"].to_dict() == {
        "a-done": "done",
        "b-stale": "stale",
        "c-corrupt": "corrupt",
        "d-strange": "corrupt",
        "e-partial": "partial",
        "f-gap": "partial",
    }
    assert found.loc["a-done", ["role", "eps", "done"]].tolist() == ["cifar10", 0.1, 3]
    assert found.loc["e-partial", ["role", "done"]].tolist() == ["cifar10", 2]
    assert found.loc["f-gap", "done"] == 0
    assert all("mv " in found.loc[name, "problem"] for name in ("c-corrupt", "d-strange"))
    assert set(found.loc[["a-done", "b-stale", "e-partial"], "problem"]) == {""}


def test_one_corrupt_file_does_not_hide_the_others(tmp_path):
    store = Store(tmp_path)
    kept = store.cell("quick", "a").write(RECORD)
    store.cell("quick", "b").path.write_text("{")
    assert store.records("quick") == [kept]


def test_old_leftovers_are_told_and_removed_and_new_ones_are_not(tmp_path):
    store = Store(tmp_path)
    store.cell("quick", "a").write(RECORD)
    for name, age in (("old", files.LEFTOVER + 60), ("new", 0)):
        path = tmp_path / "quick" / f"a.json.{name}.tmp"
        path.write_text("half")
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    assert store.status(is_old)["state"].tolist() == ["done", "leftover"]
    assert store.clean() == 1
    assert [path.name for path in (tmp_path / "quick").glob("*.tmp")] == ["a.json.new.tmp"]


def test_a_finished_cell_can_be_read_where_nothing_can_be_written(cell, monkeypatch):
    cell.write(RECORD)
    cell.part.write_text("left by a kill\n")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    cell.tidy()
    assert cell.read()["answers"] == ANSWERS
    assert cell.part.exists()


def test_threads_write_the_same_file_without_harm(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    cell = Store(tmp_path).cell("quick", "abc")
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda number: cell.write(RECORD | {"date": f"2026-01-{number:02}"}), range(1, 25)))
    assert cell.read() in written
    assert [path.name for path in cell.path.parent.iterdir()] == ["abc.json"]


def test_a_cell_is_measured_by_one_process_at_a_time(tmp_path):
    cell = Store(tmp_path).cell("quick", "abc")
    with cell.claimed(wait=True) as mine:
        assert mine
        with Store(tmp_path).cell("quick", "abc").claimed(wait=False) as other:
            assert not other
        (lock,) = (tmp_path / "quick" / "locks").iterdir()
        other = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        asked = subprocess.run([sys.executable, "-c", other, str(lock)], capture_output=True, text=True)
        assert "BlockingIOError" in asked.stderr  # a process that imports little cannot have it either
    with cell.claimed(wait=False) as mine:
        assert mine


def test_provenance_is_there_in_a_clone_and_absent_without_git(monkeypatch):
    assert {"python", "torch"} <= set(versions())
    commit = provenance.commit.__wrapped__
    assert len(commit()) in (0, 40)
    monkeypatch.setenv("PATH", "")
    assert commit() == ""
