"""Whatever is typed or has happened to a file: its result, or one line that says what is wrong. Never a traceback.

Hypothesis makes the inputs, the same ones in every run.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from robustclip import models
from robustclip.cli import app
from robustclip.study import planning
from robustclip.training import checkpoint

SCALE = {
    "source": "tinyworld", "reference_eps": "8/255", "images": 2, "batch_size": 2, "recompute_stale": True,
    "roles": ["cifar10", "dtd"], "role_images": {"dtd": 1}, "steps": {"PGD-100": 1}, "seeds": 1,
    "models": {"clip": "tinyworld-clip"},
    "sizes": {"a/b": 3}, "precision": "float32", "world": "tinyworld", "assumed_speed": 100,
    "defenses": {}, "training": {"batch_size": 2, "epochs": 1, "rate": 0.001, "pictures": 4},
}  # fmt: skip
MANY = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
                phases=[Phase.generate])  # fmt: skip
ODD = st.one_of(
    st.sampled_from(["", " ", "-1", "0", "1", "nan", "inf", "1e400", "1/0", "{}", "$\\foo$", "\x00", "~no", "../.."]),
    st.text(max_size=8),
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """An empty folder to work in."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("fuzz")
        patch.chdir(folder)
        patch.setenv("ROBUSTCLIP_RUNS", str(folder / "runs"))
        patch.delenv("ROBUSTCLIP_DATA", raising=False)
        patch.setattr(planning, "_try", lambda *_: 100.0)  # which takes half a second
        (folder / "small.toml").write_text(toml(SCALE))
        yield folder


def toml(value, key="") -> str:
    """A table as TOML, as far as it goes: values that JSON and TOML write alike, tables last."""
    plain = [f"{json.dumps(name)} = {json.dumps(one)}" for name, one in value.items() if not isinstance(one, dict)]
    tables = [f"[{key}{json.dumps(name)}]\n{toml(one, f'{key}{json.dumps(name)}.')}" for name, one in value.items()
              if isinstance(one, dict)]  # fmt: skip
    return "\n".join([*plain, *tables])


def check(words):
    """Run a command: it answers, or says in one line what is wrong, and exits accordingly."""
    done = CliRunner().invoke(app, words, prog_name="robustclip")
    assert done.exception is None or isinstance(done.exception, SystemExit), (words, repr(done.exception))
    assert done.exit_code in (0, 1, 2), words
    assert "Traceback" not in done.output, words
    if done.exit_code:
        told = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "Error"))]
        assert len(told) <= 1 or done.exit_code == 2, (words, done.stderr)
        assert done.stderr.strip() or done.exit_code == 1, (words, done.output)
    return done


OPTIONS = {
    "--role": ["cifar10", "dtd"], "--attack": ["clean", "FGSM", "PGD-1", "noise"], "--attacker": ["blind", "aware"],
    "--defense": ["none", "TTE"], "--eps": ["4/255", "0.1"], "--seed": ["0", "1"], "--n": ["1", "2"],
    "--device": ["cpu"], "--shard": ["1/1", "1/2"], "--batch-size": ["1", "3"],
    "--model": ["clip", "tinyworld-clip"], "--store": ["runs"],
    "--scale": ["small.toml", "quick"],
}  # fmt: skip


@settings(MANY, max_examples=180)
@given(st.data())
def test_command_lines(data):
    """Right options with right values, one of them replaced by anything."""
    command = data.draw(st.sampled_from(["run", "plan", "plan", "plan"]))
    words = {"--scale": "small.toml", "--role": "cifar10", "--n": "1", "--attack": "FGSM"}
    for name in data.draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=2)):
        words[name] = data.draw(st.sampled_from(OPTIONS[name]))
    name = data.draw(st.sampled_from(sorted(OPTIONS)))
    words[name] = data.draw(ODD)
    if command == "run" and words["--scale"] == "quick":
        words["--n"] = "1"
    check([command, *[word for pair in words.items() for word in pair]])


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 10**19), st.floats(), st.text(max_size=5),
                   st.lists(st.one_of(st.integers(), st.text(max_size=3)), max_size=2),
                   st.dictionaries(st.sampled_from(["a", "cifar10", "clip", "FGSM", "TeCoA", "rate"]),
                                   st.one_of(st.integers(-3, 3), st.text(max_size=3)), max_size=2))  # fmt: skip


@settings(MANY, max_examples=140)
@given(name=st.sampled_from(sorted(SCALE)), value=VALUES, cut=st.integers(0, 400), whole=st.integers(0, 9))
def test_scale_files(name, value, cut, whole):
    """One value replaced by anything, or the file cut short."""
    table = dict(SCALE)
    if value is None:
        del table[name]
    else:
        table[name] = value
    text = toml(table) if whole else toml(SCALE)[:cut]
    Path("changed.toml").write_text(text, encoding="utf-8", errors="surrogatepass")
    check(["plan", "--scale", "changed.toml", "--attack", "clean", "--attack", "PGD-100"])
    check(["plan", "--scale", "changed.toml", "--recipe", "TeCoA"])


def damaged(content: bytes, where: float, how: int, byte: int) -> bytes:
    """The content with a byte changed, cut off there, repeated from there, or emptied."""
    place = int(where * (len(content) - 1))
    return [
        content[:place] + bytes([content[place] ^ byte]) + content[place + 1 :],
        content[:place], content + content[place:], b"", content[:place] + b"\x00" * 8 + content[place:],
    ][how]  # fmt: skip


def read(path):
    """What a JSON file says; None if it is none."""
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


DAMAGE = {"where": st.floats(0, 1), "how": st.sampled_from([0, 0, 0, 1, 2, 3, 4]), "byte": st.integers(1, 255)}


@pytest.mark.slow
@settings(MANY, max_examples=50)
@given(**DAMAGE)
def test_stores(place, where, how, byte):
    """A damaged result is named and kept: it is never read as if it were whole, nor does it hide the others."""
    words = ["run", "--scale", "small.toml", "--role", "cifar10", "--attack", "FGSM", "--json"]
    if not (whole := sorted(Path("whole/small").glob("*.json"))):
        check([*words, "--store", "whole"])
        whole = sorted(Path("whole/small").glob("*.json"))
    shutil.rmtree("broken", ignore_errors=True)
    shutil.copytree("whole", "broken")
    path = Path("broken/small", whole[0].name)
    path.write_bytes(damaged(path.read_bytes(), where, how, byte))
    told = json.loads(check(["status", "--json", "--store", "broken"]).stdout)["files"]
    done = check([*words, "--store", "broken"])
    if read(path) == read(whole[0]):
        assert done.exit_code == 0
    else:
        assert [row["state"] for row in told] == ["corrupt"]
        assert done.exit_code == 1
        assert path.name in done.stderr
        assert "mv " in done.stderr


@pytest.fixture(scope="module")
def tiny(place):
    """A saved model that takes no time to read."""
    folder = place / "model"
    return models.save(models.load(device="cpu"), folder)


@settings(MANY, max_examples=40)
@given(**DAMAGE, name=st.sampled_from([models.CONFIG, "tokenizer_config.json", "tokenizer.json", "vocab.txt"]))
def test_folders_of_models(tiny, where, how, byte, name):
    """Damaged descriptions of a model."""
    broken = tiny.with_name("broken-model")
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(tiny, broken)
    if (path := broken / name).exists():
        path.write_bytes(damaged(path.read_bytes(), where, how, byte))
    check(["plan", "--scale", "small.toml", "--model", str(broken), "--role", "cifar10", "--attack", "clean"])


@settings(MANY, max_examples=100)
@given(**DAMAGE)
def test_checkpoints(place, where, how, byte):
    """A damaged checkpoint is refused in one line; what is restored is what was saved."""
    weights = [torch.arange(6.0).reshape(2, 3)]
    optimizer, path = torch.optim.SGD(weights, lr=0.1, momentum=0.5), place / checkpoint.CHECKPOINT
    weights[0].grad = torch.ones(2, 3)
    optimizer.step()
    expected = weights[0].clone()
    checkpoint.save(path, weights, optimizer, {"updates": 1})
    path.write_bytes(damaged(path.read_bytes(), where, how, byte))
    weights[0].zero_()
    try:
        facts, told = checkpoint.restore(path, weights, optimizer, {"updates": 1}), ""
    except ValueError as error:
        told = str(error)
    if told:
        assert path.name in told
        assert len(told.splitlines()) == 1
    else:
        assert torch.equal(weights[0], expected)
        assert torch.equal(optimizer.state[weights[0]]["momentum_buffer"], torch.ones(2, 3))
        assert facts == {"updates": 1}
