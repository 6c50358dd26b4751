"""Many merges of the same models: sweeps of checkpoints against single merges, and sessions in memory.

    python -m bench.sweep --dir /dev/shm
    python -m bench.sweep --session

A sweep's outputs are compared with those of single merges, all of them. The floor reads the inputs once and
writes as much as sixteen outputs, but hashes nothing. One row per run goes to bench/results/sweep.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.checkpoint import family, on_memory, remove, run
from bench.machine import append_rows, describe
from bench.recipes import write_recipe

RESULTS = Path(__file__).parent / "results" / "sweep.csv"
LAMBDAS = tuple(round(0.1 * number, 1) for number in range(1, 17))
DENSITIES = tuple(round(0.05 * number, 2) for number in range(1, 17))
# Sixteen outputs each.
SWEEPS: Mapping[str, Mapping[str, Sequence[float]]] = {
    "16 lambdas": {"lambda": LAMBDAS},
    "4 densities x 4 lambdas": {"density": (0.1, 0.2, 0.4, 0.8), "lambda": (0.3, 0.5, 0.7, 1.0)},
    "16 densities": {"density": DENSITIES},
}
SINGLE, FLOOR = "single merge", "floor of 16 outputs"
SESSION_MERGES = 1000
SESSION_SHAPE, SESSION_EXPERTS = (1024, 1024), 8


@dataclass(frozen=True)
class Row:
    """One run. `outputs`: merges in it. `equal`: of them, how many have the bits of single merges; None: not
    compared.

    `early_rss_mb`: of a session, after ten merges; else 0.
    """

    what: str
    where: str
    params: int
    k: int
    run: int
    outputs: int
    equal: int | None
    seconds: float
    peak_rss_mb: float
    early_rss_mb: float = 0.0


def flags_of(values: Mapping[str, Sequence[float]]) -> list[str]:
    """The options of the command that sweeps these values."""
    return [part for name, some in values.items() for part in (f"--{name}", ",".join(map(str, some)))]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of weights, as the manifest has it; the merge has taken it from the file."""
    files = json.loads((folder / "merge.manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def count_equal(folder: Path, out: Path) -> int:
    """How many outputs in `folder` are what a single merge of their recipes makes, at `out`."""
    equal = 0
    for made in sorted(folder.iterdir()):
        run([sys.executable, "-m", "pymerge", "merge", made / "mergekit_config.yml", out, "--quiet"])
        equal += digests(out) == digests(made)
        remove(out)
    return equal


def sweeps(folder: Path, given: argparse.Namespace) -> list[Row]:
    """Single merges and every sweep, taking turns."""
    models, params = family(given.family or folder / "family", int(given.params), given.experts)
    recipe = write_recipe(folder / "recipe.yml", "ties", models, 0.2)
    out, where = folder / "out", "memory" if on_memory(folder) else "disk"
    command = [sys.executable, "-m", "pymerge"]
    written = sum(path.stat().st_size for path in models[0].glob("*.safetensors"))
    rows = []
    for number in range(given.runs):
        merged = run([*command, "merge", recipe, out, "--quiet"])
        remove(out)
        rows.append(
            Row(SINGLE, where, params, given.experts, number, 1, None, merged.seconds, merged.peak_rss_mb)
        )
        floor = run([sys.executable, "-m", "bench.floor", out, *models, "--write", str(16 * written)])
        remove(out)
        rows.append(
            Row(FLOOR, where, params, given.experts, number, 16, None, floor.seconds, floor.peak_rss_mb)
        )
        for what, values in SWEEPS.items():
            swept = run([*command, "sweep", recipe, out, "--quiet", *flags_of(values)])
            outputs = len(list(out.iterdir()))
            equal = count_equal(out, folder / "alone") if number == 0 else None
            remove(out)
            rows.append(
                Row(
                    what,
                    where,
                    params,
                    given.experts,
                    number,
                    outputs,
                    equal,
                    swept.seconds,
                    swept.peak_rss_mb,
                )
            )
    return rows


def session() -> None:
    """A thousand merges in this process, with ever other settings; prints JSON."""
    import resource
    import time

    import torch

    from pymerge import Session

    draw = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(SESSION_SHAPE, generator=draw)).bfloat16()
    experts = [
        (base.float() + 5e-4 * torch.randn(SESSION_SHAPE, generator=draw)).bfloat16()
        for _ in range(SESSION_EXPERTS)
    ]
    merging, out = Session(base, experts), torch.empty_like(base)
    early = 0
    began = time.perf_counter()
    for number in range(SESSION_MERGES):
        merging.merge(out=out, density=DENSITIES[number % 16], lambda_=LAMBDAS[number // 16 % 16])
        if number == 9:
            early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = time.perf_counter() - began
    late = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "early": early / 1024, "late": late / 1024}))


def session_rows(runs: int) -> list[Row]:
    """The same, each run in a process of its own."""
    rows = []
    for number in range(runs):
        said = run([sys.executable, "-c", "from bench.sweep import session; session()"]).said
        params = SESSION_SHAPE[0] * SESSION_SHAPE[1]
        rows.append(
            Row(
                "session",
                "tensors",
                params,
                SESSION_EXPERTS,
                number,
                SESSION_MERGES,
                None,
                said["seconds"],
                said["late"],
                said["early"],
            )
        )
    return rows


def save(rows: Sequence[Row]) -> None:
    """Appends rows to the CSV."""
    rounded = [
        {name: round(v, 4) if isinstance(v, float) else v for name, v in vars(row).items()} for row in rows
    ]
    append_rows(RESULTS, rounded, describe())


def table(rows: Sequence[Row]) -> str:
    """Medians; single merges come first."""
    lines = [f"{'':26}{'outputs':>8}{'equal':>7}{'seconds':>9}{'of a single one':>17}{'peak MB':>9}"]
    single = [row.seconds for row in rows if row.what == SINGLE]
    for what in dict.fromkeys(row.what for row in rows):
        found = [row for row in rows if row.what == what]
        seconds = median(row.seconds for row in found)
        of_single = f"{seconds / median(single):.2f}" if single and found[0].where != "tensors" else ""
        equal = next((str(row.equal) for row in found if row.equal is not None), "")
        peak = max(row.peak_rss_mb for row in found)
        lines.append(f"{what:26}{found[0].outputs:>8}{equal:>7}{seconds:>9.2f}{of_single:>17}{peak:>9.0f}")
        if found[0].early_rss_mb:
            early = max(row.early_rss_mb for row in found)
            lines.append(f"  {found[0].outputs / seconds:.0f} merges/s; {early:.0f} MB after ten merges")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Many merges of the same models.")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where the family is made")
    parser.add_argument("--family", type=Path, help="a family that bench.family made; else one is made")
    parser.add_argument("--params", type=float, default=156e6, help="parameters of one model, at least")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--session", action="store_true", help="only sessions in memory")
    given = parser.parse_args()
    rows: list[Row] = []
    if not given.session:
        with tempfile.TemporaryDirectory(prefix="pymerge-bench-", dir=given.dir) as folder:
            rows += sweeps(Path(folder), given)
    rows += session_rows(given.runs)
    save(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
