"""What a merge leaves beside the weights: the summary, the manifest, the side files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint.sidefiles import model_card
from pymerge.planner import Plan
from pymerge.text import printable
from pymerge.version import NUMERICS_VERSION, VERSION

MANIFEST_SCHEMA = 1
CARD_NAME = "README.md"


@dataclass(frozen=True, slots=True)
class Summary:
    """A finished merge in numbers: bytes, seconds, counts.

    `peak_memory`: the largest resident set of this process so far, in bytes. `undecided`: elements that were
    written twice because their threshold was not yet known. `fallbacks`: groups that took the exact
    two-pass route; both are None where a device has merged, which does not count them.
    `shards_resumed`: shards taken over from an interrupted run, which were not read again.
    `on_cpu`: tensors of floats that a backend on a device has left to the CPU.
    """

    out: str
    method: str
    scope: str
    experts: int
    tensors: int
    elements: int
    shards: int
    shards_resumed: int
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_memory: int
    undecided: int | None
    fallbacks: int | None
    nan_outputs: int
    on_cpu: int = 0
    notes: tuple[str, ...] = ()

    @property
    def undecided_share(self) -> float | None:
        """Undecided elements as a share of all; None where they were not counted."""
        if self.undecided is None:
            return None
        return self.undecided / self.elements if self.elements else 0.0

    def describe(self) -> str:
        """The result in two or three lines."""
        speed = (self.bytes_read + self.bytes_written) / max(self.seconds, 1e-9) / 1e9
        lines = [
            f"{printable(self.out)}: {self.tensors:,} tensors of {self.experts} experts"
            f" merged by {self.method}",
            f"{self.seconds:.2f} s, {self.bytes_read:,} bytes read, {self.bytes_written:,} written,"
            f" {speed:.2f} GB/s, peak memory {self.peak_memory / 1e6:,.0f} MB",
        ]
        if self.shards_resumed:
            lines.append(f"resumed: {self.shards_resumed:,} of {self.shards:,} files were finished already")
        if self.on_cpu:
            lines.append(
                f"merged on the CPU: {self.on_cpu:,} of these tensors, which are float64, merged by a method"
                " without kernels for GPUs, put together from several places, or too large for the device's"
                " memory"
            )
        if self.nan_outputs:
            lines.append(f"warning: {self.nan_outputs:,} elements of the result are NaN")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        return {**asdict(self), "undecided_share": self.undecided_share, "notes": list(self.notes)}


def manifest(plan: Plan, summary: Summary) -> dict[str, object]:
    """merge.manifest.json without what the staging folder adds: the plan's digest and every file's sha256."""
    return {
        "schema": MANIFEST_SCHEMA,
        "pymerge": VERSION,
        "numerics": NUMERICS_VERSION,
        "method": plan.method.name,
        "inputs": [
            {
                "path": str(source.checkpoint.path),
                "role": "base" if source.is_base else "expert",
                "files": [
                    {
                        "file": shard.path.name,
                        "size": shard.header.file_size,
                        "header_sha256": shard.header.digest,
                    }
                    for shard in source.checkpoint.shards
                ],
            }
            for source in plan.inputs
        ],
        "summary": {name: value for name, value in summary.as_dict().items() if name != "out"},
    }


def side_files(plan: Plan, out: Path) -> dict[str, bytes]:
    """Every file of the output but the weights and the manifest, by name."""
    files = dict(plan.side_files)
    experts = [str(source.checkpoint.path) for source in plan.inputs if not source.is_base]
    files[CARD_NAME] = model_card(
        name=out.name,
        method=plan.method.name,
        base_model=str(plan.recipe.base) if plan.recipe.base else None,
        models=experts,
        recipe=plan.recipe.text,
        paper=plan.method.paper,
    )
    return files
