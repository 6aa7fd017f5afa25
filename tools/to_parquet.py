"""Turn the papers' data sets, as their authors publish them, into the parquet folders that robustclip reads.

    python tools/to_parquet.py --list                                     what there is, and where it comes from
    python tools/to_parquet.py cifar10 dtd --from DOWNLOADS --to DATA     convert what lies unpacked in DOWNLOADS
    python tools/to_parquet.py cifar10 --from DOWNLOADS --to DATA --download     fetch and unpack it first
    python tools/to_parquet.py cifar10 --from DOWNLOADS --to PHOTOS --photo      small copies, for scale photo

Afterwards: ROBUSTCLIP_DATA=DATA robustclip run --scale paper --role cifar10. Each role becomes a folder with
test.parquet and classes.json, and train.parquet where the set has a training split. A file is there when it is
complete; run the same command again after an interruption, and it goes on where it stopped.

Keep the folders of the scales paper and photo apart: whole sets are read as the papers read them, at any scale.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

import official
from official import DATASETS
from robustclip import hub
from robustclip.checks import check_choice, check_folder
from robustclip.data.loaders import fit, shuffled
from robustclip.data.roles import SPLITS, role
from robustclip.files import TEMPORARY, file_digest, write_whole
from robustclip.progress import progress

ROWS = 500  # of a row group
SCHEME = "https"  # the only one that is fetched from, or redirected to
BLOCK = 1 << 20


# --- parquet ----------------------------------------------------------------------------------------------------------


def convert(
    name: str, downloads: Path, target: Path, splits: Sequence[str] | None = None, photo: bool = False
) -> dict[str, int]:
    """Write the splits of a role's data set below `target`; returns how many images each has.

    With `photo`, as the photographs that play the role: pictures made small, half to train on where a set has no part
    for it, and no mark of the papers' own set.
    """
    entry = role(name).photo
    if photo and not entry.get("original"):
        raise ValueError(f"no part of the papers' set plays {name} at scale photo; the data cards say what does")
    known = [split for split in reversed(SPLITS) if split in DATASETS[name]]  # the small ones first
    if photo:
        known = ["test", *["train"] * ("held_back" in entry)]
    for split in splits or ():
        check_choice(f"split of {name}", split, known)
    folder, counts = check_folder(target / folder_name(name, photo)), {}
    halved = "train" in known and "train" not in DATASETS[name]
    for split in splits or known:
        path, expected = folder / f"{split}.parquet", None if halved else DATASETS[name][split].get("count")
        if path.exists():
            counts[split] = _counted(parquet.read_metadata(path).num_rows, expected, path)
            continue
        table = _half(name, downloads, split) if halved else official.read(name, downloads, split)
        counts[split] = _counted(len(table), expected, downloads / DATASETS[name]["folder"])
        if table.captions is None:
            _write_names(folder / "classes.json", table.names)
        _write(path, name, table, 2 * entry["pixels"] if photo else None)
    return counts


def folder_name(name: str, photo: bool) -> str:
    """The folder that holds a role's set: called like it, or like the photographs that play it."""
    return role(name).photo["data"] if photo else name


def _half(name: str, downloads: Path, split: str) -> official.Table:
    """Half of a set without a training part, by lot."""
    whole = official.read(name, downloads, "test")
    _counted(len(whole), DATASETS[name]["test"].get("count"), downloads / DATASETS[name]["folder"])
    rows = shuffled(f"half of {name}", len(whole))[split == "train" :: 2]
    return replace(whole, labels=whole.labels[rows], fetch=lambda some: whole.fetch(rows[some]))


def _counted(found: int, expected: int | None, place: Path) -> int:
    """Refuse a part that passes for the whole."""
    if expected not in (None, found):
        raise ValueError(f"{place} has {found} images of {expected}; delete it, then fetch and unpack it again")
    return found


def _write_names(path: Path, names: Sequence[str]) -> None:
    """Class names; all splits must agree on them."""
    text = json.dumps(names, indent=1, ensure_ascii=False)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} lists other classes than this split has; delete the folder and convert it again")
    write_whole(path, text)


def _write(path: Path, name: str, table: official.Table, side: int | None) -> None:
    """Write a split in random order, so that its first rows are a fair sample; the file appears when it is complete.

    With a `side`, larger pictures become squares of so many pixels, and nothing marks the set as the papers' own.
    """
    kind = ("label", pa.int64()) if table.captions is None else ("captions", pa.list_(pa.string()))
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema, digest = pa.schema([("image", image), kind]), hashlib.sha256()
    order, temporary = shuffled(name, len(table)), path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with parquet.ParquetWriter(temporary, schema, compression="none", write_page_checksum=True) as writer:
            starts = range(0, len(order), ROWS)
            for start in progress(starts, f"{name} {path.stem}", len(starts), f"{ROWS} images"):
                rows = order[start : start + ROWS]
                images = [small(one, side) if side else one for one in _encoded(table, rows)]
                for one in images:
                    digest.update(hashlib.sha256(one["bytes"]).digest())
                values = table.labels[rows] if table.captions is None else [table.captions[row] for row in rows]
                writer.write_table(pa.table([pa.array(images, image), pa.array(values, kind[1])], schema))
            made = {"data": role(name).paper["data"], "sha256": digest.hexdigest()}
            writer.add_key_value_metadata({} if side else {"robustclip": json.dumps(made)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _encoded(table: official.Table, rows: np.ndarray) -> Iterator[dict]:
    """Files and bytes as they are, pixels as PNG, which loses nothing."""
    for row, raw in zip(rows, table.fetch(rows), strict=True):
        place = str(row)
        if isinstance(raw, Path):
            place, raw = raw.name, raw.read_bytes()
        if isinstance(raw, np.ndarray):
            Image.fromarray(raw).save(buffer := io.BytesIO(), "PNG")
            raw = buffer.getvalue()
        yield {"bytes": raw, "path": place}


def small(image: dict, side: int) -> dict:
    """A picture whose short side is longer than `side` as a square JPEG of that side; any other as it is."""
    with Image.open(io.BytesIO(image["bytes"])) as picture:
        if min(picture.size) <= side:
            return image
        square = fit(picture.convert("RGB"), side, side)
    square.save(buffer := io.BytesIO(), "JPEG", quality=90)
    return image | {"bytes": buffer.getvalue()}


# --- downloads --------------------------------------------------------------------------------------------------------


def download(name: str, downloads: Path) -> None:
    """Fetch and unpack a role's data set, or say who hands it out."""
    source = DATASETS[name]
    if "site" in source:
        place = downloads / source["folder"]
        raise ValueError(f"{name} is not fetched by this tool; get it from {source['site']} and put it into {place}")
    check_folder(downloads, 2 * role(name).paper["bytes"] / 1e6)  # what is fetched, and what it holds
    if "hub" in source:
        files = [source[split]["files"] for split in SPLITS if split in source]
        hub.fetch_dataset(source["hub"], source["revision"], files, downloads / source["folder"])
    else:
        paths = [fetch(archive, downloads) for archive in source["archives"]]
        unpack(paths, downloads / source.get("into", ""), source.get("inner"))


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follow redirections only to where we would have gone ourselves."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """As in the base class, https only."""
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_scheme(url: str) -> None:
    if urlsplit(url).scheme != SCHEME:
        raise ValueError(f"{url} is not {SCHEME}; this tool does not fetch from it")


def fetch(archive: dict, folder: Path) -> Path:
    """Download one archive, going on where an earlier try stopped; it appears under its name once it is verified."""
    url, expected = archive["url"], archive.get("bytes")
    _check_scheme(url)
    path = folder / Path(unquote(urlsplit(url).path)).name
    part = path.with_name(f"{path.name}.part")
    if path.exists() and _digest(path, archive) == _known(archive):
        return path
    done = part.stat().st_size if part.exists() and expected else 0
    if not expected or done < expected:
        try:
            _receive(url, part, done, expected)
        except (OSError, HTTPException) as error:
            raise OSError(_why(error, url, part)) from error
    size = part.stat().st_size
    if expected and size < expected:
        raise OSError(f"{url} broke off after {size} of {expected} bytes; run the same command again to go on")
    if (found := _digest(part, archive)) != _known(archive):
        part.unlink()
        raise OSError(f"{url} has checksum {found}, not {_known(archive)}; it was deleted, for it is another file")
    return part.replace(path)


def _why(error: Exception, url: str, part: Path) -> str:
    """Reason and remedy of a download that failed, in one line."""
    if getattr(error, "errno", None) in hub.FULL:
        return f"cannot write {part} ({error.strerror}); make some room, then run the same command again to go on"
    if isinstance(error, urllib.error.HTTPError):
        return f"{url} answers {error.code} ({error.reason}); try again later, or get it by hand"
    if isinstance(error, urllib.error.URLError | TimeoutError | ConnectionError | HTTPException):
        return f"no connection to {url} ({getattr(error, 'reason', error)}); run the same command again to go on"
    return str(error)


def _known(archive: dict) -> str:
    return archive.get("sha256") or archive["md5"]


def _digest(path: Path, archive: dict) -> str:
    if "sha256" in archive:
        return file_digest(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _receive(url: str, part: Path, done: int, expected: int | None) -> None:
    """Append what is missing to a part; a server that cannot go on in the middle sends all of it again."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.build_opener(_SameScheme).open(request, timeout=60) as answer:
        mode = "ab" if answer.status == 206 else "wb"
        blocks, total = iter(lambda: answer.read(BLOCK), b""), expected and -(-expected // BLOCK)
        with part.open(mode) as file:
            for block in progress(blocks, part.stem, total, "MB"):
                file.write(block)
                if expected and file.tell() > expected:
                    file.truncate(0)
                    raise OSError(f"{url} is longer than {expected} bytes; it is another file")


def unpack(archives: Sequence[Path], into: Path, inner: str | None = None) -> None:
    """Unpack next to the final place and move there when all is whole; nothing lands outside of `into`."""
    check_folder(into)
    with tempfile.TemporaryDirectory(dir=into, prefix=".unpacking-") as temporary:
        place = Path(temporary)
        for archive in (*archives, *([place / inner] if inner else [])):
            try:
                _extract(archive, place)
            except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
                raise OSError(f"cannot unpack {archive} ({type(error).__name__}: {error}); fetch it again") from error
        if taken := [into / path.name for path in place.iterdir() if (into / path.name).exists()]:
            raise OSError(f"{taken[0]} is there already, but not complete; delete it to have it unpacked again")
        for path in list(place.iterdir()):
            path.rename(into / path.name)


def _extract(archive: Path, into: Path) -> None:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            file.extractall(into)  # which drops "..", leading slashes and links by itself
    elif archive.suffix in (".tar", ".tgz") or archive.name.endswith(".tar.gz"):
        with tarfile.open(archive) as file:
            _extract_files(file, into.resolve())
    elif archive.suffix == ".gz":
        with gzip.open(archive) as packed, (into / archive.stem).open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    else:
        shutil.copy(archive, into)


def _extract_files(archive: tarfile.TarFile, into: Path) -> None:
    """Files alone: no links, no devices, nothing that would land outside of `into`."""
    for member in archive:
        place = (into / member.name).resolve()
        if not place.is_relative_to(into):
            raise tarfile.TarError(f"{member.name!r} would land outside of its folder")
        if member.isfile():
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.extractfile(member) as packed, place.open("wb") as plain:
                shutil.copyfileobj(packed, plain)


# --- the command ------------------------------------------------------------------------------------------------------


def listing(target: Path | None) -> Iterator[str]:
    """One line per role: how large, whose, from where, and what of it is converted."""
    yield f"{'role':16} {'data set':20} {'GB':>6}  {'splits':22} from"
    for name, source in DATASETS.items():
        paper, known = role(name).paper, [split for split in SPLITS if split in source]
        here = [split for split in known if target and (target / name / f"{split}.parquet").exists()]
        splits = " ".join(f"{split}*" if split in here else split for split in known)
        size = f"{paper['bytes'] / 1e9:.2f}" if "bytes" in paper else "?"
        origin = source.get("site") or source.get("hub") or source["archives"][0]["url"]
        yield f"{name:16} {paper['data']:20} {size:>6}  {splits:22} {'by hand: ' * ('site' in source)}{origin}"
    yield "* converted already"


def make(name: str, downloads: Path, *how: Any, may_download: bool) -> dict[str, int]:
    """`convert` a role's set, fetched first where that is allowed and it is not there."""
    try:
        return convert(name, downloads, *how)
    except FileNotFoundError as missing:
        if not may_download:
            remedy = "unpack it there, choose a --split, or let --download fetch it"
            raise FileNotFoundError(f"{name} is not in {downloads}: {missing}; {remedy}") from missing
    download(name, downloads)
    return convert(name, downloads, *how)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert each role that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = os.environ.get("ROBUSTCLIP_DATA")
    parser.add_argument("roles", nargs="*", metavar="ROLE", help="role of the papers, such as cifar10; see --list")
    parser.add_argument("--from", dest="downloads", type=Path, help="folder of what was downloaded and unpacked")
    parser.add_argument("--to", type=Path, default=home and Path(home), help="folder for the result ($ROBUSTCLIP_DATA)")
    parser.add_argument("--split", action="append", choices=SPLITS, help="only this one (repeat it for more)")
    parser.add_argument("--photo", action="store_true", help="small copies that play the roles at scale photo")
    parser.add_argument("--download", action="store_true", help="fetch over https what is missing in --from")
    parser.add_argument("--list", action="store_true", help="show all roles and stop")
    chosen = parser.parse_args(arguments)
    if chosen.list:
        print("\n".join(listing(chosen.to)))
        return 0
    if not (chosen.roles and chosen.downloads and chosen.to):
        parser.error("name at least one role, --from a folder, and --to another one (or ROBUSTCLIP_DATA)")
    for name in chosen.roles:
        try:
            check_choice("role", name, DATASETS)
            how = chosen.downloads.expanduser(), chosen.to.expanduser(), chosen.split, chosen.photo
            counts = make(name, *how, may_download=chosen.download)
        except (OSError, ValueError, ImportError, HTTPException) as error:
            room = "; make some room" if getattr(error, "errno", None) in hub.FULL else ""
            print(f"{name}: {error}{room}", file=sys.stderr)
            return 1
        print(f"{chosen.to / folder_name(name, chosen.photo)}: ", end="")
        print(", ".join(f"{count:,} {split}" for split, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
