"""The store: one JSON file per cell, written so that a kill at any moment costs at most one batch.

    runs/<scale>/<key>.json          a finished cell, written under a temporary name and renamed
    runs/<scale>/<key>.part.jsonl    one line per finished batch of an unfinished cell; a torn last line is ignored
    runs/<scale>/artifacts/          small arrays that figures need
    runs/<scale>/models/             fine-tuned models

Nothing is ever deleted because it cannot be read: the error names the file and how to move it aside.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pandas as pd

from robustclip.files import leftovers, locked, write_whole

FORMAT = "robustclip-cell-2"
PART = ".part.jsonl"


class CellFiles:
    """The files of one cell."""

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(path.stem + PART)

    def read(self) -> dict | None:
        """The finished result, or None; a file that is not a whole result of this store is an OSError."""
        if not self.path.exists():
            return None
        try:
            record = json.loads(self.path.read_bytes())
        except ValueError as error:
            raise unusable(self.path, f"it is not JSON ({error})") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise unusable(self.path, f"it was not written by this store (its format is not {FORMAT!r})")
        if record.get("key") != self.path.stem:
            raise unusable(self.path, f"it belongs to the cell {record.get('key')!r}; the file was renamed or copied")
        if record.get("digest") != digest_of(record):
            raise unusable(self.path, "its content was changed or damaged")
        return record

    def write(self, record: dict) -> dict:
        """Store a finished result in one step and return what was stored; the partial one is not needed any more."""
        record = signed({"format": FORMAT, "key": self.path.stem, **record})
        write_whole(self.path, json.dumps(record) + "\n")
        self.tidy()
        return record

    def tidy(self) -> None:
        """Remove the partial file of a finished cell, which a kill right after the last rename leaves."""
        if self.part.exists() and os.access(self.part.parent, os.W_OK):
            self.part.unlink(missing_ok=True)

    def parts(self, code: dict | None = None) -> list[dict]:
        """Finished batches of an interrupted run of the same code (None: of any), from the first on without gaps."""
        found: list[dict] = []
        lines = self.part.read_bytes().split(b"\n")[:-1] if self.part.exists() else []
        for line in lines:
            try:
                batch = json.loads(line)
                whole = batch["digest"] == digest_of(batch) and isinstance(batch["answers"], dict)
            except (ValueError, TypeError, KeyError) as error:
                raise unusable(self.part, "one of its lines is not a batch of this store") from error
            if not whole:
                raise unusable(self.part, "one of its lines was changed or damaged")
            if (code is None or batch["provenance"] == code) and batch["start"] == (found[-1]["stop"] if found else 0):
                found.append(batch)
        return found

    def resume(self, code: dict) -> list[dict]:
        """As `parts`, and the partial file now holds these and nothing else."""
        found = self.parts(code)
        write_whole(self.part, "".join(json.dumps(batch) + "\n" for batch in found))
        return found

    def append(self, batch: dict) -> dict:
        """Add one finished batch to the partial file."""
        try:
            with self.part.open("a", encoding="utf-8") as file:
                file.write(json.dumps(signed(batch)) + "\n")
        except OSError as error:
            raise OSError(
                f"cannot write {str(self.part)!r} ({error.strerror}); make some room and run again"
            ) from error
        return batch

    def claimed(self, wait: bool) -> AbstractContextManager[bool]:
        """Hold the cell, so that no two processes measure it; without `wait`, False if another one does."""
        return locked(self.path.parent / "locks" / self.path.stem, wait)


class Store:
    """A folder of results: `runs`, or where ROBUSTCLIP_RUNS points."""

    def __init__(self, root: "Store | str | Path | None" = None) -> None:
        chosen = root.root if isinstance(root, Store) else root
        self.root = Path(chosen or os.environ.get("ROBUSTCLIP_RUNS") or "runs").expanduser()

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    def cell(self, scale: str, key: str) -> CellFiles:
        """The files of the cell called `key`."""
        return CellFiles(self.root / scale / f"{key}.json")

    def records(self, scale: str) -> list[dict]:
        """All finished results of a scale that can be read, in a fixed order; `status` tells of the others."""
        found = []
        for path in sorted((self.root / scale).glob("*.json")):
            try:
                found.append(CellFiles(path).read())
            except OSError:
                continue
        return found

    def status(self, is_stale: Any) -> pd.DataFrame:
        """One row per file: its state (done, stale, partial, corrupt, leftover), cell, images done, date, problem."""
        cell = ("scale", "model", "role", "task", "attack", "attacker", "defense", "eps", "n", "seed")
        rows = [_row(path, is_stale) for end in (".json", PART) for path in sorted(self.root.glob(f"*/*{end}"))]
        rows += [{"state": "leftover", "scale": path.parent.name, "file": str(path), "problem": ""}
                 for path in leftovers(self.root)]  # fmt: skip
        return pd.DataFrame(rows, columns=["state", *cell, "done", "date", "file", "problem"])

    def clean(self) -> int:
        """Remove temporary files that killed processes left; returns how many."""
        old = leftovers(self.root)
        for path in old:
            path.unlink(missing_ok=True)
        return len(old)


Where = Store | str | Path | None  # of results: a store, its folder, or the default one


def _row(path: Path, is_stale: Any) -> dict:
    """What one file of a store holds."""
    row = {"scale": path.parent.name, "file": str(path), "problem": ""}
    try:
        if path.name.endswith(PART):
            found = CellFiles(path.with_name(path.name.removesuffix(PART) + ".json")).parts()
            about = found[0]["cell"] if found else {}
            return row | about | {"state": "partial", "done": found[-1]["stop"] if found else 0}
        record = CellFiles(path).read()
        state = "stale" if is_stale(record) else "done"
        return row | record["cell"] | {"state": state, "done": record["cell"]["n"], "date": record["date"]}
    except OSError as error:
        return row | {"state": "corrupt", "problem": str(error)}
    except (KeyError, TypeError, AttributeError) as error:
        return row | {"state": "corrupt", "problem": str(unusable(path, f"it lacks what a result has ({error!r})"))}


def signed(record: dict) -> dict:
    """The record with a digest of all the rest."""
    return record | {"digest": digest_of(record)}


def digest_of(record: Mapping[str, Any]) -> str:
    """Digest of everything in a record but the digest itself."""
    body = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def unusable(path: Path, problem: str) -> OSError:
    """The error for a file that cannot be read; it is left where it is."""
    move = f"mv {shlex.quote(str(path))} {shlex.quote(f'{path}.bad')}"
    return OSError(
        f"cannot use {str(path)!r}: {problem}. Nothing was deleted; move it aside with `{move}` and run again"
    )
