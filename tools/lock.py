"""Write requirements.lock, environment.yml and sbom.json from the packages installed for one Python: see `make lock`.

sbom.json is a bill of materials in CycloneDX's format, which scanners of licenses and of known holes read.
"""

import argparse
import json
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

LICENSES = """
import json
from importlib.metadata import distributions
found = {one.metadata["Name"]: one.metadata for one in distributions()}
print(json.dumps({name: about["License-Expression"] or "; ".join(
    line.rpartition(" :: ")[2] for line in about.get_all("Classifier", []) if line.startswith("License :: "))
    for name, about in found.items()}))
"""


def freeze(python: str) -> list[str]:
    """The pins of the environment of `python`, without this package, CUDA's own wheels and local version labels."""
    command = [python, "-m", "pip", "freeze", "--exclude-editable", "--exclude", "robustclip"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    pins = [re.sub(r"\+[\w.]+$", "", line) for line in lines]
    return [pin for pin in pins if not re.match(r"nvidia-|cuda-|triton", pin)]


def canonical(name: str) -> str:
    """The name of a package as indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def materials(python: str, pins: list[str]) -> dict:
    """The bill of materials: each pinned package with its version and what it says of its license."""
    told = subprocess.run([python, "-c", LICENSES], check=True, capture_output=True, text=True).stdout
    licenses = {canonical(name): text for name, text in json.loads(told).items()}
    components = []
    for name, version in (pin.split("==") for pin in pins):
        text = licenses.get(canonical(name))
        component = {"type": "library", "name": name, "version": version,
                     "purl": f"pkg:pypi/{canonical(name)}@{version}"}  # fmt: skip
        components.append(component | ({"licenses": [{"license": {"name": text}}]} if text else {}))
    about = {"component": {"type": "application", "name": "robustclip"}}
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "metadata": about, "components": components}


def main() -> None:
    """Freeze, then write all files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", help="the interpreter whose packages are written down")
    python = parser.parse_args().python
    pins = freeze(python)
    (ROOT / "requirements.lock").write_text(LOCK.format(pins="\n".join(pins)))
    (ROOT / "environment.yml").write_text(ENVIRONMENT.format(pins="\n".join(f"      - {pin}" for pin in pins)))
    (ROOT / "sbom.json").write_text(json.dumps(materials(python, pins), indent=1) + "\n")
    print(f"{len(pins)} pins written")


if __name__ == "__main__":
    main()
