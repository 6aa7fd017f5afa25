"""Files that are whole or not there, and locks that one process holds at a time."""

import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from robustclip.checks import check_folder

LEFTOVER = 86_400  # seconds after which a temporary file is nobody's any more
TEMPORARY = ".tmp"


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write `content` so that readers see the old file or the new one, never half of it; returns the path."""
    data = content.encode() if isinstance(content, str) else content
    temporary = check_folder(path.parent, max(1, 2 * len(data) / 1e6)) / f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {str(path)!r} ({error.strerror}); make some room or choose another folder"
        ) from error
    return path


def leftovers(folder: Path) -> list[Path]:
    """Temporary files that a killed process left somewhere below a folder."""
    old, found = time.time() - LEFTOVER, []
    for path in Path(folder).rglob(f"*{TEMPORARY}"):
        with suppress(OSError):  # somebody else just cleaned up
            found += [path] if path.stat().st_mtime < old else []
    return found


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file while the block runs; without `wait`, False if another process holds it.

    The system frees the lock when its process ends, however it ends.
    """
    with check_folder(path.parent).joinpath(path.name).open("a") as file:
        held = _lock(file.fileno())
        while wait and not held:
            time.sleep(0.2)
            held = _lock(file.fileno())
        yield held


def changing(folder: Path) -> AbstractContextManager[bool]:
    """Hold a folder that is read, merged and written; the lock lies with the machine's temporary files."""
    name = hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:16]
    return locked(Path(tempfile.gettempdir()) / "robustclip-locks" / name)


def _lock(descriptor: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
