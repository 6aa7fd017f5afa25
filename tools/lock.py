"""Write requirements.lock and environment.yml from the packages installed for one Python: see `make lock`."""

import argparse
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LOCK = """\
# Exact versions of everything the book and its tests need. Made by `make lock` from the ranges in pyproject.toml.
# torch is pinned without a local label: pip takes the CPU build where it finds one, else the CUDA build, whose own
# requirements pin the CUDA libraries.
{pins}
"""

ENVIRONMENT = """\
# The pins of requirements.lock for conda: `conda env create -f environment.yml`. Made by `make lock`.
name: robustclip
channels: [conda-forge]
dependencies:
  - python=3.11
  - make
  - pip
  - pip:
{pins}
      - --editable .
"""


def freeze(python: str) -> list[str]:
    """The pins of the environment of `python`, without this package, CUDA's own wheels and local version labels."""
    command = [python, "-m", "pip", "freeze", "--exclude-editable", "--exclude", "robustclip"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    pins = [re.sub(r"\+[\w.]+$", "", line) for line in lines]
    return [pin for pin in pins if not re.match(r"nvidia-|cuda-|triton", pin)]


def main() -> None:
    """Freeze, then write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", help="the interpreter whose packages are written down")
    pins = freeze(parser.parse_args().python)
    (ROOT / "requirements.lock").write_text(LOCK.format(pins="\n".join(pins)))
    (ROOT / "environment.yml").write_text(ENVIRONMENT.format(pins="\n".join(f"      - {pin}" for pin in pins)))
    print(f"{len(pins)} pins written")


if __name__ == "__main__":
    main()
