"""Shared by all tests."""

import os
from pathlib import Path

import pytest
import torch

# Two test processes share the machine (`make test`); more threads would only get in each other's way.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ROBUSTCLIP_PROGRESS"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The book's tests come first: other tests run beside its notebooks, and no process is left alone with them."""
    items.sort(key=lambda item: item.path.name != "test_book.py")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return Path(__file__).resolve().parent.parent
