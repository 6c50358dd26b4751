"""The files beside the weights, as far as a plan knows them; the model card comes with the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pymerge.checkpoint.index import INDEX_NAME
from pymerge.checkpoint.layout import ShardLayout, index_json
from pymerge.checkpoint.sidefiles import CONFIG_NAME, folder_of, with_dtype, with_layers
from pymerge.dtypes import DType
from pymerge.job import TensorJob

RECIPE_NAME = "mergekit_config.yml"


def side_files(
    donor: Path,
    carried: Mapping[str, bytes],
    recipe: str,
    layouts: Sequence[ShardLayout],
    jobs: Sequence[Sequence[TensorJob]],
    layers: Sequence[int],
) -> dict[str, bytes]:
    """By name: what is carried over from `donor` with the right dtype in its config, recipe and index.

    `layers`: the config's layers that the output has, in its order; empty: all, as they are.
    """
    files = {**carried, RECIPE_NAME: recipe.encode("utf-8")}
    dtype = _main_dtype(jobs)
    if dtype is not None and CONFIG_NAME in files:
        files[CONFIG_NAME] = with_dtype(folder_of(donor) / CONFIG_NAME, files[CONFIG_NAME], dtype)
    if layers and CONFIG_NAME in files:
        files[CONFIG_NAME] = with_layers(files[CONFIG_NAME], layers)
    index = index_json(layouts)
    if index is not None:
        files[INDEX_NAME] = index
    return files


def _main_dtype(jobs: Sequence[Sequence[TensorJob]]) -> DType | None:
    """The float type that most of the output's elements have; what config.json should say."""
    elements: Counter[DType] = Counter()
    for shard in jobs:
        for job in shard:
            if job.rule is not None:
                elements[job.out.dtype] += job.count
    return elements.most_common(1)[0][0] if elements else None
