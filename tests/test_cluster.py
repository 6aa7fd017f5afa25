"""Commands as jobs: what is sent, how the jobs fare, and that their results are those of one process."""

import json
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from robustclip import cluster
from robustclip.cli import _again, app

SMALL = """
source = "tinyworld"
reference_eps = "8/255"
images = 8
batch_size = 4
recompute_stale = true
roles = ["cifar10", "dtd"]
[models]
clip = "tinyworld-clip"
"""
NAMED = SimpleNamespace(job_id="1")  # a job
WORK = ("run", "--scale", "small.toml", "--attack", "clean", "--attack", "FGSM", "--json")


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run the command in an empty folder with a small scale."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROBUSTCLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "small.toml").write_text(SMALL)
    return lambda *words: CliRunner().invoke(app, words, prog_name="robustclip")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A queue that answers as Slurm does: `queue` is what it says."""
    answer = tmp_path / "queue"
    command = tmp_path / "bin" / "squeue"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\n/bin/cat '{answer}'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent))
    return answer


def submitted(root, executor, *numbers):
    folder = root / "jobs" / "2026-01-02"
    folder.mkdir(parents=True)
    told = {"executor": executor, "submitted": "2026-01-02", "commands": {number: ["run"] for number in numbers}}
    (folder / "submitted.json").write_text(json.dumps(told))
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")  # jobs outlive the call
def test_jobs_of_this_machine_fill_one_store(call, tmp_path):
    sent = call(*WORK, "--executor", "local", "--jobs", "2")
    assert sent.exit_code == 0, sent.output
    assert "2 jobs sent" in sent.stdout
    for _ in range(1500):
        jobs = json.loads(call("status", "--json").stdout)["jobs"]
        if {job["state"] for job in jobs} == {"done"}:
            break
        time.sleep(0.2)
    assert [job["state"] for job in jobs] == ["done", "done"], [Path(job["log"]).read_text() for job in jobs]
    assert all("--shard" in job["command"] and "--executor" not in job["command"] for job in jobs)
    assert "jobs: 2 done" in call("status").stdout
    found = json.loads(call(*WORK).stdout)
    alone = json.loads(call(*WORK, "--store", "alone").stdout)
    assert {row["origin"] for row in found} == {"stored"}
    assert {row["origin"] for row in alone} == {"measured"}
    assert [(row["key"], row["accuracy"]) for row in found] == [(row["key"], row["accuracy"]) for row in alone]


def test_a_requeued_job_is_the_same_command():
    again = cluster.Command(("robustclip", "run"), "folder").checkpoint()
    assert again.function == cluster.Command(("robustclip", "run"), "folder")


def test_what_becomes_of_jobs(tmp_path, slurm):
    folder = submitted(tmp_path, "slurm", "7_0", "7_1", "7_2", "7_3", "7_4")
    (folder / "7_2.state.json").write_text('{"state": "done", "host": "node1"}')
    (folder / "7_3.state.json").write_text('{"state": "failed"}')
    (folder / "7_4.state.json").write_text('{"state": "running"}')
    slurm.write_text("7_0 PENDING\n7_1 COMPLETING\n")
    jobs = cluster.job_table(tmp_path)
    assert jobs["state"].tolist() == ["pending", "running", "done", "failed", "lost"]
    assert jobs["host"].iloc[2] == "node1"
    (slurm.parent / "bin" / "squeue").unlink()
    assert cluster.job_table(tmp_path)["state"].tolist() == ["unknown", "unknown", "done", "failed", "unknown"]


def test_a_dead_process_is_a_lost_job(tmp_path, call):
    submitted(tmp_path / "runs", "local", "999999999")
    assert cluster.job_table(tmp_path / "runs")["state"].tolist() == ["lost"]
    assert "jobs: 1 lost (999999999 to 999999999); read " in call("status").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--executor", "pbs"], "unknown executor 'pbs'; choose one of: slurm, local"),
        (["--executor", "local", "--jobs", "0"], "jobs"),
        (["--executor", "local", "--minutes", "0"], "minutes"),
        (["--executor", "local", "--gpus", "-1"], "gpus"),
        (["--executor", "local", "--partition", "a b"], "partition='a b' is no name of a partition"),
        (["--executor", "local", "--shard", "1/2"], "--shard and --executor both divide the work"),
        (["--executor", "local", "--role", "nosuch"], "nosuch"),
    ],
)
def test_wrong_resources_are_bad_usage(call, words, message):
    done = call(*WORK, *words)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not Path("runs").exists()


def test_no_cluster_here_is_one_line(call, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    done = call(*WORK, "--executor", "slurm")
    assert done.exit_code == 1
    assert "needs the command sbatch" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_training_is_a_job_per_recipe_and_number_of_pictures(call, monkeypatch):
    sent = []
    monkeypatch.setattr(cluster, "submit", lambda commands, *_: sent.extend(commands) or ["1"])
    words = ["--recipe", "TeCoA", "--recipe", "MMCoA", "--shots", "1", "--shots", "5", "--seed", "3"]
    done = call("train", *words, "--executor", "local")
    assert done.exit_code == 0, done.output
    assert [words[words.index("--recipe") + 1] for words in sent] == ["TeCoA", "TeCoA", "MMCoA", "MMCoA"]
    assert [words[words.index("--shots") + 1] for words in sent] == ["1", "5", "1", "5"]
    assert all(words[0] == "train" and words[words.index("--seed") + 1] == "3" for words in sent)


def test_gates_are_one_job_since_each_waits_for_the_one_before(call, monkeypatch):
    sent = []
    monkeypatch.setattr(cluster, "submit", lambda commands, *_: sent.extend(commands) or ["1"])
    words = ["reproduce", "--scale", "paper", "--role", "pets"]
    done = call(*words, "--executor", "local", "--jobs", "4")
    assert done.exit_code == 0, done.output
    (own,) = sent
    assert own[:3] == words[:3]
    assert own[own.index("--role") + 1] == "pets"


@pytest.mark.parametrize("words", [["--shard", "1/2"], ["--sample", "5"]])
def test_gates_are_chosen_by_role_alone(call, words):
    done = call("reproduce", "--scale", "paper", *words)
    assert done.exit_code == 2
    assert "scale 'paper' has none; choose gates by --role" in done.stderr


def test_several_gpus_train_one_model_together(tmp_path, monkeypatch):
    sent = []
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.AutoExecutor, "submit", lambda self, command: sent.append(command) or NAMED)
    monkeypatch.setattr(submitit.AutoExecutor, "batch", lambda self: nullcontext())
    for command, gpus in (("train", 2), ("train", 1), ("run", 2)):
        assert cluster.submit([[command]], cluster.Resources("local", gpus=gpus), tmp_path) == ["1"]
    assert ["--nproc-per-node" in command.words for command in sent] == [True, False, False]


def test_words_of_a_command_survive():
    """Whatever was typed is what the job does, apart from the options that send it."""
    run = typer.main.get_command(app).commands["run"]
    words = ["--attack", "PGD-2", "--eps", "1/255", "--eps", "2/255", "--json", "--n", "5", "--jobs", "3", "--no-gates"]
    context = run.make_context("run", words)
    again = run.make_context("run", _again(context, {"shard": "2/3"})[1:])
    changed = {name for name in context.params if context.params[name] != again.params[name]}
    assert changed == {"shard", "jobs"}
    assert again.params["shard"] == "2/3"
