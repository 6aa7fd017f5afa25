"""Shared by all tests."""

import os
from pathlib import Path

import pytest
import torch

# Two test processes share the machine (`make test`); more threads would only get in each other's way.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ROBUSTCLIP_PROGRESS"] = "0"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return Path(__file__).resolve().parent.parent
