"""A Hugging Face hub on this machine, with as much of its protocol as the client libraries use; and small models.

    with serving(folder) as hub:                # folder/models/org/name, folder/datasets/org/name, folder/files
        hub.faults["model.safetensors"] = ["cut"]
        subprocess.run(..., env=hub.environment(home))

What is asked for is kept in `hub.asked`. A list of faults is used up request by request, for the bytes of that file:

    "cut"      the connection breaks off in the middle
    "wrong"    one byte is another one
    503        or any other status of HTTP
"""

import hashlib
import json
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from threading import Thread

from robustclip import _torchvision

LARGE = (".safetensors", ".bin", ".parquet")  # kept in LFS: named by sha256, and given out by another server
VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
PAPER_SCALE = """
source = "parquet"
world = "paper"
reference_eps = "1/255"
images = 2
batch_size = 2
recompute_stale = false
"""  # how a scale of the papers' world begins, with little to measure
TINY = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass
class Hub:
    """A running server: where it is, what it was asked, what goes wrong at it."""

    folder: Path
    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)  # method and path
    ranges: list[str] = field(default_factory=list)  # where a download went on, "bytes=100-"
    faults: dict[str, list[str | int]] = field(default_factory=dict)  # by the name of a file
    broken: int | None = None  # status of every answer to what repositories hold
    closed: int | None = None  # status of every answer about a file

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Variables under which client libraries know no other hub and no other cache."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "*"}
        dropped = ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN")
        return {name: value for name, value in os.environ.items() if name not in dropped} | own | more

    def fetched(self, ending: str) -> int:
        """How often the bytes of a file were asked for."""
        return sum(method == "GET" and path.endswith(ending) for method, path in self.asked)


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """Serve the repositories and files of a folder, on loopback only."""
    hub = Hub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append((self.command, path))
        match = re.fullmatch(r"/api/(models|datasets)/(.+?)(/revision/[^/]+)?", path)
        if match and "/tree/" not in path:
            return self._api(self.hub.folder / match[1] / match[2])
        if match := re.fullmatch(r"/(datasets/)?(.+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(self.hub.folder / (match[1] or "models") / match[2], match[4])
        if match := re.fullmatch(r"/(?:files|cdn)/(.+)", path):
            where = next(iter(self.hub.folder.glob(f"*/{match[1]}")), None)
            return self._content(where) if where and where.is_file() else self._send(404)
        return self._missing("EntryNotFound", 404)

    def _api(self, place: Path) -> None:
        if self.hub.broken:
            return self._send(self.hub.broken)
        if not place.is_dir():
            return self._missing("RepoNotFound", 401)
        if (place / "gated").exists():
            return self._missing("GatedRepo", 403)
        told = [self._told(path, place) for path in sorted(place.rglob("*")) if path.is_file()]
        name = place.relative_to(self.hub.folder).as_posix().partition("/")[2]
        body = {"id": name, "sha": self._commit(place), "private": False, "tags": [], "downloads": 0, "siblings": told}
        return self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _told(self, path: Path, place: Path) -> dict:
        content = path.read_bytes()
        found = {"rfilename": path.relative_to(place).as_posix(), "size": len(content), "blobId": git_oid(content)}
        lfs = {"size": len(content), "sha256": sha256(content), "pointerSize": 134}
        return found | ({"lfs": lfs} if path.suffix in LARGE else {})

    def _commit(self, place: Path) -> str:
        return hashlib.sha1(str(place).encode(), usedforsecurity=False).hexdigest()

    def _resolve(self, place: Path, name: str) -> None:
        """Small files from here; large ones from elsewhere, with their size and checksum told beforehand."""
        path = place / name
        if self.hub.closed:
            return self._send(self.hub.closed)
        if not place.is_dir():
            return self._missing("RepoNotFound", 401)
        if not path.is_file():
            return self._missing("EntryNotFound", 404, {"X-Repo-Commit": self._commit(place)})
        content, headers = path.read_bytes(), {"X-Repo-Commit": self._commit(place)}
        if path.suffix not in LARGE:
            return self._content(path, headers | {"ETag": f'"{git_oid(content)}"'})
        headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        elsewhere = f"{self.hub.url}/cdn/{path.relative_to(self.hub.folder).as_posix().partition('/')[2]}"
        return self._send(302, b"", headers | {"Location": elsewhere})

    def _content(self, path: Path, headers: dict | None = None) -> None:
        content, known = path.read_bytes(), self.hub.faults.get(path.name, []) if self.command == "GET" else []
        fault = known.pop(0) if known else None
        if isinstance(fault, int):
            return self._send(fault)
        if fault == "wrong":
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {"Accept-Ranges": "bytes"} | (headers or {})
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            self.hub.ranges.append(asked[0])
            start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content = content[start:stop]
        return self._send(206 if asked else 200, content, headers, cut=fault == "cut")

    def _missing(self, code: str, status: int, headers: dict | None = None) -> None:
        return self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code} | (headers or {}))

    def _send(self, status: int, content: bytes = b"", headers: dict | None = None, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut


# --- what it may serve ------------------------------------------------------------------------------------------------


def tiny_clip(folder: Path, config: bool = True) -> Path:
    """A CLIP of random weights with open_clip's own tokenizer, as open_clip puts it on the hub."""
    import torch

    _torchvision.prepare()
    from open_clip import CLIP
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        save_file(CLIP(**TINY, quick_gelu=True).state_dict(), folder / "open_clip_model.safetensors")
    if config:
        told = {"model_cfg": TINY | {"quick_gelu": True}, "preprocess_cfg": {"interpolation": "bicubic"}}
        (folder / "open_clip_config.json").write_text(json.dumps(told))
    return folder


def tiny_bert(folder: Path) -> Path:
    """A masked language model of random weights with a vocabulary of English, as transformers puts it on the hub."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    vocabulary = files("robustclip").joinpath("assets/photo-mlm/vocab.txt").read_text(encoding="utf-8")
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text(vocabulary, encoding="utf-8")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        network = BertForMaskedLM(BertConfig(vocab_size=len(vocabulary.split()), **sizes))
    network.save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder
