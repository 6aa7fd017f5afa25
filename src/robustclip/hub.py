"""Fetch from the Hugging Face hub: files that are whole and verified, or one line that says why not.

    fetch("ViT-B-32/openai")      # from now on `models.load` finds all its files in the cache of the hub

A repository tells what it holds, how large each file is and its checksum. So a lack of room, and weights that only come
as a pickle, are told before the first byte of them is fetched. What breaks off goes on at the next call.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from robustclip import _torchvision
from robustclip.checks import check_folder
from robustclip.files import file_digest

_torchvision.prepare()

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TOKENIZER = ("config.json", "merges.txt", "special_tokens_map.json", "spiece.model", "tokenizer.json",
             "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLIENTS = ("requests", "urllib3", "httpx", "httpcore")  # whose errors are those of connections
BROKEN = ("ChunkedEncodingError", "IncompleteRead", "ReadTimeout", "RemoteProtocolError")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def repository(name: str) -> tuple[str, str] | None:
    """The repository of a model's files and its file of weights; None for a name that leads to no known one."""
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:"), WEIGHTS
    import open_clip

    architecture, _, tag = name.partition("/")
    if name.count("/") != 1 or Path(name).exists() or not open_clip.get_pretrained_cfg(architecture, tag):
        return None
    place = open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub", "")
    if not place:
        raise ValueError(f"open_clip has {name!r} as a pickle only, which can run code; choose weights of the hub")
    folder, _, file = place.rpartition("/")
    known = file in ("", "open_clip_pytorch_model.bin")
    return folder, WEIGHTS if known else str(Path(file).with_suffix(".safetensors"))


def fetch(name: str) -> None:
    """Bring what `models.load` needs of a remote model into the cache of the hub, every file verified.

    Names of embedded models and of folders need nothing. Without a network the cache will do, if it holds all.
    """
    if (found := repository(name)) is None:
        return
    place, weights = found
    with _one_line(name, place):
        if name.startswith("hf-hub:"):
            config = _model_config(_files(place, [CONFIG, weights], TOKENIZER)[0])
        else:
            import open_clip

            _files(place, [weights], ())
            config = open_clip.get_model_config(name.split("/")[0])
        speaks = config.get("text_cfg", {}).get("hf_tokenizer_name") or place
        if speaks != place and not Path(speaks).is_dir():
            _files(speaks, [], TOKENIZER)


def _model_config(path: Path) -> dict:
    """What open_clip's file says about a network."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its {CONFIG} describes no model ({error}); choose another repository") from error


def fetch_dataset(place: str, revision: str, needed: Sequence[str], folder: Path) -> None:
    """Bring the files of a data set that match patterns into a folder, every file verified."""
    with _one_line(place, place, folder):
        _files(place, needed, (), "dataset", revision, folder)


def _files(
    place: str, needed: Sequence[str], welcome: Sequence[str], kind: str = "model", revision: str | None = None,
    folder: Path | None = None,
) -> list[Path]:  # fmt: skip
    """Verified files of a repository: each pattern `needed` must match, those `welcome` may. In the order of `needed`.

    They go to the cache of the hub, which will do if the hub does not answer, or to a `folder`.
    """
    from huggingface_hub import constants, hf_hub_download

    _check_endpoint(constants.ENDPOINT)
    cache = Path(folder or constants.HF_HUB_CACHE)
    try:
        known = _listed(place, kind, revision)
    except Exception:
        if folder is None and (found := cached(place, needed, revision)):
            return found
        raise
    names = _chosen(place, known, [*needed, *welcome], needed)
    here = [name for name in names if ((folder / name).is_file() if folder else cached(place, [name], revision))]
    check_folder(cache, 1 + sum(known[name][0] or 0 for name in names if name not in here) / 1e6)
    paths = []
    for name in names:
        with _quiet():
            path = Path(hf_hub_download(place, name, repo_type=kind, revision=revision, local_dir=folder))
        paths.append(_verified(path, known[name][1]))
    return paths


def _listed(place: str, kind: str, revision: str | None) -> dict[str, tuple[int | None, str]]:
    """Size and checksum of each file of a repository, as the hub tells them; one request, no second try."""
    from huggingface_hub import HfApi

    told = HfApi().repo_info(place, repo_type=kind, revision=revision, files_metadata=True, timeout=10)
    return {one.rfilename: (one.size, one.lfs.sha256 if one.lfs else one.blob_id) for one in told.siblings}


def _chosen(place: str, known: Iterable[str], patterns: Sequence[str], needed: Sequence[str]) -> list[str]:
    """The files that match, those of the first pattern first; each pattern `needed` has to match one."""
    found = []
    for pattern in patterns:
        match = sorted(name for name in known if fnmatch(name, pattern))
        if pattern in needed and not match:
            pickles = [name for name in known if name.endswith(PICKLES)]
            if pattern.endswith(".safetensors") and pickles:
                raise ValueError(
                    f"its weights come only as {pickles[0]}, a pickle, which can run code when it is read; choose a "
                    f"repository with {pattern}"
                )
            raise ValueError(f"there is no {pattern} in {place}; choose another repository")
        found += [name for name in match if name not in found]
    return found


def cached(place: str, names: Sequence[str], revision: str | None = None) -> list[Path]:
    """Verified files of a model in the cache of the hub, if it holds all of them."""
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(place, name, revision=revision) for name in names]
    paths = [Path(path) for path in found if isinstance(path, str)]
    return [_verified(path, path.resolve().name) for path in paths] if len(paths) == len(names) else []


def _verified(path: Path, digest: str | None) -> Path:
    """The path of a file with this checksum: sha256, or git's own for small files; another file is removed."""
    digits, changed = len(digest or ""), path.stat()
    if digits in (40, 64) and (found := _digest(path, digits, changed.st_size, changed.st_mtime_ns)) != digest:
        for one in {path.resolve(), path}:
            one.unlink(missing_ok=True)
        raise OSError(f"{path.name} has checksum {found[:12]}..., not {digest[:12]}...; it was deleted, fetch it again")
    return path


@lru_cache(maxsize=256)
def _digest(path: Path, digits: int, size: int, changed: int) -> str:
    """sha256 of a file, or with 40 digits that of git; size and date make a new file a new one."""
    if digits == 64:
        return file_digest(path)
    return hashlib.sha1(b"blob %d\0" % size + path.read_bytes(), usedforsecurity=False).hexdigest()


def _check_endpoint(url: str) -> None:
    """Only https, or a server of this machine."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
        raise ValueError(f"HF_ENDPOINT={url!r} is not https; nothing is fetched from it")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what the hub's client says about its tries."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# --- errors -----------------------------------------------------------------------------------------------------------


@contextmanager
def _one_line(name: str, place: str, folder: Path | None = None) -> Iterator[None]:
    """Tell any failure as one line: what could not be fetched, why, what to do."""
    try:
        yield
    except Exception as error:
        raise OSError(f"could not fetch {name!r}: {_why(error, place, folder)}") from error


def _why(error: BaseException, place: str, folder: Path | None) -> str:
    """Reason and remedy of a failed download from a repository to a folder, or to the cache of the hub."""
    from huggingface_hub import constants, errors

    server, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    status = getattr(getattr(error, "response", None), "status_code", None)
    if full := next((one.errno for one in _chain(error) if getattr(one, "errno", None) in FULL), None):
        other = "" if folder else ", or let HF_HUB_CACHE name another folder"
        return f"no room in {folder or cache} ({os.strerror(full)}); make some{other}"
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        return _why(error.__cause__, place, folder)
    if isinstance(error, errors.OfflineModeIsEnabled):
        copy = f"copy models--{place.replace('/', '--')} from another machine to {cache}, or unset it"
        return f"HF_HUB_OFFLINE=1 forbids the network, and the cache of the hub lacks files of {place}; {copy}"
    if isinstance(error, errors.GatedRepoError):
        return f"its owners ask for consent: accept their terms at {server}/{place}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{server} has no {place}, or does not show it; check the name, or run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError | errors.EntryNotFoundError):
        return f"{server} lacks a file or revision of {place}; check the name"
    if status:
        return f"{server} answers {status}; try again later"
    if type(error).__name__ in BROKEN or "Consistency check failed" in str(error):
        return f"the connection to {server} broke off; run the same command again to go on from there"
    if type(error).__module__.startswith(CLIENTS) or isinstance(error, ConnectionError | TimeoutError):
        return (
            f"no connection to {server} ({type(error).__name__}); connect to the network, copy the hub's cache from "
            "another machine, or give a local folder"
        )
    return " ".join(str(error).split())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
