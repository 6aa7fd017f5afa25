"""Kill processes that share a store and a folder of results, again and again, and see what is lost, torn or done twice.

Four processes at a time run the same command - run, train, export, confirm - and are killed (SIGKILL) at random
moments; then it runs to its end once. What is there then is compared with what one process makes that nobody disturbs.
Writes benchmarks/results/kills.json.
"""

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from robustclip import cli, study
from robustclip.study import provenance
from robustclip.study.store import CellFiles

ROOT = Path(__file__).resolve().parent.parent
SCALE = """
source = "tinyworld"
reference_eps = "8/255"
images = 40
batch_size = 4
recompute_stale = true
roles = ["cifar10", "cifar100", "stl10", "dtd"]
[models]
clip = "tinyworld-clip"
[training]
batch_size = 8
epochs = 2
rate = 1e-4
attack_steps = 1
pictures = 64
"""
GRID = ["run", "--scale", "small.toml", "--attack", "clean", "--attack", "PGD-10"]
GRID += [word for eps in range(1, 9) for word in ("--eps", f"{eps}/255")]
WORK = {  # command -> kills, longest life in seconds
    "run": ([*GRID], 50, 2.0),
    "train": (["train", "--scale", "small.toml", "--recipe", "TeCoA", "--recipe", "MMCoA"], 20, 2.0),
    "export": (["export", "--scale", "small.toml"], 15, 0.6),
    "confirm": (["confirm", "--scale", "small.toml"], 15, 1.0),
}
PROCESSES = 4
CHANGED = "robustclip.attacks.gradient:PGD"  # `confirm` is told that its code is another


def start(words: list[str], place: Path) -> int:
    """A process that runs a command on the store and the results below a folder; its number."""
    if number := os.fork():
        return number
    os.environ |= {"ROBUSTCLIP_RUNS": str(place / "runs"), "ROBUSTCLIP_RESULTS": str(place / "results")}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    log = os.open(place / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    note_batches(place / "batches")
    if words[0] == "confirm":
        own = provenance.digest
        provenance.digest = lambda module, name: "new" if name == "PGD" else own(module, name)
    code = 1
    try:
        cli.app(words, prog_name="robustclip")
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def note_batches(path: Path) -> None:
    """Write a line for every batch that this process finishes."""
    append = CellFiles.append

    def noted(files: CellFiles, batch: dict) -> dict:
        result = append(files, batch)
        with path.open("a") as file:
            file.write(f"{files.path.parent.parent.name} {files.path.stem} {batch['start']}\n")
        return result

    CellFiles.append = noted


def disturb(words: list[str], place: Path, kills: int, life: float, chance: random.Random) -> int:
    """Keep four processes at the work and kill one after the other; how often one finished meanwhile."""
    running, finished = {start(words, place): time.monotonic() for _ in range(PROCESSES)}, 0
    while kills:
        time.sleep(chance.uniform(0, life) / PROCESSES)
        oldest = min(running, key=running.get)
        done, _ = os.waitpid(oldest, os.WNOHANG)
        if done:
            finished += 1
        else:
            os.kill(oldest, signal.SIGKILL)
            os.waitpid(oldest, 0)
            kills -= 1
        del running[oldest]
        running[start(words, place)] = time.monotonic()
    for number in running:
        os.waitpid(number, 0)
    return finished


def quietly(words: list[str], place: Path) -> None:
    """Run a command to its end."""
    _, status = os.waitpid(start(words, place), 0)
    if status:
        sys.exit(f"`robustclip {' '.join(words)}` failed: {(place / 'stderr').read_text()[-500:]}")


def answers(place: Path) -> dict[str, list]:
    """Name and answers of every cell of a store."""
    return {record["key"]: record["answers"] for record in study.Store(place / "runs").records("small")}


def models(place: Path) -> dict[str, str]:
    """Folder and digest of every model of a store."""
    paths = sorted((place / "runs").glob("small/models/*/training.json"))
    return {path.parent.name: json.loads(path.read_text())["digest"] for path in paths}


def exported(place: Path) -> dict[str, list]:
    """Name and answers of every exported cell."""
    os.environ["ROBUSTCLIP_RESULTS"] = str(place / "results")
    from robustclip.study.shipped import shipped_records

    return {record["key"]: record["answers"] for record in shipped_records("small")}


def mapped(place: Path) -> dict:
    """Component -> the digests that were confirmed."""
    path = place / "results" / "small" / "confirmed.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return {name: {old: entry["new"] for old, entry in own.items()} for name, own in found.items()}


COMPARED: dict[str, Callable[[Path], dict]] = {"run": answers, "train": models, "export": exported, "confirm": mapped}


def main() -> None:
    """Disturb, complete, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    chance = random.Random(parser.parse_args().seed)
    torch.set_num_threads(1)
    os.environ |= {"ROBUSTCLIP_PROGRESS": "0", "OMP_NUM_THREADS": "1"}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("small.toml").write_text(SCALE)
        alone, shared = Path(folder, "alone"), Path(folder, "shared")
        for place in (alone, shared):
            place.mkdir()
        for name, (words, kills, life) in WORK.items():
            began = time.monotonic()
            quietly(words, alone)
            once = time.monotonic() - began
            finished = disturb(words, shared, kills, life, chance)
            quietly(words, shared)
            ours, theirs = COMPARED[name](alone), COMPARED[name](shared)
            status = study.Store(shared / "runs").status(study.is_stale)
            rows.append({
                "command": name, "kills": kills, "finished meanwhile": finished, "items": len(ours),
                "lost": len(ours.keys() - theirs.keys()),
                "differing": sum(theirs.get(key, value) != value for key, value in ours.items()),
                "torn": int((status["state"] == "corrupt").sum()), "seconds undisturbed": round(once, 1),
            })  # fmt: skip
            print(rows[-1], flush=True)
        lines = Counter((shared / "batches").read_text().splitlines())
        twice = {"batches": len(lines), "batches done twice": sum(count - 1 for count in lines.values())}
    bad = sum(row["lost"] + row["differing"] + row["torn"] for row in rows)
    found = {"command": "python tools/try_kills.py", "processes": PROCESSES, "rows": rows, **twice,
             "cores": os.cpu_count(), "system": platform.platform(),
             "date": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
    (ROOT / "benchmarks" / "results" / "kills.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(twice))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
