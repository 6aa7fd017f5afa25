"""The paper scale from nothing to a table, against a hub and a server of files on this machine."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from hub import PAPER_SCALE, TINY, Hub, serving, sha256, tiny_bert, tiny_clip
from official import DATASETS
from test_to_parquet import PAPER, write, write_image

OPENAI = "timm/vit_base_patch32_clip_224.openai"  # where open_clip looks for ViT-B-32/openai
SCALE = (
    PAPER_SCALE
    + """
assumed_speed = 1100
roles = ["cifar10", "pets", "dtd", "cars", "btmri", "coco"]
[models]
clip = "ViT-B-32/openai"
fare = "hf-hub:org/tiny"
"""
)
# What a user does, in a process whose libraries know no other hub: fetch data sets, then call the program. Two things
# are not as on the network: files may come from this machine by http, and ViT-B-32 is a small network.
DRIVER = """
import contextlib, io, json, sys, traceback
from pathlib import Path
steps, sets, small = (json.loads(text) for text in sys.argv[1:])
import official, to_parquet
from robustclip import cli, study  # which lets torchvision be imported
import open_clip
from huggingface_hub.cli import hf
to_parquet.SCHEME = "http"
official.DATASETS.update(sets)
open_clip.add_model_config(Path(small))
def perform(program, *arguments):
    if program == "to_parquet":
        return to_parquet.main(arguments)
    if program == "hf":
        sys.argv = ["hf", *arguments]
        return hf.main()
    if program == "retrieve":
        found = study.evaluate(study.grid(*arguments, roles=["coco"], attacks=["clean"], task="retrieve"))
        return print(found["n"].tolist(), end="")
    return cli.app([program, *arguments], standalone_mode=False)
done = []
for step in steps:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = perform(*step)
        except SystemExit as end:
            code = end.code
        except Exception:
            code = 99
            traceback.print_exc()
    done.append((code if isinstance(code, int) else 0, out.getvalue(), err.getvalue()))
print(json.dumps(done))
"""


ROLES = ("cifar10", "pets", "dtd", "cars", "btmri", "coco")
INSIDE = {"cifar10": "cifar-10-batches-bin", "pets": "oxford-iiit-pet", "dtd": "dtd/dtd"}  # of the archives


@pytest.fixture
def served(tmp_path):
    """A hub with CLIPs, a BERT and a data set; archives of data sets, and two that their owners handed out."""
    folder, made = tmp_path / "served", tmp_path / "made"
    tiny_clip(folder / "models/org/tiny")
    tiny_clip(folder / "models" / OPENAI, config=False)
    (tmp_path / "ViT-B-32.json").write_text(json.dumps(TINY))
    tiny_bert(folder / "models/bert-base-uncased")
    PAPER["cars"][0](folder / "datasets/tanganke")
    PAPER["btmri"][0](tmp_path / "downloads")
    captions(tmp_path / "downloads")
    with serving(folder) as hub:
        sets = {name: DATASETS[name] | {"test": DATASETS[name]["test"] | {"count": None}} for name in ROLES}
        for name, inside in INSIDE.items():
            PAPER[name][0](made)
            sets[name]["archives"] = [archive(hub, name, made / sets[name].get("into", ""), made / inside)]
        for options in sets.values():
            options.pop("train", None), options.pop("validation", None)
        yield hub, sets


def archive(hub: Hub, name: str, into: Path, inside: Path) -> dict:
    """Pack a folder below `into` as the server's archive of a data set; its line in the table of sources."""
    path = hub.folder / "files" / f"{name}.tar.gz"
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as file:
        for part in inside.iterdir() if inside == into else [inside]:
            file.add(part, part.relative_to(into))
    content = path.read_bytes()
    return {"url": f"{hub.url}/files/{path.name}", "bytes": len(content), "sha256": sha256(content)}


def captions(root: Path) -> None:
    """Two pictures of MSCOCO with their captions."""
    entries = []
    for color in range(2):
        write_image(root / f"coco/val2014/{color}.jpg", color)
        sentences = [{"raw": f"a picture of color {color}, {number} times"} for number in range(5)]
        entries.append({"filepath": "val2014", "filename": f"{color}.jpg", "split": "test", "sentences": sentences})
    write(root / "coco/dataset_coco.json", json.dumps({"images": entries}))


def perform(tmp_path: Path, hub: Hub, sets: dict, *steps: list[str]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each step."""
    place = {"ROBUSTCLIP_DATA": str(tmp_path / "data"), "ROBUSTCLIP_RUNS": str(tmp_path / "runs")}
    environment = hub.environment(tmp_path / "home", **place, PYTHONPATH=":".join(sys.path), OMP_NUM_THREADS="1")
    told = [json.dumps(part) for part in (steps, sets, str(tmp_path / "ViT-B-32.json"))]
    done = subprocess.run([sys.executable, "-c", DRIVER, *told], env=environment, cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [(code, *texts) for code, *texts in json.loads(done.stdout)]


@pytest.mark.slow
def test_from_nothing_to_a_table(served, tmp_path):
    """Each kind of source: archives, a data set of the hub, pictures and captions that only their owners hand out."""
    hub, sets = served
    (tmp_path / "small.toml").write_text(SCALE)
    convert = ["to_parquet", *ROLES, "--from", str(tmp_path / "downloads"), "--to", str(tmp_path / "data")]
    run = ["run", "--scale", "small.toml", *(f"--role={name}" for name in ROLES[:-1])]
    measure = [*run, "--model", "clip", "--model", "fare", "--attack", "clean", "--attack", "PGD-2", "--json"]
    texts = ["run", "--scale", "small.toml", "--role", "pets", "--attack", "BERT-Attack"]
    words = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    (unready, fetched, measured, speechless, _, attacked, reproduced, retrieved) = perform(
        tmp_path, hub, sets,
        measure, [*convert, "--download"], measure, texts, ["hf", "download", "bert-base-uncased", *words],
        [*texts, "--json"], ["reproduce", "--scale", "small.toml"], ["retrieve", "small.toml"],
    )  # fmt: skip
    assert unready[0] == 1
    assert "to_parquet.py cifar10 pets dtd cars --from DOWNLOADS --download   (2.59 GB)" in unready[2]
    assert "to_parquet.py btmri --from DOWNLOADS   (handed out by their owners" in unready[2]
    assert fetched[0] == 0, fetched
    rows = json.loads(measured[1])
    assert [(row["model"], row["role"], row["attack"]) for row in rows] == [
        (model, role, attack) for model in ("clip", "fare") for role in ROLES[:-1] for attack in ("clean", "PGD-2")
    ]
    assert {row["n"] for row in rows} == {2}
    assert all(row["source"].startswith("paper:") for row in rows)
    assert hub.fetched("open_clip_model.safetensors") == 2  # each once
    assert "hf download bert-base-uncased" in speechless[2]
    assert json.loads(attacked[1])[0]["distinct"] is not None
    assert reproduced[0] == 0, reproduced
    assert "CLIP on OxfordPets, clean    87.44" in reproduced[1]
    assert retrieved[:2] == (0, "[2, 2, 2, 10, 10, 10]")
