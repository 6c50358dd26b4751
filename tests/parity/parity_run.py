"""Merges every recipe by both tools, once for all tests and all of their processes."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from families import Tensors, read_checkpoint
from numpy.typing import NDArray
from parity_family import write_family
from parity_settings import ROWS, SETTINGS

import pymerge
from pymerge.dtypes import DType
from pymerge.job import Region, TensorJob
from pymerge.planner import Plan
from pymerge.rule import Rule

Numbers = NDArray[np.float64]

SEED = 5
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "recipes"
OWN_EXAMPLES = sorted(EXAMPLES.glob("pymerge-*.yml"))
SHARED_EXAMPLES = sorted(set(EXAMPLES.glob("*.yml")) - set(OWN_EXAMPLES))
DRIVER = Path(__file__).with_name("mergekit_driver.py")

# Other versions mean other things by the same recipes.
MERGEKIT = "0.1.5"


def found_mergekit() -> str:
    """The version that this interpreter would import, without importing it; "" if there is none."""
    return version("mergekit") if find_spec("mergekit") else ""


needs_mergekit = pytest.mark.skipif(
    found_mergekit() != MERGEKIT,
    reason=f"needs mergekit {MERGEKIT}, found {found_mergekit() or 'none'}: pip install '.[parity]'",
)


@dataclass(frozen=True)
class Merged:
    """One tensor as both tools merged it, and its inputs in f64; `base` is None where there is none."""

    name: str
    rule: Rule
    base: Numbers | None
    experts: list[Numbers]
    ours: torch.Tensor
    theirs: torch.Tensor


@dataclass(frozen=True)
class Both:
    """One recipe and the folders of the two results."""

    recipe: Path
    ours: Path
    theirs: Path

    @cached_property
    def plan(self) -> Plan:
        """What pymerge makes of the recipe: the inputs and the rule of every tensor."""
        return pymerge.plan(self.recipe)

    def tensors(self) -> Iterator[Merged]:
        """Every tensor; both tools must have written the same names, shapes and types."""
        ours, theirs = read_checkpoint(self.ours), read_checkpoint(self.theirs)
        assert described(ours) == described(theirs)
        for job in (job for shard in self.plan.jobs for job in shard):
            assert job.rule is not None
            yield Merged(
                job.name,
                job.rule,
                None if job.base is None else self._numbers(job, job.base),
                [self._numbers(job, region) for region in job.experts],
                ours[job.name],
                theirs[job.name],
            )

    def _numbers(self, job: TensorJob, region: object) -> Numbers:
        assert isinstance(region, Region), "no recipe here has a LoRA or joins vocabularies"
        size = job.count * region.dtype.itemsize
        data = np.fromfile(self.plan.shards[region.file].path, np.uint8, size, offset=region.start)
        stored = torch.from_numpy(data).view(torch_type(region.dtype))
        cast = stored if job.cast is None else stored.to(torch_type(job.cast))
        numbers: Numbers = cast.to(torch.float64).numpy()
        return numbers


def torch_type(dtype: DType) -> torch.dtype:
    found = getattr(torch, dtype.torch_name)
    assert isinstance(found, torch.dtype)
    return found


def described(tensors: Tensors) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (x.shape, x.dtype) for name, x in tensors.items()}


def recipe_name(method: str, number: int) -> str:
    return f"{method}-{number}"


def merge_all(home: Path) -> None:
    """Makes the families, writes the recipes and merges them by both tools below `home`."""
    tasks = []

    def merge(folder: Path, recipe: Path) -> None:
        """By us at once, by mergekit together with all others."""
        ours, theirs = (home / tool / folder.name / recipe.stem for tool in ("ours", "theirs"))
        pymerge.merge(recipe, ours, threads=1)
        tasks.append([str(folder), str(recipe), str(theirs), SEED])

    for type_name, dtype in TYPES.items():
        folder = home / type_name
        write_family(folder, dtype)
        for method, number in ROWS:
            path = folder / f"{recipe_name(method, number)}.yml"
            SETTINGS[method][number].write(path, method, type_name)
            merge(folder, path)
    place = home / "examples"
    write_family(place / "family", torch.float32, biases=False)
    for example in SHARED_EXAMPLES:
        copy = place / example.name
        copy.write_bytes(example.read_bytes())
        merge(place, copy)
    (home / "tasks.json").write_text(json.dumps(tasks))
    command = [sys.executable, str(DRIVER), str(home / "tasks.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"mergekit failed at {last}:\n{done.stderr[-2000:]}"


def setting_results(results: Path, method: str, number: int, type_name: str) -> Both:
    """The results of one setting; `type_name`: the type of the inputs, the merge and the output."""
    return results_of(results, type_name, recipe_name(method, number))


def results_of(results: Path, folder: str, name: str) -> Both:
    """The results of the recipe `name` in `folder`."""
    recipe = results / folder / f"{name}.yml"
    return Both(recipe, results / "ours" / folder / name, results / "theirs" / folder / name)


def merged_once(shared: Path) -> Path:
    """The folder of all results; the first process to come makes them, others wait."""
    home = shared / "parity"
    with (shared / "parity.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "done").exists():
            home.mkdir()  # fails where another process failed
            merge_all(home)
            (home / "done").touch()
    return home
