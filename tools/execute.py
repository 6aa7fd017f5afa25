"""Run every notebook of the book and lay the book out for rendering.

Executed copies of the notebooks and all other sources of the book go to one folder, `_build/executed` unless told
otherwise, from which Jupyter Book only renders. A copy from an earlier run is kept if the notebook, its parameters,
the package, the shipped results and the environment are all unchanged; `--fresh` runs everything again, without the
shipped results and from an empty store. What was measured on the way (seconds, versions, hardware) is written to
`status.json` and to the tables that the book's status page shows. Labs run with
their solutions and are laid out without.
"""

import argparse
import csv
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import nbformat
import papermill
import torch
import yaml
from papermill.exceptions import PapermillExecutionError

from labs import handed_out
from warm_kernels import warm_kernels

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    *("robustclip", "torch", "torchvision", "open_clip_torch", "transformers", "torchattacks", "textattack", "POT"),
    *("numpy", "pandas", "scikit-learn", "seaborn", "papermill", "jupyter-book"),
)
START_TIMEOUT, CELL_TIMEOUT = 300, 1800  # seconds; a kernel or a cell that takes longer hangs
# Pages that teach on pictures before the reader's eyes keep the small drawn world, whatever scale the book has, except
# those that are about what was measured.
LESSONS, MEASURED = "book/foundations/*", ("floors-and-ceilings", "photo-world", "verdicts")
QUIET = ["--IPKernelApp.log_level=CRITICAL"]  # kernels warn of local TCP, and of being told to end


@dataclass(frozen=True)
class Job:
    """One notebook to run: where it stands, where its executed copy goes, and what the copy depends on."""

    source: Path
    target: Path
    parameters: dict[str, object]
    fingerprint: str

    @property
    def name(self) -> str:
        """The path that people know the notebook by."""
        return self.source.relative_to(ROOT).as_posix()

    def is_summary(self) -> bool:
        """Whether the page collects what the other pages of its folder found."""
        return self.source.stem == "summary"

    def is_done(self) -> bool:
        """Whether an executed copy of exactly this job exists."""
        return self.target.exists() and record(self.target).get("fingerprint") == self.fingerprint


def record(notebook: Path) -> dict:
    """What an earlier run wrote into the metadata of an executed notebook."""
    return json.loads(notebook.read_text(encoding="utf8"))["metadata"].get("robustclip", {})


def sources(suffix: str = "") -> list[Path]:
    """Files of the book, without the notebook editors' hidden folders."""
    paths = sorted((ROOT / "book").rglob(f"*{suffix}"))
    return [path for path in paths if path.is_file() and not any(part.startswith(".") for part in path.parts)]


def digest(paths: Iterable[Path]) -> str:
    """A short hash of the names and contents of files."""
    hashed = hashlib.sha256()
    for path in sorted(paths):
        hashed.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return hashed.hexdigest()[:12]


def code_digest() -> str:
    """A hash of what every notebook depends on: the package with its data files, and the shipped results."""
    paths = [path for folder in ("src", "results") for path in (ROOT / folder).rglob("*")]
    return digest(path for path in paths if path.is_file() and "__pycache__" not in path.parts)


def processor() -> str:
    """The name of the processor, as far as the system tells."""
    facts = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", facts.read_text()) if facts.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def environment() -> dict[str, str]:
    """The hardware and the versions that the notebooks run with."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    hardware = {"Processor": processor(), "Cores": str(os.cpu_count()), "GPU": gpu}
    system = {"System": f"{platform.system()} {platform.machine()}", "Python": platform.python_version()}
    return hardware | system | {package: version(package) for package in PACKAGES}


def plan(out: Path, parameters: dict[str, object]) -> list[Job]:
    """One job per notebook, with those of the parameters that the notebook declares.

    A key of `parameters` is a name, or a pattern of notebooks and a name, as in "book/foundations/*:n". A scale without
    a pattern is not for lessons, nor for pages that are due at it.
    """
    common = [code_digest(), environment()]
    jobs, used = [], set()
    for source in sources(".ipynb"):
        declared, path = papermill.inspect_notebook(str(source)), source.relative_to(ROOT)
        own = {}
        for key, value in parameters.items():
            pattern, _, name = key.rpartition(":")
            if (
                name in declared
                and fnmatch(path.as_posix(), pattern or "*")
                and not (key == "scale" and keeps_scale(path, value))
            ):
                own[name] = value
                used.add(key)
        key = json.dumps([digest([source]), own, *common], sort_keys=True).encode()
        jobs.append(Job(source, out / path, own, hashlib.sha256(key).hexdigest()))
    if unknown := sorted(parameters.keys() - used):
        raise ValueError(f"no notebook of the book has a parameter {', '.join(unknown)}")
    return jobs


def keeps_scale(page: Path, scale: str) -> bool:
    """Whether a page stays at its own scale: a lesson, or one whose verdicts are shipped for that but not for this."""
    if fnmatch(page.as_posix(), LESSONS):
        return page.stem not in MEASURED
    shipped = (
        ROOT / "results" / name / "verdicts" / page.parent.name / f"{page.stem}.json" for name in ("quick", scale)
    )
    here, there = (path.is_file() for path in shipped)
    return here and not there


def run(job: Job, kernel: str = "python3") -> str | None:
    """Run one notebook in the repository's root folder; return what went wrong, if anything did."""
    job.target.parent.mkdir(parents=True, exist_ok=True)
    options = {"cwd": str(ROOT), "progress_bar": False, "extra_arguments": QUIET, "kernel_name": kernel}
    options |= {"start_timeout": START_TIMEOUT, "execution_timeout": CELL_TIMEOUT}
    options |= {"shutdown_kernel": "immediate"}  # all is said; a kernel that is asked to end takes a second and more
    begin = datetime.now(UTC)
    try:
        notebook = papermill.execute_notebook(str(job.source), None, job.parameters, **options)
    except PapermillExecutionError as error:
        trace = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback))  # without colors, for logs
        return f"{job.name}, cell [{error.exec_count}]:\n\n{error.source}\n\n{trace}"
    except Exception as error:  # the kernel died, a cell timed out: report it, and let the other notebooks run
        return f"{job.name}: {type(error).__name__}: {error}"
    end = datetime.now(UTC)
    notebook = handed_out(notebook)
    for cell in notebook.cells:  # papermill's own, which repeats the parameters
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata["tags"].append("hide-input")
    said = description(notebook)
    notebook.metadata["myst"] = {"html_meta": {"description": said, "property=og:description": said}}
    notebook.metadata["robustclip"] = {
        "fingerprint": job.fingerprint,
        "parameters": job.parameters,
        "seconds": round((end - begin).total_seconds(), 1),
        "cells": sum(cell.cell_type == "code" for cell in notebook.cells),
        "finished": f"{end:%Y-%m-%d %H:%M}",
    }
    part = job.target.with_suffix(".part")  # a kill while writing leaves no half notebook
    nbformat.write(notebook, part)
    part.replace(job.target)
    return None


def description(notebook: nbformat.NotebookNode) -> str:
    """What search engines and previews show of a page: the first sentence of its answer, else of its prose."""
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    answers = [data["text/plain"] for data in outputs if "robustclip-answer" in data.get("text/html", "")]
    prose = [cell.source.partition("\n\n")[2] for cell in notebook.cells if cell.cell_type == "markdown"]
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join((answers or prose or [""])[0].split()))
    text = re.sub(r"\{[\w:]+\}`[^`]*`|[*`]", "", text)
    whole = re.match(r".*?[.?!](?= [A-Z]|$)", text)
    return (whole[0] if whole else text)[:300]


def due(jobs: list[Job], force: bool = False) -> list[Job]:
    """The jobs that have to run: those that changed, and the summary of a part if any page of the part runs."""
    todo = [job for job in jobs if force or not job.is_done()]
    parts = {job.source.parent for job in todo}
    return [job for job in jobs if job in todo or (job.is_summary() and job.source.parent in parts)]


def run_all(jobs: list[Job]) -> list[str]:
    """Run the jobs, summaries of a part after its pages, which tell them what they found; return what went wrong."""
    workers = max(1, min(os.cpu_count() or 1, len(jobs)))
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))  # inherited by the kernels
    pages, summaries = ([job for job in jobs if job.is_summary() == last] for last in (False, True))
    with warm_kernels() as kernel:
        return run_together(pages, workers, kernel) + run_together(summaries, workers, kernel)


def run_together(jobs: list[Job], workers: int, kernel: str) -> list[str]:
    """Run jobs side by side; return what went wrong."""
    failures = []
    with ProcessPoolExecutor(workers, initializer=end_with, initargs=(os.getpid(),)) as pool:
        running = {pool.submit(run, job, kernel): job for job in jobs}
        for future in as_completed(running):
            job, failure = running[future], future.result()
            failures += [failure] if failure else []
            print("FAILED" if failure else f"{record(job.target)['seconds']:5.1f} s", job.name, flush=True)
    return failures


def end_with(parent: int) -> None:
    """End this process, and with it its kernel, when the parent is gone: one that is killed tells nobody."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def lay_out(out: Path) -> None:
    """Copy the book's other sources beside the executed notebooks and remove what no longer has a source."""
    for path in [path for path in out.rglob("*") if path.is_file()]:
        if not (ROOT / path.relative_to(out)).exists():
            path.unlink()
    for path in [ROOT / "_config.yml", ROOT / "_toc.yml", *sources()]:
        if path.suffix != ".ipynb":
            (out / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / path.relative_to(ROOT))


def write_table(path: Path, rows: list[tuple]) -> None:
    """Write a table for the status page; its cells are Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf8") as file:
        csv.writer(file).writerows(rows)


def write_status(out: Path, jobs: list[Job]) -> None:
    """Write what the runs measured, for people (the status page's tables) and for programs (status.json)."""
    records = {job.name: record(job.target) for job in jobs}
    status = {"code": code_digest(), "environment": environment(), "notebooks": records}
    (out / "status.json").write_text(json.dumps(status, indent=1), encoding="utf8")
    runs = [
        (f"[](/{name})", made["cells"], made["seconds"], made["finished"], made["fingerprint"][:12])
        for name, made in records.items()
    ]
    folder = out / "book" / "appendix"
    write_table(folder / "status-runs.csv", [("Page", "Code cells", "Seconds", "Finished (UTC)", "Fingerprint"), *runs])
    given = sorted({f"{name} = {value}" for job in jobs for name, value in job.parameters.items()})
    facts = {"Code": status["code"], "Seconds in all": round(sum(made["seconds"] for made in records.values()), 1)}
    facts |= {"Parameters given": ", ".join(given) or "none"}
    write_table(folder / "status-environment.csv", [("What", "Value"), *(facts | status["environment"]).items()])


def main() -> None:
    """Run what has to run, then lay the book out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "executed", help="where the executed book goes")
    parser.add_argument("--fresh", action="store_true", help="run and measure everything again")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="a parameter, for the notebooks that have one of this name; "
                             "'book/foundations/*:NAME' is for some of them")  # fmt: skip
    arguments = parser.parse_args()
    parameters = {name: yaml.safe_load(value) for name, value in arguments.parameter}
    try:
        jobs = plan(arguments.out, parameters)
    except ValueError as error:
        sys.exit(f"error: {error}")
    with TemporaryDirectory() as empty:
        if arguments.fresh:
            os.environ |= {"ROBUSTCLIP_RUNS": empty, "ROBUSTCLIP_FRESH": "1"}
        todo = due(jobs, arguments.fresh)
        failures = run_all(todo) if todo else []
    if failures:
        sys.exit("\n\n".join(failures) + f"\n\n{len(failures)} of {len(jobs)} notebooks failed")
    lay_out(arguments.out)
    write_status(arguments.out, jobs)


if __name__ == "__main__":
    main()
