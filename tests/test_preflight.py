"""What a run needs is looked for before anything is fetched, and all that is missing is told at once."""

import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from hub import PAPER_SCALE
from robustclip import study
from robustclip.cli import app
from robustclip.study import grid, preflight, scale
from test_to_parquet import encoded

SCALE = (
    PAPER_SCALE
    + """
[models]
clip = "ViT-B-32/openai"
tiny = "tinyworld-clip"
"""
)


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run the command in an empty folder; models that it fetches are noted, not fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROBUSTCLIP_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("ROBUSTCLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("ROBUSTCLIP_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr("robustclip.hub.cached", lambda *_: [])
    fetched = []

    def fetch(name: str) -> None:
        fetched.append(name)
        raise OSError(f"could not fetch {name!r}: no connection")

    monkeypatch.setattr("robustclip.hub.fetch", fetch)
    (tmp_path / "small.toml").write_text(SCALE)
    (tmp_path / "data").mkdir()

    def run(command: str, *options: str):
        done = CliRunner().invoke(app, [command, "--scale", "small.toml", *options], prog_name="robustclip")
        return SimpleNamespace(code=done.exit_code, lines=done.stderr.splitlines(), fetched=fetched)

    return run


def put(folder: Path, *splits: str) -> None:
    """A set of two classes, as `tools/to_parquet.py` leaves it."""
    folder.mkdir(parents=True)
    (folder / "classes.json").write_text(json.dumps(["cat", "dog"]))
    for split in splits:
        rows = pa.table({"image": [{"bytes": encoded(label), "path": None} for label in (0, 1)], "label": [0, 1]})
        made = {"robustclip": json.dumps({"data": "a set", "sha256": "0"})}
        parquet.write_table(rows.replace_schema_metadata(made), folder / f"{split}.parquet")


def test_all_that_is_missing_is_told_with_what_gets_it(call, tmp_path):
    put(tmp_path / "data/dtd", "test")
    roles = [f"--role={name}" for name in ("cifar10", "dtd", "imagenet", "pets", "busi")]
    done = call("run", *roles, "--attack", "clean", "--attack", "BERT-Attack")
    assert (done.code, done.fetched) == (1, [])
    assert done.lines == [
        "error: nothing was fetched, because this is missing:",
        f"  4 data sets, which a tool of the repository makes, into ROBUSTCLIP_DATA={tmp_path / 'data'}:",
        "  python tools/to_parquet.py cifar10 pets --from DOWNLOADS --download   (0.98 GB)",
        "  python tools/to_parquet.py imagenet busi --from DOWNLOADS   (handed out by their owners only; put them "
        "there first, `python tools/to_parquet.py --list` says what)",
        "  the language model of attacks on prompts: hf download bert-base-uncased config.json model.safetensors "
        "tokenizer.json tokenizer_config.json vocab.txt (0.4 GB)",
    ]


def test_no_folder_and_no_room_are_told_too(call, monkeypatch):
    monkeypatch.setattr("robustclip.study.preflight.shutil.disk_usage", lambda _: SimpleNamespace(free=10**9))
    done = call("run", "--role", "cifar10", "--role", "stl10")
    assert f"  room: 1.0 GB are free for {Path('data').absolute()}, about 5.6 GB are needed" in done.lines
    monkeypatch.delenv("ROBUSTCLIP_DATA")
    done = call("run", "--role", "cifar10")
    assert done.lines[1].endswith("into a folder DATA; set ROBUSTCLIP_DATA=DATA:")
    assert "  python tools/to_parquet.py cifar10 --from DOWNLOADS --to DATA --download   (0.17 GB)" in done.lines


def test_models_are_fetched_when_all_is_there(call, tmp_path):
    put(tmp_path / "data/dtd", "test")
    done = call("run", "--role", "dtd", "--model", "clip", "--model", "tiny", "--attack", "clean")
    assert done.fetched == ["ViT-B-32/openai"]
    assert done.lines == ["error: could not fetch 'ViT-B-32/openai': no connection"]


def test_a_damaged_set_says_what_it_suffers_from(call, tmp_path):
    put(tmp_path / "data/dtd", "test")
    (tmp_path / "data/dtd/test.parquet").write_bytes(b"PAR1")
    done = call("run", "--role", "dtd", "--role", "pets", "--attack", "clean")
    assert "cannot read test.parquet" in done.lines[1]
    assert done.lines[2].startswith("  1 data sets, which")


def test_fine_tuning_needs_the_training_part(call, tmp_path):
    put(tmp_path / "data/cifar10", "test")
    done = call("train", "--recipe", "TeCoA", "--role", "cifar10")
    assert (done.code, done.fetched) == (1, [])
    assert "to_parquet.py cifar10 --from DOWNLOADS --download" in done.lines[2]
    put(tmp_path / "data/cifar100", "test", "train")
    assert call("train", "--recipe", "TeCoA", "--role", "cifar100").fetched == ["ViT-B-32/openai"]


def test_a_store_that_cannot_be_written(call, tmp_path):
    put(tmp_path / "data/dtd", "test")
    (tmp_path / "runs").write_text("a file")
    done = call("run", "--role", "dtd", "--attack", "clean")
    assert (done.code, done.fetched) == (1, [])
    assert "cannot use" in done.lines[0]


def test_what_is_shipped_of_data_and_models_will_do(call, tmp_path, monkeypatch):
    cells = grid("small.toml", roles=["dtd"], attacks=["clean"])
    known = {"data": {"dtd/parquet": {}}, "models": {"ViT-B-32/openai": "digest"}}
    monkeypatch.setattr(preflight, "known", lambda _: known)
    preflight.prepare(cells)
    with pytest.raises(FileNotFoundError, match="nothing was fetched"):
        preflight.prepare(cells, shipped=False)
    put(tmp_path / "data/dtd", "test")
    with pytest.raises(OSError, match="could not fetch"):
        preflight.prepare(cells, shipped=False)


def test_what_is_measured_again_needs_data_and_models_of_its_own(call, monkeypatch):
    (cell,) = grid("small.toml", roles=["dtd"], attacks=["clean"])
    monkeypatch.setattr(preflight, "known", lambda _: {"data": {"dtd/parquet": {}}, "models": {"ViT-B-32/openai": "0"}})
    monkeypatch.setattr("robustclip.study.shipped.shipped_records", lambda _: [{"made_by": cell.made_by()}])
    with pytest.raises(FileNotFoundError, match=r"nothing was fetched, .*\n  1 data sets"):
        study.reproduce("small")


def test_other_worlds_need_no_more_than_before(monkeypatch, tmp_path):
    monkeypatch.setenv("ROBUSTCLIP_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    preflight.prepare(grid("quick", roles=["cifar10"], attacks=["clean", "BERT-Attack"]))
    with pytest.raises(FileNotFoundError, match=r"role 'dtd' at source 'parquet' needs a folder dtd"):
        preflight.prepare_training(scale("photo"), "dtd")
