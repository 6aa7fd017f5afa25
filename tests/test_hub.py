"""Files of the hub: whole and verified, or one line that says why not; what went wrong, the next call makes good."""

import gc
import json
import subprocess
import sys
import warnings
from pathlib import Path

import huggingface_hub
import pytest

from hub import TINY, full_disk, serving, sha256
from robustclip.hub import CONFIG, WEIGHTS, cached, fetch, fetch_dataset, repository

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # the client leaves connections open that broke off
CONTENT = bytes(range(256)) * 1600
NAME = "hf-hub:org/tiny"


@pytest.fixture(scope="module", autouse=True)
def _closed():
    """No other test hears of the connections that broke off."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that the client library of this process knows, with an empty cache."""
    place = tmp_path / "served/models/org/tiny"
    place.mkdir(parents=True)
    (place / CONFIG).write_text(json.dumps({"model_cfg": TINY}))
    (place / WEIGHTS).write_bytes(CONTENT)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(tmp_path / "served") as running:
        connect(monkeypatch, running.url)
        yield running
    huggingface_hub.utils.reset_sessions()


def connect(monkeypatch, url: str, offline: bool = False) -> None:
    """What HF_ENDPOINT and HF_HUB_OFFLINE do when the library is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    huggingface_hub.utils.reset_sessions()


def refused(*words: str, name: str = NAME) -> str:
    """The one line that says why a model was not fetched."""
    with pytest.raises(OSError, match="could not fetch") as caught:
        fetch(name)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 400
    for word in words:
        assert word in line
    assert not cached(name.removeprefix("hf-hub:"), [WEIGHTS])
    return line


def good() -> Path:
    """Fetch the model; its weights are those that the hub has."""
    fetch(NAME)
    (path,) = cached("org/tiny", [WEIGHTS])
    assert path.read_bytes() == CONTENT
    return path


def test_a_model_is_fetched_once(hub):
    good(), good()
    assert hub.fetched(WEIGHTS) == hub.fetched(CONFIG) == 1


def test_what_breaks_off_goes_on(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", len(CONTENT) // 8)
    hub.faults[WEIGHTS] = ["cut"]
    refused("broke off", "run the same command again")
    good()
    assert hub.ranges == [f"bytes={len(CONTENT) // 2}-"]


def test_a_disk_that_is_full(hub, monkeypatch):
    with full_disk(100_000):
        refused("no room in", "File too large", "HF_HUB_CACHE")
    good()
    usage = type("Usage", (), {"free": 1e5})
    monkeypatch.setattr("robustclip.checks.shutil.disk_usage", lambda _: usage)
    (hub.folder / "models/org/tiny" / WEIGHTS).write_bytes(CONTENT * 2)
    with pytest.raises(OSError, match=r"could not fetch 'hf-hub:org/tiny': only 0.1 MB free for .*make some room"):
        fetch(NAME)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("wrong", ("has checksum", "it was deleted, fetch it again")),
        (503, ("answers 503; try again later",)),
        (404, ("answers 404", "try again later")),
    ],
)
def test_what_a_server_may_do(hub, fault, words):
    hub.faults[WEIGHTS] = [fault] * 6  # the client asks five times more
    refused(*words)
    hub.faults.clear()
    good()


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    for hub.broken, hub.closed in ((503, None), (None, 503)):
        refused(f"{hub.url} answers 503; try again later")
    hub.closed = None
    good()
    hub.broken = 503
    fetch(NAME)  # the cache will do
    connect(monkeypatch, "http://127.0.0.1:9")
    fetch(NAME)
    refused("no connection to http://127.0.0.1:9", "connect to the network", "local folder", name="hf-hub:org/other")


def test_repositories_that_are_of_no_use(hub):
    models = hub.folder / "models/org"
    for name in ("gated", "empty", "pickled", "odd"):
        (models / name).mkdir()
    (models / "gated/gated").touch()
    for name in ("pickled", "odd"):
        (models / name / CONFIG).write_text("{}")
    (models / "pickled/open_clip_pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    (models / "odd" / WEIGHTS).write_bytes(CONTENT)
    refused("has no org/nobody, or does not show it", "hf auth login", name="hf-hub:org/nobody")
    refused("its owners ask for consent", f"{hub.url}/org/gated", name="hf-hub:org/gated")
    refused(f"there is no {CONFIG} in org/empty", "choose another", name="hf-hub:org/empty")
    refused("only as open_clip_pytorch_model.bin, a pickle", "choose a repository with", name="hf-hub:org/pickled")
    assert not hub.fetched(".bin")
    assert not hub.fetched(CONFIG)  # nothing of a repository that is of no use
    with pytest.raises(
        OSError, match=r"could not fetch 'hf-hub:org/odd': its open_clip_config.json describes no model"
    ):
        fetch("hf-hub:org/odd")


def test_offline_the_cache_has_to_hold_all(hub, monkeypatch, tmp_path):
    connect(monkeypatch, hub.url, offline=True)
    refused("HF_HUB_OFFLINE=1 forbids the network", "copy models--org--tiny from another machine")
    assert not hub.asked
    connect(monkeypatch, hub.url)
    path = good()
    connect(monkeypatch, hub.url, offline=True)
    good()
    path.resolve().write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(OSError, match=r"could not fetch .* has checksum .*it was deleted, fetch it again"):
        fetch(NAME)
    assert not cached("org/tiny", [WEIGHTS])


def test_only_https_or_this_machine(hub, monkeypatch):
    connect(monkeypatch, "http://hub.example.org")
    refused("HF_ENDPOINT='http://hub.example.org' is not https")


def test_the_tokenizer_of_another_repository_comes_along(hub):
    words = hub.folder / "models/org/words"
    words.mkdir()
    (words / "vocab.txt").write_text("a\nb\n")
    (hub.folder / "models/org/tiny" / CONFIG).write_text(
        json.dumps({"model_cfg": TINY | {"text_cfg": TINY["text_cfg"] | {"hf_tokenizer_name": "org/words"}}})
    )
    good()
    assert cached("org/words", ["vocab.txt"])


def test_names_and_where_they_lead(tmp_path):
    assert repository("ViT-B-32/openai") == ("timm/vit_base_patch32_clip_224.openai", WEIGHTS)
    assert repository("ViTamin-S/datacomp1b") == ("jienengchen/ViTamin-S", "pytorch_model.safetensors")
    assert repository("hf-hub:org/tiny") == ("org/tiny", WEIGHTS)
    for name in ("tinyworld-clip", str(tmp_path), "ViT-B-32/nobody", "nobody/openai"):
        assert repository(name) is None
        fetch(name)


def test_data_sets_are_verified_too(hub, tmp_path):
    place, into = hub.folder / "datasets/org/cars/data", tmp_path / "cars"
    place.mkdir(parents=True)
    for number in range(2):
        (place / f"test-{number:05}-of-00002.parquet").write_bytes(CONTENT)
    for fault in ("cut", "wrong", 503):
        hub.faults["test-00001-of-00002.parquet"] = [fault] * 6
        with pytest.raises(OSError, match="could not fetch 'org/cars': ") as caught:
            fetch_dataset("org/cars", "main", ["data/test-*.parquet"], into)
        assert "\n" not in str(caught.value)
        assert not (into / "data/test-00001-of-00002.parquet").exists()
    hub.faults.clear()
    with full_disk(100_000), pytest.raises(OSError, match=r"no room in .*cars \(File too large\); make some$"):
        fetch_dataset("org/cars", "main", ["data/test-*.parquet"], into)
    fetch_dataset("org/cars", "main", ["data/test-*.parquet"], into)
    assert {sha256(path.read_bytes()) for path in into.glob("data/*")} == {sha256(CONTENT)}
    with pytest.raises(OSError, match=r"there is no data/train-\*.parquet in org/cars"):
        fetch_dataset("org/cars", "main", ["data/train-*.parquet"], into)


def test_variables_of_the_environment_say_where_the_cache_is_and_forbid_the_network(hub, tmp_path):
    """In a process of its own, as a user sets them."""
    code = """if True:
        import sys
        from robustclip.hub import fetch
        for name in sys.argv[1:]:
            try:
                print(fetch(name))
            except OSError as error:
                print(error)
    """
    good()
    variables = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", code, NAME, "hf-hub:org/other"]
    done = subprocess.run(command, env=hub.environment(tmp_path, **variables), capture_output=True, text=True)
    assert not done.stderr
    here, other = done.stdout.splitlines()
    assert here == "None"
    assert "HF_HUB_OFFLINE=1 forbids the network" in other
    assert hub.fetched(WEIGHTS) == 1
