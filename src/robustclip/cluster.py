"""Commands as jobs of a cluster, through submitit: one store on a shared folder, a job per part of the work.

A job runs a command line like everybody's. What it finishes is in the store at once, so a job that was preempted, ran
out of time or was requeued goes on where it stopped, and a cancelled one is made good by giving the command again.

    runs/jobs/<date>/submitted.json   what was submitted: the executor, and the command of each job
    runs/jobs/<date>/<job>.state.json what a job says of itself: where it runs, how it ended
    runs/jobs/<date>/<job>_0_log.err  its standard error
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from robustclip.checks import check_choice, check_integer
from robustclip.files import write_whole

EXECUTORS = ("slurm", "local")
COLUMNS = ["job", "state", "executor", "submitted", "host", "started", "ended", "command", "log"]


@dataclass(frozen=True)
class Resources:
    """What each job asks for; `local` runs all of them at once on this machine, which is for trying things out."""

    executor: str = "slurm"
    jobs: int = 8  # at most
    partition: str | None = None
    minutes: int = 240
    gpus: int = 0
    cpus: int = 1

    def __post_init__(self) -> None:
        check_choice("executor", self.executor, EXECUTORS)
        for name, low in (("jobs", 1), ("minutes", 1), ("gpus", 0), ("cpus", 1)):
            check_integer(name, getattr(self, name), low)
        if self.partition is not None and not re.fullmatch(r"[\w.,-]+", self.partition):
            raise ValueError(f"partition={self.partition!r} is no name of a partition; `sinfo` lists those there are")


@dataclass(frozen=True)
class Command:
    """A command line as submitit calls it; requeued with the same words."""

    words: tuple[str, ...]
    folder: str  # where the job writes its state

    def __call__(self) -> None:
        """Run it; a failure fails the job."""
        from submitit import JobEnvironment

        path = Path(self.folder) / f"{JobEnvironment().job_id}.state.json"
        state = {"state": "running", "host": socket.gethostname(), "pid": os.getpid(), "started": _now()}
        write_whole(path, json.dumps(state))
        threads = {"OMP_NUM_THREADS": os.environ.get("SLURM_CPUS_PER_TASK", "1")}
        done = subprocess.run(self.words, env=threads | os.environ, check=False)
        state |= {"state": "failed" if done.returncode else "done", "ended": _now()}
        write_whole(path, json.dumps(state))
        done.check_returncode()

    def checkpoint(self) -> Any:
        """What submitit asks for before it requeues a job: the same again, for the store knows what is done."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(commands: Sequence[Sequence[str]], resources: Resources, root: Path) -> list[str]:
    """Send a job for each list of the words of a `robustclip` command; their numbers. `root` is the store's folder."""
    try:
        import submitit
    except ImportError as error:
        raise ValueError("an executor needs submitit; install it with `pip install 'robustclip[slurm]'`") from error
    if resources.executor == "slurm" and not shutil.which("sbatch"):
        raise ValueError(
            "executor='slurm' needs the command sbatch, which is not here; log in where jobs are sent from"
        )
    folder = (root / "jobs" / datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S-%f")).absolute()
    executor = submitit.AutoExecutor(folder, cluster=resources.executor)
    settings = {"slurm_partition": resources.partition} if resources.partition else {}
    settings |= {"gpus_per_node": resources.gpus} if resources.gpus else {}
    executor.update_parameters(
        name="robustclip", timeout_min=resources.minutes, cpus_per_task=resources.cpus,
        slurm_array_parallelism=len(commands), **settings,
    )  # fmt: skip
    start = _start(resources.gpus if commands[0][0] == "train" else 1)
    try:
        with executor.batch():
            jobs = [executor.submit(Command((*start, *words), str(folder))) for words in commands]
    except submitit.core.utils.FailedJobError as error:
        raise OSError(f"the cluster refused the jobs ({' '.join(str(error).split())[-300:]})") from error
    numbers = [job.job_id for job in jobs]
    told = asdict(resources) | {"submitted": _now(), "commands": dict(zip(numbers, map(list, commands), strict=True))}
    write_whole(folder / "submitted.json", json.dumps(told, indent=1))
    return numbers


def _start(processes: int) -> list[str]:
    """How a job starts this package: the interpreter that submitted it, several times if one model has several GPUs."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(several if processes > 1 else []), "-m", "robustclip.cli"]


def job_table(root: Path) -> pd.DataFrame:
    """One row per submitted job of a store's folder, newest last: pending, running, done, failed, lost or unknown.

    A job that is neither in the queue nor says how it ended is lost: cancelled or killed.
    """
    rows, queue = [], None
    for path in sorted((root / "jobs").glob("*/submitted.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        for number, words in told["commands"].items():
            row = {"job": number, "executor": told["executor"], "submitted": told["submitted"], "state": ""}
            with suppress(FileNotFoundError):
                row |= json.loads((path.parent / f"{number}.state.json").read_text(encoding="utf-8"))
            if row["state"] not in ("done", "failed"):
                queue = _queue() if queue is None and told["executor"] == "slurm" else queue
                row["state"] = _alive(number) if told["executor"] == "local" else _queued(number, queue)
            row |= {"command": " ".join(["robustclip", *words]), "log": str(path.parent / f"{number}_0_log.err")}
            rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def _queue() -> dict[str, str] | None:
    """The jobs in Slurm's queue with their states; None where it cannot be asked."""
    try:
        told = subprocess.run(["squeue", "-h", "-r", "-o", "%i %T"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if told.returncode else dict(line.split() for line in told.stdout.splitlines())


def _queued(number: str, queue: dict[str, str] | None) -> str:
    if queue is None:
        return "unknown"
    return {"PENDING": "pending", None: "lost"}.get(queue.get(number), "running")


def _alive(number: str) -> str:
    """Of a process of this machine, which has the number of its job."""
    try:
        os.kill(int(number), 0)
    except OSError:
        return "lost"
    return "running"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
