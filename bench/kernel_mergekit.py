"""Times mergekit's own ties on tensors in memory; run by bench.kernel with mergekit's interpreter."""

from __future__ import annotations

import sys
import time

import torch


def main(path: str, density: float, threads: int) -> None:
    """Prints seconds for merging the tensors in `path`: the base first, then the experts."""
    from mergekit.merge_methods import merge_tensors

    torch.set_num_threads(threads)
    tensors = torch.load(path)
    parameters = {"weight": 1.0, "density": density}
    merge_tensors([t[:1024] for t in tensors], "ties", parameters=parameters, base_index=0)  # warm up
    began = time.perf_counter()
    merge_tensors(tensors, "ties", parameters=parameters, base_index=0)
    print(f"{time.perf_counter() - began:.6f}")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
