"""The command line: selections, output, exit codes, and what it leaves alone."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from robustclip.audit import CHECKS
from robustclip.cli import app
from robustclip.study import Store, grid, plan
from robustclip.training.named import RECIPES

SMALL = """
source = "tinyworld"
reference_eps = "8/255"
images = 12
batch_size = 6
recompute_stale = true
roles = ["cifar10", "dtd"]
steps = { "PGD-100" = 2 }
[models]
clip = "tinyworld-clip"
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run the command in an empty folder with a small scale; returns the finished call."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROBUSTCLIP_RUNS", str(tmp_path / "runs"))
    (tmp_path / "small.toml").write_text(SMALL)
    return lambda *arguments: CliRunner().invoke(app, arguments, prog_name="robustclip")


def test_help_is_quick_and_teaches():
    code = "import sys; sys.argv = ['robustclip', 'run', '--help']\nfrom robustclip import cli\ntry:\n    cli.main()\n"
    code += "finally:\n    assert not {'torch', 'pandas', 'numpy'} & set(sys.modules), 'imported too much'\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": "src"})
    assert done.returncode == 0, done.stderr
    assert "robustclip run --role cifar10 --role imagenet --attack clean --attack PGD-20" in done.stdout


@pytest.mark.parametrize("command", ["run", "audit", "plan", "leaderboard", "export", "reproduce", "status"])
def test_every_command_explains_itself(call, command):
    done = call(command, "--help")
    assert done.exit_code == 0
    assert f"robustclip {command}" in done.stdout
    assert command in call("--help").stdout


def test_run_measures_and_takes_finished_cells_from_the_store(call, tmp_path):
    arguments = ("run", "--scale", "small.toml", "--role", "cifar10", "--attack", "clean", "--attack", "FGSM",
                 "--eps", "4/255", "--eps", "8/255", "--n", "8")  # fmt: skip
    shown = call(*arguments)
    assert shown.exit_code == 0, shown.output
    assert len(shown.stdout.splitlines()) == 4
    assert "4/255" in shown.stdout
    first, second = (json.loads(call(*arguments, "--json").stdout) for _ in range(2))
    assert first == second
    assert [row["attack"] for row in first] == ["clean", "FGSM", "FGSM"]
    assert [row["eps"] for row in first] == [0, 4 / 255, 8 / 255]
    assert {row["n"] for row in first} == {8}
    assert len(list((tmp_path / "runs" / "small").glob("*.json"))) == 3


def test_shards_are_the_grid_cut_in_parts(call):
    def keys(*arguments):
        done = call("run", "--scale", "small.toml", "--attack", "clean", "--attack", "noise", "--json", *arguments)
        return [row["key"] for row in json.loads(done.stdout)]

    whole = keys()
    parts = [keys("--shard", f"{i}/3") for i in (1, 2, 3)]
    assert sorted(key for part in parts for key in part) == sorted(whole)
    assert len(whole) == 4


def test_a_model_may_be_a_folder_and_the_store_another(call, tmp_path, root):
    folder = root / "src" / "robustclip" / "assets" / "tinyworld-clip"
    done = call("run", "--scale", "small.toml", "--role", "dtd", "--attack", "clean", "--model", str(folder),
                "--store", "elsewhere", "--json")  # fmt: skip
    assert json.loads(done.stdout)[0]["model"] == str(folder)
    assert len(list((tmp_path / "elsewhere" / "small").glob("*.json"))) == 1


def test_roles_without_a_set_are_told_apart_from_the_table(call):
    done = call("plan", "--scale", "photo", "--model", "hf-hub:nobody/nothing", "--attack", "clean", "--json")
    told = [line for line in done.stderr.splitlines() if line.startswith("no set plays cars at scale photo: ")]
    assert len(told) == 1
    assert "cars" not in {row["role"] for row in json.loads(done.stdout)}
    assert not call("plan", "--scale", "small.toml", "--attack", "clean").stderr
    assert "no set plays" not in call("plan", "--scale", "photo", "--role", "dtd", "--attack", "clean").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--role", "cifar11"], "unknown role to classify at scale small 'cifar11'; choose one of: cifar10, dtd"),
        (["--scale", "huge"], "unknown scale 'huge'"),
        (["--scale", "gone.toml"], "no file 'gone.toml'"),
        (["--attack", "PDG-20"], "unknown attack 'PDG-20'"),
        (["--attacker", "psychic"], "unknown attacker 'psychic'; choose one of: blind, aware"),
        (["--eps", "-1/255"], "eps=-0.0039"),
        (["--eps", "300/255"], "eps=1.17"),
        (["--eps", "small"], "eps='small' is not a number; write it like 8/255"),
        (["--eps", "1e400"], "eps='1e400' is not a number; write it like 8/255"),
        (["--n", "0"], "n=0"),
        (["--shard", "3/2"], "shard='3/2'"),
        (["--shard", "0/2"], "shard='0/2'"),
        (["--shard", "all"], "shard='all'"),
        (["--shard", "5/5"], "shard='5/5' is not allowed; write i/n with 1 <= i <= n <= 4"),
        (["--device", "abacus"], "device"),
        (["--batch-size", "0"], "batch-size"),
        (["--n", "many"], "--n"),
        (["--no-such-option"], "no-such-option"),
    ],
)
def test_bad_usage_is_exit_code_2_and_one_line(call, tmp_path, arguments, message):
    for command in ("run", "plan"):
        if command == "plan" and "--batch-size" in arguments:
            continue
        done = call(command, *(["--scale", "small.toml"] if "--scale" not in arguments else []), *arguments)
        assert done.exit_code == 2
        assert message in done.stderr
        assert "Traceback" not in done.output
        assert done.stdout == ""
    assert not (tmp_path / "runs").exists()


def test_a_failure_on_the_way_is_exit_code_1_and_keeps_what_is_done(call, tmp_path):
    selection = ("run", "--scale", "small.toml", "--role", "cifar10", "--attack", "clean")
    assert call(*selection).exit_code == 0
    (path,) = (tmp_path / "runs" / "small").glob("*.json")
    missing = call(*selection, "--model", "clip", "--model", "no/such/folder")
    assert missing.exit_code == 1
    assert "no/such/folder" in missing.stderr
    assert "Traceback" not in missing.output
    path.write_text("{")
    corrupt = call(*selection)
    assert corrupt.exit_code == 1
    assert f"mv {path} {path}.bad" in corrupt.stderr
    assert path.read_text() == "{"
    exported = call("export", "--scale", "small.toml", "--out", "tables")
    assert exported.exit_code == 1
    assert "nothing to export of scale 'small'" in exported.stderr
    call("run", "--scale", "small.toml", "--role", "dtd", "--attack", "clean")
    exported = call("export", "--scale", "small.toml", "--out", "tables")
    assert exported.exit_code == 0
    assert f"left out: cannot use '{path}'" in exported.stderr


def test_plan_spends_nothing(call, tmp_path):
    done = call("plan", "--scale", "small.toml")
    assert done.exit_code == 0, done.output
    costs = plan(grid("small.toml"))
    assert f"4 cells, {costs['forward'].sum():,} image passes forward" in done.stdout
    assert not (tmp_path / "runs").exists()
    rows = json.loads(call("plan", "--scale", "paper", "--role", "cifar10", "--role", "busi", "--json").stdout)
    assert [row["megabytes"] for row in rows][1] == 0
    assert "1 sets of unknown size" in call("plan", "--scale", "paper", "--role", "cifar10", "--role", "busi").stdout


def test_export_ships_what_was_measured_and_reproduce_measures_it_again(call, tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTCLIP_RESULTS", str(tmp_path / "tables"))
    call("run", "--scale", "small.toml", "--attack", "clean")
    done = call("export", "--scale", "small.toml")
    assert done.exit_code == 0, done.output
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        ["cells", "2"],
        ["models", "0"],
        ["known", "2"],
    ]
    (row, _) = json.loads(call("run", "--scale", "small.toml", "--attack", "clean", "--store", "no", "--json").stdout)
    assert row["origin"] == "shipped"
    parts = [call("reproduce", "--scale", "small.toml", "--shard", f"{part}/2", "--store", "again") for part in (1, 2)]
    assert [part.exit_code for part in parts] == [0, 0]
    assert all("1 cells measured again, 0 differ" in part.stdout for part in parts)
    assert "0 changed components, 0 differ" in call("confirm", "--scale", "small.toml").stdout


@pytest.mark.parametrize("command", ["export", "reproduce", "confirm"])
def test_a_scale_that_is_nowhere_is_bad_usage(call, command):
    done = call(command, "--scale", "nosuch")
    assert done.exit_code == 2
    assert "unknown scale 'nosuch'" in done.stderr


def test_reproduce_needs_something_shipped(call, tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTCLIP_RESULTS", str(tmp_path / "nothing"))
    done = call("reproduce", "--scale", "quick")
    assert done.exit_code == 1
    assert "nothing is shipped of scale 'quick'; measure it first" in done.stderr


def test_the_version_is_told(call):
    assert call("--version").stdout == f"robustclip {version('robustclip')}\n"


def test_status_counts_states_and_names_problems(call, tmp_path):
    assert "The store is empty; measure something" in call("status").stdout
    call("run", "--scale", "small.toml", "--role", "dtd")
    bad = tmp_path / "runs" / "small" / "bad.json"
    bad.write_text("?")
    done = call("status")
    assert "small: 2 done" in done.stdout
    assert "small: 1 corrupt" in done.stdout
    assert f"mv {bad}" in done.stdout
    about = json.loads(call("status", "--json").stdout)
    assert len(about["files"]) == 3
    assert about["torch"]
    assert Store(about["store"]).root == tmp_path / "runs"


def test_audit_names_every_check_and_keeps_the_flags(call, tmp_path):
    """An attack of one tiny step is caught; the exit code says so, and `run` shows the flags afterwards."""
    options = ("--scale", "small.toml", "--role", "cifar10", "--attack", "FGSM", "--eps", "2/255", "--n", "2")
    shown = call("audit", *options)
    flagged = [line.split()[1] for line in shown.stdout.splitlines() if line.startswith("FLAG")]
    assert len(shown.stdout.splitlines()) == len(CHECKS)
    assert shown.exit_code == (1 if flagged else 0)
    told = json.loads(call("audit", *options, "--json").stdout)
    assert told["flags"] == flagged
    assert [finding["check"] for finding in told["findings"]] == list(CHECKS)
    (row,) = json.loads(call("run", *options, "--json").stdout)
    assert row["flags"] == ("; ".join(flagged) or "passed")


def test_audit_refuses_what_changes_no_images(call):
    done = call("audit", "--scale", "small.toml", "--attack", "clean")
    assert done.exit_code == 1
    assert "audit an attack on images" in done.output
    assert call("audit", "--attack", "nonsense").exit_code == 2


TRAINING = '[training]\npictures = 120\nupdates = 1\nbatch_size = 8\nattack_steps = 0\noptimizer = "sgd"\nrate = 1e-3\n'


def test_train_keeps_models_that_run_takes(call, tmp_path):
    (tmp_path / "small.toml").write_text(SMALL + TRAINING)
    arguments = ("train", "--scale", "small.toml", "--recipe", "FT-standard", "--recipe", "TeCoA", "--shots", "3")
    first, second = (json.loads(call(*arguments, "--json").stdout) for _ in range(2))
    assert list(first) == ["FT-standard/cifar10-3", "TeCoA/cifar10-3"]
    assert first == second
    shown = call(*arguments)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines() == [f"{name}  {folder}" for name, folder in first.items()]
    model = first["TeCoA/cifar10-3"]
    done = call("run", "--scale", "small.toml", "--role", "cifar10", "--attack", "clean", "--model", model, "--json")
    assert json.loads(done.stdout)[0]["model"] == model


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--recipe", "TeCoa"], 2, "unknown recipe 'TeCoa'; choose one of: FT-standard"),
        (["--recipe", "TeCoA", "--scale", "huge"], 2, "unknown scale 'huge'"),
        (["--recipe", "TeCoA", "--seed", "-1"], 2, "seed=-1"),
        (["--recipe", "TeCoA", "--shots", "0"], 2, "--shots"),
        (["--recipe", "TeCoA", "--role", "cifar11"], 1, "unknown role 'cifar11'"),
        (["--recipe", "TeCoA", "--shots", "13"], 1, "the smallest class has 12 pictures"),
        ([], 2, "--recipe"),
    ],
)
def test_wrong_training_is_one_line(call, tmp_path, arguments, code, message):
    (tmp_path / "small.toml").write_text(SMALL + TRAINING)
    done = call("train", *(["--scale", "small.toml"] if "--scale" not in arguments else []), *arguments)
    assert done.exit_code == code
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert done.stdout == ""


def tensors(folder):
    """All weights of a model's folder, prompts included."""
    return {name: value.float() for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def apart(ours, theirs):
    """The distance between two models."""
    return sum((ours[name] - theirs[name]).square().sum().item() for name in ours) ** 0.5


@pytest.mark.slow
def test_torchrun_trains_the_models_of_one_process(call, tmp_path):
    """As the help says; with one step of plain descent and no step of the attack only the order of sums differs."""
    for name, rate in (("small", "1e-3"), ("still", "1e-12")):
        training = TRAINING.replace("rate = 1e-3", f'rate = {rate}\nschedule = "constant"')
        (tmp_path / f"{name}.toml").write_text(SMALL + training)
    kinds = {kind: name for name, (kind, _) in reversed(RECIPES.items())}  # the first name of each
    options = [word for name in [*kinds.values(), "TeCoA-both"] for word in ("--recipe", name)]
    options += ["--json", "--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": str(Path(sys.executable).parent)}
    command = [*torchrun, "robustclip", "train", "--scale", "small.toml", *options, "--store", "both"]
    both = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment)
    assert both.returncode == 0, both.stderr
    both = json.loads(both.stdout)
    alone, still = (json.loads(call("train", "--scale", f"{scale}.toml", *options, "--store", scale).stdout)
                    for scale in ("small", "still"))  # fmt: skip
    assert len(both) == len(kinds) + 1
    for name in both:
        theirs, ours, start = (tensors(tmp_path / found[name]) for found in (both, alone, still))
        assert 0 < apart(ours, theirs) + 1e-12 < 1e-3 * apart(ours, start), name


def test_plan_of_fine_tuning(call, tmp_path):
    done = call("plan", "--scale", "paper", "--recipe", "TeCoA", "--recipe", "MMCoA", "--role", "cifar10", "--json")
    rows = json.loads(done.stdout)
    assert [(row["recipe"], row["forward"], row["updates"]) for row in rows] == [
        ("TeCoA", 150_000, 1954), ("MMCoA", 600_000, 5860)]  # fmt: skip
    shown = call("plan", "--scale", "paper", "--recipe", "TeCoA")
    assert "150000" in shown.stdout
    assert not (tmp_path / "runs").exists()
    unknown = call("plan", "--scale", "small.toml", "--recipe", "TeCoA")
    assert unknown.exit_code == 2
    assert "does not say how many pictures cifar10 has" in unknown.stderr
    assert call("plan", "--recipe", "nonsense").exit_code == 2
