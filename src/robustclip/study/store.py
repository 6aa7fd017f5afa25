"""The store: one JSON file per cell, written so that a kill at any moment costs at most one batch.

    runs/<scale>/<key>.json          a finished cell, written under a temporary name and renamed
    runs/<scale>/<key>.part.jsonl    one line per finished batch of an unfinished cell; a torn last line is ignored

Nothing is ever deleted because it cannot be read: the error names the file and how to move it aside.
"""

import hashlib
import json
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import pandas as pd

from robustclip.checks import check_folder

FORMAT = "robustclip-cell-1"
# What a measured number depends on.
CODE = ("component.py", "models.py", "prompts.py", "fast.py", "data", "attacks", "defenses", "training")
LIBRARIES = ("robustclip", "torch", "torchvision", "open_clip_torch", "transformers", "numpy", "pandas")
PART = ".part.jsonl"


@cache
def code_digest() -> str:
    """Short sha256 over the source of everything a measured number depends on."""
    root, digest = Path(str(files("robustclip"))), hashlib.sha256()
    for path in sorted(path for part in CODE for path in [root / part, *(root / part).rglob("*.py")] if path.is_file()):
        source = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + source + b"\0")
    return digest.hexdigest()[:16]


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str:
    """The last git commit that changed the package, or "" outside a checkout."""
    command = ["git", "-C", str(files("robustclip")), "log", "-1", "--format=%H", "--", "."]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


class Entry:
    """The two files of one cell."""

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(path.stem + PART)

    def read(self) -> dict | None:
        """The finished result, or None; a file that is not a whole result of this store is an OSError."""
        if not self.path.exists():
            return None
        try:
            record = json.loads(self.path.read_bytes())
        except ValueError as error:
            raise _unusable(self.path, f"it is not JSON ({error})") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise _unusable(self.path, f"it was not written by this store (its format is not {FORMAT!r})")
        if record.get("key") != self.path.stem:
            raise _unusable(self.path, f"it belongs to the cell {record.get('key')!r}; the file was renamed or copied")
        if record.get("digest") != _digest(record):
            raise _unusable(self.path, "its content was changed or damaged")
        return record

    def write(self, record: dict) -> dict:
        """Store a finished result in one step and return what was stored; the partial one is not needed any more."""
        record = {"format": FORMAT, "key": self.path.stem, **record}
        record["digest"] = _digest(record)
        write_whole(self.path, json.dumps(record) + "\n")
        return record

    def batches(self, code: str) -> list[dict]:
        """Finished batches of an interrupted run of the same code, from the first image on without gaps."""
        found: list[dict] = []
        lines = self.part.read_bytes().split(b"\n")[:-1] if self.part.exists() else []
        for line in lines:
            try:
                batch = json.loads(line)
                if batch["code"] == code and batch["start"] == sum(len(earlier["predicted"]) for earlier in found):
                    found.append(batch)
            except (ValueError, TypeError, KeyError) as error:
                raise _unusable(self.part, "one of its lines is not a batch of this store") from error
        return found

    def resume(self, code: str) -> list[dict]:
        """As `batches`, and the partial file now holds these and nothing else."""
        found = self.batches(code)
        write_whole(self.part, "".join(json.dumps(batch) + "\n" for batch in found))
        return found

    def append(self, batch: dict) -> None:
        """Add one finished batch to the partial file."""
        with self.part.open("a", encoding="utf-8") as file:
            file.write(json.dumps(batch) + "\n")


class Store:
    """A folder of results: `runs`, or where ROBUSTCLIP_RUNS points."""

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root or os.environ.get("ROBUSTCLIP_RUNS") or "runs").expanduser()

    @classmethod
    def of(cls, where: "Store | str | Path | None") -> "Store":
        """A store as it is, or the one in a folder."""
        return where if isinstance(where, Store) else cls(where)

    def entry(self, scale: str, key: str) -> Entry:
        """Where the cell called `key` is kept."""
        return Entry(self.root / scale / f"{key}.json")

    def records(self, scale: str) -> list[dict]:
        """All finished results of a scale, in a fixed order."""
        return [Entry(path).read() for path in sorted((self.root / scale).glob("*.json"))]

    def status(self) -> pd.DataFrame:
        """One row per file: its state (done, stale, partial, corrupt), cell, number of images done, date, problem."""
        cell = ("scale", "model", "role", "attack", "attacker", "defense", "eps", "n", "seed")
        rows = [_row(path) for end in (".json", PART) for path in sorted(self.root.glob(f"*/*{end}"))]
        return pd.DataFrame(rows, columns=["state", *cell, "done", "date", "file", "problem"])


Where = Store | str | Path | None  # of results: a store, its folder, or the default one


def _row(path: Path) -> dict:
    """What one file of a store holds."""
    row = {"scale": path.parent.name, "file": str(path), "problem": ""}
    try:
        if path.name.endswith(PART):
            found = Entry(path.with_name(path.name.removesuffix(PART) + ".json")).batches(code_digest())
            about = found[0]["cell"] if found else {}
            return row | about | {"state": "partial", "done": sum(len(batch["predicted"]) for batch in found)}
        record = Entry(path).read()
    except OSError as error:
        return row | {"state": "corrupt", "problem": str(error)}
    state = "done" if record["code"] == code_digest() else "stale"
    return row | record["cell"] | {"state": state, "done": len(record["correct"]), "date": record["date"]}


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path` so that readers see the old file or the new one, never half of it."""
    temporary = check_folder(path.parent) / f"{path.name}.{os.getpid()}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _digest(record: dict) -> str:
    """Digest of everything in a record but the digest itself."""
    body = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def _unusable(path: Path, problem: str) -> OSError:
    """The error for a file that cannot be read; it is left where it is."""
    return OSError(f"cannot use {str(path)!r}: {problem}. Nothing was deleted; move it aside with "
                   f"`mv {path} {path}.bad` and run again")  # fmt: skip
