"""Let CPU builds of torch import a CUDA build of torchvision.

torchvision registers fake kernels for two of its compiled operators at import time. When its binary does not match
the installed torch, the operators do not exist and the import fails, although nothing in this project calls them.
Declaring their schemas first is enough. Where the real operators load, this module does nothing.
"""

import importlib.machinery
import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library object un-registers its schemas when it is collected


def _binary_loads() -> bool:
    """Whether torchvision's compiled operators can be loaded into this torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    binaries = [path for path in Path(spec.origin).parent.glob("_C*") if path.name.endswith(suffixes)]
    try:
        for binary in binaries:
            torch.ops.load_library(str(binary))
    except OSError:
        return False
    return bool(binaries)


def prepare() -> None:
    """Declare the operators torchvision expects when its binary cannot provide them; safe to call twice."""
    if _declared or hasattr(torch.ops.torchvision, "nms") or _binary_loads():
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
