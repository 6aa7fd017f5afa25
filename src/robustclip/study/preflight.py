"""What a run needs is looked for before the first byte of a model is fetched; all that is missing is told at once."""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from robustclip import hub
from robustclip.attacks.language import BERT
from robustclip.checks import check_folder
from robustclip.data.roles import role
from robustclip.data.sources import facts
from robustclip.models import EMBEDDED
from robustclip.study.cells import Cell
from robustclip.study.scales import Scale
from robustclip.study.shipped import known
from robustclip.study.store import Store, Where

TOOL = "python tools/to_parquet.py"


def prepare(cells: Iterable[Cell], store: Where = None, shipped: bool = True) -> None:
    """See that data, language model and room for results of the cells are there, then fetch their models.

    One OSError lists everything that is missing, with the command that gets it. What shipped results tell of data and
    models will do, unless cells are to be measured in any case (`shipped=False`).
    """
    cells = list(cells)
    for scale in dict.fromkeys(cell.scale for cell in cells):
        own = [cell for cell in cells if cell.scale == scale]
        wanted = [(cell.role, "test") for cell in own]
        wanted += [(cell.spec.role, "train") for cell in own if hasattr(cell.spec, "recipe")]
        _check(scale, wanted, [cell.attack for cell in own if _is_remote(cell.spec)], shipped)
        check_folder(Store(store).root)
        for name in dict.fromkeys(_base(cell.spec) for cell in own if _is_remote(cell.spec)):
            _fetch(scale, name, shipped)


def prepare_training(scale: Scale, name: str, store: Where = None) -> None:
    """As `prepare`, for fine-tuning the scale's CLIP on a role."""
    _check(scale, [(name, "train")], [], shipped=False)
    check_folder(Store(store).root)
    if _is_remote(base := scale.model("clip")):
        _fetch(scale, base, shipped=False)


def _base(spec: Any) -> Any:
    """What is loaded: of a model yet to be trained, the one it starts from."""
    return getattr(spec, "base", spec)


def _is_remote(spec: Any) -> bool:
    base = _base(spec)
    return isinstance(base, str) and base not in EMBEDDED and not Path(base).expanduser().exists()


def _fetch(scale: Scale, name: str, shipped: bool) -> None:
    try:
        hub.fetch(name)
    except OSError:
        if not (shipped and name in known(scale.name)["models"]):
            raise


def _check(scale: Scale, wanted: Iterable[tuple[str, str]], attacks: Sequence[Any], shipped: bool) -> None:
    """Raise one error with all that is missing of the splits of roles, and of what attacks on prompts speak."""
    absent: dict[str, OSError] = {}
    for name, split in dict.fromkeys(wanted):
        try:
            facts(name, scale.source, split)
        except OSError as error:
            told = shipped and split == "test" and f"{name}/{scale.source}" in known(scale.name)["data"]
            if not (told and isinstance(error, FileNotFoundError)):
                absent.setdefault(name, error)
    lines = list(_lines(scale, absent)) if absent else []
    names = [BERT, f"google-bert/{BERT}"]
    if scale.world == "paper" and any(map(_speaks, attacks)) and not any(
        hub.cached(name, ["model.safetensors"]) for name in names
    ):  # fmt: skip
        files = "config.json model.safetensors tokenizer.json tokenizer_config.json vocab.txt"
        lines.append(f"the language model of attacks on prompts: hf download {BERT} {files} (0.4 GB)")
    if lines:
        raise FileNotFoundError("\n  ".join(["nothing was fetched, because this is missing:", *lines]))


def _speaks(part: Any) -> bool:
    """Whether an attack, or a part of it, takes BERT where that is on disk."""
    if not is_dataclass(part):
        return False
    own = [getattr(part, entry.name) for entry in fields(part)]
    return getattr(part, "language_model", None) in ("auto", BERT) or any(map(_speaks, own))


def _lines(scale: Scale, absent: dict[str, OSError]) -> Iterator[str]:
    """How to get data sets: those of the papers by the tool, damaged and all others as their own error says."""
    place, theirs = os.environ.get("ROBUSTCLIP_DATA", ""), scale.world == "paper" and scale.source == "parquet"
    for name, error in list(absent.items()):
        if not (theirs and isinstance(error, FileNotFoundError)):
            yield str(absent.pop(name))
    target = "" if place else " --to DATA"
    by_hand = [name for name in absent if role(name).paper["source"] == "manual"]
    ours = [name for name in absent if name not in by_hand]
    if absent:
        there = f"ROBUSTCLIP_DATA={place}" if place else "a folder DATA; set ROBUSTCLIP_DATA=DATA"
        yield f"{len(absent)} data sets, which a tool of the repository makes, into {there}:"
    if ours:
        size = sum(role(name).paper["bytes"] for name in ours) / 1e9
        yield f"{TOOL} {' '.join(ours)} --from DOWNLOADS{target} --download   ({size:.2f} GB)"
        if place and (free := _free(Path(place).expanduser())) < 2 * size:
            yield f"room: {free:.1f} GB are free for {place}, about {2 * size:.1f} GB are needed"
    if by_hand:
        yield (
            f"{TOOL} {' '.join(by_hand)} --from DOWNLOADS{target}   (handed out by their owners only; put them there "
            f"first, `{TOOL} --list` says what)"
        )


def _free(folder: Path) -> float:
    """Gigabytes that are free where a folder is, or would be."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free / 1e9
