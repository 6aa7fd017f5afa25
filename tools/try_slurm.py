"""Measure a grid as a Slurm array whose jobs are cancelled at random, and compare every answer with one process.

`tools/slurm.sh up` makes a Slurm of one node where there is none. Writes benchmarks/results/slurm.json.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from robustclip import cluster

ROOT = Path(__file__).resolve().parent.parent
ROLES = ("cifar10", "cifar100", "stl10", "dtd", "food101", "eurosat", "caltech101", "flowers102", "pets", "sun397")
SCALE = f"""
source = "tinyworld"
reference_eps = "8/255"
images = 8
batch_size = 4
recompute_stale = true
roles = {json.dumps(ROLES)}
[models]
clip = "tinyworld-clip"
"""


def robustclip(*words: str, store: str) -> str:
    """What the command prints."""
    command = [sys.executable, "-m", "robustclip.cli", *words, "--store", store]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def cells(store: str) -> dict[str, list]:
    """The answers of all finished cells of a store, by name."""
    records = [json.loads(path.read_bytes()) for path in Path(store).glob("small/*.json")]
    return {record["key"]: record["answers"] for record in records}


def unfinished() -> list[dict]:
    """The jobs that are pending or running."""
    jobs = cluster.job_table(Path("array"))
    return jobs[jobs["state"].isin(["pending", "running"])].to_dict("records")


def cancel(chance: random.Random, most: int) -> int:
    """Cancel jobs by lot, one after the other, until so many are cancelled or none is left; returns how many."""
    done = 0
    while done < most and (left := unfinished()):
        running = [job for job in left if job["state"] == "running"] or left
        subprocess.run(["scancel", chance.choice(running)["job"]], check=True)
        done += 1
        time.sleep(chance.uniform(0, 3))
    return done


def main() -> None:
    """Measure, cancel, complete, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=40, help="length of the array")
    parser.add_argument("--cancel", type=int, default=20, help="jobs to cancel")
    parser.add_argument("--seed", type=int, default=0, help="of the lot")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        os.chdir(folder)
        Path("small.toml").write_text(SCALE)
        budgets = [word for eps in range(1, 11) for word in ("--eps", f"{eps}/255")]
        work = ["run", "--scale", "small.toml", "--attack", "PGD-5", *budgets, "--seed", "0", "--seed", "1"]
        robustclip(*work, store="alone")
        array = [*work, "--executor", "slurm", "--jobs", str(options.jobs), "--minutes", "10"]
        started, cancelled, rounds = time.perf_counter(), 0, 0
        while len(cells("array")) < len(cells("alone")):
            rounds += 1
            print(robustclip(*array, store="array").splitlines()[0], flush=True)
            cancelled += cancel(random.Random(options.seed + rounds), options.cancel - cancelled)
            while unfinished():
                time.sleep(2)
            print(f"{len(cells('array'))} of {len(cells('alone'))} cells, {cancelled} jobs cancelled", flush=True)
        seconds, alone, ours = time.perf_counter() - started, cells("alone"), cells("array")
    found = {
        "command": "python tools/try_slurm.py", "cells": len(alone), "jobs": options.jobs, "cancelled": cancelled,
        "submissions": rounds, "differing": sum(alone[key] != ours.get(key) for key in alone),
        "seconds": round(seconds), "cores": os.cpu_count(),
        "slurm": subprocess.run(["sinfo", "--version"], capture_output=True, text=True, check=True).stdout.strip(),
        "system": platform.platform(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    path = ROOT / "benchmarks" / "results" / "slurm.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path.read_text())
    sys.exit(bool(found["differing"]))


if __name__ == "__main__":
    main()
