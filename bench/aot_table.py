"""What both tables of compiled kernels have in common: their rows, how they are printed, and the CSV."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Code:
    """One kernel compiled for one target. `stack`: bytes of a thread that do not fit in its registers.

    `wide_loads` of `loads` read 16 bytes. `instructions`: of the main loop, for each element and expert, rare
    branches included.
    """

    kernel: str
    type: str
    experts: int
    target: str
    registers: int
    stack: int
    wide_loads: int
    loads: int
    wide_stores: int
    instructions: float


HEADING = "kernel      type   K  target  registers  stack  16-byte loads  stores  instructions"


def line_of(code: Code) -> str:
    """A row under HEADING."""
    return (
        f"{code.kernel:<11} {code.type:<4} {code.experts:>3}  {code.target:<6}  {code.registers:>9}"
        f"  {code.stack:>5}  {code.wide_loads:>7} of {code.loads:<3}  {code.wide_stores:>6}"
        f"  {code.instructions:>12}"
    )


def shown(codes: Iterable[Code]) -> Iterator[Code]:
    """The same rows, printed as they come."""
    print(HEADING)
    for code in codes:
        print(line_of(code), flush=True)
        yield code


def write_csv(path: Path, codes: Iterable[Code], tools: Mapping[str, str]) -> None:
    """One row for each kernel and target; `tools`: names and versions of what compiled them."""
    about = {**tools, "date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}
    rows = [asdict(code) | about for code in codes]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def version_line(*command: str) -> str:
    """The release that one of the CUDA compilers says it is."""
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return next(line.split("release ")[-1] for line in reversed(said) if "release" in line)
