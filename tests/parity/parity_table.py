"""Prints, for every method, how far the two tools lie apart and why: `python tests/parity/parity_table.py`.

The first table counts float32 elements further apart than two units; the second has both tools' errors in
bfloat16, in units of the last place. All settings of a method are taken together.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
os.environ["HF_HUB_OFFLINE"] = "1"

from parity_errors import MEASURED, errors  # noqa: E402
from parity_explain import explain  # noqa: E402
from parity_run import Both, merged_once, setting_results  # noqa: E402
from parity_settings import SETTINGS  # noqa: E402

from pymerge.methods import METHODS  # noqa: E402


def results_by_method(results: Path, type_name: str) -> dict[str, list[Both]]:
    """The results of all settings of each method."""
    return {
        method: [setting_results(results, method, number, type_name) for number in range(len(settings))]
        for method, settings in SETTINGS.items()
    }


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pymerge-parity-") as folder:
        results = merged_once(Path(folder))
        print("| method | elements | further than 2 units | why |\n|---|---|---|---|")
        for method, found in results_by_method(results, "float32").items():
            if METHODS[method].trim.drawn:
                print(f"| `{method}` | | | random words of their own: distributions are compared |")
                continue
            reasons: Counter[str] = Counter()
            total = 0
            for tensor in (tensor for both in found for tensor in both.tensors()):
                total += tensor.ours.numel()
                reasons += explain(tensor)
            why = "; ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common())
            print(f"| `{method}` | {total:,} | {reasons.total():,} | {why} |")
        print("\n| method | pymerge mean | max | mergekit mean | max |\n|---|---|---|---|---|")
        for method, found in results_by_method(results, "bfloat16").items():
            measured = [both for number, both in enumerate(found) if (method, number) in MEASURED]
            tensors = [tensor for both in measured for tensor in both.tensors()]
            cells = []
            for tool in ("ours", "theirs"):
                off = np.concatenate([errors(tensor, getattr(tensor, tool)) for tensor in tensors])
                cells.append(f"{off.mean():.3f} | {off.max():.3g}")
            print(f"| `{method}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
