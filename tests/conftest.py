"""Shared by all tests."""

import os
from pathlib import Path

import pytest
import torch

# Two test processes share the machine (`make test`); more threads would only get in each other's way.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ROBUSTCLIP_PROGRESS"] = "0"


LARGE, EACH = 24, 3  # of tables with more cases than that, `make test` runs each third; `make test ALL=1` all of them


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The book's tests come first: other tests run beside its notebooks, and no process is left alone with them."""
    items.sort(key=lambda item: item.path.name != "test_book.py")
    if os.environ.get("ROBUSTCLIP_TESTS") != "few":
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left = {item for own in cases.values() if len(own) > LARGE and own[0].path.name != "test_book.py"
            for place, item in enumerate(own) if place % EACH}  # fmt: skip
    left |= {item for item in items if item.get_closest_marker("slow")}
    config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = [item for item in items if item not in left]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def clip():
    """The embedded CLIP of Tinyworld."""
    from robustclip import models

    return models.load(device="cpu")


@pytest.fixture(scope="module")
def classifier(clip):
    """Its zero-shot classifier of role `cifar10`."""
    from robustclip import models
    from robustclip.data.roles import role

    return models.zero_shot(clip, role("cifar10"))


@pytest.fixture(scope="module")
def exact():
    """The same in float64, where no sign of a gradient hangs on rounding."""
    from robustclip import models
    from robustclip.data.roles import role

    clip = models.load(device="cpu").double()
    clip.raw_images = lambda images: clip.network.encode_image(clip.preprocess(images))
    return models.zero_shot(clip, role("cifar10")).double()


@pytest.fixture(scope="module")
def images():
    """Four pictures of that role."""
    from robustclip.data.roles import tinyworld_samples

    return tinyworld_samples("cifar10", "test", 4)[0].float() / 255
