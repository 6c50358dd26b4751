"""The files beside the weights, as far as a plan knows them; the model card comes with the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pymerge.checkpoint.chat import check_template, chosen_template, with_template
from pymerge.checkpoint.layout import ShardLayout, index_json, index_name
from pymerge.checkpoint.sidefiles import (
    CONFIG_NAME,
    collect,
    folder_of,
    with_dtype,
    with_layers,
    with_vocabulary,
    without_ties,
)
from pymerge.checkpoint.tokenizer import TOKENIZER_FILES, tokenizer_files
from pymerge.dtypes import DType
from pymerge.job import TensorJob
from pymerge.plan_vocabulary import Vocabulary
from pymerge.recipe import Recipe

RECIPE_NAME = "mergekit_config.yml"


def carried(recipe: Recipe, donor: Path, vocabulary: Vocabulary | None, unties: bool) -> dict[str, bytes]:
    """What comes from `donor`, but for the tokenizer that the recipe asks for and the chat template.

    `unties`: the output has a head, which `donor` has not. Raises PymergeError: what lies there cannot be
    read, or there is no such template.
    """
    files = collect(donor)
    check_template(recipe.chat_template)
    if vocabulary is not None:
        files = {name: data for name, data in files.items() if name not in TOKENIZER_FILES}
        files |= tokenizer_files(vocabulary.tokenizer, collect(vocabulary.donor))
        if CONFIG_NAME in files:
            files[CONFIG_NAME] = with_vocabulary(files[CONFIG_NAME], vocabulary.rows)
    if unties and CONFIG_NAME in files:
        files[CONFIG_NAME] = without_ties(files[CONFIG_NAME])
    if recipe.chat_template is not None:
        template = chosen_template(recipe.chat_template, [recipe.home(path) for path in recipe.merged])
        files = with_template(files, template) if template is not None else files
    return files


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
        files[index_name(layouts)] = index
    return files


def _main_dtype(jobs: Sequence[Sequence[TensorJob]]) -> DType | None:
    """The float type that most of the output's elements have; what config.json should say."""
    elements: Counter[DType] = Counter()
    for shard in jobs:
        for job in shard:
            if job.rule is not None:
                elements[job.out.dtype] += job.count
    return elements.most_common(1)[0][0] if elements else None
