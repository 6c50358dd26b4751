"""The machine and the versions that a measurement belongs to: columns shared by all benchmarks."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = {"pymerge": "pymerge-kernels", "numpy": "numpy", "torch": "torch"}


def describe() -> dict[str, str]:
    """Processor, cores this process may use, memory (GB), system, date and versions; "" what is not there."""
    return {
        "cpu": cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory_gb": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f}",
        "system": f"{platform.system()} {platform.release()}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **{name: version_of(package) for name, package in PACKAGES.items()},
    }


def cpu_model() -> str:
    """The processor's name as the kernel tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def version_of(package: str) -> str:
    """The installed version of a package, "" if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def append_rows(path: Path, rows: Sequence[Mapping[str, object]], machine: Mapping[str, object]) -> None:
    """Appends rows of the same columns to a CSV, each with the description of the machine."""
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine])
        if new:
            writer.writeheader()
        writer.writerows([{**row, **machine} for row in rows])
