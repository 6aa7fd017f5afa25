"""The script behind `make gpu`, run on a CPU with hardly any work; what it measures there is not looked at."""

import json
import sys
import warnings
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
import torch

from robustclip import models

PAGE = "book/appendix/benchmarks.ipynb"


@pytest.fixture(scope="module")
def gpu(root):
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "benchmarks")
        yield import_module("gpu")
        for name in ("gpu", "run", "side_by_side", "bench_image"):
            sys.modules.pop(name)


@pytest.fixture(scope="module")
def written(gpu, tmp_path_factory) -> dict:
    """What a tiny run writes."""
    out = tmp_path_factory.mktemp("gpu") / "cpu.json"
    with warnings.catch_warnings(action="ignore"):  # torch's compiler looks at .grad of what is no leaf
        gpu.main(["--device", "cpu", "--tiny", "--out", str(out)])
    return json.loads(out.read_text())


def test_every_part_is_written_with_its_machine(gpu, written):
    assert list(written) == sorted(gpu.PARTS)
    for part in written.values():
        assert part["machine"]["gpu"] is None
        assert part["device"] == "cpu"
        assert {"torch", "robustclip"} <= part["versions"].keys()
        assert part["seconds"] > 0


def test_the_cpu_is_at_one_with_itself(gpu, written):
    rows = {row["name"]: row for row in written["parity"]["rows"]}
    assert list(rows) == ["logits", *gpu.attacks(gpu.TINY), "TTC", "an update of TeCoA"]
    assert all(row["apart"] == 0 and row["passed"] for row in rows.values())
    assert all(row["cpu"] == row["device"] for row in rows.values() if "images" in row)


def test_throughput_training_and_memory_have_their_rows(gpu, written):
    rows = written["throughput"]["rows"]
    assert [row["name"] for row in rows] == list(gpu.VARIANTS)
    assert all(row["images_steps_per_second"] > 0 and row["share_of_peak"] > 0 for row in rows)
    assert all(row["cosine"] > 0.9 for row in rows), "a variant does not compute the gradient"
    assert [row["name"].split(",")[0] for row in written["training"]["rows"]] == ["TeCoA"] * 2 + ["MMCoA"] * 2
    assert all(row["pictures_per_second"] > 0 for row in written["training"]["rows"])
    assert [row["peak_megabytes"] for row in written["memory"]["rows"]] == [None] * len(gpu.TINY.batches)


def test_what_is_not_the_same_does_not_pass(gpu, clip):
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert gpu.same_logits(logits, logits)["passed"]
    assert not gpu.same_logits(logits, logits + 0.01)["passed"]
    right = torch.ones(64, dtype=torch.bool)
    row = gpu.same_outcomes("PGD", right, right.scatter(0, torch.tensor([1, 2, 3, 4]), False))
    assert (row["cpu"], row["device"], row["apart"], row["passed"]) == (100, 93.75, 6.25, False)
    other = models.load(device="cpu")
    with torch.no_grad():
        other.network.visual.conv1.weight *= 1.5
    assert not gpu.same_update(gpu.TINY, clip, other)["passed"]


def test_a_row_that_fails_says_why_and_ends_the_run_with_an_error(gpu, tmp_path, monkeypatch, capsys):
    def broken(sizes, device):
        return [gpu.whole("bfloat16", lambda: torch.zeros(2) @ torch.zeros(3))]

    monkeypatch.setattr(gpu, "PARTS", {"throughput": broken})
    with pytest.raises(SystemExit, match="did not pass"):
        gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "out.json")])
    (row,) = json.loads((tmp_path / "out.json").read_text())["throughput"]["rows"]
    assert row["failed"].startswith("RuntimeError")
    assert "RuntimeError" in capsys.readouterr().out


def test_no_part_starts_after_the_time_is_up(gpu, tmp_path, capsys):
    gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "out.json"), "--minutes", "-1"])
    assert capsys.readouterr().out.count("not reached") == len(gpu.PARTS)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(gpu, capsys, root):
    before = sorted((root / "benchmarks" / "results").iterdir())
    gpu.main([])
    assert capsys.readouterr().out.startswith("No GPU here: torch")
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "give another file, --out FILE" in capsys.readouterr().err
    assert sorted((root / "benchmarks" / "results").iterdir()) == before


def shown(root: Path, file: str) -> list:
    """What the page shows of a file of the GPU."""
    cells = {cell.id: cell for cell in nbformat.read(root / PAGE, as_version=4).cells if cell.cell_type == "code"}
    found = []
    names = {"file": "gone.json", "gpu_file": file}
    exec(cells["setup"].source, names)
    exec(cells["gpu"].source, names | {"display": found.append})
    return found


def test_the_page_shows_the_tables_of_a_gpu_if_there_are_any(root, written, tmp_path):
    (file := tmp_path / "gpu.json").write_text(json.dumps(written))
    first, *tables = shown(root, str(file))
    assert "Measured on" in first.data
    text = " ".join(str(table._repr_html_()) for table in tables)
    assert len(tables) == len(written)
    for part in written.values():
        assert all(row["name"] in text for row in part["rows"])


def test_the_page_says_that_no_gpu_has_run_it_if_there_is_no_file(root, tmp_path):
    (only,) = shown(root, str(tmp_path / "gone.json"))
    assert "has never run on a GPU" in only.data
