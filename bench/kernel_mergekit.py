"""Times mergekit's own ties on tensors in memory; run by bench.kernel with mergekit's interpreter."""

from __future__ import annotations

import sys
import time

import torch


def main(path: str, density: float, threads: int) -> None:
    """Prints seconds for merging the tensors in `path`: the base first, then the experts."""
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask
    from mergekit.sparsify import RescaleNorm, SparsificationMethod, sparsify  # noqa: F401

    torch.set_num_threads(threads)
    base, *experts = torch.load(path)
    began = time.perf_counter()
    deltas = torch.stack(
        [sparsify(x - base, density=density, method=SparsificationMethod.magnitude) for x in experts]
    )
    mask = get_mask(deltas, method="sum", mask_dtype=deltas.dtype)
    merged = (deltas * mask).sum(dim=0) / mask.sum(dim=0).clamp(min=1)
    out = base + merged
    print(f"{time.perf_counter() - began:.6f} {out.float().sum().item()}")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
