"""The torch reference as a merge tool, to measure: loads every model whole, merges, saves one file."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pymerge.backends.reference import merge_group
from pymerge.methods import METHODS
from pymerge.rule import Scope
from pymerge.ruling import rule_for


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of safetensors files."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("experts", type=Path, nargs="+")
    parser.add_argument("--method", required=True)
    parser.add_argument("--density", type=float, required=True)
    parser.add_argument("--scope", type=Scope, default=Scope.TENSOR)
    given = parser.parse_args()
    began = time.perf_counter()
    method, k = METHODS[given.method], len(given.experts)
    rule = rule_for(method, weights=[1.0] * k, densities=[given.density] * k, scope=given.scope)
    base, experts = load(given.base), [load(path) for path in given.experts]
    names = sorted(base)
    groups = [names] if given.scope is Scope.MODEL else [[name] for name in names]
    merged: dict[str, torch.Tensor] = {}
    for group in groups:
        bases = [base[name] for name in group] if rule.task_vector else None
        columns = [[expert[name] for expert in experts] for name in group]
        results = merge_group(group, bases, columns, rule, [base[name].dtype for name in group])
        merged |= dict(zip(group, results, strict=True))
    given.out.mkdir()
    save_file(merged, given.out / "model.safetensors", {"format": "pt"})
    print(json.dumps({"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
