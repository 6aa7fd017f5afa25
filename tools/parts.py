"""The parts of the executed book, for what is made of each: tables as PDF, slides."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def arguments(about: str, folder: str) -> argparse.Namespace:
    """The executed book and the folder to write to, as the command line says."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executed", type=Path, default=ROOT / "_build" / "executed", help="the executed book")
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "html" / folder, help="where the files go")
    return parser.parse_args()


def parts_of(executed: Path) -> Iterator[tuple[str, str, list[Path]]]:
    """Title, name of the file and executed notebooks of each part of the table of contents."""
    for part in yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8"))["parts"]:
        notebooks = [(executed / page["file"]).with_suffix(".ipynb") for page in part["chapters"]]
        yield part["caption"], part["caption"].lower().replace(" ", "-"), list(filter(Path.exists, notebooks))
