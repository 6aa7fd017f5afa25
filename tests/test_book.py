"""Every notebook runs, and the book renders without a warning and without the network."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

import nbformat
import papermill
import pytest
import yaml
from bs4 import BeautifulSoup

from robustclip import report

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    path for path in (ROOT / "book").rglob("*") if path.suffix in {".md", ".ipynb"} and "/." not in path.as_posix()
]
NOTEBOOKS = sorted(path.relative_to(ROOT).as_posix() for path in PAGES if path.suffix == ".ipynb")
SHIPPED = (
    ROOT / "results" / "quick" / "cells.parquet"
).is_file()  # then pages read what the book shows, else they measure little
TINY = {"n": 24, "scale": "tests/data/quick.toml"}  # for the notebooks that have these parameters


def tool(name: str):
    """One of the scripts in `tools`, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def call(*command: object, **variables: object) -> None:
    own = os.environ | {name: str(value) for name, value in variables.items()}
    result = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout[-20_000:]


@pytest.fixture(scope="session")
def executed() -> Path:
    """The executed book."""
    out = ROOT / "_build" / "test" / "executed"
    small = [part for item in TINY.items() for part in ("-p", *item)] if not SHIPPED else []
    call(sys.executable, "tools/execute.py", "--out", out, *small, ROBUSTCLIP_RUNS=out.with_name("runs"))
    return out


@pytest.fixture(scope="session")
def html(executed) -> Path:
    """The rendered book; a warning is a failure."""
    out = executed.parent
    call(Path(sys.executable).with_name("jupyter-book"), "build", "-q", "-W", "-n", "--keep-going", "--all",
         "--path-output", out, executed)  # fmt: skip
    return out / "_build" / "html"


@pytest.fixture(scope="session")
def pages(html) -> dict[Path, BeautifulSoup]:
    return {path: BeautifulSoup(path.read_text(encoding="utf8"), "html.parser") for path in sorted(html.rglob("*.html"))
            if "_static" not in path.parts}  # fmt: skip


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(executed, name):
    notebook = nbformat.read(executed / name, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert code
    assert all(cell.execution_count for cell in code)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_stored_clean(name):
    text = (ROOT / name).read_text(encoding="utf8")
    assert tool("clear_notebooks").clean(text) == text, "run `make format`"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_parameters_are_typed_and_explained(name):
    parameters = papermill.inspect_notebook(str(ROOT / name))
    for parameter in parameters.values():
        assert parameter["inferred_type_name"] != "None", f"{parameter['name']} has no annotation"
        assert parameter["help"], f"{parameter['name']} has no comment"


def test_all_notebooks_have_the_same_install_cell_before_their_first_code():
    first = []
    for name in NOTEBOOKS:
        code = [cell for cell in nbformat.read(ROOT / name, as_version=4).cells if cell.cell_type == "code"]
        assert {"install", "remove-cell"} <= set(code[0].metadata.tags), name
        first.append(code[0].source)
    assert len(set(first)) == 1


@pytest.mark.parametrize("on_colab", [False, True])
def test_the_install_cell_acts_on_colab_only(monkeypatch, on_colab):
    asked = []
    shell = SimpleNamespace(run_line_magic=lambda *magic: asked.append(magic))
    if on_colab:
        monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    exec(tool("clear_notebooks").install_cell().source, {"get_ipython": lambda: shell})
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    assert asked == [("pip", f"install -q git+{address}")] * on_colab


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_all_parameters_are_checked_right_after_they_are_set(name):
    cells = nbformat.read(ROOT / name, as_version=4).cells
    (place,) = [number for number, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    declared = papermill.inspect_notebook(str(ROOT / name))
    assert all(f"{parameter}={parameter}" in cells[place + 1].source for parameter in declared)


def test_every_claim_has_an_id_of_its_own():
    cells = [cell for name in NOTEBOOKS for cell in nbformat.read(ROOT / name, as_version=4).cells]
    code = " ".join(cell.source for cell in cells if cell.cell_type == "code")
    ids = re.findall(r'Claim\(\s*"([^"]+)"', code)
    assert len(ids) > 50
    assert len(ids) == len(set(ids)), sorted({name for name in ids if ids.count(name) > 1})


def test_every_page_is_in_the_table_of_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [toc["root"], *re.findall(r"'file': '([^']+)'", str(toc))]
    assert sorted(listed) == sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in PAGES)


def test_status_page_tells_what_ran(executed, pages, html):
    status = json.loads((executed / "status.json").read_text())
    assert sorted(status["notebooks"]) == NOTEBOOKS
    text = pages[html / "book" / "appendix" / "status.html"].get_text()
    assert status["code"] in text
    assert status["environment"]["torch"] in text
    for record in status["notebooks"].values():
        assert record["fingerprint"][:12] in text


def test_pages_load_nothing_from_the_network(pages):
    for path, page in pages.items():
        loading = page.select(
            "script[src], img[src], iframe[src], link[href]:not([rel=canonical])"
        )  # a name, no request
        loaded = [tag.get("src") or tag.get("href") for tag in loading]
        assert not [address for address in loaded if address.startswith(("http:", "https:", "//"))], path
        scripts = " ".join(tag.get_text() for tag in page.select("script:not([src]), style"))
        assert not re.search(r"(cdn|unpkg|jsdelivr|cloudflare|googleapis)", scripts), path


def test_math_is_drawn_by_a_local_script(pages):
    with_math = {path: page for path, page in pages.items() if page.select(".math")}
    assert with_math
    for path, page in with_math.items():
        script = next(tag["src"] for tag in page.select("script[src]") if "mathjax" in tag["src"])
        assert (path.parent / script.split("?")[0]).exists()


def test_links_inside_the_book_lead_somewhere(html, pages):
    for path, page in pages.items():
        for tag in page.select("a[href], img[src]"):
            address = urlparse(tag.get("href") or tag["src"])
            if not address.scheme and address.path:
                assert (path.parent / unquote(address.path)).exists(), f"{path.relative_to(html)}: {address.path}"


def test_notebooks_can_be_downloaded_and_opened_in_colab_and_on_binder(html, pages):
    for name in NOTEBOOKS:
        page = pages[html / Path(name).with_suffix(".html")]
        links = [tag["href"] for tag in page.select("a[href]")]
        assert any(
            link.startswith("https://colab.research.google.com/github/") and link.endswith(name) for link in links
        )
        assert any(link.startswith("https://mybinder.org/v2/gh/") and name in unquote(link) for link in links)
        assert any(link.endswith(Path(name).name) and not link.startswith("http") for link in links)


@pytest.fixture
def small_book(tmp_path, monkeypatch):
    """The execution tool, looking at a book of one notebook in a temporary folder; `write` sets the notebook's code."""
    execute = tool("execute")
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    (tmp_path / "book" / "appendix").mkdir(parents=True)
    (tmp_path / "src").mkdir()
    for name in ("_config.yml", "_toc.yml", "book/page.md"):
        (tmp_path / name).write_text("A page.\n")

    def write(*code: str) -> None:
        cells = [nbformat.v4.new_code_cell(source) for source in code]
        cells[0].metadata["tags"] = ["parameters"]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "book" / "one.ipynb")

    return execute, tmp_path, write


@pytest.mark.filterwarnings("default")
def test_a_notebook_runs_once_until_something_changes(small_book):
    execute, root, write = small_book
    out = root / "out"
    write("n: int = 3  # a number", "print(n * 7)")
    (job,) = execute.plan(out, {"n": 6})
    assert not job.is_done()
    assert execute.run(job) is None
    assert job.is_done()
    assert "42" in job.target.read_text()
    execute.lay_out(out)
    execute.write_status(out, [job])
    assert (out / "book" / "page.md").exists()
    assert "book/one.ipynb" in (out / "book" / "appendix" / "status-runs.csv").read_text()
    (root / "book" / "page.md").unlink()
    execute.lay_out(out)
    assert not (out / "book" / "page.md").exists()
    assert all(again.is_done() for again in execute.plan(out, {"n": 6}))
    assert not any(again.is_done() for again in execute.plan(out, {"n": 5}))
    (root / "src" / "changed.py").write_text("x = 1\n")
    assert not any(again.is_done() for again in execute.plan(out, {"n": 6}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# Title\n\nA *first* sentence about {cite:p}`tecoa`, and [a link](x.html). A second one.",
         "A first sentence about , and a link."),
        ("# Title\n\nCLIP keeps 3 % [1, 7]. More.", "CLIP keeps 3 % [1, 7]."),
        ("# Title\n\nWhat is it? An answer of 3.5 %. More.", "What is it?"),
        ("# Title\n\nNo end", "No end"),
        ("# Title", ""),
    ],
)  # fmt: skip
def test_a_page_is_described_by_its_first_sentence(text, said):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    assert tool("execute").description(notebook) == said


def test_a_page_with_an_answer_is_described_by_it():
    said = report.answer(["CLIP keeps 3.5 % at 8/255. TeCoA keeps more."])
    output = nbformat.v4.new_output("display_data", {"text/html": said._repr_html_(), "text/plain": repr(said)})
    cells = [nbformat.v4.new_markdown_cell("# Title\n\nProse."), nbformat.v4.new_code_cell("", outputs=[output])]
    assert tool("execute").description(nbformat.v4.new_notebook(cells=cells)) == "CLIP keeps 3.5 % at 8/255."


def test_lessons_keep_their_scale_unless_it_is_given_to_them(small_book):
    execute, root, write = small_book
    write('scale: str = "quick"  # of the pictures')
    lessons = root / "book" / "foundations"
    lessons.mkdir()
    for name in ("attacks", "verdicts"):
        (lessons / f"{name}.ipynb").write_text((root / "book" / "one.ipynb").read_text())
    given = {job.name: job.parameters for job in execute.plan(root / "out", {"scale": "photo"})}
    photo = {"scale": "photo"}
    assert given == {
        "book/foundations/attacks.ipynb": {},
        "book/foundations/verdicts.ipynb": photo,
        "book/one.ipynb": photo,
    }
    assert all(job.parameters == photo for job in execute.plan(root / "out", {"book/*:scale": "photo"}))


@pytest.mark.parametrize(("shipped", "scale"), [([], "photo"), (["quick"], "quick"), (["quick", "photo"], "photo")])
def test_a_page_takes_a_scale_that_its_verdicts_are_shipped_for(small_book, shipped, scale):
    execute, root, write = small_book
    write('scale: str = "quick"  # of the pictures')
    for name in shipped:
        (root / "results" / name / "verdicts" / "book").mkdir(parents=True)
        (root / "results" / name / "verdicts" / "book" / "one.json").write_text("[]")
    (root / "book" / "two.ipynb").write_text((root / "book" / "one.ipynb").read_text())
    one, two = execute.plan(root / "out", {"scale": "photo"})
    assert (one.parameters.get("scale", "quick"), two.parameters["scale"]) == (scale, "photo")


def test_parameters_for_some_notebooks_and_for_none(small_book):
    execute, root, write = small_book
    write("n: int = 3  # a number")
    (job,) = execute.plan(root / "out", {"n": 6, "book/o*:n": 7})
    assert job.parameters == {"n": 7}
    with pytest.raises(ValueError, match=r"parameter book/x\*:n, m"):
        execute.plan(root / "out", {"n": 6, "m": 1, "book/x*:n": 7})


@pytest.mark.filterwarnings("default")
def test_warm_kernels_are_as_good_as_new_and_die_alone(small_book):
    execute, root, write = small_book
    write("n: int = 0  # a number", "import os\nos._exit(3)")
    (root / "book" / "dead.ipynb").write_bytes((root / "book" / "one.ipynb").read_bytes())
    write(
        "n: int = 3  # a number",
        "import sys, os\nprint('robustclip.study' in sys.modules, os.getcwd())",
        "import torch\nprint(torch.ones(300, 300).matmul(torch.ones(300, 300)).sum().item())\nleft = 1",
    )
    (root / "book" / "two.ipynb").write_bytes((root / "book" / "one.ipynb").read_bytes())
    (failure,) = execute.run_all(execute.plan(root / "out", {"n": 4}))
    assert "book/dead.ipynb: DeadKernelError" in failure
    for name in ("one", "two"):
        notebook = nbformat.read(root / "out" / "book" / f"{name}.ipynb", as_version=4)
        text = [output.text for cell in notebook.cells for output in cell.get("outputs", [])]
        assert text == [f"{sys.platform == 'linux'} {root}\n", "27000000.0\n"]
        assert notebook.metadata.kernelspec.name == "python3"


def test_nothing_is_left_running_when_the_tool_is_killed():
    command = "import os, sys, time; sys.path.insert(0, 'tools'); import execute; from concurrent import futures as f\n"
    command += "pool = f.ProcessPoolExecutor(1, initializer=execute.end_with, initargs=(os.getpid(),))\n"
    command += "print(pool.submit(os.getpid).result(), flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert int(process.stdout.readline()) != process.pid
        process.kill()
        process.communicate(timeout=30)  # the worker holds the pipe as long as it runs


@pytest.mark.filterwarnings("default")
def test_a_failing_notebook_shows_its_cell_and_traceback(small_book):
    execute, root, write = small_book
    write("n: int = 0  # a number", "print(1 / n)")
    (job,) = execute.plan(root / "out", {})
    failure = execute.run(job)
    assert "book/one.ipynb, cell [2]" in failure
    assert "print(1 / n)" in failure
    assert "ZeroDivisionError" in failure
    assert not job.target.exists()


@pytest.mark.filterwarnings("default")
def test_the_summary_of_a_part_runs_after_its_pages_and_whenever_one_of_them_does(small_book, monkeypatch):
    execute, root, write = small_book
    write("n: int = 0  # a number", "n")
    for name in ("a/page", "a/summary", "a/zebra", "b/page", "b/summary"):
        (root / "book" / name).parent.mkdir(exist_ok=True)
        (root / "book" / f"{name}.ipynb").write_bytes((root / "book" / "one.ipynb").read_bytes())
    changed = {"book/a/zebra.ipynb"}
    monkeypatch.setattr(execute.Job, "is_done", lambda job: job.name not in changed)
    todo = execute.due(execute.plan(root / "out", {}))
    assert sorted(job.name for job in todo) == ["book/a/summary.ipynb", "book/a/zebra.ipynb"]
    order = []
    monkeypatch.setattr(execute, "run_together", lambda jobs, *_: order.append([job.name for job in jobs]) or [])
    execute.run_all(todo)
    assert order == [["book/a/zebra.ipynb"], ["book/a/summary.ipynb"]]
    assert len(execute.due(execute.plan(root / "out", {}), force=True)) == 6
