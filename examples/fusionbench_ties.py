"""FusionBench's TIES-Merging, made by pymerge: the same arguments, and a model pool as it is.

In FusionBench let the class derive from fusion_bench.method.BaseAlgorithm, and name it in a configuration.
Instead of several flat copies of every model it needs the memory of one more model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pymerge


class TiesMerging:
    """`threshold`: the share of entries kept, above 1 in percent. `merge_func`: "sum" or "mean"."""

    def __init__(
        self,
        scaling_factor: float = 0.3,
        threshold: float = 20,
        remove_keys: Sequence[str] = (),
        merge_func: str = "sum",
    ) -> None:
        if merge_func not in ("sum", "mean"):
            raise ValueError(f"merge_func is {merge_func!r}, expected sum or mean")
        self.scaling_factor, self.threshold = scaling_factor, threshold
        self.remove_keys, self.merge_func = remove_keys, merge_func

    def run(self, modelpool: Any) -> Any:
        """The pretrained model, with the task vectors of the others merged in."""
        model = modelpool.load_model("_pretrained_")
        pymerge.merge_into(
            model,
            [modelpool.load_model(name) for name in modelpool.model_names],
            preset="fusionbench",
            density=self.threshold / 100 if self.threshold > 1 else self.threshold,
            lambda_=self.scaling_factor,
            normalize=self.merge_func == "mean",
            exclude=self.remove_keys,
        )
        return model
