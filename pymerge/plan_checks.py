"""What headers, folders and the file system can show to be wrong before anything is merged."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from pymerge.checkpoint.header import TensorEntry
from pymerge.checkpoint.index import Checkpoint, TensorRef
from pymerge.checkpoint.sidefiles import read_config
from pymerge.checkpoint.staging import PARTIAL
from pymerge.dtypes import DType
from pymerge.errors import CheckpointError
from pymerge.job import Region, Source
from pymerge.text import shown

# A broken model may break every tensor; so many are named, the rest counted.
NAMED = 3


class Input(NamedTuple):
    """One checkpoint of a plan; `first_file` is the file number of its first shard.

    `made`: the tensors that its files do not hold as they are, whose entries then give type and shape only.
    `model`: what configuration and tokenizer lie beside, where that is not the checkpoint's path.
    `lends`: its embedding is taken for its head too.
    """

    checkpoint: Checkpoint
    is_base: bool
    first_file: int
    made: Mapping[str, Source] = MappingProxyType({})
    model: Path | None = None
    lends: bool = False

    @property
    def home(self) -> Path:
        """The model's folder, or the file in it."""
        return self.model or self.checkpoint.path

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{'base' if self.is_base else 'expert'} {self.checkpoint.path}"

    def source(self, name: str) -> Source:
        """Where the elements of a tensor come from."""
        made = self.made.get(name) if self.made else None
        return made or region_of(self.checkpoint, self.first_file, name)


def region_of(checkpoint: Checkpoint, first_file: int, name: str) -> Region:
    """Where a tensor lies, given the number of the checkpoint's first file."""
    shard, entry = checkpoint.tensors[name]
    return Region(entry.dtype, entry.begin, first_file + shard)


def distinct_tables(inputs: Iterable[Input]) -> list[dict[str, TensorRef]]:
    """The tables of tensors of these inputs; one that several share stands once."""
    return list({id(table): table for table in (source.checkpoint.tensors for source in inputs)}.values())


def check_configs(inputs: Sequence[Input], problems: list[str]) -> None:
    """Refuse quantized checkpoints: their numbers mean nothing without their scales."""
    for source in inputs:
        try:
            config = read_config(source.home)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if config.get("quantization_config"):
            problems.append(
                f"{source.label} is quantized (quantization_config in config.json), which is not supported"
            )


def check_tensors(inputs: Sequence[Input], optional: Collection[str], problems: list[str]) -> list[str]:
    """The names of the tensors to merge, in the file order of the first input; a mismatch is a problem.

    Those in `optional` are left to the caller.
    """
    if not inputs:
        return []
    first, others = inputs[0], inputs[1:]
    table = first.checkpoint.tensors
    before = len(problems)
    check_dtypes(first, problems)
    sound = len(problems) == before
    for other in others:
        found = other.checkpoint.tensors
        if found is table and sound:
            continue
        _check_names(first, other, optional, problems)
        check_dtypes(other, problems)
        clashes = (
            clash
            for name, ref in table.items()
            if name not in optional
            if (theirs := found.get(name)) is not None and (clash := _clash(name, ref, theirs, first))
        )
        _report(f"{other.label}: ", "tensors that do not fit", clashes, problems)
    if not table:
        problems.append(f"{first.label} has no tensors")
    return [name for name, _ in sorted(table.items(), key=_file_order) if name not in optional]


def check_pairs(inputs: Sequence[Input], rows: Sequence[tuple[str, ...]], problems: list[str]) -> None:
    """Tensors that are merged under different names must exist and fit; `rows`: one name for each input."""
    first = inputs[0]
    table = first.checkpoint.tensors
    for number, other in enumerate(inputs):
        found = other.checkpoint.tensors
        if missing := [row[number] for row in rows if row[number] not in found]:
            problems.append(f"{other.label} lacks {named(missing)} that other sources of its slice have")
        pairs = ((row[number], table.get(row[0]), found.get(row[number])) for row in rows)
        clashes = (
            clash
            for name, ours, theirs in pairs
            if ours and theirs and (clash := _clash(name, ours, theirs, first))
        )
        _report(f"{other.label}: ", "tensors that do not fit", clashes, problems)


def _file_order(item: tuple[str, TensorRef]) -> tuple[int, int, str]:
    name, ref = item
    return ref.shard, ref.entry.begin, name


def _check_names(first: Input, other: Input, optional: Collection[str], problems: list[str]) -> None:
    mine, theirs = first.checkpoint.tensors, other.checkpoint.tensors
    if missing := [name for name in mine if name not in theirs and name not in optional]:
        problems.append(f"{other.label} lacks {named(missing)} of {first.label}")
    if extra := [name for name in theirs if name not in mine and name not in optional]:
        problems.append(f"{other.label} has {named(extra)}, which {first.label} lacks")


def named(names: Sequence[str]) -> str:
    """A few of these tensors by name, the others counted."""
    listed = ", ".join(shown(name) for name in names[:NAMED])
    if len(names) == 1:
        return f"tensor {listed}"
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{len(names):,} tensors ({listed}{more})"


def check_dtypes(source: Input, problems: list[str]) -> None:
    """Refuse element types that can be neither merged nor copied."""
    bad = (
        f"tensor {shown(name)} is {ref.entry.dtype.header_name}, which cannot be merged"
        for name, ref in source.checkpoint.tensors.items()
        if not (ref.entry.dtype.mergeable or ref.entry.dtype.copyable)
    )
    _report(f"{source.label}: ", "tensors of such types", bad, problems)


def _clash(name: str, ours: TensorRef, theirs: TensorRef, first: Input) -> str | None:
    mine, found = ours.entry, theirs.entry
    if found.shape == mine.shape and (
        found.dtype is mine.dtype or (found.dtype.mergeable and mine.dtype.mergeable)
    ):
        return None
    what = "shape" if found.shape != mine.shape else "dtype"
    expected = f"{_value(mine, what)} as in {first.label}"
    return f"tensor {shown(name)} has {what} {_value(found, what)}, expected {expected}"


def check_working_types(inputs: Sequence[Input], cast: DType | None, problems: list[str]) -> None:
    """Scope model compares magnitudes of all tensors, so all must be computed in one type."""
    first: dict[bool, str] = {}
    for name, ref in inputs[0].checkpoint.tensors.items() if inputs else ():
        if ref.entry.dtype.mergeable:
            found = [source.checkpoint.tensors.get(name) for source in inputs]
            types = {cast} if cast else {other.entry.dtype for other in found if other}
            first.setdefault(DType.F64 in types, name)
    if len(first) == 2:
        problems.append(
            f"scope model: tensor {shown(first[True])} is computed in float64, {shown(first[False])} in"
            " float32; set dtype to have one type for all"
        )


def _value(entry: TensorEntry, what: str) -> str:
    return shown(list(entry.shape)) if what == "shape" else entry.dtype.header_name


def _report(prefix: str, kind: str, sentences: Iterable[str], problems: list[str]) -> None:
    """Add the first few sentences and the number of the others."""
    rest = 0
    for number, sentence in enumerate(sentences):
        if number < NAMED:
            problems.append(prefix + sentence)
        else:
            rest += 1
    if rest:
        problems.append(f"{prefix}{rest:,} more {kind}")


def check_output(out: Path, inputs: Iterable[Path], problems: list[str]) -> None:
    """The output must be new, apart from every input, in a folder that can be written."""
    if "\0" in str(out):
        problems.append(f"output {out} cannot be the name of a folder")
        return
    if os.path.lexists(out):
        problems.append(f"output {out} exists already; remove it, or give another name")
    target = _real(out)
    for path in dict.fromkeys(inputs):
        given = _real(path)
        if target == given:
            problems.append(f"output {out} is the input {path}")
        elif given in target.parents:
            problems.append(f"output {out} lies inside the input {path}")
        elif target in given.parents:
            problems.append(f"input {path} lies inside the output {out}")
    parent = _existing_parent(target)
    if not parent.is_dir():
        problems.append(f"output {out} cannot be made: {parent} is not a folder")
    elif not os.access(parent, os.W_OK | os.X_OK):
        problems.append(f"output {out} cannot be made: no permission to write in {parent}")


def free_bytes(out: Path) -> int:
    """Bytes that a merge into `out` may still use, those of an interrupted run into it included."""
    target = _real(out)
    state = os.statvfs(_existing_parent(target))
    used = 0
    partial = target.with_name(target.name + PARTIAL)
    if partial.is_dir():
        with os.scandir(partial) as entries:
            used = sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)
    return state.f_bavail * state.f_frsize + used


def device_of(out: Path) -> int:
    """The file system that `out` will lie on."""
    return os.stat(_existing_parent(_real(out))).st_dev


def lies_in(path: Path, folder: Path) -> bool:
    """Whether `path` is the folder, or below it."""
    return _real(path).is_relative_to(_real(folder))


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # not Path.resolve, which raises on a loop of links


def _existing_parent(target: Path) -> Path:
    return next((parent for parent in target.parents if os.path.lexists(parent)), target)
