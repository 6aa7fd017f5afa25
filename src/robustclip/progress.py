"""The one progress helper: a bar on a terminal or in a notebook, silence where output goes to a file."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, total: int | None = None, unit: str = "it") -> Iterator[Item]:
    """Iterate over `items` with a progress bar labelled `what`.

    Shown when standard error is a terminal, or always with ROBUSTCLIP_PROGRESS=1; never with ROBUSTCLIP_PROGRESS=0.
    """
    wish = os.environ.get("ROBUSTCLIP_PROGRESS")
    hidden = wish == "0" if wish else not sys.stderr.isatty()
    return iter(tqdm(items, desc=what, total=total, unit=unit, disable=hidden, leave=False, mininterval=0.5))
