"""The models of a plan, opened: plain ones, those with a LoRA, and heads that are the embedding."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from pymerge.adapted import Adapted
from pymerge.checkpoint.index import Checkpoint, Seen, open_checkpoint
from pymerge.checkpoint.sidefiles import ties_head, vocabulary_of
from pymerge.errors import CheckpointError, collected
from pymerge.job import Source
from pymerge.lora import open_adapted
from pymerge.plan_checks import Input, distinct_tables
from pymerge.plan_rule import Part, identity
from pymerge.text import shown

T = TypeVar("T")

# Names of tensors with a row for each token, heads apart.
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
_VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out|tok_embeddings|tokens_embed|shared"
    r"|token_embedding|output|final_logits_bias)(\.weight|\.bias)?$"
)


def open_inputs(
    parts: Sequence[Part],
    missing: Collection[Path],
    adapted: Mapping[Path, Adapted],
    problems: list[str],
    notes: list[str],
) -> dict[str, Input]:
    """The readable inputs: bases first, then the experts; the keys are their identities."""
    bases = [part.base.path for part in parts if part.base]
    experts = [entry.path for part in parts for entry in part.experts]
    merged = set(map(identity, experts))
    inputs: dict[str, Input] = {}
    seen = Seen.nothing()
    first = 0
    for path in [*bases, *experts]:
        key = identity(path)
        if path in missing or key in inputs:
            continue
        opened = collected(problems, partial(_opened, path, adapted, first, seen))
        if opened is None:
            continue
        checkpoint, made = opened
        model = adapted[path].model if path in adapted else path
        inputs[key] = Input(checkpoint, key not in merged, first, made, model)
        first += len(checkpoint.shards)
    return _with_heads(inputs, notes)


def _opened(
    path: Path, adapted: Mapping[Path, Adapted], first: int, seen: Seen
) -> tuple[Checkpoint, Mapping[str, Source]]:
    if path in adapted:
        return open_adapted(adapted[path], first, seen)
    return open_checkpoint(path, seen), {}


def _with_heads(inputs: Mapping[str, Input], notes: list[str]) -> dict[str, Input]:
    """A model whose head is its embedding lends that to others that have a head of their own."""
    names = dict.fromkeys(name for table in distinct_tables(inputs.values()) for name in table)
    found = list(filter(_HEAD.search, names))
    heads = {
        name: None
        for source in inputs.values()
        for name in found
        if name in source.checkpoint.tensors and source.checkpoint.tensors[name].entry.dtype.mergeable
    }
    if not heads:
        return dict(inputs)
    return {key: _with_head(source, list(heads), notes) for key, source in inputs.items()}


def _with_head(source: Input, heads: Sequence[str], notes: list[str]) -> Input:
    tensors = source.checkpoint.tensors
    lacking = [name for name in heads if name not in tensors]
    embedding = next((name for name in vocabulary_names(source) if not _HEAD.search(name)), None)
    if not lacking or embedding is None or not stated(lambda: ties_head(source.home), False):
        return source
    for name in lacking:
        notes.append(f"{source.label} has {shown(embedding)} for {shown(name)}: its config ties the two")
    more = {name: tensors[embedding] for name in lacking}
    made = {name: source.made[embedding] for name in lacking if embedding in source.made}
    checkpoint = source.checkpoint._replace(tensors={**tensors, **more})
    return source._replace(checkpoint=checkpoint, made={**source.made, **made}, lends=True)


def vocabulary_names(source: Input) -> Iterator[str]:
    """The tensors with a row for each token: by their names, and where the config says how many there are."""
    least: int | None = None
    for name, ref in source.checkpoint.tensors.items():
        entry = ref.entry
        if _VOCABULARY.search(name) and entry.dtype.mergeable and entry.shape and entry.count:
            if least is None:
                least = stated(lambda: vocabulary_of(source.home), None) or 0
            if entry.shape[0] >= least:
                yield name


def stated(read: Callable[[], T], otherwise: T) -> T:
    """What a configuration says; one that cannot be read, which `check_configs` reports, says `otherwise`."""
    try:
        return read()
    except CheckpointError:
        return otherwise


def with_rows(source: Input, names: Sequence[str], rows: int, made: Mapping[str, Source]) -> Input:
    """An input whose tensors `names` have `rows` rows, which come from `made`."""
    tensors = dict(source.checkpoint.tensors)
    for name in names:
        entry = tensors[name].entry
        tensors[name] = tensors[name]._replace(entry=replace(entry, shape=(rows, *entry.shape[1:])))
    checkpoint = source.checkpoint._replace(tensors=tensors)
    return source._replace(checkpoint=checkpoint, made={**source.made, **made})
