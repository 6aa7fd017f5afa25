"""Measure our speed against the rivals' and write it down: `python benchmarks/run.py [--only image] [--rounds 3]`.

Every `bench_NAME.py` beside this file has a function `measure(rounds)` that returns rows of ours against a rival, and
may have a function `scaling()` that returns rows of cost against size. They go to `results/cpu.json`, or to a file
named after the GPU, each with the machine that measured it; benchmarks that did not run now keep their older rows.
"""

import argparse
import importlib
import json
import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
LOAD = 0.5  # per core: above it others decide what is measured
PACKAGES = ("robustclip", "torch", "open_clip_torch", "torchattacks", "textattack", "transformers", "numpy")


def names() -> list[str]:
    """All benchmarks there are."""
    return sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))


def processor() -> str:
    """What the processor calls itself, and what matters most about it here."""
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8") if information.exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    features = [name for name in ("avx512_bf16", "amx_bf16") if re.search(rf"\b{name}\b", text)]
    return " ".join([found.group(1) if found else platform.processor() or platform.machine(), *features])


def busy() -> float:
    """How much of each core others used in the last minute."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0


def circumstances(threads: int) -> dict:
    """Where and with what the numbers were measured."""
    return {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
        "threads": threads,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def target() -> Path:
    """The file of this kind of machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return FOLDER / "results" / f"{re.sub('[^a-z0-9]+', '-', gpu.lower())}.json"


def record(path: Path, name: str, entry: dict) -> None:
    """Replace one benchmark's entry in the file, at once or not at all."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    text = json.dumps(dict(sorted((entries | {name: entry}).items())), indent=1)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def table(rows: list[dict]) -> str:
    """The rows in columns: seconds, ratio with its range, ratio of processor seconds, accuracies in percent."""
    lines = [f"{'':58}{'ours s':>9}{'rival s':>9}{'ratio':>8}{'range':>14}{'cpu':>7}{'ours %':>8}{'rival %':>8}"]
    for row in rows:
        spread = f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}"
        scores = "".join(f"{_score(row.get(key)):>8}" for key in ("accuracy_ours", "accuracy_rival"))
        figures = f"{row['ours_seconds']:9.3f}{row['rival_seconds']:9.3f}{row['ratio']:8.2f}{spread:>14}"
        lines += [
            f"{row['name'][:57]:58}{figures}{row['ratio_processor']:7.2f}{scores}",
            *([f"    {row['note']}"] if row.get("note") else []),
        ]
    return "\n".join(lines)


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def main() -> None:
    """Run the chosen benchmarks one after the other; each is written as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=names(), action="append", help="one benchmark; may be given again")
    parser.add_argument("--rounds", type=int, default=3, help="turns of ours and the rival's (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="processor cores to use (default: 2)")
    parser.add_argument("--out", type=Path, help="file to write (default: results/cpu.json or the GPU's name)")
    options = parser.parse_args()
    if (load := busy()) > LOAD:
        parser.error(
            f"the machine is busy (load {load:.2f} per core, at most {LOAD} is recorded); wait until it is idle"
        )
    torch.set_num_threads(options.threads)
    for name in options.only or names():
        print(f"{name}: {options.rounds} rounds on {options.threads} threads ...", flush=True)
        entry = circumstances(options.threads)
        bench = importlib.import_module(f"bench_{name}")
        entry["rows"] = bench.measure(options.rounds)
        if hasattr(bench, "scaling"):
            entry["scaling"] = bench.scaling()
        record(options.out or target(), name, entry)
        print(table(entry["rows"]), flush=True)


if __name__ == "__main__":
    main()
