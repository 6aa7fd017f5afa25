"""Run the benchmarks and write them to benchmarks/results: `make bench`, or `python benchmarks/run.py --only text`.

Every file `bench_NAME.py` here has a function `measure(rounds)` that returns rows of duels, and may have a function
`scaling()` that returns rows of cost against size. Parts that are not run keep their rows of an earlier run on the
same device.
"""

import argparse
import importlib
import json
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
NAMES = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def about() -> dict:
    """The machine and the versions that the numbers belong to."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    packages = {name: version(name) for name in ("torch", "torchattacks", "textattack", "open_clip_torch")}
    date = datetime.now(UTC).date().isoformat()
    return {"device": device, "threads": torch.get_num_threads(), "python": platform.python_version(), **packages,
            "date": date}  # fmt: skip


def main() -> None:
    """Measure, print, and write after every part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=NAMES, help="one part instead of all")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each duel")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower() if cuda else "cpu"
    target = HERE / "results" / f"{name}.json"
    parts = json.loads(target.read_text())["parts"] if target.exists() else {}
    for part in [options.only] if options.only else NAMES:
        bench = importlib.import_module(f"bench_{part}")
        found = {"duels": bench.measure(options.rounds)}
        if hasattr(bench, "scaling"):
            found["scaling"] = bench.scaling()
        for row in found["duels"]:
            print(f"{row['ratio']:6.1f} [{row['ratio_low']:.1f}, {row['ratio_high']:.1f}]  {row['name']}", flush=True)
        parts[part] = {"about": about(), **found}
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps({"parts": parts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
