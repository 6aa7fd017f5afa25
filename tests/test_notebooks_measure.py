"""A page measures what is not shipped: one does, at a scale of which nothing is shipped, in an empty store."""

from pathlib import Path

import pytest

from test_book import SHIPPED, TINY, tool

PAGES = {"book/foundations/zero-shot-clip.ipynb"}


@pytest.mark.slow
@pytest.mark.skipif(not SHIPPED, reason="nothing is shipped for the scale quick, so that all pages measure")
@pytest.mark.filterwarnings("default")
def test_pages_measure_what_is_not_shipped(tmp_path: Path, monkeypatch):
    execute, store = tool("execute"), tmp_path / "runs"
    monkeypatch.setenv("ROBUSTCLIP_RUNS", str(store))
    jobs = [job for job in execute.plan(tmp_path, TINY) if job.name in PAGES]
    assert len(jobs) == len(PAGES)
    assert execute.run_all(jobs) == []
    assert len(list(store.rglob("*.json"))) > 10
